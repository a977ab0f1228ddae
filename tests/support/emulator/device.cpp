/* The device interface on the CPU. What is put on a stream is done as late as can be: when someone
 * waits for it, and not from a copy. Or, with IBID_EMULATOR_STREAMS set to a number, at any time,
 * drawn from that seed. Whoever reuses a staging buffer too early, or forgets an event between
 * streams, gets wrong results here too. */
#include "attention/cuda/device.h"
#include "tests/support/emulator/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <vector>

extern "C" float ibid_f16_to_f32(uint16_t h);

struct stream {
    std::deque<std::function<void()>> open; /* not done yet */
    uint64_t done;                          /* ever */
    bool running, keeping;
    std::vector<std::function<void()>> kept; /* for a graph */
};
struct ibid_device {
    bool gone;
};
struct ibid_device_event {
    stream *s;
    uint64_t number; /* in s, when it was recorded last */
    double at;
};
struct ibid_device_graph {
    std::vector<std::function<void()>> work;
};

static std::map<void *, size_t> blocks;
static size_t in_use, memory = (size_t)1 << 30;
static uint64_t fail_at, uploaded;
static bool fail_lost, lost;
static const char *lost_file;
static std::vector<stream *> streams;
static uint64_t random_state; /* 0: late */

extern "C" void ibidi_emulator_memory(size_t bytes) {
    memory = bytes ? bytes : (size_t)1 << 30;
}

extern "C" size_t ibidi_emulator_in_use(void) {
    return in_use;
}

extern "C" void ibidi_emulator_fail_at(uint64_t nth, bool device_lost) {
    fail_at = nth;
    fail_lost = device_lost;
}

extern "C" uint64_t ibidi_emulator_failing(void) {
    return fail_at;
}

extern "C" uint64_t ibidi_emulator_uploaded(void) {
    return uploaded;
}

static ibid_err trouble(const char *what) {
    if (lost_file && !lost && unlink(lost_file) == 0) lost = true;
    if (lost) return ibid_fail(IBID_BACKEND, "GPU lost: %s (emulated)", what);
    if (fail_at == 0 || --fail_at) return IBID_OK;
    lost = fail_lost;
    return ibid_fail(IBID_BACKEND, "GPU: %s failed (emulated)", what);
}

/* Does what is first on a stream until n things ever were. */
static void run_until(stream *s, uint64_t n) {
    while (s->done < n && !s->open.empty()) {
        if (s->running) {
            fprintf(stderr, "emulator: streams wait for each other\n");
            abort();
        }
        std::function<void()> f = s->open.front();
        s->open.pop_front();
        s->running = true;
        f();
        s->running = false;
        s->done++;
    }
}

static void run_open(stream *s) {
    run_until(s, UINT64_MAX);
}

static uint64_t random_below(uint64_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (random_state >> 33) % n;
}

/* Some of it is done sooner. */
static void run_some(void) {
    stream *s = streams[random_below(streams.size())];
    if (random_below(2)) run_until(s, s->done + random_below(s->open.size() + 1));
}

/* Launches of kernels come here too (grid.h). */
ibid_err ibidi_emulator_put(void *s, const char *what, std::function<void()> f);
ibid_err ibidi_emulator_put(void *s, const char *what, std::function<void()> f) {
    stream *st = (stream *)s;
    ibid_err err = trouble(what);
    if (err) return err;
    if (st->keeping)
        st->kept.push_back(f);
    else
        st->open.push_back(f);
    if (random_state && !st->keeping) run_some();
    return IBID_OK;
}

extern "C" const char *ibid_device_library(void) {
    return "a GPU emulated on the CPU, for tests";
}

extern "C" ibid_err ibid_device_open(int number, ibid_device **out) {
    if (number) return ibid_fail(IBID_NOTSUP, "GPU %d of 1", number);
    lost = false;
    /* For a process of its own: the device is lost once this file is there. */
    lost_file = getenv("IBID_EMULATOR_LOST");
    const char *seed = getenv("IBID_EMULATOR_STREAMS");
    random_state = seed ? strtoull(seed, NULL, 10) : 0;
    *out = new ibid_device{false};
    return IBID_OK;
}

extern "C" void ibid_device_close(ibid_device *d) {
    delete d;
}

extern "C" bool ibid_device_lost(const ibid_device *d) {
    (void)d;
    return lost;
}

extern "C" ibid_err ibid_device_describe(ibid_device *d, ibid_device_info *out) {
    (void)d;
    *out = ibid_device_info{"emulated", 9, 0, 132, memory, memory - in_use};
    return IBID_OK;
}

extern "C" ibid_err ibid_device_alloc(ibid_device *d, size_t bytes, void **out) {
    ibid_err err = trouble("allocating");
    (void)d;
    if (err) return err;
    size_t n = (bytes + 255) / 256 * 256;
    if (n > memory || in_use > memory - n)
        return ibid_fail(IBID_NOMEM, "GPU: allocating: out of device memory (emulated)");
    void *p = aligned_alloc(256, n ? n : 256);
    if (!p) return ibid_fail(IBID_NOMEM, "no memory");
    memset(p, 0xff, n ? n : 256); /* NaN */
    blocks[p] = n;
    in_use += n;
    *out = p;
    return IBID_OK;
}

extern "C" void ibid_device_free(ibid_device *d, void *p) {
    (void)d;
    if (!p) return;
    auto b = blocks.find(p);
    if (b == blocks.end()) abort();
    in_use -= b->second;
    blocks.erase(b);
    free(p);
}

extern "C" ibid_err ibid_device_host_alloc(ibid_device *d, size_t bytes, void **out) {
    ibid_err err = trouble("allocating pinned memory");
    (void)d;
    if (!err && !(*out = malloc(bytes ? bytes : 1))) err = ibid_fail(IBID_NOMEM, "no memory");
    return err;
}

extern "C" void ibid_device_host_free(ibid_device *d, void *p) {
    (void)d;
    free(p);
}

extern "C" ibid_err ibid_device_stream_open(ibid_device *d, ibidi_cu_stream *out) {
    ibid_err err = trouble("opening a stream");
    (void)d;
    if (err) return err;
    streams.push_back(new stream{{}, 0, false, false, {}});
    *out = streams.back();
    return IBID_OK;
}

extern "C" void ibid_device_stream_close(ibid_device *d, ibidi_cu_stream s) {
    (void)d;
    if (s && !lost) run_open((stream *)s);
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == s) streams.erase(streams.begin() + (ptrdiff_t)i--);
    delete (stream *)s;
}

extern "C" ibid_err ibid_device_sync(ibid_device *d, ibidi_cu_stream s) {
    ibid_err err = trouble("waiting for a stream");
    (void)d;
    if (!err) run_open((stream *)s);
    return err;
}

static ibid_err copy(ibidi_cu_stream s, void *to, const void *from, size_t n) {
    return ibidi_emulator_put(s, "copying", [=] { memmove(to, from, n); });
}

extern "C" ibid_err ibid_device_upload(ibid_device *d, ibidi_cu_stream s, void *to,
                                       const void *from, size_t n) {
    (void)d;
    uploaded += n;
    return copy(s, to, from, n);
}

extern "C" ibid_err ibid_device_download(ibid_device *d, ibidi_cu_stream s, void *to,
                                         const void *from, size_t n) {
    (void)d;
    return copy(s, to, from, n);
}

extern "C" ibid_err ibid_device_copy(ibid_device *d, ibidi_cu_stream s, void *to, const void *from,
                                     size_t n) {
    (void)d;
    return copy(s, to, from, n);
}

extern "C" ibid_err ibid_device_fill(ibid_device *d, ibidi_cu_stream s, void *p, int byte,
                                     size_t n) {
    (void)d;
    return ibidi_emulator_put(s, "filling", [=] { memset(p, byte, n); });
}

extern "C" ibid_err ibid_device_event_open(ibid_device *d, ibid_device_event **out) {
    ibid_err err = trouble("opening an event");
    (void)d;
    if (!err) *out = new ibid_device_event{NULL, 0, 0};
    return err;
}

extern "C" void ibid_device_event_close(ibid_device *d, ibid_device_event *e) {
    (void)d;
    delete e;
}

static double now_ms() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

extern "C" ibid_err ibid_device_record(ibid_device *d, ibid_device_event *e, ibidi_cu_stream s) {
    stream *st = (stream *)s;
    (void)d;
    e->s = st;
    e->number = st->done + st->running + st->open.size() + 1;
    return ibidi_emulator_put(s, "recording an event", [=] { e->at = now_ms(); });
}

extern "C" ibid_err ibid_device_wait(ibid_device *d, ibidi_cu_stream s, ibid_device_event *e) {
    stream *of = e->s;
    uint64_t number = e->number;
    (void)d;
    return ibidi_emulator_put(s, "waiting for an event", [=] {
        if (of) run_until(of, number);
    });
}

extern "C" ibid_err ibid_device_event_sync(ibid_device *d, ibid_device_event *e) {
    ibid_err err = trouble("waiting for an event");
    (void)d;
    if (!err && e->s) run_until(e->s, e->number);
    return err;
}

extern "C" ibid_err ibid_device_elapsed(ibid_device *d, ibid_device_event *from,
                                        ibid_device_event *to, double *ms) {
    (void)d;
    *ms = to->at - from->at;
    return trouble("timing");
}

extern "C" ibid_err ibid_device_graph_begin(ibid_device *d, ibidi_cu_stream s) {
    ibid_err err = trouble("beginning a graph");
    (void)d;
    if (err) return err;
    run_open((stream *)s);
    ((stream *)s)->keeping = true;
    return IBID_OK;
}

extern "C" ibid_err ibid_device_graph_end(ibid_device *d, ibidi_cu_stream s,
                                          ibid_device_graph **out) {
    stream *st = (stream *)s;
    (void)d;
    st->keeping = false;
    std::vector<std::function<void()>> work;
    work.swap(st->kept);
    ibid_err err = trouble("ending a graph");
    if (!err) *out = new ibid_device_graph{work};
    return err;
}

extern "C" ibid_err ibid_device_graph_launch(ibid_device *d, ibid_device_graph *g,
                                             ibidi_cu_stream s) {
    (void)d;
    return ibidi_emulator_put(s, "running a graph", [=] {
        for (auto &f : g->work) f();
    });
}

extern "C" void ibid_device_graph_close(ibid_device *d, ibid_device_graph *g) {
    (void)d;
    delete g;
}

extern "C" ibid_err ibid_device_matmul(ibid_device *d, ibidi_cu_stream s, const uint16_t *w,
                                       size_t rows, size_t cols, const uint16_t *h, size_t n,
                                       float *y, size_t ldy) {
    (void)d;
    return ibidi_emulator_put(s, "multiplying", [=] {
        std::vector<float> row(cols);
        for (size_t r = 0; r < rows; r++) {
            for (size_t c = 0; c < cols; c++) row[c] = ibid_f16_to_f32(w[r * cols + c]);
            for (size_t i = 0; i < n; i++) {
                double sum = 0;
                for (size_t c = 0; c < cols; c++)
                    sum += (double)row[c] * (double)ibid_f16_to_f32(h[i * cols + c]);
                y[i * ldy + r] = (float)sum;
            }
        }
    });
}
