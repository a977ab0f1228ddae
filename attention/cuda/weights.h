/* Weights as the device holds them (layout.h): 4-bit ones of 32 with one scale and offset stay
 * 4-bit (Q4_0, Q4_1, Q4_K: its factors are multiplied out), Q8_0 stays 8-bit, all else becomes f16.
 * Each is rounded to f16 when it is used, here or there: by at most 2^-11 of it. */
#ifndef IBID_ATTENTION_CUDA_WEIGHTS_H
#define IBID_ATTENTION_CUDA_WEIGHTS_H

#include "attention/cuda/layout.h"
#include "attention/tensor.h"
#include "rpc/base/err.h"

/* The shape of a tensor on the device, data NULL. */
ibidi_cu_matrix ibidi_cu_matrix_of(const ibid_tensor *t);
size_t ibidi_cu_panel_bytes(const ibidi_cu_matrix *m);
size_t ibidi_cu_matrix_bytes(const ibidi_cu_matrix *m);
/* Writes panel number `panel`. NOTSUP: a weight too large for f16. */
ibid_err ibidi_cu_pack_panel(const ibid_tensor *t, const ibidi_cu_matrix *m, size_t panel,
                             uint8_t *to);
#endif
