# The CUDA kernels and what is built on them, on the emulator of a grid: these need no GPU and no
# toolkit. With a toolkit the same tests are built for the GPU too, and are skipped where there is none.
add_library(ibid_emulator STATIC
  ${CMAKE_CURRENT_LIST_DIR}/../support/emulator/device.cpp
  ${CMAKE_CURRENT_LIST_DIR}/../support/emulator/grid.cpp
  ${IBID_CUDA_KERNELS})
set_source_files_properties(${IBID_CUDA_KERNELS} TARGET_DIRECTORY ibid_emulator PROPERTIES
  LANGUAGE CXX COMPILE_OPTIONS "-x;c++;-O2;-Wno-unknown-pragmas;-Wno-pass-failed")
set_target_properties(ibid_emulator PROPERTIES CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON)
target_link_libraries(ibid_emulator PUBLIC ibid_kernels ibid_base ibid_flags)

# The engine over it.
add_library(ibid_engine_emulated STATIC ${IBID_ENGINE_SOURCES} ${IBID_ENGINE_GPU_SOURCES})
target_link_libraries(ibid_engine_emulated PUBLIC ibid_emulator ibid_cuda_host ibid_model PRIVATE m)

function(ibid_cuda_test name)
  cmake_parse_arguments(T "" "TIMEOUT" "SOURCES;LIBS;ARGS;GPU_ARGS" ${ARGN})
  foreach(device emulated gpu)
    if(device STREQUAL gpu AND NOT IBID_HAVE_CUDA)
      continue()
    endif()
    set(library ibid_engine_emulated)
    set(args ${T_ARGS})
    if(device STREQUAL gpu)
      set(library ibid_engine ibid_cuda)
      set(args ${T_GPU_ARGS})
    endif()
    add_executable(${device}_${name} ${T_SOURCES} ${CMAKE_SOURCE_DIR}/tests/attention/cuda/kernel_fixture.c)
    target_link_libraries(${device}_${name} PRIVATE ${T_LIBS} ibid_cuda_host ${library} ibid_flags m)
    if(device STREQUAL emulated)
      target_compile_definitions(${device}_${name} PRIVATE IBIDI_EMULATED=1)
    endif()
    set_target_properties(${device}_${name} PROPERTIES LINKER_LANGUAGE CXX)
    add_test(NAME attention.cuda_${name}.${device} COMMAND ${device}_${name} ${args} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    set_tests_properties(attention.cuda_${name}.${device} PROPERTIES TIMEOUT 600 SKIP_RETURN_CODE 77)
  endforeach()
endfunction()

# Under AddressSanitizer the kernels alone, with fewer shapes: what they read beside their rows shows nowhere else.
if(IBID_SANITIZE)
  ibid_cuda_test(rows SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/test_rows.c LIBS ibid_model)
  ibid_cuda_test(attention SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/test_attention.c ARGS 6002 6)
  ibid_cuda_test(select SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/test_select.c ARGS 7001 6)
  return()
endif()

ibid_cuda_test(rows SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/test_rows.c LIBS ibid_model)
ibid_cuda_test(attention SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/test_attention.c GPU_ARGS 6002 288)
ibid_cuda_test(select SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/test_select.c GPU_ARGS 7002 200)
ibid_cuda_test(select_model SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/test_select_model.c
  ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c LIBS ibid_model)
ibid_cuda_test(model SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/test_model.c ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  GPU_ARGS all)
# Numbers are measured by tools/gpu-check; here only that it runs.
ibid_cuda_test(bench SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda/bench.c LIBS ibid_model ARGS tiny GPU_ARGS tiny)
# The attention room on the emulator and a model for it: a whole service (tests/front/test_gpu_service.py).
if(TARGET ibid_attention)
  # As objects, which the linker takes before those of the engine that ibid_attention links.
  add_executable(ibid-attention-emulated ${CMAKE_SOURCE_DIR}/attention/attention_main.c
    $<TARGET_OBJECTS:ibid_engine_emulated> $<TARGET_OBJECTS:ibid_emulator>)
  target_link_libraries(ibid-attention-emulated PRIVATE ibid_attention ibid_cuda_host ibid_flags)
  set_target_properties(ibid-attention-emulated PROPERTIES LINKER_LANGUAGE CXX)
  add_executable(write_model ${CMAKE_CURRENT_LIST_DIR}/cuda/write_model.c ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c)
  target_link_libraries(write_model PRIVATE ibid_model ibid_base ibid_flags)
endif()
# The same with threads in shuffled order: what a missing barrier would change.
foreach(name rows attention select)
  add_test(NAME attention.cuda_${name}.shuffled COMMAND emulated_${name} 6003 18 WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(attention.cuda_${name}.shuffled PROPERTIES TIMEOUT 600
    ENVIRONMENT IBID_EMULATOR_ORDER=77)
endforeach()
# And what is put on streams done at random times, not as late as can be: what a missing event would change.
foreach(name model select_model)
  add_test(NAME attention.cuda_${name}.streams COMMAND emulated_${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(attention.cuda_${name}.streams PROPERTIES TIMEOUT 600 SKIP_RETURN_CODE 77
    ENVIRONMENT IBID_EMULATOR_STREAMS=5)
endforeach()
