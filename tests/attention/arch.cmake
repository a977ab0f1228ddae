# Every architecture with every weight type. The written models must be the golden's bit for bit.
ibid_test(attention.arch
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_arch.c ${CMAKE_CURRENT_LIST_DIR}/../support/naive_llama.c
          ${CMAKE_CURRENT_LIST_DIR}/../support/engine_fixture.c ${CMAKE_CURRENT_LIST_DIR}/../support/gguf_write.c
  LIBS ibid_engine TIMEOUT 300)
target_compile_options(test_attention_arch PRIVATE -ffp-contract=off)
