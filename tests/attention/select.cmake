# Decoding over chosen pages.
ibid_test(attention.select
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_select.c ${CMAKE_CURRENT_LIST_DIR}/../support/engine_fixture.c
    ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_engine TIMEOUT 300)
add_executable(bench_select ${CMAKE_CURRENT_LIST_DIR}/../bench/select.c)
target_link_libraries(bench_select PRIVATE ibid_attention ibid_flags)
