/* No allocation per token: malloc and its siblings are counted, whoever calls them, from the moment
 * all answers decode until the first of them has its last token. */
#include "attention/model/gguf.h"
#include "attention/model/internal.h"
#include "attention/plan/answer.h"
#include "attention/plan/prompt.h"
#include "rpc/base/sanitized.h"
#include "tests/support/engine_fixture.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
/* clang-format off */
#include <cmocka.h>
/* clang-format on */

#if defined(__GLIBC__) && !IBID_SANITIZED
#define COUNTING 1
#endif

static atomic_size_t n_allocations, n_ticks;

#ifdef COUNTING
/* glibc's own, under the names a program that replaces malloc may call. */
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t size);
extern void *__libc_memalign(size_t align, size_t size);
void *memalign(size_t align, size_t size);

void *malloc(size_t size) {
    atomic_fetch_add(&n_allocations, 1);
    return __libc_malloc(size);
}
void *calloc(size_t n, size_t size) {
    atomic_fetch_add(&n_allocations, 1);
    return __libc_calloc(n, size);
}
void *realloc(void *p, size_t size) {
    atomic_fetch_add(&n_allocations, 1);
    return __libc_realloc(p, size);
}
void *memalign(size_t align, size_t size) {
    atomic_fetch_add(&n_allocations, 1);
    return __libc_memalign(align, size);
}
void *aligned_alloc(size_t align, size_t size) {
    return memalign(align, size);
}
int posix_memalign(void **out, size_t align, size_t size) {
    *out = memalign(align, size);
    return *out ? 0 : 12; /* ENOMEM */
}
#endif

enum { ANSWERS = 4, TOKENS = 300, SEED = 5 };

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

typedef struct fixture {
    ibid_buf file;
    ibid_model *m;
    ibid_engine *e;
    ibid_sched sched;
    ibid_kv_blob prefix_kv;
    ibid_reader r;
    ibid_ids question;
} fixture;

static void open_fixture(fixture *f, const char *path, bool int8) {
    static const char text[] = "Which of them?";
    ibid_kv_type type = path ? IBID_KV_Q8_0 : IBID_KV_F16;
    ibid_ids prefix;
    memset(f, 0, sizeof *f);
    ibid_buf_init(&f->file, (size_t)64 << 20);
    if (path) {
        must(ibid_model_open(path, NULL, &f->m));
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
    must(ibid_prompt_question(f->m, &ibid_wording_default, (ibid_str){text, sizeof text - 1},
                              &f->question));
}

static void close_fixture(fixture *f) {
    ibid_kv_blob_fini(&f->prefix_kv);
    ibid_free(f->question.ids);
    ibid_sched_fini(&f->sched);
    ibid_engine_close(f->e);
    ibid_model_close(f->m);
    ibid_buf_fini(&f->file);
}

/* ---- Counting ---- */

typedef struct asked {
    fixture *f;
    size_t number, n_tokens;
    double temperature;
    size_t ticks;
    size_t first, last; /* allocations before its third token, and before its last */
    size_t from, to;    /* ticks of all at those moments */
    ibid_err e;
    char detail[256];
} asked;

static ibid_err tick(void *arg) {
    asked *a = arg;
    size_t now = atomic_load(&n_allocations), at = atomic_fetch_add(&n_ticks, 1);
    if (++a->ticks == 3) {
        a->first = now;
        a->from = at;
    }
    a->last = now;
    a->to = at;
    return IBID_OK;
}

static ibid_err hear(void *arg, const char *s, size_t n) {
    (void)arg;
    (void)s;
    (void)n;
    return IBID_OK;
}

static void *answer(void *arg) {
    asked *a = arg;
    ibid_answered out;
    ibid_answer_plan p = {.question = a->f->question.ids,
                          .n_question = a->f->question.n,
                          .max_tokens = a->n_tokens,
                          .temperature = a->temperature,
                          .top_p = a->temperature > 0 ? 0.9 : 0,
                          .seed = SEED + a->number,
                          .tick = tick,
                          .text = hear,
                          .arg = a};
    ibid_sched_question_begin(&a->f->sched);
    a->e = ibid_answer_run(&a->f->r, &p, &out);
    ibid_sched_question_end(&a->f->sched);
    (void)snprintf(a->detail, sizeof a->detail, "%s", ibid_err_detail());
    ibid_buf_fini(&out.text);
    return NULL;
}

/* Answers end when they like: if all are under way for too few tokens to tell, that does not count.
 */
static bool measure(fixture *f, size_t n, size_t n_tokens, double temperature, size_t seed) {
    pthread_t t[ANSWERS];
    asked a[ANSWERS];
    size_t begin = 0, end = SIZE_MAX, from = 0, to = SIZE_MAX;
    for (size_t i = 0; i < n; i++) {
        a[i] = (asked){.f = f, .n_tokens = n_tokens, .temperature = temperature};
        a[i].number = i + seed;
        assert_int_equal(pthread_create(&t[i], NULL, answer, &a[i]), 0);
    }
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(pthread_join(t[i], NULL), 0);
        if (a[i].e) fail_msg("%s", a[i].detail);
        if (a[i].ticks < 3) a[i].from = SIZE_MAX / 2;
        if (a[i].from > from) from = a[i].from;
        if (a[i].to < to) to = a[i].to;
        if (a[i].first > begin) begin = a[i].first;
        if (a[i].last < end) end = a[i].last;
    }
    if (to < from + 10 * n) return false;
    print_message("%zu at a time, temperature %g: %zu allocations in %zu tokens\n", n, temperature,
                  end - begin, to - from);
    assert_int_equal(begin, end);
    return true;
}

static void check(fixture *f, size_t n_tokens) {
    static const double temperature[] = {0, 1};
    for (size_t n = 1; n <= ANSWERS; n += ANSWERS - 1) {
        for (size_t i = 0; i < 2; i++) {
            size_t seed = 0, good = 0;
            for (; seed < 200 && good < 2; seed += ANSWERS) {
                /* The first of a size may still make room for the batch. */
                good += measure(f, n, n_tokens, temperature[i], seed);
                if (temperature[i] == 0 && good == 0) break; /* the same again */
            }
            if (temperature[i] > 0) assert_int_equal(good, 2);
        }
    }
}

static void test_counts(void **state) {
    (void)state;
    size_t before = atomic_load(&n_allocations);
    void *volatile p = malloc(10);
    free(p);
    assert_true(atomic_load(&n_allocations) > before);
    before = atomic_load(&n_allocations);
    assert_int_equal(posix_memalign((void **)(uintptr_t)&p, 64, 640), 0);
    free(p);
    assert_true(atomic_load(&n_allocations) > before);
}

static void test_small_model(void **state) {
    (void)state;
    for (int int8 = 0; int8 < 2; int8++) {
        fixture f;
        open_fixture(&f, NULL, int8);
        check(&f, TOKENS);
        close_fixture(&f);
    }
}

static void test_default_model(void **state) {
    const char *path = fx_default_model();
    fixture f;
    (void)state;
    if (!path) skip();
    open_fixture(&f, path, true);
    check(&f, 40);
    close_fixture(&f);
}

int main(void) {
#ifndef COUNTING
    (void)fprintf(stderr, "allocations cannot be counted in this build\n");
    return 77;
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_small_model),
        cmocka_unit_test(test_default_model),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed ? failed : fx_default_model() ? 0 : 77;
}
