# Tests and bench of the engine, the recompute plan and the sampler.
set(engine_support
  ${CMAKE_CURRENT_LIST_DIR}/../support/engine_fixture.c
  ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c)
ibid_test(attention.engine
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_engine.c ${CMAKE_CURRENT_LIST_DIR}/../support/naive_llama.c ${engine_support}
  LIBS ibid_engine TIMEOUT 300)
ibid_test(attention.recompute
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_recompute.c ${engine_support}
  LIBS ibid_engine TIMEOUT 300)
ibid_test(attention.sampler SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_sampler.c LIBS ibid_engine)
ibid_test(attention.engine_batch
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_engine_batch.c ${engine_support}
  LIBS ibid_engine Threads::Threads TIMEOUT 300)
ibid_test(attention.engine_golden
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_engine_golden.c ${engine_support}
  LIBS ibid_engine TIMEOUT 300)
# Every backend by force, which CPUs with a faster one never choose. reference is slow.
foreach(backend reference avx2 avxvnni avx512 avx512vnni)
  set(positions 160)
  if(backend STREQUAL reference)
    set(positions 48)
  endif()
  add_test(NAME attention.engine_golden_${backend} COMMAND test_attention_engine_golden
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(attention.engine_golden_${backend} PROPERTIES TIMEOUT 900 SKIP_RETURN_CODE 77 LABELS plain_only
    ENVIRONMENT "IBID_KERNELS=${backend};IBID_TEST_POSITIONS=${positions}")
endforeach()
add_executable(bench_engine ${CMAKE_CURRENT_LIST_DIR}/../bench/engine.c)
target_link_libraries(bench_engine PRIVATE ibid_attention ibid_flags)
