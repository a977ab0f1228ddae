/* The backend for AVX-512 with VNNI: int8 dot products four at a time. */
#define IBIDI_VNNI 1
#include "attention/kernels/simd_avx512.h"

#include "attention/kernels/simd.h"

const ibid_kernels ibidi_kernels_avx512vnni = {
    .name = "avx512vnni", .supported = ibidi_cpu_avx512vnni, SIMD_ENTRIES};
