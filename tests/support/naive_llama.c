#include "tests/support/naive_llama.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *need(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    if (!p) {
        perror("naive_llama");
        abort();
    }
    return p;
}

/* IEEE 754 binary16, by its definition; clang 14 has no _Float16 on this target. */
static double half_at(const uint8_t *p) {
    unsigned bits = (unsigned)p[0] | (unsigned)p[1] << 8;
    int exponent = (int)(bits >> 10 & 31);
    double fraction = (double)(bits & 1023) / 1024, sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return fraction > 0 ? (double)NAN : sign * (double)INFINITY;
    return sign * (exponent ? ldexp(1 + fraction, exponent - 15) : ldexp(fraction, -14));
}

/* Weight i of a Q4_K or Q5_K block: its group's factors are 6 bits each, the first four groups' in
 * bytes 0 .. 7, of the others the low halves in bytes 8 .. 11 and the rest above the former. */
static double k_weight(const uint8_t *p, bool five, size_t i) {
    const uint8_t *f = p + 4, *q = p + (five ? 48 : 16);
    size_t g = i / 32;
    int scale = f[g % 4] & 63, offset = f[4 + g % 4] & 63;
    if (g >= 4) {
        scale = f[8 + g - 4] % 16 + f[g - 4] / 64 * 16;
        offset = f[8 + g - 4] / 16 + f[g] / 64 * 16;
    }
    int bits = q[g / 2 * 32 + i % 32];
    bits = g % 2 ? bits / 16 : bits % 16;
    if (five && p[16 + i % 32] & 1 << g) bits += 16;
    return half_at(p) * scale * bits - half_at(p + 2) * offset;
}

/* Weight i of a Q6_K block: two halves of 128 weights, each with 64 bytes of low and 32 of high
 * bits; of a half, quarter k has its high bits at 2k, its low ones in bytes 32 (k % 2) and on. */
static double q6_weight(const uint8_t *p, size_t i) {
    size_t half = i / 128, quarter = i / 32 % 4, j = i % 32;
    int low = p[64 * half + 32 * (quarter % 2) + j], high = p[128 + 32 * half + j];
    int bits = (quarter < 2 ? low % 16 : low / 16) + 16 * (high >> 2 * quarter & 3);
    return half_at(p + 208) * (int8_t)p[192 + i / 16] * (bits - 32);
}

/* Weight (row, col), by ggml's block layouts. */
static double weight(const ibid_tensor *w, size_t row, size_t col) {
    const uint8_t *p = (const uint8_t *)w->data + row * w->row_bytes;
    size_t block = col / 32, i = col % 32;
    float f;
    switch (w->type) {
    case IBID_F32:
        memcpy(&f, p + 4 * col, 4);
        return (double)f;
    case IBID_F16:
        return half_at(p + 2 * col);
    case IBID_Q8_0:
        p += block * 34;
        return half_at(p) * (double)(int8_t)p[2 + i];
    case IBID_Q4_0:
        p += block * 18;
        return half_at(p) * ((double)(i < 16 ? p[2 + i] & 15 : p[2 + i - 16] >> 4) - 8);
    case IBID_Q4_1:
        p += block * 20;
        return half_at(p) * (double)(i < 16 ? p[4 + i] & 15 : p[4 + i - 16] >> 4) + half_at(p + 2);
    case IBID_Q5_0:
        p += block * 22;
        return half_at(p) * ((i < 16 ? p[6 + i] & 15 : p[6 + i - 16] >> 4) +
                             (p[2 + i / 8] >> i % 8 & 1) * 16 - 16);
    case IBID_Q5_1:
        p += block * 24;
        return half_at(p) * ((i < 16 ? p[8 + i] & 15 : p[8 + i - 16] >> 4) +
                             (p[4 + i / 8] >> i % 8 & 1) * 16) +
               half_at(p + 2);
    case IBID_Q4_K:
        return k_weight(p + col / 256 * 144, false, col % 256);
    case IBID_Q5_K:
        return k_weight(p + col / 256 * 176, true, col % 256);
    case IBID_Q6_K:
        return q6_weight(p + col / 256 * 210, col % 256);
    case IBID_BF16: {
        uint32_t bits = (uint32_t)p[2 * col] << 16 | (uint32_t)p[2 * col + 1] << 24;
        memcpy(&f, &bits, 4);
        return (double)f;
    }
    }
    abort();
}

/* y[i, rows] = w x[i, cols] */
static void multiply(const ibid_tensor *w, const double *x, size_t n, double *y) {
    double *row = need(w->cols, sizeof *row);
    for (size_t r = 0; r < w->rows; r++) {
        for (size_t c = 0; c < w->cols; c++) row[c] = weight(w, r, c);
        for (size_t i = 0; i < n; i++) {
            double sum = 0;
            for (size_t c = 0; c < w->cols; c++) sum += row[c] * x[i * w->cols + c];
            y[i * w->rows + r] = sum;
        }
    }
    free(row);
}

/* n rows as long as w; x and y may be equal. */
static void normalise(const ibid_model *m, const ibid_tensor *w, const double *x, size_t n,
                      double *y) {
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (size_t c = 0; c < w->cols; c++) sum += x[i * w->cols + c] * x[i * w->cols + c];
        double scale = 1 / sqrt(sum / (double)w->cols + (double)m->norm_eps);
        for (size_t c = 0; c < w->cols; c++) {
            y[i * w->cols + c] = x[i * w->cols + c] * scale * weight(w, 0, c);
        }
    }
}

/* n rows of x, by the model's bias where it has one. */
static void add_bias(const ibid_tensor *bias, double *x, size_t n) {
    for (size_t i = 0; bias->data && i < n * bias->cols; i++)
        x[i] += weight(bias, 0, i % bias->cols);
}

static void rotate(const ibid_model *m, const double *x, uint32_t position, double *y) {
    memcpy(y, x, m->head_dim * sizeof *y);
    for (size_t i = 0; i < m->rope.n_rot / 2; i++) {
        double angle = (double)position * (double)m->rope.freq[i];
        bool llama = m->arch == IBID_ARCH_LLAMA;
        size_t a = llama ? 2 * i : i, b = llama ? 2 * i + 1 : i + m->rope.n_rot / 2;
        y[a] = x[a] * cos(angle) - x[b] * sin(angle);
        y[b] = x[a] * sin(angle) + x[b] * cos(angle);
    }
}

void naive_kv_init(naive_kv *kv, const ibid_model *m, size_t room) {
    size_t n = m->n_layers * room * m->n_kv_heads * m->head_dim;
    *kv = (naive_kv){.m = m, .room = room};
    kv->k = need(n, sizeof *kv->k);
    kv->v = need(n, sizeof *kv->v);
    kv->position = need(room, sizeof *kv->position);
}

void naive_kv_fini(naive_kv *kv) {
    free(kv->k);
    free(kv->v);
    free(kv->position);
}

static size_t at(const naive_kv *kv, size_t layer, size_t entry) {
    return (layer * kv->room + entry) * kv->m->n_kv_heads * kv->m->head_dim;
}

void naive_kv_append(naive_kv *kv, const naive_kv *from, size_t first, size_t n, uint32_t shift) {
    size_t width = kv->m->n_kv_heads * kv->m->head_dim;
    if (kv->n + n > kv->room) abort();
    for (size_t l = 0; l < kv->m->n_layers; l++) {
        memcpy(kv->k + at(kv, l, kv->n), from->k + at(from, l, first), n * width * sizeof *kv->k);
        memcpy(kv->v + at(kv, l, kv->n), from->v + at(from, l, first), n * width * sizeof *kv->v);
    }
    for (size_t i = 0; i < n; i++) kv->position[kv->n + i] = from->position[first + i] + shift;
    kv->n += n;
}

/* One query head of one row at one layer, over kv's entries (the new rows' included). */
static void attend(const naive_kv *kv, size_t layer, size_t head, const double *q,
                   uint32_t position, double *out, double *mass, size_t n_mass) {
    const ibid_model *m = kv->m;
    size_t dim = m->head_dim, offset = head / (m->n_heads / m->n_kv_heads) * dim;
    double *p = need(kv->n, sizeof *p), *turned = need(2 * dim, sizeof *turned), max = -INFINITY;
    double *key = turned + dim, sum = 0;
    rotate(m, q, position, turned);
    for (size_t j = 0; j < kv->n; j++) {
        p[j] = -INFINITY;
        if (kv->position[j] > position) continue;
        rotate(m, kv->k + at(kv, layer, j) + offset, kv->position[j], key);
        p[j] = 0;
        for (size_t d = 0; d < dim; d++) p[j] += turned[d] * key[d];
        p[j] /= sqrt((double)dim);
        if (p[j] > max) max = p[j];
    }
    for (size_t j = 0; j < kv->n; j++) sum += p[j] = exp(p[j] - max);
    memset(out, 0, dim * sizeof *out);
    for (size_t j = 0; j < kv->n; j++) {
        p[j] /= sum;
        if (mass && j < n_mass) mass[j] += p[j];
        for (size_t d = 0; d < dim; d++) out[d] += p[j] * kv->v[at(kv, layer, j) + offset + d];
    }
    free(p);
    free(turned);
}

static void add(double *x, const double *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

void naive_run(naive_kv *kv, const int32_t *tokens, const uint32_t *positions, size_t n,
               double *logits, double *mass, const uint64_t *heads) {
    const ibid_model *m = kv->m;
    size_t q_dim = m->n_heads * m->head_dim, before = kv->n, wide = q_dim + m->n_embd + m->n_ff;
    double *x = need(n * m->n_embd, sizeof *x), *h = need(n * wide, sizeof *h);
    double *q = need(n * q_dim, sizeof *q), *o = need(n * wide, sizeof *o);
    double *up = need(n * m->n_ff, sizeof *up);
    if (before + n > kv->room) abort();
    for (size_t i = 0; i < n; i++) {
        for (size_t c = 0; c < m->n_embd; c++) {
            x[i * m->n_embd + c] = weight(&m->embed, (size_t)tokens[i], c);
        }
        kv->position[before + i] = positions[i];
    }
    kv->n += n;
    for (size_t l = 0; l < m->n_layers; l++) {
        const ibid_layer *w = &m->layers[l];
        normalise(m, &w->attn_norm, x, n, h);
        multiply(&w->wk, h, n, kv->k + at(kv, l, before));
        multiply(&w->wv, h, n, kv->v + at(kv, l, before));
        multiply(&w->wq, h, n, q);
        add_bias(&w->bk, kv->k + at(kv, l, before), n);
        add_bias(&w->bv, kv->v + at(kv, l, before), n);
        add_bias(&w->bq, q, n);
        if (w->k_norm.data) {
            double *k = kv->k + at(kv, l, before);
            normalise(m, &w->k_norm, k, n * m->n_kv_heads, k);
            normalise(m, &w->q_norm, q, n * m->n_heads, q);
        }
        for (size_t i = 0; i < n; i++) {
            for (size_t g = 0; g < m->n_heads; g++) {
                size_t bit = l * m->n_heads + g;
                bool counts = !heads || (heads[bit / 64] >> bit % 64 & 1);
                attend(kv, l, g, q + i * q_dim + g * m->head_dim, positions[i],
                       h + i * q_dim + g * m->head_dim, counts ? mass : NULL, before);
            }
        }
        multiply(&w->wo, h, n, o);
        add_bias(&w->bo, o, n);
        add(x, o, n * m->n_embd);
        normalise(m, &w->ffn_norm, x, n, h);
        multiply(&w->gate, h, n, o);
        multiply(&w->up, h, n, up);
        for (size_t i = 0; i < n * m->n_ff; i++) up[i] *= o[i] / (1 + exp(-o[i]));
        multiply(&w->down, up, n, h);
        add(x, h, n * m->n_embd);
    }
    if (logits) {
        normalise(m, &m->output_norm, x, n, h);
        multiply(&m->output, h, n, logits);
    }
    free(x);
    free(h);
    free(q);
    free(o);
    free(up);
}
