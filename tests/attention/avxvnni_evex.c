/* The avxvnni backend as it is, compiled for the AVX-512 VL encoding of its one instruction: so
 * that CPUs without AVX-VNNI but with AVX-512 VNNI run its code in tests. What stays unrun there is
 * the other encoding of vpdpbusd. */
#include "tests/attention/avxvnni_evex.h"

#define IBIDI_VNNI 1
#include "attention/kernels/simd_avx2.h"

#include "attention/kernels/simd.h"

const ibid_kernels avxvnni_evex = {
    .name = "avxvnni (evex)", .supported = ibidi_cpu_avx512vnni, SIMD_ENTRIES};
