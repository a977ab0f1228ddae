/* Stored KV of an answer's blocks: where it lies, what of it is in memory, and its way there. It is
 * asked for layer by layer, some layers ahead of those that are computed, and each value is checked
 * just before its layer is: neither the disk nor the checksums are waited for first. */
#include "attention/attention_internal.h"
#include "kvstore/kv_value.h"
#include "rpc/base/clock.h"

#include <string.h>
#include <unistd.h>

enum {
    SAMPLE_STEP = 4,                /* every fourth layer tells whether a block is in memory */
    AHEAD_MIN = 4,                  /* layers asked for before they are needed, */
    AHEAD_BYTES = 32 * 1024 * 1024, /* or as many as hold this */
    SAMPLE_BYTES = 256 * 1024,      /* less tells a disk's delay, not its speed */
    MEASURE_BYTES = 1024 * 1024     /* less says little when layers are computed meanwhile */
};

static uint64_t missing_of(const ibidi_stored *s, size_t n_layers, size_t step) {
    uint64_t bytes = 0;
    for (size_t l = 0; l < n_layers; l += step) bytes += ibid_kv_place_missing(&s->places[l]);
    return bytes;
}

ibid_err ibidi_stored_find(ibid_snap *snap, uint64_t block, const ibid_kv_shape *shape,
                           size_t n_layers, ibidi_stored *s) {
    size_t size;
    ibid_err e = ibid_kv_value_size(shape, &size);
    if (!s->places) s->places = ibid_calloc(n_layers, sizeof *s->places);
    if (!s->places) return ibid_fail(IBID_NOMEM, "no memory for a block's places");
    if (!e) e = ibid_snap_kv_places(snap, block, n_layers, s->places);
    for (size_t l = 0; !e && l < n_layers; l++) {
        if (s->places[l].size != size)
            return ibid_fail(IBID_CORRUPT, "the KV of block %llu does not fit its model",
                             (unsigned long long)block);
        e = ibid_kv_value_planes(shape, s->places[l].value, &s->layers[l]);
    }
    if (e) return e;
    s->here = true;
    s->missing = missing_of(s, n_layers, SAMPLE_STEP) ? missing_of(s, n_layers, 1) : 0;
    return IBID_OK;
}

void ibidi_stored_drop(ibidi_stored *s) {
    ibid_free(s->places);
    memset(s, 0, sizeof *s);
}

/* Reads a block's missing bytes now, but no longer than until_ns. */
static void time_disk(ibid_load_meter *m, ibidi_stored *s, size_t n_layers, uint64_t until_ns) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint64_t start = ibid_now_ns(), now = start, before = s->missing;
    volatile unsigned char sink = 0;
    ibid_kv_places_willneed(s->places, n_layers);
    for (size_t l = 0; l < n_layers && now < until_ns; l++) {
        const unsigned char *p = s->places[l].value;
        for (size_t i = 0; i < s->places[l].size && now < until_ns; i += page) {
            sink ^= p[i];
            now = ibid_now_ns();
        }
    }
    (void)sink;
    s->missing = missing_of(s, n_layers, 1);
    uint64_t came = before > s->missing ? before - s->missing : 0;
    /* Nothing at all within the limit is a speed too. */
    if (came >= SAMPLE_BYTES || now >= until_ns)
        ibid_load_came(m, came ? came : page, now - start, false, now);
}

bool ibidi_stored_loses(ibid_load_meter *m, ibidi_stored *s, size_t n_layers, size_t n_tokens,
                        uint64_t *from_disk) {
    for (int tries = 0; tries < 2; tries++) {
        uint64_t now = ibid_now_ns(), before = s->missing;
        ibid_load_rates r = ibid_load_rates_now(m, now);
        ibid_load_choice c = ibid_load_choose(&r, s->missing, n_tokens, atomic_load(&m->encoding));
        if (c == IBID_LOAD_TIME_DISK && tries == 0) {
            double limit_s = r.tokens_per_s > 0 ? (double)n_tokens / r.tokens_per_s : 0.25;
            time_disk(m, s, n_layers, now + (uint64_t)(limit_s * 1e9));
            *from_disk += before > s->missing ? before - s->missing : 0;
            continue;
        }
        if (s->missing && c != IBID_LOAD_TIME_DISK)
            atomic_store(&m->encoding, c == IBID_LOAD_ENCODE);
        return c == IBID_LOAD_ENCODE || c == IBID_LOAD_TIME_ENCODER;
    }
    return false;
}

/* ---- While it is computed ---- */

static void ask_ahead(ibidi_loading *l, size_t layer) {
    size_t to = l->n_layers - layer > l->ahead ? layer + l->ahead : l->n_layers;
    if (to <= l->asked || (to < l->n_layers && to - l->asked < l->ahead / 2)) return;
    for (size_t i = 0; i < l->n; i++)
        if (l->blocks[i]->here && l->blocks[i]->missing)
            ibid_kv_places_willneed(l->blocks[i]->places + l->asked, to - l->asked);
    l->asked = to;
}

void ibidi_load_begin(ibidi_loading *l) {
    uint64_t layer_bytes = 1;
    l->missing = l->waited_ns = 0;
    l->asked = l->checked = 0;
    for (size_t i = 0; i < l->n; i++) {
        if (!l->blocks[i]->here) continue;
        l->missing += l->blocks[i]->missing;
        layer_bytes += l->blocks[i]->missing ? l->blocks[i]->places[0].size : 0;
    }
    l->ahead = (size_t)(AHEAD_BYTES / layer_bytes);
    if (l->ahead < AHEAD_MIN) l->ahead = AHEAD_MIN;
    l->begun_ns = ibid_now_ns();
    if (l->missing) ask_ahead(l, 0);
}

static bool same_view(const ibid_kv_view *a, const ibid_kv_view *b) {
    return a->type == b->type && a->n_tokens == b->n_tokens && a->n_kv_heads == b->n_kv_heads &&
           a->head_dim == b->head_dim && a->k == b->k && a->v == b->v && a->k_scale == b->k_scale &&
           a->v_scale == b->v_scale;
}

static void all_came(const ibidi_loading *l) {
    uint64_t now = ibid_now_ns(), ns = now - l->begun_ns;
    if (l->missing >= MEASURE_BYTES)
        ibid_load_came(l->meter, l->missing, ns, l->waited_ns < ns / 2, now);
}

ibid_err ibidi_load_layer(ibidi_loading *l, size_t layer) {
    ibid_kv_view v;
    ibid_err err = IBID_OK;
    if (layer < l->checked) return IBID_OK;
    if (l->missing) ask_ahead(l, layer);
    uint64_t start = ibid_now_ns();
    for (size_t i = 0; i < l->n; i++) {
        ibidi_stored *s = l->blocks[i];
        if (!s->here) continue;
        ibid_err e = ibid_kv_place_open(l->store, &s->places[layer], &v);
        if (!e && !same_view(&v, &s->layers[layer]))
            e = ibid_fail(IBID_CORRUPT, "the KV of block %llu does not fit its model",
                          (unsigned long long)s->places[layer].block);
        if (!e) continue;
        s->damaged = e == IBID_CORRUPT;
        err = e;
    }
    if (l->missing) l->waited_ns += ibid_now_ns() - start;
    if (err) return err;
    l->checked = layer + 1;
    if (l->checked == l->n_layers) all_came(l);
    return IBID_OK;
}
