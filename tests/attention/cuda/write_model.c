/* Writes a tiny random model of a shape that a GPU takes: write_model FILE.gguf */
#include "tests/support/check.h"
#include "tests/support/gguf_write.h"

int main(int argc, char **argv) {
    ibid_test_gguf s = {.n_layers = 4,
                        .n_embd = 128,
                        .n_heads = 2,
                        .n_kv_heads = 1,
                        .n_ff = 128,
                        .n_vocab = 512,
                        .n_ctx = 4096,
                        .type = IBID_F32,
                        .seed = 6005,
                        .tied = true};
    CHECK(argc == 2, "one file's name");
    MUST(ibid_test_write_gguf(argv[1], &s));
    return 0;
}
