#include "retriever/key_index_internal.h"

#include "retriever/maxsim.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

void ibidi_keyindex_close(ibidi_keyindex *x) {
    if (!x) return;
    if (x->map) munmap(x->map, x->size);
    ibid_free(x->blocks);
    ibid_free(x->extra);
    ibid_free(x);
}

ibidi_keyindex_facts ibidi_keyindex_told(const ibidi_keyindex *x) {
    return (ibidi_keyindex_facts){.stamp = x->stamp,
                                  .rows = x->rows,
                                  .dead_rows = x->dead_rows,
                                  .extra_rows = x->extra_rows,
                                  .trained_rows = x->trained_rows,
                                  .bytes = x->size,
                                  .cells = x->n_cells,
                                  .probes = x->probes,
                                  .extra = x->extra,
                                  .n_extra = x->n_extra};
}

/* ---- What is alive ---- */
/* First index whose block is not below `block`. */
static size_t lower_bound(const ibidi_keyindex *x, uint64_t block) {
    size_t lo = 0, hi = x->n;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (x->blocks[mid].block < block)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static ibid_err extra_room(ibidi_keyindex *x, size_t n) {
    if (n <= x->room_extra) return IBID_OK;
    size_t room = n * 2 < 64 ? 64 : n * 2;
    uint64_t *more = ibid_realloc(x->extra, room * sizeof *more);
    if (!more) return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", room);
    x->extra = more;
    x->room_extra = room;
    return IBID_OK;
}

ibid_err ibidi_keyindex_sync(ibidi_keyindex *x, const ibidi_view *view) {
    ibid_err e = IBID_OK;
    size_t j = 0;
    x->n_extra = 0;
    x->extra_rows = x->dead_rows = 0;
    for (size_t i = 0; i < x->n; i++) x->blocks[i].dead = true;
    for (size_t i = 0; i < view->n && !e; i++) {
        while (j < x->n && x->blocks[j].block < view->blocks[i].block) j++;
        if (j < x->n && x->blocks[j].block == view->blocks[i].block)
            x->blocks[j].dead = false;
        else if (!(e = extra_room(x, x->n_extra + 1))) {
            x->extra[x->n_extra++] = view->blocks[i].block;
            x->extra_rows += view->blocks[i].n_tokens;
        }
    }
    for (size_t i = 0; i < x->n; i++)
        if (x->blocks[i].dead) x->dead_rows += x->blocks[i].n_tokens;
    return e;
}

static ibid_err follow_extra(ibidi_keyindex *x, uint64_t block, size_t n_tokens, bool alive) {
    size_t lo = x->n_extra;
    while (lo && x->extra[lo - 1] >= block) lo--; /* new blocks have the highest numbers */
    bool there = lo < x->n_extra && x->extra[lo] == block;
    if (there == alive) return IBID_OK;
    ibid_err e = alive ? extra_room(x, x->n_extra + 1) : IBID_OK;
    if (e) return e;
    if (alive) {
        memmove(x->extra + lo + 1, x->extra + lo, (x->n_extra - lo) * sizeof *x->extra);
        x->extra[lo] = block;
        x->n_extra++;
        x->extra_rows += n_tokens;
    } else {
        memmove(x->extra + lo, x->extra + lo + 1, (x->n_extra - lo - 1) * sizeof *x->extra);
        x->n_extra--;
        x->extra_rows -= n_tokens < x->extra_rows ? n_tokens : x->extra_rows;
    }
    return IBID_OK;
}

ibid_err ibidi_keyindex_follow(ibidi_keyindex *x, uint64_t block, size_t n_tokens, bool alive) {
    size_t at = lower_bound(x, block);
    if (at == x->n || x->blocks[at].block != block) return follow_extra(x, block, n_tokens, alive);
    if (x->blocks[at].dead == alive) {
        x->blocks[at].dead = !alive;
        if (alive)
            x->dead_rows -= x->blocks[at].n_tokens;
        else
            x->dead_rows += x->blocks[at].n_tokens;
    }
    return IBID_OK;
}

ibid_key_panels ibidi_keyindex_block(const ibidi_keyindex *x, size_t i) {
    return (ibid_key_panels){x->keys + x->blocks[i].panel * IBID_KEY_PANEL * x->stamp.dim,
                             ibid_key_panels_of(x->blocks[i].n_tokens)};
}

void ibidi_keyindex_row(const ibidi_keyindex *x, size_t i, size_t t, int8_t *key) {
    ibid_key_panels_unpack(ibidi_keyindex_block(x, i).panels, t, x->stamp.dim, key);
}

bool ibidi_keyindex_keys(const ibidi_keyindex *x, uint64_t block, size_t *hint,
                         ibid_key_panels *out) {
    size_t at = *hint;
    if (at >= x->n || x->blocks[at].block != block) at = lower_bound(x, block);
    if (at == x->n || x->blocks[at].block != block) return false;
    *hint = at + 1;
    *out = ibidi_keyindex_block(x, at);
    return true;
}

/* ---- Candidates ---- */
/* Tokens of less than this share of the heaviest one's weight look for no cells: nothing found
 * through "the" alone gets far. Exact scoring counts them all the same. */
#define LIGHT 0.1

typedef struct near {
    int32_t dot;
    uint32_t cell;
} near;

typedef struct gather {
    const ibidi_keyindex *x;
    const ibid_kernels *kernels;
    const ibidi_asking *q;
    size_t n_groups, probes;
    int32_t *best;  /* [n_groups, q->n]: the best cell of each group for each token */
    near *cells;    /* [probes * IBIDI_CELL_GROUP] of one token */
    int32_t *sort;  /* [n_groups] */
    float *sums;    /* [x->n] */
    uint32_t *seen; /* [x->n]: 1 + the last token that hit the block */
    uint32_t *hit;  /* [n_hit] blocks that were hit */
    size_t n_hit;
} gather;

static void group_part(void *arg, size_t part, size_t thread) {
    const gather *g = arg;
    const ibidi_keyindex *x = g->x;
    size_t at = part * IBIDI_CELL_GROUP, dim = g->q->dim;
    size_t n = x->n_cells - at < IBIDI_CELL_GROUP ? x->n_cells - at : IBIDI_CELL_GROUP;
    (void)thread;
    g->kernels->maxsim_i8(g->q->keys, g->q->n, x->cells + at * dim, n, dim,
                          g->best + part * g->q->n, NULL);
}

static int32_t dot(const int8_t *a, const int8_t *b, size_t dim) {
    int32_t s = 0;
    for (size_t d = 0; d < dim; d += 32) /* a fixed length, so that compilers use vectors */
        for (size_t i = 0; i < 32; i++) s += a[d + i] * b[d + i];
    return s;
}

/* The nth greatest (from 1) of v [m], whose order is lost. */
static int32_t nth_greatest(int32_t *v, size_t m, size_t n) {
    size_t lo = 0, hi = m; /* it is among v[lo] to v[hi - 1] */
    while (hi - lo > 1) {
        int32_t pivot = v[lo + (hi - lo - 1) / 2]; /* never the last: then hi would not move */
        size_t i = lo, j = hi - 1;
        for (;;) {
            while (v[i] > pivot) i++;
            while (v[j] < pivot) j--;
            if (i >= j) break;
            int32_t t = v[i];
            v[i++] = v[j];
            v[j--] = t;
        }
        if (n <= j + 1)
            hi = j + 1;
        else
            lo = j + 1;
    }
    return v[lo];
}

static int nearest_first(const void *a, const void *b) {
    const near *x = a, *y = b;
    if (x->dot != y->dot) return x->dot < y->dot ? 1 : -1;
    return (x->cell > y->cell) - (x->cell < y->cell);
}

/* The token's nearest cells, exactly: they lie in the groups with the best bests, of which as many
 * do as cells are wanted. */
static size_t nearest_cells(gather *g, size_t token) {
    size_t wanted = g->probes < g->n_groups ? g->probes : g->n_groups, n = 0, dim = g->q->dim;
    for (size_t i = 0; i < g->n_groups; i++) g->sort[i] = g->best[i * g->q->n + token];
    int32_t least = nth_greatest(g->sort, g->n_groups, wanted);
    size_t equals = wanted; /* groups with just that much that are taken */
    for (size_t i = 0; i < g->n_groups; i++) equals -= g->best[i * g->q->n + token] > least;
    for (size_t i = 0; i < g->n_groups; i++) {
        int32_t best = g->best[i * g->q->n + token];
        if (best < least || (best == least && equals == 0)) continue;
        equals -= best == least;
        size_t end = (i + 1) * IBIDI_CELL_GROUP;
        if (end > g->x->n_cells) end = g->x->n_cells;
        for (size_t c = i * IBIDI_CELL_GROUP; c < end; c++) {
            int32_t d = dot(g->q->keys + token * dim, g->x->cells + c * dim, dim);
            if (wanted < g->n_groups && d < least) continue; /* enough are as near */
            g->cells[n++] = (near){d, (uint32_t)c};
        }
    }
    qsort(g->cells, n, sizeof *g->cells, nearest_first);
    return n < g->probes ? n : g->probes;
}

static void add_token(gather *g, size_t token) {
    const ibidi_keyindex *x = g->x;
    size_t n = nearest_cells(g, token);
    int32_t missing = g->cells[n - 1].dot;
    for (size_t i = 0; i < n; i++) {
        float gain = (float)(g->q->weights[token] * (double)(g->cells[i].dot - missing));
        for (uint64_t p = x->starts[g->cells[i].cell]; p < x->starts[g->cells[i].cell + 1]; p++) {
            uint32_t b = x->posts[p];
            if (g->seen[b] == token + 1) continue; /* a nearer cell had it */
            if (!g->seen[b]) g->hit[g->n_hit++] = b;
            g->seen[b] = (uint32_t)token + 1;
            g->sums[b] += gain;
        }
    }
}

typedef struct scored {
    float sum;
    uint32_t at;
} scored;

static int best_first(const void *a, const void *b) {
    const scored *x = a, *y = b;
    if (x->sum != y->sum) return x->sum < y->sum ? 1 : -1;
    return (x->at > y->at) - (x->at < y->at);
}

/* Puts the n best of s [m] first, in no order. */
static void select_best(scored *s, size_t m, size_t n) {
    size_t lo = 0, hi = m;
    while (hi - lo > 1 && n > lo && n < hi) {
        scored pivot = s[lo + (hi - lo - 1) / 2]; /* never the last: then hi would not move */
        size_t i = lo, j = hi - 1;
        for (;;) {
            while (best_first(&s[i], &pivot) < 0) i++;
            while (best_first(&pivot, &s[j]) < 0) j--;
            if (i >= j) break;
            scored t = s[i];
            s[i++] = s[j];
            s[j--] = t;
        }
        if (n <= j + 1)
            hi = j + 1;
        else
            lo = j + 1;
    }
}

static ibid_err collect(const gather *g, uint64_t *blocks, size_t max, size_t *n, bool *all) {
    const ibidi_keyindex *x = g->x;
    size_t m = 0, live = 0;
    scored *s = ibid_alloc(g->n_hit * sizeof *s);
    if (!s) return ibid_fail(IBID_NOMEM, "out of memory for %zu candidates", g->n_hit);
    for (size_t i = 0; i < g->n_hit; i++)
        if (!x->blocks[g->hit[i]].dead) s[m++] = (scored){g->sums[g->hit[i]], g->hit[i]};
    for (size_t i = 0; i < x->n; i++) live += !x->blocks[i].dead;
    select_best(s, m, max);
    *n = m < max ? m : max;
    if (*n) qsort(s, *n, sizeof *s, best_first);
    for (size_t i = 0; i < *n; i++) blocks[i] = x->blocks[s[i].at].block;
    *all = *n == live;
    ibid_free(s);
    return IBID_OK;
}

ibid_err ibidi_keyindex_candidates(const ibidi_keyindex *x, const ibid_kernels *k, ibid_pool *pool,
                                   const ibidi_asking *q, size_t probes, uint64_t *blocks,
                                   size_t max, size_t *n, bool *all) {
    gather g = {.x = x, .kernels = k, .q = q, .probes = probes};
    double heaviest = 0;
    *n = 0;
    *all = x->n == 0;
    if (!x->n_cells || !x->n || !probes || !q->n) return IBID_OK;
    if (g.probes > x->n_cells) g.probes = x->n_cells;
    g.n_groups = (x->n_cells + IBIDI_CELL_GROUP - 1) / IBIDI_CELL_GROUP;
    g.best = ibid_calloc(g.n_groups * q->n, sizeof *g.best);
    g.sort = ibid_calloc(g.n_groups, sizeof *g.sort);
    g.cells = ibid_calloc(g.probes * IBIDI_CELL_GROUP, sizeof *g.cells);
    g.sums = ibid_calloc(x->n, sizeof *g.sums);
    g.seen = ibid_calloc(x->n, sizeof *g.seen);
    g.hit = ibid_alloc(x->n * sizeof *g.hit);
    ibid_err e = g.best && g.sort && g.cells && g.sums && g.seen && g.hit
                     ? IBID_OK
                     : ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", x->n);
    if (!e) {
        if (pool)
            ibid_pool_run(pool, g.n_groups, group_part, &g);
        else
            for (size_t i = 0; i < g.n_groups; i++) group_part(&g, i, 0);
        for (size_t i = 0; i < q->n; i++)
            if (q->weights[i] > heaviest) heaviest = q->weights[i];
        for (size_t i = 0; i < q->n; i++)
            if (q->weights[i] > 0 && q->weights[i] >= LIGHT * heaviest) add_token(&g, i);
        e = collect(&g, blocks, max, n, all);
    }
    ibid_free(g.best);
    ibid_free(g.sort);
    ibid_free(g.cells);
    ibid_free(g.sums);
    ibid_free(g.seen);
    ibid_free(g.hit);
    return e;
}

/* By more than a step on average: keys derived again from stored KV may be rounded otherwise.
 * key: scratch [dim]. */
static bool apart(const ibidi_keyindex *x, size_t at, const ibid_keys *k, int8_t *key) {
    uint64_t sum = 0;
    for (size_t t = 0; t < k->n_tokens; t++) {
        ibidi_keyindex_row(x, at, t, key);
        for (size_t d = 0; d < k->dim; d++) sum += (uint64_t)abs(k->data[t * k->dim + d] - key[d]);
    }
    return sum > k->n_tokens * k->dim;
}

ibid_err ibidi_keyindex_compare(const ibidi_keyindex *x, ibid_snap *snap, size_t step,
                                uint64_t *differ) {
    int8_t *key = ibid_alloc(x->stamp.dim);
    ibid_err e = key ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for a key");
    *differ = 0;
    for (size_t i = 0; i < x->n && !e; i += step) {
        const ibidi_keyrow *b = &x->blocks[i];
        ibid_keys k;
        e = ibid_snap_keys(snap, b->block, &k);
        if (e == IBID_BUSY && !(e = ibid_snap_renew(snap))) e = ibid_snap_keys(snap, b->block, &k);
        if (!e && k.dim == x->stamp.dim &&
            ibid_hash_cmp(&k.calibration, &x->stamp.calibration) == 0)
            *differ += k.n_tokens != b->n_tokens || apart(x, i, &k, key);
        if (e == IBID_NOTFOUND) e = IBID_OK; /* dead, or its keys went */
    }
    ibid_free(key);
    return e;
}
