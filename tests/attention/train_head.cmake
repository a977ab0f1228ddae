# Keys of texts for tools/train-head; no test.
add_executable(train_head_keys ${CMAKE_SOURCE_DIR}/tools/train-head/keys.c)
target_link_libraries(train_head_keys PRIVATE ibid_attention ibid_indexer_files ibid_flags)
