#include "attention/plan/encode.h"

#include "kvstore/kv_value.h"
#include "rpc/base/clock.h"

#include <string.h>

/* ---- Blobs ---- */

/* A value starts 16 bytes past a multiple of 64, as in the store, so that its planes are aligned.
 */
static ibid_err blob_alloc(const ibid_kv_shape *shape, size_t n_layers, ibid_kv_blob *out) {
    ibid_kv_blob b = {.n_layers = n_layers};
    size_t stride, bytes;
    ibid_err e = ibid_kv_value_size(shape, &b.value_size);
    if (e) return e;
    stride = ibid_align_up(b.value_size, 64) + 64;
    if (!ibid_mul_size(stride, n_layers, &bytes)) return ibid_fail(IBID_NOMEM, "KV is too large");
    b.memory = ibid_alloc_aligned(64, bytes);
    b.values = ibid_calloc(n_layers, sizeof *b.values);
    b.layers = ibid_calloc(n_layers, sizeof *b.layers);
    if (!b.memory || !b.values || !b.layers) {
        ibid_kv_blob_fini(&b);
        return ibid_fail(IBID_NOMEM, "no memory for KV of %zu bytes", bytes);
    }
    for (size_t l = 0; !e && l < n_layers; l++) {
        b.values[l] = b.memory + l * stride + 16;
        e = ibid_kv_value_planes(shape, b.values[l], &b.layers[l]);
    }
    if (e)
        ibid_kv_blob_fini(&b);
    else
        *out = b;
    return e;
}

static ibid_err blob_seal(ibid_kv_blob *b, const ibid_kv_shape *shape) {
    ibid_err e = IBID_OK;
    for (size_t l = 0; !e && l < b->n_layers; l++)
        e = ibid_kv_value_seal(shape, 0, l, (void *)(uintptr_t)b->values[l], b->value_size);
    return e;
}

void ibid_kv_blob_fini(ibid_kv_blob *b) {
    ibid_free(b->memory);
    ibid_free(b->values);
    ibid_free(b->layers);
    memset(b, 0, sizeof *b);
}

ibid_err ibid_kv_blob_export(const ibid_model *m, const ibid_seq *s, size_t row0, size_t n,
                             uint64_t shift, ibid_kv_type type, ibid_kv_blob *out) {
    ibid_kv_shape shape = {type, n, m->n_kv_heads, m->head_dim};
    ibid_kv_blob b = {0};
    ibid_err e = blob_alloc(&shape, m->n_layers, &b);
    for (size_t l = 0; !e && l < b.n_layers; l++)
        e = ibid_seq_export(s, l, row0, n, shift, &b.layers[l]);
    if (!e) e = blob_seal(&b, &shape);
    if (e)
        ibid_kv_blob_fini(&b);
    else
        *out = b;
    return e;
}

static size_t plane_bytes(const ibid_kv_view *v) {
    size_t each = v->type == IBID_KV_F32 ? 4 : v->type == IBID_KV_F16 ? 2 : 1;
    return v->n_kv_heads * v->n_tokens * v->head_dim * each;
}

static size_t scale_bytes(const ibid_kv_view *v) {
    return v->type == IBID_KV_Q8_0 ? v->n_kv_heads * v->n_tokens * (v->head_dim / 32) * 2 : 0;
}

uint64_t ibid_kv_view_bytes(const ibid_kv_view *v) {
    return 2 * (uint64_t)(plane_bytes(v) + scale_bytes(v));
}

static void copy_plane(const void *to, const void *from, size_t n) {
    if (n) memcpy((void *)(uintptr_t)to, from, n);
}

ibid_err ibid_kv_blob_copy(const ibid_kv_view *layers, size_t n_layers, ibid_kv_blob *out) {
    ibid_kv_shape shape = {layers[0].type, layers[0].n_tokens, layers[0].n_kv_heads,
                           layers[0].head_dim};
    ibid_kv_blob b = {0};
    ibid_err e = blob_alloc(&shape, n_layers, &b);
    for (size_t l = 0; !e && l < n_layers; l++) {
        const ibid_kv_view *from = &layers[l], *to = &b.layers[l];
        if (from->type != shape.type || plane_bytes(from) != plane_bytes(to)) {
            e = ibid_fail(IBID_CORRUPT, "stored KV differs in shape between layers");
            break;
        }
        copy_plane(to->k, from->k, plane_bytes(from));
        copy_plane(to->v, from->v, plane_bytes(from));
        copy_plane(to->k_scale, from->k_scale, scale_bytes(from));
        copy_plane(to->v_scale, from->v_scale, scale_bytes(from));
    }
    if (!e) e = blob_seal(&b, &shape);
    if (e)
        ibid_kv_blob_fini(&b);
    else
        *out = b;
    return e;
}

/* ---- Reading ---- */

static ibid_err positions_from(size_t first, size_t n, uint32_t **out) {
    uint32_t *p = ibid_calloc(n, sizeof *p);
    if (!p) return ibid_fail(IBID_NOMEM, "no memory for %zu positions", n);
    for (size_t i = 0; i < n; i++) p[i] = (uint32_t)(first + i);
    *out = p;
    return IBID_OK;
}

ibid_err ibid_read_prefix(const ibid_model *m, ibid_engine *e, ibid_sched *sched,
                          const int32_t *tokens, size_t n, ibid_kv_type type, ibid_kv_blob *out) {
    ibid_seq *s = NULL;
    uint32_t *positions = NULL;
    ibid_err err = positions_from(0, n, &positions);
    if (!err) err = ibid_seq_open(e, n, &s);
    if (!err) {
        ibid_step step = {.seq = s, .tokens = tokens, .positions = positions, .n = n};
        ibid_sched_enter(sched, false);
        err = ibid_engine_forward(e, &step, 1, NULL);
        ibid_sched_leave(sched);
    }
    if (!err) err = ibid_kv_blob_export(m, s, 0, n, 0, type, out);
    ibid_seq_close(s);
    ibid_free(positions);
    return err;
}

ibid_err ibidi_read_batch(const ibid_reader *r, const ibid_reading *t, size_t n, size_t n_layers,
                          const atomic_bool *cancel, ibid_seq **seqs) {
    size_t longest = 0, tokens = 0;
    uint32_t *positions = NULL;
    ibid_step *steps = NULL;
    ibid_err e;
    for (size_t i = 0; i < n; i++) longest = t[i].n > longest ? t[i].n : longest;
    memset(seqs, 0, n * sizeof *seqs);
    if ((e = positions_from(r->n_prefix, longest, &positions))) return e;
    if (!(steps = ibid_calloc(n, sizeof *steps))) {
        e = ibid_fail(IBID_NOMEM, "no memory for %zu texts", n);
        goto done;
    }
    for (size_t i = 0; i < n; i++) {
        if ((e = ibid_seq_open(r->engine, t[i].n, &seqs[i])) ||
            (e = ibid_seq_add_segment(seqs[i], &r->prefix)))
            goto done;
        steps[i] = (ibid_step){.seq = seqs[i],
                               .tokens = t[i].tokens,
                               .positions = positions,
                               .n = t[i].n,
                               .n_layers = n_layers};
    }
    ibid_sched_enter(r->sched, r->urgent);
    uint64_t start = ibid_now_ns();
    e = ibid_engine_forward(r->engine, steps, n, cancel);
    uint64_t ns = ibid_now_ns() - start;
    ibid_sched_leave(r->sched);
    for (size_t i = 0; i < n; i++) tokens += t[i].n;
    if (!e && n_layers == 0 && r->meter) ibid_load_encoded(r->meter, tokens, ns);
done:
    for (size_t i = 0; e && i < n; i++) {
        ibid_seq_close(seqs[i]);
        seqs[i] = NULL;
    }
    ibid_free(steps);
    ibid_free(positions);
    return e;
}

/* Each input's raw keys, side by side. one: room for [n, head_dim]. */
static void beside(const float *one, size_t n, size_t d, size_t head, size_t dim, float *raw) {
    for (size_t i = 0; i < n; i++) memcpy(raw + i * dim + head * d, one + i * d, d * sizeof *one);
}

/* Raw keys of a map's inputs from rows of a sequence or, where s is NULL, from stored K. raw
 * [n, D], then room for [n, head_dim]. */
static ibid_err take_raw(const ibid_reader *r, const ibid_seq *s, const ibid_kv_view *layers,
                         size_t n, const ibid_keymap *map, float *raw) {
    size_t d = map->head_dim, dim = ibid_keymap_input(map);
    float *one = raw + n * dim;
    ibid_err e = IBID_OK;
    if (d != r->model->head_dim)
        return ibid_fail(IBID_MISMATCH, "the calibration is another model's: run "
                                        "`ibid model calibrate`");
    for (size_t h = 0; !e && h < map->n_inputs; h++) {
        const ibid_head *at = &map->inputs[h];
        if (at->layer >= r->model->n_layers || at->kv_head >= r->model->n_kv_heads) {
            e = ibid_fail(IBID_MISMATCH, "the calibration names layer %u, head %u", at->layer,
                          at->kv_head);
            break;
        }
        e = s ? ibid_seq_raw_keys(s, at->layer, at->kv_head, 0, n, one)
              : ibid_engine_stored_keys(r->engine, &layers[at->layer], r->n_prefix, at->kv_head,
                                        one);
        if (!e) beside(one, n, d, h, dim, raw);
    }
    return e;
}

/* Token keys: of a question, or of a text. */
static ibid_err take_keys(const ibid_reader *r, const ibid_seq *s, const ibid_kv_view *layers,
                          size_t n, const ibid_keymap *map, bool question, int8_t *out) {
    float *raw = ibid_alloc(n * (ibid_keymap_input(map) + map->head_dim) * sizeof *raw);
    if (!raw) return ibid_fail(IBID_NOMEM, "no memory for the keys of %zu tokens", n);
    ibid_err e = take_raw(r, s, layers, n, map, raw);
    if (!e) e = ibid_token_keys(map, NULL, question, raw, n, out);
    ibid_free(raw);
    return e;
}

ibid_err ibid_read_some(const ibid_reader *r, ibid_reading *t, size_t n, size_t *done, bool want_kv,
                        const ibid_calibration *cal, const atomic_bool *cancel) {
    ibid_seq *seqs[IBID_ENCODE_STEP];
    size_t first = *done, count = 0, rows = 0;
    const ibid_keymap *map = cal ? cal->map : NULL;
    while (first + count < n && count < IBID_ENCODE_STEP &&
           (count == 0 || rows + t[first + count].n <= IBID_ENCODE_STEP))
        rows += t[first + count++].n;
    if (count == 0 || (!want_kv && !map)) {
        *done = n;
        return IBID_OK;
    }
    t += first;
    ibid_err e = ibidi_read_batch(r, t, count, want_kv ? 0 : ibid_keymap_layers(map), cancel, seqs);
    if (e) return e;
    for (size_t i = 0; !e && i < count; i++) {
        if (want_kv) e = ibid_kv_blob_export(r->model, seqs[i], 0, t[i].n, 0, r->kv_type, &t[i].kv);
        if (e || !map) continue;
        t[i].keys = ibid_alloc(t[i].n * ibid_keymap_dim(map));
        e = t[i].keys ? take_keys(r, seqs[i], NULL, t[i].n, map, false, t[i].keys)
                      : ibid_fail(IBID_NOMEM, "no memory for token keys");
    }
    for (size_t i = 0; i < count; i++) ibid_seq_close(seqs[i]);
    if (!e) *done = first + count;
    return e;
}

ibid_err ibid_read_question(const ibid_reader *r, const int32_t *tokens, size_t n,
                            const ibid_calibration *cal, int8_t *out) {
    ibid_seq *s = NULL;
    ibid_reading t = {.tokens = tokens, .n = n};
    if (n == 0 || !cal->map) return IBID_OK;
    ibid_err e = ibidi_read_batch(r, &t, 1, ibid_keymap_layers(cal->map), NULL, &s);
    if (!e) e = take_keys(r, s, NULL, n, cal->map, true, out);
    ibid_seq_close(s);
    return e;
}

ibid_err ibid_keys_from_stored(const ibid_reader *r, const ibid_kv_view *layers,
                               const ibid_calibration *cal, int8_t *out) {
    const ibid_keymap *map = cal->map;
    return take_keys(r, NULL, layers, layers[map->inputs[0].layer].n_tokens, map, false, out);
}
