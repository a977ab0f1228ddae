/* A token from a row of logits, on the device, so that a decoding step need not bring the logits to
 * the host. One thread block a row. */
#include "attention/cuda/dialect.h"

enum { THREADS = 1024, HALVINGS = 40 };

IBIDI_DEV float weight(float logit, float top, float k) {
    return logit > -INFINITY ? exp2f((logit - top) * k) : 0;
}

/* Sum of weights 2^((logit - top) k) of at least `least`. */
IBIDI_DEV float mass_above(const float *l, unsigned vocab, float top, float k, float least,
                           float *space) {
    float sum = 0;
    for (unsigned i = threadIdx.x; i < vocab; i += THREADS) {
        float w = weight(l[i], top, k);
        if (w >= least) sum += w;
    }
    sum = block_reduce<false>(sum, space);
    __syncthreads(); /* space may be used again */
    return sum;
}

/* The first of the largest. */
IBIDI_DEV unsigned first_largest(const float *l, unsigned vocab, float top, float *space) {
    unsigned first = vocab - 1;
    for (unsigned i = threadIdx.x; i < vocab && first == vocab - 1; i += THREADS)
        if (l[i] == top) first = i;
    /* Numbers below 2^24 are exact as floats. */
    return (unsigned)-block_reduce<true>(-(float)first, space);
}

__global__ void __launch_bounds__(THREADS)
    sample_kernel(const float *logits, size_t ld, unsigned vocab, const float *temperature,
                  const float *top_p, const float *uniform, uint32_t *token) {
    __shared__ float space[33], before[THREADS];
    const float *l = logits + blockIdx.x * ld;
    float top = -INFINITY, t = temperature[blockIdx.x];
    for (unsigned i = threadIdx.x; i < vocab; i += THREADS) top = fmaxf(top, l[i]);
    top = block_reduce<true>(top, space);
    __syncthreads();
    if (!(top > -INFINITY)) { /* nothing to draw from */
        if (threadIdx.x == 0) token[blockIdx.x] = UINT32_MAX;
        return;
    }
    if (!(t > 0) || !(top < INFINITY)) {
        unsigned best = first_largest(l, vocab, top, space);
        if (threadIdx.x == 0) token[blockIdx.x] = best;
        return;
    }
    float k = 1.4426950408889634f / t, all = mass_above(l, vocab, top, k, 0, space);
    float want = top_p[blockIdx.x] * all, lo = 0, hi = 1;
    /* The largest weight such that those as large still reach top_p; 1 is the most probable's. */
    for (int i = 0; i < HALVINGS && top_p[blockIdx.x] < 1; i++) {
        float mid = lo + (hi - lo) / 2;
        if (mass_above(l, vocab, top, k, mid, space) >= want)
            lo = mid;
        else
            hi = mid;
    }
    /* Each thread's stretch of tokens, then the thread whose stretch the draw falls into. */
    unsigned each = (vocab + THREADS - 1) / THREADS, from = threadIdx.x * each;
    unsigned to = from + each < vocab ? from + each : vocab;
    float mine = 0;
    for (unsigned i = from; i < to; i++) {
        float w = weight(l[i], top, k);
        if (w >= lo) mine += w;
    }
    before[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x) return;
    float kept = 0, sum = 0;
    for (unsigned i = 0; i < THREADS; i++) kept += before[i];
    float draw = uniform[blockIdx.x] * kept;
    unsigned part = 0, last = 0;
    for (unsigned i = 0; i < THREADS; i++) {
        if (before[i] > 0) part = i;
        if (before[i] > 0 && sum + before[i] > draw) break;
        if (i + 1 < THREADS) sum += before[i];
    }
    if (sum + before[part] <= draw) sum -= before[part]; /* rounding: past all of them */
    for (unsigned i = part * each; i < (part + 1) * each && i < vocab; i++) {
        float w = weight(l[i], top, k);
        if (w < lo) continue;
        last = i;
        sum += w;
        if (sum > draw) break;
    }
    token[blockIdx.x] = last;
}

extern "C" ibid_err ibidi_cu_sample(ibidi_cu_stream s, const float *logits, size_t ld, size_t n,
                                    size_t vocab, const float *temperature, const float *top_p,
                                    const float *uniform, uint32_t *token) {
    if (n == 0) return IBID_OK;
    return launch("sample", sample_kernel, dim3((unsigned)n), THREADS, 0, s, logits, ld,
                  (unsigned)vocab, temperature, top_p, uniform, token);
}
