/* Who may use an engine next. One forward runs at a time; questions go before encoding.
 *
 * A question takes a turn per step (its prefill, then each token), first come first served, so that
 * several answers advance together. Encoding takes a turn per micro-batch, and only while no
 * question is under way, not even between two of its steps; a question that arrives waits for at
 * most one micro-batch. Encoding that has waited for ten seconds gets one turn all the same, so
 * that a stream of questions slows it down but never stops it. */
#ifndef IBID_ATTENTION_SCHEDULER_H
#define IBID_ATTENTION_SCHEDULER_H

#include "rpc/base/err.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct ibid_sched {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool busy;
    uint64_t next_ticket, serving; /* of questions, in order */
    uint64_t questions;            /* under way */
    uint64_t encoders;             /* waiting */
    uint64_t patience_ns;          /* after which encoding gets a turn */
    bool owed;                     /* an encoder waited that long: it is next */
} ibid_sched;

void ibid_sched_init(ibid_sched *s);
void ibid_sched_fini(ibid_sched *s); /* nobody waits any more */

/* From the start of a question to its end; keeps encoding back in between. */
void ibid_sched_question_begin(ibid_sched *s);
void ibid_sched_question_end(ibid_sched *s);

/* One turn. question: the caller is between question_begin and question_end. */
void ibid_sched_enter(ibid_sched *s, bool question);
void ibid_sched_leave(ibid_sched *s);
/* For status. */
void ibid_sched_counts(ibid_sched *s, uint64_t *questions, uint64_t *encoders);
#endif
