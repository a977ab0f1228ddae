/* Parts of find that need no store, for tests. */
#ifndef IBID_RETRIEVER_FIND_H
#define IBID_RETRIEVER_FIND_H

#include "attention/kernels/kernels.h"
#include "retriever/maxsim.h"
#include "retriever/sentences.h"

/* Ends of a chunk's tokens as they are stored (ids [n]), given another tokenisation of the same
 * bytes (have, [n_have] with ends). Where both agree, from the front and from the back, its ends
 * hold; between them they are spaced evenly. out [n]. */
void ibidi_align_ends(const int32_t *ids, size_t n, const int32_t *have, const uint64_t *have_ends,
                      size_t n_have, uint64_t bytes, uint64_t *out);
#endif
