/* Decoding over chosen pages against full attention, on a real text: for each share one JSON line
 * with what was read, the recall of full attention's mass there, the mean and 99th percentile KL
 * divergence of the next token's distribution in nats, the share of equal likeliest tokens, both
 * perplexities, and milliseconds per token.
 *
 * usage: bench_select MODEL.gguf TEXT [TOKENS [STEPS [BLOCK [SKIP [THREADS [NEEDLES]]]]]]
 *
 * TOKENS tokens of TEXT from token SKIP on are stored as q8_0, in blocks of BLOCK tokens encoded
 * each by itself behind the model's prefix, or, if BLOCK is 0, as one causal pass leaves them. The
 * STEPS tokens that follow in the text are then given one by one, to full attention and to each
 * share, each with its own live KV. Times: the least of three runs of the steps, without measuring
 * recall; runs of all shares alternate. With THREADS 1 they are the processor's time, which a busy
 * machine changes little.
 *
 * NEEDLES sentences, each with a number of six digits for a name, are put between the tokens of
 * TEXT at even distances, and asked for one after the other, every token of question and answer a
 * step of its own: one more line for each share has how many of the answers' tokens were the
 * likeliest, and the mean of their negative log-likelihoods in nats. */
#include "attention/plan/gate.h"
#include "attention/plan/recompute.h"
#include "tests/support/ready.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RUNS = 3 };
static const double shares[] = {1, 0.05, 0.1, 0.2, 0.4};
enum { SHARES = sizeof shares / sizeof *shares };

typedef struct bench {
    ready x;
    int32_t *ids;
    size_t n_ids, tokens, steps, block, skip, threads, needles;
    ibid_placed_block *blocks;
    size_t n_blocks;
    uint32_t next; /* position of the first step */
} bench;

static void check(ibid_err e) {
    if (!e) return;
    (void)fprintf(stderr, "bench_select: %s: %s\n", ibid_err_text(e), ibid_err_detail());
    exit(2);
}

static void *need(size_t n, size_t size) {
    void *p = ibid_calloc(n, size);
    if (!p) check(ibid_fail(IBID_NOMEM, "%zu times %zu bytes", n, size));
    return p;
}

static const char *const names[] = {
    "Alder", "Birch", "Cedar",  "Elm",    "Fir", "Hazel", "Juniper", "Laurel",  "Maple", "Oak",
    "Pine",  "Rowan", "Spruce", "Willow", "Yew", "Aspen", "Linden",  "Hemlock", "Larch", "Poplar"};
enum { NAMES = sizeof names / sizeof *names, WORDS = 128 };

/* Question i and its answer, which begins at token *split. Returns how many tokens. */
static size_t sentence(const bench *b, size_t i, int32_t *ids, size_t *split) {
    char text[WORDS];
    size_t n[2];
    /* Digits without an order: of the golden ratio's multiples. */
    unsigned number = (unsigned)((i + 1) * UINT64_C(11400714819323198485) >> 44) % 900000 + 100000;
    for (size_t k = 0; k < 2; k++) {
        ibid_token *t = NULL;
        if (k)
            (void)snprintf(text, sizeof text, " %u.\n\n", number);
        else
            (void)snprintf(text, sizeof text, "\n\nThe secret number of %s house is", names[i]);
        check(ibid_tokenize(b->x.m->tokenizer, text, strlen(text), false, &t, &n[k]));
        for (size_t j = 0; j < n[k]; j++) ids[(k ? n[0] : 0) + j] = t[j].id;
        ibid_free(t);
    }
    *split = n[0];
    return n[0] + n[1];
}

/* Puts the needles into the text's tokens from `skip` on, instead of the last ones of them. */
static void hide(bench *b) {
    int32_t *out = need(b->tokens + WORDS * NAMES, sizeof *out), *from = b->ids + b->skip;
    size_t n = 0, split;
    for (size_t i = 0, done = 0; i <= b->needles; i++) {
        size_t to = b->tokens * (i + 1) / (b->needles + 1);
        memcpy(out + n, from + done, (to - done) * sizeof *out);
        n += to - done;
        done = to;
        if (i < b->needles) n += sentence(b, i, out + n, &split);
    }
    memcpy(from, out, b->tokens * sizeof *out);
    ibid_free(out);
}

static void read_text(bench *b, const char *path) {
    enum { MOST = 4 << 20 };
    FILE *f = fopen(path, "rb");
    char *text = need(MOST, 1);
    if (!f) check(ibid_fail(IBID_IO, "%s cannot be read", path));
    size_t n = fread(text, 1, MOST, f);
    ibid_token *t = NULL;
    (void)fclose(f);
    check(ibid_tokenize(b->x.m->tokenizer, text, n, false, &t, &b->n_ids));
    b->ids = need(b->n_ids, sizeof *b->ids);
    for (size_t i = 0; i < b->n_ids; i++) b->ids[i] = t[i].id;
    ibid_free(t);
    ibid_free(text);
    if (b->skip + b->tokens + b->steps > b->n_ids)
        check(ibid_fail(IBID_INVAL, "the text has %zu tokens", b->n_ids));
    hide(b);
}

/* All as one causal pass leaves it. */
static void store_whole(bench *b) {
    ibid_seq *s = NULL;
    ibid_kv_view *layers = NULL;
    uint32_t *at = need(b->tokens, sizeof *at);
    for (size_t i = 0; i < b->tokens; i++) at[i] = (uint32_t)(b->x.prefix.n + i);
    check(ibid_seq_open(b->x.e, b->tokens, &s));
    check(ibid_seq_add_segment(s, &b->x.r.prefix));
    ibid_step step = {.seq = s, .tokens = b->ids + b->skip, .positions = at, .n = b->tokens};
    check(ibid_engine_forward(b->x.e, &step, 1, NULL));
    check(ibid_gate_store(b->x.m, s, 0, b->tokens, IBID_KV_Q8_0, &layers));
    ibid_seq_close(s);
    ibid_free(at);
    b->n_blocks = 1;
    b->blocks = need(1, sizeof *b->blocks);
    b->blocks[0] = (ibid_placed_block){.layers = layers, .local0 = b->x.prefix.n};
}

static void store_blocks(bench *b) {
    b->n_blocks = b->tokens / b->block;
    b->tokens = b->n_blocks * b->block;
    b->blocks = need(b->n_blocks, sizeof *b->blocks);
    ibid_reading *t = need(b->n_blocks, sizeof *t);
    for (size_t i = 0; i < b->n_blocks; i++)
        t[i] = (ibid_reading){.tokens = b->ids + b->skip + i * b->block, .n = b->block};
    for (size_t done = 0; done < b->n_blocks;)
        check(ibid_read_some(&b->x.r, t, b->n_blocks, &done, true, NULL, NULL));
    for (size_t i = 0; i < b->n_blocks; i++)
        b->blocks[i] = (ibid_placed_block){
            .layers = t[i].kv.layers, .local0 = b->x.prefix.n, .offset = i * b->block};
}

static ibid_seq *start(const bench *b) {
    ibid_seq *s = NULL;
    check(ibid_seq_open(b->x.e, b->steps, &s));
    check(ibid_seq_add_segment(s, &b->x.r.prefix));
    for (size_t i = 0; i < b->n_blocks; i++) {
        const ibid_placed_block *p = &b->blocks[i];
        ibid_segment g = {.layers = p->layers, .local0 = p->local0, .offset = p->offset};
        check(ibid_seq_add_segment(s, &g));
    }
    return s;
}

static double now_ms(const bench *b) {
    struct timespec t;
    if (clock_gettime(b->threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t) != 0)
        return 0;
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

typedef struct times {
    double first, other; /* ms a step; the first one makes summaries */
} times;

/* Gives all steps; logits [steps, n_vocab] or NULL. */
static times run(const bench *b, ibid_select *x, float *logits) {
    ibid_seq *s = start(b);
    float *last = need(b->x.m->n_vocab, sizeof *last);
    double begin = now_ms(b), from = 0;
    for (size_t i = 0; i < b->steps; i++) {
        uint32_t at = b->next + (uint32_t)i;
        ibid_step step = {.seq = s,
                          .tokens = b->ids + b->skip + b->tokens + i,
                          .positions = &at,
                          .n = 1,
                          .n_logits = 1,
                          .logits = logits ? logits + i * b->x.m->n_vocab : last,
                          .select = x};
        check(ibid_engine_forward(b->x.e, &step, 1, NULL));
        if (i == 0) from = now_ms(b);
    }
    times ms = {from - begin, b->steps > 1 ? (now_ms(b) - from) / (double)(b->steps - 1) : 0};
    ibid_seq_close(s);
    ibid_free(last);
    return ms;
}

static void compare(const bench *b, const float *want, const float *got, ibid_select *x,
                    double share, times ms) {
    ibid_gate_tally t = {0};
    for (size_t i = 0; i < b->steps; i++) {
        size_t next = b->skip + b->tokens + i + 1;
        check(ibid_gate_add(&t, want + i * b->x.m->n_vocab, got + i * b->x.m->n_vocab,
                            b->x.m->n_vocab, next < b->n_ids ? b->ids[next] : -1));
    }
    ibid_gate_score q = ibid_gate_score_of(&t);
    printf("{\"case\": \"select\", \"tokens\": %zu, \"block\": %zu, \"steps\": %zu, \"share\": "
           "%.2f, \"read\": %.4f, \"recall\": %.4f, \"kl_mean\": %.5f, \"kl_p99\": %.5f, "
           "\"top1\": %.4f, \"ppl_full\": %.3f, \"ppl\": %.3f, \"ms_per_token\": %.2f, "
           "\"ms_first\": %.2f}\n",
           b->tokens, b->block, b->steps, share, x->seen ? (double)x->read / (double)x->seen : 1.0,
           x->n_recall ? x->recall / (double)x->n_recall : 1.0, q.kl_mean, q.kl_p99, q.top1,
           q.ppl_ref, q.ppl_test, ms.other, ms.first);
    (void)fflush(stdout);
    ibid_gate_fini(&t);
}

/* Asks for every needle at a share. */
static void seek(const bench *b, double share) {
    float *logits = need(b->x.m->n_vocab, sizeof *logits);
    ibid_gate_tally t = {0};
    size_t right = 0, n_tokens = 0;
    for (size_t i = 0; i < b->needles; i++) {
        int32_t ids[WORDS];
        size_t split = 0, n = sentence(b, i, ids, &split);
        ibid_select x = {.share = share};
        ibid_seq *s = start(b);
        for (size_t k = 0; k + 1 < n; k++) {
            uint32_t at = b->next + (uint32_t)k;
            ibid_step step = {.seq = s,
                              .tokens = ids + k,
                              .positions = &at,
                              .n = 1,
                              .n_logits = 1,
                              .logits = logits,
                              .select = share < 1 ? &x : NULL};
            check(ibid_engine_forward(b->x.e, &step, 1, NULL));
            if (k + 1 < split) continue;
            size_t best = 0;
            for (size_t v = 1; v < b->x.m->n_vocab; v++)
                if (logits[v] > logits[best]) best = v;
            check(ibid_gate_add(&t, logits, logits, b->x.m->n_vocab, ids[k + 1]));
            right += (int32_t)best == ids[k + 1];
            n_tokens++;
        }
        ibid_seq_close(s);
    }
    printf("{\"case\": \"needles\", \"tokens\": %zu, \"block\": %zu, \"needles\": %zu, \"share\": "
           "%.2f, \"right\": %.4f, \"nats\": %.4f}\n",
           b->tokens, b->block, b->needles, share, (double)right / (double)n_tokens,
           log(ibid_gate_score_of(&t).ppl_test));
    (void)fflush(stdout);
    ibid_gate_fini(&t);
    ibid_free(logits);
}

int main(int argc, char **argv) {
    static bench b;
    times ms[SHARES];
    if (argc < 3) {
        (void)fprintf(
            stderr,
            "usage: %s MODEL.gguf TEXT [TOKENS [STEPS [BLOCK [SKIP [THREADS [NEEDLES]]]]]]\n",
            argv[0]);
        return 2;
    }
    b.tokens = argc > 3 ? strtoul(argv[3], NULL, 10) : 7800;
    b.steps = argc > 4 ? strtoul(argv[4], NULL, 10) : 64;
    b.block = argc > 5 ? strtoul(argv[5], NULL, 10) : 200;
    b.skip = argc > 6 ? strtoul(argv[6], NULL, 10) : 0;
    b.threads = argc > 7 ? strtoul(argv[7], NULL, 10) : 0;
    b.needles = argc > 8 ? strtoul(argv[8], NULL, 10) : 0;
    if (b.needles > NAMES) b.needles = NAMES;
    check(ready_open(&b.x, argv[1], &(ibid_engine_opts){.int8 = true, .n_threads = b.threads},
                     &ibid_wording_default));
    read_text(&b, argv[2]);
    if (b.block)
        store_blocks(&b);
    else
        store_whole(&b);
    b.next = (uint32_t)(b.x.prefix.n + b.tokens);
    size_t values = b.steps * b.x.m->n_vocab;
    float *want = need(values, sizeof *want), *got = need(values, sizeof *got);
    for (size_t i = 0; i < SHARES * RUNS; i++) {
        size_t k = i % SHARES;
        ibid_select x = {.share = shares[k]};
        times took = run(&b, k ? &x : NULL, NULL);
        if (i < SHARES || took.other < ms[k].other) ms[k].other = took.other;
        if (i < SHARES || took.first < ms[k].first) ms[k].first = took.first;
    }
    (void)run(&b, NULL, want);
    for (size_t k = 0; k < SHARES; k++) {
        ibid_select x = {.share = shares[k], .measure = true};
        (void)run(&b, k ? &x : NULL, got);
        compare(&b, want, got, &x, shares[k], ms[k]);
    }
    for (size_t k = 0; b.needles && k < SHARES; k++) seek(&b, shares[k]);
    return 0;
}
