#include "attention/cuda/pages.h"
#include "rpc/base/mem.h"

#include <string.h>

struct ibidi_pages {
    ibid_device *d;
    uint8_t *memory;
    size_t cell_bytes;
    uint32_t *free_cells; /* [n_free] */
    size_t n_free;
    ibidi_block *newest, *oldest; /* unpinned */
    ibidi_pages_stats stats;
    ibidi_block **buckets; /* [1 << bits] */
    unsigned bits;
};

ibid_err ibidi_pages_open(ibid_device *d, ibidi_cu_stream s, size_t cell_bytes, size_t want,
                          size_t least, ibidi_pages **out) {
    ibid_err err = IBID_OK;
    size_t bytes = 0;
    ibidi_pages *p = ibid_calloc(1, sizeof *p);
    if (!p) return ibid_fail(IBID_NOMEM, "no memory for a pool");
    p->d = d;
    p->cell_bytes = cell_bytes;
    if (want > UINT32_MAX) want = UINT32_MAX;
    if (least == 0) least = 1;
    if (want < least) want = least;
    for (;; want = want / 8 * 7 > least ? want / 8 * 7 : least) {
        void *memory = NULL;
        err = ibid_mul_size(want, cell_bytes, &bytes) ? ibid_device_alloc(d, bytes, &memory)
                                                      : ibid_fail(IBID_NOMEM, "too large a pool");
        if (!err) p->memory = memory;
        if (err != IBID_NOMEM || want == least) break;
    }
    /* As many as there may be blocks of one page. */
    for (p->bits = 4; p->bits < 20 && (size_t)1 << p->bits < want; p->bits++) continue;
    if (!err && (!(p->free_cells = ibid_alloc(want * sizeof *p->free_cells)) ||
                 !(p->buckets = ibid_calloc((size_t)1 << p->bits, sizeof *p->buckets))))
        err = ibid_fail(IBID_NOMEM, "no memory for a pool");
    if (!err) err = ibid_device_fill(d, s, p->memory, 0, bytes);
    if (!err) err = ibid_device_sync(d, s);
    if (err) {
        ibidi_pages_close(p);
        return err;
    }
    p->stats.cells = p->n_free = want;
    for (size_t i = 0; i < want; i++) p->free_cells[i] = (uint32_t)(want - 1 - i);
    *out = p;
    return IBID_OK;
}

void ibidi_pages_close(ibidi_pages *p) {
    if (!p) return;
    for (size_t i = 0; p->buckets && i < (size_t)1 << p->bits; i++) {
        for (ibidi_block *b = p->buckets[i], *next; b; b = next) {
            next = b->next;
            ibid_free(b);
        }
    }
    ibid_device_free(p->d, p->memory);
    ibid_free(p->free_cells);
    ibid_free(p->buckets);
    ibid_free(p);
}

uint8_t *ibidi_pages_memory(const ibidi_pages *p) {
    return p->memory;
}

size_t ibidi_pages_cell_bytes(const ibidi_pages *p) {
    return p->cell_bytes;
}

ibidi_pages_stats ibidi_pages_look(const ibidi_pages *p) {
    ibidi_pages_stats s = p->stats;
    s.in_use = s.cells - p->n_free;
    return s;
}

/* ---- Blocks unpinned, by their last use ---- */

static void unlink_unpinned(ibidi_pages *p, ibidi_block *b) {
    *(b->newer ? &b->newer->older : &p->newest) = b->older;
    *(b->older ? &b->older->newer : &p->oldest) = b->newer;
    b->newer = b->older = NULL;
}

static void link_newest(ibidi_pages *p, ibidi_block *b) {
    b->older = p->newest;
    if (p->newest) p->newest->newer = b;
    p->newest = b;
    if (!p->oldest) p->oldest = b;
}

static ibidi_block **bucket_of(ibidi_pages *p, uint64_t key) {
    return &p->buckets[(key * 0x9e3779b97f4a7c15u) >> (64 - p->bits)];
}

static void drop(ibidi_pages *p, ibidi_block *b) {
    size_t n = (size_t)b->n_layers * b->n_pages;
    ibidi_block **at = bucket_of(p, b->key);
    while (*at && *at != b) at = &(*at)->next;
    if (*at) *at = b->next;
    for (size_t i = 0; i < n; i++) p->free_cells[p->n_free++] = b->cells[i];
    p->stats.blocks--;
    ibid_free(b);
}

/* Makes n cells free, if unpinned blocks can give them. */
static ibid_err make_room(ibidi_pages *p, size_t n) {
    while (p->n_free < n && p->oldest) {
        ibidi_block *b = p->oldest;
        unlink_unpinned(p, b);
        drop(p, b);
        p->stats.evicted++;
    }
    if (p->n_free >= n) return IBID_OK;
    return ibid_fail(
        IBID_NOMEM,
        "the GPU's KV pool is full: %zu pages wanted, %zu free, %zu in all, the rest in use; ask "
        "fewer questions at once, or over fewer blocks, or give the pool more memory "
        "(--gpu-pool)",
        n, p->n_free, p->stats.cells);
}

ibid_err ibidi_pages_take(ibidi_pages *p, uint32_t *cell) {
    ibid_err err = make_room(p, 1);
    if (!err) *cell = p->free_cells[--p->n_free];
    return err;
}

void ibidi_pages_give(ibidi_pages *p, uint32_t cell) {
    p->free_cells[p->n_free++] = cell;
}

static ibid_err add_block(ibidi_pages *p, uint64_t key, size_t n_layers, size_t n_pages,
                          ibidi_block **out) {
    size_t n = n_layers * n_pages; /* of a checked model and segment */
    ibid_err err = make_room(p, n);
    if (err) return err;
    ibidi_block *b = ibid_calloc(1, sizeof *b + n * sizeof *b->cells);
    if (!b) return ibid_fail(IBID_NOMEM, "no memory for a block of %zu pages", n);
    b->key = key;
    b->n_layers = (uint32_t)n_layers;
    b->n_pages = (uint32_t)n_pages;
    for (size_t i = 0; i < n; i++) b->cells[i] = p->free_cells[--p->n_free];
    if (key) {
        b->next = *bucket_of(p, key);
        *bucket_of(p, key) = b;
    }
    p->stats.blocks++;
    *out = b;
    return IBID_OK;
}

ibid_err ibidi_pages_pin(ibidi_pages *p, uint64_t key, size_t n_layers, size_t n_pages,
                         ibidi_block **out) {
    ibidi_block *b = key ? *bucket_of(p, key) : NULL;
    ibid_err err = IBID_OK;
    while (b && b->key != key) b = b->next;
    if (b && (b->n_layers != n_layers || b->n_pages != n_pages))
        return ibid_fail(IBID_INVAL, "block %llu has %u pages in the pool, not %zu",
                         (unsigned long long)key, b->n_pages, n_pages);
    if (b && b->pins == 0) unlink_unpinned(p, b);
    if (b)
        p->stats.hits++;
    else if (!(err = add_block(p, key, n_layers, n_pages, &b)))
        p->stats.misses++;
    if (err) return err;
    if (b->pins++ == 0) p->stats.pinned_blocks++;
    *out = b;
    return IBID_OK;
}

void ibidi_pages_unpin(ibidi_pages *p, ibidi_block *b) {
    if (!b || --b->pins) return;
    p->stats.pinned_blocks--;
    if (b->key)
        link_newest(p, b);
    else
        drop(p, b);
}
