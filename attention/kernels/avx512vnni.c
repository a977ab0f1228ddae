/* The backend for AVX-512 with VNNI: int8 dot products four at a time. */
#define IBIDI_VNNI 1
#include "attention/kernels/simd_avx512.h"

#include "attention/kernels/simd.h"

#include "attention/kernels/simd_q8.h"

const ibid_kernels ibidi_kernels_avx512vnni = {
    .name = "avx512vnni",
    .supported = ibidi_cpu_avx512vnni,
    SIMD_ENTRIES,
    .q8_bytes = q8_bytes,
    .q8_pack = simd_q8_pack,
    .matmul_q8 = simd_matmul_q8,
    .matmul_q8_scratch = simd_matmul_q8_scratch,
};
