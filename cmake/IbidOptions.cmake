option(IBID_TESTS "Build the tests" ON)
option(IBID_ONLY_GPU_CHECK "Build only what tools/gpu-check runs: no package but the CUDA toolkit" OFF)
option(IBID_FUZZERS "Build libFuzzer targets (clang only)" OFF)
set(IBID_SANITIZE "" CACHE STRING "Sanitizers for the whole build: address,undefined or thread")

# Own code only: foreign headers come in as SYSTEM through imported targets.
add_library(ibid_flags INTERFACE)
target_compile_options(ibid_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:C,CXX>:-Wall;-Wextra;-Wconversion;-Werror>") # CUDA has its own (attention/cuda)
target_compile_definitions(ibid_flags INTERFACE _GNU_SOURCE IBID_VERSION="${PROJECT_VERSION}")
target_include_directories(ibid_flags INTERFACE ${CMAKE_SOURCE_DIR})
if(IBID_FUZZERS)
  add_compile_options(-fsanitize=fuzzer-no-link) # coverage of the libraries, not of the drivers alone
endif()
if(IBID_SANITIZE)
  add_compile_options(-fsanitize=${IBID_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${IBID_SANITIZE})
endif()
