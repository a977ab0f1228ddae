/* The vector backends' common code: templates over the types and functions of simd_avx2.h or
 * simd_avx512.h, one of which comes first. Everything in them is static: each backend is one file.
 */
#include "attention/kernels/simd_matmul.h"

#include "attention/kernels/simd_rows.h"

#include "attention/kernels/simd_attn.h" /* needs simd_rows.h */

#include "attention/kernels/simd_maxsim.h"

#define SIMD_ENTRIES                                                                               \
    .dequantize = simd_dequantize, .matmul = simd_matmul, .matmul_scratch = simd_matmul_scratch,   \
    .rmsnorm = simd_rmsnorm, .rope = simd_rope, .swiglu = simd_swiglu, .add = simd_add,            \
    .attn = simd_attn, .attn_mass = simd_attn_mass, .kv_pack = simd_kv_pack,                       \
    .kv_unpack = simd_kv_unpack, .maxsim_i8 = simd_maxsim_i8
