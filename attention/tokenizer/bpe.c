/* Merges the byte pairs of one word. Words are short: up to SHORT symbols the best pair is found by
 * looking at all of them. Longer runs use a heap of (rank, place), where a stale entry is one whose
 * pair no longer has that rank. Both do the same merges in the same order. */
#include "attention/tokenizer/internal.h"

#include "rpc/base/mem.h"

#include <string.h>

enum { SHORT = 48, MERGED = -2 };

void ibidi_bpe_init(ibidi_bpe *b, const ibid_tokenizer *t) {
    *b = (ibidi_bpe){.t = t};
}

void ibidi_bpe_fini(ibidi_bpe *b) {
    ibid_free(b->id);
    ibid_free(b->next);
    ibid_free(b->prev);
    ibid_free(b->heap);
    *b = (ibidi_bpe){0};
}

static ibid_err reserve(ibidi_bpe *b, size_t n) {
    if (n <= b->room) return IBID_OK;
    size_t room = n < 256 ? 256 : n + n / 4, bytes;
    if (!ibid_mul_size(room, sizeof *b->id, &bytes)) return IBID_NOMEM;
    /* Nothing is kept from the last word, so the old blocks go first. */
    ibid_free(b->id);
    ibid_free(b->next);
    ibid_free(b->prev);
    b->id = ibid_alloc(bytes);
    b->next = ibid_alloc(bytes);
    b->prev = ibid_alloc(bytes);
    b->room = b->id && b->next && b->prev ? room : 0;
    if (b->room) return IBID_OK;
    return ibid_fail(IBID_NOMEM, "out of memory to tokenize a word of %zu bytes", n);
}

static void merge_short(ibidi_bpe *b, size_t n) {
    int32_t id[SHORT];
    uint32_t place[SHORT];
    const ibidi_merge *pair[SHORT]; /* of symbol i and the one after it */
    for (size_t i = 0; i < n; i++) {
        id[i] = b->id[i];
        place[i] = (uint32_t)i;
        pair[i] = i + 1 < n ? ibidi_merge_find(b->t, id[i], b->id[i + 1]) : NULL;
    }
    for (;;) {
        size_t best = n;
        for (size_t i = 0; i + 1 < n; i++)
            if (pair[i] && (best == n || pair[i]->rank < pair[best]->rank)) best = i;
        if (best == n) break;
        id[best] = pair[best]->made;
        b->id[place[best]] = id[best];
        b->id[place[best + 1]] = MERGED;
        n--;
        for (size_t i = best + 1; i < n; i++) {
            id[i] = id[i + 1];
            place[i] = place[i + 1];
            pair[i] = pair[i + 1];
        }
        if (best > 0) pair[best - 1] = ibidi_merge_find(b->t, id[best - 1], id[best]);
        pair[best] = best + 1 < n ? ibidi_merge_find(b->t, id[best], id[best + 1]) : NULL;
    }
}

/* A four-way heap: half as deep as a binary one, and four children share a cache line or two. */
static void sift_down(uint64_t *heap, size_t n, size_t i, uint64_t v) {
    for (;;) {
        size_t child = 4 * i + 1, best = child;
        if (child >= n) break;
        size_t last = child + 4 < n ? child + 4 : n;
        for (size_t c = child + 1; c < last; c++)
            if (heap[c] < heap[best]) best = c;
        if (heap[best] >= v) break;
        heap[i] = heap[best];
        i = best;
    }
    heap[i] = v;
}

static ibid_err push_raw(ibidi_bpe *b, uint64_t v) {
    if (b->n_heap == b->heap_room) {
        size_t room = b->heap_room ? b->heap_room + b->heap_room / 2 : 256, bytes;
        uint64_t *heap = NULL;
        if (ibid_mul_size(room, sizeof *heap, &bytes)) heap = ibid_realloc(b->heap, bytes);
        if (!heap) return ibid_fail(IBID_NOMEM, "out of memory to tokenize a long word");
        b->heap = heap;
        b->heap_room = room;
    }
    b->heap[b->n_heap++] = v;
    return IBID_OK;
}

static ibid_err push(ibidi_bpe *b, uint64_t v) {
    ibid_err e = push_raw(b, v);
    if (e) return e;
    size_t i = b->n_heap - 1;
    while (i > 0 && b->heap[(i - 1) / 4] > v) {
        b->heap[i] = b->heap[(i - 1) / 4];
        i = (i - 1) / 4;
    }
    b->heap[i] = v;
    return IBID_OK;
}

static uint64_t pop(ibidi_bpe *b) {
    uint64_t top = b->heap[0], last = b->heap[--b->n_heap];
    if (b->n_heap) sift_down(b->heap, b->n_heap, 0, last);
    return top;
}

static const ibidi_merge *pair_at(const ibidi_bpe *b, uint32_t i) {
    return b->id[i] != MERGED && b->next[i] < b->n
               ? ibidi_merge_find(b->t, b->id[i], b->id[b->next[i]])
               : NULL;
}

static ibid_err push_pair(ibidi_bpe *b, uint32_t i) {
    const ibidi_merge *m = pair_at(b, i);
    return m ? push(b, (uint64_t)m->rank << 32 | i) : IBID_OK;
}

static ibid_err merge_long(ibidi_bpe *b) {
    ibid_err e = IBID_OK;
    uint32_t n = (uint32_t)b->n;
    b->n_heap = 0;
    for (uint32_t i = 0; i < n; i++) {
        b->prev[i] = i - 1; /* place 0 has none: wraps past n */
        b->next[i] = i + 1;
    }
    for (uint32_t i = 0; i < n && !e; i++) {
        const ibidi_merge *m = pair_at(b, i);
        if (m) e = push_raw(b, (uint64_t)m->rank << 32 | i);
    }
    for (size_t i = b->n_heap / 4 + 1; i-- > 0 && !e;)
        if (i < b->n_heap) sift_down(b->heap, b->n_heap, i, b->heap[i]);
    while (b->n_heap && !e) {
        uint64_t top = pop(b);
        uint32_t i = (uint32_t)top;
        const ibidi_merge *m = pair_at(b, i);
        if (!m || (uint64_t)m->rank != top >> 32) continue;
        uint32_t gone = b->next[i], after = b->next[gone];
        b->id[i] = m->made;
        b->id[gone] = MERGED;
        b->next[i] = after;
        if (after < n) b->prev[after] = i;
        if (b->prev[i] < n) e = push_pair(b, b->prev[i]);
        if (!e) e = push_pair(b, i);
    }
    return e;
}

ibid_err ibidi_bpe_merge(ibidi_bpe *b, const char *word, size_t n) {
    ibid_err e = reserve(b, n);
    if (e) return e;
    b->n = n;
    for (size_t i = 0; i < n; i++) b->id[i] = b->t->byte_id[(unsigned char)word[i]];
    if (n > SHORT) return merge_long(b);
    if (n > 1) merge_short(b, n);
    return IBID_OK;
}
