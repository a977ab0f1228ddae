#include "attention/cuda/plan.h"
#include "rpc/base/mem.h"

#include <string.h>

bool ibidi_cu_is_fine(const ibidi_cu_shape *m, size_t n) {
    return n * m->group <= IBIDI_CU_TILE_FINE;
}

static size_t tile_rows(bool fine) {
    return fine ? IBIDI_CU_TILE_FINE : IBIDI_CU_TILE;
}

static size_t tiles_per_head(const ibidi_cu_shape *m, const ibidi_cu_piece *p, bool fine) {
    return (p->n * m->group + tile_rows(fine) - 1) / tile_rows(fine);
}

/* Pages that the piece's last row may see: stored [0, *stored), live [first_live, *live). */
static void pages_seen(const ibidi_cu_piece *p, size_t *stored, size_t *live) {
    size_t lo = 0, hi = p->first_live;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (p->pages[mid].start < p->last_position)
            lo = mid + 1;
        else
            hi = mid;
    }
    *stored = lo;
    *live = p->first_live + p->last_live / IBIDI_CU_PAGE + 1;
}

static ibid_err room(void **p, size_t *have, size_t n, size_t size) {
    if (n <= *have) return IBID_OK;
    size_t want = 2 * *have > n ? 2 * *have : n;
    void *q = ibid_realloc(*p, want * size);
    if (!q) return ibid_fail(IBID_NOMEM, "no memory for a plan of %zu parts", n);
    *p = q;
    *have = want;
    return IBID_OK;
}

static ibid_err add_items(ibidi_cu_plan *o, size_t tile, size_t from, size_t to, size_t each,
                          size_t *at, size_t *partial) {
    ibid_err err = IBID_OK;
    for (size_t page = from; !err && page < to; page += each) {
        if ((err = room((void **)&o->items, &o->item_room, *at + 1, sizeof *o->items))) break;
        o->items[(*at)++] =
            (ibidi_cu_item){.tile = (uint32_t)tile,
                            .page0 = (uint32_t)page,
                            .page1 = (uint32_t)(to - page < each ? to : page + each),
                            .partial = (uint32_t)(*partial)++};
    }
    return err;
}

static ibid_err add_tile(const ibidi_cu_shape *m, const ibidi_cu_piece *p, ibidi_cu_plan *o,
                         bool fine, size_t head, size_t number, size_t *n_items, size_t *partial) {
    size_t at = o->n_tiles[0] + o->n_tiles[1], stored, live, rows = tile_rows(fine);
    ibid_err err = room((void **)&o->tiles, &o->tile_room, at + 1, sizeof *o->tiles);
    if (err) return err;
    pages_seen(p, &stored, &live);
    if (p->n_chosen) {
        stored = p->n_chosen;
        live = p->first_live;
    }
    size_t pages = stored + live - p->first_live;
    size_t work = pages * tiles_per_head(m, p, fine) * m->n_kv_heads;
    size_t each = (work + IBIDI_CU_BLOCKS - 1) / IBIDI_CU_BLOCKS, pairs = p->n * m->group;
    ibidi_cu_tile t = {.seq = p->seq, .kv_head = (uint32_t)head, .row0 = p->row0};
    if (p->n_chosen) t.seq = p->chosen_seq + (uint32_t)head;
    t.pair0 = (uint32_t)(number * rows);
    t.n = (uint32_t)(pairs - t.pair0 < rows ? pairs - t.pair0 : rows);
    t.turned0 = (uint32_t)o->n_turned;
    t.n_turned = p->n_turned;
    t.partial0 = (uint32_t)*partial;
    if (!each) each = 1;
    if ((err = add_items(o, at, 0, stored, each, n_items, partial)) ||
        (err = add_items(o, at, p->first_live, live, each, n_items, partial)))
        return err;
    t.n_partials = (uint32_t)*partial - t.partial0;
    o->tiles[at] = t;
    o->n_tiles[fine]++;
    o->n_turned += fine ? p->n_turned : 2 * p->n_turned; /* coarse: and what rounding left */
    if (p->n_turned > o->max_turned) o->max_turned = p->n_turned;
    return IBID_OK;
}

static void name_tiles(const ibidi_cu_shape *m, const ibidi_cu_piece *p, size_t tile0, bool fine,
                       ibidi_cu_row *rows) {
    for (size_t i = 0; i < p->n; i++) {
        ibidi_cu_row *r = &rows[p->row0 + i];
        r->tile0 = (uint32_t)tile0;
        r->tiles = (uint32_t)tiles_per_head(m, p, fine);
        r->tile_rows = (uint32_t)tile_rows(fine);
        r->pair0 = (uint32_t)(i * m->group);
    }
}

ibid_err ibidi_cu_plan_make(const ibidi_cu_shape *m, const ibidi_cu_piece *pieces, size_t n_pieces,
                            ibidi_cu_row *rows, ibidi_cu_plan *o) {
    size_t n_items = 0, partial = 0;
    ibid_err err = IBID_OK;
    memset(o->n_tiles, 0, sizeof o->n_tiles);
    memset(o->n_items, 0, sizeof o->n_items);
    o->n_turned = o->max_turned = 0;
    for (int fine = 1; fine >= 0; fine--) {
        size_t before = n_items;
        if (!fine) partial = (partial + 1) / 2; /* of twice as many rows each */
        for (size_t i = 0; i < n_pieces; i++) {
            const ibidi_cu_piece *p = &pieces[i];
            if (ibidi_cu_is_fine(m, p->n) != (fine != 0)) continue;
            name_tiles(m, p, o->n_tiles[0] + o->n_tiles[1], fine, rows);
            for (size_t h = 0; h < m->n_kv_heads; h++) {
                for (size_t t = 0; !err && t < tiles_per_head(m, p, fine); t++)
                    err = add_tile(m, p, o, fine, h, t, &n_items, &partial);
            }
        }
        if (err) return err;
        o->n_items[fine] = n_items - before;
        o->n_states = partial * tile_rows(fine);
    }
    return IBID_OK;
}

ibid_err ibidi_cu_plan_pad(ibidi_cu_plan *p, size_t to) {
    int fine = p->n_items[1] != 0;
    size_t n = p->n_items[fine], padded = (n + to - 1) / to * to;
    ibid_err err = p->n_items[!fine]
                       ? ibid_fail(IBID_INTERNAL, "a plan of two kinds of tiles")
                       : room((void **)&p->items, &p->item_room, padded, sizeof *p->items);
    if (err) return err;
    memset(p->items + n, 0, (padded - n) * sizeof *p->items);
    p->n_items[fine] = padded;
    return IBID_OK;
}

void ibidi_cu_plan_fini(ibidi_cu_plan *p) {
    ibid_free(p->tiles);
    ibid_free(p->items);
    memset(p, 0, sizeof *p);
}
