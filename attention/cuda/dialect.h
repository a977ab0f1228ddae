/* The few words beyond C in which the kernels are written: half pairs, the tensor core's product,
 * asynchronous copies to shared memory, exchange within a warp, launching. One meaning under nvcc;
 * another under a C++ compiler, where tests/support/emulator runs a grid on the CPU. */
#ifndef IBID_ATTENTION_CUDA_DIALECT_H
#define IBID_ATTENTION_CUDA_DIALECT_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "attention/cuda/launch.h"

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define IBIDI_DEV static __device__ __forceinline__
#define IBIDI_DEV_METHOD __device__ __forceinline__
#define IBIDI_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

/* Two f16 in a word, the first in the low half. */
IBIDI_DEV uint32_t h2_of(float lo, float hi) {
    __half2 h = __floats2half2_rn(lo, hi);
    uint32_t u;
    memcpy(&u, &h, sizeof u);
    return u;
}
IBIDI_DEV __half2 h2_in(uint32_t u) {
    __half2 h;
    memcpy(&h, &u, sizeof h);
    return h;
}
IBIDI_DEV uint32_t h2_out(__half2 h) {
    uint32_t u;
    memcpy(&u, &h, sizeof u);
    return u;
}
IBIDI_DEV uint32_t h2_sub(uint32_t a, uint32_t b) {
    return h2_out(__hsub2(h2_in(a), h2_in(b)));
}
IBIDI_DEV uint32_t h2_mul(uint32_t a, uint32_t b) {
    return h2_out(__hmul2(h2_in(a), h2_in(b)));
}
IBIDI_DEV uint32_t h2_fma(uint32_t a, uint32_t b, uint32_t c) {
    return h2_out(__hfma2(h2_in(a), h2_in(b), h2_in(c)));
}
IBIDI_DEV uint32_t h2_minus(uint32_t a) {
    return h2_out(__hneg2(h2_in(a)));
}
IBIDI_DEV float f16_to_f32(uint16_t h) {
    return __half2float(__ushort_as_half(h));
}
IBIDI_DEV uint16_t f32_to_f16(float f) {
    return __half_as_ushort(__float2half_rn(f));
}
/* Byte i of the result is the byte of (b, a) that nibble i of s names. */
IBIDI_DEV uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t s) {
    return __byte_perm(a, b, s);
}
/* a & b | c, as one instruction also where two of them are constants. */
IBIDI_DEV uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}
/* c [16, 8] += a [16, 16] b [16, 8], fragments as in the PTX ISA, mma.m16n8k16. */
IBIDI_DEV void mma_f16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                       uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/* c [16, 8] = a [16, 32] b [32, 8] in integers, as mma.m16n8k32 has its fragments. */
IBIDI_DEV void mma_s8(int32_t c[4], const uint4 &a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%10,%10,%10,%10};"
                 : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(0));
}
/* 2^v to 2 units in the last place, 0 below 2^-126. */
IBIDI_DEV float exp2_of(float v) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v));
    return e;
}
/* 16 bytes from global to shared memory; done once the thread has waited for its group. */
IBIDI_DEV void copy16_async(void *shared, const void *global) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(global) : "memory");
}
IBIDI_DEV void copy_commit(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Waits until at most n of the thread's groups are under way. */
template <int n> IBIDI_DEV void copy_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
IBIDI_DEV void sync_warp(void) {
    __syncwarp();
}
IBIDI_DEV float shuffle_xor(float v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
IBIDI_DEV uint4 load_stream(const uint4 *p) { /* read once: not kept in the first cache */
    return __ldcs(p);
}
IBIDI_DEV unsigned bits_of(uint64_t v) { /* how many are set */
    return (unsigned)__popcll(v);
}
/* c and the products of four int8 each. */
IBIDI_DEV int32_t dot4(uint32_t a, uint32_t b, int32_t c) {
    return __dp4a((int)a, (int)b, c);
}

extern "C" ibid_err ibidi_device_check(int code, const char *what);

template <class... A>
static ibid_err launch(const char *name, void (*kernel)(A...), dim3 grid, unsigned threads,
                       size_t shared, ibidi_cu_stream s, A... args) {
    if (shared > 48 * 1024) {
        const void *k = (const void *)kernel;
        cudaError_t e =
            cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
        if (e == cudaSuccess) /* room for as many blocks as registers allow, not for one */
            e = cudaFuncSetAttribute(k, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
        if (e != cudaSuccess) return ibidi_device_check((int)e, name);
    }
    kernel<<<grid, threads, shared, (cudaStream_t)s>>>(args...);
    return ibidi_device_check((int)cudaGetLastError(), name);
}

#else
#include "tests/support/emulator/grid.h"
#endif

/* ---- Of both ---- */

/* Two int8 of a word as halves, exactly: bytes 2i, 2i + 1 of w with their signs' bits flipped are
 * unsigned; behind 0x64 they are halves from 1024 on (Kim et al. 2022, arXiv:2211.10017). */
IBIDI_DEV uint32_t two_bytes(uint32_t w, int i) {
    return h2_sub(bytes_of(w ^ 0x80808080u, 0x64646464u, i ? 0x4342u : 0x4140u), 0x64806480u);
}

IBIDI_DEV float warp_sum(float v) {
    for (int m = 16; m; m >>= 1) v += shuffle_xor(v, m);
    return v;
}
IBIDI_DEV float warp_max(float v) {
    for (int m = 16; m; m >>= 1) v = fmaxf(v, shuffle_xor(v, m));
    return v;
}

/* Over all threads of a block of whole warps, up to 1024; every thread gets the result. space: 33
 * floats of shared memory, free for use again once all threads have passed a later barrier. */
template <bool largest> IBIDI_DEV float block_reduce(float v, float *space) {
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = blockDim.x / 32;
    v = largest ? warp_max(v) : warp_sum(v);
    if (lane == 0) space[warp] = v;
    __syncthreads();
    if (warp == 0) {
        v = lane < n ? space[lane] : (largest ? -INFINITY : 0.0f);
        v = largest ? warp_max(v) : warp_sum(v);
        if (lane == 0) space[32] = v;
    }
    __syncthreads();
    return space[32];
}

/* The power of two by which a row is divided so that its largest value comes between 8 and 16. */
IBIDI_DEV float row_scale(float largest) {
    if (!(largest > 0) || !(largest < INFINITY)) return 1;
    int e = ilogbf(largest) - 3;
    return ldexpf(1.0f, e < -100 ? -100 : e);
}
#endif
