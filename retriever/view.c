#include "retriever/view.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKEN_ID_MAX = 1 << 24 };

void ibidi_view_fini(ibidi_view *v) {
    for (size_t i = 0; i < v->n; i++) ibid_free(v->blocks[i].ids);
    ibid_free(v->blocks);
    ibid_free(v->df);
    *v = (ibidi_view){.n = 0};
}

/* First index whose block is not below `block`. */
static size_t lower_bound(const ibidi_view *v, uint64_t block) {
    size_t lo = 0, hi = v->n;
    if (v->n && v->blocks[v->n - 1].block < block) return v->n;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (v->blocks[mid].block < block)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

size_t ibidi_view_at(const ibidi_view *v, uint64_t block) {
    size_t i = lower_bound(v, block);
    return i < v->n && v->blocks[i].block == block ? i : v->n;
}

static int by_id(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static ibid_err distinct(const ibid_block *b, int32_t **out, uint32_t *n) {
    int32_t *ids = ibid_alloc(b->n_tokens * sizeof *ids);
    if (!ids) return ibid_fail(IBID_NOMEM, "out of memory for the tokens of a block");
    memcpy(ids, b->tokens, b->n_tokens * sizeof *ids);
    qsort(ids, b->n_tokens, sizeof *ids, by_id);
    uint32_t kept = 0;
    for (size_t i = 0; i < b->n_tokens; i++)
        if (!kept || ids[kept - 1] != ids[i]) ids[kept++] = ids[i];
    if (kept && (ids[0] < 0 || ids[kept - 1] > TOKEN_ID_MAX)) {
        ibid_free(ids);
        return ibid_fail(IBID_CORRUPT, "block %llu has a token id outside any vocabulary",
                         (unsigned long long)b->number);
    }
    *out = ids;
    *n = kept;
    return IBID_OK;
}

static ibid_err df_room(ibidi_view *v, int32_t id) {
    size_t need = (size_t)id + 1;
    if (need <= v->n_df) return IBID_OK;
    size_t n = need < 1 << 16 ? 1 << 16 : need * 2;
    uint32_t *df = ibid_realloc(v->df, n * sizeof *df);
    if (!df) return ibid_fail(IBID_NOMEM, "out of memory for token counts");
    memset(df + v->n_df, 0, (n - v->n_df) * sizeof *df);
    v->df = df;
    v->n_df = n;
    return IBID_OK;
}

ibid_err ibidi_view_add(ibidi_view *v, const ibid_block *b) {
    size_t at = lower_bound(v, b->number);
    if (at < v->n && v->blocks[at].block == b->number) return IBID_OK;
    if (v->n == v->room) {
        size_t room = v->room ? v->room * 2 : 64;
        ibidi_live *blocks = ibid_realloc(v->blocks, room * sizeof *blocks);
        if (!blocks) return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", room);
        v->blocks = blocks;
        v->room = room;
    }
    ibidi_live l = {.block = b->number, .n_tokens = (uint32_t)b->n_tokens};
    ibid_err e = distinct(b, &l.ids, &l.n_ids);
    if (!e && l.n_ids) e = df_room(v, l.ids[l.n_ids - 1]);
    if (e) {
        ibid_free(l.ids);
        return e;
    }
    for (uint32_t i = 0; i < l.n_ids; i++) v->df[l.ids[i]]++;
    memmove(v->blocks + at + 1, v->blocks + at, (v->n - at) * sizeof *v->blocks);
    v->blocks[at] = l;
    v->n++;
    v->tokens += l.n_tokens;
    return IBID_OK;
}

void ibidi_view_drop(ibidi_view *v, uint64_t block) {
    size_t at = ibidi_view_at(v, block);
    if (at == v->n) return;
    ibidi_live l = v->blocks[at];
    for (uint32_t i = 0; i < l.n_ids; i++) v->df[l.ids[i]]--;
    v->tokens -= l.n_tokens;
    memmove(v->blocks + at, v->blocks + at + 1, (v->n - at - 1) * sizeof *v->blocks);
    v->n--;
    ibid_free(l.ids);
}

void ibidi_view_idf(const ibidi_view *v, const int32_t *ids, size_t n, double *weights,
                    double *sum) {
    *sum = 0;
    for (size_t i = 0; i < n; i++) {
        double df = ids[i] >= 0 && (size_t)ids[i] < v->n_df ? v->df[ids[i]] : 0;
        weights[i] = log(((double)v->n - df + 0.5) / (df + 0.5) + 1);
        *sum += weights[i];
    }
}
