#include "rpc/front/eval/data.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const size_t arena_max = (size_t)8 << 30;

/* ---- building a set ---- */

static ibid_err begin(ibidi_set *s) {
    *s = (ibidi_set){0};
    return ibid_arena_open(arena_max, &s->arena);
}

void ibidi_set_fini(ibidi_set *s) {
    ibid_arena_close(s->arena);
    ibid_free(s->questions);
    ibid_free(s->documents);
    *s = (ibidi_set){0};
}

void ibidi_set_limit(ibidi_set *s, size_t n) {
    if (n == 0 || n >= s->n_questions) return;
    for (size_t i = 0; i < n; i++) s->questions[i] = s->questions[i * s->n_questions / n];
    s->n_questions = n;
}

/* Room for one more item of an array. */
static void *grown(void *items, size_t n, size_t *room, size_t size) {
    if (n < *room) return items;
    size_t more = *room ? 2 * *room : 256, bytes;
    if (!ibid_mul_size(more, size, &bytes)) return NULL;
    void *p = ibid_realloc(items, bytes);
    if (p) *room = more;
    return p;
}

static ibidi_question *add_question(ibidi_set *s) {
    ibidi_question *q =
        grown(s->questions, s->n_questions, &s->room_questions, sizeof *s->questions);
    if (!q) return NULL;
    s->questions = q;
    q += s->n_questions++;
    return memset(q, 0, sizeof *q);
}

static ibidi_source *add_document(ibidi_set *s) {
    ibidi_source *d = grown(s->documents, s->n_documents, &s->room_documents, sizeof *s->documents);
    if (!d) return NULL;
    s->documents = d;
    d += s->n_documents++;
    return memset(d, 0, sizeof *d);
}

static ibid_str keep(ibidi_set *s, const json_t *text) {
    size_t n = json_string_length(text);
    return (ibid_str){ibid_arena_copy(s->arena, json_string_value(text), n), n};
}

static ibid_err write_document(FILE *f, const char *id, const json_t *title, const json_t *text,
                               json_t *metadata) {
    json_t *j = json_object();
    int bad = json_object_set_new(j, "id", json_string(id));
    if (json_is_string(title)) bad |= json_object_set(j, "title", (json_t *)(uintptr_t)title);
    bad |= json_object_set(j, "text", (json_t *)(uintptr_t)text);
    if (metadata) bad |= json_object_set_new(j, "metadata", metadata);
    if (!bad) bad = json_dumpf(j, f, JSON_COMPACT) != 0 || fputc('\n', f) == EOF;
    json_decref(j);
    return bad ? ibid_fail_errno(errno, "cannot write the documents for", "indexing") : IBID_OK;
}

static ibid_err finish_file(FILE *f, const char *path, ibid_err e) {
    if (f && fclose(f) != 0 && !e) e = ibid_fail_errno(errno, "cannot write", path);
    return e;
}

/* ---- lines ---- */

struct reader {
    const char *path;
    size_t line;
    ibidi_set *set;
    FILE *out;
};

typedef ibid_err line_fn(struct reader *r, char *line, size_t n);

static ibid_err each_line(struct reader *r, line_fn *fn) {
    FILE *f = fopen(r->path, "r");
    if (!f) return ibid_fail_errno(errno, "cannot read", r->path);
    char *line = NULL;
    size_t room = 0;
    ibid_err e = IBID_OK;
    for (ssize_t n; !e && (n = getline(&line, &room, f)) >= 0;) {
        r->line++;
        if (line[strspn(line, " \t\r\n")] != '\0') e = fn(r, line, (size_t)n);
    }
    if (!e && ferror(f)) e = ibid_fail_errno(errno, "cannot read", r->path);
    free(line);
    (void)fclose(f);
    return e;
}

static ibid_err bad_line(const struct reader *r, const char *what) {
    return ibid_fail(IBID_INVAL, "%s:%zu: %s", r->path, r->line, what);
}

static ibid_err object_of(const struct reader *r, const char *line, size_t n, json_t **out) {
    json_error_t why;
    *out = json_loadb(line, n, 0, &why);
    if (*out && json_is_object(*out)) return IBID_OK;
    return bad_line(r, *out ? "not a JSON object" : why.text);
}

/* ---- BEIR ---- */

static ibid_err corpus_line(struct reader *r, char *line, size_t n) {
    json_t *j = NULL;
    ibidi_source *d = NULL;
    ibid_err e = object_of(r, line, n, &j);
    const json_t *id = json_object_get(j, "_id"), *text = json_object_get(j, "text");
    if (!e && (!json_is_string(id) || !json_is_string(text)))
        e = bad_line(r, "a document needs \"_id\" and \"text\", both strings");
    if (!e && !(d = add_document(r->set))) e = IBID_NOMEM;
    if (!e && !(d->id = keep(r->set, id).s)) e = IBID_NOMEM;
    if (!e) e = write_document(r->out, d->id, json_object_get(j, "title"), text, NULL);
    json_decref(j);
    return e;
}

static ibid_err query_line(struct reader *r, char *line, size_t n) {
    json_t *j = NULL;
    ibidi_question *q = NULL;
    ibid_err e = object_of(r, line, n, &j);
    const json_t *id = json_object_get(j, "_id"), *text = json_object_get(j, "text");
    if (!e && (!json_is_string(id) || !json_is_string(text)))
        e = bad_line(r, "a query needs \"_id\" and \"text\", both strings");
    if (!e && !(q = add_question(r->set))) e = IBID_NOMEM;
    if (!e) {
        q->id = keep(r->set, id).s;
        q->text = keep(r->set, text);
        if (!q->id || !q->text.s) e = IBID_NOMEM;
    }
    json_decref(j);
    return e;
}

static int by_question(const void *a, const void *b) {
    return strcmp(((const ibidi_question *)a)->id, ((const ibidi_question *)b)->id);
}

static int by_document(const void *a, const void *b) {
    return strcmp(((const ibidi_source *)a)->id, ((const ibidi_source *)b)->id);
}

static int by_judged(const void *a, const void *b) {
    return strcmp(((const ibidi_judged *)a)->document, ((const ibidi_judged *)b)->document);
}

/* One judgement. The questions are sorted by id; their lists grow by doubling in the arena. */
static ibid_err qrels_line(struct reader *r, char *line, size_t n) {
    (void)n;
    char *rest = NULL, *query = strtok_r(line, "\t\r\n", &rest);
    char *document = strtok_r(NULL, "\t\r\n", &rest), *score = strtok_r(NULL, "\t\r\n", &rest);
    if (!query || !document || !score)
        return bad_line(r, "not three columns parted by tabs: query-id, corpus-id, score");
    char *end = NULL;
    double gain = strtod(score, &end);
    if (end == score || *end || !isfinite(gain)) {
        if (r->line == 1) return IBID_OK; /* the header */
        return bad_line(r, "the score is not a number");
    }
    ibidi_question key = {.id = query};
    ibidi_question *q =
        bsearch(&key, r->set->questions, r->set->n_questions, sizeof key, by_question);
    if (!q || gain <= 0) return IBID_OK; /* judged for a query not asked here; or not relevant */
    ibidi_source sought = {.id = document},
                 *d = bsearch(&sought, r->set->documents, r->set->n_documents, sizeof sought,
                              by_document);
    r->set->missing += d == NULL;
    size_t have = q->n_judged;
    if ((have & (have - 1)) == 0) { /* a power of two, or none: the list is full */
        ibidi_judged *more = ibid_arena_alloc(r->set->arena, (have ? 2 * have : 1) * sizeof *more);
        if (!more) return IBID_NOMEM;
        if (have) memcpy(more, q->judged, have * sizeof *more);
        q->judged = more;
    }
    const char *id = d ? d->id : ibid_arena_copy(r->set->arena, document, strlen(document));
    if (!id) return IBID_NOMEM;
    q->judged[q->n_judged++] = (ibidi_judged){id, gain};
    return IBID_OK;
}

static ibid_err unique(const char *path, const char *what, const char *a, const char *b) {
    return strcmp(a, b) == 0
               ? ibid_fail(IBID_INVAL, "%s: the %s \"%s\" stands there twice", path, what, a)
               : IBID_OK;
}

/* Sorts the judgements, refuses doubled ones, drops questions without any. */
static ibid_err finish_questions(ibidi_set *s, const char *qrels) {
    size_t kept = 0;
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < s->n_questions; i++) {
        ibidi_question *q = &s->questions[i];
        if (q->n_judged == 0) continue;
        qsort(q->judged, q->n_judged, sizeof *q->judged, by_judged);
        for (size_t k = 1; !e && k < q->n_judged; k++)
            if (strcmp(q->judged[k - 1].document, q->judged[k].document) == 0)
                e = ibid_fail(IBID_INVAL, "%s: query \"%s\" judges document \"%s\" twice", qrels,
                              q->id, q->judged[k].document);
        s->questions[kept++] = *q;
    }
    s->unjudged = s->n_questions - kept;
    s->n_questions = kept;
    if (!e && kept == 0)
        e = ibid_fail(IBID_INVAL, "%s: no query of the query file has a relevant document there",
                      qrels);
    return e;
}

ibid_err ibidi_set_beir(const char *corpus, const char *queries, const char *qrels,
                        const char *jsonl, ibidi_set *out) {
    ibid_err e = begin(out);
    if (e) return e;
    struct reader r = {.path = corpus, .set = out, .out = fopen(jsonl, "w")};
    if (!r.out) e = ibid_fail_errno(errno, "cannot write", jsonl);
    if (!e) e = each_line(&r, corpus_line);
    e = finish_file(r.out, jsonl, e);
    if (!e && out->n_documents == 0) e = ibid_fail(IBID_INVAL, "%s: no documents in it", corpus);
    if (!e) {
        qsort(out->documents, out->n_documents, sizeof *out->documents, by_document);
        for (size_t i = 1; !e && i < out->n_documents; i++)
            e = unique(corpus, "document", out->documents[i - 1].id, out->documents[i].id);
    }
    r = (struct reader){.path = queries, .set = out};
    if (!e) e = each_line(&r, query_line);
    if (!e && out->n_questions) {
        qsort(out->questions, out->n_questions, sizeof *out->questions, by_question);
        for (size_t i = 1; !e && i < out->n_questions; i++)
            e = unique(queries, "query", out->questions[i - 1].id, out->questions[i].id);
    }
    r = (struct reader){.path = qrels, .set = out};
    if (!e) e = each_line(&r, qrels_line);
    if (!e) e = finish_questions(out, qrels);
    if (e) ibidi_set_fini(out);
    return e;
}

/* ---- SQuAD ---- */

static ibid_err squad_question(ibidi_set *s, const char *path, const json_t *qa, size_t document) {
    const json_t *id = json_object_get(qa, "id"), *text = json_object_get(qa, "question");
    const json_t *answers = json_object_get(qa, "answers");
    if (json_is_true(json_object_get(qa, "is_impossible"))) return IBID_OK;
    if (!json_is_string(id) || !json_is_string(text) || !json_is_array(answers))
        return ibid_fail(IBID_INVAL,
                         "%s: a question of paragraph %s lacks \"id\", \"question\" or \"answers\"",
                         path, s->documents[document].id);
    size_t n = json_array_size(answers);
    ibidi_question *q = add_question(s);
    ibid_str *golds = ibid_arena_alloc(s->arena, (n + 1) * sizeof *golds);
    ibidi_judged *judged = ibid_arena_alloc(s->arena, sizeof *judged);
    if (!q || !golds || !judged) return IBID_NOMEM;
    *judged = (ibidi_judged){s->documents[document].id, 1};
    *q = (ibidi_question){keep(s, id).s, keep(s, text), judged, 1, golds, n, document};
    if (!q->id || !q->text.s) return IBID_NOMEM;
    for (size_t i = 0; i < n; i++) {
        const json_t *t = json_object_get(json_array_get(answers, i), "text");
        if (!json_is_string(t))
            return ibid_fail(IBID_INVAL, "%s: question %s has an answer without \"text\"", path,
                             q->id);
        if (!(golds[i] = keep(s, t)).s) return IBID_NOMEM;
    }
    return IBID_OK;
}

static json_t *group_metadata(size_t own, size_t groups) {
    json_t *m = groups ? json_object() : NULL;
    for (size_t g = 0; g < groups; g++) {
        char key[24];
        (void)snprintf(key, sizeof key, "not%zu", g);
        if (g != own) (void)json_object_set_new(m, key, json_string("1"));
    }
    return m;
}

static ibid_err squad_paragraph(ibidi_set *s, const char *path, FILE *f, const json_t *paragraph,
                                const json_t *title, size_t a, size_t p, size_t groups) {
    const json_t *context = json_object_get(paragraph, "context"),
                 *qas = json_object_get(paragraph, "qas"), *qa;
    size_t i, number = s->n_documents;
    char name[48];
    (void)snprintf(name, sizeof name, "p%03zu-%03zu", a, p);
    if (!json_is_string(context) || !json_is_array(qas))
        return ibid_fail(IBID_INVAL, "%s: paragraph %s lacks \"context\" or \"qas\"", path, name);
    ibidi_source *d = add_document(s);
    if (!d || !(d->id = ibid_arena_copy(s->arena, name, strlen(name)))) return IBID_NOMEM;
    json_t *m = group_metadata(groups ? number % groups : 0, groups);
    ibid_err e = write_document(f, d->id, title, context, m);
    json_array_foreach(qas, i, qa) if (!e) e = squad_question(s, path, qa, number);
    return e;
}

/* An article's title, its underscores as spaces; NULL without one. */
static json_t *spaced(const json_t *title) {
    if (!json_is_string(title)) return NULL;
    char *copy = ibid_strdup(json_string_value(title));
    for (char *c = copy; c && *c; c++)
        if (*c == '_') *c = ' ';
    json_t *j = json_string(copy);
    ibid_free(copy);
    return j;
}

ibid_err ibidi_set_squad(const char *path, size_t groups, const char *jsonl, ibidi_set *out) {
    json_error_t why;
    json_t *root = NULL, *article, *paragraph, *title = NULL;
    FILE *f = NULL;
    size_t a, p;
    ibid_err e = begin(out);
    if (e) return e;
    root = json_load_file(path, 0, &why);
    const json_t *data = json_object_get(root, "data");
    if (!root)
        e = ibid_fail(IBID_INVAL, "%s:%d: %s", path, why.line, why.text);
    else if (!json_is_array(data))
        e = ibid_fail(IBID_INVAL, "%s: no array \"data\"; SQuAD layout has one", path);
    else if (!(f = fopen(jsonl, "w")))
        e = ibid_fail_errno(errno, "cannot write", jsonl);
    if (e) goto done;
    json_array_foreach(data, a, article) {
        title = spaced(json_object_get(article, "title"));
        json_array_foreach(json_object_get(article, "paragraphs"), p, paragraph) if (!e) e =
            squad_paragraph(out, path, f, paragraph, title, a, p, groups);
        json_decref(title);
    }
    if (!e && out->n_questions == 0) e = ibid_fail(IBID_INVAL, "%s: no questions in it", path);
done:
    e = finish_file(f, jsonl, e);
    json_decref(root);
    if (e) ibidi_set_fini(out);
    return e;
}

/* ---- KTRL+F ---- */

static bool among(const json_t *list, const json_t *text) {
    size_t i;
    json_t *t;
    json_array_foreach(list, i, t) if (json_equal(t, text)) return true;
    return false;
}

/* The mentions of `info` whose entity is in `entities` (NULL: all). */
static ibid_err mentions(struct reader *r, const json_t *info, const json_t *entities,
                         const ibid_str **out, size_t *n) {
    ibid_str *list = ibid_arena_alloc(r->set->arena, (json_array_size(info) + 1) * sizeof *list);
    size_t i;
    json_t *m;
    *n = 0;
    if (!list) return IBID_NOMEM;
    json_array_foreach(info, i, m) {
        const json_t *text = json_object_get(m, "mention"), *entity = json_object_get(m, "entity");
        if (!json_is_string(text) || !json_is_string(entity))
            return bad_line(r, "an item of \"entity_info\" lacks \"mention\" or \"entity\"");
        if (entities && !among(entities, entity)) continue;
        if (!(list[(*n)++] = keep(r->set, text)).s) return IBID_NOMEM;
    }
    *out = list;
    return IBID_OK;
}

static ibid_err ktrlf_question(struct reader *r, const json_t *pair, const json_t *info,
                               size_t document, size_t number) {
    const json_t *text = json_object_get(pair, "question"),
                 *targets = json_object_get(pair, "target_entities");
    char name[64];
    if (!json_is_string(text) || !json_is_array(targets))
        return bad_line(r, "an item of \"qa_pairs\" lacks \"question\" or \"target_entities\"");
    int n = snprintf(name, sizeof name, "%s-%zu", r->set->documents[document].id, number);
    ibidi_question *q = add_question(r->set);
    if (!q) return IBID_NOMEM;
    q->id = ibid_arena_copy(r->set->arena, name, (size_t)n);
    q->text = keep(r->set, text);
    q->document = document;
    if (!q->id || !q->text.s) return IBID_NOMEM;
    return mentions(r, info, targets, &q->golds, &q->n_golds);
}

static ibid_err ktrlf_line(struct reader *r, char *line, size_t n) {
    json_t *j = NULL, *pair;
    char name[32];
    size_t i, number = r->set->n_documents;
    ibidi_source *d = NULL;
    ibid_err e = object_of(r, line, n, &j);
    const json_t *data = json_object_get(j, "data"), *text = json_object_get(data, "target_text"),
                 *info = json_object_get(data, "entity_info"),
                 *pairs = json_object_get(data, "qa_pairs");
    if (!e && (!json_is_string(text) || !json_is_array(info) || !json_is_array(pairs)))
        e = bad_line(r, "\"data\" lacks \"target_text\", \"entity_info\" or \"qa_pairs\"");
    if (!e && !(d = add_document(r->set))) e = IBID_NOMEM;
    if (!e) {
        int len = snprintf(name, sizeof name, "k%04zu", number);
        d->id = ibid_arena_copy(r->set->arena, name, (size_t)len);
        d->text = keep(r->set, text);
        e = d->id && d->text.s ? mentions(r, info, NULL, &d->mentions, &d->n_mentions) : IBID_NOMEM;
    }
    if (!e) e = write_document(r->out, name, NULL, text, NULL);
    json_array_foreach(pairs, i, pair) if (!e) e = ktrlf_question(r, pair, info, number, i);
    json_decref(j);
    return e;
}

ibid_err ibidi_set_ktrlf(const char *path, const char *jsonl, ibidi_set *out) {
    ibid_err e = begin(out);
    if (e) return e;
    struct reader r = {.path = path, .set = out, .out = fopen(jsonl, "w")};
    if (!r.out) e = ibid_fail_errno(errno, "cannot write", jsonl);
    if (!e) e = each_line(&r, ktrlf_line);
    e = finish_file(r.out, jsonl, e);
    if (!e && out->n_questions == 0) e = ibid_fail(IBID_INVAL, "%s: no questions in it", path);
    if (e) ibidi_set_fini(out);
    return e;
}
