/* A grid of thread blocks on the CPU, for tests of the CUDA kernels where there is no GPU: the
 * kernels' sources compiled as C++ against this. Every thread of a block is a fiber; blocks run one
 * after the other. Threads run until they meet a barrier or an exchange, in an order that
 * ibidi_emulator_order() (device.h) shuffles, so that a missing barrier shows as a wrong result in
 * some order. Asynchronous copies take effect only when they are waited for. Dynamic shared memory
 * is filled with NaN before each block. A barrier that not all threads reach ends the program.
 *
 * What it cannot find: errors of memory order between threads that a barrier does not separate but
 * that happen to run in a harmless order in every shuffle, races between blocks, and anything
 * about speed. Those are for compute-sanitizer and a GPU (tools/gpu-check). */
#ifndef IBID_TEST_EMULATOR_GRID_H
#define IBID_TEST_EMULATOR_GRID_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#include "attention/cuda/launch.h"

extern "C" {
float ibid_f16_to_f32(uint16_t h);
uint16_t ibid_f32_to_f16(float f);
}

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {
    }
};
struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulator {
extern dim3 thread_index, block_index, block_size, grid_size;
extern uint8_t *dynamic_shared;
extern const float *const halves; /* [65536] what each f16 is worth */
void run(dim3 grid, unsigned threads, size_t shared, const std::function<void()> &kernel);
void barrier();
/* Each lane gives size bytes; returns all 32 lanes' ([32][size]), valid until the next but one. */
const uint8_t *exchange(const void *mine, size_t size);
void copy_async(void *to, const void *from);
void copy_commit();
void copy_wait(int left);
} // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define __global__ static
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ alignas(16) static
#define __syncthreads emulator::barrier
#define IBIDI_DEV [[maybe_unused]] static inline
#define IBIDI_DEV_METHOD inline
#define IBIDI_DYNAMIC_SHARED(name) uint8_t *name = emulator::dynamic_shared

IBIDI_DEV uint32_t h2_pack(uint16_t lo, uint16_t hi) {
    return (uint32_t)lo | (uint32_t)hi << 16;
}
IBIDI_DEV float h2_lo(uint32_t h) {
    return emulator::halves[h & 0xffffu];
}
IBIDI_DEV float h2_hi(uint32_t h) {
    return emulator::halves[h >> 16];
}
IBIDI_DEV uint32_t h2_of(float lo, float hi) {
    return h2_pack(ibid_f32_to_f16(lo), ibid_f32_to_f16(hi));
}
IBIDI_DEV uint32_t h2_sub(uint32_t a, uint32_t b) {
    return h2_of(h2_lo(a) - h2_lo(b), h2_hi(a) - h2_hi(b));
}
IBIDI_DEV uint32_t h2_mul(uint32_t a, uint32_t b) {
    return h2_of(h2_lo(a) * h2_lo(b), h2_hi(a) * h2_hi(b));
}
IBIDI_DEV uint32_t h2_fma(uint32_t a, uint32_t b, uint32_t c) {
    return h2_of(fmaf(h2_lo(a), h2_lo(b), h2_lo(c)), fmaf(h2_hi(a), h2_hi(b), h2_hi(c)));
}
IBIDI_DEV uint32_t h2_minus(uint32_t a) {
    return a ^ 0x80008000u;
}
IBIDI_DEV float f16_to_f32(uint16_t h) {
    return ibid_f16_to_f32(h);
}
IBIDI_DEV uint16_t f32_to_f16(float f) {
    return ibid_f32_to_f16(f);
}
IBIDI_DEV uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t s) {
    uint64_t all = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (unsigned i = 0; i < 4; i++) {
        uint64_t byte = all >> (8 * (s >> (4 * i) & 7)) & 255;
        out |= (uint32_t)byte << (8 * i);
    }
    return out;
}
IBIDI_DEV uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    return (a & b) | c;
}
/* Fragments by the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": lane = 4
 * g
 * + t. a: registers 0..3 hold (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..); b:
 * (2t.., g), (2t + 8.., g); c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). */
IBIDI_DEV void mma_f16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                       uint32_t b1) {
    uint32_t mine[6] = {a0, a1, a2, a3, b0, b1}, all[32][6];
    memcpy(all, emulator::exchange(mine, sizeof mine), sizeof all);
    unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = g + 8 * (i / 2), col = 2 * t + i % 2;
        double sum = (double)c[i];
        for (unsigned k = 0; k < 16; k += 2) {
            uint32_t x = all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            uint32_t y = all[col * 4 + k % 8 / 2][4 + k / 8];
            sum += (double)h2_lo(x) * (double)h2_lo(y) + (double)h2_hi(x) * (double)h2_hi(y);
        }
        c[i] = (float)sum;
    }
}
/* By the same, "Matrix Fragments for mma.m16n8k32": a: registers 0..3 hold bytes (g, 4t..), (g + 8,
 * 4t..), (g, 4t + 16..), (g + 8, 4t + 16..); b: (4t.., g), (4t + 16.., g). */
IBIDI_DEV void mma_s8(int32_t c[4], const uint4 &a, uint32_t b0, uint32_t b1) {
    uint32_t mine[6] = {a.x, a.y, a.z, a.w, b0, b1}, all[32][6];
    memcpy(all, emulator::exchange(mine, sizeof mine), sizeof all);
    unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = g + 8 * (i / 2), col = 2 * t + i % 2;
        c[i] = 0;
        for (unsigned k = 0; k < 32; k++) {
            uint32_t x = all[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)];
            uint32_t y = all[col * 4 + k % 16 / 4][4 + k / 16];
            c[i] += (int8_t)(x >> 8 * (k % 4)) * (int8_t)(y >> 8 * (k % 4));
        }
    }
}
IBIDI_DEV float exp2_of(float v) {
    return v < -126 ? 0 : exp2f(v);
}
IBIDI_DEV void copy16_async(void *shared, const void *global) {
    emulator::copy_async(shared, global);
}
IBIDI_DEV void copy_commit(void) {
    emulator::copy_commit();
}
template <int n> IBIDI_DEV void copy_wait(void) {
    emulator::copy_wait(n);
}
IBIDI_DEV void sync_warp(void) {
    (void)emulator::exchange("", 1);
}
IBIDI_DEV float shuffle_xor(float v, int mask) {
    float other;
    const uint8_t *all = emulator::exchange(&v, sizeof v);
    memcpy(&other, all + ((threadIdx.x % 32) ^ (unsigned)mask) * sizeof v, sizeof v);
    return other;
}
IBIDI_DEV uint4 load_stream(const uint4 *p) {
    return *p;
}
IBIDI_DEV unsigned bits_of(uint64_t v) {
    return (unsigned)__builtin_popcountll(v);
}

IBIDI_DEV int32_t dot4(uint32_t a, uint32_t b, int32_t c) {
    for (unsigned i = 0; i < 32; i += 8) c += (int8_t)(a >> i) * (int8_t)(b >> i);
    return c;
}

ibid_err ibidi_emulator_put(void *s, const char *what, std::function<void()> f);

template <class... A, class... B>
static ibid_err launch(const char *name, void (*kernel)(A...), dim3 grid, unsigned threads,
                       size_t shared, ibidi_cu_stream s, B... args) {
    return ibidi_emulator_put(
        s, name, [=] { emulator::run(grid, threads, shared, [=] { kernel(args...); }); });
}
#endif
