/* Any text through every pre-tokenizer: tokens tile it and carry its bytes. The first byte chooses
 * the pre-tokenizer and whether control tokens are parsed. */
#include "attention/tokenizer/internal.h"
#include "rpc/base/mem.h"
#include "tests/support/gguf_write.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const pres[] = {"smollm", "gpt-2", "default", "llama-bpe", "qwen2"};
enum { N_PRES = sizeof pres / sizeof *pres };
static ibid_tokenizer *tokenizers[N_PRES]; /* kept until the process ends */

static void open_tokenizers(void) {
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_buf b;
    ibid_gguf *g = NULL;
    ibid_buf_init(&b, 1 << 24);
    if (ibid_test_build_gguf(&spec, &b) || ibid_gguf_parse(b.data, b.len, "fuzz", &g)) abort();
    for (size_t i = 0; i < N_PRES; i++)
        if (ibidi_tokenizer_open(g, pres[i], &tokenizers[i])) abort();
    ibid_gguf_close(g);
    ibid_buf_fini(&b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!tokenizers[0]) open_tokenizers();
    if (size == 0) return 0;
    const ibid_tokenizer *t = tokenizers[data[0] % N_PRES];
    bool special = data[0] / N_PRES % 2;
    const char *text = (const char *)data + 1;
    size_t n = size - 1, n_tokens = 0, at = 0, len;
    ibid_token *v = NULL;
    if (ibid_tokenize(t, text, n, special, &v, &n_tokens)) abort();
    for (size_t i = 0; i < n_tokens; i++) {
        const char *bytes = ibid_token_bytes(t, v[i].id, &len);
        /* This vocabulary has a token for every byte: spans are exact. */
        if (v[i].start != at || v[i].end - v[i].start != len || !bytes) abort();
        if (v[i].end > n || memcmp(bytes, text + at, len) != 0) abort();
        if (!special && ibid_token_is_control(t, v[i].id)) abort();
        at = (size_t)v[i].end;
    }
    if (at != n) abort();
    ibid_free(v);
    return 0;
}
