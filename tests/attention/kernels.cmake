ibid_test(attention.kernels SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_kernels.c LIBS ibid_kernels TIMEOUT 300)
ibid_test(attention.pool SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_pool.c LIBS ibid_kernels Threads::Threads)
add_executable(bench_kernels ${CMAKE_CURRENT_LIST_DIR}/../bench/kernels.c)
target_link_libraries(bench_kernels PRIVATE ibid_kernels ibid_flags m)
target_compile_options(bench_kernels PRIVATE -O3) # its own peak-speed loops must unroll
