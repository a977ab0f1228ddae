#include "attention/plan/scheduler.h"

#include "rpc/base/clock.h"

#include <time.h>

enum { PATIENCE_S = 10, SLICE_NS = 200000000 };

void ibid_sched_init(ibid_sched *s) {
    pthread_condattr_t a;
    *s = (ibid_sched){.patience_ns = PATIENCE_S * UINT64_C(1000000000)};
    (void)pthread_mutex_init(&s->lock, NULL);
    (void)pthread_condattr_init(&a);
    (void)pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&s->changed, &a);
    (void)pthread_condattr_destroy(&a);
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
        uint64_t until = ibid_now_ns() + SLICE_NS;
        struct timespec at = {.tv_sec = (time_t)(until / 1000000000u),
                              .tv_nsec = (long)(until % 1000000000u)};
        (void)pthread_cond_timedwait(&s->changed, &s->lock, &at);
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

void ibid_sched_counts(ibid_sched *s, uint64_t *questions, uint64_t *encoders) {
    (void)pthread_mutex_lock(&s->lock);
    *questions = s->questions;
    *encoders = s->encoders;
    (void)pthread_mutex_unlock(&s->lock);
}
