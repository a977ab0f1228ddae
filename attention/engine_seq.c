#include "attention/cuda/gpu.h"
#include "attention/engine_internal.h"

#include <math.h>
#include <string.h>

void ibidi_rope_table(const ibid_rope *r, uint64_t position, float sign, float *c, float *s) {
    for (size_t i = 0; i < r->n_rot / 2; i++) {
        double angle = (double)position * (double)r->freq[i];
        c[i] = (float)cos(angle);
        s[i] = sign * (float)sin(angle);
    }
}

/* Makes room for n elements of size bytes, at least doubling. */
static ibid_err grow(void **p, size_t *room, size_t n, size_t size) {
    size_t want = *room * 2 > n ? *room * 2 : n, bytes;
    if (n <= *room) return IBID_OK;
    if (!ibid_mul_size(want, size, &bytes)) return ibid_fail(IBID_NOMEM, "a sequence is too long");
    void *q = ibid_realloc(*p, bytes);
    if (!q) return ibid_fail(IBID_NOMEM, "no memory for a sequence of %zu rows", n);
    *p = q;
    *room = want;
    return IBID_OK;
}

ibid_err ibidi_seq_reserve(ibid_seq *s, size_t n) {
    size_t each = s->engine->page_tokens, n_pages = n / each + (n % each != 0);
    ibid_err err = grow((void **)&s->positions, &s->live_room, n, sizeof *s->positions);
    if (s->engine->gpu) return err; /* its pages come with the forward */
    if (!err) err = grow((void **)&s->pages, &s->page_room, n_pages, sizeof *s->pages);
    while (!err && s->n_pages < n_pages) {
        uint8_t *page = ibid_alloc_aligned(64, s->engine->page_bytes);
        if (!page) {
            err = ibid_fail(IBID_NOMEM, "no memory for the KV of %zu rows (%zu bytes each)", n,
                            s->engine->page_bytes / each);
        } else {
            s->pages[s->n_pages++] = page;
        }
    }
    return err;
}

ibid_err ibid_seq_open(ibid_engine *e, size_t live_hint, ibid_seq **out) {
    ibid_err err;
    ibid_seq *s = ibid_calloc(1, sizeof *s);
    if (!s) return ibid_fail(IBID_NOMEM, "no memory for a sequence");
    s->engine = e;
    if (live_hint > e->m->n_ctx) live_hint = e->m->n_ctx;
    if ((err = ibidi_seq_reserve(s, live_hint))) goto done;
    *out = s;
    s = NULL;
done:
    ibid_seq_close(s);
    return err;
}

void ibid_seq_close(ibid_seq *s) {
    if (!s) return;
    if (s->gpu) ibidi_gpu_seq_close(s->engine->gpu, s->gpu);
    ibidi_pick_close(s->pick);
    for (size_t i = 0; i < s->n_pages; i++) ibid_free(s->pages[i]);
    for (size_t i = 0; i < s->n_segs; i++) ibid_free(s->segs[i].cos);
    ibid_free(s->pages);
    ibid_free(s->segs);
    ibid_free(s->positions);
    ibid_free(s);
}

static ibid_err check_views(const ibid_model *m, const ibid_kv_view *layers) {
    for (size_t l = 0; l < m->n_layers; l++) {
        const ibid_kv_view *v = &layers[l];
        if (v->n_kv_heads != m->n_kv_heads || v->head_dim != m->head_dim ||
            v->n_tokens != layers[0].n_tokens)
            return ibid_fail(IBID_INVAL,
                             "stored KV of layer %zu has %zu tokens, %zu heads of %zu; the model "
                             "has %zu heads of %zu and layer 0 has %zu tokens",
                             l, v->n_tokens, v->n_kv_heads, v->head_dim, m->n_kv_heads, m->head_dim,
                             layers[0].n_tokens);
        bool scaled = v->type == IBID_KV_Q8_0;
        if (!v->k || !v->v || (scaled && (!v->k_scale || !v->v_scale || v->head_dim % 32)))
            return ibid_fail(IBID_INVAL, "stored KV of layer %zu lacks a plane", l);
    }
    return IBID_OK;
}

ibid_err ibid_seq_add_segment(ibid_seq *s, const ibid_segment *g) {
    const ibid_model *m = s->engine->m;
    if (!g->layers) return ibid_fail(IBID_INVAL, "a segment without KV");
    ibidi_seg p = {.s = *g, .start = g->local0 + g->offset, .n_tokens = g->layers[0].n_tokens};
    ibid_err err = check_views(m, g->layers);
    if (err) return err;
    if (s->n_live)
        return ibid_fail(IBID_INVAL, "a segment after %zu live rows; add segments first",
                         s->n_live);
    if (p.start < g->offset || p.start < s->end || p.n_tokens == 0)
        return ibid_fail(IBID_INVAL,
                         "a segment of %zu tokens at position %llu, after position %llu",
                         p.n_tokens, (unsigned long long)p.start, (unsigned long long)s->end);
    if (p.start > m->n_ctx || p.n_tokens > m->n_ctx - p.start)
        return ibid_fail(IBID_CONTEXT,
                         "stored tokens up to position %llu; the model's context is %zu",
                         (unsigned long long)p.start + p.n_tokens, m->n_ctx);
    if ((err = grow((void **)&s->segs, &s->seg_room, s->n_segs + 1, sizeof *s->segs))) return err;
    if (g->offset) {
        size_t half = m->rope.n_rot / 2;
        p.cos = ibid_alloc(3 * half * sizeof *p.cos);
        if (!p.cos) return ibid_fail(IBID_NOMEM, "no memory for a segment");
        p.sin = p.cos + half;
        p.forth = p.sin + half;
        ibidi_rope_table(&m->rope, g->offset, -1, p.cos, p.sin);
        for (size_t i = 0; i < half; i++) p.forth[i] = -p.sin[i];
    }
    s->segs[s->n_segs++] = p;
    s->end = p.start + p.n_tokens;
    s->n_stored += p.n_tokens;
    return IBID_OK;
}

size_t ibid_seq_live_count(const ibid_seq *s) {
    return s->n_live;
}

void ibid_seq_truncate(ibid_seq *s, size_t count) {
    if (count >= s->n_live) return;
    s->n_live = count;
    if (count < s->live_kept) s->live_kept = count;
    ibidi_pick_truncate(s);
}

static ibid_err check_rows(const ibid_seq *s, size_t layer, size_t row0, size_t n) {
    if (layer < s->engine->m->n_layers && row0 <= s->n_live && n <= s->n_live - row0)
        return IBID_OK;
    return ibid_fail(IBID_INVAL, "rows [%zu, %zu + %zu) at layer %zu of %zu live rows", row0, row0,
                     n, layer, s->n_live);
}

static const size_t width[] = {[IBID_KV_F32] = 4, [IBID_KV_F16] = 2, [IBID_KV_Q8_0] = 1};

ibid_kv_view ibidi_page_view(const ibid_seq *s, size_t page, size_t layer, size_t head) {
    const ibid_engine *e = s->engine;
    size_t n = e->page_tokens, dim = e->m->head_dim;
    size_t plane = n * dim * width[e->live_type];
    size_t bytes = e->page_bytes / (e->m->n_layers * e->m->n_kv_heads);
    const uint8_t *k = e->gpu ? ibidi_gpu_page(s, page, layer, head)
                              : s->pages[page] + (layer * e->m->n_kv_heads + head) * bytes;
    ibid_kv_view v = {.type = e->live_type, .n_tokens = n, .n_kv_heads = 1, .head_dim = dim};
    v.k = k;
    v.v = k + plane;
    if (v.type == IBID_KV_Q8_0) {
        v.k_scale = (const uint16_t *)(const void *)(k + 2 * plane);
        v.v_scale = v.k_scale + n * dim / 32;
    }
    return v;
}

ibid_kv_view ibidi_slice(const ibid_kv_view *v, size_t head, size_t t0, size_t t1) {
    size_t at = (head * v->n_tokens + t0) * v->head_dim;
    ibid_kv_view out = {
        .type = v->type, .n_tokens = t1 - t0, .n_kv_heads = 1, .head_dim = v->head_dim};
    out.k = (const uint8_t *)v->k + at * width[v->type];
    out.v = (const uint8_t *)v->v + at * width[v->type];
    if (v->type == IBID_KV_Q8_0) {
        out.k_scale = v->k_scale + at / 32;
        out.v_scale = v->v_scale + at / 32;
    }
    return out;
}

/* One token of one head in a plane and its scales. */
typedef struct place {
    uint8_t *at;
    uint16_t *scale;
} place;

/* Whoever writes prepared writable planes; views are const because readers share them. */
static place place_of(const ibid_kv_view *v, bool values, size_t head, size_t token) {
    size_t at = (head * v->n_tokens + token) * v->head_dim;
    place p = {.at = (uint8_t *)(uintptr_t)(values ? v->v : v->k) + at * width[v->type]};
    if (v->type == IBID_KV_Q8_0)
        p.scale = (uint16_t *)(uintptr_t)(values ? v->v_scale : v->k_scale) + at / 32;
    return p;
}

void ibidi_put_keys(const ibid_kernels *k, const ibid_kv_view *v, size_t head, size_t token,
                    const float *src) {
    place p = place_of(v, false, head, token);
    if (v->type != IBID_KV_Q8_0) {
        k->kv_pack(v->type, src, v->head_dim, p.at, p.scale);
        return;
    }
    size_t each = ibid_kv_group(v->head_dim);
    for (size_t d = 0; d < v->head_dim; d += each) {
        float spread[64];
        memcpy(spread, src + d, each * sizeof *spread);
        k->hadamard(spread, each);
        k->kv_pack(v->type, spread, each, p.at + d, p.scale + d / 32);
    }
}

void ibidi_put_values(const ibid_kernels *k, const ibid_kv_view *v, size_t head, size_t token,
                      const float *src) {
    place p = place_of(v, true, head, token);
    k->kv_pack(v->type, src, v->head_dim, p.at, p.scale);
}

void ibidi_unpack(const ibid_kernels *k, const ibid_kv_view *v, size_t head, size_t token, size_t n,
                  float *keys, float *values) {
    place p = place_of(v, false, head, token);
    k->kv_unpack(v->type, p.at, p.scale, n * v->head_dim, keys);
    p = place_of(v, true, head, token);
    k->kv_unpack(v->type, p.at, p.scale, n * v->head_dim, values);
}

/* The first n rows of a page as they are. */
static void copy_rows(const ibid_seq *from, ibid_seq *to, size_t page, size_t n) {
    const ibid_model *m = from->engine->m;
    for (size_t i = 0; i < m->n_layers * m->n_kv_heads; i++) {
        ibid_kv_view a = ibidi_page_view(from, page, i / m->n_kv_heads, i % m->n_kv_heads);
        ibid_kv_view b = ibidi_page_view(to, page, i / m->n_kv_heads, i % m->n_kv_heads);
        for (int values = 0; values < 2; values++) {
            place x = place_of(&a, values, 0, 0), y = place_of(&b, values, 0, 0);
            memcpy(y.at, x.at, n * m->head_dim * width[a.type]);
            if (x.scale) memcpy(y.scale, x.scale, n * m->head_dim / 32 * sizeof *x.scale);
        }
    }
}

ibid_err ibid_seq_fork(const ibid_seq *s, size_t live_hint, ibid_seq **out) {
    ibid_seq *f = NULL;
    ibid_err err = IBID_OK;
    if (s->engine->gpu)
        return ibid_fail(IBID_NOTSUP, "sequences are not forked on a device; run them in turn");
    if ((err = ibid_seq_open(s->engine, s->n_live + live_hint, &f))) goto done;
    for (size_t i = 0; !err && i < s->n_segs; i++) err = ibid_seq_add_segment(f, &s->segs[i].s);
    if (err) goto done;
    if (s->n_live) memcpy(f->positions, s->positions, s->n_live * sizeof *f->positions);
    for (size_t at = 0, n; at < s->n_live; at += n) {
        n = s->n_live - at < s->engine->page_tokens ? s->n_live - at : s->engine->page_tokens;
        copy_rows(s, f, at / s->engine->page_tokens, n);
    }
    f->n_live = s->n_live;
    *out = f;
    f = NULL;
done:
    ibid_seq_close(f);
    return err;
}

/* K of a live row at (layer, kv head) in f32. */
static void live_keys(const ibid_seq *s, size_t row, size_t layer, size_t head, float *out) {
    const ibid_engine *e = s->engine;
    ibid_kv_view page = ibidi_page_view(s, row / e->page_tokens, layer, head);
    place p = place_of(&page, false, 0, row % e->page_tokens);
    e->k->kv_unpack(page.type, p.at, p.scale, page.head_dim, out);
    if (page.type == IBID_KV_Q8_0) e->k->hadamard(out, page.head_dim);
}

/* A live row's K or V to a token of a view: as it is, if the types agree. */
static void export_row(const ibid_seq *s, size_t row, size_t layer, size_t head, bool values,
                       const ibid_kv_view *view, size_t token, float *space) {
    const ibid_engine *e = s->engine;
    ibid_kv_view page = ibidi_page_view(s, row / e->page_tokens, layer, head);
    place from = place_of(&page, values, 0, row % e->page_tokens);
    place to = place_of(view, values, head, token);
    if (page.type != view->type && values) {
        e->k->kv_unpack(page.type, from.at, from.scale, view->head_dim, space);
        e->k->kv_pack(view->type, space, view->head_dim, to.at, to.scale);
        return;
    }
    if (page.type != view->type) {
        live_keys(s, row, layer, head, space);
        ibidi_put_keys(e->k, view, head, token, space);
        return;
    }
    memcpy(to.at, from.at, view->head_dim * width[view->type]);
    if (to.scale) memcpy(to.scale, from.scale, view->head_dim / 32 * sizeof *to.scale);
}

ibid_err ibid_seq_export(const ibid_seq *s, size_t layer, size_t row0, size_t n, uint64_t shift,
                         const ibid_kv_view *view) {
    const ibid_engine *e = s->engine;
    const ibid_model *m = e->m;
    size_t dim = m->head_dim, n_rot = m->rope.n_rot;
    float *row = NULL;
    ibid_err err = check_rows(s, layer, row0, n);
    if (err) return err;
    if (view->n_kv_heads != m->n_kv_heads || view->head_dim != dim || n > view->n_tokens ||
        (view->type == IBID_KV_Q8_0 && dim % 32))
        return ibid_fail(IBID_INVAL, "planes of %zu tokens, %zu heads of %zu for %zu rows",
                         view->n_tokens, view->n_kv_heads, view->head_dim, n);
    if (e->gpu && (err = ibidi_gpu_seq_read(s, layer, row0, n))) return err;
    if (n && shift > s->positions[row0])
        return ibid_fail(IBID_INVAL, "shift %llu of a row at position %u",
                         (unsigned long long)shift, s->positions[row0]);
    if (!(row = ibid_alloc((dim + n_rot) * sizeof *row)))
        return ibid_fail(IBID_NOMEM, "no memory to export KV");
    float *c = row + dim, *sn = c + n_rot / 2;
    ibidi_rope_table(&m->rope, shift, -1, c, sn);
    for (size_t h = 0; h < m->n_kv_heads; h++) {
        for (size_t j = 0; j < n; j++) {
            export_row(s, row0 + j, layer, h, true, view, j, row);
            if (!shift) {
                export_row(s, row0 + j, layer, h, false, view, j, row);
                continue;
            }
            live_keys(s, row0 + j, layer, h, row);
            e->k->rope(m->rope.pairing, row, 1, dim, n_rot, c, sn);
            ibidi_put_keys(e->k, view, h, j, row);
        }
    }
    ibid_free(row);
    return IBID_OK;
}

ibid_err ibid_seq_raw_keys(const ibid_seq *s, size_t layer, size_t kv_head, size_t row0, size_t n,
                           float *out) {
    const ibid_engine *e = s->engine;
    const ibid_model *m = e->m;
    size_t dim = m->head_dim, n_rot = m->rope.n_rot;
    ibid_err err = check_rows(s, layer, row0, n);
    if (err) return err;
    if (kv_head >= m->n_kv_heads)
        return ibid_fail(IBID_INVAL, "kv head %zu of %zu", kv_head, m->n_kv_heads);
    if (e->gpu && (err = ibidi_gpu_seq_read(s, layer, row0, n))) return err;
    float *c = ibid_alloc((n_rot + 1) * sizeof *c);
    if (!c) return ibid_fail(IBID_NOMEM, "no memory for raw keys");
    for (size_t j = 0; j < n; j++) {
        size_t r = row0 + j;
        live_keys(s, r, layer, kv_head, out + j * dim);
        ibidi_rope_table(&m->rope, s->positions[r], -1, c, c + n_rot / 2);
        e->k->rope(m->rope.pairing, out + j * dim, 1, dim, n_rot, c, c + n_rot / 2);
    }
    ibid_free(c);
    return IBID_OK;
}

ibid_err ibid_engine_stored_keys(const ibid_engine *e, const ibid_kv_view *kv, uint64_t local0,
                                 size_t kv_head, float *out) {
    const ibid_model *m = e->m;
    size_t dim = m->head_dim, n_rot = m->rope.n_rot;
    if (kv_head >= m->n_kv_heads || kv->n_kv_heads != m->n_kv_heads || kv->head_dim != dim)
        return ibid_fail(IBID_INVAL,
                         "kv head %zu of stored KV of %zu heads of %zu; the model has "
                         "%zu of %zu",
                         kv_head, kv->n_kv_heads, kv->head_dim, m->n_kv_heads, dim);
    size_t at = kv_head * kv->n_tokens * dim;
    float *c = ibid_alloc((n_rot + 1) * sizeof *c);
    if (!c) return ibid_fail(IBID_NOMEM, "no memory for raw keys");
    e->k->kv_unpack(kv->type, (const uint8_t *)kv->k + at * width[kv->type],
                    kv->type == IBID_KV_Q8_0 ? kv->k_scale + at / 32 : NULL, kv->n_tokens * dim,
                    out);
    if (kv->type == IBID_KV_Q8_0) e->k->hadamard(out, kv->n_tokens * dim);
    for (size_t j = 0; j < kv->n_tokens; j++) {
        ibidi_rope_table(&m->rope, local0 + j, -1, c, c + n_rot / 2);
        e->k->rope(m->rope.pairing, out + j * dim, 1, dim, n_rot, c, c + n_rot / 2);
    }
    ibid_free(c);
    return IBID_OK;
}
