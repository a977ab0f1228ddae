/* Reads a model of the llama architecture from a GGUF file: hyper-parameters, RoPE, and every
 * weight tensor with its shape and type checked, so that the engine may believe them. */
#include "attention/model/model.h"

#include "attention/model/gguf.h"
#include "attention/model/internal.h"
#include "attention/tokenizer/internal.h"
#include "attention/tokenizer/template.h"
#include "rpc/base/mem.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    TENSORS_PER_LAYER = 9, /* at least */
    MAX_LAYERS = 1024,
    MAX_WIDTH = 1 << 20, /* n_embd, n_ff, heads, head_dim */
    MAX_CTX = 1 << 28,
    MAX_KEY = 64
};

typedef enum presence { NEVER, MAYBE, ALWAYS } presence;

/* How the architectures differ. Keys of the file start with the name. */
typedef struct arch_info {
    const char *name;
    ibid_arch arch;
    ibid_pairing pairing;
    presence qkv_bias, head_norms, out_bias, rope_factors;
} arch_info;

static const arch_info archs[] = {
    {"llama", IBID_ARCH_LLAMA, IBID_PAIR_NEXT, MAYBE, NEVER, MAYBE, MAYBE},
    {"qwen2", IBID_ARCH_QWEN2, IBID_PAIR_HALF, ALWAYS, NEVER, NEVER, NEVER},
    {"qwen3", IBID_ARCH_QWEN3, IBID_PAIR_HALF, NEVER, ALWAYS, NEVER, NEVER},
};

const char *ibid_arch_name(ibid_arch arch) {
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++)
        if (archs[i].arch == arch) return archs[i].name;
    return "unknown";
}

typedef struct model_box {
    ibid_model m; /* first: a model is its box */
    const arch_info *arch;
    ibid_gguf *g;
    char *name;
    char *chat_text;
    ibid_layer *layers;
    float *freq;
    ibid_tokenizer *tokenizer;
    bool *used;    /* by the model, of the file's tensors */
    size_t n_used; /* how many of them */
} model_box;

/* The file's name of an architecture's key. */
static const char *key_of(const model_box *b, const char *key, char buf[MAX_KEY]) {
    (void)snprintf(buf, MAX_KEY, "%s.%s", b->arch->name, key);
    return buf;
}

static ibid_err get_count(const model_box *b, const char *key, bool required, uint64_t max,
                          size_t *out) {
    char buf[MAX_KEY];
    uint64_t v = *out;
    ibid_err e = ibid_gguf_get_u64(b->g, key_of(b, key, buf), required, &v);
    if (e) return e;
    if (v == 0 || v > max)
        return ibid_fail(IBID_CORRUPT, "%s: %s is %llu, not between 1 and %llu",
                         ibid_gguf_label(b->g), buf, (unsigned long long)v,
                         (unsigned long long)max);
    *out = (size_t)v;
    return IBID_OK;
}

static ibid_err get_float(const model_box *b, const char *key, bool required, float *out) {
    char buf[MAX_KEY];
    return ibid_gguf_get_f32(b->g, key_of(b, key, buf), required, out);
}

static bool str_is(ibid_gguf_str s, const char *text) {
    return s.n == strlen(text) && memcmp(s.data, text, s.n) == 0;
}

/* Things that would change the arithmetic and that this build does not do. */
static ibid_err refuse_variants(const model_box *b) {
    const ibid_gguf *g = b->g;
    char key[MAX_KEY];
    uint64_t experts = 0;
    bool causal = true;
    ibid_err e = ibid_gguf_get_u64(g, key_of(b, "expert_count", key), false, &experts);
    if (e) return e;
    if (experts)
        return ibid_fail(IBID_NOTSUP, "%s: a mixture of experts (%s %llu) is not supported",
                         ibid_gguf_label(g), key, (unsigned long long)experts);
    if ((e = ibid_gguf_get_bool(g, key_of(b, "attention.causal", key), false, &causal))) return e;
    if (!causal)
        return ibid_fail(IBID_NOTSUP, "%s: attention that is not causal is not supported",
                         ibid_gguf_label(g));
    static const char *const keys[] = {
        "attention.sliding_window", "attention.scale",         "logit_scale",
        "embedding_scale",          "residual_scale",          "attn_logit_softcapping",
        "final_logit_softcapping",  "rope.scaling.attn_factor"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (ibid_gguf_has(g, key_of(b, keys[i], key)))
            return ibid_fail(IBID_NOTSUP, "%s: %s is not supported", ibid_gguf_label(g), key);
    return IBID_OK;
}

static ibid_err read_head_dim(model_box *b) {
    const char *label = ibid_gguf_label(b->g);
    char key[MAX_KEY];
    ibid_model *m = &b->m;
    if (m->n_heads % m->n_kv_heads != 0)
        return ibid_fail(IBID_CORRUPT, "%s: %zu attention heads over %zu kv heads (head_count_kv)",
                         label, m->n_heads, m->n_kv_heads);
    bool given = ibid_gguf_has(b->g, key_of(b, "attention.key_length", key));
    if (!given && m->n_embd % m->n_heads != 0)
        return ibid_fail(IBID_CORRUPT,
                         "%s: embedding_length %zu over %zu attention heads (head_count)", label,
                         m->n_embd, m->n_heads);
    size_t value;
    m->head_dim = m->n_embd / m->n_heads;
    ibid_err e = get_count(b, "attention.key_length", false, MAX_WIDTH, &m->head_dim);
    value = m->head_dim;
    if (!e) e = get_count(b, "attention.value_length", false, MAX_WIDTH, &value);
    if (e) return e;
    if (value != m->head_dim)
        return ibid_fail(IBID_NOTSUP, "%s: keys of %zu and values of %zu numbers a head", label,
                         m->head_dim, value);
    return IBID_OK;
}

static ibid_err read_shape(model_box *b) {
    ibid_model *m = &b->m;
    ibid_err e;
    if ((e = get_count(b, "block_count", true, MAX_LAYERS, &m->n_layers)) ||
        (e = get_count(b, "context_length", true, MAX_CTX, &m->n_ctx)) ||
        (e = get_count(b, "embedding_length", true, MAX_WIDTH, &m->n_embd)) ||
        (e = get_count(b, "feed_forward_length", true, MAX_WIDTH, &m->n_ff)) ||
        (e = get_count(b, "attention.head_count", true, MAX_WIDTH, &m->n_heads)))
        return e;
    m->n_kv_heads = m->n_heads;
    if ((e = get_count(b, "attention.head_count_kv", false, MAX_WIDTH, &m->n_kv_heads)) ||
        (e = read_head_dim(b)) ||
        (e = get_float(b, "attention.layer_norm_rms_epsilon", true, &m->norm_eps)))
        return e;
    if (!(m->norm_eps > 0 && m->norm_eps < 1))
        return ibid_fail(IBID_CORRUPT, "%s: %s.attention.layer_norm_rms_epsilon is %g",
                         ibid_gguf_label(b->g), b->arch->name, (double)m->norm_eps);
    return IBID_OK;
}

/* One tensor of the file with the shape the model needs. floats: only F32 (norms, factors). */
static ibid_err get_tensor(model_box *b, const char *name, size_t rows, size_t cols, bool floats,
                           ibid_tensor *out) {
    const char *label = ibid_gguf_label(b->g);
    const ibid_gguf_tensor *t = ibid_gguf_tensor_find(b->g, name);
    if (!t) return ibid_fail(IBID_CORRUPT, "%s: tensor %s is missing", label, name);
    if (!t->readable || (floats && t->type != IBID_F32))
        return ibid_fail(IBID_NOTSUP, "%s: tensor %s has the type %s, which is not supported: %s",
                         label, name, ibid_gguf_tensor_type_name(t->type),
                         floats ? "only F32 is, here"
                                : "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and "
                                  "Q6_K are");
    if (t->dims[0] != cols || t->dims[1] != rows || t->dims[2] != 1 || t->dims[3] != 1)
        return ibid_fail(
            IBID_CORRUPT, "%s: tensor %s has the shape [%llu, %llu, %llu, %llu], not [%zu, %zu]",
            label, name, (unsigned long long)t->dims[0], (unsigned long long)t->dims[1],
            (unsigned long long)t->dims[2], (unsigned long long)t->dims[3], cols, rows);
    *out = (ibid_tensor){.type = (ibid_type)t->type,
                         .rows = rows,
                         .cols = cols,
                         .row_bytes = ibid_type_row_bytes((ibid_type)t->type, cols),
                         .data = t->data};
    b->used[t - ibid_gguf_tensor_at(b->g, 0)] = true;
    b->n_used++;
    return IBID_OK;
}

static ibid_err get_of_layer(model_box *b, size_t layer, const char *part, size_t rows, size_t cols,
                             bool floats, ibid_tensor *out) {
    char name[64];
    (void)snprintf(name, sizeof name, "blk.%zu.%s", layer, part);
    return get_tensor(b, name, rows, cols, floats, out);
}

/* A row of floats that the architecture has never, maybe or always. */
static ibid_err get_extra(model_box *b, presence when, size_t layer, const char *part, size_t cols,
                          ibid_tensor *out) {
    char name[64];
    (void)snprintf(name, sizeof name, "blk.%zu.%s", layer, part);
    if (when == NEVER || (when == MAYBE && !ibid_gguf_tensor_find(b->g, name))) return IBID_OK;
    return get_tensor(b, name, 1, cols, true, out);
}

static ibid_err read_extras(model_box *b, size_t i, ibid_layer *l) {
    const ibid_model *m = &b->m;
    const arch_info *a = b->arch;
    size_t q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
    ibid_err e;
    if ((e = get_extra(b, a->qkv_bias, i, "attn_q.bias", q, &l->bq)) ||
        (e = get_extra(b, a->qkv_bias, i, "attn_k.bias", kv, &l->bk)) ||
        (e = get_extra(b, a->qkv_bias, i, "attn_v.bias", kv, &l->bv)) ||
        (e = get_extra(b, a->out_bias, i, "attn_output.bias", m->n_embd, &l->bo)) ||
        (e = get_extra(b, a->head_norms, i, "attn_q_norm.weight", m->head_dim, &l->q_norm)))
        return e;
    return get_extra(b, a->head_norms, i, "attn_k_norm.weight", m->head_dim, &l->k_norm);
}

static ibid_err read_layers(model_box *b) {
    ibid_model *m = &b->m;
    size_t q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim, d = m->n_embd;
    ibid_err e = IBID_OK;
    if (m->n_layers > ibid_gguf_n_tensors(b->g) / TENSORS_PER_LAYER)
        return ibid_fail(IBID_CORRUPT, "%s: %s.block_count is %zu, but there are %zu tensors",
                         ibid_gguf_label(b->g), b->arch->name, m->n_layers,
                         ibid_gguf_n_tensors(b->g));
    b->layers = ibid_calloc(m->n_layers, sizeof *b->layers);
    if (!b->layers) return ibid_fail(IBID_NOMEM, "out of memory for %zu layers", m->n_layers);
    m->layers = b->layers;
    for (size_t i = 0; i < m->n_layers && !e; i++) {
        ibid_layer *l = &b->layers[i];
        if ((e = get_of_layer(b, i, "attn_norm.weight", 1, d, true, &l->attn_norm)) ||
            (e = get_of_layer(b, i, "attn_q.weight", q, d, false, &l->wq)) ||
            (e = get_of_layer(b, i, "attn_k.weight", kv, d, false, &l->wk)) ||
            (e = get_of_layer(b, i, "attn_v.weight", kv, d, false, &l->wv)) ||
            (e = get_of_layer(b, i, "attn_output.weight", d, q, false, &l->wo)) ||
            (e = get_of_layer(b, i, "ffn_norm.weight", 1, d, true, &l->ffn_norm)) ||
            (e = get_of_layer(b, i, "ffn_gate.weight", m->n_ff, d, false, &l->gate)) ||
            (e = get_of_layer(b, i, "ffn_up.weight", m->n_ff, d, false, &l->up)))
            break;
        e = get_of_layer(b, i, "ffn_down.weight", d, m->n_ff, false, &l->down);
        if (!e) e = read_extras(b, i, l);
    }
    return e;
}

static ibid_err read_ends(model_box *b) {
    ibid_model *m = &b->m;
    ibid_err e = get_tensor(b, "token_embd.weight", m->n_vocab, m->n_embd, false, &m->embed);
    if (!e) e = get_tensor(b, "output_norm.weight", 1, m->n_embd, true, &m->output_norm);
    if (e) return e;
    m->output = m->embed;
    if (!ibid_gguf_tensor_find(b->g, "output.weight")) return IBID_OK;
    return get_tensor(b, "output.weight", m->n_vocab, m->n_embd, false, &m->output);
}

/* A tensor left over (a bias, say) would change the result: such a file is refused. */
static ibid_err check_all_used(const model_box *b) {
    char buf[64];
    if (b->n_used == ibid_gguf_n_tensors(b->g)) return IBID_OK;
    for (size_t i = 0; i < ibid_gguf_n_tensors(b->g); i++) {
        const ibid_gguf_tensor *t = ibid_gguf_tensor_at(b->g, i);
        if (b->used[i]) continue;
        return ibid_fail(IBID_NOTSUP,
                         "%s: tensor %s is not supported: of %zu tensors the %s architecture with "
                         "%zu layers uses %zu",
                         ibid_gguf_label(b->g), ibid_gguf_show(t->name, buf),
                         ibid_gguf_n_tensors(b->g), b->arch->name, b->m.n_layers, b->n_used);
    }
    return IBID_OK;
}

/* The divisor of all frequencies. */
static ibid_err read_scaling(const model_box *b, float *divisor) {
    const char *label = ibid_gguf_label(b->g);
    char buf[64], key[MAX_KEY];
    ibid_gguf_str type = {.data = "linear", .n = 6};
    float factor = 0;
    ibid_err e = ibid_gguf_get_str(b->g, key_of(b, "rope.scaling.type", key), false, &type);
    if (e) return e;
    if (!str_is(type, "none") && !str_is(type, "linear"))
        return ibid_fail(IBID_NOTSUP,
                         "%s: RoPE scaling \"%s\" is not supported; none and linear are", label,
                         ibid_gguf_show(type, buf));
    if ((e = get_float(b, "rope.scale_linear", false, &factor)) ||
        (e = get_float(b, "rope.scaling.factor", false, &factor)))
        return e;
    if (!isfinite(factor) || factor < 0)
        return ibid_fail(IBID_CORRUPT, "%s: %s.rope.scaling.factor is %g", label, b->arch->name,
                         (double)factor);
    *divisor = factor == 0 || str_is(type, "none") ? 1 : factor;
    return IBID_OK;
}

static ibid_err read_rope(model_box *b) {
    const char *label = ibid_gguf_label(b->g), *arch = b->arch->name;
    size_t n_rot = b->m.head_dim;
    float theta = 10000, divisor = 1;
    ibid_tensor factors = {0};
    ibid_err e;
    if ((e = get_count(b, "rope.dimension_count", false, MAX_WIDTH, &n_rot)) ||
        (e = get_float(b, "rope.freq_base", false, &theta)) || (e = read_scaling(b, &divisor)))
        return e;
    if (n_rot > b->m.head_dim || n_rot % 2 != 0)
        return ibid_fail(IBID_CORRUPT, "%s: %s.rope.dimension_count is %zu for heads of %zu", label,
                         arch, n_rot, b->m.head_dim);
    if (!isfinite(theta) || theta < 1)
        return ibid_fail(IBID_CORRUPT, "%s: %s.rope.freq_base is %g", label, arch, (double)theta);
    if (b->arch->rope_factors && ibid_gguf_tensor_find(b->g, "rope_freqs.weight") &&
        (e = get_tensor(b, "rope_freqs.weight", 1, n_rot / 2, true, &factors)))
        return e;
    b->freq = ibid_calloc(n_rot / 2, sizeof *b->freq);
    if (!b->freq) return ibid_fail(IBID_NOMEM, "out of memory for RoPE");
    for (size_t i = 0; i < n_rot / 2; i++) {
        float factor = factors.data ? ((const float *)factors.data)[i] : 1;
        if (!isfinite(factor) || factor <= 0)
            return ibid_fail(IBID_CORRUPT, "%s: rope_freqs.weight[%zu] is %g", label, i,
                             (double)factor);
        double turn = pow((double)theta, -2.0 * (double)i / (double)n_rot);
        b->freq[i] = (float)(turn / (double)factor / (double)divisor);
    }
    b->m.rope = (ibid_rope){.pairing = b->arch->pairing, .n_rot = n_rot, .freq = b->freq};
    return IBID_OK;
}

static ibid_err read_name(model_box *b) {
    const char *label = ibid_gguf_label(b->g), *slash = strrchr(label, '/');
    const char *base = slash ? slash + 1 : label;
    ibid_gguf_str name = {.data = base, .n = strlen(base)}, chat = {0};
    ibid_err e = ibid_gguf_get_str(b->g, "general.name", false, &name);
    if (!e) e = ibid_gguf_get_str(b->g, "tokenizer.chat_template", false, &chat);
    if (e) return e;
    b->name = ibid_strndup(name.data, name.n);
    if (chat.data) b->chat_text = ibid_strndup(chat.data, chat.n);
    if (!b->name || (chat.data && !b->chat_text))
        return ibid_fail(IBID_NOMEM, "%s: out of memory", label);
    b->m.name = b->name;
    b->m.chat = ibid_template_find(b->chat_text);
    return IBID_OK;
}

static ibid_err read_arch(model_box *b) {
    char buf[64];
    ibid_gguf_str name = {0};
    ibid_err e = ibid_gguf_get_str(b->g, "general.architecture", true, &name);
    if (e) return e;
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++)
        if (str_is(name, archs[i].name)) b->arch = &archs[i];
    if (!b->arch)
        return ibid_fail(IBID_NOTSUP,
                         "%s: the architecture \"%s\" is not supported; llama, qwen2 and qwen3 are",
                         ibid_gguf_label(b->g), ibid_gguf_show(name, buf));
    b->m.arch = b->arch->arch;
    return IBID_OK;
}

static ibid_err read_model(model_box *b) {
    char key[MAX_KEY];
    uint64_t vocab;
    ibid_err e;
    if ((e = read_arch(b)) || (e = refuse_variants(b)) || (e = read_shape(b)) ||
        (e = read_name(b)) || (e = ibidi_tokenizer_open(b->g, NULL, &b->tokenizer)))
        return e;
    b->m.tokenizer = b->tokenizer;
    b->m.n_vocab = ibid_tokenizer_size(b->tokenizer);
    vocab = b->m.n_vocab;
    if ((e = ibid_gguf_get_u64(b->g, key_of(b, "vocab_size", key), false, &vocab))) return e;
    if (vocab != b->m.n_vocab)
        return ibid_fail(IBID_CORRUPT, "%s: %s is %llu for %zu tokens", ibid_gguf_label(b->g), key,
                         (unsigned long long)vocab, b->m.n_vocab);
    b->used = ibid_calloc(ibid_gguf_n_tensors(b->g) + 1, sizeof *b->used);
    if (!b->used) return ibid_fail(IBID_NOMEM, "out of memory for a model");
    if ((e = read_ends(b)) || (e = read_layers(b)) || (e = read_rope(b))) return e;
    return check_all_used(b);
}

ibid_err ibidi_model_build(ibid_gguf *g, const ibid_hash *fingerprint, ibid_model **out) {
    size_t n;
    ibid_err e = IBID_NOMEM;
    model_box *b = ibid_calloc(1, sizeof *b);
    if (!b) {
        ibid_gguf_close(g);
        return ibid_fail(IBID_NOMEM, "out of memory for a model");
    }
    b->g = g;
    if ((e = read_model(b))) goto done;
    const void *bytes = ibid_gguf_bytes(g, &n);
    b->m.file_bytes = n;
    b->m.fingerprint = fingerprint ? *fingerprint : ibid_hash_bytes(bytes, n);
    *out = &b->m;
    b = NULL;
done:
    if (b) ibid_model_close(&b->m);
    return e;
}

ibid_err ibid_model_open(const char *path, const ibid_hash *fingerprint, ibid_model **out) {
    ibid_gguf *g = NULL;
    ibid_err e = ibid_gguf_open(path, &g);
    return e ? e : ibidi_model_build(g, fingerprint, out);
}

void ibid_model_close(ibid_model *m) {
    if (!m) return;
    model_box *b = (model_box *)m;
    ibidi_tokenizer_close(b->tokenizer);
    ibid_free(b->layers);
    ibid_free(b->freq);
    ibid_free(b->used);
    ibid_free(b->chat_text);
    ibid_free(b->name);
    ibid_gguf_close(b->g);
    ibid_free(b);
}
