/* Arbitrary bytes as a stored KV value: open must refuse or give views that lie inside the value. A
 * second way in keeps the checks behind the checksum within reach: bytes whose header says a shape
 * are sealed and must open as sealed. */
#include "kvstore/kv_value.h"
#include "kvstore/record.h"

#include <stdlib.h>

static void inside(const void *p, size_t n, const uint8_t *data, size_t size) {
    const uint8_t *b = p;
    if (b < data || n > size || (size_t)(b - data) > size - n) abort();
}

static void check_view(const ibid_kv_view *v, const uint8_t *data, size_t size) {
    size_t rows = v->n_kv_heads * v->n_tokens;
    size_t element = v->type == IBID_KV_F32 ? 4 : v->type == IBID_KV_F16 ? 2 : 1;
    inside(v->k, rows * v->head_dim * element, data, size);
    inside(v->v, rows * v->head_dim * element, data, size);
    if ((v->k_scale != NULL) != (v->type == IBID_KV_Q8_0)) abort();
    if (!v->k_scale) return;
    inside(v->k_scale, rows * (v->head_dim / 32) * 2, data, size);
    inside(v->v_scale, rows * (v->head_dim / 32) * 2, data, size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ibid_kv_view v;
    uint64_t owner = 0;
    size_t layer = 0;
    for (int deep = 0; deep < 2; deep++) {
        ibid_err e = ibid_kv_value_open(data, size, deep, &owner, &layer, &v);
        if (e == IBID_OK)
            check_view(&v, data, size);
        else if (e != IBID_CORRUPT)
            abort();
    }
    if (size < IBID_KV_HEADER) return 0;
    ibid_kv_shape s = {(ibid_kv_type)(data[6] % 4), ibidi_load32(data + 24) % 70,
                       ibidi_load16(data + 28) % 4, ibidi_load16(data + 30) % 130};
    size_t want;
    if (ibid_kv_value_size(&s, &want) != IBID_OK) return 0;
    uint8_t *value = malloc(want);
    if (!value) return 0;
    for (size_t i = 0; i < want; i++) value[i] = data[i % size];
    uint64_t as = ibidi_load64(data + 16);
    size_t at = ibidi_load16(data + 32);
    if (ibid_kv_value_seal(&s, as, at, value, want) != IBID_OK) abort();
    if (ibid_kv_value_open(value, want, true, &owner, &layer, &v) != IBID_OK) abort();
    if (owner != as || layer != at || v.n_tokens != s.n_tokens) abort();
    check_view(&v, value, want);
    /* One flipped bit anywhere is seen. */
    size_t bit = ibidi_load32(data + 8) % (want * 8);
    value[bit / 8] = (uint8_t)(value[bit / 8] ^ 1u << bit % 8);
    if (ibid_kv_value_open(value, want, true, &owner, &layer, &v) != IBID_CORRUPT) abort();
    free(value);
    return 0;
}
