/* Answers that decode together: the same bits as alone, whoever joins, leaves, is late, fails or is
 * cancelled; and encoding that yields to them. */
#include "attention/model/gguf.h"
#include "attention/model/internal.h"
#include "attention/plan/answer.h"
#include "attention/plan/prompt.h"
#include "rpc/base/clock.h"
#include "tests/support/engine_fixture.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
/* clang-format off */
#include <cmocka.h>
/* clang-format on */

enum { BLOCKS = 3, BLOCK_TOKENS = 120, ASKED = 6, SEED = 71 };

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

/* A model ready to answer, and three encoded blocks. */
typedef struct fixture {
    ibid_buf file;
    ibid_model *m;
    ibid_engine *e;
    ibid_sched sched;
    ibid_kv_blob prefix_kv;
    ibid_reader r;
    int32_t tokens[BLOCKS][BLOCK_TOKENS];
    ibid_reading read[BLOCKS];
    ibid_ids question;
} fixture;

static void read_blocks(fixture *f) {
    size_t done = 0;
    for (size_t b = 0; b < BLOCKS; b++) {
        fx_tokens(f->m, SEED + b, f->tokens[b], BLOCK_TOKENS);
        for (size_t i = 0; i < BLOCK_TOKENS; i++)
            f->tokens[b][i] = f->tokens[b][i] < 32 ? 32 : f->tokens[b][i]; /* no control token */
        f->read[b] = (ibid_reading){.tokens = f->tokens[b], .n = BLOCK_TOKENS};
    }
    while (done < BLOCKS) must(ibid_read_some(&f->r, f->read, BLOCKS, &done, true, NULL, NULL));
}

/* path: a file of a model; NULL: the small one. */
static void open_fixture(fixture *f, const char *path, bool int8) {
    static const char text[] = "Who built the mill, and when?";
    ibid_kv_type type = IBID_KV_F16;
    ibid_ids prefix;
    memset(f, 0, sizeof *f);
    ibid_buf_init(&f->file, (size_t)64 << 20);
    if (path) {
        must(ibid_model_open(path, NULL, &f->m));
        type = IBID_KV_Q8_0;
    } else {
        ibid_test_gguf spec = fx_shapes[2];
        ibid_hash fingerprint = {0};
        ibid_gguf *g = NULL;
        spec.n_ctx = 4096;
        must(ibid_test_build_gguf(&spec, &f->file));
        must(ibid_gguf_parse(f->file.data, f->file.len, "test model", &g));
        must(ibidi_model_build(g, &fingerprint, &f->m));
    }
    must(ibid_engine_open(f->m, &(ibid_engine_opts){.n_threads = 2, .int8 = int8}, &f->e));
    ibid_sched_init(&f->sched);
    must(ibid_prompt_prefix(f->m, &ibid_wording_default, &prefix));
    must(ibid_read_prefix(f->m, f->e, &f->sched, prefix.ids, prefix.n, type, &f->prefix_kv));
    f->r = (ibid_reader){.model = f->m,
                         .engine = f->e,
                         .sched = &f->sched,
                         .kv_type = type,
                         .prefix = {.layers = f->prefix_kv.layers},
                         .n_prefix = prefix.n};
    ibid_free(prefix.ids);
    read_blocks(f);
    must(ibid_prompt_question(f->m, &ibid_wording_default, (ibid_str){text, sizeof text - 1},
                              &f->question));
}

static void close_fixture(fixture *f) {
    for (size_t b = 0; b < BLOCKS; b++) ibid_kv_blob_fini(&f->read[b].kv);
    ibid_kv_blob_fini(&f->prefix_kv);
    ibid_free(f->question.ids);
    ibid_sched_fini(&f->sched);
    ibid_engine_close(f->e);
    ibid_model_close(f->m);
    ibid_buf_fini(&f->file);
}

/* ---- One answer ---- */

typedef struct asked {
    fixture *f;
    pthread_barrier_t *start; /* NULL: at once */
    size_t n_blocks, max_tokens;
    double temperature;
    uint64_t seed;
    size_t cancel_after; /* steps; 0: never */
    size_t sleep_after;  /* steps; 0: never */

    atomic_bool cancel;
    size_t ticks;
    float *mass[BLOCKS];
    ibid_err e;
    char *text;
    char finish[8];
    size_t n_tokens;
} asked;

static ibid_err tick(void *arg) {
    asked *a = arg;
    if (++a->ticks == a->cancel_after) atomic_store(&a->cancel, true);
    if (a->ticks == a->sleep_after) (void)nanosleep(&(struct timespec){.tv_nsec = 60000000}, NULL);
    return IBID_OK;
}

static void *answer(void *arg) {
    asked *a = arg;
    fixture *f = a->f;
    ibid_placed_block placed[BLOCKS];
    ibid_answered out;
    for (size_t b = 0; b < a->n_blocks; b++)
        placed[b] = (ibid_placed_block){f->read[b].kv.layers, f->tokens[b], f->r.n_prefix,
                                        b * BLOCK_TOKENS, 0};
    ibid_answer_plan p = {.blocks = placed,
                          .n_blocks = a->n_blocks,
                          .question = f->question.ids,
                          .n_question = f->question.n,
                          .max_tokens = a->max_tokens,
                          .temperature = a->temperature,
                          .top_p = a->temperature > 0 ? 0.95 : 0,
                          .seed = a->seed,
                          .mass = a->mass,
                          .tick = tick,
                          .arg = a,
                          .cancel = &a->cancel};
    if (a->start) (void)pthread_barrier_wait(a->start);
    ibid_sched_question_begin(&f->sched);
    a->e = ibid_answer_run(&f->r, &p, &out);
    ibid_sched_question_end(&f->sched);
    a->text = strdup(out.text.data ? out.text.data : "");
    a->n_tokens = out.completion_tokens;
    (void)snprintf(a->finish, sizeof a->finish, "%s", out.finish);
    ibid_buf_fini(&out.text);
    return NULL;
}

/* Six of different lengths over different blocks, greedy and sampled. */
static void prepare(fixture *f, asked *a, size_t scale) {
    memset(a, 0, ASKED * sizeof *a);
    for (size_t i = 0; i < ASKED; i++) {
        a[i].f = f;
        a[i].n_blocks = i % (BLOCKS + 1);
        a[i].max_tokens = (i + 1) * scale;
        a[i].temperature = i % 2 ? 1.3 : 0;
        a[i].seed = SEED + i;
        for (size_t b = 0; b < BLOCKS; b++) {
            a[i].mass[b] = calloc(BLOCK_TOKENS, sizeof(float));
            assert_non_null(a[i].mass[b]);
        }
    }
}

static void forget(asked *a) {
    for (size_t i = 0; i < ASKED; i++) {
        for (size_t b = 0; b < BLOCKS; b++) free(a[i].mass[b]);
        free(a[i].text);
    }
}

static void run_alone(asked *a) {
    for (size_t i = 0; i < ASKED; i++) (void)answer(&a[i]);
}

static void run_together(asked *a) {
    pthread_t t[ASKED];
    pthread_barrier_t start;
    assert_int_equal(pthread_barrier_init(&start, NULL, ASKED), 0);
    for (size_t i = 0; i < ASKED; i++) {
        a[i].start = &start;
        assert_int_equal(pthread_create(&t[i], NULL, answer, &a[i]), 0);
    }
    for (size_t i = 0; i < ASKED; i++) assert_int_equal(pthread_join(t[i], NULL), 0);
    (void)pthread_barrier_destroy(&start);
}

static void same(const asked *a, const asked *b) {
    assert_int_equal(a->e, IBID_OK);
    assert_int_equal(b->e, IBID_OK);
    assert_int_equal(a->n_tokens, b->n_tokens);
    assert_string_equal(a->text, b->text);
    assert_string_equal(a->finish, b->finish);
    for (size_t i = 0; i < a->n_blocks; i++)
        assert_memory_equal(a->mass[i], b->mass[i], BLOCK_TOKENS * sizeof(float));
}

static void check_together(fixture *f, size_t scale) {
    asked alone[ASKED], together[ASKED];
    prepare(f, alone, scale);
    prepare(f, together, scale);
    run_alone(alone);
    assert_int_equal(f->sched.late, 0);
    assert_true(f->sched.batches == f->sched.decoded);
    uint64_t batches = f->sched.batches, decoded = f->sched.decoded;
    run_together(together);
    for (size_t i = 0; i < ASKED; i++) same(&alone[i], &together[i]);
    batches = f->sched.batches - batches;
    decoded = f->sched.decoded - decoded;
    print_message("%zu tokens in %zu batches, %zu late\n", (size_t)decoded, (size_t)batches,
                  (size_t)f->sched.late);
    assert_int_equal(decoded, f->sched.decoded - decoded); /* as many as alone */
    assert_true(batches < decoded);
    forget(alone);
    forget(together);
}

static void test_small_models(void **state) {
    (void)state;
    for (int int8 = 0; int8 < 2; int8++) {
        fixture f;
        open_fixture(&f, NULL, int8);
        check_together(&f, 30);
        close_fixture(&f);
    }
}

static void test_default_model(void **state) {
    const char *path = fx_default_model();
    fixture f;
    (void)state;
    if (!path) skip();
    open_fixture(&f, path, true);
    check_together(&f, 6);
    close_fixture(&f);
}

/* One is cancelled after a few tokens, one is late once: the others do not notice. */
static void test_cancelled(void **state) {
    fixture f;
    asked alone[ASKED], together[ASKED];
    (void)state;
    open_fixture(&f, NULL, true);
    prepare(&f, alone, 30);
    prepare(&f, together, 30);
    run_alone(alone);
    together[3].cancel_after = 3;
    together[4].sleep_after = 2;
    run_together(together);
    for (size_t i = 0; i < ASKED; i++) {
        if (i == 3) continue;
        same(&alone[i], &together[i]);
    }
    assert_true(alone[3].n_tokens > 4 && alone[4].n_tokens > 3);
    assert_int_equal(together[3].e, IBID_CANCELLED);
    assert_int_equal(together[3].n_tokens, 3);
    assert_int_equal(strncmp(alone[3].text, together[3].text, strlen(together[3].text)), 0);
    forget(alone);
    forget(together);
    close_fixture(&f);
}

/* ---- Single steps ---- */

typedef struct stepper {
    fixture *f;
    ibid_seq *seq;
    int32_t token;
    uint32_t position;
    size_t n_steps;
    float *logits;
    atomic_bool cancel;
    ibid_err e;
    char detail[256];
} stepper;

static void open_stepper(stepper *s, fixture *f, int32_t token) {
    *s = (stepper){.f = f, .token = token, .position = (uint32_t)f->r.n_prefix, .n_steps = 1};
    s->logits = calloc(f->m->n_vocab, sizeof(float));
    assert_non_null(s->logits);
    must(ibid_seq_open(f->e, 0, &s->seq));
    must(ibid_seq_add_segment(s->seq, &f->r.prefix));
}

static void close_stepper(stepper *s) {
    ibid_seq_close(s->seq);
    free(s->logits);
}

static void *take_steps(void *arg) {
    stepper *s = arg;
    ibid_decoder d = {0};
    for (size_t i = 0; !s->e && i < s->n_steps; i++) {
        ibid_step step = {.seq = s->seq,
                          .tokens = &s->token,
                          .positions = &s->position,
                          .n = 1,
                          .n_logits = 1,
                          .logits = s->logits};
        s->e = ibid_sched_decode(&s->f->sched, &d, s->f->e, &step, &s->cancel);
        s->position++;
    }
    ibid_decoder_leave(&s->f->sched, &d);
    (void)snprintf(s->detail, sizeof s->detail, "%s", ibid_err_detail());
    return NULL;
}

static size_t waiting(ibid_sched *s) {
    size_t n = 0;
    (void)pthread_mutex_lock(&s->lock);
    for (const ibid_decoder *d = s->first; d; d = d->next) n++;
    (void)pthread_mutex_unlock(&s->lock);
    return n;
}

static void nap(void) {
    (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* All steps in as few batches as they fit: they gather while somebody else has the turn. fail:
 * the first allocation of the batch fails. */
static void step_together(fixture *f, stepper *s, size_t n, bool fail) {
    pthread_t t[64];
    ibid_sched_enter(&f->sched, true);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(pthread_create(&t[i], NULL, take_steps, &s[i]), 0);
    while (waiting(&f->sched) < n) nap();
    if (fail) ibid_alloc_fail_at(1);
    ibid_sched_leave(&f->sched);
    for (size_t i = 0; i < n; i++) assert_int_equal(pthread_join(t[i], NULL), 0);
}

static void as_alone(fixture *f, const stepper *s) {
    stepper one;
    open_stepper(&one, f, s->token);
    (void)take_steps(&one);
    must(one.e);
    must(s->e);
    assert_memory_equal(one.logits, s->logits, f->m->n_vocab * sizeof(float));
    close_stepper(&one);
}

static void test_errors(void **state) {
    fixture f;
    stepper s[6];
    (void)state;
    open_fixture(&f, NULL, true);
    for (size_t i = 0; i < 6; i++) open_stepper(&s[i], &f, 40 + (int32_t)i);
    s[1].token = -5;
    s[3].position = (uint32_t)f.m->n_ctx;
    atomic_store(&s[4].cancel, true);
    step_together(&f, s, 6, false);
    assert_int_equal(f.sched.batches, 1);
    assert_int_equal(s[1].e, IBID_INVAL);
    assert_non_null(strstr(s[1].detail, "token -5"));
    assert_int_equal(s[3].e, IBID_CONTEXT);
    assert_non_null(strstr(s[3].detail, "4097 positions"));
    assert_int_equal(s[4].e, IBID_CANCELLED);
    as_alone(&f, &s[0]);
    as_alone(&f, &s[2]);
    as_alone(&f, &s[5]);
    for (size_t i = 0; i < 6; i++) close_stepper(&s[i]);
    close_fixture(&f);
}

/* What fails for all together may succeed for each. */
static void test_no_memory(void **state) {
    fixture f;
    stepper s[3];
    (void)state;
    open_fixture(&f, NULL, true);
    for (size_t i = 0; i < 3; i++) open_stepper(&s[i], &f, 40 + (int32_t)i);
    step_together(&f, s, 3, true);
    ibid_alloc_fail_at(0);
    assert_int_equal(f.sched.batches, 1);
    for (size_t i = 0; i < 3; i++) {
        as_alone(&f, &s[i]);
        close_stepper(&s[i]);
    }
    close_fixture(&f);
}

static void test_many(void **state) {
    enum { MANY = IBID_DECODE_MAX + 9 };
    fixture f;
    static stepper s[MANY];
    (void)state;
    open_fixture(&f, NULL, true);
    for (size_t i = 0; i < MANY; i++) open_stepper(&s[i], &f, 40 + (int32_t)i);
    step_together(&f, s, MANY, false);
    assert_int_equal(f.sched.batches, 2);
    assert_int_equal(f.sched.decoded, MANY);
    for (size_t i = 0; i < MANY; i++) {
        as_alone(&f, &s[i]);
        close_stepper(&s[i]);
    }
    close_fixture(&f);
}

/* One of two leaves without saying so: the other waits for it once, and never again. */
static void test_late(void **state) {
    fixture f;
    stepper s[2];
    ibid_decoder stays = {0};
    (void)state;
    open_fixture(&f, NULL, true);
    for (size_t i = 0; i < 2; i++) open_stepper(&s[i], &f, 40);
    step_together(&f, s, 2, false); /* two who say so */
    assert_int_equal(f.sched.late, 0);
    ibid_step step = {.seq = s[0].seq,
                      .tokens = &s[0].token,
                      .positions = &s[0].position,
                      .n = 1,
                      .n_logits = 1,
                      .logits = s[0].logits};
    must(ibid_sched_decode(&f.sched, &stays, f.e, &step, NULL)); /* alone, and does not come back */
    s[0].position++;
    s[1].n_steps = 40;
    (void)take_steps(&s[1]);
    must(s[1].e);
    assert_int_equal(f.sched.late, 1);
    ibid_decoder_leave(&f.sched, &stays);
    for (size_t i = 0; i < 2; i++) close_stepper(&s[i]);
    close_fixture(&f);
}

/* ---- Encoding meanwhile ---- */

typedef struct encoder {
    fixture *f;
    atomic_bool stop;
    atomic_size_t turns; /* finished */
} encoder;

static void *encode(void *arg) {
    encoder *x = arg;
    while (!atomic_load(&x->stop)) {
        ibid_reading t = {.tokens = x->f->tokens[0], .n = BLOCK_TOKENS};
        size_t done = 0;
        must(ibid_read_some(&x->f->r, &t, 1, &done, true, NULL, NULL));
        ibid_kv_blob_fini(&t.kv);
        atomic_fetch_add(&x->turns, 1);
    }
    return NULL;
}

typedef struct watching {
    encoder *x;
    size_t ticks, at_first, at_last;
} watching;

static ibid_err watch(void *arg) {
    watching *w = arg;
    w->at_last = atomic_load(&w->x->turns);
    if (w->ticks++ == 0) w->at_first = w->at_last;
    return IBID_OK;
}

static void test_encoding_yields(void **state) {
    fixture f;
    pthread_t t;
    ibid_answered out;
    (void)state;
    open_fixture(&f, NULL, true);
    encoder x = {.f = &f};
    watching w = {.x = &x};
    ibid_answer_plan p = {.question = f.question.ids,
                          .n_question = f.question.n,
                          .max_tokens = 60,
                          .temperature = 1.3,
                          .seed = SEED + 1,
                          .tick = watch,
                          .arg = &w};
    assert_int_equal(pthread_create(&t, NULL, encode, &x), 0);
    for (size_t round = 1; round <= 3; round++) {
        while (atomic_load(&x.turns) < 3 * round) nap(); /* it goes on between questions */
        w.ticks = 0;
        ibid_sched_question_begin(&f.sched);
        must(ibid_answer_run(&f.r, &p, &out));
        ibid_sched_question_end(&f.sched);
        ibid_buf_fini(&out.text);
        assert_true(w.ticks > 5);
        /* The one that was under way when the question came may be counted late. */
        assert_true(w.at_last <= w.at_first + 1);
    }
    atomic_store(&x.stop, true);
    assert_int_equal(pthread_join(t, NULL), 0);
    close_fixture(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small_models),
        cmocka_unit_test(test_cancelled),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_many),
        cmocka_unit_test(test_late),
        cmocka_unit_test(test_encoding_yields),
        cmocka_unit_test(test_default_model),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed ? failed : fx_default_model() ? 0 : 77;
}
