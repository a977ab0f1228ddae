/* The vector backends' common code: templates over the types and functions of simd_avx2.h or
 * simd_avx512.h, one of which comes first. Everything in them is static: each backend is one file.
 */
#include "attention/kernels/simd_matmul.h"

#include "attention/kernels/simd_rows.h"

#include "attention/kernels/simd_attn.h" /* needs simd_rows.h */

#include "attention/kernels/simd_maxsim.h"

#include "attention/kernels/simd_page.h"

#include "attention/kernels/simd_q8.h"

/* Without VNNI's dot products of bytes it is slower than f32: on a Zen 4 core, 96 rows against
 * 2,000 keys, AVX2 57 GFLOP/s where attn has 84; with 512-bit VNNI 180 to 240 where attn has 91. */
#ifdef IBIDI_VNNI
#include "attention/kernels/simd_attn_q8.h"

#include "attention/kernels/simd_attn_tiles.h" /* needs simd_attn_q8.h */
#define SIMD_ATTN_I8                                                                               \
    .attn_i8 = simd_attn_i8, .attn_mass_i8 = simd_attn_mass_i8,                                    \
    .kv_tile_bytes = simd_kv_tile_bytes, .kv_tile_pack = simd_kv_tile_pack,                        \
    .attn_tiles = simd_attn_tiles,
#else
#define SIMD_ATTN_I8
#endif

#define SIMD_ENTRIES                                                                               \
    .dequantize = simd_dequantize, .matmul = simd_matmul, .matmul_scratch = simd_matmul_scratch,   \
    .rmsnorm = simd_rmsnorm, .rope = simd_rope, .hadamard = simd_hadamard, .swiglu = simd_swiglu,  \
    .add = simd_add, .attn = simd_attn, SIMD_ATTN_I8.attn_mass = simd_attn_mass,                   \
    .kv_pack = simd_kv_pack, .kv_unpack = simd_kv_unpack, .maxsim_i8 = simd_maxsim_i8,             \
    .maxsim_panels = simd_maxsim_panels, .page_scores = simd_page_scores,                          \
    .q8_bytes = simd_q8_bytes, .q8_pack = simd_q8_pack, .matmul_q8 = simd_matmul_q8
