/* One 64-bit word, the gate, says which job is on and who is inside: the job's number in its upper
 * half, "open" in bit 31, the workers inside below. A worker enters by raising the count while the
 * gate is open; the caller closes the gate once no part is left and waits for the count to fall to
 * zero. So a worker that wakes late costs nobody anything, and no worker reads a job that is not
 * on.
 *
 * Sleeping is Dekker's pattern: the one who sleeps announces it, then looks at the gate again; the
 * one who changes the gate looks at the announcements after. Both in the total order of seq_cst. */
#include "attention/kernels/pool.h"

#include "rpc/base/mem.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { SPINS = 4000, MAX_CPUS = 4096 };

#define GATE_OPEN (UINT64_C(1) << 31)
#define GATE_INSIDE (GATE_OPEN - 1)
#define GATE_NUMBER(gate) ((gate) >> 32)

typedef struct worker {
    ibid_pool *pool;
    size_t number; /* 1 .. size - 1 */
    pthread_t id;
} worker;

struct ibid_pool {
    _Alignas(64) _Atomic uint64_t gate;
    _Alignas(64) _Atomic size_t next_part;
    _Alignas(64) _Atomic int sleepers; /* workers asleep or about to be */
    _Atomic int caller_sleeps;
    _Atomic int stop;
    pthread_mutex_t lock;
    pthread_cond_t job_on, all_out;
    size_t n_parts;
    void (*fn)(void *arg, size_t part, size_t thread);
    void *arg;
    size_t size, started;
    worker *workers; /* [size - 1] */
};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void work(ibid_pool *p, size_t thread) {
    for (;;) {
        size_t part = atomic_fetch_add_explicit(&p->next_part, 1, memory_order_relaxed);
        if (part >= p->n_parts) return;
        p->fn(p->arg, part, thread);
    }
}

/* Waits until the gate is open for a job later than *seen, and enters. False: the pool closes. */
static bool enter(ibid_pool *p, uint64_t *seen) {
    for (unsigned spins = 0;;) {
        uint64_t gate = atomic_load(&p->gate);
        if (atomic_load_explicit(&p->stop, memory_order_acquire)) return false;
        if ((gate & GATE_OPEN) && GATE_NUMBER(gate) != *seen) {
            if (atomic_compare_exchange_weak(&p->gate, &gate, gate + 1)) {
                *seen = GATE_NUMBER(gate);
                return true;
            }
            continue;
        }
        if (spins++ < SPINS) {
            relax();
            continue;
        }
        pthread_mutex_lock(&p->lock);
        atomic_fetch_add(&p->sleepers, 1);
        gate = atomic_load(&p->gate);
        while (!atomic_load(&p->stop) && (!(gate & GATE_OPEN) || GATE_NUMBER(gate) == *seen)) {
            pthread_cond_wait(&p->job_on, &p->lock);
            gate = atomic_load(&p->gate);
        }
        atomic_fetch_sub(&p->sleepers, 1);
        pthread_mutex_unlock(&p->lock);
        spins = 0;
    }
}

static void leave(ibid_pool *p) {
    uint64_t gate = atomic_fetch_sub(&p->gate, 1) - 1;
    if ((gate & (GATE_OPEN | GATE_INSIDE)) || !atomic_load(&p->caller_sleeps)) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_signal(&p->all_out);
    pthread_mutex_unlock(&p->lock);
}

static void *worker_main(void *arg) {
    worker *w = arg;
    uint64_t seen = 0;
    while (enter(w->pool, &seen)) {
        work(w->pool, w->number);
        leave(w->pool);
    }
    return NULL;
}

static void wait_all_out(ibid_pool *p) {
    for (unsigned i = 0; i < SPINS; i++) {
        if (!(atomic_load(&p->gate) & GATE_INSIDE)) return;
        relax();
    }
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->caller_sleeps, 1);
    while (atomic_load(&p->gate) & GATE_INSIDE) pthread_cond_wait(&p->all_out, &p->lock);
    atomic_store(&p->caller_sleeps, 0);
    pthread_mutex_unlock(&p->lock);
}

void ibid_pool_run(ibid_pool *p, size_t n_parts, void (*fn)(void *arg, size_t part, size_t thread),
                   void *arg) {
    if (p->size == 1 || n_parts <= 1) {
        for (size_t i = 0; i < n_parts; i++) fn(arg, i, 0);
        return;
    }
    /* Nobody is inside, and nobody can enter before the gate opens below. */
    p->n_parts = n_parts;
    p->fn = fn;
    p->arg = arg;
    atomic_store_explicit(&p->next_part, 0, memory_order_relaxed);
    uint64_t number = (GATE_NUMBER(atomic_load(&p->gate)) + 1) & UINT32_MAX;
    atomic_store(&p->gate, number << 32 | GATE_OPEN);
    if (atomic_load(&p->sleepers)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->job_on);
        pthread_mutex_unlock(&p->lock);
    }
    work(p, 0);
    atomic_fetch_and(&p->gate, ~GATE_OPEN);
    wait_all_out(p);
}

static bool read_number(const char *fmt, int cpu, long *out) {
    char path[96];
    snprintf(path, sizeof path, fmt, cpu);
    FILE *f = fopen(path, "re");
    bool ok = f && fscanf(f, "%ld", out) == 1;
    if (f) fclose(f);
    return ok;
}

/* Distinct (package, core) pairs among the CPUs this process may run on; hardware threads of one
 * core share its arithmetic units and would only get in each other's way. */
static size_t physical_cores(void) {
    cpu_set_t *set = CPU_ALLOC(MAX_CPUS);
    long(*cores)[2] = ibid_calloc(MAX_CPUS, sizeof *cores);
    size_t bytes = CPU_ALLOC_SIZE(MAX_CPUS), n = 0;
    if (!set || !cores || sched_getaffinity(0, bytes, set) != 0) goto done;
    for (int cpu = 0; cpu < MAX_CPUS; cpu++) {
        if (!CPU_ISSET_S((size_t)cpu, bytes, set)) continue;
        long id[2] = {-1, cpu}; /* unknown topology: every CPU is a core */
        if (!read_number("/sys/devices/system/cpu/cpu%d/topology/core_id", cpu, &id[1]) ||
            !read_number("/sys/devices/system/cpu/cpu%d/topology/physical_package_id", cpu,
                         &id[0])) {
            id[0] = -1, id[1] = cpu;
        }
        size_t i = 0;
        while (i < n && memcmp(cores[i], id, sizeof id) != 0) i++;
        if (i == n) memcpy(cores[n++], id, sizeof id);
    }
done:
    if (set) CPU_FREE(set);
    ibid_free(cores);
    return n ? n : 1;
}

ibid_err ibid_pool_open(size_t n_threads, ibid_pool **out) {
    ibid_pool *p = NULL;
    ibid_err err = IBID_NOMEM;
    if (n_threads == 0) n_threads = physical_cores();
    if (n_threads > MAX_CPUS) {
        return ibid_fail(IBID_BACKEND, "%zu threads asked for; at most %d", n_threads, MAX_CPUS);
    }
    p = ibid_alloc_aligned(_Alignof(ibid_pool), sizeof *p);
    if (!p) return ibid_fail(IBID_NOMEM, "no memory for a thread pool");
    memset(p, 0, sizeof *p);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->job_on, NULL);
    pthread_cond_init(&p->all_out, NULL);
    p->size = n_threads;
    p->workers = ibid_calloc(n_threads, sizeof *p->workers);
    if (!p->workers) {
        err = ibid_fail(IBID_NOMEM, "no memory for %zu threads", n_threads);
        goto done;
    }
    for (; p->started < n_threads - 1; p->started++) {
        worker *w = &p->workers[p->started];
        w->pool = p;
        w->number = p->started + 1;
        int rc = pthread_create(&w->id, NULL, worker_main, w);
        if (rc) {
            err = ibid_fail(IBID_BACKEND, "cannot start thread %zu: %s; ask for fewer threads",
                            w->number, strerror(rc));
            goto done;
        }
    }
    *out = p;
    p = NULL;
    err = IBID_OK;
done:
    ibid_pool_close(p);
    return err;
}

void ibid_pool_close(ibid_pool *p) {
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->stop, 1);
    pthread_cond_broadcast(&p->job_on);
    pthread_mutex_unlock(&p->lock);
    for (size_t i = 0; i < p->started; i++) pthread_join(p->workers[i].id, NULL);
    pthread_cond_destroy(&p->all_out);
    pthread_cond_destroy(&p->job_on);
    pthread_mutex_destroy(&p->lock);
    ibid_free(p->workers);
    ibid_free(p);
}

size_t ibid_pool_size(const ibid_pool *p) {
    return p->size;
}
