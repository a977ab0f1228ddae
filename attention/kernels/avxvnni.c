/* The backend for AVX2 with AVX-VNNI: int8 dot products four at a time, 256 bits wide. */
#define IBIDI_VNNI 1
#include "attention/kernels/simd_avx2.h"

#include "attention/kernels/simd.h"

const ibid_kernels ibidi_kernels_avxvnni = {
    .name = "avxvnni", .supported = ibidi_cpu_avxvnni, SIMD_ENTRIES};
