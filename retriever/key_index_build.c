/* Building a key index: rows from the store, cells in two levels, postings, probes by trial. */
#include "retriever/key_index_internal.h"

#include "retriever/maxsim.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    CELL_ROWS = 40,     /* tokens a cell stands for */
    HEAD_TOKENS = 24,   /* a block's first tokens know as little before them as a question's do */
    COARSE_SAMPLE = 64, /* training rows per cell of the first level, and of the second */
    FINE_SAMPLE = 32,
    COARSE_ROUNDS = 6,
    FINE_ROUNDS = 4,
    ASSIGN = 1024, /* rows a thread takes at a time */
    TRIALS = 24,   /* pseudo-questions for choosing probes */
    TRIAL_TOKENS = 16,
    TRIAL_TOP = 10,
    PROBES_MIN = 32, /* a block's tokens find each other more easily than real questions do */
    PROBES_MAX = 64
};
#define TRIAL_RECALL 0.995

typedef struct build {
    const ibidi_keyindex_opts *o;
    ibidi_keyindex_stamp stamp;
    ibid_snap *snap;
    ibid_pool *pool;
    ibidi_manifest m; /* filled as it becomes known */
    int8_t *keys;     /* [rows, dim] anonymous memory until the file's layout is known */
    size_t keys_room;
    float *train; /* scratch */
    size_t train_room;
    int8_t *cells; /* [n_cells, dim] */
    size_t room_cells;
    uint32_t *cell_of; /* [rows] */
} build;

/* ---- Rows ---- */
static ibid_err keys_of(const build *b, uint64_t block, ibid_keys *k, bool *ours) {
    ibid_err e = ibid_snap_keys(b->snap, block, k);
    if (e == IBID_BUSY && !(e = ibid_snap_renew(b->snap))) e = ibid_snap_keys(b->snap, block, k);
    *ours =
        !e && k->dim == b->stamp.dim && ibid_hash_cmp(&k->calibration, &b->stamp.calibration) == 0;
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

static ibid_err gather_rows(build *b, const ibidi_view *view) {
    size_t bytes;
    if (!ibid_mul_size((size_t)view->tokens + 1, b->stamp.dim, &bytes))
        return ibid_fail(IBID_TOOBIG, "a collection of %llu tokens",
                         (unsigned long long)view->tokens);
    b->keys = ibid_alloc(bytes);
    b->m.blocks = ibid_calloc(view->n + 1, sizeof *b->m.blocks);
    ibid_err e = b->keys && b->m.blocks
                     ? IBID_OK
                     : ibid_fail(IBID_NOMEM, "out of memory for %zu bytes of keys", bytes);
    for (size_t i = 0; i < view->n && !e; i++) {
        ibid_keys k;
        bool ours;
        e = keys_of(b, view->blocks[i].block, &k, &ours);
        /* A block's tokens never change, but let no surprise write past the end. */
        if (e || !ours || !k.n_tokens || b->m.rows + k.n_tokens > view->tokens) continue;
        memcpy(b->keys + b->m.rows * b->stamp.dim, k.data, k.n_tokens * k.dim);
        b->m.blocks[b->m.n_blocks++] =
            (ibidi_live){.block = view->blocks[i].block, .n_tokens = (uint32_t)k.n_tokens};
        b->m.rows += k.n_tokens;
    }
    return e;
}

/* ---- Cells ---- */
static ibid_err train_room(build *b, size_t n) {
    if (n <= b->train_room) return IBID_OK;
    ibid_free(b->train);
    b->train = ibid_alloc(n * b->stamp.dim * sizeof *b->train);
    b->train_room = b->train ? n : 0;
    return b->train ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for %zu training rows", n);
}

static void train_put(build *b, size_t at, uint64_t row) {
    size_t dim = b->stamp.dim;
    for (size_t d = 0; d < dim; d++)
        b->train[at * dim + d] = (float)b->keys[row * dim + d] * (1.0f / 127.0f);
}

/* Centroids have length 1 or are all zero. */
static ibid_err cells_put(build *b, const float *c, size_t n) {
    size_t dim = b->stamp.dim, want = (size_t)b->m.n_cells + n;
    if (want > b->room_cells) {
        size_t room = want * 2;
        int8_t *more = ibid_realloc(b->cells, room * dim);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for %zu cells", room);
        b->cells = more;
        b->room_cells = room;
    }
    for (size_t i = 0; i < n * dim; i++) {
        float v = fminf(1, fmaxf(-1, c[i])) * 127;
        b->cells[b->m.n_cells * dim + i] = (int8_t)lrintf(v);
    }
    b->m.n_cells += n;
    return IBID_OK;
}

typedef struct assign {
    const ibid_kernels *k;
    const int8_t *keys, *cells; /* [n, dim], [n_cells, dim] */
    size_t n, n_cells, dim;
    uint32_t *out; /* [n] */
} assign;

static void assign_part(void *arg, size_t part, size_t thread) {
    const assign *a = arg;
    int32_t best[ASSIGN];
    size_t at = part * ASSIGN, n = a->n - at < ASSIGN ? a->n - at : ASSIGN;
    (void)thread;
    a->k->maxsim_i8(a->keys + at * a->dim, n, a->cells, a->n_cells, a->dim, best, a->out + at);
}

static void assign_rows(const build *b, const int8_t *keys, size_t n, size_t cell0, size_t n_cells,
                        uint32_t *out) {
    assign a = {b->o->kernels, keys, b->cells + cell0 * b->stamp.dim, n, n_cells,
                b->stamp.dim,  out};
    ibid_pool_run(b->pool, (n + ASSIGN - 1) / ASSIGN, assign_part, &a);
}

/* The first level: rows from all over, half of them with as little context as a question's tokens
 * have, since questions have to find the cells as well as documents do. */
static ibid_err coarse(build *b, size_t k) {
    size_t want = k * COARSE_SAMPLE, n = 0;
    if (want > b->m.rows) want = (size_t)b->m.rows;
    ibid_err e = train_room(b, want);
    float *c = ibid_alloc(k * b->stamp.dim * sizeof *c);
    if (!e && !c) e = ibid_fail(IBID_NOMEM, "out of memory for %zu cells", k);
    uint64_t step = b->m.rows / (want - want / 2) + 1, row = 0;
    for (uint64_t r = 0; r < b->m.rows && n < want - want / 2 && !e; r += step)
        train_put(b, n++, r);
    size_t heads = b->m.n_blocks * HEAD_TOKENS / (want / 2 + 1) + 1, nth = 0;
    for (size_t i = 0; i < b->m.n_blocks && !e; row += b->m.blocks[i++].n_tokens)
        for (size_t t = 0; t < HEAD_TOKENS && t < b->m.blocks[i].n_tokens && n < want; t++)
            if (nth++ % heads == 0) train_put(b, n++, row + t);
    if (!e && n < k) k = n;
    if (!e) e = ibidi_cells_train(b->train, n, b->stamp.dim, k, COARSE_ROUNDS, b->o->threads, c);
    if (!e) e = cells_put(b, c, k);
    ibid_free(c);
    return e;
}

/* Splits the rows of one coarse cell, [n] of them at `mine`, into k cells. */
static ibid_err split(build *b, const uint32_t *mine, size_t n, size_t k, size_t first) {
    size_t dim = b->stamp.dim, take = k * FINE_SAMPLE < n ? k * FINE_SAMPLE : n;
    size_t cell0 = (size_t)b->m.n_cells;
    int8_t *keys = ibid_alloc(n * dim);
    uint32_t *near = ibid_alloc(n * sizeof *near);
    float *c = ibid_alloc(k * dim * sizeof *c);
    ibid_err e =
        keys && near && c ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for %zu rows", n);
    if (!e) e = train_room(b, take);
    if (!e) {
        for (size_t i = 0; i < n; i++) memcpy(keys + i * dim, b->keys + mine[i] * dim, dim);
        for (size_t i = 0; i < take; i++) train_put(b, i, mine[i * n / take]);
        e = ibidi_cells_train(b->train, take, dim, k, k == 1 ? 1 : FINE_ROUNDS, b->o->threads, c);
    }
    if (!e) e = cells_put(b, c, k);
    if (!e) {
        assign_rows(b, keys, n, cell0, k, near);
        for (size_t i = 0; i < n; i++) b->cell_of[mine[i]] = (uint32_t)(cell0 - first) + near[i];
    }
    ibid_free(keys);
    ibid_free(near);
    ibid_free(c);
    return e;
}

/* Rows in order of their coarse cell. starts [n_coarse + 1]. */
static void sort_rows(const build *b, size_t n_coarse, uint64_t *starts, uint32_t *rows) {
    memset(starts, 0, (n_coarse + 1) * sizeof *starts);
    for (uint64_t r = 0; r < b->m.rows; r++) starts[b->cell_of[r] + 1]++;
    for (size_t i = 0; i < n_coarse; i++) starts[i + 1] += starts[i];
    for (uint64_t r = 0; r < b->m.rows; r++) rows[starts[b->cell_of[r]]++] = (uint32_t)r;
    for (size_t i = n_coarse; i > 0; i--) starts[i] = starts[i - 1];
    starts[0] = 0;
}

static ibid_err train_cells(build *b) {
    uint64_t each = b->o->cell_rows ? b->o->cell_rows : CELL_ROWS;
    size_t n = (size_t)ceil(sqrt((double)(b->m.rows / each + 1)));
    ibid_err e = coarse(b, n);
    if (e) return e;
    n = (size_t)b->m.n_cells;
    assign_rows(b, b->keys, (size_t)b->m.rows, 0, n, b->cell_of);
    uint64_t *starts = ibid_alloc((n + 1) * sizeof *starts);
    uint32_t *rows = ibid_alloc(b->m.rows * sizeof *rows);
    if (!starts || !rows) e = ibid_fail(IBID_NOMEM, "out of memory for the cells' rows");
    if (!e) sort_rows(b, n, starts, rows);
    for (size_t i = 0; i < n && !e; i++) {
        size_t count = (size_t)(starts[i + 1] - starts[i]);
        size_t k = (size_t)((count + each / 2) / each);
        if (count) e = split(b, rows + starts[i], count, k ? k : 1, n);
    }
    if (!e) { /* only the second level stays */
        b->m.n_cells -= n;
        memmove(b->cells, b->cells + n * b->stamp.dim, b->m.n_cells * b->stamp.dim);
        b->m.trained_rows = b->m.rows;
    }
    ibid_free(starts);
    ibid_free(rows);
    return e;
}

static ibid_err make_cells(build *b) {
    if (!b->m.rows || b->m.rows < (b->o->cells_min ? b->o->cells_min : 1u << 20)) return IBID_OK;
    if (b->m.rows >= UINT32_MAX)
        return ibid_fail(IBID_TOOBIG, "a collection of %llu tokens", (unsigned long long)b->m.rows);
    b->cell_of = ibid_alloc(b->m.rows * sizeof *b->cell_of);
    if (!b->cell_of) return ibid_fail(IBID_NOMEM, "out of memory for the cells' rows");
    return train_cells(b);
}

/* ---- Postings ---- */
/* Two passes over the rows, counting and filling. last: the last block of a cell, plus one. */
static void count_posts(const build *b, uint64_t *starts, uint32_t *last) {
    uint64_t row = 0;
    for (size_t i = 0; i < b->m.n_blocks; i++)
        for (uint32_t t = 0; t < b->m.blocks[i].n_tokens; t++, row++) {
            uint32_t c = b->cell_of[row];
            if (last[c] == i + 1) continue;
            last[c] = (uint32_t)i + 1;
            starts[c + 1]++;
        }
    for (size_t c = 0; c < b->m.n_cells; c++) starts[c + 1] += starts[c];
}

static void fill_posts(const build *b, const uint64_t *starts, uint64_t *at, uint32_t *last,
                       uint32_t *posts) {
    uint64_t row = 0;
    memcpy(at, starts, b->m.n_cells * sizeof *at);
    memset(last, 0, b->m.n_cells * sizeof *last);
    for (size_t i = 0; i < b->m.n_blocks; i++)
        for (uint32_t t = 0; t < b->m.blocks[i].n_tokens; t++, row++) {
            uint32_t c = b->cell_of[row];
            if (last[c] == i + 1) continue;
            last[c] = (uint32_t)i + 1;
            posts[at[c]++] = (uint32_t)i;
        }
}

/* ---- The file ---- */
static void pack_keys(const build *b, uint8_t *to) {
    const int8_t *from = b->keys;
    for (size_t i = 0; i < b->m.n_blocks; i++) {
        size_t n = b->m.blocks[i].n_tokens;
        ibid_key_panels_pack(from, n, b->stamp.dim, to);
        from += n * b->stamp.dim;
        to += ibid_key_panels_of(n) * IBID_KEY_PANEL * b->stamp.dim;
    }
}

static ibid_err write_parts(build *b, const char *path, const ibidi_keyplan *plan,
                            const uint64_t *starts, uint64_t *at, uint32_t *last) {
    ibid_err e = IBID_OK;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) return ibid_fail_errno(errno, "create", path);
    /* Room first: a full disk must fail here, not as a signal while the map is written. */
    int rc = plan->size ? posix_fallocate(fd, 0, (off_t)plan->size) : 0;
    uint8_t *p = NULL;
    if (rc) e = ibid_fail_errno(rc, "make room for", path);
    if (!e && plan->size) {
        p = mmap(NULL, plan->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) e = ibid_fail_errno(errno, "map", path);
    }
    if (!e && p) {
        size_t dim = b->stamp.dim;
        if (b->m.n_cells) memcpy(p + plan->cells, b->cells, b->m.n_cells * dim);
        memcpy(p + plan->starts, starts, (b->m.n_cells + 1) * sizeof *starts);
        if (b->m.n_cells) fill_posts(b, starts, at, last, (uint32_t *)(void *)(p + plan->posts));
        pack_keys(b, p + plan->keys);
        munmap(p, plan->size);
    }
    close(fd);
    return e;
}

static ibid_err write_cells_file(build *b, const char *path) {
    ibidi_keyplan plan;
    size_t n = (size_t)b->m.n_cells;
    uint64_t *starts = ibid_calloc(n + 1, sizeof *starts), *at = ibid_calloc(n + 1, sizeof *at);
    uint32_t *last = ibid_calloc(n + 1, sizeof *last);
    ibid_err e =
        starts && at && last ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for %zu cells", n);
    if (!e && n) count_posts(b, starts, last);
    if (!e) b->m.n_posts = starts[n];
    if (!e)
        e = ibidi_keyplan_make(b->stamp.dim, ibidi_keyplan_panels(&b->m), n, b->m.n_posts, &plan);
    if (!e) e = write_parts(b, path, &plan, starts, at, last);
    ibid_free(starts);
    ibid_free(at);
    ibid_free(last);
    return e;
}

/* ---- Probes ---- */
typedef struct trial {
    ibidi_asking q;
    int8_t *keys; /* [TRIAL_TOKENS, dim], borrowed */
    double weights[TRIAL_TOKENS];
    uint64_t best[TRIAL_TOP];
    size_t n_best;
} trial;

static void keep_best(uint64_t *blocks, double *scores, size_t *n, uint64_t block, double score) {
    size_t i = *n;
    if (i == TRIAL_TOP && score <= scores[i - 1]) return;
    if (i < TRIAL_TOP)
        ++*n;
    else
        i--;
    for (; i > 0 && scores[i - 1] < score; i--) {
        scores[i] = scores[i - 1];
        blocks[i] = blocks[i - 1];
    }
    scores[i] = score;
    blocks[i] = block;
}

/* A run of a block's tokens stands for a question: of its head and of its middle by turns. */
static void make_trial(const build *b, const ibidi_keyindex *x, size_t nth, trial *t) {
    const ibidi_keyrow *from = &x->blocks[(2 * nth + 1) * x->n / (2 * TRIALS)];
    size_t n = from->n_tokens < TRIAL_TOKENS ? from->n_tokens : TRIAL_TOKENS;
    size_t skip = nth % 2 ? (from->n_tokens - n) / 2 : 0, dim = x->stamp.dim;
    double scores[TRIAL_TOP];
    int32_t best[TRIAL_TOKENS];
    t->q = (ibidi_asking){.keys = t->keys, .n = n, .dim = dim};
    for (size_t i = 0; i < n; i++)
        ibidi_keyindex_row(x, (size_t)(from - x->blocks), skip + i, t->keys + i * dim);
    for (size_t i = 0; i < n; i++) t->q.sum += t->weights[i] = 1;
    t->q.weights = t->weights;
    for (size_t i = 0; i < x->n; i++) {
        ibid_key_panels keys = ibidi_keyindex_block(x, i);
        b->o->kernels->maxsim_panels(t->keys, n, dim, &keys, 1, best);
        keep_best(t->best, scores, &t->n_best, x->blocks[i].block, ibidi_maxsim_sum(&t->q, best));
    }
}

static size_t found_of(const trial *t, const uint64_t *blocks, size_t n) {
    size_t found = 0;
    for (size_t i = 0; i < t->n_best; i++)
        for (size_t j = 0; j < n; j++)
            if (blocks[j] == t->best[i]) {
                found++;
                break;
            }
    return found;
}

/* The least probes with which the exact best of pseudo-questions are among the candidates. */
static ibid_err choose_probes(const build *b, ibidi_keyindex *x) {
    enum { CANDIDATES = 1000 };
    size_t found, total, n;
    bool all;
    ibid_err e = IBID_OK;
    if (!x->n_cells) return IBID_OK;
    uint64_t *blocks = ibid_alloc(CANDIDATES * sizeof *blocks);
    trial *t = ibid_calloc(TRIALS, sizeof *t);
    int8_t *keys = ibid_alloc(TRIALS * TRIAL_TOKENS * x->stamp.dim);
    if (!blocks || !t || !keys) e = ibid_fail(IBID_NOMEM, "out of memory for trials");
    for (size_t i = 0; i < TRIALS && !e; i++) {
        t[i].keys = keys + i * TRIAL_TOKENS * x->stamp.dim;
        make_trial(b, x, i, &t[i]);
    }
    for (x->probes = PROBES_MIN; !e; x->probes *= 2) {
        found = total = 0;
        for (size_t i = 0; i < TRIALS && !e; i++) {
            e = ibidi_keyindex_candidates(x, b->o->kernels, NULL, &t[i].q, x->probes, blocks,
                                          CANDIDATES, &n, &all);
            if (!e) found += found_of(&t[i], blocks, n);
            total += t[i].n_best;
        }
        if (x->probes >= PROBES_MAX || (double)found >= TRIAL_RECALL * (double)total) break;
    }
    ibid_free(blocks);
    ibid_free(keys);
    ibid_free(t);
    return e;
}

ibid_err ibidi_keyindex_build(const ibidi_keyindex_opts *o, const ibidi_keyindex_stamp *stamp,
                              ibid_snap *snap, const ibidi_view *view, const char *dir,
                              ibidi_keyindex **out) {
    char aside[IBIDI_KEYS_PATH];
    build b = {.o = o, .stamp = *stamp, .snap = snap, .m = {.stamp = *stamp}};
    ibidi_keyindex *x = NULL;
    ibidi_keyindex_path(aside, dir, stamp->generation, true);
    ibid_err e = stamp->dim && stamp->dim % 32 == 0 && stamp->dim <= 65536 && *aside
                     ? IBID_OK
                     : ibid_fail(IBID_INVAL, "token keys of %zu dimensions in %s", stamp->dim, dir);
    if (!e) e = ibid_pool_open(o->threads ? o->threads : 1, &b.pool);
    if (!e) e = gather_rows(&b, view);
    if (!e) e = make_cells(&b);
    if (!e) e = write_cells_file(&b, aside);
    ibid_free(b.keys);
    ibid_free(b.train);
    ibid_free(b.cells);
    ibid_free(b.cell_of);
    if (!e) e = ibidi_keyindex_map(aside, &b.m, false, &x);
    if (!e) e = choose_probes(&b, x);
    if (!e) e = ibidi_keyindex_publish(x, dir);
    ibid_free(b.m.blocks);
    ibid_pool_close(b.pool);
    if (e) {
        if (*aside) unlink(aside);
        ibidi_keyindex_close(x);
        return e;
    }
    *out = x;
    return IBID_OK;
}
