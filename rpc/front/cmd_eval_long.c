#include "attention/attention.h"
#include "rpc/base/clock.h"
#include "rpc/front/cmd_eval.h"
#include "rpc/front/eval/needles.h"
#include "rpc/front/eval/svg.h"
#include "rpc/front/files.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* One document a length: the book's beginning, with every needle in it. Needle i stands at depth
 * (i + 0.5) / n in a shuffled order, so each tenth of the book holds as many; the book's chunks
 * between needles are the same at every length, and the store keeps one copy of their KV. */
enum { LENGTHS_MAX = 16, DEPTHS = 10, TOP = 5, BOOK_MAX = 30 << 20 };
enum kind { ALIKE, APART, THREAD, KINDS };
static const char *const kind_names[KINDS] = {"alike", "apart", "thread"};

/* Where a statement came to stand. */
struct place {
    ibid_str statement;
    double depth; /* 0..1 */
    uint64_t start, end;
};

struct cell { /* of one length, system, kind and depth */
    double questions, first, five;
    double followed; /* threads: both parts among the best five of one search or of a second one */
};

struct longer {
    ibidi_eval ev;
    ibidi_needles needles;
    ibid_buf book;
    ibid_tokens tokens; /* of the book */
    uint64_t lengths[LENGTHS_MAX];
    size_t n_lengths;
    const ibidi_system *systems[IBIDI_SYSTEMS_MAX];
    size_t n_systems;
    struct place *places; /* statements: facts, then each thread's two */
    size_t n_places;
    struct cell *cells; /* [length, system, kind, depth] */
    double *ms;         /* [length, system] sum; [.., 1] count */
};

static struct cell *cell(const struct longer *t, size_t length, size_t system, enum kind k,
                         size_t depth) {
    return &t->cells[((length * t->n_systems + system) * KINDS + k) * DEPTHS + depth];
}

/* ---- the book ---- */

static ibid_err read_lengths(struct longer *t, const char *text) {
    for (const char *p = text ? text : "100000"; *p;) {
        char *end = NULL;
        errno = 0;
        unsigned long long v = strtoull(p, &end, 10);
        if (errno || end == p || *p == '-' || v < 1000 || (*end && *end != ','))
            return ibid_fail(IBID_INVAL,
                             "--lengths: \"%s\" is no list of numbers of tokens, each "
                             "at least 1000, parted by commas",
                             text);
        if (t->n_lengths == LENGTHS_MAX)
            return ibid_fail(IBID_INVAL, "--lengths: at most %d of them", LENGTHS_MAX);
        t->lengths[t->n_lengths++] = v;
        p = end + (*end == ',');
    }
    return t->n_lengths ? IBID_OK : ibid_fail(IBID_INVAL, "--lengths: none given");
}

static ibid_err read_book(struct longer *t) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < t->ev.o.books.n; i++) {
        e = ibidi_append_file(t->ev.o.books.v[i], &t->book);
        if (!e) e = ibid_buf_puts(&t->book, "\n\n");
    }
    return e;
}

/* Tokens of the book, and enough of it for the longest length: a short book is told again. */
static ibid_err tokenize(struct longer *t) {
    ibid_model_info m;
    uint64_t most = 0, once = t->book.len;
    for (size_t i = 0; i < t->n_lengths; i++)
        if (t->lengths[i] > most) most = t->lengths[i];
    ibid_err e = ibid_attn_model_info(t->ev.s.attention, t->ev.o.model ? t->ev.o.model : "", &m);
    ibid_str text = {t->book.data, t->book.len};
    if (!e) e = ibid_attn_tokenize(t->ev.s.attention, &m.fingerprint, text, &t->tokens);
    if (e || t->tokens.n >= most) return e;
    ibidi_eval_say(&t->ev,
                   "the book has %zu tokens and is told again up to %llu: a passage told twice "
                   "stands twice in a ranking; --book OTHER.txt reads on elsewhere",
                   t->tokens.n, (unsigned long long)most);
    uint64_t times = most / (t->tokens.n ? t->tokens.n : 1) + 1;
    for (uint64_t k = 1; !e && k < times; k++) {
        e = ibid_buf_reserve(&t->book, (size_t)once);
        if (!e) e = ibid_buf_append(&t->book, t->book.data, (size_t)once);
    }
    ibid_free(t->tokens.ids);
    t->tokens = (ibid_tokens){0};
    text = (ibid_str){t->book.data, t->book.len};
    return e ? e : ibid_attn_tokenize(t->ev.s.attention, &m.fingerprint, text, &t->tokens);
}

/* Where a sentence ends at or after byte `at`: behind ". " or ".\n", outside of which a needle
 * would break a sentence in two. */
static size_t sentence_end(const ibid_buf *b, size_t at, size_t end) {
    for (size_t i = at; i + 1 < end; i++)
        if ((b->data[i] == '.' || b->data[i] == '!' || b->data[i] == '?') &&
            (b->data[i + 1] == ' ' || b->data[i + 1] == '\n'))
            return i + 1;
    return end;
}

static int by_depth(const void *a, const void *b) {
    double x = ((const struct place *)a)->depth, y = ((const struct place *)b)->depth;
    return (x > y) - (x < y);
}

/* A depth for every statement, the same at every length. */
static ibid_err place_needles(struct longer *t) {
    const ibidi_needles *n = &t->needles;
    uint64_t seed = IBIDI_EVAL_SEED;
    t->n_places = n->n_facts + 2 * n->n_threads;
    t->places = ibid_calloc(t->n_places, sizeof *t->places);
    size_t *order = ibid_calloc(t->n_places, sizeof *order);
    if (!t->places || !order) {
        ibid_free(order);
        return IBID_NOMEM;
    }
    for (size_t i = 0; i < t->n_places; i++) {
        size_t k = ibidi_random(&seed) % (i + 1);
        order[i] = order[k];
        order[k] = i;
    }
    for (size_t i = 0; i < t->n_places; i++) {
        size_t k = i < n->n_facts ? 0 : i - n->n_facts;
        t->places[i].statement = i < n->n_facts ? n->facts[i].statement
                                 : k % 2 == 0   ? n->threads[k / 2].first
                                                : n->threads[k / 2].second;
        t->places[i].depth = ((double)order[i] + 0.5) / (double)t->n_places;
    }
    ibid_free(order);
    return IBID_OK;
}

/* Writes the book's first `length` tokens with all needles. */
static ibid_err write_book(struct longer *t, uint64_t length, const char *path) {
    struct place *sorted = ibid_calloc(t->n_places, sizeof *sorted);
    size_t n = length < t->tokens.n ? (size_t)length : t->tokens.n, at = 0;
    size_t end = (size_t)t->tokens.ends[n - 1];
    if (!sorted) return IBID_NOMEM;
    memcpy(sorted, t->places, t->n_places * sizeof *sorted);
    qsort(sorted, t->n_places, sizeof *sorted, by_depth);
    FILE *f = fopen(path, "w");
    ibid_err e = f ? IBID_OK : ibid_fail_errno(errno, "cannot write", path);
    for (size_t i = 0; !e && i < t->n_places; i++) {
        size_t token = (size_t)(sorted[i].depth * (double)n);
        size_t from = token ? (size_t)t->tokens.ends[token - 1] : 0;
        size_t to = sentence_end(&t->book, from > at ? from : at, end);
        if (fwrite(t->book.data + at, 1, to - at, f) != to - at ||
            fprintf(f, " %.*s", (int)sorted[i].statement.n, sorted[i].statement.s) < 0)
            e = ibid_fail_errno(errno, "cannot write", path);
        at = to;
    }
    if (!e && fwrite(t->book.data + at, 1, end - at, f) != end - at)
        e = ibid_fail_errno(errno, "cannot write", path);
    if (f && fclose(f) != 0 && !e) e = ibid_fail_errno(errno, "cannot write", path);
    ibid_free(sorted);
    return e;
}

/* Finds every needle in the stored text: hits carry its byte ranges. */
static ibid_err locate(struct longer *t, const char *path) {
    ibid_snap *n = NULL;
    ibid_document d;
    ibid_buf text;
    char *real = realpath(path, NULL);
    ibid_buf_init(&text, (size_t)1 << 30);
    ibid_err e = real ? ibidi_service_store(&t->ev.s) : ibid_fail_errno(errno, "cannot read", path);
    if (!e) e = ibid_snap_begin(t->ev.s.store, &n);
    if (!e) e = ibid_snap_document(n, ibidi_str(t->ev.collection), ibidi_str(real), &d);
    if (!e) e = ibid_snap_text(n, d.number, &text);
    for (size_t i = 0; !e && i < t->n_places; i++) {
        struct place *p = &t->places[i];
        const char *at = memmem(text.data, text.len, p->statement.s, p->statement.n);
        if (!at)
            e = ibid_fail(IBID_INTERNAL, "the needle \"%.*s\" is not in the stored text",
                          (int)p->statement.n, p->statement.s);
        else
            p->start = (uint64_t)(at - text.data), p->end = p->start + p->statement.n;
    }
    ibid_snap_end(n);
    ibid_buf_fini(&text);
    free(real);
    return e;
}

/* ---- searching ---- */

/* Rank (from 0) of the first hit that holds at least half of the needle; TOP when none does. */
static size_t rank_of(const ibid_search_result *res, const struct place *p) {
    for (size_t i = 0; i < res->n && i < TOP; i++) {
        uint64_t from = res->hits[i].start > p->start ? res->hits[i].start : p->start;
        uint64_t to = res->hits[i].end < p->end ? res->hits[i].end : p->end;
        if (to > from && 2 * (to - from) >= p->end - p->start) return i;
    }
    return TOP;
}

static ibid_err search(struct longer *t, size_t length, size_t system, ibid_str question,
                       ibid_search_result *res) {
    ibid_search_request q = {.collection = ibidi_str(t->ev.collection),
                             .question = question,
                             .chunks = true,
                             .top = TOP};
    t->systems[system]->set(&q);
    uint64_t start = ibid_now_ns();
    ibid_err e = ibidi_search(&t->ev.s, &q, res);
    double *ms = &t->ms[2 * (length * t->n_systems + system)];
    ms[0] += ibid_ms_since(start);
    ms[1]++;
    return e;
}

static ibid_err ask_fact(struct longer *t, size_t length, size_t system, enum kind k, size_t i) {
    const ibidi_fact *f = &t->needles.facts[i];
    const struct place *p = &t->places[i];
    ibid_search_result res = {0};
    ibid_err e = search(t, length, system, k == ALIKE ? f->alike : f->apart, &res);
    if (e) return e;
    size_t rank = rank_of(&res, p);
    struct cell *c = cell(t, length, system, k, (size_t)(p->depth * DEPTHS));
    c->questions++;
    c->first += rank == 0;
    c->five += rank < TOP;
    ibid_err wrote = ibidi_eval_line(
        &t->ev, json_pack("{s:I,s:s,s:s,s:o,s:f,s:I}", "length", (json_int_t)t->lengths[length],
                          "system", t->systems[system]->name, "kind", kind_names[k], "question",
                          ibidi_json_str(k == ALIKE ? f->alike : f->apart), "depth", p->depth,
                          "rank", (json_int_t)(rank < TOP ? rank + 1 : 0)));
    ibid_search_result_close(&res);
    return wrote;
}

/* A thread's second part names what only the first part says. One search sees how far that carries;
 * then, where it found the first part, a second one asks the question together with it. Counted:
 * the first part, both parts among the best five of one search, both among those of either search.
 */
static ibid_err ask_thread(struct longer *t, size_t length, size_t system, size_t i) {
    const struct place *a = &t->places[t->needles.n_facts + 2 * i], *b = a + 1;
    ibid_str question = t->needles.threads[i].question;
    ibid_search_result one = {0}, two = {0};
    ibid_buf q;
    ibid_buf_init(&q, 1 << 20);
    ibid_err e = search(t, length, system, question, &one);
    size_t ra = TOP, rb = TOP, rb2 = TOP;
    if (!e) {
        ra = rank_of(&one, a);
        rb = rank_of(&one, b);
        e = ibid_buf_append(&q, question.s, question.n);
    }
    if (!e && ra < TOP) { /* what a reader would ask next, who had found the first part */
        e = ibid_buf_puts(&q, " ");
        if (!e) e = ibid_buf_append(&q, a->statement.s, a->statement.n);
        if (!e) e = search(t, length, system, (ibid_str){q.data, q.len}, &two);
        if (!e) rb2 = rank_of(&two, b);
    }
    struct cell *c = cell(t, length, system, THREAD, (size_t)(b->depth * DEPTHS));
    c->questions++;
    c->first += ra < TOP;
    c->five += ra < TOP && rb < TOP;
    c->followed += ra < TOP && (rb < TOP || rb2 < TOP);
    ibid_search_result_close(&one);
    ibid_search_result_close(&two);
    ibid_buf_fini(&q);
    return e;
}

static ibid_err measure(struct longer *t, size_t length) {
    ibid_search_result res = {0};
    uint64_t said = 0;
    size_t done = 0, all = t->n_systems * (2 * t->needles.n_facts + t->needles.n_threads);
    ibid_err e = IBID_OK;
    for (size_t s = 0; !e && s < t->n_systems; s++) {
        e = search(t, length, s, t->needles.facts[0].alike, &res); /* fills the caches */
        ibid_search_result_close(&res);
        res = (ibid_search_result){0};
        t->ms[2 * (length * t->n_systems + s)] = t->ms[2 * (length * t->n_systems + s) + 1] = 0;
        for (enum kind k = ALIKE; k <= APART; k++)
            for (size_t i = 0; !e && i < t->needles.n_facts; i++) {
                if (!(e = ibidi_eval_go_on())) e = ask_fact(t, length, s, k, i);
                ibidi_eval_progress(&t->ev, &said, "searches", ++done, all);
            }
        for (size_t i = 0; !e && i < t->needles.n_threads; i++) {
            if (!(e = ibidi_eval_go_on())) e = ask_thread(t, length, s, i);
            ibidi_eval_progress(&t->ev, &said, "searches", ++done, all);
        }
    }
    return e;
}

static ibid_err one_length(struct longer *t, size_t length) {
    char path[128];
    (void)snprintf(path, sizeof path, "%s/book-%llu.txt", t->ev.folder,
                   (unsigned long long)t->lengths[length]);
    (void)snprintf(t->ev.collection, sizeof t->ev.collection, "eval-long-%d-%llu", (int)getpid(),
                   (unsigned long long)t->lengths[length]);
    ibid_err e = write_book(t, t->lengths[length], path);
    if (!e) e = ibidi_eval_index_file(&t->ev, path);
    if (!e) e = locate(t, path);
    return e ? e : measure(t, length);
}

/* ---- output ---- */

static struct cell sum(const struct longer *t, size_t length, size_t system, enum kind k) {
    struct cell all = {0};
    for (size_t d = 0; d < DEPTHS; d++) {
        const struct cell *c = cell(t, length, system, k, d);
        all.questions += c->questions;
        all.first += c->first;
        all.five += c->five;
        all.followed += c->followed;
    }
    return all;
}

static double share(double part, double of) {
    return of > 0 ? part / of : 0;
}

static double mean_ms(const struct longer *t, size_t length, size_t system) {
    const double *ms = &t->ms[2 * (length * t->n_systems + system)];
    return share(ms[0], ms[1]);
}

static json_t *row_json(const struct longer *t, size_t l, size_t s, enum kind k) {
    struct cell c = sum(t, l, s, k);
    json_t *depths = json_array();
    for (size_t d = 0; d < DEPTHS; d++) {
        const struct cell *one = cell(t, l, s, k, d);
        (void)json_array_append_new(
            depths, one->questions > 0 ? json_real(one->five / one->questions) : json_null());
    }
    json_t *j = json_pack("{s:I,s:s,s:s,s:I,s:f,s:o,s:f}", "length", (json_int_t)t->lengths[l],
                          "system", t->systems[s]->name, "kind", kind_names[k], "questions",
                          (json_int_t)c.questions, "recall5", share(c.five, c.questions),
                          "recall5_by_depth", depths, "ms", mean_ms(t, l, s));
    double first = share(c.first, c.questions);
    (void)json_object_set_new(j, k == THREAD ? "first_part" : "recall1", json_real(first));
    if (k == THREAD)
        (void)json_object_set_new(j, "two_searches", json_real(share(c.followed, c.questions)));
    return j;
}

static void print_tables(const struct longer *t) {
    printf("%zu needles, %zu threads; recall among chunks of one book\n\n", t->needles.n_facts,
           t->needles.n_threads);
    printf("%s%9s  %-10s %8s %8s %8s %8s | %8s %8s %8s | %7s%s\n", ibidi_bold(), "tokens", "system",
           "alike@1", "alike@5", "apart@1", "apart@5", "1st@5", "both@5", "2 steps", "ms",
           ibidi_plain());
    for (size_t l = 0; l < t->n_lengths; l++)
        for (size_t s = 0; s < t->n_systems; s++) {
            struct cell a = sum(t, l, s, ALIKE), b = sum(t, l, s, APART), c = sum(t, l, s, THREAD);
            printf("%9llu  %-10s %8.3f %8.3f %8.3f %8.3f | %8.3f %8.3f %8.3f | %7.1f\n",
                   (unsigned long long)t->lengths[l], t->systems[s]->name,
                   share(a.first, a.questions), share(a.five, a.questions),
                   share(b.first, b.questions), share(b.five, b.questions),
                   share(c.first, c.questions), share(c.five, c.questions),
                   share(c.followed, c.questions), mean_ms(t, l, s));
        }
    printf("\nalike: the question has the needle's words. apart: none of them. Threads: the first "
           "of two\nstatements among the best five; both; both when a second search adds the first "
           "statement\nto the question.\n");
}

static ibid_err draw(const struct longer *t) {
    enum { PANELS_MAX = 2 * IBIDI_SYSTEMS_MAX };
    ibidi_panel panels[PANELS_MAX];
    char titles[PANELS_MAX][64], columns[LENGTHS_MAX][24], rows[DEPTHS][24];
    const char *column[LENGTHS_MAX], *row[DEPTHS];
    size_t n_cells = DEPTHS * t->n_lengths, p = 0;
    double *values = ibid_calloc(PANELS_MAX * n_cells, sizeof *values);
    ibid_buf svg;
    ibid_buf_init(&svg, 16 << 20);
    if (!values) return IBID_NOMEM;
    for (size_t l = 0; l < t->n_lengths; l++) {
        (void)snprintf(columns[l], sizeof columns[l], "%llu", (unsigned long long)t->lengths[l]);
        column[l] = columns[l];
    }
    for (size_t d = 0; d < DEPTHS; d++) {
        (void)snprintf(rows[d], sizeof rows[d], "%zu %%", 100 * d / DEPTHS);
        row[d] = rows[d];
    }
    for (enum kind k = ALIKE; k <= APART; k++)
        for (size_t s = 0; s < t->n_systems; s++, p++) {
            double *v = values + p * n_cells;
            (void)snprintf(titles[p], sizeof titles[p], "%s, %s", t->systems[s]->name,
                           k == ALIKE ? "words in common" : "no word in common");
            panels[p] = (ibidi_panel){titles[p], v};
            for (size_t d = 0; d < DEPTHS; d++)
                for (size_t l = 0; l < t->n_lengths; l++) {
                    const struct cell *c = cell(t, l, s, k, d);
                    v[d * t->n_lengths + l] = c->questions > 0 ? c->five / c->questions : -1;
                }
        }
    ibidi_grid g = {"Needles in a book: recall@5",
                    "tokens",
                    "depth",
                    column,
                    row,
                    t->n_lengths,
                    DEPTHS,
                    panels,
                    p,
                    t->n_systems};
    ibid_err e = ibidi_eval_svg(&g, &svg);
    FILE *f = e ? NULL : fopen(t->ev.o.svg, "w");
    if (!e && !f) e = ibid_fail_errno(errno, "cannot write", t->ev.o.svg);
    if (f && fwrite(svg.data, 1, svg.len, f) != svg.len)
        e = ibid_fail_errno(errno, "cannot write", t->ev.o.svg);
    if (f && fclose(f) != 0 && !e) e = ibid_fail_errno(errno, "cannot write", t->ev.o.svg);
    ibid_buf_fini(&svg);
    ibid_free(values);
    return e;
}

static int output(const struct longer *t) {
    ibid_err e = t->ev.o.svg ? draw(t) : IBID_OK;
    if (e) return ibidi_report(t->ev.cli, e);
    if (!t->ev.cli->o.json) return print_tables(t), 0;
    json_t *rows = json_array();
    for (size_t l = 0; l < t->n_lengths; l++)
        for (size_t s = 0; s < t->n_systems; s++)
            for (enum kind k = ALIKE; k < KINDS; k++)
                (void)json_array_append_new(rows, row_json(t, l, s, k));
    return ibidi_json_print(json_pack("{s:s,s:I,s:I,s:o}", "eval", "long", "needles",
                                      (json_int_t)t->needles.n_facts, "threads",
                                      (json_int_t)t->needles.n_threads, "rows", rows));
}

int ibidi_eval_long(ibid_cli *cli) {
    struct longer t = {0};
    ibid_buf_init(&t.book, BOOK_MAX);
    ibid_err e = ibidi_eval_begin(cli, &t.ev);
    if (!e && cli->o.books.n == 0)
        e = ibid_fail(IBID_INVAL, "eval long needs --book FILE.txt, free text of some length");
    if (!e) e = read_lengths(&t, cli->o.lengths);
    if (!e) e = ibidi_eval_systems(&cli->o, t.systems, &t.n_systems);
    if (!e) e = ibidi_needles_read(cli->o.needles, &t.needles);
    if (!e) e = place_needles(&t);
    if (!e) e = read_book(&t);
    if (!e) {
        t.cells = ibid_calloc(t.n_lengths * t.n_systems * KINDS * DEPTHS, sizeof *t.cells);
        t.ms = ibid_calloc(2 * t.n_lengths * t.n_systems, sizeof *t.ms);
        if (!t.cells || !t.ms) e = IBID_NOMEM;
    }
    if (!e) e = ibidi_eval_serve(&t.ev);
    if (!e) e = tokenize(&t);
    for (size_t l = 0; !e && l < t.n_lengths; l++) e = one_length(&t, l);
    int status = e ? ibidi_report(cli, e) : output(&t);
    ibid_free(t.tokens.ids);
    ibid_free(t.cells);
    ibid_free(t.ms);
    ibid_free(t.places);
    ibidi_needles_fini(&t.needles);
    ibid_buf_fini(&t.book);
    ibidi_eval_end(&t.ev);
    return status;
}
