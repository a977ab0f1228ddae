/* Template: what runs over single rows: norms, rotation, activations, packing of KV. */
#include "attention/kernels/internal.h"

#include <math.h>

static void simd_rmsnorm(const float *x, const float *w, float eps, float *y, size_t n) {
    vf a = v_zero(), b = v_zero();
    size_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        vf u = v_load(x + i), v = v_load(x + i + VL);
        a = v_fma(u, u, a);
        b = v_fma(v, v, b);
    }
    for (; i < n; i += VL) {
        vf u = v_load_n(x + i, n - i);
        a = v_fma(u, u, a);
    }
    vf scale = v_set1(1 / sqrtf(v_hsum(v_add(a, b)) / (float)n + eps));
    for (i = 0; i + VL <= n; i += VL) {
        v_store(y + i, v_mul(v_mul(v_load(x + i), scale), v_load(w + i)));
    }
    if (i < n) {
        vf v = v_mul(v_mul(v_load_n(x + i, n - i), scale), v_load_n(w + i, n - i));
        v_store_n(y + i, v, n - i);
    }
}

/* Pairs (i, i + half). */
INLINE void rope_half(float *x, size_t half, const float *cos, const float *sin) {
    for (size_t i = 0; i < half; i += VL) {
        size_t n = half - i;
        vf a = v_load_n(x + i, n), b = v_load_n(x + half + i, n);
        vf c = v_load_n(cos + i, n), s = v_load_n(sin + i, n);
        v_store_n(x + i, v_sub(v_mul(a, c), v_mul(b, s)), n);
        v_store_n(x + half + i, v_fma(a, s, v_mul(b, c)), n);
    }
}

static void simd_rope(ibid_pairing pairing, float *x, size_t n_heads, size_t head_dim, size_t n_rot,
                      const float *cos, const float *sin) {
    for (size_t h = 0; h < n_heads; h++, x += head_dim) {
        size_t i = 0;
        if (pairing == IBID_PAIR_HALF) {
            rope_half(x, n_rot / 2, cos, sin);
            continue;
        }
        for (; 2 * i + VL <= n_rot; i += VL / 2) {
            v_store(x + 2 * i, v_rotate(v_load(x + 2 * i), cos + i, sin + i));
        }
        for (; i < n_rot / 2; i++) {
            float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = a * sin[i] + b * cos[i];
        }
    }
}

/* Sums and differences of values 16, 8, 4, 2 and 1 apart: between vectors, then within them. */
static void simd_hadamard(float *x, size_t n) {
    for (; n; n -= 32, x += 32) {
        vf v[32 / VL];
        for (int i = 0; i < 32 / VL; i++) v[i] = v_mul(v_load(x + i * VL), v_set1(0.17677669529f));
        for (int h = 16 / VL; h >= 1; h /= 2) {
            for (int i = 0; i < 32 / VL; i++) {
                if (i & h) continue;
                vf a = v[i], b = v[i + h];
                v[i] = v_add(a, b);
                v[i + h] = v_sub(a, b);
            }
        }
        for (int i = 0; i < 32 / VL; i++) v_store(x + i * VL, v_butterflies(v[i]));
    }
}

INLINE vf silu_times(vf g, vf up) {
    vf one = v_set1(1);
    return v_mul(v_div(g, v_add(one, v_exp(v_sub(v_zero(), g)))), up);
}

static void simd_swiglu(float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        v_store(gate + i, silu_times(v_load(gate + i), v_load(up + i)));
    }
    if (i < n) {
        vf v = silu_times(v_load_n(gate + i, n - i), v_load_n(up + i, n - i));
        v_store_n(gate + i, v, n - i);
    }
}

static void simd_add(float *x, const float *y, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) v_store(x + i, v_add(v_load(x + i), v_load(y + i)));
    if (i < n) v_store_n(x + i, v_add(v_load_n(x + i, n - i), v_load_n(y + i, n - i)), n - i);
}

INLINE void pack_block(const size_t n, const float *src, int8_t *dst, uint16_t *scale) {
    vf v[64 / VL], max = v_zero();
    for (size_t j = 0; j < n / VL; j++) {
        v[j] = v_load(src + j * VL);
        max = v_max(max, v_abs(v[j]));
    }
    scale[0] = scale[n / 32 - 1] = ibid_f32_to_f16(v_hmax(max) / 127);
    float d = ibid_f16_to_f32(*scale);
    vf inverse = v_set1(d > 0 ? 1 / d : 0);
    for (size_t j = 0; j < n / VL; j++) {
        vf q = v_min(v_max(v_mul(v[j], inverse), v_set1(-127)), v_set1(127));
        v_to_i8(dst + j * VL, q);
    }
}

static void simd_kv_pack(ibid_kv_type type, const float *src, size_t n, void *dst,
                         uint16_t *scale) {
    size_t i = 0;
    switch (type) {
    case IBID_KV_F32:
        memcpy(dst, src, n * sizeof *src);
        break;
    case IBID_KV_F16:
        for (; i + VL <= n; i += VL) v_to_half((uint16_t *)dst + i, v_load(src + i));
        for (; i < n; i++) ((uint16_t *)dst)[i] = ibid_f32_to_f16(src[i]);
        break;
    case IBID_KV_Q8_0:
        if (ibid_kv_group(n) == 64)
            for (; i < n; i += 64) pack_block(64, src + i, (int8_t *)dst + i, scale + i / 32);
        for (; i < n; i += 32) pack_block(32, src + i, (int8_t *)dst + i, scale + i / 32);
        break;
    }
}

static void simd_kv_unpack(ibid_kv_type type, const void *src, const uint16_t *scale, size_t n,
                           float *dst) {
    size_t i = 0;
    switch (type) {
    case IBID_KV_F32:
        memcpy(dst, src, n * sizeof *dst);
        break;
    case IBID_KV_F16:
        for (; i + VL <= n; i += VL) v_store(dst + i, v_from_half((const uint16_t *)src + i));
        for (; i < n; i++) dst[i] = ibid_f16_to_f32(((const uint16_t *)src)[i]);
        break;
    case IBID_KV_Q8_0:
        for (; i < n; i += 32) {
            vf d = v_half_set1(scale + i / 32);
            for (size_t j = 0; j < 32; j += VL) {
                v_store(dst + i + j, v_mul(d, v_from_i8((const int8_t *)src + i + j)));
            }
        }
        break;
    }
}
