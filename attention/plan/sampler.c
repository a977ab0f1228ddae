#include "attention/plan/sampler.h"

#include "rpc/base/mem.h"

#include <math.h>

typedef struct candidate {
    double weight;
    int32_t token;
} candidate;

struct ibid_sampler {
    size_t n_vocab;
    double temperature, top_p;
    uint64_t state, step;  /* PCG32: the step is odd and names the stream */
    candidate *candidates; /* [n_vocab], NULL if greedy */
};

static uint32_t next_random(ibid_sampler *s) {
    uint64_t old = s->state;
    s->state = old * UINT64_C(6364136223846793005) + s->step;
    uint32_t x = (uint32_t)(((old >> 18) ^ old) >> 27);
    uint32_t turn = (uint32_t)(old >> 59);
    return x >> turn | x << (-turn & 31);
}

/* In [0, 1), 53 bits. */
static double next_unit(ibid_sampler *s) {
    uint64_t high = next_random(s), low = next_random(s);
    return (double)((high << 32 | low) >> 11) * 0x1p-53;
}

double ibid_sampler_unit(ibid_sampler *s) {
    return next_unit(s);
}

ibid_err ibid_sampler_open(size_t n_vocab, double temperature, double top_p, uint64_t seed,
                           ibid_sampler **out) {
    ibid_sampler *s = NULL;
    if (!(temperature >= 0 && temperature <= 1e6))
        return ibid_fail(IBID_INVAL, "temperature is %g; 0 is greedy, 1 is plain", temperature);
    if (!(top_p >= 0 && top_p <= 1)) return ibid_fail(IBID_INVAL, "top_p is %g, not 0..1", top_p);
    if (n_vocab == 0 || n_vocab > INT32_MAX)
        return ibid_fail(IBID_INVAL, "a vocabulary of %zu tokens", n_vocab);
    s = ibid_calloc(1, sizeof *s);
    if (s && temperature > 0) s->candidates = ibid_calloc(n_vocab, sizeof *s->candidates);
    if (!s || (temperature > 0 && !s->candidates)) {
        ibid_sampler_close(s);
        return ibid_fail(IBID_NOMEM, "no memory to sample from %zu tokens", n_vocab);
    }
    s->n_vocab = n_vocab;
    s->temperature = temperature;
    s->top_p = top_p > 0 ? top_p : 1;
    s->step = UINT64_C(1442695040888963407); /* the reference implementation's default stream */
    (void)next_random(s);
    s->state += seed;
    (void)next_random(s);
    *out = s;
    return IBID_OK;
}

void ibid_sampler_close(ibid_sampler *s) {
    if (!s) return;
    ibid_free(s->candidates);
    ibid_free(s);
}

/* The heaviest, lowest id first among equals; n if there is none. */
static size_t argmax(const float *logits, size_t n) {
    size_t best = n;
    for (size_t i = 0; i < n; i++) {
        if (logits[i] > (best < n ? logits[best] : -INFINITY)) best = i;
    }
    return best;
}

static bool heavier(const candidate *a, const candidate *b) {
    return a->weight != b->weight ? a->weight > b->weight : a->token < b->token;
}

/* Lets c[i] sink until no candidate below it in the heap of n is heavier. */
static void sink(candidate *c, size_t i, size_t n) {
    candidate x = c[i];
    for (size_t k; (k = 2 * i + 1) < n; i = k) {
        if (k + 1 < n && heavier(&c[k + 1], &c[k])) k++;
        if (!heavier(&c[k], &x)) break;
        c[i] = c[k];
    }
    c[i] = x;
}

/* The heaviest candidates, one or more, that together weigh at least `enough`, the heaviest last,
 * at the end of c; *kept what they weigh. Returns how many. A heap, for they are few among many,
 * and because qsort may allocate. */
static size_t heaviest(candidate *c, size_t n, double enough, double *kept) {
    size_t left = n;
    *kept = 0;
    for (size_t i = n / 2; i-- > 0;) sink(c, i, n);
    while (left && (left == n || *kept < enough)) {
        candidate top = c[0];
        *kept += top.weight;
        c[0] = c[--left];
        c[left] = top;
        sink(c, 0, left);
    }
    return n - left;
}

/* Weights of all tokens; returns how many may be in the nucleus, moved to the front. A token whose
 * share is below (1 - top_p) / n_vocab cannot be: all such together weigh less than 1 - top_p. */
static size_t weigh(ibid_sampler *s, const float *logits, double max, double *total) {
    candidate *c = s->candidates;
    size_t n = 0;
    *total = 0;
    for (size_t i = 0; i < s->n_vocab; i++) {
        double w = logits[i] > -INFINITY ? exp(((double)logits[i] - max) / s->temperature) : 0;
        c[i] = (candidate){w, (int32_t)i};
        *total += w;
    }
    double least = (1 - s->top_p) / (double)s->n_vocab * *total;
    for (size_t i = 0; i < s->n_vocab; i++) {
        if (c[i].weight > 0 && c[i].weight >= least) c[n++] = c[i];
    }
    return n;
}

ibid_err ibid_sampler_pick(ibid_sampler *s, const float *logits, int32_t *token) {
    size_t best = argmax(logits, s->n_vocab), n, i;
    double total, kept;
    if (best == s->n_vocab) return ibid_fail(IBID_INVAL, "no logit is above -infinity");
    *token = (int32_t)best;
    if (s->temperature == 0 || !(logits[best] < INFINITY)) return IBID_OK;
    n = weigh(s, logits, (double)logits[best], &total);
    candidate *c = s->candidates;
    double at;
    if (s->top_p < 1) {
        size_t end = n; /* the heaviest stands last */
        n = heaviest(c, n, s->top_p * total, &kept);
        at = next_unit(s) * kept;
        for (i = end - 1; i > end - n && at >= c[i].weight; i--) at -= c[i].weight;
    } else {
        at = next_unit(s) * total;
        for (i = 0; i + 1 < n && at >= c[i].weight; i++) at -= c[i].weight;
    }
    *token = c[i].token;
    return IBID_OK;
}
