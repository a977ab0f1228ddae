/* Reads the vocabulary, merges and special tokens of a byte-level BPE tokenizer from a GGUF file.
 */
#include "attention/tokenizer/internal.h"

#include "rpc/base/hash.h"
#include "rpc/base/mem.h"

#include <stdlib.h>
#include <string.h>

/* The values of tokenizer.ggml.pre that are read. */
static const struct {
    const char *name;
    ibidi_pre pre;
    bool whole_words;
} known_pre[] = {
    {"smollm", IBIDI_PRE_SMOLLM, false},    {"starcoder", IBIDI_PRE_SMOLLM, false},
    {"refact", IBIDI_PRE_SMOLLM, false},    {"command-r", IBIDI_PRE_SMOLLM, false},
    {"codeshell", IBIDI_PRE_SMOLLM, false}, {"gpt-2", IBIDI_PRE_GPT2, false},
    {"phi-2", IBIDI_PRE_GPT2, false},       {"olmo", IBIDI_PRE_GPT2, false},
    {"default", IBIDI_PRE_DEFAULT, false},  {"llama-bpe", IBIDI_PRE_LLAMA3, true},
    {"llama3", IBIDI_PRE_LLAMA3, true},     {"llama-v3", IBIDI_PRE_LLAMA3, true},
    {"dbrx", IBIDI_PRE_LLAMA3, false},      {"smaug-bpe", IBIDI_PRE_LLAMA3, false},
    {"qwen2", IBIDI_PRE_QWEN2, false},      {"deepseek-r1-qwen", IBIDI_PRE_QWEN2, false},
    {"megrez", IBIDI_PRE_QWEN2, false},     {"stablelm2", IBIDI_PRE_QWEN2, false},
};

/* Texts that end a turn or a text wherever they are a token, and that are control tokens even where
 * the file forgets to say so. */
static const char *const end_texts[] = {"<|eot_id|>",
                                        "<|im_end|>",
                                        "<|end|>",
                                        "<|return|>",
                                        "<|call|>",
                                        "<|flush|>",
                                        "<|calls|>",
                                        "<end_of_turn>",
                                        "<|endoftext|>",
                                        "</s>",
                                        "<|eom_id|>",
                                        "<EOT>",
                                        "_<EOT>",
                                        "[EOT]",
                                        "[EOS]",
                                        "<|end_of_text|>",
                                        "<eos>",
                                        "<turn|>",
                                        "<|tool_response>",
                                        "[e~[",
                                        "<end_of_utterance>",
                                        "<|fim_pad|>",
                                        "<fim-pad>",
                                        "<fim_pad>",
                                        "<PAD>",
                                        "[PAD]",
                                        "<|fim_repo|>",
                                        "<|repo_name|>",
                                        "<fim-repo>",
                                        "<REPO>",
                                        "<reponame>",
                                        "<|file_sep|>"};

/* As above, but they end nothing. */
static const char *const control_texts[] = {
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "<|code_middle|>", "<|middle|>"};

static bool is_one_of(ibid_gguf_str s, const char *const *texts, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (strlen(texts[i]) == s.n && memcmp(texts[i], s.data, s.n) == 0) return true;
    return false;
}

static bool is_special(uint8_t kind) {
    return kind == IBIDI_KIND_CONTROL || kind == IBIDI_KIND_UNKNOWN || kind == IBIDI_KIND_USER;
}

/* Control and unknown tokens never come out of ordinary text. */
static bool is_hidden(uint8_t kind) {
    return kind == IBIDI_KIND_CONTROL || kind == IBIDI_KIND_UNKNOWN;
}

/* Byte-level vocabularies write each byte as one printable character: bytes that are printable in
 * Latin-1 as themselves, the others as U+0100, U+0101, ... in order. */
static bool is_plain(unsigned b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
}

typedef struct byte_map {
    int16_t byte_of[0x144]; /* -1: no byte is written as this character */
    uint16_t char_of[256];
} byte_map;

static void byte_map_init(byte_map *m) {
    uint16_t next = 0x100;
    memset(m->byte_of, 0xFF, sizeof m->byte_of);
    for (unsigned b = 0; b < 256; b++) {
        m->char_of[b] = is_plain(b) ? (uint16_t)b : next++;
        m->byte_of[m->char_of[b]] = (int16_t)b;
    }
}

/* Writes the bytes a token's text stands for to out (at most s.n); false if it is no such text. */
static bool decode_text(const byte_map *m, ibid_gguf_str s, char *out, size_t *n_out) {
    size_t n = 0, len;
    for (size_t i = 0; i < s.n; i += len) {
        uint32_t cp = ibidi_utf8_decode(s.data + i, s.n - i, &len);
        if (cp >= 0x144 || m->byte_of[cp] < 0) return false;
        out[n++] = (char)m->byte_of[cp];
    }
    *n_out = n;
    return true;
}

static ibid_err table_init(ibidi_table *t, size_t n) {
    size_t slots = 16;
    while (slots < 2 * n) slots *= 2;
    t->slots = ibid_calloc(slots, sizeof *t->slots);
    if (!t->slots) return ibid_fail(IBID_NOMEM, "out of memory for a vocabulary of %zu tokens", n);
    memset(t->slots, 0xFF, slots * sizeof *t->slots);
    t->mask = slots - 1;
    return IBID_OK;
}

/* Tables over the tokens' texts in the file, for the time of opening. */
static size_t text_slot(const ibidi_table *t, const ibid_gguf_str *texts, ibid_gguf_str s) {
    size_t i = (size_t)ibid_checksum(s.data, s.n) & t->mask;
    for (; t->slots[i] >= 0; i = (i + 1) & t->mask) {
        ibid_gguf_str have = texts[t->slots[i]];
        if (have.n == s.n && (s.n == 0 || memcmp(have.data, s.data, s.n) == 0)) break;
    }
    return i;
}

static size_t word_slot(const ibid_tokenizer *t, const char *word, size_t n) {
    size_t i = (size_t)ibid_checksum(word, n) & t->words.mask;
    for (; t->words.slots[i] >= 0; i = (i + 1) & t->words.mask) {
        size_t have;
        const char *bytes = ibid_token_bytes(t, t->words.slots[i], &have);
        if (have == n && memcmp(bytes, word, n) == 0) break;
    }
    return i;
}

int32_t ibidi_word_find(const ibid_tokenizer *t, const char *word, size_t n) {
    return t->words.slots[word_slot(t, word, n)];
}

static size_t merge_slot(const ibid_tokenizer *t, int32_t left, int32_t right) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t i = (size_t)((key * 0x9E3779B97F4A7C15u) >> 32) & t->merge_mask;
    while (t->merges[i].left >= 0 && (t->merges[i].left != left || t->merges[i].right != right))
        i = (i + 1) & t->merge_mask;
    return i;
}

const ibidi_merge *ibidi_merge_find(const ibid_tokenizer *t, int32_t left, int32_t right) {
    if (left < 0 || right < 0) return NULL;
    const ibidi_merge *m = &t->merges[merge_slot(t, left, right)];
    return m->left >= 0 ? m : NULL;
}

/* What is at hand while a tokenizer is read. */
typedef struct opening {
    const ibid_gguf *g;
    ibid_tokenizer *t;
    ibid_gguf_str *texts, *merges;
    size_t n_merges;
    ibidi_table by_text;
    byte_map map;
    char *joined;
} opening;

static ibid_err read_pre(opening *o, const char *pre) {
    ibid_gguf_str model = {0}, name = {.data = "default", .n = 7};
    char a[64];
    ibid_err e = ibid_gguf_get_str(o->g, "tokenizer.ggml.model", true, &model);
    if (e) return e;
    if (model.n != 4 || memcmp(model.data, "gpt2", 4) != 0)
        return ibid_fail(IBID_NOTSUP,
                         "%s: the tokenizer \"%s\" is not supported; \"gpt2\" (byte-level BPE) is",
                         ibid_gguf_label(o->g), ibid_gguf_show(model, a));
    if ((e = ibid_gguf_get_str(o->g, "tokenizer.ggml.pre", false, &name))) return e;
    if (pre) name = (ibid_gguf_str){.data = pre, .n = strlen(pre)};
    for (size_t i = 0; i < sizeof known_pre / sizeof *known_pre; i++)
        if (strlen(known_pre[i].name) == name.n &&
            memcmp(known_pre[i].name, name.data, name.n) == 0) {
            o->t->pre = known_pre[i].pre;
            o->t->whole_words = known_pre[i].whole_words;
            o->t->add_bos = known_pre[i].whole_words;
            return IBID_OK;
        }
    return ibid_fail(IBID_NOTSUP,
                     "%s: the pre-tokenizer \"%s\" is not supported; those of gpt-2, smollm, "
                     "llama-bpe and qwen2 and their kin are",
                     ibid_gguf_label(o->g), ibid_gguf_show(name, a));
}

static ibid_err read_kinds(opening *o) {
    const void *types = NULL;
    size_t n = 0;
    ibid_tokenizer *t = o->t;
    ibid_err e = ibid_gguf_get_i32s(o->g, "tokenizer.ggml.token_type", false, &types, &n);
    if (e) return e;
    if (types && n != t->n)
        return ibid_fail(IBID_CORRUPT,
                         "%s: tokenizer.ggml.token_type has %zu entries for %zu tokens",
                         ibid_gguf_label(o->g), n, t->n);
    t->kind = ibid_calloc(t->n, 1);
    t->is_end = ibid_calloc(t->n, 1);
    if (!t->kind || !t->is_end) return ibid_fail(IBID_NOMEM, "out of memory for token types");
    for (size_t i = 0; i < t->n; i++) {
        int32_t type = types ? ibid_gguf_i32_at(types, i) : IBIDI_KIND_NORMAL;
        t->kind[i] = type >= 0 && type <= IBIDI_KIND_BYTE ? (uint8_t)type : IBIDI_KIND_UNDEFINED;
        t->is_end[i] = is_one_of(o->texts[i], end_texts, sizeof end_texts / sizeof *end_texts);
        if (t->is_end[i] ||
            is_one_of(o->texts[i], control_texts, sizeof control_texts / sizeof *control_texts))
            t->kind[i] = IBIDI_KIND_CONTROL;
    }
    return IBID_OK;
}

/* Copies each token's bytes and indexes the texts. */
static ibid_err read_tokens(opening *o) {
    ibid_tokenizer *t = o->t;
    size_t total = 0, at = 0, n;
    char a[64];
    ibid_err e = ibid_gguf_get_strs(o->g, "tokenizer.ggml.tokens", true, &o->texts, &t->n);
    if (e) return e;
    if (t->n == 0 || t->n > INT32_MAX / 4)
        return ibid_fail(IBID_CORRUPT, "%s: tokenizer.ggml.tokens has %zu entries",
                         ibid_gguf_label(o->g), t->n);
    for (size_t i = 0; i < t->n; i++) total += o->texts[i].n; /* all within the file: no overflow */
    if (total > UINT32_MAX)
        return ibid_fail(IBID_NOTSUP, "%s: a vocabulary of %zu bytes", ibid_gguf_label(o->g),
                         total);
    if ((e = read_kinds(o)) || (e = table_init(&o->by_text, t->n))) return e;
    t->offset = ibid_calloc(t->n + 1, sizeof *t->offset);
    t->bytes = ibid_alloc(total);
    if (!t->offset || !t->bytes) return ibid_fail(IBID_NOMEM, "out of memory for the vocabulary");
    for (size_t i = 0; i < t->n; i++) {
        ibid_gguf_str s = o->texts[i];
        size_t slot = text_slot(&o->by_text, o->texts, s);
        if (o->by_text.slots[slot] >= 0 && s.n > 0)
            return ibid_fail(IBID_CORRUPT, "%s: token %zu (%s) is in the vocabulary twice",
                             ibid_gguf_label(o->g), i, ibid_gguf_show(s, a));
        o->by_text.slots[slot] = (int32_t)i;
        t->offset[i] = (uint32_t)at;
        if (is_special(t->kind[i]) || !decode_text(&o->map, s, t->bytes + at, &n)) {
            if (s.n) memcpy(t->bytes + at, s.data, s.n);
            n = s.n;
        }
        at += n;
    }
    t->offset[t->n] = (uint32_t)at;
    return IBID_OK;
}

static void read_byte_tokens(opening *o) {
    for (unsigned b = 0; b < 256; b++) {
        unsigned c = o->map.char_of[b];
        char text[2] = {(char)c, 0};
        ibid_gguf_str s = {.data = text, .n = 1};
        if (c >= 0x80) {
            text[0] = (char)(0xC0 | c >> 6);
            text[1] = (char)(0x80 | (c & 0x3F));
            s.n = 2;
        }
        int32_t id = o->by_text.slots[text_slot(&o->by_text, o->texts, s)];
        o->t->byte_id[b] = id >= 0 && is_hidden(o->t->kind[id]) ? -1 : id;
    }
}

static int32_t ordinary(const opening *o, ibid_gguf_str s) {
    int32_t id = s.n ? o->by_text.slots[text_slot(&o->by_text, o->texts, s)] : -1;
    return id >= 0 && is_hidden(o->t->kind[id]) ? -1 : id;
}

static ibid_err read_merge(opening *o, size_t rank) {
    ibid_gguf_str m = o->merges[rank], left = m, right = {0}, made = {.data = o->joined};
    char a[64];
    /* The blank is looked for from the second byte on. */
    const char *blank = m.n > 1 ? memchr(m.data + 1, ' ', m.n - 1) : NULL;
    if (blank) {
        left.n = (size_t)(blank - m.data);
        right = (ibid_gguf_str){.data = blank + 1, .n = m.n - left.n - 1};
        made.n = left.n + right.n;
        memcpy(o->joined, left.data, left.n);
        memcpy(o->joined + left.n, right.data, right.n);
    }
    int32_t l = blank ? ordinary(o, left) : -1, r = blank ? ordinary(o, right) : -1;
    int32_t both = blank ? ordinary(o, made) : -1;
    if (l < 0 || r < 0 || both < 0)
        return ibid_fail(IBID_CORRUPT,
                         "%s: merge %zu (%s) names a token that is not in the vocabulary",
                         ibid_gguf_label(o->g), rank, ibid_gguf_show(m, a));
    ibidi_merge *slot = &o->t->merges[merge_slot(o->t, l, r)];
    if (slot->left < 0) /* of two equal merges the first counts */
        *slot = (ibidi_merge){.left = l, .right = r, .rank = (int32_t)rank, .made = both};
    return IBID_OK;
}

static ibid_err read_merges(opening *o) {
    ibid_err e = ibid_gguf_get_strs(o->g, "tokenizer.ggml.merges", true, &o->merges, &o->n_merges);
    if (e) return e;
    if (o->n_merges > INT32_MAX / 4)
        return ibid_fail(IBID_CORRUPT, "%s: tokenizer.ggml.merges has %zu entries",
                         ibid_gguf_label(o->g), o->n_merges);
    size_t slots = 16, longest = 1;
    while (slots < 2 * o->n_merges) slots *= 2;
    for (size_t i = 0; i < o->n_merges; i++)
        if (o->merges[i].n > longest) longest = o->merges[i].n;
    for (size_t i = 0; i < o->t->n; i++) /* read_words decodes tokens there, too */
        if (o->texts[i].n > longest) longest = o->texts[i].n;
    o->t->merges = ibid_calloc(slots, sizeof *o->t->merges);
    o->joined = ibid_alloc(longest);
    if (!o->t->merges || !o->joined)
        return ibid_fail(IBID_NOMEM, "out of memory for %zu merges", o->n_merges);
    o->t->merge_mask = slots - 1;
    for (size_t i = 0; i < slots; i++) o->t->merges[i].left = -1;
    for (size_t i = 0; i < o->n_merges && !e; i++) e = read_merge(o, i);
    return e;
}

static ibid_err read_words(opening *o) {
    ibid_tokenizer *t = o->t;
    if (!t->whole_words) return IBID_OK;
    ibid_err e = table_init(&t->words, t->n);
    if (e) return e;
    for (size_t i = 0; i < t->n; i++) {
        size_t n;
        const char *bytes = ibid_token_bytes(t, (int32_t)i, &n);
        /* Undecodable texts lie there as they are, and must not be met as words. */
        if (n == 0 || is_hidden(t->kind[i]) || !decode_text(&o->map, o->texts[i], o->joined, &n))
            continue;
        if (is_special(t->kind[i])) continue; /* matched before words are cut */
        t->words.slots[word_slot(t, bytes, n)] = (int32_t)i;
    }
    return IBID_OK;
}

static ibid_err read_id(const opening *o, const char *key, int32_t *id) {
    uint64_t v = UINT64_MAX;
    ibid_err e = ibid_gguf_get_u64(o->g, key, false, &v);
    *id = -1;
    if (e || v == UINT64_MAX) return e;
    if (v >= o->t->n)
        return ibid_fail(IBID_CORRUPT, "%s: %s is %llu, beyond a vocabulary of %zu tokens",
                         ibid_gguf_label(o->g), key, (unsigned long long)v, o->t->n);
    *id = (int32_t)v;
    return IBID_OK;
}

/* For the comparison of qsort, which takes no context: set while sorting. */
static _Thread_local const ibid_tokenizer *sorted;

static int cmp_special(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    size_t n = 0, m = 0;
    (void)ibid_token_bytes(sorted, x, &n);
    (void)ibid_token_bytes(sorted, y, &m);
    return n != m ? (n < m) - (n > m) : (x > y) - (x < y);
}

static ibid_err read_specials(opening *o) {
    ibid_tokenizer *t = o->t;
    int32_t eot, eom;
    ibid_err e;
    if ((e = read_id(o, "tokenizer.ggml.bos_token_id", &t->bos)) ||
        (e = read_id(o, "tokenizer.ggml.eos_token_id", &t->eos)) ||
        (e = read_id(o, "tokenizer.ggml.eot_token_id", &eot)) ||
        (e = read_id(o, "tokenizer.ggml.eom_token_id", &eom)) ||
        (e = ibid_gguf_get_bool(o->g, "tokenizer.ggml.add_bos_token", false, &t->add_bos)))
        return e;
    if (t->bos < 0) t->add_bos = false;
    if (t->eos >= 0) t->is_end[t->eos] = 1;
    if (eot >= 0) t->is_end[eot] = 1;
    if (eom >= 0) t->is_end[eom] = 1;
    size_t n = 0;
    for (size_t i = 0; i < t->n; i++) n += is_special(t->kind[i]);
    t->special = ibid_calloc(n, sizeof *t->special);
    if (!t->special) return ibid_fail(IBID_NOMEM, "out of memory for %zu special tokens", n);
    for (size_t i = 0; i < t->n; i++)
        if (is_special(t->kind[i]) && t->offset[i + 1] > t->offset[i])
            t->special[t->n_special++] = (int32_t)i;
    sorted = t;
    qsort(t->special, t->n_special, sizeof *t->special, cmp_special);
    sorted = NULL;
    return IBID_OK;
}

ibid_err ibidi_tokenizer_open(const ibid_gguf *g, const char *pre, ibid_tokenizer **out) {
    ibid_err e = IBID_NOMEM;
    opening o = {.g = g, .t = ibid_calloc(1, sizeof *o.t)};
    if (!o.t) {
        (void)ibid_fail(IBID_NOMEM, "out of memory for a tokenizer");
        goto done;
    }
    byte_map_init(&o.map);
    if ((e = read_pre(&o, pre)) || (e = read_tokens(&o))) goto done;
    read_byte_tokens(&o);
    if ((e = read_merges(&o)) || (e = read_specials(&o)) || (e = read_words(&o))) goto done;
    *out = o.t;
    o.t = NULL;
done:
    ibid_free(o.texts);
    ibid_free(o.merges);
    ibid_free(o.by_text.slots);
    ibid_free(o.joined);
    ibidi_tokenizer_close(o.t);
    return e;
}

void ibidi_tokenizer_close(ibid_tokenizer *t) {
    if (!t) return;
    ibid_free(t->offset);
    ibid_free(t->bytes);
    ibid_free(t->kind);
    ibid_free(t->is_end);
    ibid_free(t->words.slots);
    ibid_free(t->merges);
    ibid_free(t->special);
    ibid_free(t);
}

const char *ibid_token_bytes(const ibid_tokenizer *t, int32_t id, size_t *n) {
    *n = 0;
    if (id < 0 || (size_t)id >= t->n) return NULL;
    *n = t->offset[id + 1] - t->offset[id];
    return t->bytes + t->offset[id];
}

bool ibid_token_is_control(const ibid_tokenizer *t, int32_t id) {
    return id >= 0 && (size_t)id < t->n && is_hidden(t->kind[id]);
}

size_t ibid_tokenizer_size(const ibid_tokenizer *t) {
    return t->n;
}

int32_t ibid_tokenizer_bos(const ibid_tokenizer *t) {
    return t->bos;
}

int32_t ibid_tokenizer_eos(const ibid_tokenizer *t) {
    return t->eos;
}

bool ibid_tokenizer_add_bos(const ibid_tokenizer *t) {
    return t->add_bos;
}

bool ibid_tokenizer_is_end(const ibid_tokenizer *t, int32_t id) {
    return id >= 0 && (size_t)id < t->n && t->is_end[id];
}

int32_t ibid_tokenizer_control(const ibid_tokenizer *t, const char *text) {
    size_t wanted = strlen(text), n;
    for (size_t i = 0; i < t->n_special; i++) {
        const char *bytes = ibid_token_bytes(t, t->special[i], &n);
        if (n == wanted && memcmp(bytes, text, n) == 0 && is_hidden(t->kind[t->special[i]]))
            return t->special[i];
    }
    return -1;
}
