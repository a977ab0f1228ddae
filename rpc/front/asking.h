/* Search, then answer from the best blocks: the one way that `ibid ask` and `ibid eval qa` go. */
#ifndef IBID_FRONT_ASKING_H
#define IBID_FRONT_ASKING_H

#include "attention/attention.h"
#include "retriever/retriever.h"
#include "rpc/front/service.h"

#include <signal.h>

enum { IBIDI_ASK_BLOCKS_MAX = 256 };

typedef struct ibidi_ask_options {
    const char *collection;
    const ibid_filter *filters; /* all must hold */
    size_t n_filters;
    size_t blocks;    /* 0: the best, and what scores nearly as well */
    bool always;      /* answer although nothing relevant was found */
    double recompute; /* 0..1; negative = auto */
    ibid_answer_mode mode;
    double attention_share; /* 0: full attention */
    bool attention_recall;
    uint32_t max_tokens;
    double temperature, top_p;
    uint64_t seed;
} ibidi_ask_options;

/* The question in hand, as its caller's functions see it. */
typedef struct ibidi_asked {
    const ibid_search_result *found; /* the blocks the answer reads, best first */
    double retrieve_ms;
    uint64_t start_ns;
    bool shown; /* set by the caller once somebody saw a part of the answer: no second attempt */
} ibidi_asked;

typedef struct ibidi_ask_calls {
    /* One event of the answer; false cancels. */
    bool (*on_event)(void *arg, ibidi_asked *a, const ibid_answer_event *ev);
    /* Nothing relevant was found, and so nothing is answered. */
    void (*on_nothing)(void *arg, ibidi_asked *a);
    void *arg;
    const volatile sig_atomic_t *stop; /* non-zero: give up with CANCELLED */
} ibidi_ask_calls;

/* "auto" or a number from 0 to 1. Errors: INVAL. */
ibid_err ibidi_read_recompute(const char *text, double *out);
/* "extract", "generate" or "auto". Errors: INVAL. */
ibid_err ibidi_read_mode(const char *text, ibid_answer_mode *out);
/* "full", or "select[=SHARE][,recall]" with a share above 0, at most 1. Errors: INVAL. */
ibid_err ibidi_read_attention(const char *text, double *share, bool *recall);
/* Exactly one of DONE and on_nothing arrives, unless an error is returned. A room that went away,
 * or a block that was replaced between search and answer, is worth another attempt while nothing
 * was shown. Errors: those of search and answer; CANCELLED. */
ibid_err ibidi_ask(ibid_service *s, const ibidi_ask_options *o, ibid_str question,
                   const ibidi_ask_calls *calls);
#endif
