/* What the training of extractive answers reads (tools/train-extract), from a SQuAD-layout file.
 *
 *   bench_extract FILE.json features OUT
 *       every span of each question's paragraph with its features, binary: per question u32 index,
 *       u32 spans; per span u32 start, u32 end, then the features as f32
 *   bench_extract FILE.json tried OUT MODEL.gguf [SPANS]
 *       the spans the model was asked about, one JSON line a question: text, start, end, tokens,
 *       score of the text, log likelihood of the first token, of the others, of ending there
 */
#include "attention/plan/extract_run.h"
#include "rpc/base/clock.h"
#include "tests/support/ready.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct bench {
    FILE *out;
    bool model;  /* or features */
    size_t most; /* spans the model is asked about; 0: as many as the product asks about */
    uint32_t n_spans;
    ready x;
} bench;

static void check(ibid_err e) {
    if (!e) return;
    (void)fprintf(stderr, "bench_extract: %s: %s\n", ibid_err_text(e), ibid_err_detail());
    exit(2);
}

static ibid_str text_of(const json_t *object, const char *key) {
    const char *s = json_string_value(json_object_get(object, key));
    return s ? (ibid_str){s, strlen(s)} : (ibid_str){"", 0};
}

static void put(bench *b, const void *p, size_t size) {
    if (fwrite(p, size, 1, b->out) != 1) check(ibid_fail(IBID_IO, "cannot write"));
}

/* ---- Features ---- */

static ibid_err put_span(void *arg, const ibid_span *s, const float *f) {
    bench *b = arg;
    uint32_t at[2] = {(uint32_t)s->start, (uint32_t)s->end};
    put(b, at, sizeof at);
    put(b, f, IBID_EXTRACT_FEATURES * sizeof *f);
    b->n_spans++;
    return IBID_OK;
}

static void put_features(bench *b, uint32_t index, ibid_str question, const ibid_str *text) {
    uint32_t head[2] = {index, 0};
    long at = ftell(b->out);
    b->n_spans = 0;
    put(b, head, sizeof head);
    check(ibidi_extract_each(question, text, 1, put_span, b));
    head[1] = b->n_spans;
    (void)fseek(b->out, at, SEEK_SET);
    put(b, head, sizeof head);
    (void)fseek(b->out, 0, SEEK_END);
}

/* ---- Likelihoods ---- */

/* Title line and text as a block's tokens. */
static int32_t *block_tokens(const bench *b, ibid_str title, ibid_str text, size_t *n_title,
                             size_t *n) {
    ibid_token *head = NULL, *body = NULL;
    char line[256];
    size_t n_body;
    (void)snprintf(line, sizeof line, "%.*s\n", (int)title.n, title.s);
    for (char *s = line; *s; s++)
        if (*s == '_') *s = ' ';
    check(ibid_tokenize(b->x.m->tokenizer, line, strlen(line), false, &head, n_title));
    check(ibid_tokenize(b->x.m->tokenizer, text.s, text.n, false, &body, &n_body));
    int32_t *ids = ibid_calloc(*n_title + n_body + 1, sizeof *ids);
    if (!ids) check(ibid_fail(IBID_NOMEM, "out of memory"));
    for (size_t i = 0; i < *n_title; i++) ids[i] = head[i].id;
    for (size_t i = 0; i < n_body; i++) ids[*n_title + i] = body[i].id;
    *n = *n_title + n_body;
    ibid_free(head);
    ibid_free(body);
    return ids;
}

static void put_tried(bench *b, uint32_t index, const ibid_extracted *x, double ms) {
    json_t *list = json_array();
    for (size_t i = 0; i < x->n; i++) {
        const ibid_tried *t = &x->tried[i];
        const ibid_span *s = &t->span;
        (void)json_array_append_new(list, json_pack("[s%,I,I,I,f,f,f,f]", x->texts[0].s + s->start,
                                                    s->end - s->start, (json_int_t)s->start,
                                                    (json_int_t)s->end, (json_int_t)t->n_tokens,
                                                    s->score, t->first, t->rest, t->stop));
    }
    json_t *line = json_pack("{s:I,s:o,s:f}", "q", (json_int_t)index, "tried", list, "ms", ms);
    (void)json_dumpf(line, b->out, JSON_COMPACT | JSON_REAL_PRECISION(6));
    (void)fputc('\n', b->out);
    json_decref(line);
}

static void try_question(bench *b, uint32_t index, ibid_str question, const ibid_placed_block *p,
                         size_t n_title) {
    ibid_ids prompt;
    ibid_extracted x;
    uint64_t start = ibid_now_ns();
    check(ibid_prompt_extract(b->x.m, question, &prompt));
    ibid_extract_plan plan = {.blocks = p,
                              .n_title = &n_title,
                              .n_blocks = 1,
                              .question = question,
                              .prompt = prompt.ids,
                              .n_prompt = prompt.n,
                              .most = b->most};
    check(ibid_extract_run(&b->x.r, &plan, &x));
    put_tried(b, index, &x, ibid_ms_since(start));
    ibid_extracted_fini(&x);
    ibid_free(prompt.ids);
}

/* ---- Paragraphs ---- */

static void paragraph(bench *b, ibid_str title, const json_t *p, uint32_t *index) {
    ibid_str text = text_of(p, "context");
    ibid_reading t = {0};
    ibid_placed_block placed = {0};
    int32_t *ids = NULL;
    size_t i, n_title = 0, done = 0;
    json_t *qa;
    if (b->model) {
        ids = block_tokens(b, title, text, &n_title, &t.n);
        t.tokens = ids;
        while (done < 1) check(ibid_read_some(&b->x.r, &t, 1, &done, true, NULL, NULL));
        placed =
            (ibid_placed_block){.layers = t.kv.layers, .tokens = ids, .local0 = b->x.r.n_prefix};
    }
    json_array_foreach(json_object_get(p, "qas"), i, qa) {
        ibid_str question = text_of(qa, "question");
        if (b->model)
            try_question(b, (*index)++, question, &placed, n_title);
        else
            put_features(b, (*index)++, question, &text);
    }
    ibid_kv_blob_fini(&t.kv);
    ibid_free(ids);
}

int main(int argc, char **argv) {
    bench b = {0};
    json_error_t err;
    json_t *article, *p;
    size_t i, k;
    uint32_t index = 0;
    b.model = (argc == 5 || argc == 6) && strcmp(argv[2], "tried") == 0;
    b.most = argc == 6 ? (size_t)strtoul(argv[5], NULL, 10) : 0;
    if (!b.model && !(argc == 4 && strcmp(argv[2], "features") == 0)) {
        (void)fprintf(stderr, "usage: bench_extract FILE.json features OUT\n"
                              "       bench_extract FILE.json tried OUT MODEL.gguf [SPANS]\n");
        return 2;
    }
    json_t *root = json_load_file(argv[1], 0, &err);
    if (!root) check(ibid_fail(IBID_INVAL, "%s: %s", argv[1], err.text));
    if (!(b.out = fopen(argv[3], "wb"))) check(ibid_fail(IBID_IO, "cannot write %s", argv[3]));
    if (b.model)
        check(ready_open(&b.x, argv[4], &(ibid_engine_opts){.int8 = true}, &ibid_wording_default));
    json_array_foreach(json_object_get(root, "data"), i, article)
        json_array_foreach(json_object_get(article, "paragraphs"), k, p)
            paragraph(&b, text_of(article, "title"), p, &index);
    if (fclose(b.out) != 0) check(ibid_fail(IBID_IO, "cannot write %s", argv[3]));
    json_decref(root);
    if (b.model) ready_close(&b.x);
    return 0;
}
