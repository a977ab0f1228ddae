# Tests of attention/model and attention/tokenizer.
ibid_test(attention.gguf
  SOURCES test_gguf.c ../support/gguf_write.c
  LIBS ibid_model)
ibid_test(attention.tokenizer
  SOURCES test_tokenizer.c ../support/gguf_write.c
  LIBS ibid_model PkgConfig::ZSTD)
ibid_test(attention.template
  SOURCES test_template.c
  LIBS ibid_model)
ibid_fuzz(gguf
  SOURCES ../fuzz/gguf.c
  LIBS ibid_model)
ibid_fuzz(tokenizer
  SOURCES ../fuzz/tokenizer.c ../support/gguf_write.c
  LIBS ibid_model)
