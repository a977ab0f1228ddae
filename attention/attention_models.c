/* The room's models: opening them, their prefix, their record in the store, their calibration. */
#include "attention/attention_internal.h"
#include "attention/tokenizer/template.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The first model that was added is the default one: its fingerprint in hex stands in this file. */
#define DEFAULT_FILE "default-model"

void ibidi_model_calibration(ibidi_loaded *m, ibid_calibration *out) {
    (void)pthread_mutex_lock(&m->lock);
    *out = m->cal;
    (void)pthread_mutex_unlock(&m->lock);
}

static void loaded_close(ibidi_loaded *m) {
    if (!m) return;
    ibid_engine_close(m->engine);
    ibid_model_close(m->model);
    ibid_kv_blob_fini(&m->prefix_kv);
    ibid_keymap_close(m->cal.map);
    for (size_t i = 0; i < m->n_retired; i++) ibid_keymap_close(m->retired[i]);
    ibid_free(m->retired);
    ibid_free(m->prefix_tokens);
    ibid_free(m->name);
    ibid_free(m->path);
    ibid_sched_fini(&m->sched);
    (void)pthread_mutex_destroy(&m->lock);
    ibid_free(m);
}

void ibidi_models_close(ibidi_room *r) {
    while (r->models) {
        ibidi_loaded *next = r->models->next;
        loaded_close(r->models);
        r->models = next;
    }
}

static ibidi_loaded *find_loaded(ibidi_room *r, const ibid_hash *fingerprint) {
    (void)pthread_mutex_lock(&r->lock);
    ibidi_loaded *m = r->models;
    while (m && ibid_hash_cmp(&m->model->fingerprint, fingerprint) != 0) m = m->next;
    (void)pthread_mutex_unlock(&r->lock);
    return m;
}

/* ---- Opening ---- */

static void device_lost(void *arg, const char *detail) {
    const ibidi_room *r = arg;
    ibid_host_give_up(&r->opts, IBID_BACKEND, detail);
}

static ibid_backend backend_of(const ibidi_room *r) {
    const char *b = r->opts.backend;
    return strcmp(b, "cpu") == 0    ? IBID_BACKEND_CPU
           : strcmp(b, "cuda") == 0 ? IBID_BACKEND_CUDA
                                    : IBID_BACKEND_AUTO;
}

static void log_backend(const ibidi_loaded *m) {
    ibid_engine_gpu g;
    if (ibid_engine_gpu_look(m->engine, &g))
        ibid_log(IBID_LOG_INFO, "%s runs on %s, %llu MiB of KV there", m->path, g.name,
                 (unsigned long long)(g.pool >> 20));
}

/* An engine that was to be a GPU's and cannot be says how to go on without. */
static ibid_err open_engine(ibidi_loaded *m, const ibid_engine_opts *o) {
    ibid_err e = ibid_engine_open(m->model, o, &m->engine);
    if (o->backend != IBID_BACKEND_CUDA || (e != IBID_NOTSUP && e != IBID_NOMEM)) return e;
    char why[512];
    (void)snprintf(why, sizeof why, "%s", ibid_err_detail());
    return ibid_fail(e, "%s; or start ibid with --backend auto or cpu", why);
}

/* type: that of the model's stored KV. */
static ibid_err open_file(ibidi_room *r, ibid_str path, ibid_kv_type type, ibidi_loaded **out) {
    const char *kernels = r->opts.kernels[0] ? r->opts.kernels : NULL;
    char cache[IBID_HOST_PATH_MAX + 8];
    (void)snprintf(cache, sizeof cache, "%s/cache", r->opts.data_dir);
    ibid_engine_opts o = {.kernels = kernels,
                          .n_threads = r->opts.threads,
                          .int8 = !r->opts.f32,
                          .cache = cache,
                          .backend = backend_of(r),
                          .gpu_memory = (size_t)r->opts.gpu_pool,
                          .gpu_kv = type == IBID_KV_Q8_0 ? IBID_KV_Q8_0 : IBID_KV_F16,
                          .lost = device_lost,
                          .lost_arg = r};
    ibidi_loaded *m = ibid_calloc(1, sizeof *m);
    if (!m) return ibid_fail(IBID_NOMEM, "no memory for a model");
    ibid_sched_init(&m->sched);
    (void)pthread_mutex_init(&m->lock, NULL);
    ibid_err e = IBID_OK;
    if (!(m->path = ibid_strndup(path.s, path.n))) e = ibid_fail(IBID_NOMEM, "out of memory");
    if (!e) e = ibid_model_open(m->path, NULL, &m->model);
    if (!e) e = open_engine(m, &o);
    if (!e) log_backend(m);
    if (e)
        loaded_close(m);
    else
        *out = m;
    return e;
}

/* The prefix as the store has it: what the blocks there were encoded behind. */
static ibid_err stored_prefix(ibid_snap *snap, const ibid_model_record *rec, ibidi_loaded *m) {
    size_t n = rec->n_prefix_tokens;
    ibid_kv_view *views = ibid_calloc(m->model->n_layers, sizeof *views);
    m->prefix_tokens = ibid_alloc((n ? n : 1) * sizeof *m->prefix_tokens);
    ibid_err e = views && m->prefix_tokens ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory");
    if (!e && n) memcpy(m->prefix_tokens, rec->prefix_tokens, n * sizeof *m->prefix_tokens);
    for (size_t l = 0; !e && l < m->model->n_layers; l++) {
        e = ibid_snap_prefix_kv(snap, &rec->prefix, l, &views[l]);
        if (!e && (views[l].n_tokens != n || views[l].n_kv_heads != m->model->n_kv_heads ||
                   views[l].head_dim != m->model->head_dim))
            e = ibid_fail(IBID_CORRUPT, "the stored prefix does not fit the model");
    }
    if (!e) e = ibid_kv_blob_copy(views, m->model->n_layers, &m->prefix_kv);
    m->prefix_id = rec->prefix;
    ibid_free(views);
    return e;
}

/* The stored prefix; what is damaged, or of another version, is encoded again from its tokens. */
static ibid_err adopt_prefix(ibidi_room *r, ibid_snap *snap, const ibid_model_record *rec,
                             ibidi_loaded *m) {
    ibid_err e = stored_prefix(snap, rec, m);
    if (e != IBID_CORRUPT && e != IBID_NOTFOUND) return e;
    ibid_log(IBID_LOG_WARN, "%s: its prefix is encoded again: %s", m->name, ibid_err_detail());
    e = ibid_read_prefix(m->model, m->engine, &m->sched, m->prefix_tokens, rec->n_prefix_tokens,
                         rec->kv_type, &m->prefix_kv);
    if (!e)
        e = ibid_kvc_prefix_put(r->kvstore, &m->prefix_id, m->prefix_kv.n_layers,
                                m->prefix_kv.values, m->prefix_kv.value_size);
    return e;
}

static ibid_err new_prefix(ibidi_room *r, ibidi_loaded *m, ibid_kv_type type, size_t *n) {
    ibid_ids ids = {NULL, 0};
    ibid_err e = ibid_prompt_prefix(m->model, &ibid_wording_default, &ids);
    if (e) return e;
    m->prefix_tokens = ids.ids;
    *n = ids.n;
    if (ids.n >= m->model->n_ctx)
        return ibid_fail(IBID_NOTSUP,
                         "the model's context of %zu tokens has no room for a prefix "
                         "of %zu",
                         m->model->n_ctx, ids.n);
    m->prefix_id = ibid_prefix_id(m->model, type, ids.ids, ids.n);
    e = ibid_read_prefix(m->model, m->engine, &m->sched, ids.ids, ids.n, type, &m->prefix_kv);
    if (!e)
        e = ibid_kvc_prefix_put(r->kvstore, &m->prefix_id, m->prefix_kv.n_layers,
                                m->prefix_kv.values, m->prefix_kv.value_size);
    return e;
}

/* A number for the prefix's KV that no block has: those count up from 1. */
static uint64_t prefix_number(const ibid_hash *id) {
    uint64_t n;
    memcpy(&n, id->b, sizeof n);
    return n | UINT64_C(1) << 63;
}

static void make_reader(ibidi_loaded *m, ibid_kv_type type, size_t n_prefix) {
    m->reader =
        (ibid_reader){.model = m->model,
                      .engine = m->engine,
                      .sched = &m->sched,
                      .kv_type = type,
                      .prefix = {.layers = m->prefix_kv.layers, .id = prefix_number(&m->prefix_id)},
                      .n_prefix = n_prefix,
                      .meter = &m->meter};
}

ibid_err ibidi_model_save(ibidi_room *r, ibidi_loaded *m) {
    ibid_buf cal, gates;
    ibid_err e = IBID_OK;
    ibid_buf_init(&cal, IBIDI_CALIBRATION_MAX);
    ibid_buf_init(&gates, 65536);
    if (m->calibrated) e = ibid_calibration_encode(&m->cal, &cal);
    (void)pthread_mutex_lock(&m->lock);
    if (!e) e = ibidi_gates_encode(&m->gates, &gates);
    (void)pthread_mutex_unlock(&m->lock);
    const char *arch = ibid_arch_name(m->model->arch);
    ibid_model_record rec = {.fingerprint = m->model->fingerprint,
                             .name = {m->name, strlen(m->name)},
                             .path = {m->path, strlen(m->path)},
                             .arch = {arch, strlen(arch)},
                             .n_layers = m->model->n_layers,
                             .n_heads = m->model->n_heads,
                             .n_kv_heads = m->model->n_kv_heads,
                             .head_dim = m->model->head_dim,
                             .n_ctx = m->model->n_ctx,
                             .n_vocab = m->model->n_vocab,
                             .prefix = m->prefix_id,
                             .prefix_tokens = m->prefix_tokens,
                             .n_prefix_tokens = m->reader.n_prefix,
                             .kv_type = m->reader.kv_type,
                             .calibration = {cal.data ? cal.data : "", cal.len},
                             .calibration_id = m->cal.id,
                             .gates = {gates.data ? gates.data : "", gates.len}};
    if (!e) e = ibid_kvc_model_put(r->kvstore, &rec);
    ibid_buf_fini(&gates);
    ibid_buf_fini(&cal);
    return e;
}

/* What the record says beyond the file. A calibration that cannot be read is made again on demand.
 */
static ibid_err adopt_record(ibidi_room *r, ibid_snap *snap, const ibid_model_record *rec,
                             ibidi_loaded *m) {
    ibid_err e = adopt_prefix(r, snap, rec, m);
    if (e) return e;
    make_reader(m, rec->kv_type, rec->n_prefix_tokens);
    ibidi_gates_decode(rec->gates, &m->gates);
    if (rec->calibration.n) {
        ibid_err bad = ibid_calibration_decode(rec->calibration.s, rec->calibration.n, &m->cal);
        m->calibrated = !bad;
        if (bad) ibid_log(IBID_LOG_WARN, "%s: %s", m->name, ibid_err_detail());
    }
    return IBID_OK;
}

static void list_add(ibidi_room *r, ibidi_loaded *m) {
    (void)pthread_mutex_lock(&r->lock);
    ibidi_loaded **at = &r->models;
    while (*at) at = &(*at)->next;
    *at = m;
    (void)pthread_mutex_unlock(&r->lock);
}

/* ---- Looking up ---- */

static ibid_err load_record(ibidi_room *r, ibid_snap *snap, const ibid_model_record *rec,
                            ibidi_loaded **out) {
    ibidi_loaded *m = NULL;
    ibid_err e = open_file(r, rec->path, rec->kv_type, &m);
    if (e == IBID_NOTFOUND)
        e = ibid_fail(IBID_NOTFOUND,
                      "the file of model %.*s is gone: %.*s; put it back, or run "
                      "`ibid model add` with its new place",
                      (int)rec->name.n, rec->name.s, (int)rec->path.n, rec->path.s);
    if (e) return e;
    if (ibid_hash_cmp(&m->model->fingerprint, &rec->fingerprint) != 0)
        e = ibid_fail(IBID_MISMATCH,
                      "%.*s is another model than the one that was added as %.*s; "
                      "add it as a new model",
                      (int)rec->path.n, rec->path.s, (int)rec->name.n, rec->name.s);
    if (!e && !(m->name = ibid_strndup(rec->name.s, rec->name.n)))
        e = ibid_fail(IBID_NOMEM, "out of memory");
    if (!e) e = adopt_record(r, snap, rec, m);
    if (e) {
        loaded_close(m);
        return e;
    }
    list_add(r, m);
    *out = m;
    return IBID_OK;
}

ibid_err ibidi_model_get(ibidi_room *r, const ibid_hash *fingerprint, ibidi_loaded **out) {
    ibid_snap *snap = NULL;
    ibid_model_record rec;
    char hex[65];
    ibid_err e = IBID_OK;
    if ((*out = find_loaded(r, fingerprint))) return IBID_OK;
    (void)pthread_mutex_lock(&r->load_lock);
    if ((*out = find_loaded(r, fingerprint))) goto done;
    if ((e = ibid_snap_begin(r->store, &snap))) goto done;
    e = ibid_snap_model(snap, fingerprint, &rec);
    if (e == IBID_NOTFOUND) {
        ibid_hash_hex(fingerprint, hex);
        e = ibid_fail(IBID_NOTFOUND, "no model %.16s was added; see `ibid model list`", hex);
    }
    if (!e) e = load_record(r, snap, &rec, out);
done:
    ibid_snap_end(snap);
    (void)pthread_mutex_unlock(&r->load_lock);
    return e;
}

static ibid_err default_path(const ibidi_room *r, const char *tail, char path[PATH_MAX]) {
    int n = snprintf(path, PATH_MAX, "%s/%s%s", r->opts.data_dir, DEFAULT_FILE, tail);
    return n > 0 && n < PATH_MAX ? IBID_OK : ibid_fail(IBID_INVAL, "the data path is too long");
}

static bool read_default(const ibidi_room *r, char hex[65]) {
    char path[PATH_MAX];
    if (default_path(r, "", path)) return false;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    ssize_t n = read(fd, hex, 64);
    (void)close(fd);
    hex[64] = '\0';
    return n == 64;
}

static ibid_err write_default(const ibidi_room *r, const ibid_hash *fingerprint) {
    char hex[65], path[PATH_MAX], temporary[PATH_MAX];
    ibid_hash_hex(fingerprint, hex);
    ibid_err e = default_path(r, "", path);
    if (!e) e = default_path(r, ".new", temporary);
    if (e) return e;
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) return ibid_fail_errno(errno, "cannot write", temporary);
    bool good = write(fd, hex, 64) == 64 && fsync(fd) == 0;
    int err = errno;
    (void)close(fd);
    if (good && rename(temporary, path) == 0) return IBID_OK;
    return ibid_fail_errno(good ? errno : err, "cannot write", path);
}

typedef struct name_search {
    ibid_str want; /* hex or name; "" = the only one */
    ibid_hash found;
    size_t n_found, n_all;
    ibid_buf names;
} name_search;

static ibid_err look_at(void *arg, const ibid_model_record *rec) {
    name_search *s = arg;
    char hex[65];
    ibid_hash_hex(&rec->fingerprint, hex);
    bool is_hex = s->want.n >= 8 && s->want.n <= 64 && memcmp(hex, s->want.s, s->want.n) == 0;
    bool is_name = s->want.n == rec->name.n && memcmp(s->want.s, rec->name.s, s->want.n) == 0;
    if (s->want.n == 0 || is_hex || is_name) {
        if (s->n_found++ == 0) s->found = rec->fingerprint;
    }
    if (s->n_all++) (void)ibid_buf_puts(&s->names, ", ");
    (void)ibid_buf_append(&s->names, rec->name.s, rec->name.n);
    return IBID_OK;
}

static ibid_err search_models(ibidi_room *r, name_search *s) {
    ibid_snap *snap = NULL;
    ibid_err e = ibid_snap_begin(r->store, &snap);
    if (!e) e = ibid_snap_each_model(snap, look_at, s);
    ibid_snap_end(snap);
    return e;
}

ibid_err ibidi_model_find(ibidi_room *r, ibid_str name, ibidi_loaded **out) {
    char hex[65];
    name_search s = {.want = name};
    ibid_buf_init(&s.names, 4096);
    if (name.n == 0 && read_default(r, hex)) s.want = (ibid_str){hex, 64};
    ibid_err e = search_models(r, &s);
    if (!e && name.n == 0 && s.n_found == 0) { /* the default file is stale */
        s.want = name;
        s.n_all = 0;
        ibid_buf_clear(&s.names);
        e = search_models(r, &s);
    }
    if (!e && s.n_all == 0)
        e = ibid_fail(IBID_NOTFOUND, "no model was added yet: run `ibid model pull smollm2`, or "
                                     "`ibid model add FILE.gguf`");
    else if (!e && s.n_found == 0)
        e = ibid_fail(IBID_NOTFOUND, "no model %.*s; there are: %s", (int)name.n, name.s,
                      s.names.data);
    ibid_buf_fini(&s.names);
    return e ? e : ibidi_model_get(r, &s.found, out);
}

/* ---- Adding ---- */

static ibid_err name_free(ibidi_room *r, ibid_str name, const ibid_hash *fingerprint) {
    name_search s = {.want = name};
    ibid_buf_init(&s.names, 4096);
    ibid_err e = search_models(r, &s);
    ibid_buf_fini(&s.names);
    if (!e && s.n_found && ibid_hash_cmp(&s.found, fingerprint) != 0)
        e = ibid_fail(IBID_EXISTS, "another model is named %.*s: give this one a name with --name",
                      (int)name.n, name.s);
    return e;
}

/* The KV type that was asked for, or the usual one. */
static ibid_err choose_type(const ibidi_room *r, const ibid_model *m, ibid_str wanted,
                            ibid_kv_type *out) {
    *out = ibid_kv_type_fits(m, r->kv_type) ? r->kv_type : IBID_KV_F16;
    if (wanted.n == 0) return IBID_OK;
    if (!ibid_kv_type_from_name(wanted, out))
        return ibid_fail(IBID_INVAL, "no KV type %.*s; there are f32, f16 and q8_0", (int)wanted.n,
                         wanted.s);
    if (!ibid_kv_type_fits(m, *out))
        return ibid_fail(IBID_NOTSUP,
                         "%.*s KV needs a head size that is a multiple of 32, not %zu; use f16",
                         (int)wanted.n, wanted.s, m->head_dim);
    return IBID_OK;
}

/* A model that was added before has its KV type: its prefix and blocks are of it. */
static ibid_err same_type(const ibidi_loaded *m, ibid_str wanted) {
    const char *has = ibid_kv_type_name(m->reader.kv_type);
    if (wanted.n == 0 || (wanted.n == strlen(has) && memcmp(wanted.s, has, wanted.n) == 0))
        return IBID_OK;
    return ibid_fail(IBID_EXISTS,
                     "the model was added with %s KV, and what was read is stored so; for %.*s use "
                     "a new data folder",
                     has, (int)wanted.n, wanted.s);
}

/* Sets what a new or moved model's record will hold; one that was there keeps its prefix, so that
 * its blocks stay good. */
static ibid_err settle(ibidi_room *r, ibidi_loaded *m, const ibidi_adding *a) {
    ibid_snap *snap = NULL;
    ibid_model_record rec;
    ibid_str name = a->name;
    ibid_kv_type type;
    size_t n_prefix = 0;
    ibid_err e = ibid_snap_begin(r->store, &snap);
    if (e) return e;
    ibid_err there = ibid_snap_model(snap, &m->model->fingerprint, &rec);
    if (there && there != IBID_NOTFOUND) {
        e = there;
        goto done;
    }
    if (name.n == 0) name = there ? (ibid_str){m->model->name, strlen(m->model->name)} : rec.name;
    if ((e = name_free(r, name, &m->model->fingerprint))) goto done;
    if (!(m->name = ibid_strndup(name.s, name.n))) {
        e = ibid_fail(IBID_NOMEM, "out of memory");
    } else if (!there) {
        e = adopt_record(r, snap, &rec, m);
        if (!e) e = same_type(m, a->kv_type);
        if (!e) e = ibidi_gate_add(r, m, m->reader.kv_type, a->force);
    } else {
        e = choose_type(r, m->model, a->kv_type, &type);
        if (!e) e = ibidi_gate_add(r, m, type, a->force);
        if (!e) e = new_prefix(r, m, type, &n_prefix);
        if (!e) make_reader(m, type, n_prefix);
    }
done:
    ibid_snap_end(snap);
    return e;
}

/* The same model again, perhaps from another place: that is where it will be opened next time. */
static ibid_err add_again(ibidi_room *r, ibidi_loaded *m, const char *path, const ibidi_adding *a) {
    ibid_err e = same_type(m, a->kv_type);
    if (!e) e = ibidi_gate_add(r, m, m->reader.kv_type, a->force);
    if (e) return e;
    if (strcmp(m->path, path) == 0) return ibidi_model_save(r, m);
    char *copy = ibid_strdup(path);
    if (!copy) return ibid_fail(IBID_NOMEM, "out of memory");
    (void)pthread_mutex_lock(&m->lock);
    char *old = m->path;
    m->path = copy;
    (void)pthread_mutex_unlock(&m->lock);
    ibid_free(old);
    return ibidi_model_save(r, m);
}

ibid_err ibidi_model_add(ibidi_room *r, const ibidi_adding *a, ibidi_loaded **out) {
    ibidi_loaded *m = NULL, *have = NULL;
    ibid_str path = a->path;
    char hex[65];
    ibid_kv_type type = r->kv_type;
    if (a->kv_type.n) (void)ibid_kv_type_from_name(a->kv_type, &type); /* checked in settle */
    (void)pthread_mutex_lock(&r->load_lock);
    ibid_err e = path.n && path.s[0] == '/'
                     ? open_file(r, path, type, &m)
                     : ibid_fail(IBID_INVAL, "a model's path is absolute, not \"%.*s\"",
                                 (int)path.n, path.s);
    if (!e && (have = find_loaded(r, &m->model->fingerprint))) {
        e = add_again(r, have, m->path, a);
        loaded_close(m);
        goto done;
    }
    if (!e) e = settle(r, m, a);
    if (!e) e = ibidi_model_save(r, m);
    if (!e && !read_default(r, hex)) e = write_default(r, &m->model->fingerprint);
    if (e) {
        loaded_close(m);
        goto done;
    }
    list_add(r, m);
    have = m;
done:
    (void)pthread_mutex_unlock(&r->load_lock);
    if (!e && (!have->calibrated || ibidi_model_outdated(have)))
        e = ibidi_model_calibrate(r, have, &(ibidi_calibrating){.report = NULL});
    if (!e) *out = have;
    return e;
}
