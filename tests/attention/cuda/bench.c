/* How fast the device is, against its own limits: copies, products of matrices, attention over
 * pages, and the whole engine in the shape of an 8B model with random weights and random KV. Every
 * number is measured here; goals are judged on a GPU only, not on the emulator. Weights and KV
 * repeat one random stretch at other addresses: the device does not know, and a CPU could not make
 * as much in time.
 *   gpu_bench          the whole table, some minutes
 *   gpu_bench tiny     every step once with small shapes: that it runs */
#include "attention/cuda/plan.h"
#include "attention/engine.h"
#include "tests/attention/cuda/kernel_fixture.h"

#include "rpc/base/clock.h"
#include "rpc/base/mem.h"

#include <math.h>
#include <string.h>

typedef struct shape {
    size_t n_layers, n_heads, n_kv, dim, n_embd, n_ff, n_vocab;
    size_t copy_bytes, square, block, long_context, context, short_context, question, repeats;
} shape;

static const shape LARGE = {.n_layers = 32,
                            .n_heads = 32,
                            .n_kv = 8,
                            .dim = 128,
                            .n_embd = 4096,
                            .n_ff = 14336,
                            .n_vocab = 128256,
                            .copy_bytes = (size_t)2 << 30,
                            .square = 8192,
                            .block = 256,
                            .long_context = 128 * 1024,
                            .context = 32 * 1024,
                            .short_context = 4096,
                            .question = 50,
                            .repeats = 20};
static const shape TINY = {.n_layers = 3,
                           .n_heads = 4,
                           .n_kv = 1,
                           .dim = 64,
                           .n_embd = 256,
                           .n_ff = 256,
                           .n_vocab = 300,
                           .copy_bytes = 1 << 16,
                           .square = 64,
                           .block = 70,
                           .long_context = 280,
                           .context = 140,
                           .short_context = 140,
                           .question = 3,
                           .repeats = 2};

static shape sh;
static bool judged; /* on a GPU */

/* ---- The table ---- */

static char table[8192];
static size_t table_len;

static void line(const char *what, const char *value, const char *goal) {
    int n = snprintf(table + table_len, sizeof table - table_len, "%-58s %18s  %s\n", what, value,
                     goal);
    if (n > 0 && (size_t)n < sizeof table - table_len) table_len += (size_t)n;
    printf("%-58s %18s  %s\n", what, value, goal);
    (void)fflush(stdout);
}

/* goal 0: none. */
static void number(const char *what, double v, const char *unit, double goal, bool at_most) {
    char value[64], text[96] = "";
    (void)snprintf(value, sizeof value, "%.4g %s", v, unit);
    if (goal > 0)
        (void)snprintf(text, sizeof text, "goal %s %g %s: %s", at_most ? "at most" : "at least",
                       goal, unit,
                       !judged                             ? "not judged here"
                       : (at_most ? v <= goal : v >= goal) ? "met"
                                                           : "short");
    line(what, value, text);
}

/* ---- Timing ---- */

static ibid_device_event *before, *after;

static void start_clock(void) {
    MUST(ibid_device_record(fx.d, before, fx.s));
}

static double stop_clock(void) { /* ms */
    double ms = 0;
    MUST(ibid_device_record(fx.d, after, fx.s));
    MUST(ibid_device_event_sync(fx.d, after));
    MUST(ibid_device_sync(fx.d, fx.s));
    MUST(ibid_device_elapsed(fx.d, before, after, &ms));
    return ms > 0 ? ms : 1e-9;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *v, size_t n) {
    qsort(v, n, sizeof *v, by_size);
    return v[n / 2];
}

/* ---- Random memory on the device ---- */

static void *room_for(size_t bytes) {
    void *p = NULL;
    MUST(ibid_device_alloc(fx.d, bytes, &p));
    return p;
}

/* Device memory of n bytes that repeats a stretch of the host's. */
static uint8_t *repeated(const void *from, size_t stretch, size_t n) {
    uint8_t *p = room_for(n);
    size_t done = stretch < n ? stretch : n;
    MUST(ibid_device_upload(fx.d, fx.s, p, from, done));
    while (done < n) {
        size_t now = done < n - done ? done : n - done;
        MUST(ibid_device_copy(fx.d, fx.s, p + done, p, now));
        done += now;
    }
    MUST(ibid_device_sync(fx.d, fx.s));
    return p;
}

static uint64_t random_next(uint64_t *s) {
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

static void random_bytes(uint8_t *to, size_t n) {
    uint64_t s = 0x2545f4914f6cdd1d;
    for (size_t i = 0; i < n; i += 8) {
        uint64_t r = random_next(&s);
        memcpy(to + i, &r, n - i < 8 ? n - i : 8);
    }
}

/* f16 between 2^-7 and 2^-6, either sign: a harmless weight or scale. */
static void random_halves(uint16_t *to, size_t n, bool sign) {
    random_bytes((uint8_t *)to, n * sizeof *to);
    for (size_t i = 0; i < n; i++) to[i] = (uint16_t)((to[i] & (sign ? 0x83ff : 0x3ff)) | 0x2000);
}

/* ---- Limits ---- */

static double copy_rate, upload_rate; /* bytes a second */

static void measure_copies(void) {
    size_t n = sh.copy_bytes;
    void *a = room_for(n), *b = room_for(n), *h = NULL;
    MUST(ibid_device_fill(fx.d, fx.s, a, 1, n));
    MUST(ibid_device_copy(fx.d, fx.s, b, a, n));
    MUST(ibid_device_sync(fx.d, fx.s));
    start_clock();
    for (size_t i = 0; i < sh.repeats; i++) MUST(ibid_device_copy(fx.d, fx.s, b, a, n));
    copy_rate = 2 * (double)n * (double)sh.repeats / stop_clock() * 1e3;
    number("copy on the device, read and written", copy_rate / 1e9, "GB/s", 0, false);
    size_t pinned = n / 4;
    MUST(ibid_device_host_alloc(fx.d, pinned, &h));
    memset(h, 1, pinned);
    MUST(ibid_device_upload(fx.d, fx.s, a, h, pinned));
    MUST(ibid_device_sync(fx.d, fx.s));
    start_clock();
    for (size_t i = 0; i < 8; i++) MUST(ibid_device_upload(fx.d, fx.s, a, h, pinned));
    upload_rate = (double)pinned * 8 / stop_clock() * 1e3;
    number("copy from pinned host memory", upload_rate / 1e9, "GB/s", 0, false);
    ibid_device_host_free(fx.d, h);
    ibid_device_free(fx.d, a);
    ibid_device_free(fx.d, b);
}

static void measure_products(void) {
    size_t n = sh.square, stretch = n * n < 1 << 20 ? n * n : 1 << 20;
    uint16_t *host = ibid_alloc(stretch * sizeof *host);
    CHECK(host, "no memory");
    random_halves(host, stretch, true);
    uint16_t *w = (void *)repeated(host, stretch * 2, n * n * 2);
    uint16_t *h = (void *)repeated(host, stretch * 2, n * n * 2);
    float *y = room_for(n * n * sizeof *y);
    MUST(ibid_device_matmul(fx.d, fx.s, w, n, n, h, n, y, n));
    start_clock();
    for (size_t i = 0; i < sh.repeats; i++)
        MUST(ibid_device_matmul(fx.d, fx.s, w, n, n, h, n, y, n));
    double flops = 2 * (double)n * (double)n * (double)n * (double)sh.repeats;
    number("library's product of f16 matrices, f32 sums", flops / stop_clock() / 1e9, "TFLOP/s", 0,
           false);
    ibid_free(host);
    ibid_device_free(fx.d, w);
    ibid_device_free(fx.d, h);
    ibid_device_free(fx.d, y);
}

/* ---- Attention alone: one row over blocks, at every layer ---- */

typedef struct attention {
    ibidi_cu_shape m;
    ibidi_cu_page *pages;
    ibidi_cu_row row;
    ibidi_cu_plan plan;
    uint32_t n_pages, n_blocks;
    void *memory[16]; /* on the device */
    size_t n_memory;
    ibidi_cu_attend args;
    const ibidi_cu_tile *tiles;
    uint16_t *turned, *h;
    float *q, *lse;
} attention;

static void *keep(attention *a, void *p) {
    CHECK(a->n_memory < 16, "too many");
    return a->memory[a->n_memory++] = p;
}

static void *up(attention *a, const void *from, size_t n) {
    return keep(a, fx_up(from, n));
}

/* Pages of blocks, each of which wants queries turned its own way, and one live page. */
static void list_pages(attention *a, size_t tokens) {
    size_t per = (sh.block + IBIDI_CU_PAGE - 1) / IBIDI_CU_PAGE;
    a->n_blocks = (uint32_t)(tokens / sh.block);
    a->pages = ibid_calloc(a->n_blocks * per + 1, sizeof *a->pages);
    CHECK(a->pages, "no memory");
    for (uint32_t b = 0; b < a->n_blocks; b++) {
        for (size_t t = 0; t < sh.block; t += IBIDI_CU_PAGE) {
            size_t left = sh.block - t;
            a->pages[a->n_pages++] =
                (ibidi_cu_page){.keep = UINT64_MAX,
                                .start = (uint32_t)(b * sh.block + t),
                                .n = (uint32_t)(left < IBIDI_CU_PAGE ? left : IBIDI_CU_PAGE),
                                .turn = b + 1};
        }
    }
    a->pages[a->n_pages++] = (ibidi_cu_page){.keep = UINT64_MAX, .n = IBIDI_CU_PAGE, .live = 1};
}

static uint8_t *random_pages(const attention *a, size_t cells, size_t cell_bytes) {
    size_t stretch = cells < 16 ? cells : 16, head = ibidi_cu_head_bytes(a->m.head_dim, a->m.q8);
    size_t planes = 2 * ibidi_cu_plane_bytes(a->m.head_dim, a->m.q8);
    uint8_t *host = ibid_alloc(stretch * cell_bytes);
    CHECK(host, "no memory");
    for (size_t i = 0; i < stretch * sh.n_kv; i++) {
        uint8_t *p = host + i * head;
        if (a->m.q8)
            random_bytes(p, planes);
        else
            random_halves((void *)p, planes / 2, true);
        if (a->m.q8) random_halves((void *)(p + planes), (head - planes) / 2, false);
    }
    uint8_t *pool = repeated(host, stretch * cell_bytes, cells * cell_bytes);
    ibid_free(host);
    return pool;
}

static void open_attention(attention *a, size_t tokens, bool q8) {
    memset(a, 0, sizeof *a);
    size_t dim = sh.dim, q_dim = sh.n_heads * dim;
    a->m = (ibidi_cu_shape){.n_heads = (uint32_t)sh.n_heads,
                            .n_kv_heads = (uint32_t)sh.n_kv,
                            .head_dim = (uint32_t)dim,
                            .n_rot = (uint32_t)dim,
                            .group = (uint32_t)(sh.n_heads / sh.n_kv),
                            .q8 = q8};
    list_pages(a, tokens);
    size_t cell_bytes = sh.n_kv * ibidi_cu_head_bytes(a->m.head_dim, q8);
    size_t cells = sh.n_layers * a->n_pages;
    a->row = (ibidi_cu_row){.position = (uint32_t)(a->n_blocks * sh.block), .live = 0};
    ibidi_cu_piece piece = {.n = 1,
                            .pages = a->pages,
                            .first_live = a->n_pages - 1,
                            .n_turned = a->n_blocks + 1,
                            .last_position = a->row.position};
    MUST(ibidi_cu_plan_make(&a->m, &piece, 1, &a->row, &a->plan));
    uint32_t *numbers = ibid_alloc(cells * sizeof *numbers);
    float *turns = fx_normals((a->n_blocks + 1) * dim, 0.7f), *q = fx_normals(q_dim, 0.1f);
    CHECK(numbers, "no memory");
    for (size_t i = 0; i < cells; i++) /* as a pool that was used for long */
        numbers[i] = (uint32_t)(i / a->n_pages * a->n_pages + i * 7919 % a->n_pages);
    ibidi_cu_seq seq = {.pages = up(a, a->pages, a->n_pages * sizeof *a->pages),
                        .cells = up(a, numbers, cells * sizeof *numbers),
                        .turns = up(a, turns, (a->n_blocks + 1) * dim * sizeof *turns),
                        .room = a->n_pages,
                        .first_live = a->n_pages - 1};
    int fine = a->plan.n_tiles[1] != 0;
    a->tiles = up(a, a->plan.tiles, a->plan.n_tiles[fine] * sizeof *a->plan.tiles);
    a->turned = keep(a, fx_up(NULL, a->plan.n_turned * dim * IBIDI_CU_TURNED));
    a->h = keep(a, fx_up(NULL, q_dim * sizeof *a->h));
    a->lse = keep(a, fx_up(NULL, sh.n_heads * sizeof *a->lse));
    a->q = up(a, q, q_dim * sizeof *q);
    a->args = (ibidi_cu_attend){
        .tiles = a->tiles,
        .items = up(a, a->plan.items, a->plan.n_items[fine] * sizeof *a->plan.items),
        .rows = up(a, &a->row, sizeof a->row),
        .seqs = up(a, &seq, sizeof seq),
        .pool = keep(a, random_pages(a, cells, cell_bytes)),
        .turned = a->turned,
        .acc = keep(a, fx_up(NULL, a->plan.n_states * dim * sizeof(float))),
        .state = keep(a, fx_up(NULL, a->plan.n_states * 2 * sizeof(float)))};
    ibid_free(numbers);
    free(turns), free(q);
}

static void close_attention(attention *a) {
    while (a->n_memory) fx_free(a->memory[--a->n_memory]);
    ibid_free(a->pages);
    ibidi_cu_plan_fini(&a->plan);
}

static void put_layers(attention *a) {
    int fine = a->plan.n_tiles[1] != 0;
    for (size_t l = 0; l < sh.n_layers; l++) {
        a->args.layer = (uint32_t)l;
        MUST(ibidi_cu_turn(fx.s, &a->m, a->tiles, a->plan.n_tiles[fine], a->plan.max_turned, fine,
                           a->args.seqs, a->q, a->turned));
        MUST(ibidi_cu_attention(fx.s, &a->m, &a->args, a->plan.n_items[fine], fine));
        MUST(ibidi_cu_merge(fx.s, &a->m, &a->args, 1, a->h, sh.n_heads * sh.dim, a->lse));
    }
}

/* Milliseconds that attention of a decoding step takes, all layers, recorded as the engine does. */
static double time_attention(size_t tokens, bool q8, double *bytes) {
    attention a;
    ibid_device_graph *g = NULL;
    open_attention(&a, tokens, q8);
    put_layers(&a);
    MUST(ibid_device_sync(fx.d, fx.s));
    MUST(ibid_device_graph_begin(fx.d, fx.s));
    put_layers(&a);
    MUST(ibid_device_graph_end(fx.d, fx.s, &g));
    MUST(ibid_device_graph_launch(fx.d, g, fx.s));
    MUST(ibid_device_sync(fx.d, fx.s));
    start_clock();
    for (size_t i = 0; i < sh.repeats; i++) MUST(ibid_device_graph_launch(fx.d, g, fx.s));
    double ms = stop_clock() / (double)sh.repeats;
    *bytes = (double)sh.n_layers * (double)a.n_blocks * (double)sh.block * (double)sh.n_kv *
             (double)ibidi_cu_head_bytes(a.m.head_dim, q8) / IBIDI_CU_PAGE;
    ibid_device_graph_close(fx.d, g);
    close_attention(&a);
    return ms;
}

static void measure_attention(void) {
    for (int q8 = 1; q8 >= 0; q8--) {
        double bytes, ms = time_attention(sh.long_context, q8 != 0, &bytes);
        char what[96];
        (void)snprintf(what, sizeof what, "attention, %.3g GiB of %s KV a step: of copying's rate",
                       bytes / (double)(1 << 30), q8 ? "q8_0" : "f16");
        number(what, 100 * bytes / ms * 1e3 / copy_rate, "%", 85, false);
        (void)snprintf(what, sizeof what, "  the same (%.3f ms)", ms);
        number(what, bytes / ms / 1e6, "GB/s", 0, false);
        ms = time_attention(sh.short_context, q8 != 0, &bytes);
        (void)snprintf(what, sizeof what, "attention of a layer, batch 1, %zu tokens, %s",
                       sh.short_context, q8 ? "q8_0" : "f16");
        number(what, ms * 1e3 / (double)sh.n_layers, "us", 15, true);
    }
}

/* ---- The engine ---- */

typedef struct world {
    ibid_model m;
    ibid_layer *layers;
    uint8_t *weights;
    float *ones, *freq;
    ibid_kv_view *views; /* [n_layers] of any block */
    uint8_t *planes;
} world;

static ibid_tensor matrix(const world *w, size_t rows, size_t cols) {
    return (ibid_tensor){.type = IBID_Q8_0,
                         .rows = rows,
                         .cols = cols,
                         .row_bytes = ibid_type_row_bytes(IBID_Q8_0, cols),
                         .data = w->weights};
}

static ibid_tensor ones(const world *w) {
    return (ibid_tensor){.type = IBID_F32,
                         .rows = 1,
                         .cols = sh.n_embd,
                         .row_bytes = sh.n_embd * sizeof(float),
                         .data = w->ones};
}

static void make_weights(world *w) {
    size_t most = sh.n_vocab * sh.n_embd, ff = sh.n_ff * sh.n_embd;
    size_t bytes = (most > ff ? most : ff) / 32 * 34, stretch = 34 * 32768;
    w->weights = ibid_alloc(bytes);
    w->ones = ibid_alloc(sh.n_embd * sizeof *w->ones);
    CHECK(w->weights && w->ones, "no memory");
    random_bytes(w->weights, bytes < stretch ? bytes : stretch);
    uint16_t d = ibid_f32_to_f16(2e-4f);
    for (size_t i = 0; i < bytes && i < stretch; i += 34) memcpy(w->weights + i, &d, sizeof d);
    for (size_t i = stretch; i < bytes; i += stretch)
        memcpy(w->weights + i, w->weights, bytes - i < stretch ? bytes - i : stretch);
    for (size_t i = 0; i < sh.n_embd; i++) w->ones[i] = 1;
}

static void make_model(world *w) {
    size_t q = sh.n_heads * sh.dim, kv = sh.n_kv * sh.dim;
    make_weights(w);
    w->layers = ibid_calloc(sh.n_layers, sizeof *w->layers);
    w->freq = ibid_calloc(sh.dim / 2, sizeof *w->freq);
    CHECK(w->layers && w->freq, "no memory");
    for (size_t i = 0; i < sh.dim / 2; i++)
        w->freq[i] = (float)pow(500000, -2.0 * (double)i / (double)sh.dim);
    for (size_t l = 0; l < sh.n_layers; l++)
        w->layers[l] = (ibid_layer){.attn_norm = ones(w),
                                    .wq = matrix(w, q, sh.n_embd),
                                    .wk = matrix(w, kv, sh.n_embd),
                                    .wv = matrix(w, kv, sh.n_embd),
                                    .wo = matrix(w, sh.n_embd, q),
                                    .ffn_norm = ones(w),
                                    .gate = matrix(w, sh.n_ff, sh.n_embd),
                                    .up = matrix(w, sh.n_ff, sh.n_embd),
                                    .down = matrix(w, sh.n_embd, sh.n_ff)};
    w->m = (ibid_model){.arch = IBID_ARCH_LLAMA,
                        .name = "random",
                        .n_layers = sh.n_layers,
                        .n_embd = sh.n_embd,
                        .n_heads = sh.n_heads,
                        .n_kv_heads = sh.n_kv,
                        .head_dim = sh.dim,
                        .n_ff = sh.n_ff,
                        .n_vocab = sh.n_vocab,
                        .n_ctx = 1 << 20,
                        .norm_eps = 1e-5f,
                        .rope = {.pairing = IBID_PAIR_NEXT, .n_rot = sh.dim, .freq = w->freq},
                        .embed = matrix(w, sh.n_vocab, sh.n_embd),
                        .output_norm = ones(w),
                        .output = matrix(w, sh.n_vocab, sh.n_embd),
                        .layers = w->layers};
}

static void make_kv(world *w) {
    size_t plane = sh.n_kv * sh.block * sh.dim, scales = plane / 32;
    w->planes = ibid_alloc(2 * plane + 4 * scales);
    w->views = ibid_calloc(sh.n_layers, sizeof *w->views);
    CHECK(w->planes && w->views, "no memory");
    random_bytes(w->planes, 2 * plane);
    random_halves((void *)(w->planes + 2 * plane), 2 * scales, false);
    for (size_t l = 0; l < sh.n_layers; l++) {
        ibid_kv_view *v = &w->views[l];
        *v = (ibid_kv_view){.type = IBID_KV_Q8_0,
                            .n_tokens = sh.block,
                            .n_kv_heads = sh.n_kv,
                            .head_dim = sh.dim,
                            .k = w->planes,
                            .v = w->planes + plane};
        v->k_scale = (const uint16_t *)(const void *)(w->planes + 2 * plane);
        v->v_scale = v->k_scale + scales;
    }
}

static void free_world(world *w) {
    void *all[] = {w->layers, w->weights, w->ones, w->freq, w->views, w->planes};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ibid_free(all[i]);
}

static ibid_seq *open_context(ibid_engine *e, const world *w, size_t tokens) {
    ibid_seq *s = NULL;
    MUST(ibid_seq_open(e, 256, &s));
    for (size_t b = 0; b < tokens / sh.block; b++)
        MUST(ibid_seq_add_segment(
            s, &(ibid_segment){.layers = w->views, .offset = b * sh.block, .id = b + 1}));
    return s;
}

/* Milliseconds of a step of n rows at position at, its last row's token drawn. */
static double time_step(ibid_engine *e, ibid_seq *s, size_t n, size_t at, ibid_select *select) {
    int32_t *tokens = ibid_alloc(n * sizeof *tokens);
    uint32_t *positions = ibid_alloc(n * sizeof *positions);
    ibid_draw draw = {.top_p = 1};
    CHECK(tokens && positions, "no memory");
    for (size_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)((i * 131 + at) % sh.n_vocab);
        positions[i] = (uint32_t)(at + i);
    }
    ibid_step step = {.seq = s, .tokens = tokens, .positions = positions, .n = n};
    step.n_logits = 1;
    step.draw = &draw;
    step.select = select;
    uint64_t start = ibid_now_ns();
    MUST(ibid_engine_forward(e, &step, 1, NULL));
    double ms = (double)(ibid_now_ns() - start) / 1e6;
    ibid_free(tokens);
    ibid_free(positions);
    return ms;
}

/* The question's pass, from an open context to its first token. */
static double time_question(ibid_engine *e, const world *w, size_t tokens) {
    uint64_t start = ibid_now_ns();
    ibid_seq *s = open_context(e, w, tokens);
    (void)time_step(e, s, sh.question, tokens / sh.block * sh.block, NULL);
    double ms = (double)(ibid_now_ns() - start) / 1e6;
    ibid_seq_close(s);
    return ms;
}

/* Median of n steps of one row from position *at on, after four that do not count. */
static double median_step(ibid_engine *e, ibid_seq *s, size_t n, size_t *at, ibid_select *select) {
    double ms[31];
    CHECK(n <= 31, "%zu steps", n);
    for (size_t i = 0; i < 4; i++) (void)time_step(e, s, 1, (*at)++, select);
    for (size_t i = 0; i < n; i++) ms[i] = time_step(e, s, 1, (*at)++, select);
    return median(ms, n);
}

/* Steps one after another, then such that read a tenth of their context. */
static void measure_decoding(ibid_engine *e, const world *w, size_t tokens, double goal) {
    ibid_seq *s = open_context(e, w, tokens);
    ibid_select tenth = {.share = 0.1};
    size_t at = tokens / sh.block * sh.block;
    char what[96];
    for (int selects = 0; selects < 2; selects++) {
        ibid_select *select = selects ? &tenth : NULL;
        double ms = median_step(e, s, 31, &at, select);
        (void)snprintf(what, sizeof what, "decoding step, %zu tokens, %s", tokens,
                       selects ? "a tenth selected" : "q8_0 KV and weights");
        number(what, ms, "ms", selects ? 0 : goal, true);
    }
    if (tenth.seen)
        number("  of the context, read", 100 * (double)tenth.read / (double)tenth.seen, "%", 0,
               false);
    ibid_seq_close(s);
}

/* A context of which the pool holds a quarter (or two layers): steps that read all of it have it
 * brought, steps that choose a tenth what is missing of that. */
static void measure_beyond(const world *w) {
    size_t pages = sh.long_context / sh.block * ((sh.block + IBIDI_CU_PAGE - 1) / IBIDI_CU_PAGE);
    size_t layers = sh.n_layers / 4 < 2 ? 2 : sh.n_layers / 4;
    size_t page = sh.n_kv * ibidi_cu_head_bytes((uint32_t)sh.dim, 1);
    ibid_engine_opts o = {.backend = IBID_BACKEND_CUDA,
                          .gpu_memory = (pages * layers + 2 * sh.n_layers) * page};
    ibid_engine *e = NULL;
    ibid_engine_gpu look;
    char what[96];
    MUST(ibid_engine_open(&w->m, &o, &e));
    ibid_seq *s = open_context(e, w, sh.long_context);
    ibid_select tenth = {.share = 0.1};
    size_t at = sh.long_context / sh.block * sh.block;
    (void)time_step(e, s, 1, at++, NULL);
    double full = time_step(e, s, 1, at++, NULL);
    (void)snprintf(what, sizeof what, "decoding step, %zu tokens, pool of %zu of %zu layers, all",
                   sh.long_context, layers, sh.n_layers);
    number(what, full, "ms", 0, true);
    number("  of pinned copies' rate",
           100 * (double)(pages * page * sh.n_layers) / full * 1e3 / upload_rate, "%", 0, false);
    number("  the same, a tenth selected", median_step(e, s, 15, &at, &tenth), "ms", 0, true);
    CHECK(ibid_engine_gpu_look(e, &look) && look.streamed_steps >= 3, "the pool holds it all");
    ibid_seq_close(s);
    ibid_engine_close(e);
}

static void measure_engine(size_t memory) {
    world w = {0};
    ibid_engine *e = NULL;
    ibid_engine_gpu look;
    double ms[32], bytes = (double)sh.n_layers * (double)sh.n_kv * (double)sh.dim * 2.125;
    char what[96];
    make_model(&w);
    make_kv(&w);
    uint64_t start = ibid_now_ns();
    MUST(ibid_engine_open(&w.m, &(ibid_engine_opts){.backend = IBID_BACKEND_CUDA}, &e));
    number("the model's weights packed and uploaded (q8_0)", (double)(ibid_now_ns() - start) / 1e9,
           "s", 0, false);
    CHECK(ibid_engine_gpu_look(e, &look), "no GPU");
    printf("pool of %.1f GiB of %.1f\n", (double)look.pool / (1 << 30), (double)memory / (1 << 30));
    CHECK((double)look.pool > bytes * (double)sh.long_context, "the device's memory is too small");
    (void)time_question(e, &w, sh.block); /* what a process does once */
    double first = time_question(e, &w, sh.context);
    (void)snprintf(what, sizeof what, "first token, %zu tokens from host memory, %zu asked",
                   sh.context, sh.question);
    number(what, first, "ms", 0, true);
    for (size_t i = 0; i < 9; i++) ms[i] = time_question(e, &w, sh.context);
    double pooled = median(ms, 9);
    (void)snprintf(what, sizeof what, "first token, %zu tokens in the pool, %zu asked", sh.context,
                   sh.question);
    number(what, pooled, "ms", 20, true);
    if (first > pooled)
        number("  loading beside computing: of pinned copies' rate",
               100 * bytes * (double)(sh.context - sh.block) / first * 1e3 / upload_rate, "%", 0,
               false);
    measure_decoding(e, &w, sh.long_context, 10);
    measure_decoding(e, &w, sh.short_context, 0);
    CHECK(ibid_engine_gpu_look(e, &look), "no GPU");
    number("decoding steps that ran recorded", (double)look.graph_steps, "", 0, false);
    ibid_engine_close(e);
    measure_beyond(&w);
    free_world(&w);
}

int main(int argc, char **argv) {
    ibid_device_info info;
    sh = argc > 1 && strcmp(argv[1], "tiny") == 0 ? TINY : LARGE;
    fx_start(6004);
    MUST(ibid_device_describe(fx.d, &info));
    MUST(ibid_device_event_open(fx.d, &before));
    MUST(ibid_device_event_open(fx.d, &after));
#ifndef IBIDI_EMULATED
    judged = sh.n_layers == LARGE.n_layers;
#endif
    printf("%s: %s, compute capability %d.%d, %d units, %.1f GiB\n", ibid_device_library(),
           info.name, info.major, info.minor, info.n_units, (double)info.memory / (1 << 30));
    measure_copies();
    measure_products();
    measure_attention();
    ibid_device_event_close(fx.d, before);
    ibid_device_event_close(fx.d, after);
    fx_stop();
    measure_engine(info.memory);
    printf("\n%s: 8B shape of %zu layers, %zu heads, %zu kv heads of %zu\n%s", info.name,
           sh.n_layers, sh.n_heads, sh.n_kv, sh.dim, table);
    return 0;
}
