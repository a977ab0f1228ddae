#include "rpc/base/clock.h"
#include "rpc/front/asking.h"
#include "rpc/front/cmd_eval.h"
#include "rpc/front/eval/text.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Gold paragraphs are left out by group (data.h): a sixteenth of the collection at a time. */
enum { GROUPS = 16, QUOTES_MAX = 3, QUOTE_BYTES = 300 };

/* One question under one plan. */
struct reply {
    ibidi_qa_scores s;
    double words, first_ms, total_ms;
    size_t quotes, good_quotes, misplaced;
    bool answered, cited; /* cited: one of the first quotes holds a gold answer */
    bool refused_removed; /* refused when its paragraph was left out */
};

struct plan {
    const char *text;
    ibidi_ask_options o;
    struct reply *replies; /* [n questions] */
};

struct answers {
    ibidi_eval ev;
    ibidi_set set;
    struct plan plans[IBID_OPT_LIST_MAX];
    size_t n_plans;
};

/* ---- plans ---- */

static ibid_err plan_count(const char *key, const char *value, uint64_t max, uint64_t *out) {
    char *end = NULL;
    errno = 0;
    *out = strtoull(value, &end, 10);
    if (errno || end == value || *end || *value == '-' || *out > max)
        return ibid_fail(IBID_INVAL, "--plan: %s=%s: not a whole number up to %llu", key, value,
                         (unsigned long long)max);
    return IBID_OK;
}

static ibid_err plan_option(struct plan *p, char *item) {
    char *value = strchr(item, '=');
    uint64_t n = 0;
    if (strcmp(item, "auto") == 0) return IBID_OK;
    if (strcmp(item, "always") == 0) return p->o.always = true, IBID_OK;
    if (value) *value++ = '\0';
    if (value && strcmp(item, "recompute") == 0)
        return ibidi_read_recompute(value, &p->o.recompute);
    if (value && strcmp(item, "mode") == 0) return ibidi_read_mode(value, &p->o.mode);
    ibid_err e = IBID_OK;
    if (value && strcmp(item, "blocks") == 0) {
        e = plan_count(item, value, IBIDI_ASK_BLOCKS_MAX, &n);
        p->o.blocks = (size_t)n;
    } else if (value && strcmp(item, "max-tokens") == 0) {
        e = plan_count(item, value, 100000, &n);
        p->o.max_tokens = (uint32_t)n;
    } else {
        e = ibid_fail(IBID_INVAL,
                      "--plan: \"%s\" is none of auto, always, blocks=N, recompute=R, "
                      "max-tokens=N, mode=MODE",
                      item);
    }
    return e;
}

/* "blocks=3,recompute=0.15" over the command's own defaults. */
static ibid_err read_plan(const ibidi_eval *ev, const char *text, size_t n, struct plan *out) {
    char *copy = ibid_strdup(text), *rest = NULL;
    if (!copy) return IBID_NOMEM;
    *out = (struct plan){.text = text,
                         .o = {.collection = ev->collection, .recompute = -1, .top_p = 1}};
    ibid_err e = ibidi_read_mode(ev->o.mode, &out->o.mode);
    for (char *item = strtok_r(copy, ", ", &rest); !e && item; item = strtok_r(NULL, ", ", &rest))
        e = plan_option(out, item);
    ibid_free(copy);
    if (!e && !(out->replies = ibid_calloc(n, sizeof *out->replies))) e = IBID_NOMEM;
    return e;
}

/* ---- one question ---- */

struct asking {
    struct answers *t;
    const ibidi_question *q;
    struct reply *r;
    bool removed; /* its paragraph is left out: only whether there is an answer counts */
    bool cut, refused;
    ibid_buf text;
    ibid_err e;
};

static ibid_err in_place(struct answers *t, const ibid_citation *c, bool *out) {
    ibid_snap *n = NULL;
    ibid_buf text;
    ibid_buf_init(&text, (size_t)1 << 30);
    ibid_err e = ibidi_service_store(&t->ev.s);
    if (!e) e = ibid_snap_begin(t->ev.s.store, &n);
    if (!e) e = ibid_snap_text(n, c->document, &text);
    *out = !e && c->start <= c->end && c->end <= text.len && c->end - c->start == c->quote.n &&
           memcmp(text.data + c->start, c->quote.s, c->quote.n) == 0;
    ibid_snap_end(n);
    ibid_buf_fini(&text);
    return e;
}

static ibid_err quotes(struct asking *a, const ibid_answer_event *ev) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < ev->n_citations; i++) {
        const ibid_citation *c = &ev->citations[i];
        ibidi_qa_scores s;
        bool right_place = false;
        e = ibidi_eval_qa_best(c->quote, a->q->golds, a->q->n_golds, &s);
        if (!e) e = in_place(a->t, c, &right_place);
        a->r->quotes++;
        a->r->good_quotes += s.contains > 0;
        a->r->misplaced += !right_place;
        if (i < QUOTES_MAX && c->quote.n <= QUOTE_BYTES && s.contains > 0) a->r->cited = true;
    }
    return e;
}

static bool on_event(void *arg, ibidi_asked *asked, const ibid_answer_event *ev) {
    struct asking *a = arg;
    if (ev->kind == IBID_ANSWER_TOKEN && a->removed && ev->text.n) {
        a->cut = asked->shown = true; /* it answers: that is all that was asked */
        return false;
    }
    if (ev->kind != IBID_ANSWER_DONE) return true;
    asked->shown = true;
    a->refused = ev->text.n == 0;
    if (a->removed || a->refused) return true;
    struct reply *r = a->r;
    r->answered = true;
    r->words = (double)ibidi_eval_word_count(ev->text);
    r->first_ms = asked->retrieve_ms + ev->first_token_ms;
    r->total_ms = ibid_ms_since(asked->start_ns);
    a->e = ibidi_eval_qa_best(ev->text, a->q->golds, a->q->n_golds, &r->s);
    if (!a->e) a->e = quotes(a, ev);
    if (!a->e) a->e = ibid_buf_append(&a->text, ev->text.s, ev->text.n);
    return true;
}

static void on_nothing(void *arg, ibidi_asked *asked) {
    struct asking *a = arg;
    a->refused = true;
    if (!a->removed) a->r->total_ms = ibid_ms_since(asked->start_ns);
}

static ibid_err ask(struct asking *a, const ibidi_ask_options *o) {
    ibidi_ask_calls calls = {on_event, on_nothing, a, NULL};
    ibid_err e = ibidi_ask(&a->t->ev.s, o, a->q->text, &calls);
    if (e == IBID_CANCELLED && a->cut) e = IBID_OK;
    return e ? e : a->e;
}

static ibid_err write_line(struct answers *t, const struct plan *p, const struct asking *a) {
    const struct reply *r = a->r;
    if (!t->ev.out) return IBID_OK;
    return ibidi_eval_line(
        &t->ev,
        json_pack("{s:s,s:s,s:o,s:b,s:f,s:f,s:f,s:f,s:I,s:I,s:b,s:b,s:f,s:f}", "plan", p->text,
                  "id", a->q->id, "answer",
                  ibidi_json_text(a->text.data ? a->text.data : "", a->text.len), "answered",
                  r->answered, "exact", r->s.exact, "f1", r->s.f1, "contains", r->s.contains,
                  "words", r->words, "quotes", (json_int_t)r->quotes, "quotes_with_gold",
                  (json_int_t)r->good_quotes, "cited", r->cited, "refused_when_removed",
                  r->refused_removed, "first_token_ms", r->first_ms, "total_ms", r->total_ms));
}

/* Asks twice: as it is, and with the group of the question's paragraph left out by a filter. */
static ibid_err one_question(struct answers *t, struct plan *p, size_t i) {
    const ibidi_question *q = &t->set.questions[i];
    struct asking a = {.t = t, .q = q, .r = &p->replies[i]};
    char key[24];
    ibid_buf_init(&a.text, 1 << 24);
    ibid_err e = ask(&a, &p->o);
    if (!e) {
        (void)snprintf(key, sizeof key, "not%zu", q->document % GROUPS);
        ibid_filter left_out = {ibidi_str(key), ibidi_str("1")};
        ibidi_ask_options o = p->o;
        o.filters = &left_out;
        o.n_filters = 1;
        o.always = false;
        a.removed = true;
        a.refused = false;
        e = ask(&a, &o);
        a.r->refused_removed = a.refused;
    }
    if (!e) e = write_line(t, p, &a);
    ibid_buf_fini(&a.text);
    return e;
}

/* ---- output ---- */

struct totals {
    double n, exact, f1, contains, words, quotes, good_quotes, misplaced, right, right_cited,
        refused, refused_removed, first_ms, total_ms;
};

static struct totals total(const struct answers *t, const struct plan *p) {
    struct totals s = {.n = (double)t->set.n_questions};
    double answered = 0;
    for (size_t i = 0; i < t->set.n_questions; i++) {
        const struct reply *r = &p->replies[i];
        answered += r->answered;
        s.exact += r->s.exact;
        s.f1 += r->s.f1;
        s.contains += r->s.contains;
        s.words += r->words;
        s.quotes += (double)r->quotes;
        s.good_quotes += (double)r->good_quotes;
        s.misplaced += (double)r->misplaced;
        s.right += r->s.contains;
        s.right_cited += r->s.contains > 0 && r->cited;
        s.refused += !r->answered;
        s.refused_removed += r->refused_removed;
        s.first_ms += r->first_ms;
        s.total_ms += r->answered ? r->total_ms : 0;
    }
    double d = answered > 0 ? answered : 1;
    s.exact /= s.n;
    s.f1 /= s.n;
    s.contains /= s.n;
    s.refused /= s.n;
    s.refused_removed /= s.n;
    s.words /= d;
    s.first_ms /= d;
    s.total_ms /= d;
    return s;
}

static double share(double part, double of) {
    return of > 0 ? part / of : 0;
}

static void print_row(const struct plan *p, const struct totals *s) {
    printf("%-28s %6.1f %6.1f %6.1f %6.1f %6.1f %6.1f %5.0f %8.1f %8.1f %8.0f %8.0f\n", p->text,
           100 * s->exact, 100 * s->f1, 100 * s->contains, s->words,
           100 * share(s->good_quotes, s->quotes), 100 * share(s->right_cited, s->right),
           s->misplaced, 100 * s->refused, 100 * s->refused_removed, s->first_ms, s->total_ms);
}

static json_t *row_json(const struct plan *p, const struct totals *s) {
    return json_pack("{s:s,s:f,s:f,s:f,s:f,s:f,s:f,s:I,s:I,s:f,s:f,s:f,s:f}", "plan", p->text,
                     "exact", s->exact, "f1", s->f1, "contains", s->contains, "words", s->words,
                     "citation_precision", share(s->good_quotes, s->quotes), "citation_recall",
                     share(s->right_cited, s->right), "quotes", (json_int_t)s->quotes,
                     "quotes_misplaced", (json_int_t)s->misplaced, "refused", s->refused,
                     "refused_when_removed", s->refused_removed, "first_token_ms", s->first_ms,
                     "total_ms", s->total_ms);
}

static ibid_err differences(const struct answers *t, const struct plan *p, double *a, double *b,
                            json_t *list) {
    static const char *const names[] = {"contains", "F1", "exact"};
    ibid_err e = IBID_OK;
    for (int m = 0; !e && m < 3; m++) {
        ibidi_interval v;
        for (size_t i = 0; i < t->set.n_questions; i++) {
            const ibidi_qa_scores *x = &t->plans[0].replies[i].s, *y = &p->replies[i].s;
            a[i] = m == 0 ? x->contains : m == 1 ? x->f1 : x->exact;
            b[i] = m == 0 ? y->contains : m == 1 ? y->f1 : y->exact;
        }
        e = ibidi_bootstrap(a, b, t->set.n_questions, IBIDI_EVAL_SEED, &v);
        if (!e && list) {
            json_t *j = ibidi_interval_json(&v);
            (void)json_object_set_new(j, "measure", json_string(names[m]));
            (void)json_object_set_new(j, "of", json_string(p->text));
            (void)json_object_set_new(j, "against", json_string(t->plans[0].text));
            (void)json_array_append_new(list, j);
        } else if (!e) {
            printf("%-8s %28s  %+6.1f  [%+.1f, %+.1f]\n", names[m], p->text, 100 * v.mean,
                   100 * v.low, 100 * v.high);
        }
    }
    return e;
}

static void print_head(const struct answers *t) {
    printf("%zu paragraphs, %zu questions; right answers hold a gold answer; shares in percent\n\n",
           t->set.n_documents, t->set.n_questions);
    printf("%s%-28s %6s %6s %6s %6s %6s %6s %5s %8s %8s %8s %8s%s\n", ibidi_bold(), "plan", "EM",
           "F1", "right", "words", "citeP", "citeR", "bad", "refused", "removed", "first ms",
           "total ms", ibidi_plain());
}

static int output(struct answers *t) {
    bool json = t->ev.cli->o.json;
    size_t n = t->set.n_questions;
    json_t *rows = json ? json_array() : NULL, *diffs = json ? json_array() : NULL;
    double *a = ibid_calloc(n, sizeof *a), *b = ibid_calloc(n, sizeof *b);
    ibid_err e = a && b ? IBID_OK : IBID_NOMEM;
    if (!json) print_head(t);
    for (size_t i = 0; i < t->n_plans; i++) {
        struct totals s = total(t, &t->plans[i]);
        if (json)
            (void)json_array_append_new(rows, row_json(&t->plans[i], &s));
        else
            print_row(&t->plans[i], &s);
    }
    if (!json)
        printf("\nwords: of an answer. citeP: quotes that hold a gold answer. citeR: right answers "
               "with such a\nquote among at most %d of at most %d bytes. bad: quotes that do not "
               "stand at their place.\nrefused: although the paragraph is there. removed: refused "
               "when a filter leaves it (and a\nsixteenth of the others) out.\n",
               QUOTES_MAX, QUOTE_BYTES);
    if (!json && t->n_plans > 1)
        printf("\n%sAgainst %s, paired bootstrap over %zu questions (%d resamples, seed %#llx), "
               "95 %%:%s\n",
               ibidi_bold(), t->plans[0].text, n, IBIDI_RESAMPLES, IBIDI_EVAL_SEED, ibidi_plain());
    for (size_t i = 1; !e && i < t->n_plans; i++) e = differences(t, &t->plans[i], a, b, diffs);
    ibid_free(a);
    ibid_free(b);
    int status = e ? ibidi_report(t->ev.cli, e) : 0;
    if (json && !e)
        status = ibidi_json_print(json_pack("{s:s,s:I,s:I,s:O,s:O}", "eval", "qa", "documents",
                                            (json_int_t)t->set.n_documents, "questions",
                                            (json_int_t)n, "plans", rows, "differences", diffs));
    json_decref(rows);
    json_decref(diffs);
    return status;
}

static ibid_err run(struct answers *t) {
    const ibid_many *wanted = &t->ev.o.plans;
    size_t n = wanted->n ? wanted->n : 1;
    uint64_t said = 0;
    ibid_err e = IBID_OK;
    for (; !e && t->n_plans < n; t->n_plans++)
        e = read_plan(&t->ev, wanted->n ? wanted->v[t->n_plans] : "auto", t->set.n_questions,
                      &t->plans[t->n_plans]);
    if (!e) e = ibidi_eval_index(&t->ev, "answers");
    /* Question by question, so that a machine that is busy for a while is so for every plan. */
    for (size_t i = 0; !e && i < t->set.n_questions; i++) {
        for (size_t p = 0; !e && p < t->n_plans; p++) {
            e = ibidi_eval_go_on();
            if (!e) e = one_question(t, &t->plans[p], i);
        }
        ibidi_eval_progress(&t->ev, &said, "questions", i + 1, t->set.n_questions);
    }
    return e;
}

int ibidi_eval_answers(ibid_cli *cli) {
    struct answers t = {0};
    ibid_err e = ibidi_eval_begin(cli, &t.ev);
    if (!e && !cli->o.squad)
        e = ibid_fail(IBID_INVAL, "eval qa needs --squad FILE, questions in SQuAD layout");
    if (!e) e = ibidi_set_squad(cli->o.squad, GROUPS, t.ev.jsonl, &t.set);
    ibidi_set_limit(&t.set, e ? 0 : cli->o.limit);
    if (!e) e = run(&t);
    int status = e ? ibidi_report(cli, e) : output(&t);
    for (size_t p = 0; p < t.n_plans; p++) ibid_free(t.plans[p].replies);
    ibidi_set_fini(&t.set);
    ibidi_eval_end(&t.ev);
    return status;
}
