# ibid_test(room.name SOURCES a.c... LIBS targets... [TIMEOUT s] [ARGS ...])
#   One cmocka program, one CTest entry named room.name; exit 77 means skipped.
# ibid_fuzz(name SOURCES f.c LIBS targets...)
#   LLVMFuzzerTestOneInput in f.c. Always built as a replay program over tests/corpus/<name>/ and run
#   in CTest as fuzz.<name>; with IBID_FUZZERS also as a libFuzzer program fuzz_<name>.
find_package(cmocka REQUIRED CONFIG)

function(ibid_test name)
  cmake_parse_arguments(T "" "TIMEOUT" "SOURCES;LIBS;ARGS" ${ARGN})
  string(REPLACE "." "_" target test_${name})
  add_executable(${target} ${T_SOURCES})
  target_link_libraries(${target} PRIVATE ${T_LIBS} ibid_flags cmocka m)
  add_test(NAME ${name} COMMAND ${target} ${T_ARGS} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 120)
  endif()
  if(IBID_SANITIZE)
    math(EXPR T_TIMEOUT "3 * ${T_TIMEOUT}") # sanitizers slow everything down
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${T_TIMEOUT} SKIP_RETURN_CODE 77)
endfunction()

function(ibid_fuzz name)
  cmake_parse_arguments(T "" "" "SOURCES;LIBS" ${ARGN})
  add_executable(replay_${name} ${T_SOURCES} ${CMAKE_SOURCE_DIR}/tests/fuzz/replay_main.c)
  target_link_libraries(replay_${name} PRIVATE ${T_LIBS} ibid_flags)
  add_test(NAME fuzz.${name} COMMAND replay_${name} ${CMAKE_SOURCE_DIR}/tests/corpus/${name})
  set_tests_properties(fuzz.${name} PROPERTIES TIMEOUT 120)
  if(IBID_FUZZERS)
    add_executable(fuzz_${name} ${T_SOURCES})
    target_compile_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
    target_link_libraries(fuzz_${name} PRIVATE ${T_LIBS} ibid_flags -fsanitize=fuzzer)
  endif()
endfunction()
