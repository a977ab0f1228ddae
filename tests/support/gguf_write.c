#include "tests/support/gguf_write.h"

#include "attention/model/gguf.h"
#include "tests/support/quantise.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGN = 32, OUTLIER_ROWS = 4, PER_LAYER = 15 };

/* splitmix64: one stream for the whole file. */
static uint64_t next_random(uint64_t *s) {
    uint64_t z = *s += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* Uniform with mean 0 and variance 1. */
static float next_weight(uint64_t *s) {
    float unit = (float)(next_random(s) >> 40) / (float)(1 << 24);
    return (unit - 0.5f) * 3.4641016f;
}

/* Rounds to the nearest half, ties to even; too large becomes infinite. */
static uint16_t to_f16(float f) {
    uint16_t sign = signbit(f) ? 0x8000 : 0;
    float x = fabsf(f);
    int exponent = 0;
    if (x == 0) return sign;
    (void)frexpf(x, &exponent);
    /* One unit in the last place: 2^(exponent - 11), but not below 2^-24, where subnormals end. */
    int ulp = exponent - 11 < -24 ? -24 : exponent - 11;
    uint32_t units = (uint32_t)lrintf(ldexpf(x, -ulp));
    /* A subnormal's bits are its units; above, the exponent field counts from 2^-14 on. */
    uint32_t bits = ulp == -24 ? units : (uint32_t)(ulp + 24) * 1024 + units;
    return (uint16_t)(sign | (bits < 0x7C00 ? bits : 0x7C00));
}

/* What the file is built in; the first error stays. */
typedef struct writer {
    ibid_buf *out;
    ibid_err e;
} writer;

static void put(writer *w, const void *data, size_t n) {
    if (!w->e) w->e = ibid_buf_append(w->out, data, n);
}

static void put_u32(writer *w, uint32_t v) {
    put(w, &v, sizeof v);
}

static void put_u64(writer *w, uint64_t v) {
    put(w, &v, sizeof v);
}

static void put_str(writer *w, const char *s, size_t n) {
    put_u64(w, n);
    put(w, s, n);
}

static void put_key(writer *w, const char *key, uint32_t type) {
    put_str(w, key, strlen(key));
    put_u32(w, type);
}

static void kv_str(writer *w, const char *key, const char *value) {
    put_key(w, key, IBID_GGUF_STRING);
    put_str(w, value, strlen(value));
}

static void kv_u32(writer *w, const char *key, size_t value) {
    put_key(w, key, IBID_GGUF_U32);
    put_u32(w, (uint32_t)value);
}

static void kv_f32(writer *w, const char *key, float value) {
    put_key(w, key, IBID_GGUF_F32);
    put(w, &value, sizeof value);
}

static void kv_bool(writer *w, const char *key, bool value) {
    uint8_t byte = value;
    put_key(w, key, IBID_GGUF_BOOL);
    put(w, &byte, 1);
}

/* The same with the architecture before the key. */
static const char *arch_key(const char *arch, const char *key, char buf[64]) {
    (void)snprintf(buf, 64, "%s.%s", arch, key);
    return buf;
}

static void arch_str(writer *w, const char *arch, const char *key, const char *value) {
    char buf[64];
    kv_str(w, arch_key(arch, key, buf), value);
}

static void arch_u32(writer *w, const char *arch, const char *key, size_t value) {
    char buf[64];
    kv_u32(w, arch_key(arch, key, buf), value);
}

static void arch_f32(writer *w, const char *arch, const char *key, float value) {
    char buf[64];
    kv_f32(w, arch_key(arch, key, buf), value);
}

static void kv_array(writer *w, const char *key, uint32_t type, size_t n) {
    put_key(w, key, IBID_GGUF_ARRAY);
    put_u32(w, type);
    put_u64(w, n);
}

static const char *const controls[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
/* "Ġ" is how a byte-level vocabulary writes a blank. */
#define SP "\xC4\xA0"
static const char *const merges[][2] = {{"t", "h"},  {"th", "e"}, {SP, "t"},  {SP "t", "he"},
                                        {"h", "e"},  {"i", "n"},  {"a", "n"}, {"an", "d"},
                                        {SP, "and"}, {"e", "r"},  {"o", "n"}, {"in", "g"},
                                        {SP, "a"},   {"e", "s"},  {"r", "e"}, {"1", "2"}};
enum { N_MERGES = sizeof merges / sizeof *merges };

/* The character that stands for byte b in a byte-level vocabulary, as UTF-8. */
static size_t byte_text(unsigned b, char out[3]) {
    unsigned c = b, n_before = 0;
    bool plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    if (!plain) {
        for (unsigned i = 0; i < b; i++)
            n_before += !((i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174);
        c = 256 + n_before;
    }
    if (c < 0x80) return out[0] = (char)c, 1;
    out[0] = (char)(0xC0 | c >> 6);
    out[1] = (char)(0x80 | (c & 0x3F));
    return 2;
}

static void put_tokens(writer *w, size_t n_vocab) {
    char text[32];
    size_t n_control = sizeof controls / sizeof *controls, first = n_control + 256;
    kv_array(w, "tokenizer.ggml.tokens", IBID_GGUF_STRING, n_vocab);
    for (size_t i = 0; i < n_vocab; i++) {
        int n = 0;
        if (i < n_control)
            n = snprintf(text, sizeof text, "%s", controls[i]);
        else if (i < first)
            n = (int)byte_text((unsigned)(i - n_control), text);
        else if (i < first + N_MERGES)
            n = snprintf(text, sizeof text, "%s%s", merges[i - first][0], merges[i - first][1]);
        else
            n = snprintf(text, sizeof text, "unused-%zu", i);
        put_str(w, text, (size_t)n);
    }
    kv_array(w, "tokenizer.ggml.token_type", IBID_GGUF_I32, n_vocab);
    for (size_t i = 0; i < n_vocab; i++)
        put_u32(w, i < n_control ? 3 : i < first + N_MERGES ? 1 : 5);
    kv_array(w, "tokenizer.ggml.merges", IBID_GGUF_STRING, N_MERGES);
    for (size_t i = 0; i < N_MERGES; i++) {
        int n = snprintf(text, sizeof text, "%s %s", merges[i][0], merges[i][1]);
        put_str(w, text, (size_t)n);
    }
}

static const char chatml[] =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
    "}}{% endif %}";

/* Returns how many keys it wrote. */
static uint64_t put_metadata(writer *w, const ibid_test_gguf *s, size_t head_dim, size_t n_rot) {
    uint64_t n = 22;
    const char *arch = s->arch ? s->arch : "llama";
    kv_str(w, "general.architecture", arch);
    kv_str(w, "general.name", "a random test model");
    kv_u32(w, "general.alignment", ALIGN);
    arch_u32(w, arch, "block_count", s->n_layers);
    arch_u32(w, arch, "context_length", s->n_ctx);
    arch_u32(w, arch, "embedding_length", s->n_embd);
    arch_u32(w, arch, "feed_forward_length", s->n_ff);
    arch_u32(w, arch, "attention.head_count", s->n_heads);
    arch_u32(w, arch, "attention.head_count_kv", s->n_kv_heads);
    arch_f32(w, arch, "attention.layer_norm_rms_epsilon", 1e-5f);
    arch_u32(w, arch, "rope.dimension_count", n_rot);
    arch_f32(w, arch, "rope.freq_base", s->rope_theta > 0 ? s->rope_theta : 10000.0f);
    arch_u32(w, arch, "vocab_size", s->n_vocab);
    if (s->head_dim) {
        arch_u32(w, arch, "attention.key_length", head_dim);
        arch_u32(w, arch, "attention.value_length", head_dim);
        n += 2;
    }
    if (s->rope_linear > 0) {
        arch_str(w, arch, "rope.scaling.type", s->rope_type ? s->rope_type : "linear");
        arch_f32(w, arch, "rope.scaling.factor", s->rope_linear);
        n += 2;
    }
    kv_str(w, "tokenizer.ggml.model", "gpt2");
    kv_str(w, "tokenizer.ggml.pre", s->pre ? s->pre : "smollm");
    put_tokens(w, s->n_vocab);
    kv_u32(w, "tokenizer.ggml.bos_token_id", 1);
    kv_u32(w, "tokenizer.ggml.eos_token_id", 2);
    kv_bool(w, "tokenizer.ggml.add_bos_token", false);
    kv_str(w, "tokenizer.chat_template", chatml);
    return n;
}

typedef enum plan_kind { WEIGHTS, NORM, HEAD_NORM, BIAS, FACTORS } plan_kind;

/* One tensor to be written. cols of 0: not there. */
typedef struct plan {
    char name[40];
    size_t rows, cols;
    ibid_type type;
    plan_kind kind;
    float outlier; /* 0: none; otherwise rows [0, OUTLIER_ROWS) are this much larger */
} plan;

static float value_of(const plan *p, size_t i, uint64_t *random) {
    switch (p->kind) {
    case NORM:
        return 1 + 0.1f * next_weight(random);
    case HEAD_NORM:
        return 1 + 0.4f * next_weight(random);
    case BIAS:
        return next_weight(random);
    case FACTORS:
        return 1 + 3 * (float)i / (float)p->cols;
    case WEIGHTS:
        break;
    }
    float v = next_weight(random) / sqrtf((float)p->cols);
    return p->outlier > 0 && i < OUTLIER_ROWS * p->cols ? v * p->outlier : v;
}

/* The high half, to nearest even; the values here are finite. */
static uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static void put_tensor(writer *w, const plan *p, uint64_t *random) {
    float values[TEST_SUPER];
    uint8_t block[TEST_SUPER];
    size_t n = p->rows * p->cols, each = ibid_type_block(p->type);
    for (size_t i = 0; i < n && !w->e; i++) {
        float v = value_of(p, i, random);
        uint16_t half = p->type == IBID_BF16 ? to_bf16(v) : to_f16(v);
        values[i % each] = v;
        if (p->type == IBID_F32)
            put(w, &v, sizeof v);
        else if (each == 1)
            put(w, &half, sizeof half);
        else if (i % each == each - 1)
            put(w, block, test_quantise(p->type, values, to_f16, block));
    }
    static const char zeros[ALIGN];
    put(w, zeros, ibid_align_up(w->out->len, ALIGN) - w->out->len);
}

static plan matrix(ibid_type type, size_t rows, size_t cols) {
    return (plan){.rows = rows, .cols = cols, .type = type, .kind = WEIGHTS};
}

static plan floats(size_t cols, plan_kind kind) {
    plan p = {.rows = 1, .cols = cols, .type = IBID_F32};
    p.kind = kind;
    return p;
}

static bool is_arch(const ibid_test_gguf *s, const char *name) {
    return strcmp(s->arch ? s->arch : "llama", name) == 0;
}

static void name_part(plan *p, size_t layer, const char *part, const char *after) {
    int n = snprintf(p->name, sizeof p->name, "blk.%zu.%s%s", layer, part, after);
    if (n < 0 || (size_t)n >= sizeof p->name) abort(); /* no layer count of a test is that long */
}

/* What some architectures have besides, in one layer. */
static size_t plan_extras(const ibid_test_gguf *s, size_t layer, size_t head_dim, plan *p) {
    bool norms = is_arch(s, "qwen3"), biases = s->biases || is_arch(s, "qwen2");
    size_t q = s->n_heads * head_dim, kv = s->n_kv_heads * head_dim, n = 0;
    const struct {
        const char *part;
        size_t cols;
        bool wanted;
        plan_kind kind;
    } all[] = {{"attn_q.bias", q, biases, BIAS},
               {"attn_k.bias", kv, biases, BIAS},
               {"attn_v.bias", kv, biases, BIAS},
               {"attn_output.bias", s->n_embd, s->biases, BIAS},
               {"attn_q_norm.weight", head_dim, norms, HEAD_NORM},
               {"attn_k_norm.weight", head_dim, norms, HEAD_NORM}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (!all[i].wanted) continue;
        p[n] = floats(all[i].cols, all[i].kind);
        name_part(&p[n++], layer, all[i].part, "");
    }
    return n;
}

/* Fills plans in file order; returns how many. */
static size_t plan_tensors(const ibid_test_gguf *s, size_t head_dim, size_t n_rot, plan *p) {
    static const char *const parts[] = {"attn_norm", "attn_q",   "attn_k", "attn_v",  "attn_output",
                                        "ffn_norm",  "ffn_gate", "ffn_up", "ffn_down"};
    size_t d = s->n_embd, q = s->n_heads * head_dim, kv = s->n_kv_heads * head_dim, n = 0;
    p[n] = matrix(s->type, s->n_vocab, d);
    strcpy(p[n++].name, "token_embd.weight");
    for (size_t i = 0; i < s->n_layers; i++) {
        plan layer[] = {floats(d, NORM),
                        matrix(s->type, q, d),
                        matrix(s->type, kv, d),
                        matrix(s->type, kv, d),
                        matrix(s->type, d, q),
                        floats(d, NORM),
                        matrix(s->type, s->n_ff, d),
                        matrix(s->type, s->n_ff, d),
                        matrix(s->type, d, s->n_ff)};
        for (size_t j = 0; j < sizeof parts / sizeof *parts; j++) {
            p[n] = layer[j];
            name_part(&p[n], i, parts[j], ".weight");
            if (strcmp(parts[j], "attn_k") == 0) p[n].outlier = s->key_outlier;
            n++;
        }
        n += plan_extras(s, i, head_dim, p + n);
    }
    p[n] = floats(d, NORM);
    strcpy(p[n++].name, "output_norm.weight");
    if (!s->tied) {
        p[n] = matrix(s->type, s->n_vocab, d);
        strcpy(p[n++].name, "output.weight");
    }
    if (s->rope_freqs) {
        p[n] = floats(n_rot / 2, FACTORS);
        strcpy(p[n++].name, "rope_freqs.weight");
    }
    return n;
}

static ibid_err check_spec(const ibid_test_gguf *s, size_t head_dim) {
    bool sizes =
        s->n_layers && s->n_embd && s->n_heads && s->n_kv_heads && s->n_ff && s->n_ctx && head_dim;
    if (!sizes || s->n_vocab < IBID_TEST_MIN_VOCAB || s->n_layers > 64)
        return ibid_fail(IBID_INVAL, "a test model's spec lacks a size");
    if (!ibid_type_row_bytes(s->type, s->n_embd) || !ibid_type_row_bytes(s->type, s->n_ff) ||
        !ibid_type_row_bytes(s->type, s->n_heads * head_dim))
        return ibid_fail(IBID_INVAL, "a test model's rows are not whole blocks of its type");
    return IBID_OK;
}

ibid_test_gguf ibid_test_gguf_small(void) {
    return (ibid_test_gguf){.n_layers = 2,
                            .n_embd = 64,
                            .n_heads = 4,
                            .n_kv_heads = 2,
                            .n_ff = 96,
                            .n_vocab = IBID_TEST_MIN_VOCAB,
                            .n_ctx = 512,
                            .type = IBID_F32,
                            .seed = 1,
                            .tied = true};
}

ibid_err ibid_test_build_gguf(const ibid_test_gguf *s, ibid_buf *out) {
    size_t head_dim = s->head_dim ? s->head_dim : s->n_heads ? s->n_embd / s->n_heads : 0;
    size_t n_rot = s->n_rot ? s->n_rot : head_dim, offset = 0;
    uint64_t random = s->seed;
    writer w = {.out = out, .e = check_spec(s, head_dim)};
    if (w.e) return w.e;
    plan *plans = ibid_calloc(s->n_layers * PER_LAYER + 4, sizeof *plans);
    if (!plans) return ibid_fail(IBID_NOMEM, "out of memory for a test model");
    size_t n = plan_tensors(s, head_dim, n_rot, plans), counts = out->len + 8;
    put(&w, "GGUF", 4);
    put_u32(&w, 3);
    put_u64(&w, n);
    put_u64(&w, 0); /* the number of keys, once it is known */
    uint64_t n_kvs = put_metadata(&w, s, head_dim, n_rot);
    if (!w.e) memcpy(out->data + counts + 8, &n_kvs, sizeof n_kvs);
    for (size_t i = 0; i < n; i++) {
        const plan *p = &plans[i];
        put_str(&w, p->name, strlen(p->name));
        put_u32(&w, p->rows > 1 ? 2 : 1);
        put_u64(&w, p->cols);
        if (p->rows > 1) put_u64(&w, p->rows);
        put_u32(&w, (uint32_t)p->type);
        put_u64(&w, offset);
        offset += ibid_align_up(p->rows * ibid_type_row_bytes(p->type, p->cols), ALIGN);
    }
    static const char zeros[ALIGN];
    put(&w, zeros, ibid_align_up(out->len, ALIGN) - out->len);
    for (size_t i = 0; i < n; i++) put_tensor(&w, &plans[i], &random);
    ibid_free(plans);
    return w.e;
}

ibid_err ibid_test_write_gguf(const char *path, const ibid_test_gguf *spec) {
    ibid_buf b;
    FILE *f = NULL;
    ibid_buf_init(&b, (size_t)1 << 32);
    ibid_err e = ibid_test_build_gguf(spec, &b);
    if (e) goto done;
    f = fopen(path, "wb");
    if (!f) {
        e = ibid_fail_errno(errno, "cannot write", path);
        goto done;
    }
    if (fwrite(b.data, 1, b.len, f) != b.len) e = ibid_fail_errno(errno, "cannot write", path);
done:
    if (f && fclose(f) != 0 && !e) e = ibid_fail_errno(errno, "cannot write", path);
    ibid_buf_fini(&b);
    return e;
}
