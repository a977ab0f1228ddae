#include "attention/plan/gate.h"

#include "rpc/base/mem.h"

#include <math.h>
#include <stdlib.h>

/* One position's logits in a form to compare: where the largest is, and log sum exp. */
typedef struct summary {
    size_t top;
    double lse; /* NAN if a logit is not a number */
} summary;

static summary summarise(const float *x, size_t n) {
    summary s = {0};
    double sum = 0;
    for (size_t i = 1; i < n; i++) {
        if (x[i] > x[s.top]) s.top = i;
    }
    for (size_t i = 0; i < n; i++) sum += exp((double)x[i] - (double)x[s.top]);
    s.lse = (double)x[s.top] + log(sum);
    return s;
}

static double divergence(const float *ref, const float *test, size_t n, double lse_ref,
                         double lse_test) {
    double kl = 0;
    for (size_t i = 0; i < n; i++) {
        double p = (double)ref[i] - lse_ref, q = (double)test[i] - lse_test;
        kl += exp(p) * (p - q);
    }
    /* Rounding may leave a little less than the nothing it is; a NaN is as far apart as can be. */
    if (!(kl < INFINITY)) return INFINITY;
    return kl > 0 ? kl : 0;
}

ibid_err ibid_gate_add(ibid_gate_tally *t, const float *ref, const float *test, size_t n_vocab,
                       int32_t next) {
    if (t->n == t->room) {
        size_t room = t->room ? 2 * t->room : 1024;
        double *kl = ibid_realloc(t->kl, room * sizeof *kl);
        if (!kl) return ibid_fail(IBID_NOMEM, "no memory to compare %zu positions", room);
        t->kl = kl;
        t->room = room;
    }
    summary a = summarise(ref, n_vocab), b = summarise(test, n_vocab);
    t->kl[t->n++] = divergence(ref, test, n_vocab, a.lse, b.lse);
    t->same += a.top == b.top;
    if (next >= 0 && (size_t)next < n_vocab) {
        t->nll_ref += a.lse - (double)ref[next];
        t->nll_test += b.lse - (double)test[next];
        t->n_known++;
    }
    return IBID_OK;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

ibid_gate_score ibid_gate_score_of(ibid_gate_tally *t) {
    ibid_gate_score s = {.n = t->n};
    if (t->n == 0) return s;
    qsort(t->kl, t->n, sizeof *t->kl, by_value);
    for (size_t i = 0; i < t->n; i++) s.kl_mean += t->kl[i] / (double)t->n;
    s.kl_p99 = t->kl[(t->n - 1) * 99 / 100];
    s.top1 = (double)t->same / (double)t->n;
    if (t->n_known) {
        s.ppl_ref = exp(t->nll_ref / (double)t->n_known);
        s.ppl_test = exp(t->nll_test / (double)t->n_known);
    }
    return s;
}

void ibid_gate_fini(ibid_gate_tally *t) {
    ibid_free(t->kl);
    *t = (ibid_gate_tally){0};
}

ibid_err ibid_gate_store(const ibid_model *m, const ibid_seq *s, size_t row0, size_t n,
                         ibid_kv_type type, ibid_kv_view **out) {
    static const size_t width[] = {[IBID_KV_F32] = 4, [IBID_KV_F16] = 2, [IBID_KV_Q8_0] = 1};
    size_t values = n * m->n_kv_heads * m->head_dim, bytes;
    size_t plane = ibid_align_up(values * width[type], 64);
    size_t scales = type == IBID_KV_Q8_0 ? ibid_align_up(values / 32 * 2, 64) : 0;
    size_t head = ibid_align_up(m->n_layers * sizeof(ibid_kv_view), 64);
    if (!ibid_mul_size(m->n_layers, 2 * (plane + scales), &bytes) ||
        !ibid_add_size(head, bytes, &bytes))
        return ibid_fail(IBID_NOMEM, "the KV of %zu tokens is too large", n);
    uint8_t *base = ibid_alloc_aligned(64, bytes), *p = base + head;
    if (!base) return ibid_fail(IBID_NOMEM, "no memory for the KV of %zu tokens", n);
    ibid_kv_view *views = (ibid_kv_view *)(void *)base;
    ibid_err err = IBID_OK;
    for (size_t l = 0; l < m->n_layers && !err; l++, p += 2 * (plane + scales)) {
        ibid_kv_view *v = &views[l];
        *v = (ibid_kv_view){type, n, m->n_kv_heads, m->head_dim, p, p + plane, NULL, NULL};
        if (scales) {
            v->k_scale = (const uint16_t *)(void *)(p + 2 * plane);
            v->v_scale = (const uint16_t *)(void *)(p + 2 * plane + scales);
        }
        err = ibid_seq_export(s, l, row0, n, 0, v);
    }
    if (err)
        ibid_free(base);
    else
        *out = views;
    return err;
}
