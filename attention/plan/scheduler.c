#include "attention/plan/scheduler.h"

#include "rpc/base/clock.h"

#include <stdio.h>
#include <time.h>

enum {
    PATIENCE_S = 10,
    SLICE_NS = 200000000,
    LINGER_SHARE = 2, /* of the last batch's time */
    LINGER_LEAST_NS = 1000000,
    LINGER_MOST_NS = 20000000
};

static void cond_open(pthread_cond_t *c) {
    pthread_condattr_t a;
    (void)pthread_condattr_init(&a);
    (void)pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    (void)pthread_cond_init(c, &a);
    (void)pthread_condattr_destroy(&a);
}

static void wait_until(ibid_sched *s, uint64_t until) {
    struct timespec at = {.tv_sec = (time_t)(until / 1000000000u),
                          .tv_nsec = (long)(until % 1000000000u)};
    (void)pthread_cond_timedwait(&s->changed, &s->lock, &at);
}

void ibid_sched_init(ibid_sched *s) {
    *s = (ibid_sched){.patience_ns = PATIENCE_S * UINT64_C(1000000000)};
    (void)pthread_mutex_init(&s->lock, NULL);
    cond_open(&s->changed);
}

void ibid_sched_fini(ibid_sched *s) {
    (void)pthread_cond_destroy(&s->changed);
    (void)pthread_mutex_destroy(&s->lock);
}

void ibid_sched_question_begin(ibid_sched *s) {
    (void)pthread_mutex_lock(&s->lock);
    s->questions++;
    (void)pthread_mutex_unlock(&s->lock);
}

void ibid_sched_question_end(ibid_sched *s) {
    (void)pthread_mutex_lock(&s->lock);
    s->questions--;
    (void)pthread_cond_broadcast(&s->changed);
    (void)pthread_mutex_unlock(&s->lock);
}

static void enter_question(ibid_sched *s) {
    uint64_t ticket = s->next_ticket++;
    while (s->busy || s->owed || ticket != s->serving)
        (void)pthread_cond_wait(&s->changed, &s->lock);
    s->serving++;
    s->busy = true;
}

static void enter_encoder(ibid_sched *s) {
    uint64_t since = ibid_now_ns();
    bool mine = false; /* the turn that is owed */
    s->encoders++;
    while (s->busy || (s->questions && !mine) || (s->owed && !mine)) {
        wait_until(s, ibid_now_ns() + SLICE_NS);
        if (!mine && !s->owed && ibid_now_ns() - since > s->patience_ns) mine = s->owed = true;
    }
    if (mine) s->owed = false;
    s->encoders--;
    s->busy = true;
}

void ibid_sched_enter(ibid_sched *s, bool question) {
    (void)pthread_mutex_lock(&s->lock);
    if (question)
        enter_question(s);
    else
        enter_encoder(s);
    (void)pthread_mutex_unlock(&s->lock);
}

void ibid_sched_leave(ibid_sched *s) {
    (void)pthread_mutex_lock(&s->lock);
    s->busy = false;
    (void)pthread_cond_broadcast(&s->changed);
    (void)pthread_mutex_unlock(&s->lock);
}

/* ---- Decoding together ---- */

/* Nobody waits for d any more. */
static void not_expected(ibid_sched *s, ibid_decoder *d) {
    if (!s->expected || !d->open || d->batch != s->batches) return;
    d->batch = 0;
    if (--s->expected == 0) (void)pthread_cond_broadcast(&s->changed);
}

static void join(ibid_sched *s, ibid_decoder *d) {
    not_expected(s, d);
    d->next = NULL;
    d->done = false;
    d->leads = !s->first;
    if (s->first)
        s->last->next = d;
    else
        s->first = d;
    s->last = d;
}

/* The turn is the caller's; those of the last batch who are on their way may still come. Whoever
 * does not is late only once: the next batch expects those of this one. */
static void linger(ibid_sched *s) {
    uint64_t wait = s->batch_ns / LINGER_SHARE;
    if (wait < LINGER_LEAST_NS) wait = LINGER_LEAST_NS;
    if (wait > LINGER_MOST_NS) wait = LINGER_MOST_NS;
    uint64_t until = ibid_now_ns() + wait;
    while (s->expected && ibid_now_ns() < until) wait_until(s, until);
    s->late += s->expected;
    s->expected = 0;
}

/* Takes up to IBID_DECODE_MAX decoders off the list, the caller first; the first one left leads. */
static size_t take(ibid_sched *s, ibid_decoder **batch) {
    size_t n = 0;
    for (; s->first && n < IBID_DECODE_MAX; n++) {
        batch[n] = s->first;
        s->first = s->first->next;
    }
    if (!s->first) {
        s->last = NULL;
    } else {
        s->first->leads = true;
        (void)pthread_cond_signal(&s->first->woken);
    }
    return n;
}

static void note(ibid_decoder *d, ibid_err e) {
    d->err = e;
    if (e) (void)snprintf(d->detail, sizeof d->detail, "%s", ibid_err_detail());
}

/* A batch that fails does so before anything was computed (the engine checks and reserves first,
 * and is not cancelled): its steps are run again one by one, so that an error is only that step's.
 */
static void run_batch(ibid_engine *e, ibid_decoder *const *batch, size_t n) {
    ibid_step steps[IBID_DECODE_MAX];
    ibid_decoder *of[IBID_DECODE_MAX];
    size_t n_steps = 0;
    for (size_t i = 0; i < n; i++) {
        ibid_decoder *d = batch[i];
        if (d->cancel && atomic_load(d->cancel)) {
            note(d, ibid_fail(IBID_CANCELLED, "cancelled before a token"));
            continue;
        }
        d->err = IBID_OK;
        of[n_steps] = d;
        steps[n_steps++] = *d->step;
    }
    if (n_steps > 1 && ibid_engine_forward(e, steps, n_steps, NULL) == IBID_OK) return;
    for (size_t i = 0; i < n_steps; i++)
        note(of[i], ibid_engine_forward(e, &steps[i], 1, n_steps == 1 ? of[i]->cancel : NULL));
}

/* Runs the batch that d leads. Locked on entry and return. */
static void lead(ibid_sched *s, ibid_decoder *d, ibid_engine *e) {
    ibid_decoder *batch[IBID_DECODE_MAX];
    enter_question(s);
    linger(s);
    size_t n = take(s, batch);
    (void)pthread_mutex_unlock(&s->lock);
    uint64_t start = ibid_now_ns();
    run_batch(e, batch, n);
    uint64_t took = ibid_now_ns() - start;
    (void)pthread_mutex_lock(&s->lock);
    s->batch_ns = took;
    s->batches++;
    s->decoded += n;
    s->expected = n;
    for (size_t i = 0; i < n; i++) {
        batch[i]->batch = s->batches;
        batch[i]->done = true;
        if (batch[i] != d) (void)pthread_cond_signal(&batch[i]->woken);
    }
    s->busy = false;
    (void)pthread_cond_broadcast(&s->changed);
}

ibid_err ibid_sched_decode(ibid_sched *s, ibid_decoder *d, ibid_engine *e, ibid_step *step,
                           const atomic_bool *cancel) {
    d->step = step;
    d->cancel = cancel;
    (void)pthread_mutex_lock(&s->lock);
    if (!d->open) cond_open(&d->woken);
    d->open = true;
    join(s, d);
    while (!d->done && !d->leads) (void)pthread_cond_wait(&d->woken, &s->lock);
    if (!d->done) lead(s, d, e);
    (void)pthread_mutex_unlock(&s->lock);
    return d->err ? ibid_fail(d->err, "%s", d->detail) : IBID_OK;
}

void ibid_decoder_leave(ibid_sched *s, ibid_decoder *d) {
    (void)pthread_mutex_lock(&s->lock);
    not_expected(s, d);
    (void)pthread_mutex_unlock(&s->lock);
    if (d->open) (void)pthread_cond_destroy(&d->woken);
    d->open = false;
}

void ibid_sched_counts(ibid_sched *s, uint64_t *questions, uint64_t *encoders) {
    (void)pthread_mutex_lock(&s->lock);
    *questions = s->questions;
    *encoders = s->encoders;
    (void)pthread_mutex_unlock(&s->lock);
}
