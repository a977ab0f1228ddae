# Every architecture with every weight type. The written models must be the golden's bit for bit.
ibid_test(attention.arch
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_arch.c ${CMAKE_CURRENT_LIST_DIR}/../support/naive_llama.c
          ${CMAKE_CURRENT_LIST_DIR}/../support/engine_fixture.c ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_engine TIMEOUT 300)
target_compile_options(test_attention_arch PRIVATE -ffp-contract=off)
# A few of them under valgrind, which knows no AVX-512: also the detection of another backend.
if(NOT IBID_SANITIZE)
  add_test(NAME attention.valgrind
    COMMAND sh -c "command -v valgrind >/dev/null || exit 77
      exec valgrind --error-exitcode=9 -q \"$0\" --few" $<TARGET_FILE:test_attention_arch>
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(attention.valgrind PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77
    LABELS plain_only)
endif()
