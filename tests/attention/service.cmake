# Tests of the room, its plans, and a bench of heads and answers on the engine alone.
add_executable(bench_attention ${CMAKE_CURRENT_LIST_DIR}/../bench/attention.c)
target_link_libraries(bench_attention PRIVATE ibid_attention PkgConfig::JANSSON ibid_flags m)
# Tokens per second of concurrent answers.
add_executable(bench_streams ${CMAKE_CURRENT_LIST_DIR}/../bench/streams.c)
target_link_libraries(bench_streams PRIVATE ibid_attention Threads::Threads ibid_flags)
# What tools/train-extract reads.
add_executable(bench_extract ${CMAKE_CURRENT_LIST_DIR}/../bench/extract.c)
target_link_libraries(bench_extract PRIVATE ibid_attention PkgConfig::JANSSON ibid_flags)
# First token over a store that is cold, cached and warm.
add_executable(bench_stored ${CMAKE_CURRENT_LIST_DIR}/../bench/stored.c)
target_link_libraries(bench_stored PRIVATE ibid_attention ibid_flags)
ibid_test(attention.service
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_service.c ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_attention TIMEOUT 1800)
ibid_test(attention.backend
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_backend.c ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_attention TIMEOUT 600)
# One answer by force with what machines without AVX-512 choose; --answer takes any IBID_KERNELS.
foreach(backend avx2 avxvnni)
  add_test(NAME attention.service_${backend} COMMAND test_attention_service --answer
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(attention.service_${backend} PROPERTIES TIMEOUT 600 SKIP_RETURN_CODE 77
    ENVIRONMENT "IBID_KERNELS=${backend}" LABELS plain_only)
endforeach()
ibid_test(attention.calibration
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_calibration.c
  LIBS ibid_calibration)
ibid_fuzz(calibration
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/../fuzz/calibration.c
  LIBS ibid_calibration)
ibid_test(attention.head_train
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_head_train.c
  LIBS ibid_attention TIMEOUT 600)
# 40 s of arithmetic, ten times that under a sanitizer.
set_tests_properties(attention.head_train PROPERTIES LABELS plain_only)
ibid_test(attention.citation
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_citation.c
  LIBS ibid_attention)
ibid_test(attention.extract
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_extract.c
  LIBS ibid_attention)
ibid_test(attention.batching
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_batching.c
    ${CMAKE_CURRENT_LIST_DIR}/../support/engine_fixture.c
    ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_attention Threads::Threads TIMEOUT 900)
ibid_test(attention.decode_alloc
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_decode_alloc.c
    ${CMAKE_CURRENT_LIST_DIR}/../support/engine_fixture.c
    ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_attention Threads::Threads TIMEOUT 900)
ibid_test(attention.load
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_load.c ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_attention TIMEOUT 900)
