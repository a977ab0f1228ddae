ibid_test(attention.kernels SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_kernels.c LIBS ibid_kernels TIMEOUT 300)
ibid_test(attention.pool SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_pool.c LIBS ibid_kernels Threads::Threads)
add_executable(bench_kernels ${CMAKE_CURRENT_LIST_DIR}/../bench/kernels.c)
target_link_libraries(bench_kernels PRIVATE ibid_kernels ibid_flags m)
target_compile_options(bench_kernels PRIVATE -O3) # its own peak-speed loops must unroll
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  # The avxvnni backend for CPUs without AVX-VNNI (avxvnni_evex.c).
  add_library(avxvnni_evex OBJECT ${CMAKE_CURRENT_LIST_DIR}/avxvnni_evex.c)
  target_link_libraries(avxvnni_evex PRIVATE ibid_kernels ibid_flags)
  target_compile_options(avxvnni_evex PRIVATE ${IBID_KERNEL_LEVEL} -ffp-contract=fast -mavx2 -mfma -mf16c -mavx512f
    -mavx512vl -mavx512vnni -mprefer-vector-width=256)
  target_compile_definitions(avxvnni_evex PRIVATE IBIDI_KERNELS_X86=1)
  foreach(program test_attention_kernels bench_kernels)
    target_link_libraries(${program} PRIVATE avxvnni_evex)
    target_compile_definitions(${program} PRIVATE IBID_TEST_EVEX=1)
  endforeach()
endif()
