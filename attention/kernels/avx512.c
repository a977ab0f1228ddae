/* The backend for AVX-512 F, BW, VL, DQ. */
#include "attention/kernels/simd_avx512.h"

#include "attention/kernels/simd.h"

const ibid_kernels ibidi_kernels_avx512 = {
    .name = "avx512", .supported = ibidi_cpu_avx512, SIMD_ENTRIES};
