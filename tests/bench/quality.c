/* Compares the engine under test with the reference engine (exact activations, f32 KV) on windows
 * of a text, and prints one JSON line: mean and 99th percentile KL divergence in nats, share of
 * equal likeliest tokens, both perplexities.
 *
 * Every window of `--window` tokens is a sequence of its own, behind BOS where the model wants it.
 * With --kv f32 all its positions are scored. With another type the engine under test reads the
 * first half of each window from stored KV of that type, and the second half is scored: a fresh
 * prefill meets no stored KV.
 *
 * --save-ref F writes the reference's logits (f32: positions x vocabulary x 4 bytes), --ref F reads
 * them again, so that a second configuration costs its own engine only. --dump-tokens F writes one
 * line per window: its token ids, then the one that follows; another engine can score the same. */
#include "attention/plan/gate.h"
#include "rpc/base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 256 }; /* rows whose logits are held at once */

typedef struct quality {
    const char *model, *text, *kernels, *save_ref, *ref, *dump;
    size_t positions, window, n_threads;
    bool int8;
    ibid_kv_type kv;
    ibid_model *m;
    ibid_engine *exact, *tested; /* exact: NULL with --ref */
    FILE *out, *in;              /* reference logits */
    int32_t *ids;                /* the text */
    size_t n_ids, from;          /* from: first scored row of a window */
    int32_t *tokens;             /* [window] of the current one */
    uint32_t *at;                /* [window] */
    float *a, *b;                /* [PIECE, n_vocab] */
} quality;

typedef struct ref_head {
    char magic[8];
    uint64_t n_vocab, window, from, positions, text_bytes;
    uint8_t model[IBID_HASH_SIZE];
} ref_head;

static void check(ibid_err e) {
    if (!e) return;
    (void)fprintf(stderr, "bench_quality: %s: %s\n", ibid_err_text(e), ibid_err_detail());
    exit(2);
}

static void *need(size_t n, size_t size) {
    void *p = ibid_calloc(n, size);
    if (!p) check(ibid_fail(IBID_NOMEM, "%zu times %zu bytes", n, size));
    return p;
}

static FILE *open_file(const char *path, const char *mode) {
    FILE *f = fopen(path, mode);
    if (!f) check(ibid_fail(IBID_IO, "cannot open %s", path));
    return f;
}

/* ---- The text and the file of reference logits ---- */

static size_t read_text(quality *q) {
    FILE *f = open_file(q->text, "rb");
    ibid_buf b;
    char piece[65536];
    ibid_buf_init(&b, (size_t)1 << 30);
    for (size_t n; (n = fread(piece, 1, sizeof piece, f)) > 0;) {
        check(ibid_buf_append(&b, piece, n));
    }
    (void)fclose(f);
    ibid_token *t = NULL;
    check(ibid_tokenize(q->m->tokenizer, b.data ? b.data : "", b.len, false, &t, &q->n_ids));
    q->ids = need(q->n_ids + 1, sizeof *q->ids);
    for (size_t i = 0; i < q->n_ids; i++) q->ids[i] = t[i].id;
    size_t bytes = b.len;
    ibid_free(t);
    ibid_buf_fini(&b);
    return bytes;
}

static void open_ref(quality *q, size_t text_bytes) {
    ref_head h, got;
    memset(&h, 0, sizeof h);
    memcpy(h.magic, "ibidref1", 8);
    h.n_vocab = q->m->n_vocab;
    h.window = q->window;
    h.from = q->from;
    h.positions = q->positions;
    h.text_bytes = text_bytes;
    memcpy(h.model, q->m->fingerprint.b, sizeof h.model);
    if (q->save_ref) {
        q->out = open_file(q->save_ref, "wb");
        if (fwrite(&h, sizeof h, 1, q->out) != 1) check(ibid_fail(IBID_IO, "%s", q->save_ref));
    }
    if (q->ref) {
        q->in = open_file(q->ref, "rb");
        if (fread(&got, sizeof got, 1, q->in) != 1 || memcmp(&got, &h, sizeof h) != 0)
            check(ibid_fail(IBID_MISMATCH, "%s is of another model, text or windows", q->ref));
    }
}

/* ---- Running ---- */

static void forward(const quality *q, ibid_engine *e, ibid_seq *s, size_t row, size_t n,
                    float *logits) {
    ibid_step step = {.seq = s,
                      .tokens = q->tokens + row,
                      .positions = q->at + row,
                      .n = n,
                      .n_logits = logits ? n : 0,
                      .logits = logits};
    check(ibid_engine_forward(e, &step, 1, NULL));
}

/* A sequence that holds rows [0, q->from) of the window; *kv is what it borrows. */
static ibid_seq *start(const quality *q, ibid_engine *e, bool stored, ibid_kv_view **kv) {
    ibid_seq *live = NULL, *s = NULL;
    check(ibid_seq_open(e, q->window, &live));
    if (q->from) forward(q, e, live, 0, q->from, NULL);
    if (!stored) return live;
    check(ibid_gate_store(q->m, live, 0, q->from, q->kv, kv));
    ibid_seq_close(live);
    check(ibid_seq_open(e, q->window - q->from, &s));
    ibid_segment g = {.layers = *kv};
    check(ibid_seq_add_segment(s, &g));
    return s;
}

/* Scores one window of which n rows from q->from on count. */
static void score(const quality *q, size_t n, int32_t last_next, ibid_gate_tally *t) {
    ibid_kv_view *kv = NULL;
    ibid_seq *x = q->exact ? start(q, q->exact, false, NULL) : NULL;
    ibid_seq *y = start(q, q->tested, q->from > 0, &kv);
    for (size_t done = 0; done < n; done += PIECE) {
        size_t row = q->from + done, rows = n - done < PIECE ? n - done : PIECE;
        size_t values = rows * q->m->n_vocab;
        if (x) forward(q, q->exact, x, row, rows, q->a);
        if (q->in && fread(q->a, sizeof *q->a, values, q->in) != values)
            check(ibid_fail(IBID_IO, "%s is cut short", q->ref));
        if (q->out && fwrite(q->a, sizeof *q->a, values, q->out) != values)
            check(ibid_fail(IBID_IO, "cannot write %s", q->save_ref));
        forward(q, q->tested, y, row, rows, q->b);
        for (size_t i = 0; i < rows; i++) {
            int32_t next = row + i + 1 < q->window ? q->tokens[row + i + 1] : last_next;
            check(ibid_gate_add(t, q->a + i * q->m->n_vocab, q->b + i * q->m->n_vocab,
                                q->m->n_vocab, next));
        }
    }
    ibid_seq_close(x);
    ibid_seq_close(y);
    ibid_free(kv);
}

static void dump_window(const quality *q, FILE *f, int32_t next) {
    for (size_t i = 0; i < q->window; i++) (void)fprintf(f, "%d ", q->tokens[i]);
    (void)fprintf(f, "%d\n", next);
}

static void run(quality *q, ibid_gate_tally *t) {
    size_t bos = ibid_tokenizer_add_bos(q->m->tokenizer) ? 1 : 0, per = q->window - bos;
    FILE *dump = q->dump ? open_file(q->dump, "w") : NULL;
    for (size_t first = 0; t->n < q->positions; first += per) {
        if (first + per > q->n_ids)
            check(ibid_fail(IBID_INVAL, "%s gives %zu positions only", q->text, t->n));
        if (bos) q->tokens[0] = ibid_tokenizer_bos(q->m->tokenizer);
        memcpy(q->tokens + bos, q->ids + first, per * sizeof *q->tokens);
        int32_t next = first + per < q->n_ids ? q->ids[first + per] : -1;
        size_t left = q->positions - t->n, rows = q->window - q->from;
        if (dump) dump_window(q, dump, next);
        score(q, left < rows ? left : rows, next, t);
        (void)fprintf(stderr, "\r%zu of %zu positions", t->n, q->positions);
    }
    (void)fprintf(stderr, "\n");
    if (dump && fclose(dump) != 0) check(ibid_fail(IBID_IO, "cannot write %s", q->dump));
}

static bool read_kv(quality *q, const char *name) {
    static const char *const names[] = {
        [IBID_KV_F32] = "f32", [IBID_KV_F16] = "f16", [IBID_KV_Q8_0] = "q8_0"};
    for (size_t i = 0; i < 3; i++) {
        if (strcmp(name, names[i]) != 0) continue;
        q->kv = (ibid_kv_type)i;
        return true;
    }
    return false;
}

static bool read_option(quality *q, const char *name, const char *value) {
    if (strcmp(name, "--positions") == 0)
        q->positions = strtoul(value, NULL, 10);
    else if (strcmp(name, "--window") == 0)
        q->window = strtoul(value, NULL, 10);
    else if (strcmp(name, "--threads") == 0)
        q->n_threads = strtoul(value, NULL, 10);
    else if (strcmp(name, "--int8") == 0)
        q->int8 = strcmp(value, "1") == 0;
    else if (strcmp(name, "--kernels") == 0)
        q->kernels = value;
    else if (strcmp(name, "--save-ref") == 0)
        q->save_ref = value;
    else if (strcmp(name, "--ref") == 0)
        q->ref = value;
    else if (strcmp(name, "--dump-tokens") == 0)
        q->dump = value;
    else
        return strcmp(name, "--kv") == 0 && read_kv(q, value);
    return true;
}

static bool read_options(quality *q, int argc, char **argv) {
    if (argc < 3 || argc % 2 == 0) return false;
    q->model = argv[1];
    q->text = argv[2];
    for (int i = 3; i < argc; i += 2) {
        if (!read_option(q, argv[i], argv[i + 1])) return false;
    }
    if (q->window < 4 || q->positions == 0 || (q->ref && q->save_ref)) return false;
    q->from = q->kv == IBID_KV_F32 ? 0 : q->window / 2;
    return true;
}

int main(int argc, char **argv) {
    quality q = {.positions = 2000, .window = 512, .kv = IBID_KV_F32};
    ibid_gate_tally t = {0};
    if (!read_options(&q, argc, argv)) {
        (void)fprintf(stderr, "usage: bench_quality MODEL.gguf TEXTFILE [--positions 2000] "
                              "[--window 512] [--int8 0|1] [--kv f32|f16|q8_0] [--kernels NAME] "
                              "[--threads N] [--save-ref F | --ref F] [--dump-tokens F]\n");
        return 2;
    }
    check(ibid_model_open(q.model, NULL, &q.m));
    if (q.window > q.m->n_ctx) check(ibid_fail(IBID_CONTEXT, "the context is %zu", q.m->n_ctx));
    ibid_engine_opts exact = {.n_threads = q.n_threads};
    ibid_engine_opts tested = {.kernels = q.kernels, .n_threads = q.n_threads, .int8 = q.int8};
    if (!q.ref) check(ibid_engine_open(q.m, &exact, &q.exact));
    check(ibid_engine_open(q.m, &tested, &q.tested));
    q.tokens = need(q.window, sizeof *q.tokens);
    q.at = need(q.window, sizeof *q.at);
    for (size_t i = 0; i < q.window; i++) q.at[i] = (uint32_t)i;
    q.a = need(PIECE * q.m->n_vocab, sizeof *q.a);
    q.b = need(PIECE * q.m->n_vocab, sizeof *q.b);
    open_ref(&q, read_text(&q));
    run(&q, &t);
    if (q.out && fclose(q.out) != 0) check(ibid_fail(IBID_IO, "cannot write %s", q.save_ref));
    if (q.in) (void)fclose(q.in);
    ibid_gate_score s = ibid_gate_score_of(&t);
    printf("{\"case\":\"quality\",\"kernels\":\"%s\",\"int8\":%s,\"kv\":\"%s\",\"window\":%zu,"
           "\"positions\":%zu,\"kl_mean\":%.3e,\"kl_p99\":%.3e,\"top1\":%.5f,"
           "\"ppl_ref\":%.5f,\"ppl\":%.5f}\n",
           q.kernels ? q.kernels : "auto", q.int8 ? "true" : "false",
           q.kv == IBID_KV_F32   ? "f32"
           : q.kv == IBID_KV_F16 ? "f16"
                                 : "q8_0",
           q.window, s.n, s.kl_mean, s.kl_p99, s.top1, s.ppl_ref, s.ppl_test);
    ibid_gate_fini(&t);
    ibid_free(q.a);
    ibid_free(q.b);
    ibid_free(q.tokens);
    ibid_free(q.at);
    ibid_free(q.ids);
    ibid_engine_close(q.exact);
    ibid_engine_close(q.tested);
    ibid_model_close(q.m);
    return 0;
}
