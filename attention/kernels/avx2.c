/* The backend for AVX2, FMA and F16C. */
#include "attention/kernels/simd_avx2.h"

#include "attention/kernels/simd.h"

const ibid_kernels ibidi_kernels_avx2 = {.name = "avx2", .supported = ibidi_cpu_avx2, SIMD_ENTRIES};
