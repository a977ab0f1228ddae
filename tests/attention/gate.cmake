# How close one way of computing is to another.
add_executable(bench_quality ${CMAKE_CURRENT_LIST_DIR}/../bench/quality.c)
target_link_libraries(bench_quality PRIVATE ibid_engine ibid_flags m)
ibid_test(attention.gate
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_gate.c ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_attention TIMEOUT 300)
ibid_test(attention.gate_room
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_gate_room.c ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_attention TIMEOUT 300)

# What this machine can do at most: a bench's other end of the scale.
add_executable(bench_machine ${CMAKE_CURRENT_LIST_DIR}/../bench/machine.c)
target_link_libraries(bench_machine PRIVATE ibid_kernels ibid_flags)
target_compile_options(bench_machine PRIVATE -O3) # its loops must unroll
