/* Which pages of a long context a query reads: those with the tokens whose keys score best, which a
 * search over all token keys finds (RetrievalAttention, arXiv:2409.10516, by a graph; here by a
 * scan of what is cheap to read). A page, some consecutive tokens at one (layer, kv head), is known
 * by a summary: the mean of its keys, and each key's difference from it in four bits a dimension,
 * with a step for every dimension (per channel, as KIVI has it for keys, arXiv:2402.02750):
 *
 *     k[t, d] is about mean[d] + step[d] (code[t, d] - 7.5).
 *
 * Codes are read by quads, two neighbouring pairs of dimensions that RoPE turns together, and only
 * those three eighths of them where the query and the keys' spread are largest (SparQ Attention,
 * arXiv:2312.04985, by single dimensions of 16 bits); elsewhere a key is its page's mean. Heads
 * that share keys read the same quads and choose together, each by its share of all pages. Quest's
 * bounds (arXiv:2406.10774) and means of pages were here before: they miss single tokens that
 * matter (docs/performance.md).
 *
 * Pure functions; sizes are trusted. */
#ifndef IBID_ATTENTION_KERNELS_SELECT_H
#define IBID_ATTENTION_KERNELS_SELECT_H

#include "attention/tensor.h"

#include <stdbool.h>

enum { IBID_PAGE_TOKENS = 64, IBID_PAGE_DIM_MAX = 1024, IBID_PAGE_READ = 3 /* of eight quads */ };

/* Of a coefficient whose sizes add up to 1: 15 times all of them, with a half for each that
 * rounding may add, is below 2^15. */
#define IBID_PAGE_UNIT (15.0f / 28000.0f)

typedef struct ibid_page_shape {
    size_t head_dim, n_rot; /* n_rot even; head_dim a multiple of 4, up to IBID_PAGE_DIM_MAX */
    ibid_pairing pairing;
} ibid_page_shape;

/* The summaries of a head's pages: what a query reads of many pages lies together. Dimensions are
 * in the order of quads: of pairs 2i and 2i + 1, each first, second. */
typedef struct ibid_page_sums {
    size_t room;     /* pages */
    uint16_t *means; /* [room, padded] f16, in the keys' order; head_dim up to a multiple of 32 */
    float *steps;    /* [head_dim / 4, room, 4] */
    uint8_t *codes;  /* [head_dim / 4, room, 32, 4]: of tokens 2j (low) and 2j + 1 (high) */
} ibid_page_sums;

size_t ibid_page_padded(const ibid_page_shape *s);
size_t ibid_page_quads(const ibid_page_shape *s); /* that are read */
size_t ibid_page_bytes(const ibid_page_shape *s); /* of a page in them, a multiple of 64 */
/* Where they lie in memory of room pages, at `at`, which is at a multiple of 64. */
ibid_page_sums ibid_page_sums_at(const ibid_page_shape *s, void *at, size_t room);
/* Summarises page i: keys [n, head_dim] f32 as they are at the page's place, n <= IBID_PAGE_TOKENS,
 * of which those of `seen` count, at least one; the others get the codes of one that does. */
void ibid_page_summary(const ibid_page_shape *s, const float *keys, size_t n, uint64_t seen,
                       const ibid_page_sums *out, size_t i);
/* Of the steps of the first n pages (0 in those without tokens), for each dimension: spread
 * [head_dim] the root of the sum of squares, most [head_dim] the largest. */
void ibid_page_spread(const ibid_page_shape *s, const ibid_page_sums *pages, size_t n,
                      float *spread, float *most);
/* What a query q [group, head_dim], of heads that share keys, looks for. */
typedef struct ibid_page_query {
    uint32_t *quads; /* [ibid_page_quads] with most sum_d spread[d] sum_g |q[g, d]|, in order */
    float *q;        /* [group, quads, 4] in units */
    float *unit;     /* [group] of a coefficient q step: at least a 127th of the largest that there
                      * can be, and such that sums of 15 of all stay below 2^15 */
    float *rank;     /* [head_dim / 4] scratch */
} ibid_page_query;
void ibid_page_ask(const ibid_page_shape *s, const float *q, size_t group, const float *spread,
                   const float *most, const ibid_page_query *out);
/* Adds to weight [n] each page's share exp(score) / (sum of those of all pages); scores [n] is
 * overwritten. Pages without tokens (tokens[i] 0) have none. */
void ibid_page_weigh(float *scores, const uint32_t *tokens, size_t n, float *weight);
/* Marks the heaviest pages (the earlier of equals) until they hold `budget` tokens, in the bitmap
 * chosen, where some may be marked before: they count. heap [n] is scratch. Returns the tokens of
 * all marked. */
size_t ibid_page_choose(const float *weight, const uint32_t *tokens, size_t n, size_t budget,
                        uint32_t *heap, uint64_t *chosen);
#endif
