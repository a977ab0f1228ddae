/* The key index's files: layout, manifest, opening, publishing. */
#include "retriever/key_index_internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { VERSION = 3, MANIFEST_HEAD = 112, MANIFEST_ROW = 16 };
#define MANIFEST_MAX ((size_t)4 << 30)

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

/* ---- Layout ---- */
#define COUNT_MAX ((uint64_t)1 << 40)

static uint64_t padded(uint64_t n) {
    return (n + 63) & ~(uint64_t)63;
}

ibid_err ibidi_keyplan_make(uint64_t dim, uint64_t panels, uint64_t cells, uint64_t posts,
                            ibidi_keyplan *out) {
    if (dim == 0 || dim > 65536 || panels > COUNT_MAX || cells > COUNT_MAX || posts > COUNT_MAX)
        return ibid_fail(IBID_CORRUPT, "a key index of %" PRIu64 " panels and %" PRIu64 " cells",
                         panels, cells);
    out->cells = 0;
    out->starts = padded(cells * dim);
    out->posts = out->starts + padded((cells + 1) * sizeof(uint64_t));
    out->keys = out->posts + padded(posts * sizeof(uint32_t));
    out->size = out->keys + padded(panels * IBID_KEY_PANEL * dim);
    return IBID_OK;
}

uint64_t ibidi_keyplan_panels(const ibidi_manifest *m) {
    uint64_t n = 0;
    for (size_t i = 0; i < m->n_blocks; i++) n += ibid_key_panels_of(m->blocks[i].n_tokens);
    return n;
}

static void path_of(char out[IBIDI_KEYS_PATH], const char *dir, const char *name) {
    if (snprintf(out, IBIDI_KEYS_PATH, "%s/%s", dir, name) >= IBIDI_KEYS_PATH) out[0] = '\0';
}

void ibidi_keyindex_path(char out[IBIDI_KEYS_PATH], const char *dir, uint64_t generation,
                         bool aside) {
    char name[64];
    snprintf(name, sizeof name, "keys-%" PRIu64 ".cells%s", generation, aside ? ".new" : "");
    path_of(out, dir, name);
}

/* ---- The manifest ---- */
static ibid_err manifest_bytes(const ibidi_keyindex *x, ibid_buf *b) {
    uint8_t head[MANIFEST_HEAD] = "IKM3", row[MANIFEST_ROW] = {0}, tail[8];
    store32(head + 4, VERSION);
    store64(head + 8, x->stamp.generation);
    memcpy(head + 16, x->stamp.calibration.b, IBID_HASH_SIZE);
    store32(head + 48, (uint32_t)x->stamp.dim);
    store32(head + 52, (uint32_t)x->probes);
    store64(head + 56, x->rows);
    store64(head + 64, x->n);
    store64(head + 72, x->size);
    store64(head + 80, ibid_checksum(x->map, x->size));
    store64(head + 88, x->n_cells);
    store64(head + 96, x->n_posts);
    store64(head + 104, x->trained_rows);
    ibid_err e = ibid_buf_append(b, head, sizeof head);
    for (size_t i = 0; i < x->n && !e; i++) {
        store64(row, x->blocks[i].block);
        store32(row + 8, x->blocks[i].n_tokens);
        e = ibid_buf_append(b, row, sizeof row);
    }
    if (e) return e;
    store64(tail, ibid_checksum(b->data, b->len));
    return ibid_buf_append(b, tail, sizeof tail);
}

static ibid_err manifest_blocks(const uint8_t *p, ibidi_manifest *m) {
    uint64_t sum = 0;
    ibidi_live *l = ibid_calloc(m->n_blocks, sizeof *l);
    if (!l) return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", m->n_blocks);
    bool ascending = true;
    for (size_t i = 0; i < m->n_blocks; i++) {
        const uint8_t *row = p + MANIFEST_HEAD + MANIFEST_ROW * i;
        l[i] = (ibidi_live){.block = load64(row), .n_tokens = load32(row + 8)};
        ascending &= i == 0 || l[i].block > l[i - 1].block;
        sum += l[i].n_tokens;
    }
    if (sum != m->rows || !ascending) {
        ibid_free(l);
        return ibid_fail(IBID_CORRUPT, "the manifest's numbers contradict each other");
    }
    m->blocks = l;
    return IBID_OK;
}

ibid_err ibidi_manifest_read(const void *data, size_t n, ibidi_manifest *m) {
    const uint8_t *p = data;
    ibidi_keyplan plan;
    *m = (ibidi_manifest){.rows = 0};
    if (n < MANIFEST_HEAD + 8 || memcmp(p, "IKM3", 4) != 0 || load32(p + 4) != VERSION)
        return ibid_fail(IBID_CORRUPT, "not a key index manifest of version %d", VERSION);
    if (load64(p + n - 8) != ibid_checksum(p, n - 8))
        return ibid_fail(IBID_CORRUPT, "the manifest's checksum is wrong");
    uint64_t count = load64(p + 64);
    if (count != (n - MANIFEST_HEAD - 8) / MANIFEST_ROW || (n - MANIFEST_HEAD - 8) % MANIFEST_ROW)
        return ibid_fail(IBID_CORRUPT, "the manifest's length does not fit its %" PRIu64 " blocks",
                         count);
    m->stamp.generation = load64(p + 8);
    memcpy(m->stamp.calibration.b, p + 16, IBID_HASH_SIZE);
    m->stamp.dim = load32(p + 48);
    m->probes = load32(p + 52);
    m->rows = load64(p + 56);
    m->n_blocks = (size_t)count;
    m->file_size = load64(p + 72);
    m->file_sum = load64(p + 80);
    m->n_cells = load64(p + 88);
    m->n_posts = load64(p + 96);
    m->trained_rows = load64(p + 104);
    ibid_err e = manifest_blocks(p, m);
    if (!e)
        e = ibidi_keyplan_make(m->stamp.dim, ibidi_keyplan_panels(m), m->n_cells, m->n_posts,
                               &plan);
    if (!e && plan.size != m->file_size)
        e = ibid_fail(IBID_CORRUPT, "the manifest's numbers contradict each other");
    if (e) {
        ibid_free(m->blocks);
        m->blocks = NULL;
    }
    return e;
}

/* ---- Opening ---- */
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
        m->p = mmap(NULL, m->n, PROT_READ, MAP_SHARED, fd, 0);
        if (m->p == MAP_FAILED) e = ibid_fail_errno(errno, "map", path);
    }
    close(fd);
    if (e) *m = (mapped){NULL, 0};
    return e;
}

/* A checksum finds damage, not a file that was made to mislead: no posting may lead outside. */
static bool sound(const ibidi_keyindex *x) {
    if (x->starts[0] != 0 || x->starts[x->n_cells] != x->n_posts) return false;
    for (size_t i = 0; i < x->n_cells; i++)
        if (x->starts[i] > x->starts[i + 1]) return false;
    for (uint64_t i = 0; i < x->n_posts; i++)
        if (x->posts[i] >= x->n) return false;
    return true;
}

static ibid_err take_blocks(ibidi_keyindex *x, const ibidi_manifest *m) {
    uint64_t panel = 0;
    x->blocks = ibid_alloc(m->n_blocks * sizeof *x->blocks);
    if (!x->blocks) return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", m->n_blocks);
    for (size_t i = 0; i < m->n_blocks; i++) {
        x->blocks[i] = (ibidi_keyrow){m->blocks[i].block, panel, m->blocks[i].n_tokens, false};
        panel += ibid_key_panels_of(m->blocks[i].n_tokens);
    }
    x->n = m->n_blocks;
    return IBID_OK;
}

ibid_err ibidi_keyindex_map(const char *path, ibidi_manifest *m, bool sum, ibidi_keyindex **out) {
    ibidi_keyplan plan;
    mapped f = {NULL, 0};
    ibidi_keyindex *x = ibid_calloc(1, sizeof *x);
    if (!x) return ibid_fail(IBID_NOMEM, "out of memory for a key index");
    ibid_err e =
        ibidi_keyplan_make(m->stamp.dim, ibidi_keyplan_panels(m), m->n_cells, m->n_posts, &plan);
    if (!e) e = map_file(path, &f);
    if (e == IBID_NOTFOUND) e = ibid_fail(IBID_CORRUPT, "%s is not there", path);
    x->map = f.p;
    x->size = f.n;
    if (!e && (f.n != plan.size || (sum && ibid_checksum(f.p, f.n) != m->file_sum)))
        e = ibid_fail(IBID_CORRUPT, "%s is not the file the manifest names", path);
    if (!e) e = take_blocks(x, m);
    if (!e) {
        x->stamp = m->stamp;
        x->rows = m->rows;
        x->trained_rows = m->trained_rows;
        x->n_posts = m->n_posts;
        x->n_cells = (size_t)m->n_cells;
        x->probes = m->probes;
        x->cells = (const int8_t *)f.p + plan.cells;
        x->starts = (const uint64_t *)(const void *)(f.p + plan.starts);
        x->posts = (const uint32_t *)(const void *)(f.p + plan.posts);
        x->keys = f.p + plan.keys;
        if (!sound(x)) e = ibid_fail(IBID_CORRUPT, "%s contradicts itself", path);
    }
    if (e) {
        ibidi_keyindex_close(x);
        return e;
    }
    *out = x;
    return IBID_OK;
}

ibid_err ibidi_keyindex_load(const char *dir, const ibidi_keyindex_stamp *want,
                             ibidi_keyindex **out) {
    char path[IBIDI_KEYS_PATH];
    mapped f = {NULL, 0};
    ibidi_manifest m = {.rows = 0};
    path_of(path, dir, "keys.manifest");
    ibid_err e = map_file(path, &f);
    if (!e) e = ibidi_manifest_read(f.p, f.n, &m);
    if (!e &&
        (m.stamp.dim != want->dim || ibid_hash_cmp(&m.stamp.calibration, &want->calibration) != 0))
        e = ibid_fail(IBID_MISMATCH, "key index in %s was made with another calibration", dir);
    if (!e && m.stamp.generation > want->generation)
        e = ibid_fail(IBID_MISMATCH, "key index in %s is newer than the store", dir);
    if (!e) {
        ibidi_keyindex_path(path, dir, m.stamp.generation, false);
        e = ibidi_keyindex_map(path, &m, true, out);
    }
    if (f.p) munmap(f.p, f.n);
    ibid_free(m.blocks);
    return e;
}

/* ---- Publishing ---- */
static ibid_err sync_path(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return ibid_fail_errno(errno, "open", path);
    ibid_err e = fsync(fd) == 0 ? IBID_OK : ibid_fail_errno(errno, "sync", path);
    close(fd);
    return e;
}

static ibid_err write_file(const char *path, const ibid_buf *b) {
    FILE *f = fopen(path, "we");
    if (!f) return ibid_fail_errno(errno, "create", path);
    bool ok = fwrite(b->data, 1, b->len, f) == b->len && fflush(f) == 0 && fsync(fileno(f)) == 0;
    int err = errno;
    if (fclose(f) != 0 || !ok) return ibid_fail_errno(ok ? errno : err, "write", path);
    return IBID_OK;
}

/* Removes every keys-* file but the one at `keep` (NULL: all). Maps of removed files stay good. */
static void sweep(const char *dir, const char *keep) {
    char path[IBIDI_KEYS_PATH];
    DIR *d = opendir(dir);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d));) {
        if (strncmp(e->d_name, "keys-", 5) != 0) continue;
        path_of(path, dir, e->d_name);
        if (*path && !(keep && strcmp(path, keep) == 0)) unlink(path);
    }
    closedir(d);
}

void ibidi_keyindex_remove(const char *dir) {
    char path[IBIDI_KEYS_PATH];
    path_of(path, dir, "keys.manifest");
    unlink(path);
    sweep(dir, NULL);
}

ibid_err ibidi_keyindex_publish(const ibidi_keyindex *x, const char *dir) {
    char path[IBIDI_KEYS_PATH], aside[IBIDI_KEYS_PATH], man[IBIDI_KEYS_PATH],
        man_aside[IBIDI_KEYS_PATH];
    ibid_buf b;
    ibid_buf_init(&b, MANIFEST_MAX);
    ibidi_keyindex_path(path, dir, x->stamp.generation, false);
    ibidi_keyindex_path(aside, dir, x->stamp.generation, true);
    path_of(man, dir, "keys.manifest");
    path_of(man_aside, dir, "keys.manifest.new");
    ibid_err e = sync_path(aside);
    if (!e) e = manifest_bytes(x, &b);
    if (!e) e = write_file(man_aside, &b);
    if (!e && rename(aside, path) != 0) e = ibid_fail_errno(errno, "rename", aside);
    if (!e && rename(man_aside, man) != 0) e = ibid_fail_errno(errno, "rename", man_aside);
    if (!e) e = sync_path(dir);
    ibid_buf_fini(&b);
    if (e) {
        unlink(aside);
        unlink(man_aside);
    } else
        sweep(dir, path);
    return e;
}
