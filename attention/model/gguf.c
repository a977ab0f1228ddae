#include "attention/model/gguf.h"

#include "attention/tensor.h"
#include "rpc/base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    MIN_KV_BYTES = 8 + 4 + 1,             /* key length, type, the smallest value */
    MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8, /* name length, dims count, one dim, type, offset */
    MAX_KEY = 65535,
    MAX_DIMS = 4,
    MIN_ALIGN = 8,
    MAX_ALIGN = 1 << 20,
    TENSOR_TYPES = 40 /* numbers below this are, or once were, ggml's */
};

typedef struct kv {
    ibid_gguf_str key;
    uint32_t type; /* the element type when array */
    bool array;
    uint64_t n;           /* elements; 1 for a scalar */
    const uint8_t *value; /* a string array: the first string's length */
} kv;

struct ibid_gguf {
    const uint8_t *data;
    size_t size;
    bool mapped;
    char *label;
    kv *kvs; /* in key order */
    size_t n_kvs;
    ibid_gguf_tensor *tensors; /* in name order */
    size_t n_tensors;
};

/* A reader that cannot pass the end. */
typedef struct cursor {
    const uint8_t *data;
    size_t size, at;
} cursor;

static bool take(cursor *c, uint64_t n, const uint8_t **out) {
    if (n > c->size - c->at) return false;
    *out = c->data + c->at;
    c->at += (size_t)n;
    return true;
}

static bool take_u32(cursor *c, uint32_t *out) {
    const uint8_t *p;
    if (!take(c, sizeof *out, &p)) return false;
    memcpy(out, p, sizeof *out);
    return true;
}

static bool take_u64(cursor *c, uint64_t *out) {
    const uint8_t *p;
    if (!take(c, sizeof *out, &p)) return false;
    memcpy(out, p, sizeof *out);
    return true;
}

static bool take_str(cursor *c, ibid_gguf_str *out) {
    uint64_t n;
    const uint8_t *p;
    if (!take_u64(c, &n) || !take(c, n, &p)) return false;
    *out = (ibid_gguf_str){.data = (const char *)p, .n = (size_t)n};
    return true;
}

const char *ibid_gguf_show(ibid_gguf_str s, char buf[64]) {
    size_t n = s.n < 63 ? s.n : 63;
    for (size_t i = 0; i < n; i++) buf[i] = s.data[i] >= ' ' && s.data[i] <= '~' ? s.data[i] : '?';
    buf[n] = '\0';
    return buf;
}

const char *ibid_gguf_tensor_type_name(uint32_t type) {
    static const char *const names[] = {
        "F32",   "F16",        "Q4_0",       "Q4_1",       "Q4_2",     "Q4_3",     "Q5_0",
        "Q5_1",  "Q8_0",       "Q8_1",       "Q2_K",       "Q3_K",     "Q4_K",     "Q5_K",
        "Q6_K",  "Q8_K",       "IQ2_XXS",    "IQ2_XS",     "IQ3_XXS",  "IQ1_S",    "IQ4_NL",
        "IQ3_S", "IQ2_S",      "IQ4_XS",     "I8",         "I16",      "I32",      "I64",
        "F64",   "IQ1_M",      "BF16",       "Q4_0_4_4",   "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",
        "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4"};
    return type < sizeof names / sizeof *names ? names[type] : "?";
}

static int cmp_str(ibid_gguf_str a, ibid_gguf_str b) {
    size_t n = a.n < b.n ? a.n : b.n;
    int d = n ? memcmp(a.data, b.data, n) : 0;
    return d ? d : (a.n > b.n) - (a.n < b.n);
}

static int cmp_kv(const void *a, const void *b) {
    return cmp_str(((const kv *)a)->key, ((const kv *)b)->key);
}

static int cmp_tensor_name(const void *a, const void *b) {
    return cmp_str(((const ibid_gguf_tensor *)a)->name, ((const ibid_gguf_tensor *)b)->name);
}

static int cmp_tensor_place(const void *a, const void *b) {
    const uint8_t *x = ((const ibid_gguf_tensor *)a)->data,
                  *y = ((const ibid_gguf_tensor *)b)->data;
    return (x > y) - (x < y);
}

/* Bytes of one scalar; 0 for strings, arrays and unknown types. */
static size_t scalar_bytes(uint32_t type) {
    switch (type) {
    case IBID_GGUF_U8:
    case IBID_GGUF_I8:
    case IBID_GGUF_BOOL:
        return 1;
    case IBID_GGUF_U16:
    case IBID_GGUF_I16:
        return 2;
    case IBID_GGUF_U32:
    case IBID_GGUF_I32:
    case IBID_GGUF_F32:
        return 4;
    case IBID_GGUF_U64:
    case IBID_GGUF_I64:
    case IBID_GGUF_F64:
        return 8;
    default:
        return 0;
    }
}

static ibid_err short_value(const ibid_gguf *g, const kv *e) {
    char buf[64];
    return ibid_fail(IBID_CORRUPT, "%s: the value of %s runs past the end of the file", g->label,
                     ibid_gguf_show(e->key, buf));
}

/* Steps over the value of e, which starts at c, and notes where it lies. */
static ibid_err read_value(const ibid_gguf *g, cursor *c, kv *e) {
    char buf[64];
    e->n = 1;
    if (e->type == IBID_GGUF_ARRAY) {
        e->array = true;
        if (!take_u32(c, &e->type) || !take_u64(c, &e->n)) return short_value(g, e);
        if (e->type == IBID_GGUF_ARRAY)
            return ibid_fail(IBID_NOTSUP, "%s: %s is an array of arrays", g->label,
                             ibid_gguf_show(e->key, buf));
    }
    const uint8_t *skipped;
    size_t each = scalar_bytes(e->type);
    e->value = c->data + c->at;
    if (each) {
        if (e->n > (c->size - c->at) / each) return short_value(g, e);
        (void)take(c, e->n * each, &skipped);
        return IBID_OK;
    }
    if (e->type != IBID_GGUF_STRING)
        return ibid_fail(IBID_CORRUPT, "%s: %s has the unknown value type %u", g->label,
                         ibid_gguf_show(e->key, buf), e->type);
    if (e->n > (c->size - c->at) / 8) return short_value(g, e);
    for (uint64_t i = 0; i < e->n; i++) {
        ibid_gguf_str s;
        if (!take_str(c, &s)) return short_value(g, e);
    }
    return IBID_OK;
}

static ibid_err read_kvs(ibid_gguf *g, cursor *c) {
    char buf[64];
    g->kvs = ibid_calloc(g->n_kvs, sizeof *g->kvs);
    if (!g->kvs) return ibid_fail(IBID_NOMEM, "%s: out of memory for its metadata", g->label);
    for (size_t i = 0; i < g->n_kvs; i++) {
        kv *e = &g->kvs[i];
        if (!take_str(c, &e->key) || !take_u32(c, &e->type))
            return ibid_fail(IBID_CORRUPT,
                             "%s: metadata key %zu of %zu runs past the end of the file", g->label,
                             i, g->n_kvs);
        if (e->key.n == 0 || e->key.n > MAX_KEY)
            return ibid_fail(IBID_CORRUPT, "%s: metadata key %zu is %zu bytes long", g->label, i,
                             e->key.n);
        ibid_err err = read_value(g, c, e);
        if (err) return err;
    }
    qsort(g->kvs, g->n_kvs, sizeof *g->kvs, cmp_kv);
    for (size_t i = 1; i < g->n_kvs; i++)
        if (cmp_kv(&g->kvs[i - 1], &g->kvs[i]) == 0)
            return ibid_fail(IBID_CORRUPT, "%s: the metadata key %s is there twice", g->label,
                             ibid_gguf_show(g->kvs[i].key, buf));
    return IBID_OK;
}

/* Reads one row of the tensor table; *offset is relative to the start of the tensor data. */
static ibid_err read_tensor(const ibid_gguf *g, cursor *c, ibid_gguf_tensor *t, uint64_t *offset) {
    char buf[64];
    if (!take_str(c, &t->name) || !take_u32(c, &t->n_dims))
        return ibid_fail(IBID_CORRUPT, "%s: the tensor table runs past the end of the file",
                         g->label);
    if (t->name.n == 0 || t->name.n > MAX_KEY)
        return ibid_fail(IBID_CORRUPT, "%s: a tensor's name is %zu bytes long", g->label,
                         t->name.n);
    const char *name = ibid_gguf_show(t->name, buf);
    if (t->n_dims == 0 || t->n_dims > MAX_DIMS)
        return ibid_fail(IBID_CORRUPT, "%s: tensor %s has %u dimensions", g->label, name,
                         t->n_dims);
    uint64_t weights = 1;
    for (uint32_t i = 0; i < MAX_DIMS; i++) {
        t->dims[i] = 1;
        if (i < t->n_dims && !take_u64(c, &t->dims[i]))
            return ibid_fail(IBID_CORRUPT, "%s: the tensor table runs past the end of the file",
                             g->label);
        if (t->dims[i] == 0 || __builtin_mul_overflow(weights, t->dims[i], &weights) ||
            weights > INT64_MAX)
            return ibid_fail(IBID_CORRUPT, "%s: tensor %s has an impossible dimension %u (%llu)",
                             g->label, name, i, (unsigned long long)t->dims[i]);
    }
    if (!take_u32(c, &t->type) || !take_u64(c, offset))
        return ibid_fail(IBID_CORRUPT, "%s: the tensor table runs past the end of the file",
                         g->label);
    if (t->type >= TENSOR_TYPES)
        return ibid_fail(IBID_CORRUPT, "%s: tensor %s has the unknown type %u", g->label, name,
                         t->type);
    return IBID_OK;
}

/* Turns a tensor's offset into a checked place in the file. */
static ibid_err place_tensor(const ibid_gguf *g, ibid_gguf_tensor *t, uint64_t start,
                             uint64_t offset, uint64_t align) {
    char buf[64];
    const char *name = ibid_gguf_show(t->name, buf);
    uint64_t room = g->size - start;
    if (offset % align)
        return ibid_fail(IBID_CORRUPT, "%s: tensor %s is not aligned to %llu bytes", g->label, name,
                         (unsigned long long)align);
    if (offset > room)
        return ibid_fail(IBID_CORRUPT, "%s: tensor %s starts past the end of the file", g->label,
                         name);
    t->data = g->data + start + offset;
    ibid_type type = (ibid_type)t->type;
    if (ibid_type_block(type) == 0) return IBID_OK; /* refused by name where it is used */
    size_t row = ibid_type_row_bytes(type, (size_t)t->dims[0]);
    if (row == 0)
        return ibid_fail(IBID_CORRUPT, "%s: rows of tensor %s are not whole blocks of %s", g->label,
                         name, ibid_type_name(type));
    t->bytes = row;
    for (uint32_t i = 1; i < MAX_DIMS; i++)
        if (__builtin_mul_overflow(t->bytes, t->dims[i], &t->bytes)) t->bytes = UINT64_MAX;
    if (t->bytes > room - offset)
        return ibid_fail(IBID_CORRUPT, "%s: tensor %s runs past the end of the file", g->label,
                         name);
    t->readable = true;
    return IBID_OK;
}

/* No two tensors may share bytes: a small file could otherwise claim any number of weights. */
static ibid_err check_overlap(ibid_gguf *g) {
    char buf[64];
    qsort(g->tensors, g->n_tensors, sizeof *g->tensors, cmp_tensor_place);
    const uint8_t *end = g->data;
    for (size_t i = 0; i < g->n_tensors; i++) {
        const ibid_gguf_tensor *t = &g->tensors[i];
        if (!t->readable) continue;
        if ((const uint8_t *)t->data < end)
            return ibid_fail(IBID_CORRUPT, "%s: tensor %s overlaps another one", g->label,
                             ibid_gguf_show(t->name, buf));
        end = (const uint8_t *)t->data + t->bytes;
    }
    return IBID_OK;
}

static ibid_err read_alignment(const ibid_gguf *g, uint64_t *align) {
    *align = 32;
    ibid_err e = ibid_gguf_get_u64(g, "general.alignment", false, align);
    if (e) return e;
    if (*align < MIN_ALIGN || *align > MAX_ALIGN || (*align & (*align - 1)))
        return ibid_fail(IBID_CORRUPT,
                         "%s: general.alignment is %llu, not a power of two from %d on", g->label,
                         (unsigned long long)*align, MIN_ALIGN);
    return IBID_OK;
}

static ibid_err read_tensors(ibid_gguf *g, cursor *c) {
    char buf[64];
    uint64_t align = 0, start = 0;
    uint64_t *offsets = NULL;
    ibid_err e = read_alignment(g, &align);
    if (e) return e;
    g->tensors = ibid_calloc(g->n_tensors, sizeof *g->tensors);
    offsets = ibid_calloc(g->n_tensors, sizeof *offsets);
    if (!g->tensors || !offsets) {
        e = ibid_fail(IBID_NOMEM, "%s: out of memory for its tensor table", g->label);
        goto done;
    }
    for (size_t i = 0; i < g->n_tensors; i++)
        if ((e = read_tensor(g, c, &g->tensors[i], &offsets[i]))) goto done;
    start = ibid_align_up(c->at, (size_t)align);
    if (start > g->size) start = g->size; /* a file without tensors may end at its header */
    for (size_t i = 0; i < g->n_tensors; i++)
        if ((e = place_tensor(g, &g->tensors[i], start, offsets[i], align))) goto done;
    if ((e = check_overlap(g))) goto done;
    qsort(g->tensors, g->n_tensors, sizeof *g->tensors, cmp_tensor_name);
    for (size_t i = 1; i < g->n_tensors && !e; i++)
        if (cmp_tensor_name(&g->tensors[i - 1], &g->tensors[i]) == 0)
            e = ibid_fail(IBID_CORRUPT, "%s: tensor %s is there twice", g->label,
                          ibid_gguf_show(g->tensors[i].name, buf));
done:
    ibid_free(offsets);
    return e;
}

static ibid_err read_all(ibid_gguf *g) {
    cursor c = {.data = g->data, .size = g->size};
    const uint8_t *magic;
    uint32_t version;
    uint64_t n_tensors, n_kvs;
    if (!take(&c, 4, &magic) || memcmp(magic, "GGUF", 4) != 0)
        return ibid_fail(IBID_CORRUPT, "%s: the magic is missing: not a GGUF file", g->label);
    if (!take_u32(&c, &version) || !take_u64(&c, &n_tensors) || !take_u64(&c, &n_kvs))
        return ibid_fail(IBID_CORRUPT, "%s: the file ends inside its header", g->label);
    if (version != 2 && version != 3)
        return ibid_fail(IBID_NOTSUP, "%s: GGUF version %u%s; versions 2 and 3 are read", g->label,
                         version,
                         version == 0x02000000 || version == 0x03000000 ? " (big-endian)" : "");
    uint64_t left = g->size - c.at;
    if (n_kvs > left / MIN_KV_BYTES)
        return ibid_fail(IBID_CORRUPT, "%s: the metadata count %llu is more than the file can hold",
                         g->label, (unsigned long long)n_kvs);
    if (n_tensors > left / MIN_TENSOR_BYTES)
        return ibid_fail(IBID_CORRUPT, "%s: the tensor count %llu is more than the file can hold",
                         g->label, (unsigned long long)n_tensors);
    g->n_kvs = (size_t)n_kvs;
    g->n_tensors = (size_t)n_tensors;
    ibid_err e = read_kvs(g, &c);
    return e ? e : read_tensors(g, &c);
}

ibid_err ibid_gguf_parse(const void *data, size_t n, const char *label, ibid_gguf **out) {
    ibid_gguf *g = ibid_calloc(1, sizeof *g);
    ibid_err e = IBID_NOMEM;
    if (!g || !(g->label = ibid_strdup(label))) {
        (void)ibid_fail(IBID_NOMEM, "%s: out of memory", label);
        goto done;
    }
    g->data = data;
    g->size = n;
    if ((e = read_all(g))) goto done;
    *out = g;
    g = NULL;
done:
    ibid_gguf_close(g);
    return e;
}

ibid_err ibid_gguf_open(const char *path, ibid_gguf **out) {
    ibid_err e = IBID_OK;
    void *data = MAP_FAILED;
    size_t size = 0;
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return ibid_fail_errno(errno, "cannot open", path);
    if (fstat(fd, &st) != 0) {
        e = ibid_fail_errno(errno, "cannot read", path);
        goto done;
    }
    if (!S_ISREG(st.st_mode)) {
        e = ibid_fail(IBID_IO, "%s is not a regular file", path);
        goto done;
    }
    if (st.st_size <= 0) {
        e = ibid_fail(IBID_CORRUPT, "%s: the magic is missing: the file is empty", path);
        goto done;
    }
    size = (size_t)st.st_size;
    data = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) {
        e = ibid_fail_errno(errno, "cannot map", path);
        goto done;
    }
    if ((e = ibid_gguf_parse(data, size, path, out))) goto done;
    (*out)->mapped = true;
    data = MAP_FAILED;
done:
    if (data != MAP_FAILED) (void)munmap(data, size);
    (void)close(fd);
    return e;
}

void ibid_gguf_close(ibid_gguf *g) {
    if (!g) return;
    if (g->mapped) (void)munmap((void *)(uintptr_t)g->data, g->size);
    ibid_free(g->tensors);
    ibid_free(g->kvs);
    ibid_free(g->label);
    ibid_free(g);
}

const void *ibid_gguf_bytes(const ibid_gguf *g, size_t *n) {
    *n = g->size;
    return g->data;
}

const char *ibid_gguf_label(const ibid_gguf *g) {
    return g->label;
}

static const kv *find(const ibid_gguf *g, const char *key) {
    kv wanted = {.key = {.data = key, .n = strlen(key)}};
    return g->n_kvs ? bsearch(&wanted, g->kvs, g->n_kvs, sizeof *g->kvs, cmp_kv) : NULL;
}

bool ibid_gguf_has(const ibid_gguf *g, const char *key) {
    return find(g, key) != NULL;
}

static ibid_err missing(const ibid_gguf *g, const char *key, bool required) {
    if (!required) return IBID_OK;
    return ibid_fail(IBID_CORRUPT, "%s: the metadata key %s is missing", g->label, key);
}

static ibid_err wrong_type(const ibid_gguf *g, const char *key, const char *wanted) {
    return ibid_fail(IBID_CORRUPT, "%s: %s is not %s", g->label, key, wanted);
}

ibid_err ibid_gguf_get_u64(const ibid_gguf *g, const char *key, bool required, uint64_t *out) {
    const kv *e = find(g, key);
    if (!e) return missing(g, key, required);
    uint64_t v = 0;
    size_t n = scalar_bytes(e->type);
    bool is_signed = e->type == IBID_GGUF_I8 || e->type == IBID_GGUF_I16 ||
                     e->type == IBID_GGUF_I32 || e->type == IBID_GGUF_I64;
    bool is_unsigned = e->type == IBID_GGUF_U8 || e->type == IBID_GGUF_U16 ||
                       e->type == IBID_GGUF_U32 || e->type == IBID_GGUF_U64;
    if (e->array || (!is_signed && !is_unsigned)) return wrong_type(g, key, "an integer");
    memcpy(&v, e->value, n); /* little-endian, as the file is */
    if (is_signed && (e->value[n - 1] & 0x80)) return wrong_type(g, key, "zero or more");
    *out = v;
    return IBID_OK;
}

ibid_err ibid_gguf_get_f32(const ibid_gguf *g, const char *key, bool required, float *out) {
    const kv *e = find(g, key);
    if (!e) return missing(g, key, required);
    if (!e->array && e->type == IBID_GGUF_F32) {
        memcpy(out, e->value, sizeof *out);
        return IBID_OK;
    }
    if (e->array || e->type != IBID_GGUF_F64) return wrong_type(g, key, "a float");
    double v;
    memcpy(&v, e->value, sizeof v);
    *out = (float)v;
    return IBID_OK;
}

ibid_err ibid_gguf_get_bool(const ibid_gguf *g, const char *key, bool required, bool *out) {
    const kv *e = find(g, key);
    if (!e) return missing(g, key, required);
    if (e->array || e->type != IBID_GGUF_BOOL || *e->value > 1) return wrong_type(g, key, "a bool");
    *out = *e->value == 1;
    return IBID_OK;
}

ibid_err ibid_gguf_get_str(const ibid_gguf *g, const char *key, bool required, ibid_gguf_str *out) {
    const kv *e = find(g, key);
    if (!e) return missing(g, key, required);
    if (e->array || e->type != IBID_GGUF_STRING) return wrong_type(g, key, "a string");
    cursor c = {.data = e->value, .size = g->size - (size_t)(e->value - g->data)};
    (void)take_str(&c, out); /* cannot fail: checked when the file was read */
    return IBID_OK;
}

ibid_err ibid_gguf_get_i32s(const ibid_gguf *g, const char *key, bool required, const void **out,
                            size_t *n) {
    const kv *e = find(g, key);
    if (!e) return missing(g, key, required);
    if (!e->array || e->type != IBID_GGUF_I32) return wrong_type(g, key, "an array of int32");
    *out = e->value;
    *n = (size_t)e->n;
    return IBID_OK;
}

int32_t ibid_gguf_i32_at(const void *array, size_t i) {
    int32_t v;
    memcpy(&v, (const uint8_t *)array + i * sizeof v, sizeof v);
    return v;
}

ibid_err ibid_gguf_get_strs(const ibid_gguf *g, const char *key, bool required, ibid_gguf_str **out,
                            size_t *n) {
    const kv *e = find(g, key);
    if (!e) return missing(g, key, required);
    if (!e->array || e->type != IBID_GGUF_STRING) return wrong_type(g, key, "an array of strings");
    ibid_gguf_str *strs = ibid_calloc((size_t)e->n, sizeof *strs);
    if (!strs) return ibid_fail(IBID_NOMEM, "%s: out of memory for %s", g->label, key);
    cursor c = {.data = e->value, .size = g->size - (size_t)(e->value - g->data)};
    for (size_t i = 0; i < e->n; i++) (void)take_str(&c, &strs[i]);
    *out = strs;
    *n = (size_t)e->n;
    return IBID_OK;
}

size_t ibid_gguf_n_tensors(const ibid_gguf *g) {
    return g->n_tensors;
}

const ibid_gguf_tensor *ibid_gguf_tensor_at(const ibid_gguf *g, size_t i) {
    return i < g->n_tensors ? &g->tensors[i] : NULL;
}

const ibid_gguf_tensor *ibid_gguf_tensor_find(const ibid_gguf *g, const char *name) {
    ibid_gguf_tensor wanted = {.name = {.data = name, .n = strlen(name)}};
    return g->n_tensors
               ? bsearch(&wanted, g->tensors, g->n_tensors, sizeof *g->tensors, cmp_tensor_name)
               : NULL;
}
