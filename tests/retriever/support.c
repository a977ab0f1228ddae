#include "support.h"

#include <dirent.h>
#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

void t_dir(char out[256]) {
    const char *base = getenv("TMPDIR");
    char store[300];
    snprintf(out, 256, "%s/ibid-retriever-XXXXXX", base && *base ? base : "/tmp");
    assert_non_null(mkdtemp(out));
    snprintf(store, sizeof store, "%s/store", out);
    assert_int_equal(mkdir(store, 0700), 0);
}

static int drop_one(const char *path, const struct stat *st, int kind, struct FTW *f) {
    (void)st;
    (void)kind;
    (void)f;
    return remove(path);
}

void t_drop(const char *dir) {
    (void)nftw(dir, drop_one, 16, FTW_DEPTH | FTW_PHYS);
}

ibid_str t_str(const char *s) {
    return (ibid_str){s, strlen(s)};
}

bool t_eq(ibid_str a, const char *b) {
    return a.n == strlen(b) && memcmp(a.s, b, a.n) == 0;
}

uint64_t t_rnd(uint64_t *state) {
    uint64_t x = *state ? *state : 0x9E3779B97F4A7C15u;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545F4914F6CDD1Du;
}

double t_normal(uint64_t *state) {
    double s = 0;
    for (int i = 0; i < 12; i++) s += (double)(t_rnd(state) >> 11) / 9007199254740992.0;
    return s - 6;
}

void t_unit(uint64_t *state, float *v, size_t n) {
    double norm = 0;
    for (size_t i = 0; i < n; i++) {
        v[i] = (float)t_normal(state);
        norm += (double)v[i] * (double)v[i];
    }
    for (size_t i = 0; i < n; i++) v[i] = (float)((double)v[i] / sqrt(norm));
}

void t_quantise(const float *v, size_t n, int8_t *out) {
    double norm = 0;
    for (size_t i = 0; i < n; i++) norm += (double)v[i] * (double)v[i];
    for (size_t i = 0; i < n; i++) out[i] = (int8_t)lrint(127.0 * (double)v[i] / sqrt(norm));
}

/* ---- The toy model ---- */
static const char *const groups[] = {"boat ship vessel", "car automobile", "doctor physician",
                                     "king monarch", "fast quick rapid"};

static uint64_t hash_word(const char *s, size_t n) {
    uint64_t h = 1469598103934665603u;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        h = (h ^ (unsigned char)(c >= 'A' && c <= 'Z' ? c + 32 : c)) * 1099511628211u;
    }
    return h;
}

int32_t t_token(const char *word, size_t n) {
    while (n && strchr(".,;:!?", word[n - 1])) n--;
    for (size_t g = 0; g < sizeof groups / sizeof *groups; g++) {
        size_t k = 0;
        for (const char *p = groups[g]; *p; k++) {
            size_t len = strcspn(p, " ");
            if (len == n && strncasecmp(p, word, n) == 0) return (int32_t)(40000 + g * 16 + k);
            p += len + (p[len] == ' ');
        }
    }
    return (int32_t)(hash_word(word, n) % 30000);
}

void t_key(int32_t token, int8_t out[T_DIM]) {
    float v[T_DIM], extra[T_DIM];
    bool grouped = token >= 40000;
    uint64_t seed = (uint64_t)(grouped ? token / 16 * 16 : token) + 77;
    t_unit(&seed, v, T_DIM);
    if (grouped) {
        seed = (uint64_t)token + 999;
        t_unit(&seed, extra, T_DIM);
        for (size_t i = 0; i < T_DIM; i++) v[i] += 0.3f * extra[i];
    }
    t_quantise(v, T_DIM, out);
}

ibid_err t_tokenize(void *arg, const ibid_hash *model, ibid_str text, ibid_tokens *out) {
    (void)arg;
    (void)model;
    size_t room = text.n + 1;
    *out = (ibid_tokens){.n = 0};
    out->ids = ibid_alloc(room * (sizeof(uint64_t) + sizeof(int32_t)) + 8);
    if (!out->ids) return ibid_fail(IBID_NOMEM, "out of memory");
    uint64_t *ends = ibid_alloc(room * sizeof *ends);
    for (size_t i = 0; i < text.n;) {
        size_t start = i;
        while (i < text.n && strchr(" \n", text.s[i])) i++;
        size_t word = i;
        while (i < text.n && !strchr(" \n", text.s[i])) i++;
        if (word == i && start > 0 && out->n) { /* trailing space joins the last token */
            ends[out->n - 1] = i;
            break;
        }
        out->ids[out->n] = t_token(text.s + word, i - word);
        ends[out->n++] = i;
    }
    size_t at = (out->n * sizeof(int32_t) + 7) & ~(size_t)7;
    out->ends = (uint64_t *)(void *)((char *)out->ids + at);
    memcpy(out->ends, ends, out->n * sizeof *ends);
    ibid_free(ends);
    return IBID_OK;
}

static ibid_hash calibration_now;

ibid_err t_question_keys(void *arg, const ibid_hash *model, ibid_str question,
                         ibid_question_keys *out) {
    ibid_tokens t;
    ibid_err e = t_tokenize(arg, model, question, &t);
    if (e) return e;
    size_t at = (t.n * sizeof(int32_t) + 63) & ~(size_t)63;
    *out = (ibid_question_keys){.ids = ibid_alloc(at + t.n * T_DIM + 64),
                                .n = t.n,
                                .dim = T_DIM,
                                .calibration = calibration_now};
    out->keys = (int8_t *)out->ids + at;
    memcpy(out->ids, t.ids, t.n * sizeof *t.ids);
    for (size_t i = 0; i < t.n; i++) t_key(t.ids[i], out->keys + i * T_DIM);
    ibid_free(t.ids);
    return IBID_OK;
}

const ibidi_retriever_hooks t_hooks = {.question_keys = t_question_keys, .tokenize = t_tokenize};

/* ---- The store ---- */
void t_calibrate(t_store *t, float version, float relevant, float find) {
    ibid_calibration *c = ibid_calloc(1, sizeof *c);
    ibid_buf b;
    ibid_buf_init(&b, 1 << 20);
    ibid_head head = {0, 0};
    assert_ok(ibid_keymap_open_raw(&head, 1, T_DIM, &c->map));
    c->head_dim = T_DIM;
    c->keys_weight = 0.5f;
    c->map->mean[0] = version;
    c->relevant = relevant;
    c->null_mean = relevant - 0.2f;
    c->null_sd = 0.1f;
    c->find = find;
    assert_ok(ibid_calibration_encode(c, &b));
    t->calibration = calibration_now = c->id;
    int32_t prefix[1] = {1};
    ibid_model_record m = {.fingerprint = t->model,
                           .name = t_str("toy"),
                           .path = t_str("/nowhere/toy.gguf"),
                           .arch = t_str("llama"),
                           .n_layers = 1,
                           .n_heads = 1,
                           .n_kv_heads = 1,
                           .head_dim = T_DIM,
                           .n_ctx = 1024,
                           .n_vocab = 50000,
                           .prefix = ibid_hash_bytes("p", 1),
                           .prefix_tokens = prefix,
                           .n_prefix_tokens = 1,
                           .kv_type = IBID_KV_Q8_0,
                           .calibration = {b.data, b.len},
                           .calibration_id = c->id};
    assert_ok(ibid_store_model_put(t->s, &m));
    ibid_buf_fini(&b);
    ibid_calibration_fini(c);
    ibid_free(c);
}

void t_collection(t_store *t, const char *name) {
    assert_ok(ibid_store_collection_create(t->s, t_str(name), &t->model));
}

void t_open(t_store *t) {
    char store[300];
    memset(t, 0, sizeof *t);
    t_dir(t->dir);
    snprintf(store, sizeof store, "%s/store", t->dir);
    ibid_store_opts o = {.dir = store, .map_size = (uint64_t)4 << 30};
    assert_ok(ibid_store_open(&o, &t->s));
    t->model = ibid_hash_bytes("toy", 3);
    t_calibrate(t, 1, 0.5f, 0.6f);
    t_collection(t, "c");
}

void t_close(t_store *t) {
    if (t->s) ibid_store_close(t->s);
    t_drop(t->dir);
}

/* Without a job: the store spares such blocks for two minutes. */
static uint64_t put_block(t_store *t, const char *title, ibid_str text) {
    ibid_tokens head, body;
    uint64_t number;
    assert_ok(t_tokenize(NULL, &t->model, t_str(title), &head));
    assert_ok(t_tokenize(NULL, &t->model, text, &body));
    size_t n = head.n + body.n;
    assert_true(n > 0 && n <= 256);
    int32_t *ids = ibid_alloc(n * sizeof *ids);
    int8_t *keys = ibid_alloc(n * T_DIM);
    for (size_t i = 0; i < n; i++) {
        ids[i] = i < head.n ? head.ids[i] : body.ids[i - head.n];
        t_key(ids[i], keys + i * T_DIM);
    }
    ibid_block_put b = {.model = t->model,
                        .prefix = ibid_hash_bytes("p", 1),
                        .kv_type = IBID_KV_Q8_0,
                        .n_title = head.n,
                        .n_tokens = n,
                        .tokens = ids,
                        .calibration = t->calibration,
                        .keys = keys,
                        .keys_dim = T_DIM};
    assert_ok(ibid_store_blocks_put(t->s, &b, 1, &number));
    ibid_free(ids);
    ibid_free(keys);
    ibid_free(head.ids);
    ibid_free(body.ids);
    return number;
}

uint64_t t_put(t_store *t, const char *collection, const char *id, const char *title,
               const char *text, const char *metadata) {
    ibid_chunk chunks[512];
    size_t n = 0;
    uint64_t number, generation;
    for (const char *p = text; *p;) {
        const char *end = strstr(p, "\n\n");
        size_t len = end ? (size_t)(end - p) : strlen(p);
        assert_true(n < 512);
        uint64_t start = (uint64_t)(p - text);
        chunks[n++] = (ibid_chunk){start, start + len, t_str("page 1"),
                                   put_block(t, title, (ibid_str){p, len})};
        p += len + (end ? 2 : 0);
    }
    ibid_document_put d = {.collection = t_str(collection),
                           .id = t_str(id),
                           .title = t_str(title),
                           .metadata = t_str(metadata ? metadata : ""),
                           .content = ibid_hash_bytes(text, strlen(text)),
                           .state = n ? IBID_DOC_READY : IBID_DOC_EMPTY,
                           .text = t_str(text),
                           .chunks = chunks,
                           .n_chunks = n};
    assert_ok(ibid_store_document_put(t->s, &d, &number, &generation));
    return generation;
}

void t_delete(t_store *t, const char *collection, const char *id) {
    uint64_t generation;
    assert_ok(ibid_store_document_delete(t->s, t_str(collection), t_str(id), &generation));
}

ibidi_retriever_opts t_opts(const t_store *t) {
    return (ibidi_retriever_opts){
        .data_dir = t->dir, .map_size = (uint64_t)4 << 30, .threads = 2, .hooks = t_hooks};
}

void t_search(ibidi_retriever *r, const char *collection, const char *question, size_t top,
              char out[1024]) {
    ibidi_found f;
    ibid_search_request q = {
        .collection = t_str(collection), .question = t_str(question), .top = top};
    assert_ok(ibidi_retriever_search(r, &q, &f));
    out[0] = '\0';
    for (size_t i = 0; i < f.n; i++) {
        size_t len = strlen(out);
        snprintf(out + len, 1024 - len, "%s%.*s", i ? " " : "", (int)f.hits[i].id.n,
                 f.hits[i].id.s);
    }
    ibidi_found_close(&f);
}

/* ---- Damage ---- */
void t_flip(const char *path, long offset) {
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, offset, offset < 0 ? SEEK_END : SEEK_SET), 0);
    int c = fgetc(f);
    assert_true(c >= 0);
    assert_int_equal(fseek(f, -1, SEEK_CUR), 0);
    fputc(c ^ 0x5A, f);
    fclose(f);
}

void t_truncate(const char *path, double share) {
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(truncate(path, (off_t)((double)st.st_size * share)), 0);
}

bool t_glob(const char *dir, const char *prefix, const char *suffix, char out[512]) {
    DIR *d = opendir(dir);
    bool found = false;
    for (struct dirent *e; d && !found && (e = readdir(d));) {
        size_t n = strlen(e->d_name), s = strlen(suffix);
        found = strncmp(e->d_name, prefix, strlen(prefix)) == 0 && n >= s &&
                strcmp(e->d_name + n - s, suffix) == 0;
        if (found) snprintf(out, 512, "%s/%s", dir, e->d_name);
    }
    if (d) closedir(d);
    return found;
}
