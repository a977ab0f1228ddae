#include "attention/plan/head.h"

#include "rpc/base/mem.h"

#include <math.h>
#include <string.h>

enum { ROWS = 256, ALIGN = 64 }; /* tokens taken through the matrices at a time */

/* ---- Maps ---- */

size_t ibid_keymap_input(const ibid_keymap *m) {
    return (size_t)m->n_inputs * m->head_dim;
}

size_t ibid_keymap_dim(const ibid_keymap *m) {
    return m ? (size_t)m->n_raw * m->head_dim + m->out : 0;
}

size_t ibid_keymap_layers(const ibid_keymap *m) {
    size_t last = 0;
    for (size_t i = 0; i < m->n_inputs; i++)
        last = m->inputs[i].layer + 1 > last ? m->inputs[i].layer + 1 : last;
    return last;
}

static bool sizes_ok(const ibid_keymap *s) {
    size_t dim = ibid_keymap_dim(s);
    return s->head_dim > 0 && s->head_dim <= IBID_HEAD_DIM_MAX && s->n_inputs > 0 &&
           s->n_inputs <= IBID_INPUTS_MAX && ibid_keymap_input(s) <= IBID_INPUT_MAX &&
           s->n_raw <= IBID_RAW_MAX && s->out <= IBID_OUT_MAX && s->hidden <= IBID_HIDDEN_MAX &&
           s->out % 32 == 0 && s->hidden % 32 == 0 && (s->out || !s->hidden) && dim > 0 &&
           dim <= IBID_KEY_DIM_MAX && dim % 32 == 0;
}

static void *carve(unsigned char **at, size_t n, size_t each) {
    void *p = *at;
    *at += ibid_align_up(n * each, ALIGN);
    return n ? p : NULL;
}

ibid_err ibid_keymap_open(const ibid_keymap *sizes, ibid_keymap **out) {
    if (!sizes_ok(sizes))
        return ibid_fail(IBID_INVAL,
                         "no retrieval head has %u inputs of %u, %u raw parts, %u and %u rows",
                         sizes->n_inputs, sizes->head_dim, sizes->n_raw, sizes->out, sizes->hidden);
    size_t d = ibid_keymap_input(sizes), n = sizes->out, h = sizes->hidden;
    size_t floats[] = {d, sizes->has_gain ? d : 0, sizes->has_question_mean ? d : 0, n, h};
    size_t halves[] = {n * d, h * d, n * h};
    size_t bytes = ibid_align_up(sizeof **out, ALIGN);
    for (size_t i = 0; i < 5; i++) bytes += ibid_align_up(floats[i] * sizeof(float), ALIGN);
    for (size_t i = 0; i < 3; i++) bytes += ibid_align_up(halves[i] * sizeof(uint16_t), ALIGN);
    unsigned char *memory = ibid_alloc_aligned(ALIGN, bytes);
    if (!memory) return ibid_fail(IBID_NOMEM, "no memory for a retrieval head");
    memset(memory, 0, bytes);
    ibid_keymap *m = (ibid_keymap *)(void *)memory;
    *m = *sizes;
    unsigned char *at = memory + ibid_align_up(sizeof *m, ALIGN);
    m->mean = carve(&at, floats[0], sizeof(float));
    m->gain = carve(&at, floats[1], sizeof(float));
    m->question_mean = carve(&at, floats[2], sizeof(float));
    m->b0 = carve(&at, floats[3], sizeof(float));
    m->b1 = carve(&at, floats[4], sizeof(float));
    m->w0 = carve(&at, halves[0], sizeof(uint16_t));
    m->w1 = carve(&at, halves[1], sizeof(uint16_t));
    m->w2 = carve(&at, halves[2], sizeof(uint16_t));
    *out = m;
    return IBID_OK;
}

void ibid_keymap_close(ibid_keymap *m) {
    ibid_free(m);
}

ibid_err ibid_keymap_open_raw(const ibid_head *heads, size_t n, size_t head_dim,
                              ibid_keymap **out) {
    ibid_keymap s = {.head_dim = (uint32_t)head_dim, .n_inputs = (uint32_t)n, .n_raw = (uint32_t)n};
    if (n > IBID_RAW_MAX) return ibid_fail(IBID_INVAL, "a retrieval head of %zu raw parts", n);
    for (size_t i = 0; i < n; i++) {
        s.inputs[i] = heads[i];
        s.raw[i] = (uint32_t)i;
        s.raw_weight[i] = 1;
    }
    ibid_err e = ibid_keymap_open(&s, out);
    if (!e) (void)ibid_keymap_settle(*out);
    return e;
}

static void copy(void *to, const void *from, size_t bytes) {
    if (bytes) memcpy(to, from, bytes);
}

ibid_err ibid_keymap_copy(const ibid_keymap *m, ibid_keymap **out) {
    size_t d = ibid_keymap_input(m), f = sizeof(float), h = sizeof(uint16_t);
    ibid_keymap *c = NULL;
    ibid_err e = ibid_keymap_open(m, &c);
    if (e) return e;
    copy(c->mean, m->mean, d * f);
    copy(c->gain, m->gain, m->has_gain ? d * f : 0);
    copy(c->question_mean, m->question_mean, m->has_question_mean ? d * f : 0);
    copy(c->b0, m->b0, m->out * f);
    copy(c->b1, m->b1, m->hidden * f);
    copy(c->w0, m->w0, m->out * d * h);
    copy(c->w1, m->w1, m->hidden * d * h);
    copy(c->w2, m->w2, (size_t)m->out * m->hidden * h);
    *out = c;
    return IBID_OK;
}

static bool all_finite(const float *x, size_t n) {
    bool good = true;
    for (size_t i = 0; x && i < n; i++) good = good && isfinite(x[i]);
    return good;
}

static bool halves_finite(const uint16_t *x, size_t n) {
    bool good = true;
    for (size_t i = 0; x && i < n; i++) good = good && (x[i] & 0x7C00) != 0x7C00;
    return good;
}

static bool settle_weights(ibid_keymap *m) {
    double sum = m->out ? (double)m->out_weight * (double)m->out_weight : 0;
    for (size_t i = 0; i < m->n_raw; i++) {
        if (m->raw[i] >= m->n_inputs || !(m->raw_weight[i] >= 0)) return false;
        sum += (double)m->raw_weight[i] * (double)m->raw_weight[i];
    }
    if ((m->out && !(m->out_weight >= 0)) || !isfinite(sum) || !(sum > 1e-12)) return false;
    /* Weights that are right to a float's precision stay, so that a stored map keeps its bytes. */
    if (fabs(sum - 1) < 1e-6) return true;
    for (size_t i = 0; i < m->n_raw; i++) m->raw_weight[i] = (float)(m->raw_weight[i] / sqrt(sum));
    if (m->out) m->out_weight = (float)(m->out_weight / sqrt(sum));
    return true;
}

bool ibid_keymap_settle(ibid_keymap *m) {
    size_t d = ibid_keymap_input(m);
    for (size_t i = 0; i < m->n_inputs; i++)
        if (m->inputs[i].layer > UINT16_MAX || m->inputs[i].kv_head > UINT16_MAX) return false;
    return all_finite(m->mean, d) && all_finite(m->gain, d) && all_finite(m->question_mean, d) &&
           all_finite(m->b0, m->out) && all_finite(m->b1, m->hidden) &&
           halves_finite(m->w0, m->out * d) && halves_finite(m->w1, m->hidden * d) &&
           halves_finite(m->w2, (size_t)m->out * m->hidden) && settle_weights(m);
}

/* ---- Token keys ---- */

static double length_of(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

void ibid_keymap_inputs(const ibid_keymap *m, bool question, const float *raw, size_t n, float *x) {
    size_t d = m->head_dim, dim = ibid_keymap_input(m);
    const float *mean = question && m->question_mean ? m->question_mean : m->mean;
    for (size_t t = 0; t < n; t++) {
        const float *r = raw + t * dim;
        float *y = x + t * dim;
        for (size_t i = 0; i < dim; i++) y[i] = r[i] - mean[i];
        for (size_t i = 0; m->gain && i < dim; i++) y[i] *= m->gain[i];
        for (size_t h = 0; m->norm && h < m->n_inputs; h++) {
            double len = length_of(y + h * d, d);
            float by = len > 0 ? (float)(1 / len) : 0;
            for (size_t i = h * d; i < (h + 1) * d; i++) y[i] *= by;
        }
    }
}

void ibid_gelu(float *z, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float u = 0.7978845608f * (z[i] + 0.044715f * z[i] * z[i] * z[i]);
        z[i] = 0.5f * z[i] * (1 + tanhf(u));
    }
}

/* One part of a token key. */
static void put_part(const float *x, size_t n, float weight, int8_t *out) {
    double len = length_of(x, n);
    /* A length that overflowed or that comes of weights gone wild has no direction. */
    float scale = len > 0 && isfinite(len) ? 127.0f * weight / (float)len : 0;
    if (!(scale > 0) || !isfinite(scale)) {
        memset(out, 0, n);
        return;
    }
    for (size_t i = 0; i < n; i++) out[i] = (int8_t)lrintf(x[i] * scale);
}

typedef struct work {
    float *x, *hidden, *y, *more; /* [ROWS, D], [ROWS, hidden], [ROWS, out] twice */
    void *scratch;
    unsigned char *memory;
} work;

static ibid_err work_open(const ibid_keymap *m, const ibid_kernels *k, size_t rows, work *w) {
    size_t d = ibid_keymap_input(m), widest = d > m->hidden ? d : m->hidden;
    size_t scratch = m->out ? k->matmul_scratch(widest, rows) : 0;
    size_t floats = rows * (d + m->hidden + 2 * (size_t)m->out);
    w->memory = ibid_alloc_aligned(ALIGN, ibid_align_up(scratch, ALIGN) + floats * sizeof(float));
    if (!w->memory) return ibid_fail(IBID_NOMEM, "no memory for %zu token keys", rows);
    w->scratch = w->memory;
    w->x = (float *)(void *)(w->memory + ibid_align_up(scratch, ALIGN));
    w->hidden = w->x + rows * d;
    w->y = w->hidden + rows * m->hidden;
    w->more = w->y + rows * m->out;
    return IBID_OK;
}

static void add_bias(float *y, const float *b, size_t n, size_t dim) {
    for (size_t t = 0; t < n; t++)
        for (size_t i = 0; i < dim; i++) y[t * dim + i] += b[i];
}

static ibid_tensor half_matrix(const uint16_t *w, size_t rows, size_t cols) {
    return (ibid_tensor){IBID_F16, rows, cols, cols * sizeof *w, w};
}

/* w->y from w->x. */
static void project(const ibid_keymap *m, const ibid_kernels *k, size_t n, work *w) {
    size_t d = ibid_keymap_input(m), h = m->hidden, out = m->out;
    ibid_tensor w0 = half_matrix(m->w0, out, d);
    k->matmul(&w0, 0, out, w->x, d, n, w->y, out, w->scratch);
    add_bias(w->y, m->b0, n, out);
    if (!h) return;
    ibid_tensor w1 = half_matrix(m->w1, h, d), w2 = half_matrix(m->w2, out, h);
    k->matmul(&w1, 0, h, w->x, d, n, w->hidden, h, w->scratch);
    add_bias(w->hidden, m->b1, n, h);
    ibid_gelu(w->hidden, n * h);
    k->matmul(&w2, 0, out, w->hidden, h, n, w->more, out, w->scratch);
    k->add(w->y, w->more, n * out);
}

ibid_err ibid_token_keys(const ibid_keymap *m, const ibid_kernels *kernels, bool question,
                         const float *raw, size_t n, int8_t *out) {
    size_t d = m->head_dim, dim = ibid_keymap_input(m), key = ibid_keymap_dim(m);
    size_t rows = n < ROWS ? n : ROWS;
    work w = {.memory = NULL};
    if (!n) return IBID_OK;
    ibid_err e = kernels ? IBID_OK : ibid_kernels_get(NULL, &kernels);
    if (!e) e = work_open(m, kernels, rows, &w);
    for (size_t first = 0; !e && first < n; first += rows) {
        size_t count = n - first < rows ? n - first : rows;
        ibid_keymap_inputs(m, question, raw + first * dim, count, w.x);
        if (m->out) project(m, kernels, count, &w);
        for (size_t t = 0; t < count; t++) {
            int8_t *y = out + (first + t) * key;
            for (size_t p = 0; p < m->n_raw; p++, y += d)
                put_part(w.x + t * dim + m->raw[p] * d, d, m->raw_weight[p], y);
            if (m->out) put_part(w.y + t * m->out, m->out, m->out_weight, y);
        }
    }
    ibid_free(w.memory);
    return e;
}
