/* Any bytes as a GGUF file, then as a model: what opens must be readable to its last byte. */
#include "attention/model/internal.h"
#include "rpc/base/mem.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned last_byte(const ibid_tensor *t) {
    return t->data ? ((const unsigned char *)t->data)[t->rows * t->row_bytes - 1] : 0;
}

/* A sum that keeps the reads. */
static volatile unsigned sum;

static void read_model(const ibid_model *m) {
    sum += last_byte(&m->embed) + last_byte(&m->output) + last_byte(&m->output_norm);
    for (size_t i = 0; i < m->n_layers; i++) {
        const ibid_layer *l = &m->layers[i];
        const ibid_tensor *all[] = {&l->attn_norm, &l->wq,   &l->wk, &l->wv,     &l->wo,
                                    &l->ffn_norm,  &l->gate, &l->up, &l->down,   &l->bq,
                                    &l->bk,        &l->bv,   &l->bo, &l->q_norm, &l->k_norm};
        for (size_t j = 0; j < sizeof all / sizeof *all; j++) sum += last_byte(all[j]);
    }
    for (size_t i = 0; i < m->rope.n_rot / 2; i++)
        if (!(m->rope.freq[i] >= 0)) abort();
}

static void read_tokenizer(const ibid_tokenizer *t) {
    static const char text[] = "<|im_start|>The  quick\r\n brown fox's 12345 \xC3\xA9\xFF";
    ibid_token *v = NULL;
    size_t n = 0, len;
    for (int special = 0; special < 2; special++) {
        if (ibid_tokenize(t, text, sizeof text - 1, special, &v, &n)) abort();
        for (size_t i = 0; i < n; i++) {
            if (v[i].start != (i ? v[i - 1].end : 0) || !ibid_token_bytes(t, v[i].id, &len))
                abort();
            if (!special && ibid_token_is_control(t, v[i].id)) abort();
        }
        if (n && v[n - 1].end != sizeof text - 1) abort();
        ibid_free(v);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ibid_gguf *g = NULL;
    ibid_model *m = NULL;
    /* As aligned as a mapped file, and no longer than the input. */
    void *copy = ibid_alloc_aligned(64, size);
    if (!copy) return 0;
    if (size) memcpy(copy, data, size);
    ibid_err e = ibid_gguf_parse(copy, size, "fuzz", &g);
    if (!e) e = ibidi_model_build(g, NULL, &m);
    if (!e) {
        read_model(m);
        read_tokenizer(m->tokenizer);
        ibid_model_close(m);
    } else if (e != IBID_CORRUPT && e != IBID_NOTSUP && e != IBID_NOMEM) {
        abort();
    }
    ibid_free(copy);
    return 0;
}
