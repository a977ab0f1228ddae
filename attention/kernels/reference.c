/* The reference backend: plain loops, sums in double, no cleverness. Every other backend is checked
 * against this one, so a change here needs a reason from outside this folder (the formulas named in
 * kernels.h, ggml's block layouts). */
#include "attention/kernels/internal.h"

#include <math.h>

static bool always(void) {
    return true;
}

static void dequantize_group(ibid_type type, const void *row, size_t group, float dst[32]) {
    uint8_t u[32];
    float d[2], m[2];
    ibid_weights_split(type, row, group, u, d, m);
    for (size_t j = 0; j < IBIDI_BLOCK; j++) dst[j] = d[j / 16] * (float)u[j] + m[j / 16];
}

static void ref_dequantize(ibid_type type, const void *row, float *dst, size_t n) {
    const uint8_t *p = row;
    switch (type) {
    case IBID_F32:
        memcpy(dst, row, n * sizeof *dst);
        return;
    case IBID_F16:
        for (size_t i = 0; i < n; i++) dst[i] = ibid_f16_to_f32(ibidi_u16_at(p + 2 * i));
        return;
    case IBID_BF16:
        for (size_t i = 0; i < n; i++) dst[i] = ibidi_bf16_to_f32(ibidi_u16_at(p + 2 * i));
        return;
    case IBID_Q4_0:
    case IBID_Q4_1:
    case IBID_Q5_0:
    case IBID_Q5_1:
    case IBID_Q8_0:
    case IBID_Q4_K:
    case IBID_Q5_K:
    case IBID_Q6_K:
        break;
    }
    for (size_t g = 0; g < n / IBIDI_BLOCK; g++) {
        dequantize_group(type, row, g, dst + g * IBIDI_BLOCK);
    }
}

static size_t ref_matmul_scratch(size_t cols, size_t n) {
    (void)n;
    return cols * sizeof(float);
}

static void ref_matmul(const ibid_tensor *w, size_t row0, size_t row1, const float *x, size_t ldx,
                       size_t n, float *y, size_t ldy, void *scratch) {
    float *row = scratch;
    for (size_t r = row0; r < row1; r++) {
        ref_dequantize(w->type, (const uint8_t *)w->data + r * w->row_bytes, row, w->cols);
        for (size_t i = 0; i < n; i++) {
            double sum = 0;
            for (size_t c = 0; c < w->cols; c++) sum += (double)row[c] * (double)x[i * ldx + c];
            y[i * ldy + r] = (float)sum;
        }
    }
}

static void ref_rmsnorm(const float *x, const float *w, float eps, float *y, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    double scale = 1 / sqrt(sum / (double)n + (double)eps);
    for (size_t i = 0; i < n; i++) y[i] = (float)((double)x[i] * scale * (double)w[i]);
}

static void ref_hadamard(float *x, size_t n) {
    for (; n; n -= 32, x += 32) {
        double y[32];
        for (unsigned i = 0; i < 32; i++) {
            y[i] = 0;
            for (unsigned j = 0; j < 32; j++)
                y[i] += __builtin_parity(i & j) ? -(double)x[j] : (double)x[j];
        }
        for (unsigned i = 0; i < 32; i++) x[i] = (float)(y[i] / sqrt(32));
    }
}

static void ref_rope(ibid_pairing pairing, float *x, size_t n_heads, size_t head_dim, size_t n_rot,
                     const float *cos, const float *sin) {
    for (size_t h = 0; h < n_heads; h++, x += head_dim) {
        for (size_t i = 0; i < n_rot / 2; i++) {
            bool next = pairing == IBID_PAIR_NEXT;
            float *xa = x + (next ? 2 * i : i), *xb = next ? xa + 1 : xa + n_rot / 2;
            double a = (double)*xa, b = (double)*xb;
            double c = (double)cos[i], s = (double)sin[i];
            *xa = (float)(a * c - b * s);
            *xb = (float)(a * s + b * c);
        }
    }
}

static void ref_swiglu(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double g = (double)gate[i];
        gate[i] = (float)(g / (1 + exp(-g)) * (double)up[i]);
    }
}

static void ref_add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

/* Element i of a KV plane. */
static double kv_at(ibid_kv_type type, const void *data, const uint16_t *scale, size_t i) {
    switch (type) {
    case IBID_KV_F32:
        return (double)((const float *)data)[i];
    case IBID_KV_F16:
        return (double)ibid_f16_to_f32(((const uint16_t *)data)[i]);
    case IBID_KV_Q8_0:
        break;
    }
    return (double)((const int8_t *)data)[i] * (double)ibid_f16_to_f32(scale[i / IBIDI_BLOCK]);
}

static double score(const ibid_attn_args *a, size_t row, size_t token) {
    const ibid_kv_view *kv = a->kv;
    size_t at = (a->kv_head * kv->n_tokens + token) * kv->head_dim;
    double sum = 0;
    for (size_t d = 0; d < kv->head_dim; d++) {
        sum += (double)a->q[row * kv->head_dim + d] * kv_at(kv->type, kv->k, kv->k_scale, at + d);
    }
    return sum;
}

static bool sees(const ibid_attn_args *a, size_t row, size_t token) {
    return ibidi_visible_bits(a, row, token & ~(size_t)63) >> (token & 63) & 1;
}

/* Adds dimensions [d0, d1), at most 256, of the row's weighted values. */
static void add_values(const ibid_attn_args *a, size_t row, size_t d0, size_t d1, double max,
                       double old_weight) {
    const ibid_kv_view *kv = a->kv;
    float *acc = a->acc + row * kv->head_dim;
    double sum[256];
    for (size_t d = d0; d < d1; d++) sum[d - d0] = (double)acc[d] * old_weight;
    for (size_t t = 0; t < kv->n_tokens; t++) {
        if (!sees(a, row, t)) continue;
        double p = exp(score(a, row, t) - max);
        size_t at = (a->kv_head * kv->n_tokens + t) * kv->head_dim;
        for (size_t d = d0; d < d1; d++) {
            sum[d - d0] += p * kv_at(kv->type, kv->v, kv->v_scale, at + d);
        }
    }
    for (size_t d = d0; d < d1; d++) acc[d] = (float)sum[d - d0];
}

static void ref_attn(const ibid_attn_args *a) {
    for (size_t r = 0; r < a->n_rows; r++) {
        ibid_attn_state *st = &a->state[r];
        float max = st->max;
        for (size_t t = 0; t < a->kv->n_tokens; t++) {
            if (sees(a, r, t)) max = fmaxf(max, (float)score(a, r, t));
        }
        if (!(max > -INFINITY)) continue;
        double old_weight = st->max > -INFINITY ? exp((double)st->max - (double)max) : 0;
        double sum = (double)st->sum * old_weight;
        bool any = false;
        for (size_t t = 0; t < a->kv->n_tokens; t++) {
            if (!sees(a, r, t)) continue;
            sum += exp(score(a, r, t) - (double)max);
            any = true;
        }
        if (!any) continue; /* exactly untouched */
        for (size_t d = 0; d < a->kv->head_dim; d += 256) {
            size_t end = d + 256 < a->kv->head_dim ? d + 256 : a->kv->head_dim;
            add_values(a, r, d, end, (double)max, old_weight);
        }
        st->max = max;
        st->sum = (float)sum;
    }
}

static void ref_attn_mass(const ibid_attn_args *a, const float *lse, float *mass) {
    for (size_t t = 0; t < a->kv->n_tokens; t++) {
        double sum = 0;
        for (size_t r = 0; r < a->n_rows; r++) {
            if (sees(a, r, t)) sum += exp(score(a, r, t) - (double)lse[r]);
        }
        mass[t] = (float)((double)mass[t] + sum);
    }
}

static void pack_q8_0(const float *src, size_t n, int8_t *dst, uint16_t *scale) {
    float max = 0;
    for (size_t i = 0; i < n; i++) max = fmaxf(max, fabsf(src[i]));
    for (size_t i = 0; i < n / IBIDI_BLOCK; i++) scale[i] = ibid_f32_to_f16(max / 127);
    float d = ibid_f16_to_f32(*scale);
    float inverse = d > 0 ? 1 / d : 0;
    for (size_t i = 0; i < n; i++) {
        /* d was rounded, perhaps down: the largest may come out a little above 127. */
        float q = rintf(src[i] * inverse);
        dst[i] = (int8_t)fminf(fmaxf(q, -127), 127);
    }
}

static void ref_kv_pack(ibid_kv_type type, const float *src, size_t n, void *dst, uint16_t *scale) {
    switch (type) {
    case IBID_KV_F32:
        memcpy(dst, src, n * sizeof *src);
        break;
    case IBID_KV_F16:
        for (size_t i = 0; i < n; i++) ((uint16_t *)dst)[i] = ibid_f32_to_f16(src[i]);
        break;
    case IBID_KV_Q8_0:
        for (size_t i = 0, each = ibid_kv_group(n); i < n; i += each) {
            pack_q8_0(src + i, each, (int8_t *)dst + i, scale + i / IBIDI_BLOCK);
        }
        break;
    }
}

static void ref_kv_unpack(ibid_kv_type type, const void *src, const uint16_t *scale, size_t n,
                          float *dst) {
    for (size_t i = 0; i < n; i++) dst[i] = (float)kv_at(type, src, scale, i);
}

static void ref_maxsim_i8(const int8_t *q, size_t n_q, const int8_t *k, size_t n_keys, size_t dim,
                          int32_t *best, uint32_t *arg) {
    for (size_t i = 0; i < n_q; i++) {
        best[i] = INT32_MIN;
        for (size_t j = 0; j < n_keys; j++) {
            int32_t dot = 0;
            for (size_t d = 0; d < dim; d++) dot += (int32_t)q[i * dim + d] * k[j * dim + d];
            if (dot <= best[i]) continue;
            best[i] = dot;
            if (arg) arg[i] = (uint32_t)j;
        }
    }
}

static void ref_maxsim_panels(const int8_t *q, size_t n_q, size_t dim, const ibid_key_panels *k,
                              size_t n, int32_t *best) {
    for (size_t b = 0; b < n * n_q; b++) {
        const int8_t *of = q + b % n_q * dim;
        const ibid_key_panels *in = &k[b / n_q];
        best[b] = INT32_MIN;
        for (size_t j = 0; j < in->n * IBID_KEY_PANEL; j++) {
            const uint8_t *p = in->panels + j / IBID_KEY_PANEL * IBID_KEY_PANEL * dim;
            int32_t dot = 0;
            for (size_t d = 0; d < dim; d++)
                dot += of[d] * (p[(d / 4 * IBID_KEY_PANEL + j % IBID_KEY_PANEL) * 4 + d % 4] - 128);
            if (dot > best[b]) best[b] = dot;
        }
    }
}

static void page_score(const ibid_page_look *p, size_t page, float *score, size_t ld) {
    int32_t c[4 * IBID_PAGE_LOOK_MAX];
    for (size_t g = 0; g < p->group; g++) {
        int32_t sum = 0, best = INT32_MIN;
        for (size_t i = 0; i < 4 * p->n; i++) {
            size_t at = p->quads[i / 4] * p->room + page;
            c[i] = (int32_t)lrintf(p->q[4 * g * p->n + i] * p->steps[4 * at + i % 4]);
            sum += c[i];
        }
        for (size_t t = 0; t < 64; t++) {
            int32_t of = 0;
            for (size_t i = 0; i < 4 * p->n; i++) {
                size_t at = p->quads[i / 4] * p->room + page;
                uint8_t two = p->codes[128 * at + t / 2 * 4 + i % 4];
                of += c[i] * (t % 2 ? two >> 4 : two & 15);
            }
            if (of > best) best = of;
        }
        score[g * ld] += p->unit[g] * ((float)best - 7.5f * (float)sum);
    }
}

static void ref_page_scores(const ibid_page_look *p, size_t n_pages, float *score, size_t ld) {
    for (size_t i = 0; i < n_pages; i++) page_score(p, i, score + i, ld);
}

const ibid_kernels ibidi_kernels_reference = {
    .name = "reference",
    .supported = always,
    .dequantize = ref_dequantize,
    .matmul = ref_matmul,
    .matmul_scratch = ref_matmul_scratch,
    .rmsnorm = ref_rmsnorm,
    .rope = ref_rope,
    .hadamard = ref_hadamard,
    .swiglu = ref_swiglu,
    .add = ref_add,
    .attn = ref_attn,
    .attn_mass = ref_attn_mass,
    .kv_pack = ref_kv_pack,
    .kv_unpack = ref_kv_unpack,
    .maxsim_i8 = ref_maxsim_i8,
    .maxsim_panels = ref_maxsim_panels,
    .page_scores = ref_page_scores,
};
