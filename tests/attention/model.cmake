# Tests of attention/model and attention/tokenizer.
ibid_test(attention.tokenizer
  SOURCES test_tokenizer.c ../support/gguf_write.c
  LIBS ibid_model PkgConfig::ZSTD)
