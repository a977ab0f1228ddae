#include "tests/support/emulator/grid.h"
#include "attention/cuda/launch.h"
#include "rpc/base/sanitized.h"
#include "tests/support/emulator/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

/* A switch of stacks without a system call; swapcontext elsewhere, and where sanitizers watch. */
#if defined(__x86_64__) && !IBID_SANITIZED
#define FAST_SWITCH 1
extern "C" void ibidi_emulator_switch(void **from, void *to);
asm(".text\n.globl ibidi_emulator_switch\nibidi_emulator_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
#endif

namespace {

enum { WARP = 32, SLOT = 64, STACK = 256 * 1024, MAX_THREADS = 1024, SHARED_MAX = 232448 };

struct copy {
    void *to;
    const void *from;
};

struct fiber {
    void *sp;
    ucontext_t context;
    bool done;
    unsigned generation; /* of its warp's exchange */
    std::vector<copy> open;
    std::vector<std::vector<copy>> groups;
};

struct warp {
    unsigned arrived, generation;
    alignas(16) uint8_t slots[2][WARP * SLOT];
};

fiber fibers[MAX_THREADS];
warp warps[MAX_THREADS / WARP];
uint8_t *stacks;
unsigned n_threads, current, alive, arrived, generation;
const std::function<void()> *body;
uint64_t order_seed, order_state;
#ifdef FAST_SWITCH
void *scheduler_sp;
#else
ucontext_t scheduler;
#endif
alignas(16) uint8_t shared_memory[SHARED_MAX];

[[noreturn]] void stop(const char *why) {
    fprintf(stderr, "emulator: %s (block %u,%u,%u, thread %u)\n", why, emulator::block_index.x,
            emulator::block_index.y, emulator::block_index.z, current);
    abort();
}

/* ---- Switching stacks ---- */

void to_scheduler() {
    fiber *f = &fibers[current];
#ifdef FAST_SWITCH
    ibidi_emulator_switch(&f->sp, scheduler_sp);
#else
    swapcontext(&f->context, &scheduler);
#endif
}

void start() {
    (*body)();
    fibers[current].done = true;
    alive--;
    to_scheduler();
    stop("a thread ran on after its end");
}

void make(unsigned i) {
    fiber *f = &fibers[i];
    uint8_t *stack = stacks + (size_t)i * STACK;
    f->done = false;
    f->generation = 0;
    f->open.clear();
    f->groups.clear();
#ifdef FAST_SWITCH
    void **sp = (void **)(stack + STACK);
    *--sp = NULL; /* keeps the stack as after a call: 8 below a multiple of 16 */
    *--sp = (void *)start;
    for (int r = 0; r < 6; r++) *--sp = NULL;
    f->sp = sp;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = stack;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = &scheduler;
    makecontext(&f->context, start, 0);
#endif
}

void resume(unsigned i) {
    current = i;
    emulator::thread_index = dim3(i);
#ifdef FAST_SWITCH
    ibidi_emulator_switch(&scheduler_sp, fibers[i].sp);
#else
    swapcontext(&scheduler, &fibers[i].context);
#endif
}

void yield() {
    unsigned me = current;
    to_scheduler();
    if (current != me) stop("threads mixed up");
}

/* ---- A block ---- */

uint64_t random_next() {
    order_state ^= order_state << 13;
    order_state ^= order_state >> 7;
    order_state ^= order_state << 17;
    return order_state;
}

void shuffle(unsigned *order) {
    for (unsigned i = n_threads; order_seed && i > 1; i--) {
        unsigned j = (unsigned)(random_next() % i), o = order[i - 1];
        order[i - 1] = order[j];
        order[j] = o;
    }
}

unsigned progress() {
    unsigned sum = generation + (n_threads - alive);
    for (unsigned w = 0; w < n_threads / WARP; w++) sum += warps[w].generation;
    return sum;
}

void run_block() {
    unsigned order[MAX_THREADS], before;
    alive = n_threads;
    arrived = generation = 0;
    memset(warps, 0, sizeof warps);
    memset(shared_memory, 0xff, sizeof shared_memory);
    for (unsigned i = 0; i < n_threads; i++) {
        order[i] = i;
        make(i);
    }
    shuffle(order);
    while (alive) {
        before = progress();
        for (unsigned i = 0; i < n_threads; i++) {
            if (!fibers[order[i]].done) resume(order[i]);
        }
        if (alive && alive == arrived && alive < n_threads)
            stop("a barrier that ended threads never reach");
        if (progress() == before) stop("a barrier or an exchange that not all threads reach");
        shuffle(order);
    }
}

} // namespace

static const float *make_halves() {
    static float table[65536];
    for (uint32_t h = 0; h < 65536; h++) table[h] = ibid_f16_to_f32((uint16_t)h);
    return table;
}

namespace emulator {

const float *const halves = make_halves();
dim3 thread_index, block_index, block_size, grid_size;
uint8_t *dynamic_shared = shared_memory;

void barrier() {
    unsigned mine = generation;
    if (++arrived == n_threads) {
        arrived = 0;
        generation++;
        return;
    }
    while (generation == mine) yield();
}

const uint8_t *exchange(const void *mine, size_t size) {
    warp *w = &warps[current / WARP];
    fiber *f = &fibers[current];
    uint8_t *slots = w->slots[f->generation % 2];
    if (size > SLOT) stop("an exchange of too many bytes");
    memcpy(slots + current % WARP * size, mine, size);
    f->generation++;
    if (++w->arrived == WARP) {
        w->arrived = 0;
        w->generation++;
    }
    while ((int)(w->generation - f->generation) < 0) yield();
    return slots;
}

void copy_async(void *to, const void *from) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16)
        stop("an asynchronous copy that is not aligned");
    fibers[current].open.push_back(copy{to, from});
}

void copy_commit() {
    fiber *f = &fibers[current];
    f->groups.push_back(f->open);
    f->open.clear();
}

void copy_wait(int left) {
    fiber *f = &fibers[current];
    while ((int)f->groups.size() > left) {
        for (const copy &c : f->groups.front()) memcpy(c.to, c.from, 16);
        f->groups.erase(f->groups.begin());
    }
}

void run(dim3 grid, unsigned threads, size_t shared, const std::function<void()> &kernel) {
    if (threads > MAX_THREADS || threads % WARP || shared > SHARED_MAX || !grid.x || !grid.y ||
        !grid.z || grid.y > 65535 || grid.z > 65535)
        stop("a launch that no device takes");
    if (!stacks && getenv("IBID_EMULATOR_ORDER"))
        ibidi_emulator_order(strtoull(getenv("IBID_EMULATOR_ORDER"), NULL, 10));
    if (!stacks) stacks = (uint8_t *)aligned_alloc(64, (size_t)MAX_THREADS * STACK);
    if (!stacks) stop("no memory");
    n_threads = threads;
    body = &kernel;
    block_size = dim3(threads);
    grid_size = grid;
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = dim3(x, y, z);
                run_block();
            }
        }
    }
}

} // namespace emulator

extern "C" void ibidi_emulator_order(uint64_t seed) {
    order_seed = seed;
    order_state = seed * 0x9e3779b97f4a7c15u + 1;
}
