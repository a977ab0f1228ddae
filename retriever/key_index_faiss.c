#include "retriever/key_index_faiss.h"

#include "rpc/base/log.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <faiss/c_api/IndexIVF_c.h>
#include <faiss/c_api/Index_c.h>
#include <faiss/c_api/error_c.h>
#include <faiss/c_api/index_factory_c.h>
#include <faiss/c_api/index_io_c.h>

/* libgomp comes with FAISS; the setting is per calling thread. */
extern void omp_set_num_threads(int n) __attribute__((weak));

enum {
    BATCH = 4096,         /* rows turned to floats at a time */
    SAMPLE_SQ8 = 1 << 16, /* training rows */
    SAMPLE_PER_LIST = 48,
    MANIFEST_HEAD = 88,
    PATH_ROOM = 4200
};
#define MANIFEST_MAX ((size_t)4 << 30)

typedef struct span { /* rows of one block */
    uint64_t row, block;
    uint32_t n_tokens;
} span;

struct ibidi_keyindex {
    FaissIndex *index;
    ibidi_keyindex_opts opts;
    ibidi_keyindex_stamp stamp;
    span *spans; /* ascending row */
    size_t n_spans, room;
    uint64_t *sorted; /* blocks, ascending; n_sorted of the spans are in it */
    size_t n_sorted;
    uint64_t rows, trained_rows;
    char kind[32];
    float *batch; /* [BATCH, dim] */
    size_t n_batch;
};

static ibid_err faiss_failed(int rc, const char *what) {
    if (!rc) return IBID_OK;
    const char *said = faiss_get_last_error();
    return ibid_fail(IBID_BACKEND, "FAISS cannot %s: %s", what, said ? said : "no reason given");
}

static void use_threads(size_t n) {
    if (omp_set_num_threads) omp_set_num_threads(n ? (int)n : 1);
}

/* ---- Filling ---- */
static ibid_err flush(ibidi_keyindex *x) {
    if (!x->n_batch) return IBID_OK;
    ibid_err e = faiss_failed(faiss_Index_add(x->index, (idx_t)x->n_batch, x->batch), "add rows");
    x->n_batch = 0;
    return e;
}

static void to_float(const int8_t *keys, size_t n, float *out) {
    for (size_t i = 0; i < n; i++) out[i] = (float)keys[i] * (1.0f / 127.0f);
}

static ibid_err add_span(ibidi_keyindex *x, uint64_t block, size_t n_tokens) {
    if (x->n_spans == x->room) {
        size_t room = x->room ? x->room * 2 : 256;
        span *s = ibid_realloc(x->spans, room * sizeof *s);
        if (!s) return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", room);
        x->spans = s;
        x->room = room;
    }
    x->spans[x->n_spans++] = (span){x->rows, block, (uint32_t)n_tokens};
    x->rows += n_tokens;
    return IBID_OK;
}

static ibid_err add_rows(ibidi_keyindex *x, const ibid_keys *k) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < k->n_tokens && !e; i++) {
        to_float(k->data + i * k->dim, k->dim, x->batch + x->n_batch * k->dim);
        if (++x->n_batch == BATCH) e = flush(x);
    }
    return e;
}

/* The stored keys of a block, if they are ours to index; renews a snapshot that aged. */
static ibid_err keys_of(const ibidi_keyindex *x, ibid_snap *snap, uint64_t block, ibid_keys *k,
                        bool *ours) {
    ibid_err e = ibid_snap_keys(snap, block, k);
    if (e == IBID_BUSY) {
        e = ibid_snap_renew(snap);
        if (!e) e = ibid_snap_keys(snap, block, k);
    }
    *ours =
        !e && k->dim == x->stamp.dim && ibid_hash_cmp(&k->calibration, &x->stamp.calibration) == 0;
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

static int by_number(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static ibid_err sort_blocks(ibidi_keyindex *x) {
    if (x->n_sorted == x->n_spans) return IBID_OK;
    uint64_t *s = ibid_realloc(x->sorted, x->n_spans * sizeof *s);
    if (!s) return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", x->n_spans);
    x->sorted = s;
    for (size_t i = x->n_sorted; i < x->n_spans; i++) s[i] = x->spans[i].block;
    qsort(s, x->n_spans, sizeof *s, by_number);
    x->n_sorted = x->n_spans;
    return IBID_OK;
}

bool ibidi_keyindex_has(const ibidi_keyindex *x, uint64_t block) {
    return x->n_sorted && bsearch(&block, x->sorted, x->n_sorted, sizeof block, by_number);
}

ibid_err ibidi_keyindex_extend(ibidi_keyindex *x, ibid_snap *snap, const ibidi_view *view,
                               uint64_t generation) {
    ibid_err e = IBID_OK;
    use_threads(x->opts.threads);
    for (size_t i = 0; i < view->n && !e; i++) {
        ibid_keys k;
        bool ours;
        if (ibidi_keyindex_has(x, view->blocks[i].block)) continue;
        e = keys_of(x, snap, view->blocks[i].block, &k, &ours);
        if (e || !ours) continue;
        e = add_span(x, view->blocks[i].block, k.n_tokens);
        if (!e) e = add_rows(x, &k);
    }
    if (!e) e = flush(x);
    if (!e) e = sort_blocks(x);
    if (!e && (uint64_t)faiss_Index_ntotal(x->index) != x->rows)
        e = ibid_fail(IBID_INTERNAL, "FAISS holds %lld rows, not %" PRIu64,
                      (long long)faiss_Index_ntotal(x->index), x->rows);
    if (!e) x->stamp.generation = generation;
    return e;
}

/* ---- Building ---- */
static void choose_kind(ibidi_keyindex *x, uint64_t rows, size_t *sample) {
    uint64_t flat = x->opts.flat_max ? x->opts.flat_max : 16384;
    uint64_t ivf = x->opts.ivf_min ? x->opts.ivf_min : 1u << 20;
    *sample = 0;
    if (rows >= ivf) {
        /* About two lists per square root of rows, a power of two. */
        double want = 2 * sqrt((double)rows);
        unsigned lists = 16;
        while (lists * 1.5 < want && lists < 1u << 16 && lists * 2 * SAMPLE_PER_LIST <= rows)
            lists *= 2;
        snprintf(x->kind, sizeof x->kind, "IVF%u,SQ8", lists);
        *sample = (size_t)lists * SAMPLE_PER_LIST;
        if (*sample < SAMPLE_SQ8) *sample = SAMPLE_SQ8;
    } else if (rows > flat) {
        snprintf(x->kind, sizeof x->kind, "SQ8");
        *sample = SAMPLE_SQ8;
    } else
        snprintf(x->kind, sizeof x->kind, "Flat");
}

/* SQ8 keeps each dimension's range as seen in training; keys lie in [-1, 1], and blocks added later
 * may go further than the sample did. */
static ibid_err whole_range(float **rows, size_t *n, size_t dim) {
    float *more = ibid_realloc(*rows, (*n + 2) * dim * sizeof *more);
    if (!more) return ibid_fail(IBID_NOMEM, "out of memory for training rows");
    for (size_t i = 0; i < dim; i++) {
        more[*n * dim + i] = -1;
        more[(*n + 1) * dim + i] = 1;
    }
    *rows = more;
    *n += 2;
    return IBID_OK;
}

/* Rows of every step-th block, spread over the whole collection. */
static ibid_err train(ibidi_keyindex *x, ibid_snap *snap, const ibidi_view *view, size_t sample) {
    size_t step = view->tokens / sample + 1, n = 0, room = 0, dim = x->stamp.dim;
    float *rows = NULL;
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < view->n && !e; i += step) {
        ibid_keys k;
        bool ours;
        e = keys_of(x, snap, view->blocks[i].block, &k, &ours);
        if (e || !ours) continue;
        if (n + k.n_tokens > room) {
            room = (n + k.n_tokens) * 2;
            float *more = ibid_realloc(rows, room * dim * sizeof *more);
            if (!more) {
                e = ibid_fail(IBID_NOMEM, "out of memory for %zu training rows", room);
                break;
            }
            rows = more;
        }
        to_float(k.data, k.n_tokens * dim, rows + n * dim);
        n += k.n_tokens;
    }
    if (!e && strcmp(x->kind, "SQ8") == 0) e = whole_range(&rows, &n, dim);
    if (!e) {
        use_threads(x->opts.threads);
        e = faiss_failed(faiss_Index_train(x->index, (idx_t)n, rows), "train");
    }
    ibid_free(rows);
    return e;
}

static void set_probes(ibidi_keyindex *x) {
    FaissIndexIVF *ivf = faiss_IndexIVF_cast(x->index);
    if (!ivf) return;
    size_t lists = faiss_IndexIVF_nlist(ivf), probes = lists / 32;
    faiss_IndexIVF_set_nprobe(ivf, probes < 16 ? 16 : probes);
}

static ibid_err open_empty(const ibidi_keyindex_opts *o, const ibidi_keyindex_stamp *stamp,
                           ibidi_keyindex **out) {
    if (stamp->dim == 0 || stamp->dim > 65536)
        return ibid_fail(IBID_INVAL, "token keys of %zu dimensions", stamp->dim);
    ibidi_keyindex *x = ibid_calloc(1, sizeof *x);
    if (!x) return ibid_fail(IBID_NOMEM, "out of memory for a key index");
    x->opts = *o;
    x->stamp = *stamp;
    x->batch = ibid_alloc(BATCH * stamp->dim * sizeof *x->batch);
    if (!x->batch) {
        ibid_free(x);
        return ibid_fail(IBID_NOMEM, "out of memory for a key index");
    }
    *out = x;
    return IBID_OK;
}

ibid_err ibidi_keyindex_build(const ibidi_keyindex_opts *o, const ibidi_keyindex_stamp *stamp,
                              ibid_snap *snap, const ibidi_view *view, ibidi_keyindex **out) {
    ibidi_keyindex *x = NULL;
    size_t sample;
    ibid_err e = open_empty(o, stamp, &x);
    if (e) return e;
    choose_kind(x, view->tokens, &sample);
    e = faiss_failed(faiss_index_factory(&x->index, (int)stamp->dim, x->kind, METRIC_INNER_PRODUCT),
                     "make an index");
    if (!e && sample) e = train(x, snap, view, sample);
    if (!e) set_probes(x);
    if (!e) e = ibidi_keyindex_extend(x, snap, view, stamp->generation);
    x->trained_rows = x->rows;
    if (e) {
        ibidi_keyindex_close(x);
        return e;
    }
    *out = x;
    return IBID_OK;
}

void ibidi_keyindex_close(ibidi_keyindex *x) {
    if (!x) return;
    if (x->index) faiss_Index_free(x->index);
    ibid_free(x->spans);
    ibid_free(x->sorted);
    ibid_free(x->batch);
    ibid_free(x);
}

const ibidi_keyindex_stamp *ibidi_keyindex_stamped(const ibidi_keyindex *x) {
    return &x->stamp;
}
uint64_t ibidi_keyindex_rows(const ibidi_keyindex *x) {
    return x->rows;
}
uint64_t ibidi_keyindex_trained_rows(const ibidi_keyindex *x) {
    return x->trained_rows;
}
const char *ibidi_keyindex_kind(const ibidi_keyindex *x) {
    return x->kind;
}

uint64_t ibidi_keyindex_dead_rows(const ibidi_keyindex *x, const ibidi_view *view) {
    uint64_t dead = 0;
    for (size_t i = 0; i < x->n_spans; i++)
        if (ibidi_view_at(view, x->spans[i].block) == view->n) dead += x->spans[i].n_tokens;
    return dead;
}

/* ---- Searching ---- */
typedef struct token_hit {
    size_t at; /* index of the block in the view */
    uint32_t token;
    float sim;
} token_hit;

static int by_block_token(const void *a, const void *b) {
    const token_hit *x = a, *y = b;
    if (x->at != y->at) return x->at < y->at ? -1 : 1;
    if (x->token != y->token) return x->token < y->token ? -1 : 1;
    return (x->sim < y->sim) - (x->sim > y->sim);
}

typedef struct scored {
    uint64_t block;
    double score;
} scored;

static int best_first(const void *a, const void *b) {
    const scored *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return (x->block > y->block) - (x->block < y->block);
}

static const span *span_of(const ibidi_keyindex *x, uint64_t row) {
    size_t lo = 0, hi = x->n_spans;
    while (hi - lo > 1) {
        size_t mid = (lo + hi) / 2;
        if (x->spans[mid].row <= row)
            lo = mid;
        else
            hi = mid;
    }
    return &x->spans[lo];
}

static size_t live_hits(const ibidi_keyindex *x, const ibidi_view *view, const idx_t *rows,
                        const float *sims, size_t n_tokens, size_t k, token_hit *hits) {
    size_t n = 0;
    for (size_t i = 0; i < n_tokens * k; i++) {
        if (rows[i] < 0 || (uint64_t)rows[i] >= x->rows) continue;
        size_t at = ibidi_view_at(view, span_of(x, (uint64_t)rows[i])->block);
        if (at < view->n) hits[n++] = (token_hit){at, (uint32_t)(i / k), sims[i]};
    }
    if (n) qsort(hits, n, sizeof *hits, by_block_token);
    return n;
}

static size_t add_up(const ibidi_asking *q, const ibidi_view *view, const token_hit *hits, size_t n,
                     scored *blocks) {
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
        bool first = i == 0 || hits[i].at != hits[i - 1].at;
        if (first) blocks[m++] = (scored){view->blocks[hits[i].at].block, 0};
        if (first || hits[i].token != hits[i - 1].token)
            blocks[m - 1].score += q->weights[hits[i].token] * hits[i].sim;
    }
    if (m) qsort(blocks, m, sizeof *blocks, best_first);
    return m;
}

ibid_err ibidi_keyindex_candidates(const ibidi_keyindex *x, const ibidi_asking *q,
                                   const ibidi_view *view, size_t k, uint64_t *blocks, size_t max,
                                   size_t *n, bool *all) {
    *n = 0;
    *all = k >= x->rows && !faiss_IndexIVF_cast(x->index); /* IVF looks into some lists only */
    if (k > x->rows) k = (size_t)x->rows;
    if (k == 0) return IBID_OK;
    size_t total;
    if (!ibid_mul_size(q->n, k, &total)) return ibid_fail(IBID_TOOBIG, "%zu candidates", k);
    float *vec = ibid_alloc(q->n * q->dim * sizeof *vec), *sims = ibid_calloc(total, sizeof *sims);
    idx_t *rows = ibid_calloc(total, sizeof *rows);
    token_hit *hits = ibid_calloc(total, sizeof *hits);
    scored *sums = ibid_calloc(total, sizeof *sums);
    ibid_err e = vec && sims && rows && hits && sums
                     ? IBID_OK
                     : ibid_fail(IBID_NOMEM, "out of memory for %zu token candidates", total);
    if (!e) {
        to_float(q->keys, q->n * q->dim, vec);
        use_threads(x->rows > 1u << 20 ? x->opts.threads : 1);
        e = faiss_failed(faiss_Index_search(x->index, (idx_t)q->n, vec, (idx_t)k, sims, rows),
                         "search");
    }
    if (!e) {
        size_t m = add_up(q, view, hits, live_hits(x, view, rows, sims, q->n, k, hits), sums);
        for (; *n < m && *n < max; ++*n) blocks[*n] = sums[*n].block;
    }
    ibid_free(vec);
    ibid_free(sims);
    ibid_free(rows);
    ibid_free(hits);
    ibid_free(sums);
    return e;
}

ibid_err ibidi_keyindex_compare(ibidi_keyindex *x, ibid_snap *snap, size_t step, double *mean) {
    size_t dim = x->stamp.dim;
    float *have = ibid_alloc(dim * sizeof *have);
    ibid_err e = have ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory");
    FaissIndexIVF *ivf = faiss_IndexIVF_cast(x->index);
    size_t count = 0;
    *mean = 0;
    if (!e && ivf) e = faiss_failed(faiss_IndexIVF_make_direct_map(ivf, 1), "map its rows");
    for (size_t i = 0; i < x->n_spans && !e; i += step) {
        ibid_keys k;
        bool ours;
        e = keys_of(x, snap, x->spans[i].block, &k, &ours);
        for (size_t j = 0; !e && ours && j < k.n_tokens; j++) {
            e = faiss_failed(faiss_Index_reconstruct(x->index, (idx_t)(x->spans[i].row + j), have),
                             "read a row");
            for (size_t d = 0; d < dim && !e; d++)
                *mean += fabs((double)have[d] - k.data[j * dim + d] / 127.0), count++;
        }
    }
    if (count) *mean /= (double)count;
    if (ivf) faiss_IndexIVF_make_direct_map(ivf, 0);
    ibid_free(have);
    return e;
}

/* ---- Files ---- */
static void store32(uint8_t *p, uint32_t v) {
    for (size_t i = 0; i < 4; i++) p[i] = (uint8_t)(v >> (8 * i));
}
static void store64(uint8_t *p, uint64_t v) {
    for (size_t i = 0; i < 8; i++) p[i] = (uint8_t)(v >> (8 * i));
}
static uint32_t load32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint64_t load64(const uint8_t *p) {
    return load32(p) | (uint64_t)load32(p + 4) << 32;
}

static ibid_err path_of(char out[PATH_ROOM], const char *dir, const char *name) {
    if (snprintf(out, PATH_ROOM, "%s/%s", dir, name) >= PATH_ROOM)
        return ibid_fail(IBID_INVAL, "path too long: %s", dir);
    return IBID_OK;
}

static void faiss_name(char out[64], uint64_t generation) {
    snprintf(out, 64, "keys-%" PRIu64 ".faiss", generation);
}

typedef struct mapped {
    uint8_t *p;
    size_t n;
} mapped;

static ibid_err map_file(const char *path, mapped *m) {
    struct stat st;
    ibid_err e = IBID_OK;
    *m = (mapped){NULL, 0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return ibid_fail_errno(errno, "open", path);
    if (fstat(fd, &st) != 0)
        e = ibid_fail_errno(errno, "stat", path);
    else if (st.st_size > 0) {
        m->n = (size_t)st.st_size;
        m->p = mmap(NULL, m->n, PROT_READ, MAP_PRIVATE, fd, 0);
        if (m->p == MAP_FAILED) e = ibid_fail_errno(errno, "map", path);
    }
    close(fd);
    if (e) *m = (mapped){NULL, 0};
    return e;
}

static void unmap(mapped *m) {
    if (m->p) munmap(m->p, m->n);
}

static ibid_err sync_path(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return ibid_fail_errno(errno, "open", path);
    ibid_err e = fsync(fd) == 0 ? IBID_OK : ibid_fail_errno(errno, "sync", path);
    close(fd);
    return e;
}

static ibid_err manifest_bytes(const ibidi_keyindex *x, uint64_t size, uint64_t sum, ibid_buf *b) {
    uint8_t head[MANIFEST_HEAD] = "IKM1", row[16] = {0}, tail[8];
    store32(head + 4, 1);
    store64(head + 8, x->stamp.generation);
    memcpy(head + 16, x->stamp.calibration.b, IBID_HASH_SIZE);
    store32(head + 48, (uint32_t)x->stamp.dim);
    store64(head + 56, x->rows);
    store64(head + 64, x->n_spans);
    store64(head + 72, size);
    store64(head + 80, sum);
    ibid_err e = ibid_buf_append(b, head, sizeof head);
    for (size_t i = 0; i < x->n_spans && !e; i++) {
        store64(row, x->spans[i].block);
        store32(row + 8, x->spans[i].n_tokens);
        e = ibid_buf_append(b, row, sizeof row);
    }
    store64(tail, ibid_checksum(b->data, b->len));
    return e ? e : ibid_buf_append(b, tail, sizeof tail);
}

static ibid_err write_file(const char *path, const ibid_buf *b) {
    FILE *f = fopen(path, "we");
    if (!f) return ibid_fail_errno(errno, "create", path);
    bool ok = fwrite(b->data, 1, b->len, f) == b->len && fflush(f) == 0 && fsync(fileno(f)) == 0;
    int err = errno;
    if (fclose(f) != 0 || !ok) return ibid_fail_errno(ok ? errno : err, "write", path);
    return IBID_OK;
}

/* Removes every keys-*.faiss but the one named (NULL: all). */
static void sweep(const char *dir, const char *keep) {
    char path[PATH_ROOM];
    DIR *d = opendir(dir);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d));) {
        if (strncmp(e->d_name, "keys-", 5) != 0 || (keep && strcmp(e->d_name, keep) == 0)) continue;
        if (path_of(path, dir, e->d_name) == IBID_OK) unlink(path);
    }
    closedir(d);
}

void ibidi_keyindex_remove(const char *dir) {
    char path[PATH_ROOM];
    if (path_of(path, dir, "keys.manifest") == IBID_OK) unlink(path);
    sweep(dir, NULL);
}

ibid_err ibidi_keyindex_save(const ibidi_keyindex *x, const char *dir) {
    char name[64], aside[80], path[PATH_ROOM], path_new[PATH_ROOM], man[PATH_ROOM],
        man_new[PATH_ROOM];
    mapped m = {NULL, 0};
    ibid_buf b;
    ibid_buf_init(&b, MANIFEST_MAX);
    faiss_name(name, x->stamp.generation);
    snprintf(aside, sizeof aside, "%s.new", name);
    ibid_err e = path_of(path, dir, name);
    if (!e) e = path_of(path_new, dir, aside);
    if (!e) e = path_of(man, dir, "keys.manifest");
    if (!e) e = path_of(man_new, dir, "keys.manifest.new");
    if (!e && faiss_write_index_fname(x->index, path_new) != 0) {
        const char *said = faiss_get_last_error();
        e = ibid_fail(IBID_IO, "FAISS cannot write %s: %s", path_new, said ? said : "?");
    }
    if (!e) e = sync_path(path_new);
    if (!e) e = map_file(path_new, &m);
    if (!e) e = manifest_bytes(x, m.n, ibid_checksum(m.p, m.n), &b);
    if (!e) e = write_file(man_new, &b);
    if (!e && rename(path_new, path) != 0) e = ibid_fail_errno(errno, "rename", path_new);
    if (!e && rename(man_new, man) != 0) e = ibid_fail_errno(errno, "rename", man_new);
    if (!e) e = sync_path(dir);
    unmap(&m);
    ibid_buf_fini(&b);
    if (e) {
        unlink(path_new);
        unlink(man_new);
    } else
        sweep(dir, name);
    return e;
}

ibid_err ibidi_manifest_read(const void *data, size_t n, ibidi_keyindex_stamp *stamp,
                             uint64_t *rows, uint64_t *file_size, uint64_t *file_sum,
                             ibidi_live **blocks, size_t *n_blocks) {
    const uint8_t *p = data;
    *blocks = NULL;
    if (n < MANIFEST_HEAD + 8 || memcmp(p, "IKM1", 4) != 0 || load32(p + 4) != 1)
        return ibid_fail(IBID_CORRUPT, "not a key index manifest of version 1");
    if (load64(p + n - 8) != ibid_checksum(p, n - 8))
        return ibid_fail(IBID_CORRUPT, "the manifest's checksum is wrong");
    uint64_t count = load64(p + 64), sum = 0;
    if (count != (n - MANIFEST_HEAD - 8) / 16 || (n - MANIFEST_HEAD - 8) % 16)
        return ibid_fail(IBID_CORRUPT, "the manifest's length does not fit its %" PRIu64 " blocks",
                         count);
    stamp->generation = load64(p + 8);
    memcpy(stamp->calibration.b, p + 16, IBID_HASH_SIZE);
    stamp->dim = load32(p + 48);
    *rows = load64(p + 56);
    *file_size = load64(p + 72);
    *file_sum = load64(p + 80);
    ibidi_live *l = ibid_calloc((size_t)count, sizeof *l);
    if (!l) return ibid_fail(IBID_NOMEM, "out of memory for %" PRIu64 " blocks", count);
    for (size_t i = 0; i < count; i++) {
        const uint8_t *row = p + MANIFEST_HEAD + 16 * i;
        l[i] = (ibidi_live){.block = load64(row), .n_tokens = load32(row + 8)};
        sum += l[i].n_tokens;
    }
    if (sum != *rows || stamp->dim == 0 || stamp->dim > 65536) {
        ibid_free(l);
        return ibid_fail(IBID_CORRUPT, "the manifest's numbers contradict each other");
    }
    *blocks = l;
    *n_blocks = (size_t)count;
    return IBID_OK;
}

static ibid_err check_faiss_file(const char *path, uint64_t size, uint64_t sum) {
    mapped m;
    ibid_err e = map_file(path, &m);
    if (e == IBID_NOTFOUND) return ibid_fail(IBID_CORRUPT, "%s is not there", path);
    if (!e && (m.n != size || ibid_checksum(m.p, m.n) != sum))
        e = ibid_fail(IBID_CORRUPT, "%s is not the file the manifest names", path);
    unmap(&m);
    return e;
}

static ibid_err read_faiss(ibidi_keyindex *x, const char *path, uint64_t rows) {
    if (faiss_read_index_fname(path, 0, &x->index) != 0) {
        const char *said = faiss_get_last_error();
        return ibid_fail(IBID_CORRUPT, "FAISS cannot read %s: %s", path, said ? said : "?");
    }
    if ((uint64_t)faiss_Index_ntotal(x->index) != rows ||
        (size_t)faiss_Index_d(x->index) != x->stamp.dim ||
        faiss_Index_metric_type(x->index) != METRIC_INNER_PRODUCT)
        return ibid_fail(IBID_CORRUPT, "%s does not hold what its manifest says", path);
    FaissIndexIVF *ivf = faiss_IndexIVF_cast(x->index);
    if (ivf)
        snprintf(x->kind, sizeof x->kind, "IVF%zu,SQ8", faiss_IndexIVF_nlist(ivf));
    else
        snprintf(x->kind, sizeof x->kind, "%s",
                 rows > (x->opts.flat_max ? x->opts.flat_max : 16384) ? "SQ8" : "Flat");
    set_probes(x);
    return IBID_OK;
}

ibid_err ibidi_keyindex_load(const char *dir, const ibidi_keyindex_stamp *want,
                             const ibidi_keyindex_opts *o, ibidi_keyindex **out) {
    char path[PATH_ROOM], name[64];
    ibidi_keyindex_stamp stamp;
    ibidi_keyindex *x = NULL;
    ibidi_live *blocks = NULL;
    uint64_t rows = 0, size = 0, sum = 0;
    size_t n = 0;
    mapped m = {NULL, 0};
    ibid_err e = path_of(path, dir, "keys.manifest");
    if (!e) e = map_file(path, &m);
    if (!e) e = ibidi_manifest_read(m.p, m.n, &stamp, &rows, &size, &sum, &blocks, &n);
    if (!e &&
        (stamp.dim != want->dim || ibid_hash_cmp(&stamp.calibration, &want->calibration) != 0))
        e = ibid_fail(IBID_MISMATCH, "key index in %s was made with another calibration", dir);
    if (!e && stamp.generation > want->generation)
        e = ibid_fail(IBID_MISMATCH, "key index in %s is newer than the store", dir);
    if (e) goto done;
    faiss_name(name, stamp.generation);
    if ((e = path_of(path, dir, name)) || (e = check_faiss_file(path, size, sum)) ||
        (e = open_empty(o, &stamp, &x)))
        goto done;
    for (size_t i = 0; i < n && !e; i++) e = add_span(x, blocks[i].block, blocks[i].n_tokens);
    if (!e) e = sort_blocks(x);
    if (!e) e = read_faiss(x, path, rows);
    if (!e) x->trained_rows = rows;
done:
    unmap(&m);
    ibid_free(blocks);
    if (e) {
        ibidi_keyindex_close(x);
        return e;
    }
    *out = x;
    return IBID_OK;
}
