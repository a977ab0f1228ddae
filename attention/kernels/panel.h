/* Quantised weights regrouped for integer arithmetic, once, when an engine opens.
 *
 * A panel holds 16 rows of a matrix, a group 32 columns of them; a panel's groups follow each
 * other, so that a matrix streams by front to back. A weight is d * u + m with u an unsigned byte
 * or nibble (ibid_weights_split). A group is, in this order:
 *
 * - d: f16 [n_scales, 16 rows]; n_scales is 1, or 2 where each 16 columns have their own (Q6_K)
 * - m: f16 [16 rows], only if has_offset; else m = -zero * d
 * - u, 8 bits: [8 steps, 16 rows, 4 columns]; step s holds columns 4s .. 4s + 3
 * - u, 4 bits: [4, 16 rows, 4 columns]; step s in the low nibbles, step s + 4 in the high ones
 *
 * So one vector of 32-bit lanes meets four columns of as many rows (vpdpbusd), and no sum goes
 * across lanes. 4-bit weights stay 4-bit: decoding is bound by the bytes it reads. Rows beyond the
 * last are zeros. */
#ifndef IBID_ATTENTION_PANEL_H
#define IBID_ATTENTION_PANEL_H

#include "attention/tensor.h"
#include "rpc/base/err.h"

#include <stdbool.h>

enum { IBID_PANEL_ROWS = 16, IBID_PANEL_GROUP = 32 };

typedef struct ibid_panels {
    size_t rows, cols;
    size_t group_bytes, panel_bytes;
    uint8_t bits, n_scales, zero;
    bool has_offset;
    const uint8_t *data; /* borrowed, at a multiple of 64: [ceil(rows / 16)] panels */
} ibid_panels;

/* The shape of w's panels, data NULL; false if w's type is not a quantised one: it is multiplied as
 * it is. Fails on sizes that overflow, as no open model has. */
bool ibid_panels_shape(const ibid_tensor *w, ibid_panels *out);
size_t ibid_panels_bytes(const ibid_panels *p);
/* Writes panel number `panel`, panel_bytes of them at `to`. */
void ibid_panels_pack(const ibid_panels *p, const ibid_tensor *w, size_t panel, uint8_t *to);
#endif
