#include "rpc/base/clock.h"
#include "rpc/front/cmd_eval.h"
#include "rpc/front/eval/spans.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What one way of finding made of every question; [n questions]. */
struct method {
    const char *name;
    ibidi_span_scores *scores;
    double *ms, *found;
};

enum { OURS, CAPITALISED, MENTIONS, METHODS };

struct finding {
    ibidi_eval ev;
    ibidi_set set;
    struct method m[METHODS];
};

static ibid_err ours(struct finding *t, size_t i) {
    const ibidi_question *q = &t->set.questions[i];
    ibid_find_request r = {.collection = ibidi_str(t->ev.collection),
                           .document = ibidi_str(t->set.documents[q->document].id),
                           .query = q->text,
                           .min_score = t->ev.o.min_score};
    ibid_find_result res = {0};
    uint64_t since = 0, start;
    ibid_err e;
    do {
        start = ibid_now_ns();
        e = ibid_ret_find(t->ev.s.retriever, &r, &res);
    } while (ibidi_room_away(e) && ibidi_service_again(&t->ev.s, &since));
    if (e) return e;
    struct method *m = &t->m[OURS];
    m->ms[i] = ibid_ms_since(start);
    m->found[i] = (double)res.n;
    ibid_str *list = ibid_calloc(res.n + 1, sizeof *list);
    if (!list) e = IBID_NOMEM;
    for (size_t k = 0; !e && k < res.n; k++) list[k] = res.matches[k].text;
    if (!e) e = ibidi_eval_spans(list, res.n, q->golds, q->n_golds, &m->scores[i]);
    if (!e && t->ev.out) {
        json_t *f = json_array(), *g = json_array();
        for (size_t k = 0; k < res.n; k++) (void)json_array_append_new(f, ibidi_json_str(list[k]));
        for (size_t k = 0; k < q->n_golds; k++)
            (void)json_array_append_new(g, ibidi_json_str(q->golds[k]));
        e = ibidi_eval_line(&t->ev, json_pack("{s:s,s:o,s:f,s:f,s:f,s:o,s:o}", "id", q->id, "query",
                                              ibidi_json_str(q->text), "em_f1", m->scores[i].em_f1,
                                              "overlap_f1", m->scores[i].overlap_f1, "ms", m->ms[i],
                                              "found", f, "gold", g));
    }
    ibid_free(list);
    ibid_find_result_close(&res);
    return e;
}

/* The two baselines, which look at no query at all. */
static ibid_err baselines(struct finding *t, size_t i) {
    const ibidi_question *q = &t->set.questions[i];
    const ibidi_source *d = &t->set.documents[q->document];
    ibid_str *phrases = NULL;
    size_t n = 0;
    ibid_err e = ibidi_eval_capitalised(d->text, &phrases, &n);
    if (!e) e = ibidi_eval_spans(phrases, n, q->golds, q->n_golds, &t->m[CAPITALISED].scores[i]);
    t->m[CAPITALISED].found[i] = (double)n;
    if (!e)
        e = ibidi_eval_spans(d->mentions, d->n_mentions, q->golds, q->n_golds,
                             &t->m[MENTIONS].scores[i]);
    t->m[MENTIONS].found[i] = (double)d->n_mentions;
    ibid_free(phrases);
    return e;
}

static ibid_err run(struct finding *t) {
    uint64_t said = 0;
    ibid_err e = ibidi_eval_index(&t->ev, "find");
    FILE *out = t->ev.out;
    t->ev.out = NULL;
    if (!e) e = ours(t, 0); /* brings the index forward, fills the caches */
    t->ev.out = out;
    for (size_t i = 0; !e && i < t->set.n_questions; i++) {
        e = ibidi_eval_go_on();
        if (!e) e = ours(t, i);
        if (!e) e = baselines(t, i);
        ibidi_eval_progress(&t->ev, &said, "queries", i + 1, t->set.n_questions);
    }
    return e;
}

/* ---- output ---- */

struct totals {
    double em_p, em_r, em, overlap_p, overlap_r, overlap, em_least, overlap_least, found, p50, p99;
};

/* Means over queries; robustness: the mean over documents of the least query's score. The questions
 * of one document stand together. */
static struct totals total(const struct finding *t, const struct method *m) {
    size_t n = t->set.n_questions, documents = 0;
    struct totals s = {0};
    double least_em = 0, least_overlap = 0;
    for (size_t i = 0; i < n; i++) {
        const ibidi_span_scores *x = &m->scores[i];
        bool first = i == 0 || t->set.questions[i].document != t->set.questions[i - 1].document;
        s.em_p += x->em_p / (double)n;
        s.em_r += x->em_r / (double)n;
        s.em += x->em_f1 / (double)n;
        s.overlap_p += x->overlap_p / (double)n;
        s.overlap_r += x->overlap_r / (double)n;
        s.overlap += x->overlap_f1 / (double)n;
        s.found += m->found[i] / (double)n;
        if (first) {
            s.em_least += least_em;
            s.overlap_least += least_overlap;
            documents++;
        }
        least_em = first || x->em_f1 < least_em ? x->em_f1 : least_em;
        least_overlap = first || x->overlap_f1 < least_overlap ? x->overlap_f1 : least_overlap;
    }
    s.em_least = (s.em_least + least_em) / (double)documents;
    s.overlap_least = (s.overlap_least + least_overlap) / (double)documents;
    s.p50 = ibidi_percentile(m->ms, n, 0.5);
    s.p99 = ibidi_percentile(m->ms, n, 0.99);
    return s;
}

static json_t *row_json(const struct method *m, const struct totals *s) {
    return json_pack("{s:s,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f}", "method", m->name,
                     "em_precision", s->em_p, "em_recall", s->em_r, "em_f1", s->em,
                     "overlap_precision", s->overlap_p, "overlap_recall", s->overlap_r,
                     "overlap_f1", s->overlap, "em_f1_robust", s->em_least, "overlap_f1_robust",
                     s->overlap_least, "found", s->found, "ms_p50", s->p50, "ms_p99", s->p99);
}

static int output(struct finding *t) {
    bool json = t->ev.cli->o.json;
    json_t *rows = json ? json_array() : NULL;
    if (!json) {
        printf("%zu documents, %zu queries; scores in percent\n\n", t->set.n_documents,
               t->set.n_questions);
        printf("%s%-28s %6s %6s %6s %8s %8s %8s %8s %7s %7s %7s%s\n", ibidi_bold(), "", "EM P",
               "EM R", "EM F1", "robust", "Overl.P", "Overl.R", "Overl.F1", "robust", "found",
               "p50 ms", ibidi_plain());
    }
    for (size_t k = 0; k < METHODS; k++) {
        const struct method *m = &t->m[k];
        struct totals s = total(t, m);
        if (json)
            (void)json_array_append_new(rows, row_json(m, &s));
        else
            printf("%-28s %6.1f %6.1f %6.1f %8.1f %8.1f %8.1f %8.1f %7.1f %7.1f %7.1f\n", m->name,
                   100 * s.em_p, 100 * s.em_r, 100 * s.em, 100 * s.em_least, 100 * s.overlap_p,
                   100 * s.overlap_r, 100 * s.overlap, 100 * s.overlap_least, s.found, s.p50);
    }
    if (!json)
        printf("\nThe lower two look at no query: a capitalised phrase is a run of capitalised "
               "words, a linked\nmention one that the data set's own linker marked. found: spans "
               "a query.\n");
    int status = 0;
    if (json)
        status = ibidi_json_print(json_pack("{s:s,s:I,s:I,s:O}", "eval", "find", "documents",
                                            (json_int_t)t->set.n_documents, "queries",
                                            (json_int_t)t->set.n_questions, "methods", rows));
    json_decref(rows);
    return status;
}

int ibidi_eval_find(ibid_cli *cli) {
    static const char *const names[METHODS] = {
        [OURS] = "ibid find",
        [CAPITALISED] = "every capitalised phrase",
        [MENTIONS] = "every linked mention",
    };
    struct finding t = {0};
    ibid_err e = ibidi_eval_begin(cli, &t.ev);
    if (!e && !cli->o.ktrlf)
        e = ibid_fail(IBID_INVAL, "eval find needs --ktrlf FILE, questions in KTRL+F layout");
    if (!e) e = ibidi_set_ktrlf(cli->o.ktrlf, t.ev.jsonl, &t.set);
    ibidi_set_limit(&t.set, e ? 0 : cli->o.limit);
    for (size_t k = 0; !e && k < METHODS; k++) {
        size_t n = t.set.n_questions;
        t.m[k] = (struct method){names[k], ibid_calloc(n, sizeof *t.m[k].scores),
                                 ibid_calloc(n, sizeof *t.m[k].ms),
                                 ibid_calloc(n, sizeof *t.m[k].found)};
        if (!t.m[k].scores || !t.m[k].ms || !t.m[k].found) e = IBID_NOMEM;
    }
    if (!e) e = run(&t);
    int status = e ? ibidi_report(cli, e) : output(&t);
    for (size_t k = 0; k < METHODS; k++) {
        ibid_free(t.m[k].scores);
        ibid_free(t.m[k].ms);
        ibid_free(t.m[k].found);
    }
    ibidi_set_fini(&t.set);
    ibidi_eval_end(&t.ev);
    return status;
}
