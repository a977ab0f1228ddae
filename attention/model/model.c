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
    TENSORS_PER_LAYER = 9,
    MAX_LAYERS = 1024,
    MAX_WIDTH = 1 << 20, /* n_embd, n_ff, heads, head_dim */
    MAX_CTX = 1 << 28
};

typedef struct model_box {
    ibid_model m; /* first: a model is its box */
    ibid_gguf *g;
    char *name;
    char *chat_text;
    ibid_layer *layers;
    float *freq;
    ibid_tokenizer *tokenizer;
    size_t n_used; /* tensors of the file that the model uses */
} model_box;

static ibid_err get_count(const ibid_gguf *g, const char *key, bool required, uint64_t max,
                          size_t *out) {
    uint64_t v = *out;
    ibid_err e = ibid_gguf_get_u64(g, key, required, &v);
    if (e) return e;
    if (v == 0 || v > max)
        return ibid_fail(IBID_CORRUPT, "%s: %s is %llu, not between 1 and %llu", ibid_gguf_label(g),
                         key, (unsigned long long)v, (unsigned long long)max);
    *out = (size_t)v;
    return IBID_OK;
}

static bool str_is(ibid_gguf_str s, const char *text) {
    return s.n == strlen(text) && memcmp(s.data, text, s.n) == 0;
}

/* Things that would change the arithmetic and that this build does not do. */
static ibid_err refuse_variants(const ibid_gguf *g) {
    uint64_t experts = 0;
    bool causal = true;
    ibid_err e = ibid_gguf_get_u64(g, "llama.expert_count", false, &experts);
    if (e) return e;
    if (experts)
        return ibid_fail(IBID_NOTSUP,
                         "%s: a mixture of experts (llama.expert_count %llu) is not supported",
                         ibid_gguf_label(g), (unsigned long long)experts);
    if ((e = ibid_gguf_get_bool(g, "llama.attention.causal", false, &causal))) return e;
    if (!causal)
        return ibid_fail(IBID_NOTSUP, "%s: attention that is not causal is not supported",
                         ibid_gguf_label(g));
    static const char *const keys[] = {"llama.attention.sliding_window",
                                       "llama.attention.scale",
                                       "llama.logit_scale",
                                       "llama.embedding_scale",
                                       "llama.residual_scale",
                                       "llama.attn_logit_softcapping",
                                       "llama.final_logit_softcapping",
                                       "llama.rope.scaling.attn_factor"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (ibid_gguf_has(g, keys[i]))
            return ibid_fail(IBID_NOTSUP, "%s: %s is not supported", ibid_gguf_label(g), keys[i]);
    return IBID_OK;
}

static ibid_err read_head_dim(model_box *b) {
    const char *label = ibid_gguf_label(b->g);
    ibid_model *m = &b->m;
    if (m->n_heads % m->n_kv_heads != 0)
        return ibid_fail(IBID_CORRUPT, "%s: %zu attention heads over %zu kv heads (head_count_kv)",
                         label, m->n_heads, m->n_kv_heads);
    bool given = ibid_gguf_has(b->g, "llama.attention.key_length");
    if (!given && m->n_embd % m->n_heads != 0)
        return ibid_fail(IBID_CORRUPT,
                         "%s: embedding_length %zu over %zu attention heads (head_count)", label,
                         m->n_embd, m->n_heads);
    size_t value;
    m->head_dim = m->n_embd / m->n_heads;
    ibid_err e = get_count(b->g, "llama.attention.key_length", false, MAX_WIDTH, &m->head_dim);
    value = m->head_dim;
    if (!e) e = get_count(b->g, "llama.attention.value_length", false, MAX_WIDTH, &value);
    if (e) return e;
    if (value != m->head_dim)
        return ibid_fail(IBID_NOTSUP, "%s: keys of %zu and values of %zu numbers a head", label,
                         m->head_dim, value);
    return IBID_OK;
}

static ibid_err read_shape(model_box *b) {
    const ibid_gguf *g = b->g;
    ibid_model *m = &b->m;
    ibid_err e;
    if ((e = get_count(g, "llama.block_count", true, MAX_LAYERS, &m->n_layers)) ||
        (e = get_count(g, "llama.context_length", true, MAX_CTX, &m->n_ctx)) ||
        (e = get_count(g, "llama.embedding_length", true, MAX_WIDTH, &m->n_embd)) ||
        (e = get_count(g, "llama.feed_forward_length", true, MAX_WIDTH, &m->n_ff)) ||
        (e = get_count(g, "llama.attention.head_count", true, MAX_WIDTH, &m->n_heads)))
        return e;
    m->n_kv_heads = m->n_heads;
    if ((e = get_count(g, "llama.attention.head_count_kv", false, MAX_WIDTH, &m->n_kv_heads)) ||
        (e = read_head_dim(b)) ||
        (e = ibid_gguf_get_f32(g, "llama.attention.layer_norm_rms_epsilon", true, &m->norm_eps)))
        return e;
    if (!(m->norm_eps > 0 && m->norm_eps < 1))
        return ibid_fail(IBID_CORRUPT, "%s: llama.attention.layer_norm_rms_epsilon is %g",
                         ibid_gguf_label(g), (double)m->norm_eps);
    return IBID_OK;
}

/* One tensor of the file with the shape the model needs. floats: only F32 (norms, factors). */
static ibid_err get_tensor(model_box *b, const char *name, size_t rows, size_t cols, bool floats,
                           ibid_tensor *out) {
    const char *label = ibid_gguf_label(b->g);
    const ibid_gguf_tensor *t = ibid_gguf_tensor_find(b->g, name);
    if (!t) return ibid_fail(IBID_CORRUPT, "%s: tensor %s is missing", label, name);
    if (!t->readable || (floats && t->type != IBID_F32))
        return ibid_fail(IBID_NOTSUP, "%s: tensor %s has the type %s, which is not supported here",
                         label, name, ibid_gguf_tensor_type_name(t->type));
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
    b->n_used++;
    return IBID_OK;
}

static ibid_err get_of_layer(model_box *b, size_t layer, const char *part, size_t rows, size_t cols,
                             bool floats, ibid_tensor *out) {
    char name[64];
    (void)snprintf(name, sizeof name, "blk.%zu.%s.weight", layer, part);
    return get_tensor(b, name, rows, cols, floats, out);
}

static ibid_err read_layers(model_box *b) {
    ibid_model *m = &b->m;
    size_t q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim, d = m->n_embd;
    ibid_err e = IBID_OK;
    if (m->n_layers > ibid_gguf_n_tensors(b->g) / TENSORS_PER_LAYER)
        return ibid_fail(IBID_CORRUPT, "%s: llama.block_count is %zu, but there are %zu tensors",
                         ibid_gguf_label(b->g), m->n_layers, ibid_gguf_n_tensors(b->g));
    b->layers = ibid_calloc(m->n_layers, sizeof *b->layers);
    if (!b->layers) return ibid_fail(IBID_NOMEM, "out of memory for %zu layers", m->n_layers);
    m->layers = b->layers;
    for (size_t i = 0; i < m->n_layers && !e; i++) {
        ibid_layer *l = &b->layers[i];
        if ((e = get_of_layer(b, i, "attn_norm", 1, d, true, &l->attn_norm)) ||
            (e = get_of_layer(b, i, "attn_q", q, d, false, &l->wq)) ||
            (e = get_of_layer(b, i, "attn_k", kv, d, false, &l->wk)) ||
            (e = get_of_layer(b, i, "attn_v", kv, d, false, &l->wv)) ||
            (e = get_of_layer(b, i, "attn_output", d, q, false, &l->wo)) ||
            (e = get_of_layer(b, i, "ffn_norm", 1, d, true, &l->ffn_norm)) ||
            (e = get_of_layer(b, i, "ffn_gate", m->n_ff, d, false, &l->gate)) ||
            (e = get_of_layer(b, i, "ffn_up", m->n_ff, d, false, &l->up)))
            break;
        e = get_of_layer(b, i, "ffn_down", d, m->n_ff, false, &l->down);
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
        const char *dot = t->name.n > 5 ? memrchr(t->name.data, '.', t->name.n) : NULL;
        if (dot && t->name.n - (size_t)(dot - t->name.data) == 5) /* ".bias" */
            return ibid_fail(IBID_NOTSUP,
                             "%s: tensor %s is not supported for the llama architecture",
                             ibid_gguf_label(b->g), ibid_gguf_show(t->name, buf));
    }
    return ibid_fail(IBID_NOTSUP, "%s: %zu tensors, of which the llama architecture uses %zu",
                     ibid_gguf_label(b->g), ibid_gguf_n_tensors(b->g), b->n_used);
}

/* The divisor of all frequencies. */
static ibid_err read_scaling(const ibid_gguf *g, float *divisor) {
    char buf[64];
    ibid_gguf_str type = {.data = "linear", .n = 6};
    float factor = 0;
    ibid_err e = ibid_gguf_get_str(g, "llama.rope.scaling.type", false, &type);
    if (e) return e;
    if (!str_is(type, "none") && !str_is(type, "linear"))
        return ibid_fail(IBID_NOTSUP,
                         "%s: RoPE scaling \"%s\" is not supported; none and linear are",
                         ibid_gguf_label(g), ibid_gguf_show(type, buf));
    if ((e = ibid_gguf_get_f32(g, "llama.rope.scale_linear", false, &factor)) ||
        (e = ibid_gguf_get_f32(g, "llama.rope.scaling.factor", false, &factor)))
        return e;
    if (!isfinite(factor) || factor < 0)
        return ibid_fail(IBID_CORRUPT, "%s: llama.rope.scaling.factor is %g", ibid_gguf_label(g),
                         (double)factor);
    *divisor = factor == 0 || str_is(type, "none") ? 1 : factor;
    return IBID_OK;
}

static ibid_err read_rope(model_box *b) {
    const ibid_gguf *g = b->g;
    const char *label = ibid_gguf_label(g);
    size_t n_rot = b->m.head_dim;
    float theta = 10000, divisor = 1;
    ibid_tensor factors = {0};
    ibid_err e;
    if ((e = get_count(g, "llama.rope.dimension_count", false, MAX_WIDTH, &n_rot)) ||
        (e = ibid_gguf_get_f32(g, "llama.rope.freq_base", false, &theta)) ||
        (e = read_scaling(g, &divisor)))
        return e;
    if (n_rot > b->m.head_dim || n_rot % 2 != 0)
        return ibid_fail(IBID_CORRUPT, "%s: llama.rope.dimension_count is %zu for heads of %zu",
                         label, n_rot, b->m.head_dim);
    if (!isfinite(theta) || theta < 1)
        return ibid_fail(IBID_CORRUPT, "%s: llama.rope.freq_base is %g", label, (double)theta);
    if (ibid_gguf_tensor_find(g, "rope_freqs.weight") &&
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
    b->m.rope = (ibid_rope){.n_rot = n_rot, .freq = b->freq};
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

static ibid_err read_model(model_box *b) {
    char buf[64];
    ibid_gguf_str arch = {0};
    uint64_t vocab;
    ibid_err e = ibid_gguf_get_str(b->g, "general.architecture", true, &arch);
    if (e) return e;
    if (!str_is(arch, "llama"))
        return ibid_fail(IBID_NOTSUP, "%s: the architecture \"%s\" is not supported; llama is",
                         ibid_gguf_label(b->g), ibid_gguf_show(arch, buf));
    b->m.arch = IBID_ARCH_LLAMA;
    if ((e = refuse_variants(b->g)) || (e = read_shape(b)) || (e = read_name(b)) ||
        (e = ibidi_tokenizer_open(b->g, NULL, &b->tokenizer)))
        return e;
    b->m.tokenizer = b->tokenizer;
    b->m.n_vocab = ibid_tokenizer_size(b->tokenizer);
    vocab = b->m.n_vocab;
    if ((e = ibid_gguf_get_u64(b->g, "llama.vocab_size", false, &vocab))) return e;
    if (vocab != b->m.n_vocab)
        return ibid_fail(IBID_CORRUPT, "%s: llama.vocab_size is %llu for %zu tokens",
                         ibid_gguf_label(b->g), (unsigned long long)vocab, b->m.n_vocab);
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
    ibid_free(b->chat_text);
    ibid_free(b->name);
    ibid_gguf_close(b->g);
    ibid_free(b);
}
