#include "attention/plan/calibration_run.h"

#include "attention/kernels/kernels.h"
#include "rpc/base/clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNKS_MIN = 16, HEADS_TAKEN_MAX = 4 };

/* One more head costs head_dim bytes a token in every index: it must earn this much mean reciprocal
 * rank. A head below the floor, or much below what words find, is no use: a random model's best
 * one, which knows tokens again by their embeddings, has 0.1 to 0.2 where words have 0.8. */
static const double worth = 0.015, floor_mrr = 0.25, floor_of_words = 0.6;

struct ibid_cal_bank {
    const ibid_model *m;
    const ibid_kernels *kernels;
    const ibid_cal_set *set;
    size_t n_heads;             /* n_layers * n_kv_heads */
    size_t *chunk0, *question0; /* [n + 1] where each text's tokens start */
    uint16_t *chunk_keys;       /* [n_heads, chunk tokens, head_dim] f16 */
    uint16_t *question_keys;    /* [n_heads, question tokens, head_dim] */
    float *idf;                 /* [question tokens] */
};

/* ---- Keys of all heads ---- */

void ibid_cal_bank_close(ibid_cal_bank *b) {
    if (!b) return;
    ibid_free(b->chunk0);
    ibid_free(b->question0);
    ibid_free(b->chunk_keys);
    ibid_free(b->question_keys);
    ibid_free(b->idf);
    ibid_free(b);
}

static ibid_err take_all(const ibid_cal_bank *b, const ibid_seq *s, size_t n, size_t at,
                         size_t total, float *scratch, uint16_t *keys) {
    size_t d = b->m->head_dim;
    ibid_err e = IBID_OK;
    for (size_t h = 0; !e && h < b->n_heads; h++) {
        e = ibid_seq_raw_keys(s, h / b->m->n_kv_heads, h % b->m->n_kv_heads, 0, n, scratch);
        if (!e) b->kernels->kv_pack(IBID_KV_F16, scratch, n * d, keys + (h * total + at) * d, NULL);
    }
    return e;
}

/* Runs texts in micro-batches and keeps their keys. starts [n + 1]. */
static ibid_err fill(const ibid_cal_bank *b, const ibid_reader *r, const ibid_reading *t, size_t n,
                     const size_t *starts, const atomic_bool *cancel, uint16_t *keys) {
    ibid_seq *seqs[IBID_ENCODE_STEP];
    size_t longest = 1;
    for (size_t i = 0; i < n; i++) longest = t[i].n > longest ? t[i].n : longest;
    float *scratch = ibid_alloc(longest * b->m->head_dim * sizeof *scratch);
    ibid_err e = scratch ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for keys");
    for (size_t i = 0; !e && i < n;) {
        size_t count = 0, rows = 0;
        while (i + count < n && count < IBID_ENCODE_STEP &&
               (count == 0 || rows + t[i + count].n <= IBID_ENCODE_STEP))
            rows += t[i + count++].n;
        if ((e = ibidi_read_batch(r, t + i, count, 0, cancel, seqs))) break;
        for (size_t k = 0; k < count; k++) {
            if (!e) e = take_all(b, seqs[k], t[i + k].n, starts[i + k], starts[n], scratch, keys);
            ibid_seq_close(seqs[k]);
        }
        i += count;
    }
    ibid_free(scratch);
    return e;
}

static int by_id(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return x < y ? -1 : x > y;
}

/* In how many chunks a token occurs. */
static size_t document_frequency(const ibid_cal_set *s, int32_t id) {
    size_t n = 0;
    for (size_t c = 0; c < s->n_chunks; c++) {
        for (size_t t = 0; t < s->chunks[c].n; t++) {
            if (s->chunks[c].tokens[t] != id) continue;
            n++;
            break;
        }
    }
    return n;
}

static ibid_err set_idf(ibid_cal_bank *b) {
    const ibid_cal_set *s = b->set;
    size_t n = b->question0[s->n_questions];
    int32_t *ids = ibid_calloc(n + 1, sizeof *ids);
    float *of = ibid_calloc(n + 1, sizeof *of);
    b->idf = ibid_calloc(n + 1, sizeof *b->idf);
    ibid_err e = ids && of && b->idf ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for IDF");
    if (e) goto done;
    for (size_t q = 0; q < s->n_questions; q++)
        memcpy(ids + b->question0[q], s->questions[q].tokens, s->questions[q].n * sizeof *ids);
    qsort(ids, n, sizeof *ids, by_id);
    for (size_t i = 0; i < n; i++) {
        double df = i && ids[i] == ids[i - 1] ? -1 : (double)document_frequency(s, ids[i]);
        of[i] = df < 0 ? of[i - 1] : (float)log(((double)s->n_chunks - df + 0.5) / (df + 0.5) + 1);
    }
    for (size_t q = 0; q < s->n_questions; q++) {
        for (size_t t = 0; t < s->questions[q].n; t++) {
            const int32_t *p = bsearch(&s->questions[q].tokens[t], ids, n, sizeof *ids, by_id);
            b->idf[b->question0[q] + t] = of[p - ids];
        }
    }
done:
    ibid_free(ids);
    ibid_free(of);
    return e;
}

ibid_err ibid_cal_bank_open(const ibid_reader *r, const ibid_cal_set *set,
                            const atomic_bool *cancel, ibid_cal_bank **out) {
    ibid_reading *texts = NULL;
    ibid_cal_bank *b = ibid_calloc(1, sizeof *b);
    size_t bytes_c, bytes_q;
    if (!b) return ibid_fail(IBID_NOMEM, "no memory for keys");
    b->m = r->model;
    b->set = set;
    b->n_heads = r->model->n_layers * r->model->n_kv_heads;
    b->chunk0 = ibid_calloc(set->n_chunks + 1, sizeof *b->chunk0);
    b->question0 = ibid_calloc(set->n_questions + 1, sizeof *b->question0);
    texts = ibid_calloc(set->n_questions + 1, sizeof *texts);
    ibid_err e = b->chunk0 && b->question0 && texts ? ibid_kernels_get(NULL, &b->kernels)
                                                    : ibid_fail(IBID_NOMEM, "no memory for keys");
    if (e) goto done;
    for (size_t i = 0; i < set->n_chunks; i++) b->chunk0[i + 1] = b->chunk0[i] + set->chunks[i].n;
    for (size_t i = 0; i < set->n_questions; i++) {
        texts[i] = (ibid_reading){.tokens = set->questions[i].tokens, .n = set->questions[i].n};
        b->question0[i + 1] = b->question0[i] + texts[i].n;
    }
    size_t row = b->n_heads * b->m->head_dim * sizeof *b->chunk_keys;
    if (ibid_mul_size(row, b->chunk0[set->n_chunks] + 1, &bytes_c) &&
        ibid_mul_size(row, b->question0[set->n_questions] + 1, &bytes_q)) {
        b->chunk_keys = ibid_alloc(bytes_c);
        b->question_keys = ibid_alloc(bytes_q);
    }
    if (!b->chunk_keys || !b->question_keys) {
        e = ibid_fail(IBID_NOMEM, "no memory for the keys of a sample; use a shorter one");
        goto done;
    }
    e = fill(b, r, set->chunks, set->n_chunks, b->chunk0, cancel, b->chunk_keys);
    if (!e) e = fill(b, r, texts, set->n_questions, b->question0, cancel, b->question_keys);
    if (!e) e = set_idf(b);
done:
    ibid_free(texts);
    if (e)
        ibid_cal_bank_close(b);
    else
        *out = b;
    return e;
}

/* ---- Scoring ---- */

/* Keys [n] of the chosen heads side by side, as f32; the caller frees. */
static float *side_by_side(const ibid_cal_bank *b, const ibid_head *heads, size_t n_heads,
                           const uint16_t *keys, size_t n) {
    size_t d = b->m->head_dim, dim = n_heads * d;
    float *raw = ibid_alloc((n * dim + 1) * sizeof *raw);
    for (size_t h = 0; raw && h < n_heads; h++) {
        size_t head = heads[h].layer * b->m->n_kv_heads + heads[h].kv_head;
        for (size_t t = 0; t < n; t++)
            b->kernels->kv_unpack(IBID_KV_F16, keys + (head * n + t) * d, NULL, d,
                                  raw + t * dim + h * d);
    }
    return raw;
}

static void mean_of(const float *raw, size_t n, size_t dim, float *mean) {
    for (size_t i = 0; i < dim; i++) {
        double sum = 0;
        for (size_t t = 0; t < n; t++) sum += (double)raw[t * dim + i];
        mean[i] = n ? (float)(sum / (double)n) : 0;
    }
}

ibid_err ibid_cal_bank_means(const ibid_cal_bank *b, ibid_keymap *map) {
    size_t n = b->chunk0[b->set->n_chunks];
    float *raw = side_by_side(b, map->inputs, map->n_inputs, b->chunk_keys, n);
    if (!raw) return ibid_fail(IBID_NOMEM, "no memory for keys");
    mean_of(raw, n, ibid_keymap_input(map), map->mean);
    ibid_free(raw);
    return IBID_OK;
}

typedef struct scorer {
    const ibid_cal_bank *b;
    size_t dim;
    int8_t *chunks, *questions; /* token keys */
    int8_t *cut;                /* a chunk with a sentence left out */
    int32_t *best;
    float *right; /* [n_questions] */
} scorer;

static double score_chunk(scorer *s, size_t question, size_t chunk) {
    const ibid_cal_bank *b = s->b;
    const ibid_cal_question *q = &b->set->questions[question];
    const int8_t *keys = s->chunks + b->chunk0[chunk] * s->dim;
    size_t n = b->set->chunks[chunk].n;
    double sum = 0, weight = 0;
    if (chunk == q->chunk && q->mask1 > q->mask0) {
        memcpy(s->cut, keys, q->mask0 * s->dim);
        memcpy(s->cut + q->mask0 * s->dim, keys + q->mask1 * s->dim, (n - q->mask1) * s->dim);
        keys = s->cut;
        n -= q->mask1 - q->mask0;
    }
    if (n == 0) return 0;
    b->kernels->maxsim_i8(s->questions + b->question0[question] * s->dim, q->n, keys, n, s->dim,
                          s->best, NULL);
    for (size_t t = 0; t < q->n; t++) {
        double w = (double)b->idf[b->question0[question] + t];
        sum += w * (double)s->best[t] / (127.0 * 127.0);
        weight += w;
    }
    return weight > 0 ? sum / weight : 0;
}

static int by_float(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static void judge(scorer *s, ibid_cal_score *out) {
    const ibid_cal_set *set = s->b->set;
    double n = (double)set->n_questions, null2 = 0;
    for (size_t q = 0; q < set->n_questions; q++) {
        double right = score_chunk(s, q, set->questions[q].chunk), wrong = -1;
        size_t above = 0;
        for (size_t c = 0; c < set->n_chunks; c++) {
            if (c == set->questions[q].chunk) continue;
            double x = score_chunk(s, q, c);
            above += x >= right;
            wrong = x > wrong ? x : wrong;
        }
        s->right[q] = (float)right;
        out->recall1 += above == 0;
        out->mrr += 1 / (double)(above + 1);
        out->margin += right - wrong;
        out->null_mean += wrong;
        null2 += wrong * wrong;
    }
    out->recall1 /= n;
    out->mrr /= n;
    out->margin /= n;
    out->null_mean /= n;
    double variance = null2 / n - out->null_mean * out->null_mean;
    out->null_sd = variance > 0 ? sqrt(variance) : 0;
    qsort(s->right, set->n_questions, sizeof *s->right, by_float);
    out->right_low = (double)s->right[set->n_questions / 50];
    out->right_middle = (double)s->right[set->n_questions / 10];
}

static ibid_err bank_keys(const ibid_cal_bank *b, const ibid_keymap *map, bool question,
                          int8_t **out) {
    const ibid_cal_set *set = b->set;
    size_t n = question ? b->question0[set->n_questions] : b->chunk0[set->n_chunks];
    float *raw =
        side_by_side(b, map->inputs, map->n_inputs, question ? b->question_keys : b->chunk_keys, n);
    *out = ibid_alloc(n * ibid_keymap_dim(map) + 1);
    ibid_err e = raw && *out ? ibid_token_keys(map, b->kernels, question, raw, n, *out)
                             : ibid_fail(IBID_NOMEM, "no memory for token keys");
    ibid_free(raw);
    return e;
}

static bool fits(const ibid_cal_bank *b, const ibid_keymap *map) {
    for (size_t i = 0; i < map->n_inputs; i++)
        if (map->inputs[i].layer >= b->m->n_layers || map->inputs[i].kv_head >= b->m->n_kv_heads)
            return false;
    return map->head_dim == b->m->head_dim;
}

ibid_err ibid_cal_bank_score(const ibid_cal_bank *b, const ibid_keymap *map, ibid_cal_score *out) {
    size_t longest = 1;
    scorer s = {.b = b, .dim = ibid_keymap_dim(map)};
    memset(out, 0, sizeof *out);
    if (!fits(b, map)) return ibid_fail(IBID_MISMATCH, "the retrieval head is another model's");
    for (size_t i = 0; i < b->set->n_chunks; i++)
        longest = b->set->chunks[i].n > longest ? b->set->chunks[i].n : longest;
    s.cut = ibid_alloc(longest * s.dim);
    s.best = ibid_calloc(b->question0[b->set->n_questions] + 1, sizeof *s.best);
    s.right = ibid_calloc(b->set->n_questions + 1, sizeof *s.right);
    ibid_err e = s.cut && s.best && s.right ? bank_keys(b, map, false, &s.chunks)
                                            : ibid_fail(IBID_NOMEM, "no memory for token keys");
    if (!e) e = bank_keys(b, map, true, &s.questions);
    if (!e) judge(&s, out);
    ibid_free(s.chunks);
    ibid_free(s.questions);
    ibid_free(s.cut);
    ibid_free(s.best);
    ibid_free(s.right);
    return e;
}

/* ---- Choosing ---- */

/* The map of some heads as they are; NULL map: only its score. */
static ibid_err try_heads(const ibid_cal_bank *b, const ibid_head *heads, size_t n,
                          ibid_cal_score *score, ibid_keymap **map) {
    ibid_keymap *m = NULL;
    ibid_err e = ibid_keymap_open_raw(heads, n, b->m->head_dim, &m);
    if (!e) e = ibid_cal_bank_means(b, m);
    if (!e) e = ibid_cal_bank_score(b, m, score);
    if (!e && map)
        *map = m;
    else
        ibid_keymap_close(m);
    return e;
}

static bool taken(const ibid_calibration *c, ibid_head h) {
    for (size_t i = 0; i < c->n_heads; i++)
        if (c->heads[i].layer == h.layer && c->heads[i].kv_head == h.kv_head) return true;
    return false;
}

typedef struct ranked {
    ibid_head head;
    ibid_cal_score score;
} ranked;

static int by_mrr(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->score.mrr != y->score.mrr) return x->score.mrr > y->score.mrr ? -1 : 1;
    if (x->head.layer != y->head.layer) return x->head.layer < y->head.layer ? -1 : 1;
    return x->head.kv_head < y->head.kv_head ? -1 : x->head.kv_head > y->head.kv_head;
}

/* c->heads grow by the best partner among the leading heads while that pays. */
static ibid_err add_partners(const ibid_cal_bank *b, const ranked *all, ibid_calibration *c,
                             ibid_cal_score *score) {
    enum { PARTNERS = 16 };
    size_t n_partners = b->n_heads < PARTNERS ? b->n_heads : PARTNERS;
    ibid_head heads[HEADS_TAKEN_MAX];
    ibid_err e = IBID_OK;
    while (!e && c->n_heads < HEADS_TAKEN_MAX) {
        ibid_cal_score best = *score, s;
        size_t who = SIZE_MAX, n = c->n_heads;
        memcpy(heads, c->heads, n * sizeof *heads);
        for (size_t i = 0; !e && i < n_partners; i++) {
            if (taken(c, all[i].head)) continue;
            heads[n] = all[i].head;
            e = try_heads(b, heads, n + 1, &s, NULL);
            if (!e && s.mrr > best.mrr) {
                best = s;
                who = i;
            }
        }
        if (e || who == SIZE_MAX || best.mrr < score->mrr + worth) break;
        c->heads[c->n_heads++] = all[who].head;
        *score = best;
    }
    return e;
}

static void tell(ibid_buf *report, const ibid_cal_bank *b, const ranked *all,
                 const ibid_calibration *c) {
    if (!report) return;
    (void)ibid_buf_puts(report, "  layer  head  recall@1    MRR  margin\n");
    for (size_t i = 0; i < b->n_heads && i < 10; i++)
        (void)ibid_buf_printf(report, "  %5u %5u     %.3f  %.3f   %+.3f%s\n", all[i].head.layer,
                              all[i].head.kv_head, all[i].score.recall1, all[i].score.mrr,
                              all[i].score.margin, taken(c, all[i].head) ? "  taken" : "");
    if (!c->n_heads)
        (void)ibid_buf_puts(report,
                            "no head finds text by its keys: search will be by words only\n");
}

static void tell_taken(ibid_buf *report, const ibid_calibration *c, const char *what,
                       const ibid_cal_score *s) {
    if (!report) return;
    (void)ibid_buf_printf(report,
                          "%s: %u numbers a token, recall@1 %.3f, MRR %.3f; the best of unrelated "
                          "text scores %.3f +- %.3f\n",
                          what, (unsigned)ibid_keymap_dim(c->map), s->recall1, s->mrr,
                          (double)c->null_mean, (double)c->null_sd);
}

static void set_thresholds(ibid_calibration *c, const ibid_cal_score *s) {
    c->null_mean = (float)s->null_mean;
    c->null_sd = (float)s->null_sd;
    c->recall1 = (float)s->recall1;
    c->margin = (float)s->margin;
    /* The best of many chunks that have nothing to do with the question still scores null_mean;
     * what scores two deviations more is hardly ever one of them. A span is judged on its own, not
     * as the best of many, and shorter text has fewer tokens to match. */
    c->relevant = (float)(s->null_mean + 2 * s->null_sd);
    c->find = (float)(s->null_mean + 0.5 * s->null_sd);
}

/* Ranks all heads and takes the best ones: c->heads, and the map of them as they are. A model
 * without a useful head gets none. */
static ibid_err choose(const ibid_cal_bank *b, double words, ibid_calibration *c,
                       ibid_cal_score *score, ibid_cal_ranking *ranking, ibid_buf *report) {
    ranked *all = ibid_calloc(b->n_heads, sizeof *all);
    ibid_err e = all ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory");
    for (size_t h = 0; !e && h < b->n_heads; h++) {
        all[h].head =
            (ibid_head){(uint32_t)(h / b->m->n_kv_heads), (uint32_t)(h % b->m->n_kv_heads)};
        e = try_heads(b, &all[h].head, 1, &all[h].score, NULL);
    }
    if (e) goto done;
    qsort(all, b->n_heads, sizeof *all, by_mrr);
    if (all[0].score.mrr >= fmax(floor_mrr, floor_of_words * words)) {
        c->heads[0] = all[0].head;
        c->n_heads = 1;
        *score = all[0].score;
        e = add_partners(b, all, c, score);
        if (!e) e = try_heads(b, c->heads, c->n_heads, score, &c->map);
    }
    for (size_t i = 0; !e && ranking && i < b->n_heads; i++)
        if (ranking->n < sizeof ranking->heads / sizeof *ranking->heads)
            ranking->heads[ranking->n++] = all[i].head;
    if (!e) tell(report, b, all, c);
done:
    ibid_free(all);
    return e;
}

/* A head that was trained for the model takes the place of the raw ones. */
static ibid_err take_known(const ibid_cal_bank *b, const ibid_calibration *known,
                           ibid_calibration *c, ibid_cal_score *score) {
    ibid_keymap *map = NULL;
    ibid_err e = ibid_cal_bank_score(b, known->map, score);
    if (!e) e = ibid_keymap_copy(known->map, &map);
    if (e) return e;
    ibid_keymap_close(c->map);
    c->map = map;
    c->keys_weight = known->keys_weight;
    c->has_model = known->has_model;
    c->model = known->model;
    memcpy(c->note, known->note, sizeof c->note);
    return IBID_OK;
}

static ibid_err calibrate(const ibid_cal_bank *b, const ibid_calibration *known,
                          ibid_calibration *c, ibid_cal_ranking *ranking, ibid_buf *report) {
    ibid_cal_score score = {0};
    double words = 0;
    ibid_err e = ibid_cal_words(b->m, b->set, &words);
    if (!e && report) (void)ibid_buf_printf(report, "by words alone: MRR %.3f\n", words);
    if (known && known->map && known->n_heads) {
        c->n_heads = known->n_heads;
        memcpy(c->heads, known->heads, sizeof c->heads);
    } else if (!e) {
        e = choose(b, words, c, &score, ranking, report);
    }
    if (!e && c->map) {
        set_thresholds(c, &score);
        tell_taken(report, c, "raw heads", &score);
    }
    if (!e && known && known->map) {
        e = take_known(b, known, c, &score);
        if (e) return e;
        set_thresholds(c, &score);
        tell_taken(report, c, "trained head", &score);
    }
    return e;
}

ibid_err ibid_calibrate(const ibid_reader *r, ibid_str sample, const ibid_calibration *known,
                        const atomic_bool *cancel, ibid_calibration *out, ibid_cal_ranking *ranking,
                        ibid_buf *report) {
    uint64_t start = ibid_now_ns();
    ibid_cal_sample s = {0};
    ibid_cal_bank *b = NULL;
    memset(out, 0, sizeof *out);
    if (ranking) ranking->n = 0;
    out->head_dim = (uint32_t)r->model->head_dim;
    out->keys_weight = IBID_KEYS_WEIGHT;
    if (r->model->head_dim > IBID_HEAD_DIM_MAX || r->model->head_dim % 32) {
        out->head_dim = 0;
        if (report)
            (void)ibid_buf_puts(report,
                                "this head size gives no token keys: search by words only\n");
        return IBID_OK;
    }
    if (!sample.s || !sample.n)
        sample = (ibid_str){(const char *)ibidi_sample_text, ibidi_sample_text_size};
    ibid_err e = ibid_cal_sample_open(r->model, sample, &s);
    if (!e && s.set.n_chunks < CHUNKS_MIN)
        e = ibid_fail(IBID_INVAL, "the sample gives %zu chunks; %d are needed: use a longer text",
                      s.set.n_chunks, CHUNKS_MIN);
    if (!e) e = ibid_cal_bank_open(r, &s.set, cancel, &b);
    if (!e) e = calibrate(b, known, out, ranking, report);
    if (!e && report)
        (void)ibid_buf_printf(report, "sample: %zu chunks of %zu tokens, %zu questions, %.1f s\n",
                              s.set.n_chunks, b->chunk0[s.set.n_chunks], s.set.n_questions,
                              ibid_ms_since(start) / 1000);
    ibid_cal_bank_close(b);
    ibid_cal_sample_close(&s);
    if (e) ibid_calibration_fini(out);
    return e;
}
