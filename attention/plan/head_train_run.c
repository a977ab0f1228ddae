#include "attention/plan/head_train_run.h"

#include "rpc/base/clock.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { SLICE = 100 * 1024, CHUNKS_LEAST = 128, OUT = 64, HIDDEN = 256 };

/* ---- Texts ---- */

/* Where a slice of the text ends: after a paragraph, or a line, or anywhere. */
static size_t slice_end(ibid_str text, size_t from) {
    if (text.n - from <= SLICE) return text.n;
    for (size_t i = from + SLICE; i > from + SLICE / 2; i--)
        if (text.s[i - 1] == '\n' && text.s[i - 2] == '\n') return i;
    for (size_t i = from + SLICE; i > from + SLICE / 2; i--)
        if (text.s[i - 1] == '\n' || text.s[i - 1] == ' ') return i;
    return from + SLICE;
}

void ibid_train_texts_close(ibid_train_texts *t) {
    for (size_t i = 0; i < t->n_samples; i++) ibid_cal_sample_close(&t->samples[i]);
    ibid_free(t->samples);
    ibid_free(t->chunks);
    ibid_free(t->questions);
    memset(t, 0, sizeof *t);
}

static ibid_err join(ibid_train_texts *t) {
    size_t chunks = 0, questions = 0;
    for (size_t i = 0; i < t->n_samples; i++) {
        chunks += t->samples[i].set.n_chunks;
        questions += t->samples[i].set.n_questions;
    }
    t->chunks = ibid_calloc(chunks + 1, sizeof *t->chunks);
    t->questions = ibid_calloc(questions + 1, sizeof *t->questions);
    if (!t->chunks || !t->questions) return ibid_fail(IBID_NOMEM, "no memory for a text");
    for (size_t i = 0; i < t->n_samples; i++) {
        const ibid_cal_set *s = &t->samples[i].set;
        for (size_t q = 0; q < s->n_questions; q++) {
            t->questions[t->n_questions] = s->questions[q];
            t->questions[t->n_questions++].chunk += t->n_chunks;
        }
        for (size_t c = 0; c < s->n_chunks; c++) t->chunks[t->n_chunks++] = s->chunks[c];
    }
    return IBID_OK;
}

ibid_err ibid_train_texts_open(const ibid_model *m, ibid_str text, ibid_train_texts *out) {
    ibid_train_texts t = {NULL, 0, NULL, 0, NULL, 0};
    if (text.n > IBID_TRAIN_TEXT_MAX)
        return ibid_fail(IBID_TOOBIG, "%zu bytes of text to train on; at most %d", text.n,
                         IBID_TRAIN_TEXT_MAX);
    t.samples = ibid_calloc(text.n / (SLICE / 2) + 2, sizeof *t.samples);
    ibid_err e = t.samples ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for a text");
    for (size_t at = 0; !e && at < text.n;) {
        size_t end = slice_end(text, at);
        e = ibid_cal_sample_open(m, (ibid_str){text.s + at, end - at}, &t.samples[t.n_samples]);
        if (!e) t.n_samples++;
        at = end;
    }
    if (!e) e = join(&t);
    if (!e && t.n_chunks < CHUNKS_LEAST)
        e = ibid_fail(IBID_INVAL, "the text gives %zu chunks; %d are needed to train on: use more",
                      t.n_chunks, CHUNKS_LEAST);
    if (e)
        ibid_train_texts_close(&t);
    else
        *out = t;
    return e;
}

/* Bytes of tokens as a JSON string; what is no UTF-8 by then is the reader's affair. */
static ibid_err put_text(const ibid_model *m, const int32_t *tokens, size_t n, ibid_buf *out) {
    ibid_err e = ibid_buf_puts(out, "\"text\": \"");
    for (size_t i = 0; !e && i < n; i++) {
        size_t size = 0;
        const char *s = ibid_token_bytes(m->tokenizer, tokens[i], &size);
        for (size_t k = 0; !e && k < size; k++) {
            unsigned char c = (unsigned char)s[k];
            if (c < 0x20 || c == '"' || c == '\\')
                e = ibid_buf_printf(out, "\\u%04x", c);
            else
                e = ibid_buf_append(out, s + k, 1);
        }
    }
    return e ? e : ibid_buf_puts(out, "\"}\n");
}

ibid_err ibid_train_texts_write(const ibid_model *m, const ibid_train_texts *t, ibid_buf *out) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < t->n_chunks; i++) {
        e = ibid_buf_printf(out, "{\"chunk\": %zu, ", i);
        if (!e) e = put_text(m, t->chunks[i].tokens, t->chunks[i].n, out);
    }
    for (size_t i = 0; !e && i < t->n_questions; i++) {
        const ibid_cal_question *q = &t->questions[i];
        e = ibid_buf_printf(out, "{\"question\": %zu, \"chunk\": %zu, ", i, q->chunk);
        if (!e) e = put_text(m, q->tokens, q->n, out);
    }
    return e;
}

/* ---- Keys ---- */

typedef struct bank {
    const ibid_train_texts *texts;
    const ibid_kernels *k;
    ibid_train_chunk *chunks;       /* [n_chunks] */
    ibid_train_question *questions; /* [n_questions] */
    uint16_t *rows;                 /* [n_rows, D] */
    float *weight;                  /* [n_rows] */
    size_t n_rows, d;
} bank;

static void bank_fini(bank *b) {
    ibid_free(b->chunks);
    ibid_free(b->questions);
    ibid_free(b->rows);
    ibid_free(b->weight);
}

static ibid_err take_rows(const bank *b, const ibid_seq *s, const ibid_keymap *map, size_t row0,
                          size_t n, float *one) {
    size_t d = map->head_dim;
    ibid_err e = IBID_OK;
    for (size_t h = 0; !e && h < map->n_inputs; h++) {
        e = ibid_seq_raw_keys(s, map->inputs[h].layer, map->inputs[h].kv_head, 0, n, one);
        for (size_t i = 0; !e && i < n; i++)
            b->k->kv_pack(IBID_KV_F16, one + i * d, d, b->rows + (row0 + i) * b->d + h * d, NULL);
    }
    return e;
}

/* Keys of texts that lie one after the other from row0 on. */
static ibid_err read_rows(const bank *b, const ibid_reader *r, const ibid_keymap *map,
                          const ibid_reading *t, size_t n, size_t row0, const atomic_bool *cancel) {
    ibid_seq *seqs[IBID_ENCODE_STEP];
    size_t longest = 1;
    for (size_t i = 0; i < n; i++) longest = t[i].n > longest ? t[i].n : longest;
    float *one = ibid_alloc(longest * map->head_dim * sizeof *one);
    ibid_err e = one ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for keys");
    for (size_t i = 0; !e && i < n;) {
        size_t count = 0, rows = 0;
        while (i + count < n && count < IBID_ENCODE_STEP &&
               (count == 0 || rows + t[i + count].n <= IBID_ENCODE_STEP))
            rows += t[i + count++].n;
        if ((e = ibidi_read_batch(r, t + i, count, ibid_keymap_layers(map), cancel, seqs))) break;
        for (size_t k = 0; k < count; row0 += t[i + k++].n) {
            if (!e) e = take_rows(b, seqs[k], map, row0, t[i + k].n, one);
            ibid_seq_close(seqs[k]);
        }
        i += count;
    }
    ibid_free(one);
    return e;
}

/* IDF over the chunks, as the retriever weighs a question's tokens. */
static ibid_err set_weights(bank *b, size_t n_vocab) {
    const ibid_train_texts *t = b->texts;
    uint32_t *df = ibid_calloc(n_vocab, sizeof *df), *last = ibid_calloc(n_vocab, sizeof *last);
    ibid_err e = df && last ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for IDF");
    for (size_t c = 0; !e && c < t->n_chunks; c++)
        for (size_t i = 0; i < t->chunks[c].n; i++) {
            size_t id = (size_t)t->chunks[c].tokens[i];
            if (last[id] == c + 1) continue;
            last[id] = (uint32_t)(c + 1);
            df[id]++;
        }
    for (size_t q = 0; !e && q < t->n_questions; q++)
        for (size_t i = 0; i < t->questions[q].n; i++) {
            double of = df[t->questions[q].tokens[i]], n = (double)t->n_chunks;
            b->weight[b->questions[q].row0 + i] = (float)log((n - of + 0.5) / (of + 0.5) + 1);
        }
    ibid_free(df);
    ibid_free(last);
    return e;
}

static ibid_err bank_open(const ibid_reader *r, const ibid_train_texts *t, const ibid_keymap *map,
                          const atomic_bool *cancel, bank *b) {
    size_t bytes, asked;
    *b = (bank){.texts = t, .d = ibid_keymap_input(map)};
    ibid_reading *questions = ibid_calloc(t->n_questions + 1, sizeof *questions);
    b->chunks = ibid_calloc(t->n_chunks + 1, sizeof *b->chunks);
    b->questions = ibid_calloc(t->n_questions + 1, sizeof *b->questions);
    ibid_err e = questions && b->chunks && b->questions ? ibid_kernels_get(NULL, &b->k)
                                                        : ibid_fail(IBID_NOMEM, "out of memory");
    if (e) goto done;
    for (size_t c = 0; c < t->n_chunks; c++) {
        b->chunks[c] = (ibid_train_chunk){b->n_rows, t->chunks[c].n};
        b->n_rows += t->chunks[c].n;
    }
    asked = b->n_rows;
    for (size_t q = 0; q < t->n_questions; q++) {
        const ibid_cal_question *s = &t->questions[q];
        b->questions[q] = (ibid_train_question){b->n_rows, s->n, s->chunk, s->mask0, s->mask1};
        questions[q] = (ibid_reading){.tokens = s->tokens, .n = s->n};
        b->n_rows += s->n;
    }
    b->weight = ibid_calloc(b->n_rows + 1, sizeof *b->weight);
    if (ibid_mul_size(b->n_rows, b->d * sizeof *b->rows, &bytes)) b->rows = ibid_alloc(bytes);
    if (!b->weight || !b->rows) {
        e = ibid_fail(IBID_NOMEM, "no memory for the keys of %zu tokens; use less text", b->n_rows);
        goto done;
    }
    e = read_rows(b, r, map, t->chunks, t->n_chunks, 0, cancel);
    if (!e) e = read_rows(b, r, map, questions, t->n_questions, asked, cancel);
    if (!e) e = set_weights(b, r->model->n_vocab);
done:
    ibid_free(questions);
    return e;
}

/* Mean and 1 / deviation of each channel over the chunks' rows. */
static ibid_err standardise(const bank *b, ibid_keymap *map) {
    size_t n = b->texts->n_chunks ? b->questions[0].row0 : 0;
    double *sum = ibid_calloc(2 * b->d, sizeof *sum), *square = sum ? sum + b->d : NULL;
    float *x = ibid_alloc(b->d * sizeof *x);
    ibid_err e = sum && x && n ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory");
    for (size_t t = 0; !e && t < n; t++) {
        b->k->kv_unpack(IBID_KV_F16, b->rows + t * b->d, NULL, b->d, x);
        for (size_t i = 0; i < b->d; i++) {
            sum[i] += (double)x[i];
            square[i] += (double)x[i] * (double)x[i];
        }
    }
    for (size_t i = 0; !e && i < b->d; i++) {
        double mean = sum[i] / (double)n, variance = square[i] / (double)n - mean * mean;
        map->mean[i] = (float)mean;
        map->gain[i] = variance > 1e-10 ? (float)(1 / sqrt(variance)) : 1;
    }
    ibid_free(sum);
    ibid_free(x);
    return e;
}

/* ---- Held out ---- */

static bool held_out(size_t chunk) {
    return chunk / 2 % 6 == 5;
}

typedef struct keys {
    int8_t *of; /* [n_rows, dim]; those of texts that are not held out are not made */
    size_t dim;
} keys;

static ibid_err make_keys(const bank *b, const ibid_keymap *map, size_t row0, size_t n,
                          bool question, float *raw, keys *k) {
    for (size_t i = 0; i < n; i++)
        b->k->kv_unpack(IBID_KV_F16, b->rows + (row0 + i) * b->d, NULL, b->d, raw + i * b->d);
    return ibid_token_keys(map, b->k, question, raw, n, k->of + row0 * k->dim);
}

static ibid_err keys_open(const bank *b, const ibid_keymap *map, keys *k) {
    const ibid_train_texts *t = b->texts;
    size_t longest = 1;
    for (size_t c = 0; c < t->n_chunks; c++)
        longest = b->chunks[c].n > longest ? b->chunks[c].n : longest;
    for (size_t q = 0; q < t->n_questions; q++)
        longest = b->questions[q].n > longest ? b->questions[q].n : longest;
    k->dim = ibid_keymap_dim(map);
    k->of = ibid_alloc(b->n_rows * k->dim + 1);
    float *raw = ibid_alloc(longest * b->d * sizeof *raw);
    ibid_err e = k->of && raw ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for token keys");
    for (size_t c = 0; !e && c < t->n_chunks; c++)
        if (held_out(c)) e = make_keys(b, map, b->chunks[c].row0, b->chunks[c].n, false, raw, k);
    for (size_t q = 0; !e && q < t->n_questions; q++)
        if (held_out(b->questions[q].chunk))
            e = make_keys(b, map, b->questions[q].row0, b->questions[q].n, true, raw, k);
    ibid_free(raw);
    return e;
}

static double maxsim(const bank *b, const keys *k, const ibid_train_question *q, size_t row0,
                     size_t n, int32_t *best) {
    double sum = 0;
    for (size_t i = 0; i < q->n; i++) best[i] = INT32_MIN;
    if (!n) return -1e30;
    b->k->maxsim_i8(k->of + q->row0 * k->dim, q->n, k->of + row0 * k->dim, n, k->dim, best, NULL);
    for (size_t i = 0; i < q->n; i++) sum += (double)b->weight[q->row0 + i] * (double)best[i];
    return sum;
}

/* The right chunk is scored without the sentence that was asked about: in two parts. */
static double right_score(const bank *b, const keys *k, const ibid_train_question *q,
                          int32_t *best) {
    const ibid_train_chunk *c = &b->chunks[q->chunk];
    int32_t more[IBID_ENCODE_STEP];
    double sum = 0;
    if (q->mask1 <= q->mask0 || q->n > IBID_ENCODE_STEP)
        return maxsim(b, k, q, c->row0, c->n, best);
    (void)maxsim(b, k, q, c->row0, q->mask0, best);
    (void)maxsim(b, k, q, c->row0 + q->mask1, c->n - q->mask1, more);
    for (size_t i = 0; i < q->n; i++)
        sum += (double)b->weight[q->row0 + i] * (double)(best[i] > more[i] ? best[i] : more[i]);
    return sum;
}

/* Reciprocal ranks of the held-out questions' chunks among all held-out chunks. */
static ibid_err judge(const bank *b, const ibid_keymap *map, double *rank, size_t *n) {
    const ibid_train_texts *t = b->texts;
    keys k = {NULL, 0};
    int32_t best[IBID_ENCODE_STEP];
    ibid_err e = keys_open(b, map, &k);
    *n = 0;
    for (size_t i = 0; !e && i < t->n_questions; i++) {
        const ibid_train_question *q = &b->questions[i];
        if (!held_out(q->chunk) || q->n > IBID_ENCODE_STEP) continue;
        double right = right_score(b, &k, q, best);
        size_t place = 1;
        for (size_t c = 0; c < t->n_chunks; c++)
            if (held_out(c) && c != q->chunk)
                place += maxsim(b, &k, q, b->chunks[c].row0, b->chunks[c].n, best) >= right;
        rank[(*n)++] = 1 / (double)place;
    }
    ibid_free(k.of);
    return e;
}

static ibid_err compare(const bank *b, const ibid_keymap *raw, const ibid_keymap *trained,
                        ibid_train_result *out) {
    double *x = ibid_calloc(2 * b->texts->n_questions + 1, sizeof *x);
    double *y = x ? x + b->texts->n_questions : NULL, square = 0;
    size_t n = 0;
    ibid_err e = x ? judge(b, raw, x, &n) : ibid_fail(IBID_NOMEM, "out of memory");
    if (!e) e = judge(b, trained, y, &n);
    for (size_t i = 0; !e && i < n; i++) {
        out->raw_mrr += x[i] / (double)n;
        out->trained_mrr += y[i] / (double)n;
        square += (y[i] - x[i]) * (y[i] - x[i]) / (double)n;
    }
    out->gain = out->trained_mrr - out->raw_mrr;
    double variance = square - out->gain * out->gain;
    out->gain_error = n > 1 && variance > 0 ? sqrt(variance / (double)(n - 1)) : 0;
    out->n_held_out = n;
    out->kept = n > 0 && out->gain > 2 * out->gain_error;
    ibid_free(x);
    return e;
}

/* ---- The whole ---- */

static bool listed(const ibid_keymap *s, ibid_head h) {
    for (size_t i = 0; i < s->n_inputs; i++)
        if (s->inputs[i].layer == h.layer && s->inputs[i].kv_head == h.kv_head) return true;
    return false;
}

/* The raw heads, and the best others that need no more layers than these or a third. */
static ibid_err choose_inputs(const ibid_model *m, const ibid_calibration *raw,
                              const ibid_cal_ranking *ranking, ibid_keymap **out) {
    ibid_keymap s = {.head_dim = (uint32_t)m->head_dim,
                     .out = OUT,
                     .hidden = HIDDEN,
                     .has_gain = true,
                     .out_weight = 1};
    size_t layers = ibid_keymap_layers(raw->map), most = IBID_INPUT_MAX / m->head_dim;
    if (layers < m->n_layers / 3) layers = m->n_layers / 3;
    if (most > IBID_TRAIN_INPUTS) most = IBID_TRAIN_INPUTS;
    for (size_t i = 0; i < raw->map->n_inputs && s.n_inputs < most; i++)
        s.inputs[s.n_inputs++] = raw->map->inputs[i];
    for (size_t i = 0; i < ranking->n && s.n_inputs < most; i++)
        if (ranking->heads[i].layer < layers && !listed(&s, ranking->heads[i]))
            s.inputs[s.n_inputs++] = ranking->heads[i];
    return ibid_keymap_open(&s, out);
}

/* The raw heads' map over the inputs of the trained one. */
static ibid_err raw_over(const ibid_keymap *trained, const ibid_keymap *raw, ibid_keymap **out) {
    ibid_keymap s = {
        .head_dim = trained->head_dim, .n_inputs = trained->n_inputs, .n_raw = raw->n_inputs};
    memcpy(s.inputs, trained->inputs, sizeof s.inputs);
    for (uint32_t i = 0; i < raw->n_inputs; i++) { /* they are the first inputs */
        s.raw[i] = i;
        s.raw_weight[i] = 1;
    }
    ibid_err e = ibid_keymap_open(&s, out);
    if (e) return e;
    memcpy((*out)->mean, trained->mean, ibid_keymap_input(trained) * sizeof(float));
    (void)ibid_keymap_settle(*out);
    return IBID_OK;
}

/* Training questions: those that are not held out. Vectors of the teacher come in their order. */
static ibid_err learn(const bank *b, ibid_teacher teacher, const ibid_train_opts *o,
                      ibid_keymap *map) {
    const ibid_train_texts *t = b->texts;
    size_t texts = t->n_chunks + t->n_questions, dim = teacher.data ? teacher.n / texts / 4 : 0;
    if (teacher.data && (!dim || dim > 65536 || teacher.n != texts * dim * sizeof(float)))
        return ibid_fail(IBID_INVAL,
                         "the teacher's file has %zu bytes, not so many f32 for each of %zu texts",
                         teacher.n, texts);
    ibid_train_question *q = ibid_calloc(t->n_questions + 1, sizeof *q);
    float *vectors = dim ? ibid_alloc(teacher.n) : NULL;
    ibid_err e = q && (vectors || !dim) ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory");
    size_t n = 0;
    if (!e && dim) memcpy(vectors, teacher.data, teacher.n);
    for (size_t i = 0; !e && i < t->n_questions; i++) {
        if (held_out(b->questions[i].chunk)) continue;
        if (dim && n < i)
            memmove(vectors + (t->n_chunks + n) * dim, vectors + (t->n_chunks + i) * dim,
                    dim * sizeof *vectors);
        q[n++] = b->questions[i];
    }
    for (size_t i = 0; !e && dim && i < t->n_chunks + n; i++) {
        double sum = 1e-12;
        for (size_t c = 0; c < dim; c++)
            sum += (double)vectors[i * dim + c] * (double)vectors[i * dim + c];
        if (!isfinite(sum)) e = ibid_fail(IBID_INVAL, "vector %zu of the teacher is not finite", i);
        for (size_t c = 0; c < dim; c++) vectors[i * dim + c] /= (float)sqrt(sum);
    }
    ibid_train_set set = {.rows = b->rows,
                          .weight = b->weight,
                          .chunks = b->chunks,
                          .n_chunks = t->n_chunks,
                          .questions = q,
                          .n_questions = n,
                          .teacher = vectors,
                          .teacher_dim = dim};
    if (!e) e = ibid_head_train(&set, o, map);
    ibid_free(q);
    ibid_free(vectors);
    return e;
}

static void tell(ibid_buf *report, const ibid_train_texts *t, const ibid_keymap *map,
                 const ibid_train_result *r, double read_s, double train_s) {
    if (!report) return;
    (void)ibid_buf_printf(report, "training: %zu chunks, %zu questions; inputs (layer/head)",
                          t->n_chunks, t->n_questions);
    for (size_t i = 0; i < map->n_inputs; i++)
        (void)ibid_buf_printf(report, " %u/%u", map->inputs[i].layer, map->inputs[i].kv_head);
    (void)ibid_buf_printf(report,
                          "; %.0f s to read, %.0f s to train\n"
                          "held out, %zu questions: MRR %.3f by raw heads, %.3f trained (%+.3f +- "
                          "%.3f): %s\n",
                          read_s, train_s, r->n_held_out, r->raw_mrr, r->trained_mrr, r->gain,
                          r->gain_error,
                          r->kept ? "the trained head is kept" : "the raw heads stay");
}

ibid_err ibid_calibrate_train(const ibid_reader *r, const ibid_train_texts *texts,
                              ibid_teacher teacher, const ibid_calibration *raw,
                              const ibid_cal_ranking *ranking, const ibid_train_opts *o,
                              ibid_calibration *known, ibid_train_result *result,
                              ibid_buf *report) {
    ibid_keymap *map = NULL, *as_raw = NULL;
    bank b = {.texts = texts};
    uint64_t start = ibid_now_ns();
    memset(known, 0, sizeof *known);
    memset(result, 0, sizeof *result);
    if (!raw->map)
        return ibid_fail(IBID_INVAL, "no head of this model finds text: there is nothing to train");
    ibid_err e = choose_inputs(r->model, raw, ranking, &map);
    if (!e) e = bank_open(r, texts, map, o->cancel, &b);
    if (!e) e = standardise(&b, map);
    double read_s = ibid_ms_since(start) / 1000;
    start = ibid_now_ns();
    if (!e) e = learn(&b, teacher, o, map);
    double train_s = ibid_ms_since(start) / 1000;
    if (!e) e = raw_over(map, raw->map, &as_raw);
    if (!e) e = compare(&b, as_raw, map, result);
    if (!e) tell(report, texts, map, result, read_s, train_s);
    if (!e && result->kept) {
        *known = (ibid_calibration){.head_dim = raw->head_dim,
                                    .n_heads = raw->n_heads,
                                    .keys_weight = raw->keys_weight,
                                    .map = map};
        memcpy(known->heads, raw->heads, sizeof known->heads);
        (void)snprintf(known->note, sizeof known->note,
                       "trained here on %zu chunks%s: held-out MRR %.3f, by raw heads %.3f",
                       texts->n_chunks, teacher.data ? " with a teacher" : "", result->trained_mrr,
                       result->raw_mrr);
        map = NULL;
    }
    bank_fini(&b);
    ibid_keymap_close(map);
    ibid_keymap_close(as_raw);
    return e;
}
