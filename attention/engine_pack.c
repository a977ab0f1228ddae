/* The file: a header of 128 bytes, then the panels of layer 0's weights in the order of
 * ibidi_weight, of the other layers, and of the output head, each at a multiple of 64. The model's
 * shape says where everything lies; the checksum in the header covers all of it. */
#include "attention/engine_pack.h"

#include "rpc/base/clock.h"
#include "rpc/base/log.h"
#include "rpc/base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { VERSION = 1, PATH_BYTES = 4096 };

typedef struct header {
    char magic[8];
    uint32_t version, reserved;
    uint64_t bytes, checksum; /* of what follows */
    ibid_hash fingerprint;
    uint8_t pad[64];
} header;
_Static_assert(sizeof(header) == 128, "the panels begin at a multiple of 64");

static const char MAGIC[8] = "ibidpnl";

const ibid_tensor *ibidi_layer_weight(const ibid_layer *l, ibidi_weight w) {
    const ibid_tensor *t[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->gate, &l->up, &l->down};
    return t[w];
}

/* ---- Where everything lies ---- */

typedef struct placed {
    const ibid_tensor *w;
    ibid_panels *p;
} placed;

static size_t n_weights(const ibid_model *m) {
    return m->n_layers * IBIDI_WEIGHTS + 1;
}

static placed weight_at(const ibid_model *m, ibidi_pack *k, size_t i) {
    if (i + 1 == n_weights(m)) return (placed){&m->output, &k->head};
    const ibid_layer *l = &m->layers[i / IBIDI_WEIGHTS];
    return (placed){ibidi_layer_weight(l, (ibidi_weight)(i % IBIDI_WEIGHTS)), &k->layers[i]};
}

/* Shapes, and data pointers into memory (NULL: shapes only). Returns the bytes of all panels. */
static size_t place(const ibid_model *m, ibidi_pack *k, uint8_t *memory) {
    size_t at = 0;
    for (size_t i = 0; i < n_weights(m); i++) {
        placed t = weight_at(m, k, i);
        if (!ibid_panels_shape(t.w, t.p)) continue;
        if (memory) t.p->data = memory + at;
        at = ibid_align_up(at + ibid_panels_bytes(t.p), 64);
    }
    return at;
}

/* ---- Building ---- */

typedef struct build {
    const ibid_model *m;
    ibidi_pack *k;
} build;

static void build_part(void *arg, size_t part, size_t thread) {
    const build *b = arg;
    placed t = weight_at(b->m, b->k, part);
    (void)thread;
    if (!t.p->data) return;
    uint8_t *to = (uint8_t *)(uintptr_t)t.p->data;
    for (size_t i = 0; i * IBID_PANEL_ROWS < t.p->rows; i++) {
        ibid_panels_pack(t.p, t.w, i, to + i * t.p->panel_bytes);
    }
}

static ibid_err build_panels(const ibid_model *m, ibid_pool *pool, ibidi_pack *k) {
    void *memory = mmap(NULL, k->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return ibid_fail(IBID_NOMEM, "no memory for %zu bytes of weights in panels", k->bytes);
    (void)madvise(memory, k->bytes, MADV_HUGEPAGE); /* streams an eighth faster */
    k->memory = memory;
    k->mapped = k->bytes;
    (void)place(m, k, memory);
    build b = {m, k};
    ibid_pool_run(pool, n_weights(m), build_part, &b);
    return IBID_OK;
}

/* ---- The file ---- */

static bool file_name(const ibid_model *m, const char *folder, const char *suffix, char *out) {
    char hex[65];
    ibid_hash_hex(&m->fingerprint, hex);
    int n = snprintf(out, PATH_BYTES, "%s/%s.panels%s", folder, hex, suffix);
    return n > 0 && n < PATH_BYTES;
}

/* The file's bytes, mapped, if they are what this model wants; NULL otherwise. */
static uint8_t *map_file(const ibid_model *m, const char *path, size_t bytes) {
    struct stat st;
    uint8_t *map = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return NULL;
    if (fstat(fd, &st) == 0 && (uint64_t)st.st_size == sizeof(header) + bytes) {
        map = mmap(NULL, sizeof(header) + bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) map = NULL;
    }
    (void)close(fd);
    if (!map) return NULL;
    (void)madvise(map, sizeof(header) + bytes, MADV_WILLNEED);
    header h;
    memcpy(&h, map, sizeof h);
    if (memcmp(h.magic, MAGIC, sizeof MAGIC) == 0 && h.version == VERSION && h.bytes == bytes &&
        ibid_hash_cmp(&h.fingerprint, &m->fingerprint) == 0 &&
        ibid_checksum(map + sizeof h, bytes) == h.checksum)
        return map;
    (void)munmap(map, sizeof(header) + bytes);
    return NULL;
}

static bool write_all(int fd, const void *data, size_t n) {
    const uint8_t *p = data;
    while (n) {
        ssize_t done = write(fd, p, n);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return false;
        p += done;
        n -= (size_t)done;
    }
    return true;
}

static bool write_file(const ibid_model *m, const char *folder, const ibidi_pack *k) {
    char path[PATH_BYTES], temporary[PATH_BYTES];
    if (!file_name(m, folder, "", path) || !file_name(m, folder, ".XXXXXX", temporary))
        return false;
    if (mkdir(folder, 0700) != 0 && errno != EEXIST) return false;
    int fd = mkstemp(temporary);
    if (fd < 0) return false;
    header h = {.version = VERSION, .bytes = k->bytes, .fingerprint = m->fingerprint};
    memcpy(h.magic, MAGIC, sizeof MAGIC);
    h.checksum = ibid_checksum(k->memory, k->bytes);
    bool ok = write_all(fd, &h, sizeof h) && write_all(fd, k->memory, k->bytes) && fsync(fd) == 0;
    ok = close(fd) == 0 && ok;
    if (ok && rename(temporary, path) == 0) return true;
    int why = errno;
    (void)unlink(temporary);
    errno = why;
    return false;
}

static bool open_file(const ibid_model *m, const char *folder, ibidi_pack *k) {
    char path[PATH_BYTES];
    uint8_t *map = file_name(m, folder, "", path) ? map_file(m, path, k->bytes) : NULL;
    if (!map) return false;
    k->memory = map;
    k->mapped = sizeof(header) + k->bytes;
    (void)place(m, k, map + sizeof(header));
    return true;
}

ibid_err ibidi_pack_open(const ibid_model *m, const char *folder, ibid_pool *pool,
                         ibidi_pack *out) {
    ibid_err err = IBID_OK;
    ibidi_pack k = {.layers = ibid_calloc(m->n_layers * IBIDI_WEIGHTS, sizeof *k.layers)};
    if (!k.layers) return ibid_fail(IBID_NOMEM, "no memory for the weights' panels");
    k.bytes = place(m, &k, NULL);
    if (k.bytes && !(folder && open_file(m, folder, &k))) {
        uint64_t start = ibid_now_ns();
        if ((err = build_panels(m, pool, &k))) goto done;
        if (folder && !write_file(m, folder, &k)) {
            ibid_log(IBID_LOG_WARN,
                     "cannot keep the weights' panels in %s (%s): the next start builds them again",
                     folder, strerror(errno));
        } else if (folder) { /* the file's pages can be dropped and shared; our own cannot */
            ibidi_pack own = k;
            if (open_file(m, folder, &k)) (void)munmap(own.memory, own.mapped);
        }
        ibid_log(IBID_LOG_INFO, "weights of %s in panels: %zu bytes in %.0f ms", m->name, k.bytes,
                 ibid_ms_since(start));
    }
    *out = k;
    k = (ibidi_pack){0};
done:
    ibidi_pack_close(&k);
    return err;
}

void ibidi_pack_close(ibidi_pack *k) {
    if (k->memory) (void)munmap(k->memory, k->mapped);
    ibid_free(k->layers);
    *k = (ibidi_pack){0};
}
