/* Who may use an engine next. One forward runs at a time; questions go before encoding.
 *
 * A question takes a turn for its own pass, first come first served. Answers that decode share
 * turns: the rows that wait when a turn comes run in one forward, so that weights are read once for
 * all of them. Whoever finds nobody waiting leads: it takes a place in the questions' order, so
 * that neither passes nor batches hold each other up for longer than a turn, and runs the batch for
 * those who joined meanwhile. Answers join and leave between steps.
 *
 * Encoding takes a turn per micro-batch, and only while no question is under way, not even between
 * two of its steps; a question that arrives waits for at most one micro-batch. Encoding that has
 * waited for ten seconds gets one turn all the same, so that a stream of questions slows it down
 * but never stops it. */
#ifndef IBID_ATTENTION_SCHEDULER_H
#define IBID_ATTENTION_SCHEDULER_H

#include "attention/engine.h"

#include <pthread.h>

/* Answers in one forward; more wait for the next. Tokens per second still grow there, but each
 * answer's pace falls. */
enum { IBID_DECODE_MAX = 32, IBID_DECODE_DETAIL = 1024 };

/* An answer's place in batches: zeroed before the first ibid_sched_decode. It stays where it is
 * until ibid_decoder_leave. */
typedef struct ibid_decoder {
    struct ibid_decoder *next; /* of those who wait */
    ibid_step *step;
    const atomic_bool *cancel;
    pthread_cond_t woken;
    bool open;        /* woken is there */
    bool done, leads; /* with this step */
    uint64_t batch;   /* the last one it was in */
    ibid_err err;
    char detail[IBID_DECODE_DETAIL]; /* of err: whoever ran the step may be another thread */
} ibid_decoder;

typedef struct ibid_sched {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool busy;
    uint64_t next_ticket, serving; /* of questions, in order */
    uint64_t questions;            /* under way */
    uint64_t encoders;             /* waiting */
    uint64_t patience_ns;          /* after which encoding gets a turn */
    bool owed;                     /* an encoder waited that long: it is next */

    ibid_decoder *first, *last; /* waiting to decode; the first one leads */
    uint64_t batches, decoded;  /* run so far, and the rows in them */
    uint64_t batch_ns;          /* the last one took */
    size_t expected;            /* of the last batch, who will come again soon */
    uint64_t late;              /* who did not, all together */
} ibid_sched;

void ibid_sched_init(ibid_sched *s);
void ibid_sched_fini(ibid_sched *s); /* nobody waits any more */

/* From the start of a question to its end; keeps encoding back in between. */
void ibid_sched_question_begin(ibid_sched *s);
void ibid_sched_question_end(ibid_sched *s);

/* One turn. question: the caller is between question_begin and question_end. */
void ibid_sched_enter(ibid_sched *s, bool question);
void ibid_sched_leave(ibid_sched *s);

/* Runs a step of one row (without step.ready) in the next batch and waits for it, outside any turn.
 * A batch waits for those who were in the last one, so that they do not fall apart into two that
 * alternate, but no longer than half of the last batch's time (at least 1 ms, at most 20), and only
 * once for each that is late; a lone answer waits for nobody. The result is what a forward of the
 * step alone gives, errors too: they are those of ibid_engine_forward, and one step's do not touch
 * the others. cancel (may be NULL): looked at before the step runs; during it only if it runs
 * alone. Allocates nothing. */
ibid_err ibid_sched_decode(ibid_sched *s, ibid_decoder *d, ibid_engine *e, ibid_step *step,
                           const atomic_bool *cancel);
/* The answer decodes no more: nobody waits for it. Any number of times. */
void ibid_decoder_leave(ibid_sched *s, ibid_decoder *d);

/* For status. */
void ibid_sched_counts(ibid_sched *s, uint64_t *questions, uint64_t *encoders);
#endif
