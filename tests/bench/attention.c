/* Measures retrieval heads and answers of a model on a SQuAD-layout file, on the engine alone: no
 * store, no rooms. Which wording and which plan serve a model can be compared here in minutes.
 *
 *   bench_attention MODEL.gguf FILE.json heads [QUESTIONS]
 *       calibrates on the built-in sample, then scores the chosen heads, and the best heads there
 * are, on the file's questions over its paragraphs. Nothing is chosen on them. bench_attention
 * MODEL.gguf FILE.json answers QUESTIONS BLOCKS SHARE[,SHARE...] [WORDING [MAX_TOKENS]] answers
 * over the right paragraph and the best wrong ones (by MaxSim), and the share of answers that
 * contain a gold answer, for each share recomputed.
 */
#include "attention/attention_internal.h"
#include "attention/plan/citation.h"
#include "rpc/base/clock.h"
#include "tests/support/ready.h"

#include <ctype.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(call)                                                                                \
    do {                                                                                           \
        ibid_err check_e = (call);                                                                 \
        if (check_e) {                                                                             \
            (void)fprintf(stderr, "%s: %s\n", ibid_err_code(check_e), ibid_err_detail());          \
            exit(2);                                                                               \
        }                                                                                          \
    } while (0)

enum { CHUNKS_MAX = 4096, QUESTIONS_MAX = 16384, BLOCKS_MAX = 16 };

typedef struct data {
    json_t *root;
    ibid_reading chunks[CHUNKS_MAX];
    const char *text[CHUNKS_MAX];
    size_t n_title[CHUNKS_MAX];
    size_t n_chunks;
    ibid_cal_question questions[QUESTIONS_MAX];
    json_t *qa[QUESTIONS_MAX];
    size_t n_questions;
} data;

static ibid_ids tokens_of(const ibid_model *m, const char *s) {
    ibid_token *t = NULL;
    ibid_ids ids = {NULL, 0};
    CHECK(ibid_tokenize(m->tokenizer, s, strlen(s), false, &t, &ids.n));
    ids.ids = ibid_calloc(ids.n + 1, sizeof *ids.ids);
    for (size_t i = 0; i < ids.n; i++) ids.ids[i] = t[i].id;
    ibid_free(t);
    return ids;
}

static void add_paragraph(data *d, const ibid_model *m, const char *title, json_t *p) {
    char line[256];
    size_t i, c = d->n_chunks++;
    json_t *qa;
    (void)snprintf(line, sizeof line, "%s\n", title);
    for (char *s = line; *s; s++)
        if (*s == '_') *s = ' ';
    ibid_ids head = tokens_of(m, line);
    d->text[c] = json_string_value(json_object_get(p, "context"));
    ibid_ids body = tokens_of(m, d->text[c]);
    int32_t *ids = ibid_calloc(head.n + body.n, sizeof *ids);
    memcpy(ids, head.ids, head.n * sizeof *ids);
    memcpy(ids + head.n, body.ids, body.n * sizeof *ids);
    d->n_title[c] = head.n;
    d->chunks[c] = (ibid_reading){.tokens = ids, .n = head.n + body.n};
    ibid_free(head.ids);
    ibid_free(body.ids);
    json_array_foreach(json_object_get(p, "qas"), i, qa) {
        const char *text = json_string_value(json_object_get(qa, "question"));
        ibid_ids q;
        CHECK(ibid_prompt_keys(m, (ibid_str){text, strlen(text)}, &q));
        d->qa[d->n_questions] = qa;
        d->questions[d->n_questions++] = (ibid_cal_question){.tokens = q.ids, .n = q.n, .chunk = c};
    }
}

static void load(data *d, const ibid_model *m, const char *path) {
    json_error_t err;
    size_t i, k;
    json_t *article, *p;
    d->root = json_load_file(path, 0, &err);
    if (!d->root) {
        (void)fprintf(stderr, "%s: %s\n", path, err.text);
        exit(2);
    }
    json_array_foreach(json_object_get(d->root, "data"), i, article) {
        const char *title = json_string_value(json_object_get(article, "title"));
        json_array_foreach(json_object_get(article, "paragraphs"), k, p)
            add_paragraph(d, m, title ? title : "", p);
    }
}

/* Keeps n questions, evenly taken. */
static void thin(data *d, size_t n) {
    if (n == 0 || n >= d->n_questions) return;
    for (size_t i = 0; i < n; i++) {
        d->questions[i] = d->questions[i * d->n_questions / n];
        d->qa[i] = d->qa[i * d->n_questions / n];
    }
    d->n_questions = n;
}

/* ---- Heads ---- */

static void print_score(const char *what, const ibid_cal_score *s) {
    (void)printf("%-28s recall@1 %.4f  MRR %.4f  margin %+.3f  null %.3f +- %.3f  right 2%% %.3f "
                 "10%% %.3f\n",
                 what, s->recall1, s->mrr, s->margin, s->null_mean, s->null_sd, s->right_low,
                 s->right_middle);
}

static void heads(ready *x, data *d) {
    ibid_calibration *c = ibid_calloc(1, sizeof *c);
    ibid_keymap *t = NULL;
    ibid_cal_bank *b = NULL;
    ibid_cal_score s;
    ibid_buf report;
    char name[64];
    uint64_t start = ibid_now_ns();
    ibid_buf_init(&report, 1 << 20);
    CHECK(ibid_calibrate(&x->r, (ibid_str){NULL, 0}, NULL, NULL, c, NULL, &report));
    (void)printf("%scalibrated in %.1f s\n", report.data, ibid_ms_since(start) / 1000);
    ibid_cal_set set = {d->chunks, d->n_chunks, d->questions, d->n_questions};
    CHECK(ibid_cal_bank_open(&x->r, &set, NULL, &b));
    if (c->map) {
        CHECK(ibid_cal_bank_score(b, c->map, &s));
        print_score("calibrated, sample's means", &s);
        (void)printf("relevant %.3f find %.3f\n", (double)c->relevant, (double)c->find);
        CHECK(ibid_keymap_copy(c->map, &t));
        CHECK(ibid_cal_bank_means(b, t));
        CHECK(ibid_cal_bank_score(b, t, &s));
        print_score("this file's means", &s);
        ibid_keymap_close(t);
    }
    for (size_t h = 0; h < x->m->n_layers * x->m->n_kv_heads; h++) {
        ibid_head at = {(uint32_t)(h / x->m->n_kv_heads), (uint32_t)(h % x->m->n_kv_heads)};
        CHECK(ibid_keymap_open_raw(&at, 1, x->m->head_dim, &t));
        CHECK(ibid_cal_bank_means(b, t));
        CHECK(ibid_cal_bank_score(b, t, &s));
        ibid_keymap_close(t);
        if (s.recall1 < 0.9) continue;
        (void)snprintf(name, sizeof name, "layer %u head %u", at.layer, at.kv_head);
        print_score(name, &s);
    }
    ibid_cal_bank_close(b);
    ibid_calibration_fini(c);
    ibid_free(c);
}

/* ---- Answers ---- */

/* Lower case, words only, articles dropped, a space on both sides. */
static void normal(const char *s, char *out, size_t room) {
    size_t n = 0;
    out[n++] = ' ';
    while (*s && n + 2 < room) {
        char w[128];
        size_t k = 0;
        while (*s && !isalnum((unsigned char)*s) && !((unsigned char)*s & 0x80)) s++;
        while (*s && (isalnum((unsigned char)*s) || ((unsigned char)*s & 0x80))) {
            if (k + 1 < sizeof w) w[k++] = (char)tolower((unsigned char)*s);
            s++;
        }
        w[k] = '\0';
        if (k == 0 || !strcmp(w, "a") || !strcmp(w, "an") || !strcmp(w, "the")) continue;
        if (n + k + 2 >= room) break;
        memcpy(out + n, w, k);
        n += k;
        out[n++] = ' ';
    }
    out[n] = '\0';
}

static bool has_gold(json_t *qa, const char *answer) {
    static char a[65536], g[4096];
    size_t i;
    json_t *gold;
    normal(answer, a, sizeof a);
    json_array_foreach(json_object_get(qa, "answers"), i, gold) {
        normal(json_string_value(json_object_get(gold, "text")), g, sizeof g);
        if (strstr(a, g)) return true;
    }
    return false;
}

static const ibid_wording wordings[];

/* The right paragraph, then the best others by words in common, IDF-weighted. */
static void pick_blocks(const data *d, size_t q, size_t n, size_t *out) {
    double best[BLOCKS_MAX];
    size_t count = 1;
    out[0] = d->questions[q].chunk;
    for (size_t c = 0; c < d->n_chunks && n > 1; c++) {
        double score = 0;
        if (c == out[0]) continue;
        for (size_t t = 0; t < d->questions[q].n; t++) {
            size_t df = 0;
            bool here = false;
            for (size_t k = 0; k < d->n_chunks; k++) {
                bool in = false;
                for (size_t j = 0; j < d->chunks[k].n && !in; j++)
                    in = d->chunks[k].tokens[j] == d->questions[q].tokens[t];
                df += in;
                here = here || (in && k == c);
            }
            if (here) score += log(1 + (double)d->n_chunks / (double)df);
        }
        size_t at = count < n ? count++ : n;
        while (at > 1 && best[at - 1] < score) {
            if (at < n) {
                best[at] = best[at - 1];
                out[at] = out[at - 1];
            }
            at--;
        }
        if (at < n) {
            best[at] = score;
            out[at] = c;
        }
    }
}

static void answers(ready *x, data *d, size_t n_blocks, const char *shares, const ibid_wording *w,
                    size_t max_tokens, bool verbose) {
    double share[8];
    size_t n_shares = 0, right[8] = {0}, tokens[8] = {0}, cited[8] = {0}, cited_gold[8] = {0};
    double first[8] = {0};
    for (const char *s = shares; *s && n_shares < 8; s += *s == ',')
        share[n_shares++] = strtod(s, (char **)&s);
    for (size_t q = 0; q < d->n_questions; q++) {
        size_t which[BLOCKS_MAX];
        ibid_reading t[BLOCKS_MAX];
        ibid_placed_block placed[BLOCKS_MAX];
        ibid_ids ids;
        const char *text = json_string_value(json_object_get(d->qa[q], "question"));
        size_t done = 0, offset = 0;
        memset(t, 0, sizeof t);
        pick_blocks(d, q, n_blocks, which);
        for (size_t i = 0; i < n_blocks; i++) {
            t[i].tokens = d->chunks[which[n_blocks - 1 - i]].tokens;
            t[i].n = d->chunks[which[n_blocks - 1 - i]].n;
        }
        while (done < n_blocks) CHECK(ibid_read_some(&x->r, t, n_blocks, &done, true, NULL, NULL));
        for (size_t i = 0; i < n_blocks; i++) {
            placed[i] = (ibid_placed_block){t[i].kv.layers, t[i].tokens, x->r.n_prefix, offset, 0};
            offset += t[i].n;
        }
        CHECK(ibid_prompt_question(x->m, w, (ibid_str){text, strlen(text)}, &ids));
        for (size_t s = 0; s < n_shares; s++) {
            ibid_answer_plan p = {.blocks = placed,
                                  .n_blocks = n_blocks,
                                  .question = ids.ids,
                                  .n_question = ids.n,
                                  .share = share[s],
                                  .max_tokens = max_tokens};
            ibid_answered out;
            uint64_t start = ibid_now_ns();
            CHECK(ibid_answer_run(&x->r, &p, &out));
            const char *a = out.text.data ? out.text.data : "";
            bool good = has_gold(d->qa[q], a);
            right[s] += good;
            tokens[s] += out.completion_tokens;
            first[s] += (double)(out.first_token_ns - start) / 1e6;
            ibid_cite_block cb[BLOCKS_MAX];
            ibid_cite c[3];
            size_t n_cites = 0;
            for (size_t i = 0; i < n_blocks; i++)
                cb[i] = (ibid_cite_block){.text = {d->text[which[i]], strlen(d->text[which[i]])},
                                          .end = strlen(d->text[which[i]])};
            CHECK(ibid_cite_find((ibid_str){a, strlen(a)}, (ibid_str){text, strlen(text)}, cb,
                                 n_blocks, 3, 300, c, &n_cites));
            cited[s] += n_cites > 0;
            for (size_t k = 0; k < n_cites; k++) {
                char *quote =
                    strndup(cb[c[k].block].text.s + c[k].start, (size_t)(c[k].end - c[k].start));
                bool hit = has_gold(d->qa[q], quote);
                free(quote);
                if (!hit) continue;
                cited_gold[s]++;
                break;
            }
            if (verbose)
                (void)printf("%s %.2f | %s | %s | %s | %s\n", good ? "+" : "-", share[s], text,
                             json_string_value(json_object_get(
                                 json_array_get(json_object_get(d->qa[q], "answers"), 0), "text")),
                             a, out.finish);
            ibid_buf_fini(&out.text);
        }
        for (size_t i = 0; i < n_blocks; i++) ibid_kv_blob_fini(&t[i].kv);
        ibid_free(ids.ids);
    }
    for (size_t s = 0; s < n_shares; s++)
        (void)printf(
            "blocks %zu share %.2f: gold in answer %.3f, cited %.3f, gold in a quote %.3f, "
            "%.1f tokens, first token %.0f ms (n %zu)\n",
            n_blocks, share[s], (double)right[s] / (double)d->n_questions,
            (double)cited[s] / (double)d->n_questions,
            (double)cited_gold[s] / (double)d->n_questions,
            (double)tokens[s] / (double)d->n_questions, first[s] / (double)d->n_questions,
            d->n_questions);
}

static const ibid_wording wordings[] = {
    {"You answer questions from the given documents, briefly and in their own words.",
     "Documents:\n\n",
     "\n\nQuestion: ", "\nAnswer with the sentence of the documents that says it.", ""},
    {"You answer questions from the given documents, briefly and in their own words.",
     "Documents:\n\n", "\n\nQuestion: ", "", ""},
    {"You answer questions from the given documents, briefly and in their own words.",
     "Documents:\n\n", "\n\nQuestion: ", "\nAnswer in one sentence, in the words of the documents.",
     ""},
    {"You are a helpful assistant.", "Read this text.\n\n",
     "\n\nQuote the sentence of the text that answers this question: ", "", ""},
    {"You answer questions from the given documents, briefly and in their own words.",
     "Documents:\n\n", "\n\nQuestion: ", "", "Answer:"},
    {"You answer questions from the given documents, briefly and in their own words.",
     "Documents:\n\n", "\n\nQuestion: ", "\nAnswer briefly, using the words of the documents.",
     "According to the documents,"},
    {"You are a helpful assistant.", "", "\n\nAnswer the question from the text above. ", "", ""},
    {"You are a helpful assistant.", "", "\n\nUsing only the text above, answer: ", "",
     "The text says:"},
};

int main(int argc, char **argv) {
    static data d;
    ready x = {0};
    if (argc < 4) {
        (void)fprintf(stderr, "usage: %s MODEL.gguf FILE.json heads|answers ...\n", argv[0]);
        return 2;
    }
    bool is_heads = strcmp(argv[3], "heads") == 0;
    const ibid_wording *w = &ibid_wording_default;
    if (!is_heads && argc > 7 && argv[7][0] != '-')
        w = &wordings[strtoul(argv[7], NULL, 10) % (sizeof wordings / sizeof *wordings)];
    CHECK(ready_open(&x, argv[1], &(ibid_engine_opts){0}, w));
    load(&d, x.m, argv[2]);
    if (argc > 4) thin(&d, strtoul(argv[4], NULL, 10));
    (void)printf("%zu chunks, %zu questions\n", d.n_chunks, d.n_questions);
    if (is_heads)
        heads(&x, &d);
    else if (argc > 6)
        answers(&x, &d, strtoul(argv[5], NULL, 10), argv[6], w,
                argc > 8 ? strtoul(argv[8], NULL, 10) : 64, getenv("VERBOSE") != NULL);
    return 0;
}
