#include "rpc/front/asking.h"
#include "rpc/base/clock.h"
#include "rpc/front/commands.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Few blocks beat many (docs/design.md section 9), so by default an answer reads the best block,
 * and others only where the search could hardly tell them from it. */
enum { BLOCKS_AUTO_MAX = 3 };
static const double close_call = 0.8; /* of the best block's score */

struct attempt {
    const ibidi_ask_calls *calls;
    ibidi_asked asked;
};

ibid_err ibidi_read_recompute(const char *text, double *out) {
    *out = -1;
    if (strcmp(text, "auto") == 0) return IBID_OK;
    char *end = NULL;
    *out = strtod(text, &end);
    if (end != text && *end == '\0' && isfinite(*out) && *out >= 0 && *out <= 1) return IBID_OK;
    return ibid_fail(IBID_INVAL, "recompute: \"%s\" is neither auto nor a number from 0 to 1",
                     text);
}

ibid_err ibidi_read_mode(const char *text, ibid_answer_mode *out) {
    static const char *const names[] = {[IBID_ANSWER_GENERATE] = "generate",
                                        [IBID_ANSWER_EXTRACT] = "extract",
                                        [IBID_ANSWER_AUTO] = "auto"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(text, names[i]) != 0) continue;
        *out = (ibid_answer_mode)i;
        return IBID_OK;
    }
    return ibid_fail(IBID_INVAL, "mode: \"%s\" is none of extract, generate and auto", text);
}

/* A fifth of the context holds about nine tenths of the default model's attention
 * (docs/performance.md). */
#define ATTENTION_SHARE 0.2

ibid_err ibidi_read_attention(const char *text, double *share, bool *recall) {
    static const char select[] = "select", measured[] = ",recall";
    const char *at = text + sizeof select - 1;
    *share = 0;
    *recall = false;
    if (strcmp(text, "full") == 0) return IBID_OK;
    if (strncmp(text, select, sizeof select - 1) == 0) {
        char *end = NULL;
        *share = ATTENTION_SHARE;
        if (*at == '=') {
            *share = strtod(at + 1, &end);
            at = end == at + 1 ? text : end;
        }
        *recall = strcmp(at, measured) == 0;
        if ((*recall || *at == '\0') && *share > 0 && *share <= 1) return IBID_OK;
    }
    return ibid_fail(IBID_INVAL,
                     "attention: \"%s\" is neither full nor select[=SHARE][,recall] with a share "
                     "above 0, at most 1",
                     text);
}

static bool on_event(void *arg, const ibid_answer_event *ev) {
    struct attempt *t = arg;
    bool on = t->calls->on_event(t->calls->arg, &t->asked, ev);
    return on && !(t->calls->stop && *t->calls->stop);
}

static ibid_err answer(ibid_service *s, const ibidi_ask_options *o, ibid_str question,
                       const ibid_hash *model, struct attempt *t) {
    const ibid_search_result *found = t->asked.found;
    ibid_answer_block blocks[IBIDI_ASK_BLOCKS_MAX];
    for (size_t i = 0; i < found->n; i++) {
        const ibid_hit *h = &found->hits[i];
        blocks[i] = (ibid_answer_block){h->document, h->chunk, h->block, h->score};
    }
    ibid_answer_request q = {.model = *model,
                             .question = question,
                             .blocks = blocks,
                             .n_blocks = found->n,
                             .recompute = o->recompute,
                             .max_tokens = o->max_tokens,
                             .temperature = o->temperature,
                             .top_p = o->top_p,
                             .seed = o->seed,
                             .mode = o->mode,
                             .attention_share = o->attention_share,
                             .attention_recall = o->attention_recall};
    return ibid_attn_answer(s->attention, &q, on_event, t);
}

static ibid_err collection_model(ibid_service *s, const char *name, ibid_hash *model) {
    ibid_snap *n = NULL;
    ibid_collection c;
    ibid_err e = ibidi_service_store(s);
    if (!e) e = ibid_snap_begin(s->store, &n);
    if (!e) e = ibid_snap_collection(n, ibidi_str(name), &c);
    if (!e) *model = c.model;
    ibid_snap_end(n);
    return e;
}

static ibid_err once(ibid_service *s, const ibidi_ask_options *o, ibid_str question,
                     struct attempt *t) {
    ibid_hash model;
    ibid_search_result found = {0};
    ibid_search_request r = {.collection = ibidi_str(o->collection),
                             .question = question,
                             .chunks = true,
                             .top = o->blocks ? o->blocks : BLOCKS_AUTO_MAX,
                             .filters = o->filters,
                             .n_filters = o->n_filters};
    uint64_t start = ibid_now_ns();
    ibid_err e = collection_model(s, o->collection, &model);
    if (!e) e = ibidi_search(s, &r, &found);
    if (e) return e;
    t->asked.retrieve_ms = ibid_ms_since(start);
    t->asked.found = &found;
    while (!o->blocks && found.n > 1 &&
           found.hits[found.n - 1].score < close_call * found.hits[0].score)
        found.n--;
    if (found.n == 0 || (!found.relevant && !o->always)) {
        t->asked.shown = true;
        t->calls->on_nothing(t->calls->arg, &t->asked);
    } else {
        e = answer(s, o, question, &model, t);
    }
    ibid_search_result_close(&found);
    t->asked.found = NULL;
    return e;
}

ibid_err ibidi_ask(ibid_service *s, const ibidi_ask_options *o, ibid_str question,
                   const ibidi_ask_calls *calls) {
    struct attempt t = {.calls = calls, .asked = {.start_ns = ibid_now_ns()}};
    ibid_err e = IBID_OK;
    uint64_t since = 0;
    int replaced = 0;
    if (o->blocks > IBIDI_ASK_BLOCKS_MAX)
        return ibid_fail(IBID_INVAL, "blocks: at most %d", IBIDI_ASK_BLOCKS_MAX);
    while (!(calls->stop && *calls->stop)) {
        e = once(s, o, question, &t);
        bool again = e == IBID_NOTFOUND ? ++replaced < 4 : e == IBID_UNAVAIL || e == IBID_BUSY;
        if (!again || t.asked.shown) break;
        if (e != IBID_NOTFOUND && !ibidi_service_again(s, &since)) break;
    }
    if (!e && calls->stop && *calls->stop) e = ibid_fail(IBID_CANCELLED, "interrupted");
    return e;
}
