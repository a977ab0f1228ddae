/* Which pages of a long context a query reads. A page, some consecutive tokens at one (layer, kv
 * head), is known by a summary: the mean of its keys, and for each pair of dimensions that RoPE
 * turns together the largest distance of a key from it. So a query's score of a key of the page is
 *
 *     q . mean - R <= q . k <= q . mean + R,   R = sum over pairs |q_pair| radius_pair.
 *
 * Quest (arXiv:2406.10774) bounds the score by the keys' smallest and largest value in each
 * dimension. Departures, measured on real keys (docs/performance.md): (1) discs in RoPE's pairs
 * instead of boxes: keys of a page turn round their disc, and turning it as a whole, to another
 * offset, leaves its radius as it is, so that a block's summary serves any place; (2) pages are
 * ranked by q . mean + spread * R with spread 1/2: the bound itself, spread 1, finds less of the
 * attention; (3) heads that share keys choose together, each by its share of all pages.
 *
 * A summary is a row of f16 and the score a product with a query made as long: matmul (kernels.h)
 * scores all pages of a head at once. Pure functions; sizes are trusted. */
#ifndef IBID_ATTENTION_KERNELS_SELECT_H
#define IBID_ATTENTION_KERNELS_SELECT_H

#include "attention/tensor.h"

#include <stdbool.h>

enum { IBID_PAGE_TOKENS = 64, IBID_PAGE_DIM_MAX = 1024 };

#define IBID_PAGE_SPREAD 0.5f

typedef struct ibid_page_shape {
    size_t head_dim, n_rot; /* even, n_rot <= head_dim <= IBID_PAGE_DIM_MAX */
    ibid_pairing pairing;
} ibid_page_shape;

/* Values in a summary: mean, radii, zeros up to a multiple of 32. */
size_t ibid_page_width(const ibid_page_shape *s);
/* keys [n, head_dim] f32, n <= IBID_PAGE_TOKENS, of which those of `seen` count, at least one. cos,
 * sin [n_rot / 2]: turns the summary by that angle; NULL: as the keys are. out [width] f16, the
 * radii such that the bounds above hold for the mean as rounded. */
void ibid_page_summary(const ibid_page_shape *s, const float *keys, size_t n, uint64_t seen,
                       const float *cos, const float *sin, uint16_t *out);
/* out [width]: what a summary is multiplied with for q . mean + spread R. */
void ibid_page_query(const ibid_page_shape *s, const float *q, float spread, float *out);
/* Adds to weight [n] each page's share exp(score) / (sum of those of all pages); scores [n] is
 * overwritten. Pages without tokens (tokens[i] 0) have none. */
void ibid_page_weigh(float *scores, const uint32_t *tokens, size_t n, float *weight);
/* Marks the heaviest pages (the earlier of equals) until they hold `budget` tokens, in the bitmap
 * chosen, where some may be marked before: they count. heap [n] is scratch. Returns the tokens of
 * all marked. */
size_t ibid_page_choose(const float *weight, const uint32_t *tokens, size_t n, size_t budget,
                        uint32_t *heap, uint64_t *chosen);
#endif
