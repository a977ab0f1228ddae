#include "rpc/base/clock.h"
#include "rpc/front/cmd_eval.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH = 100 };

/* What one system made of every question; arrays [n questions]. */
struct run {
    const ibidi_system *system;
    double *ndcg, *mrr, *ms, *recall[IBIDI_RECALLS];
    double *storage;
    size_t degraded;
};

struct retrieval {
    ibidi_eval ev;
    ibidi_set set;
    struct run runs[IBIDI_SYSTEMS_MAX];
    size_t n_runs;
};

static ibid_err run_init(struct run *r, const ibidi_system *s, size_t n) {
    enum { ARRAYS = 3 + IBIDI_RECALLS };
    *r = (struct run){.system = s, .storage = ibid_calloc(ARRAYS * n, sizeof(double))};
    if (!r->storage) return IBID_NOMEM;
    r->ndcg = r->storage;
    r->mrr = r->storage + n;
    r->ms = r->storage + 2 * n;
    for (size_t k = 0; k < IBIDI_RECALLS; k++) r->recall[k] = r->storage + (3 + k) * n;
    return IBID_OK;
}

static double gain_of(const ibidi_question *q, ibid_str id) {
    for (size_t i = 0; i < q->n_judged; i++)
        if (strlen(q->judged[i].document) == id.n && memcmp(q->judged[i].document, id.s, id.n) == 0)
            return q->judged[i].gain;
    return 0;
}

static ibid_err write_line(struct retrieval *t, const struct run *r, size_t i,
                           const ibid_search_result *res) {
    if (!t->ev.out) return IBID_OK;
    json_t *ranked = json_array();
    for (size_t k = 0; k < res->n; k++)
        (void)json_array_append_new(ranked, ibidi_json_str(res->hits[k].id));
    return ibidi_eval_line(&t->ev, json_pack("{s:s,s:s,s:f,s:f,s:f,s:f,s:o}", "system",
                                             r->system->name, "id", t->set.questions[i].id,
                                             "ndcg10", r->ndcg[i], "mrr10", r->mrr[i], "recall1",
                                             r->recall[0][i], "ms", r->ms[i], "ranked", ranked));
}

static ibid_err search_one(struct retrieval *t, struct run *r, size_t i, bool counts) {
    const ibidi_question *q = &t->set.questions[i];
    double gains[DEPTH], *judged = NULL;
    ibidi_rank_scores s;
    ibid_search_result res = {0};
    ibid_search_request req = {
        .collection = ibidi_str(t->ev.collection), .question = q->text, .top = DEPTH};
    r->system->set(&req);
    uint64_t start = ibid_now_ns();
    ibid_err e = ibidi_search(&t->ev.s, &req, &res);
    if (e) return e;
    r->ms[i] = ibid_ms_since(start);
    judged = ibid_calloc(q->n_judged + 1, sizeof *judged);
    if (!judged) e = IBID_NOMEM;
    if (!e && counts) {
        for (size_t k = 0; k < q->n_judged; k++) judged[k] = q->judged[k].gain;
        for (size_t k = 0; k < res.n; k++) gains[k] = gain_of(q, res.hits[k].id);
        ibidi_rank(gains, res.n, judged, q->n_judged, &s);
        r->ndcg[i] = s.ndcg10;
        r->mrr[i] = s.mrr10;
        for (size_t k = 0; k < IBIDI_RECALLS; k++) r->recall[k][i] = s.recall[k];
        r->degraded += res.degraded.n > 0;
        e = write_line(t, r, i, &res);
    }
    ibid_free(judged);
    ibid_search_result_close(&res);
    return e;
}

static ibid_err run_system(struct retrieval *t, struct run *r) {
    uint64_t said = 0;
    ibid_err e = search_one(t, r, 0, false); /* brings the index forward, fills the caches */
    for (size_t i = 0; !e && i < t->set.n_questions; i++) {
        e = ibidi_eval_go_on();
        if (!e) e = search_one(t, r, i, true);
        ibidi_eval_progress(&t->ev, &said, r->system->name, i + 1, t->set.n_questions);
    }
    if (!e && r->degraded)
        ibidi_eval_say(&t->ev, "%s: %zu questions were searched by words only", r->system->name,
                       r->degraded);
    return e;
}

/* ---- output ---- */

struct summary {
    double ndcg, mrr, recall[IBIDI_RECALLS], p50, p99, n;
};

/* Of the questions of one fold, or of all (folds 0). */
static ibid_err summarise(const struct retrieval *t, const struct run *r, size_t folds, size_t fold,
                          struct summary *out) {
    double *ms = ibid_calloc(t->set.n_questions + 1, sizeof *ms);
    size_t n = 0;
    *out = (struct summary){0};
    if (!ms) return IBID_NOMEM;
    for (size_t i = 0; i < t->set.n_questions; i++) {
        if (folds && ibidi_fold(t->set.questions[i].id, folds) != fold) continue;
        ms[n++] = r->ms[i];
        out->ndcg += r->ndcg[i];
        out->mrr += r->mrr[i];
        for (size_t k = 0; k < IBIDI_RECALLS; k++) out->recall[k] += r->recall[k][i];
    }
    double d = n ? (double)n : 1;
    out->ndcg /= d;
    out->mrr /= d;
    for (size_t k = 0; k < IBIDI_RECALLS; k++) out->recall[k] /= d;
    out->p50 = ibidi_percentile(ms, n, 0.50);
    out->p99 = ibidi_percentile(ms, n, 0.99);
    out->n = (double)n;
    ibid_free(ms);
    return IBID_OK;
}

static json_t *summary_json(const struct run *r, const struct summary *s) {
    return json_pack("{s:s,s:I,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f}", "system", r->system->name,
                     "queries", (json_int_t)s->n, "ndcg10", s->ndcg, "recall1", s->recall[0],
                     "recall5", s->recall[1], "recall10", s->recall[2], "recall100", s->recall[3],
                     "mrr10", s->mrr, "ms_p50", s->p50, "ms_p99", s->p99);
}

static void print_summary(const struct run *r, const struct summary *s) {
    printf("%-14s %8.4f %8.4f %8.4f %8.4f %8.4f %8.4f %8.1f %8.1f\n", r->system->name, s->ndcg,
           s->recall[0], s->recall[1], s->recall[2], s->recall[3], s->mrr, s->p50, s->p99);
}

static void print_head(const char *first) {
    printf("%s%-14s %8s %8s %8s %8s %8s %8s %8s %8s%s\n", ibidi_bold(), first, "nDCG@10", "R@1",
           "R@5", "R@10", "R@100", "MRR@10", "p50 ms", "p99 ms", ibidi_plain());
}

/* The table of one fold, or of all: printed, or appended to `list`. */
static ibid_err table(const struct retrieval *t, size_t folds, size_t fold, json_t *list) {
    char name[32];
    (void)snprintf(name, sizeof name, folds ? "fold %zu" : "system", fold);
    if (!list) print_head(name);
    for (size_t k = 0; k < t->n_runs; k++) {
        struct summary s;
        ibid_err e = summarise(t, &t->runs[k], folds, fold, &s);
        if (e) return e;
        if (!list) {
            print_summary(&t->runs[k], &s);
            continue;
        }
        json_t *j = summary_json(&t->runs[k], &s);
        if (folds) (void)json_object_set_new(j, "fold", json_integer((json_int_t)fold));
        (void)json_array_append_new(list, j);
    }
    if (!list) putchar('\n');
    return IBID_OK;
}

static ibid_err difference(const struct retrieval *t, size_t a, size_t b, const char *measure,
                           const double *va, const double *vb, json_t *list) {
    ibidi_interval i;
    ibid_err e = ibidi_bootstrap(va, vb, t->set.n_questions, IBIDI_EVAL_SEED, &i);
    if (e) return e;
    const char *na = t->runs[a].system->name, *nb = t->runs[b].system->name;
    if (list) {
        json_t *j = ibidi_interval_json(&i);
        (void)json_object_set_new(j, "measure", json_string(measure));
        (void)json_object_set_new(j, "of", json_string(nb));
        (void)json_object_set_new(j, "against", json_string(na));
        (void)json_array_append_new(list, j);
    } else {
        printf("%-8s %10s - %-10s %+8.4f  [%+.4f, %+.4f]\n", measure, nb, na, i.mean, i.low,
               i.high);
    }
    return IBID_OK;
}

static ibid_err differences(const struct retrieval *t, json_t *list) {
    ibid_err e = IBID_OK;
    if (!list && t->n_runs > 1)
        printf("%sDifferences, paired bootstrap over %zu queries (%d resamples, seed %#llx), "
               "95 %%:%s\n",
               ibidi_bold(), t->set.n_questions, IBIDI_RESAMPLES, IBIDI_EVAL_SEED, ibidi_plain());
    for (size_t b = 1; b < t->n_runs; b++)
        for (size_t a = 0; !e && a < b; a++) {
            e = difference(t, a, b, "nDCG@10", t->runs[a].ndcg, t->runs[b].ndcg, list);
            if (!e)
                e = difference(t, a, b, "R@1", t->runs[a].recall[0], t->runs[b].recall[0], list);
        }
    return e;
}

static int output(struct retrieval *t) {
    bool json = t->ev.cli->o.json;
    size_t folds = t->ev.o.folds;
    json_t *all = json ? json_array() : NULL, *parts = json ? json_array() : NULL,
           *diffs = json ? json_array() : NULL;
    if (!json) printf("%zu documents, %zu queries\n\n", t->set.n_documents, t->set.n_questions);
    ibid_err e = table(t, 0, 0, all);
    for (size_t f = 0; !e && f < folds; f++) e = table(t, folds, f, parts);
    if (!e) e = differences(t, diffs);
    int status = 0;
    if (e)
        status = ibidi_report(t->ev.cli, e);
    else if (json)
        status = ibidi_json_print(json_pack(
            "{s:s,s:I,s:I,s:I,s:I,s:O,s:O,s:O}", "eval", "retrieval", "documents",
            (json_int_t)t->set.n_documents, "queries", (json_int_t)t->set.n_questions,
            "queries_without_judgement", (json_int_t)t->set.unjudged, "judged_missing",
            (json_int_t)t->set.missing, "systems", all, "folds", parts, "differences", diffs));
    json_decref(all);
    json_decref(parts);
    json_decref(diffs);
    return status;
}

static ibid_err load(struct retrieval *t) {
    const ibid_opts *o = &t->ev.o;
    bool beir = o->corpus || o->queries || o->qrels;
    if (o->squad && beir)
        return ibid_fail(IBID_INVAL, "--squad together with a BEIR file; give one data set");
    if (o->squad) return ibidi_set_squad(o->squad, 0, t->ev.jsonl, &t->set);
    if (!o->corpus || !o->queries || !o->qrels)
        return ibid_fail(IBID_INVAL, "eval retrieval needs --corpus, --queries and --qrels (BEIR "
                                     "layout), or --squad FILE");
    return ibidi_set_beir(o->corpus, o->queries, o->qrels, t->ev.jsonl, &t->set);
}

int ibidi_eval_retrieval(ibid_cli *cli) {
    struct retrieval t = {0};
    const ibidi_system *systems[IBIDI_SYSTEMS_MAX];
    size_t n = 0;
    ibid_err e = ibidi_eval_begin(cli, &t.ev);
    if (!e) e = ibidi_eval_systems(&cli->o, systems, &n);
    if (!e) e = load(&t);
    if (!e) {
        ibidi_set_limit(&t.set, cli->o.limit);
        if (t.set.unjudged)
            ibidi_eval_say(&t.ev, "%zu queries have no relevant document and are left out",
                           t.set.unjudged);
        if (t.set.missing)
            ibidi_eval_say(&t.ev, "%zu judged documents are not in the corpus: never found",
                           t.set.missing);
        e = ibidi_eval_index(&t.ev, "search");
    }
    for (; !e && t.n_runs < n; t.n_runs++) {
        e = run_init(&t.runs[t.n_runs], systems[t.n_runs], t.set.n_questions);
        if (!e) e = run_system(&t, &t.runs[t.n_runs]);
        if (e) ibid_free(t.runs[t.n_runs].storage);
        if (e) break;
    }
    int status = e ? ibidi_report(cli, e) : output(&t);
    for (size_t k = 0; k < t.n_runs; k++) ibid_free(t.runs[k].storage);
    ibidi_set_fini(&t.set);
    ibidi_eval_end(&t.ev);
    return status;
}
