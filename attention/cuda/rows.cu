/* What happens to whole rows between the products: one thread block a row. */
#include "attention/cuda/dialect.h"

enum { THREADS = 256 };

/* The rounded row from what value(i) gives; every thread of the block takes part. */
template <class F>
IBIDI_DEV void round_row(F value, unsigned n, uint16_t *h, unsigned ldh, float *scale,
                         float *space) {
    float largest = 0;
    for (unsigned i = threadIdx.x; i < n; i += THREADS) largest = fmaxf(largest, fabsf(value(i)));
    float s = row_scale(block_reduce<true>(largest, space)), inverse = 1 / s;
    for (unsigned i = threadIdx.x; i < ldh; i += THREADS)
        h[i] = i < n ? f32_to_f16(value(i) * inverse) : (uint16_t)0;
    if (threadIdx.x == 0) *scale = s;
}

__global__ void __launch_bounds__(THREADS)
    norm_kernel(float *x, const float *y, size_t ldy, const float *y_scale, const float *bias,
                const float *w, float eps, const uint32_t *rows, unsigned n, uint16_t *h,
                unsigned ldh, float *scale) {
    __shared__ float space[2][33];
    IBIDI_DYNAMIC_SHARED(memory);
    float *v = (float *)memory; /* [n] the row */
    size_t from = rows ? rows[blockIdx.x] : blockIdx.x;
    float *to = x + from * n;
    float ys = y_scale ? y_scale[from] : 1.0f, sum = 0;
    for (unsigned i = threadIdx.x; i < n; i += THREADS) {
        float a = to[i];
        if (y) a += y[from * ldy + i] * ys;
        if (bias) a += bias[i];
        v[i] = a;
        if (!rows && (y || bias)) to[i] = a;
        sum += a * a;
    }
    sum = block_reduce<false>(sum, space[0]);
    float inverse = 1 / sqrtf(sum / (float)n + eps);
    round_row([=](unsigned i) { return v[i] * inverse * w[i]; }, n, h + (size_t)blockIdx.x * ldh,
              ldh, scale + blockIdx.x, space[1]);
}

__global__ void __launch_bounds__(THREADS)
    swiglu_kernel(const float *y, size_t ldy, const float *y_scale, unsigned n, uint16_t *h,
                  unsigned ldh, float *scale) {
    __shared__ float space[33];
    IBIDI_DYNAMIC_SHARED(memory);
    float *v = (float *)memory;
    const float *row = y + blockIdx.x * ldy;
    float s = y_scale[blockIdx.x];
    for (unsigned i = threadIdx.x; i < n; i += THREADS) {
        float g = row[i] * s;
        v[i] = g / (1 + expf(-g)) * (row[n + i] * s);
    }
    round_row([=](unsigned i) { return v[i]; }, n, h + (size_t)blockIdx.x * ldh, ldh,
              scale + blockIdx.x, space);
}

__global__ void __launch_bounds__(THREADS)
    scale_kernel(float *y, size_t ldy, const float *scale, unsigned n) {
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i < n) y[blockIdx.y * ldy + i] *= scale[blockIdx.y];
}

extern "C" ibid_err ibidi_cu_norm(ibidi_cu_stream s, float *x, const float *y, size_t ldy,
                                  const float *y_scale, const float *bias, const float *w,
                                  float eps, const uint32_t *rows, size_t n, size_t width,
                                  uint16_t *h, size_t ldh, float *scale) {
    if (n == 0) return IBID_OK;
    return launch("norm", norm_kernel, dim3((unsigned)n), THREADS, width * sizeof(float), s, x, y,
                  ldy, y_scale, bias, w, eps, rows, (unsigned)width, h, (unsigned)ldh, scale);
}

extern "C" ibid_err ibidi_cu_swiglu(ibidi_cu_stream s, const float *y, size_t ldy,
                                    const float *y_scale, size_t n, size_t n_ff, uint16_t *h,
                                    size_t ldh, float *scale) {
    if (n == 0) return IBID_OK;
    return launch("swiglu", swiglu_kernel, dim3((unsigned)n), THREADS, n_ff * sizeof(float), s, y,
                  ldy, y_scale, (unsigned)n_ff, h, (unsigned)ldh, scale);
}

extern "C" ibid_err ibidi_cu_scale_rows(ibidi_cu_stream s, float *y, size_t ldy, const float *scale,
                                        size_t n, size_t width) {
    if (n == 0) return IBID_OK;
    return launch("scale", scale_kernel,
                  dim3((unsigned)((width + THREADS - 1) / THREADS), (unsigned)n), THREADS, 0, s, y,
                  ldy, scale, (unsigned)width);
}
