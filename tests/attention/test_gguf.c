/* The GGUF reader and the model behind it: what a sound file gives, and that every damaged one
 * gives a typed error that names what is wrong. Damage is done to files of
 * tests/support/gguf_write. */
#include "attention/model/internal.h"
#include "attention/model/model.h"
#include "attention/tokenizer/template.h"
#include "rpc/base/mem.h"
#include "tests/support/gguf_write.h"
#include "tests/support/test_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static const uint64_t seed = 20261121;

/* Opens n bytes as a model, from a block of exactly that size so that a sanitizer sees its end. */
static ibid_err open_bytes(const char *data, size_t n, ibid_model **m, char **block) {
    ibid_gguf *g = NULL;
    char *copy = ibid_alloc_aligned(64, n);
    assert_non_null(copy);
    memcpy(copy, data, n);
    *block = copy;
    ibid_err_clear();
    ibid_err e = ibid_gguf_parse(copy, n, "test", &g);
    return e ? e : ibidi_model_build(g, NULL, m);
}

static ibid_err try_bytes(const char *data, size_t n) {
    ibid_model *m = NULL;
    char *block = NULL;
    ibid_err e = open_bytes(data, n, &m, &block);
    if (!e) ibid_model_close(m);
    ibid_free(block);
    return e;
}

static void build(const ibid_test_gguf *spec, ibid_buf *b) {
    ibid_buf_init(b, 1 << 26);
    assert_int_equal(ibid_test_build_gguf(spec, b), IBID_OK);
}

/* ---- one field damaged ---- */

typedef enum place { AT, KEY, KEY_TYPE, VALUE, TENSOR_NAME, TENSOR } place;

/* Writes the low `bytes` bytes of value (or text) at a place: AT a file offset; KEY in a key's
 * name; KEY_TYPE its type; VALUE off bytes into its value; TENSOR_NAME in its name; TENSOR off
 * bytes into what follows the name (dims count, dims, type, offset). */
typedef struct damage {
    const char *what;
    place place;
    const char *name;
    size_t off;
    uint64_t value;
    size_t bytes;
    const char *text;
    ibid_err want;
    const char *detail;
} damage;

/* In what follows a matrix's name. */
enum { DIMS = 0, DIM0 = 4, DIM1 = 12, TYPE = 20, OFFSET = 24 };

static const damage damages[] = {
    {"magic", AT, NULL, 0, 'g', 1, NULL, IBID_CORRUPT, "magic"},
    {"version 1", AT, NULL, 4, 1, 4, NULL, IBID_NOTSUP, "version 1"},
    {"version 4", AT, NULL, 4, 4, 4, NULL, IBID_NOTSUP, "version 4"},
    {"big-endian", AT, NULL, 4, 0x03000000, 4, NULL, IBID_NOTSUP, "big-endian"},
    {"tensor count huge", AT, NULL, 8, UINT64_MAX, 8, NULL, IBID_CORRUPT, "tensor count"},
    {"tensor count 2^58", AT, NULL, 8, 1ull << 58, 8, NULL, IBID_CORRUPT, "tensor count"},
    {"tensor count plausible", AT, NULL, 8, 2000, 8, NULL, IBID_CORRUPT, ""},
    {"tensor count 0", AT, NULL, 8, 0, 8, NULL, IBID_CORRUPT, "token_embd.weight is missing"},
    {"kv count huge", AT, NULL, 16, UINT64_MAX, 8, NULL, IBID_CORRUPT, "metadata count"},
    {"kv count 2^60", AT, NULL, 16, 1ull << 60, 8, NULL, IBID_CORRUPT, "metadata count"},
    {"kv count one more", AT, NULL, 16, 23, 8, NULL, IBID_CORRUPT, ""},
    {"kv count 0", AT, NULL, 16, 0, 8, NULL, IBID_CORRUPT, ""},
    {"key length past the end", AT, NULL, 24, 1ull << 40, 8, NULL, IBID_CORRUPT, "key 0"},
    {"key length 0", AT, NULL, 24, 0, 8, NULL, IBID_CORRUPT, "0 bytes long"},
    {"key length all ones", AT, NULL, 24, UINT64_MAX, 8, NULL, IBID_CORRUPT, "key 0"},
    {"string past the end", VALUE, "general.name", 0, 1ull << 32, 8, NULL, IBID_CORRUPT,
     "general.name runs past"},
    {"string all ones", VALUE, "general.name", 0, UINT64_MAX, 8, NULL, IBID_CORRUPT,
     "general.name"},
    {"value type unknown", KEY_TYPE, "general.name", 0, 13, 4, NULL, IBID_CORRUPT,
     "general.name has the unknown value type 13"},
    {"string where a number is due", KEY_TYPE, "llama.block_count", 0, IBID_GGUF_F32, 4, NULL,
     IBID_CORRUPT, "llama.block_count is not an integer"},
    {"a signed count is fine", KEY_TYPE, "llama.block_count", 0, IBID_GGUF_I32, 4, NULL, IBID_OK,
     NULL},
    {"epsilon as a number", KEY_TYPE, "llama.attention.layer_norm_rms_epsilon", 0, IBID_GGUF_U32, 4,
     NULL, IBID_CORRUPT, "not a float"},
    {"bool of 2", VALUE, "tokenizer.ggml.add_bos_token", 0, 2, 1, NULL, IBID_CORRUPT, "not a bool"},
    {"types as floats", VALUE, "tokenizer.ggml.token_type", 0, IBID_GGUF_F32, 4, NULL, IBID_CORRUPT,
     "not an array of int32"},
    {"types as u32", VALUE, "tokenizer.ggml.token_type", 0, IBID_GGUF_U32, 4, NULL, IBID_CORRUPT,
     "not an array of int32"},
    {"array of arrays", VALUE, "tokenizer.ggml.tokens", 0, IBID_GGUF_ARRAY, 4, NULL, IBID_NOTSUP,
     "array of arrays"},
    {"array type unknown", VALUE, "tokenizer.ggml.tokens", 0, 200, 4, NULL, IBID_CORRUPT,
     "unknown value type 200"},
    {"array length all ones", VALUE, "tokenizer.ggml.token_type", 4, UINT64_MAX, 8, NULL,
     IBID_CORRUPT, "token_type runs past"},
    {"array length overflows", VALUE, "tokenizer.ggml.token_type", 4, (1ull << 62) + 288, 8, NULL,
     IBID_CORRUPT, "token_type runs past"},
    {"string array overflows", VALUE, "tokenizer.ggml.tokens", 4, 1ull << 61, 8, NULL, IBID_CORRUPT,
     "tokens runs past"},
    {"tokens past the end", VALUE, "tokenizer.ggml.tokens", 12, 1ull << 33, 8, NULL, IBID_CORRUPT,
     "tokens runs past"},
    {"key twice", KEY, "llama.rope.freq_base", 0, 0, 20, "llama.context_length", IBID_CORRUPT,
     "twice"},
    {"key missing", KEY, "llama.embedding_length", 0, 'x', 1, NULL, IBID_CORRUPT,
     "llama.embedding_length is missing"},
    {"architecture", VALUE, "general.architecture", 8, 0, 5, "gemma", IBID_NOTSUP,
     "\"gemma\" is not supported; llama, qwen2 and qwen3 are"},
    {"alignment 0", VALUE, "general.alignment", 0, 0, 4, NULL, IBID_CORRUPT, "general.alignment"},
    {"alignment 24", VALUE, "general.alignment", 0, 24, 4, NULL, IBID_CORRUPT, "general.alignment"},
    {"alignment 1", VALUE, "general.alignment", 0, 1, 4, NULL, IBID_CORRUPT, "general.alignment"},
    {"alignment huge", VALUE, "general.alignment", 0, 1u << 31, 4, NULL, IBID_CORRUPT,
     "general.alignment"},
    {"block count 0", VALUE, "llama.block_count", 0, 0, 4, NULL, IBID_CORRUPT, "llama.block_count"},
    {"block count huge", VALUE, "llama.block_count", 0, 0x7FFFFFFF, 4, NULL, IBID_CORRUPT,
     "llama.block_count"},
    {"block count 3", VALUE, "llama.block_count", 0, 3, 4, NULL, IBID_CORRUPT, "llama.block_count"},
    {"block count 1", VALUE, "llama.block_count", 0, 1, 4, NULL, IBID_NOTSUP, "20 tensors"},
    {"context 0", VALUE, "llama.context_length", 0, 0, 4, NULL, IBID_CORRUPT,
     "llama.context_length"},
    {"width 0", VALUE, "llama.embedding_length", 0, 0, 4, NULL, IBID_CORRUPT, "embedding_length"},
    {"width huge", VALUE, "llama.embedding_length", 0, UINT32_MAX, 4, NULL, IBID_CORRUPT,
     "embedding_length"},
    {"heads 0", VALUE, "llama.attention.head_count", 0, 0, 4, NULL, IBID_CORRUPT, "head_count"},
    {"heads do not divide", VALUE, "llama.attention.head_count", 0, 6, 4, NULL, IBID_CORRUPT,
     "head_count"},
    {"kv heads do not divide", VALUE, "llama.attention.head_count_kv", 0, 3, 4, NULL, IBID_CORRUPT,
     "head_count_kv"},
    {"more kv heads than heads", VALUE, "llama.attention.head_count_kv", 0, 8, 4, NULL,
     IBID_CORRUPT, "head_count_kv"},
    {"epsilon 0", VALUE, "llama.attention.layer_norm_rms_epsilon", 0, 0, 4, NULL, IBID_CORRUPT,
     "epsilon"},
    {"epsilon not a number", VALUE, "llama.attention.layer_norm_rms_epsilon", 0, 0x7FC00000, 4,
     NULL, IBID_CORRUPT, "epsilon"},
    {"RoPE of an odd width", VALUE, "llama.rope.dimension_count", 0, 15, 4, NULL, IBID_CORRUPT,
     "rope.dimension_count"},
    {"RoPE wider than a head", VALUE, "llama.rope.dimension_count", 0, 18, 4, NULL, IBID_CORRUPT,
     "rope.dimension_count"},
    {"RoPE base 0", VALUE, "llama.rope.freq_base", 0, 0, 4, NULL, IBID_CORRUPT, "rope.freq_base"},
    {"RoPE base infinite", VALUE, "llama.rope.freq_base", 0, 0x7F800000, 4, NULL, IBID_CORRUPT,
     "rope.freq_base"},
    {"vocabulary size differs", VALUE, "llama.vocab_size", 0, 289, 4, NULL, IBID_CORRUPT,
     "vocab_size"},
    {"tokenizer", VALUE, "tokenizer.ggml.model", 8, 0, 4, "bert", IBID_NOTSUP, "\"bert\""},
    {"pre-tokenizer", VALUE, "tokenizer.ggml.pre", 8, 0, 6, "tekken", IBID_NOTSUP, "\"tekken\""},
    {"merge without a blank", VALUE, "tokenizer.ggml.merges", 20, 0, 3, "t-h", IBID_CORRUPT,
     "merge 0"},
    {"merge of nothing", VALUE, "tokenizer.ggml.merges", 20, 0, 3, "t \x7f", IBID_CORRUPT,
     "merge 0"},
    {"merge that makes nothing", VALUE, "tokenizer.ggml.merges", 20, 0, 3, "q z", IBID_CORRUPT,
     "merge 0"},
    {"bos beyond the vocabulary", VALUE, "tokenizer.ggml.bos_token_id", 0, 288, 4, NULL,
     IBID_CORRUPT, "bos_token_id"},
    {"template not a string", KEY_TYPE, "tokenizer.chat_template", 0, IBID_GGUF_U64, 4, NULL,
     IBID_CORRUPT, ""},
    {"no dimensions", TENSOR, "blk.0.attn_q.weight", DIMS, 0, 4, NULL, IBID_CORRUPT,
     "0 dimensions"},
    {"five dimensions", TENSOR, "blk.0.attn_q.weight", DIMS, 5, 4, NULL, IBID_CORRUPT,
     "5 dimensions"},
    {"dimension 0", TENSOR, "blk.0.attn_q.weight", DIM0, 0, 8, NULL, IBID_CORRUPT,
     "dimension 0 (0)"},
    {"second dimension 0", TENSOR, "blk.0.attn_q.weight", DIM1, 0, 8, NULL, IBID_CORRUPT,
     "dimension 1 (0)"},
    {"dimension negative", TENSOR, "blk.0.attn_q.weight", DIM0, UINT64_MAX, 8, NULL, IBID_CORRUPT,
     "impossible dimension"},
    {"weights overflow", TENSOR, "blk.0.attn_q.weight", DIM1, 1ull << 58, 8, NULL, IBID_CORRUPT,
     "impossible dimension 1"},
    {"bytes overflow", TENSOR, "blk.0.attn_q.weight", DIM1, 1ull << 56, 8, NULL, IBID_CORRUPT,
     "runs past"},
    {"rows past the end", TENSOR, "blk.1.ffn_down.weight", DIM1, 4096, 8, NULL, IBID_CORRUPT,
     "ffn_down.weight runs past"},
    {"one row too many", TENSOR, "blk.0.attn_q.weight", DIM1, 65, 8, NULL, IBID_CORRUPT,
     "overlaps"},
    {"one row too few", TENSOR, "blk.0.attn_q.weight", DIM1, 63, 8, NULL, IBID_CORRUPT,
     "the shape"},
    {"vocabulary rows", TENSOR, "token_embd.weight", DIM1, 287, 8, NULL, IBID_CORRUPT, "the shape"},
    {"offset past the end", TENSOR, "blk.0.attn_q.weight", OFFSET, 1ull << 40, 8, NULL,
     IBID_CORRUPT, "starts past"},
    {"offset all ones", TENSOR, "blk.0.attn_q.weight", OFFSET, UINT64_MAX - 31, 8, NULL,
     IBID_CORRUPT, "starts past"},
    {"offset misaligned", TENSOR, "blk.0.attn_q.weight", OFFSET, 36, 8, NULL, IBID_CORRUPT,
     "not aligned"},
    {"offset of another tensor", TENSOR, "blk.0.attn_q.weight", OFFSET, 0, 8, NULL, IBID_CORRUPT,
     "overlaps"},
    {"type unknown", TENSOR, "blk.0.attn_q.weight", TYPE, 99, 4, NULL, IBID_CORRUPT,
     "unknown type 99"},
    {"type all ones", TENSOR, "blk.0.attn_q.weight", TYPE, UINT32_MAX, 4, NULL, IBID_CORRUPT,
     "unknown type"},
    {"type not read", TENSOR, "blk.0.attn_q.weight", TYPE, 10, 4, NULL, IBID_NOTSUP,
     "Q2_K, which is not supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and "
     "Q6_K are"},
    {"a quarter of a block", TENSOR, "blk.0.attn_q.weight", TYPE, IBID_Q4_K, 4, NULL, IBID_CORRUPT,
     "whole blocks of Q4_K"},
    {"a smaller type fits", TENSOR, "blk.0.attn_q.weight", TYPE, IBID_F16, 4, NULL, IBID_OK, NULL},
    {"tensor missing", TENSOR_NAME, "blk.1.ffn_up.weight", 11, 'q', 1, NULL, IBID_CORRUPT,
     "blk.1.ffn_up.weight is missing"},
    {"tensor twice", TENSOR_NAME, "blk.0.attn_k.weight", 11, 'q', 1, NULL, IBID_CORRUPT, "twice"},
    {"norm missing", TENSOR_NAME, "output_norm.weight", 0, 'x', 1, NULL, IBID_CORRUPT,
     "output_norm.weight is missing"},
};

/* Where a length-prefixed string of this name ends. */
static size_t after_name(const ibid_buf *b, const char *name) {
    uint64_t n = strlen(name);
    char needle[128];
    memcpy(needle, &n, sizeof n);
    memcpy(needle + sizeof n, name, n);
    const char *hit = memmem(b->data, b->len, needle, sizeof n + n);
    assert_non_null(hit);
    return (size_t)(hit - b->data) + sizeof n + n;
}

static void do_damage(const damage *d, ibid_buf *b) {
    size_t at = d->off;
    if (d->place != AT) at += after_name(b, d->name);
    if (d->place == KEY || d->place == TENSOR_NAME) at -= strlen(d->name);
    if (d->place == VALUE) at += 4; /* the type */
    assert_true(at + d->bytes <= b->len);
    memcpy(b->data + at, d->text ? (const void *)d->text : &d->value, d->bytes);
}

static void damage_is_named(void **state) {
    (void)state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++) {
        const damage *d = &damages[i];
        ibid_buf b;
        build(&spec, &b);
        do_damage(d, &b);
        ibid_err e = try_bytes(b.data, b.len);
        bool named = !d->detail || strstr(ibid_err_detail(), d->detail);
        if (e != d->want || !named)
            print_error("%s: %s: %s\n", d->what, ibid_err_code(e), ibid_err_detail());
        assert_int_equal(e, d->want);
        assert_true(named);
        if (e) assert_true(ibid_err_detail()[0] != '\0');
        ibid_buf_fini(&b);
    }
    print_message("%zu damaged files\n", sizeof damages / sizeof *damages);
}

/* Two fields at once: what a single field cannot say. */
static void damage_in_two_places(void **state) {
    (void)state;
    static const struct {
        damage a, b;
    } pairs[] = {
        {{"", KEY_TYPE, "llama.block_count", 0, IBID_GGUF_I32, 4, NULL, IBID_OK, NULL},
         {"a negative count", VALUE, "llama.block_count", 0, UINT32_MAX, 4, NULL, IBID_CORRUPT,
          "not zero or more"}},
        {{"", TENSOR, "blk.0.attn_q.weight", DIM0, 48, 8, NULL, IBID_OK, NULL},
         {"rows of no whole blocks", TENSOR, "blk.0.attn_q.weight", TYPE, IBID_Q8_0, 4, NULL,
          IBID_CORRUPT, "whole blocks of Q8_0"}},
        {{"", TENSOR, "blk.0.attn_norm.weight", 12, IBID_F16, 4, NULL, IBID_OK, NULL},
         {"a norm in f16", AT, NULL, 0, 'G', 1, NULL, IBID_NOTSUP,
          "attn_norm.weight has the type F16"}},
    };
    ibid_test_gguf spec = ibid_test_gguf_small();
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        ibid_buf b;
        build(&spec, &b);
        do_damage(&pairs[i].a, &b);
        do_damage(&pairs[i].b, &b);
        assert_int_equal(try_bytes(b.data, b.len), pairs[i].b.want);
        assert_non_null(strstr(ibid_err_detail(), pairs[i].b.detail));
        ibid_buf_fini(&b);
    }
}

/* What one architecture has and another has not. FLAT_TYPE: in what follows a vector's name. */
static void damage_of_architectures(void **state) {
    (void)state;
    enum { FLAT_TYPE = 12 };
    static const struct {
        const char *arch;
        bool biases, factors;
        damage d;
    } cases[] = {
        {"qwen3", false, false, {"sound", AT, NULL, 0, 'G', 1, NULL, IBID_OK, NULL}},
        {"qwen3",
         false,
         false,
         {"head norm missing", TENSOR_NAME, "blk.1.attn_k_norm.weight", 6, 'x', 1, NULL,
          IBID_CORRUPT, "blk.1.attn_k_norm.weight is missing"}},
        {"qwen3",
         false,
         false,
         {"head norm too short", TENSOR, "blk.0.attn_q_norm.weight", DIM0, 8, 8, NULL, IBID_CORRUPT,
          "attn_q_norm.weight has the shape [8, 1, 1, 1], not [16, 1]"}},
        {"qwen3",
         false,
         false,
         {"head norm in f16", TENSOR, "blk.0.attn_q_norm.weight", FLAT_TYPE, IBID_F16, 4, NULL,
          IBID_NOTSUP, "attn_q_norm.weight has the type F16, which is not supported: only F32"}},
        {"qwen3",
         false,
         false,
         {"width 0", VALUE, "qwen3.embedding_length", 0, 0, 4, NULL, IBID_CORRUPT,
          "qwen3.embedding_length is 0"}},
        {"qwen3",
         true,
         false,
         {"biases", AT, NULL, 0, 'G', 1, NULL, IBID_NOTSUP,
          "blk.0.attn_k.bias is not supported: of 32 tensors the qwen3 architecture"}},
        {"qwen2", false, false, {"sound", AT, NULL, 0, 'G', 1, NULL, IBID_OK, NULL}},
        {"qwen2",
         false,
         false,
         {"bias missing", TENSOR_NAME, "blk.0.attn_v.bias", 6, 'x', 1, NULL, IBID_CORRUPT,
          "blk.0.attn_v.bias is missing"}},
        {"qwen2",
         false,
         false,
         {"bias too short", TENSOR, "blk.0.attn_k.bias", DIM0, 16, 8, NULL, IBID_CORRUPT,
          "attn_k.bias has the shape [16, 1, 1, 1], not [32, 1]"}},
        {"qwen2",
         false,
         false,
         {"bias of no type", TENSOR, "blk.0.attn_k.bias", FLAT_TYPE, 77, 4, NULL, IBID_CORRUPT,
          "unknown type 77"}},
        {"qwen2",
         false,
         true,
         {"factors", AT, NULL, 0, 'G', 1, NULL, IBID_NOTSUP, "rope_freqs.weight is not supported"}},
        {"qwen2",
         true,
         false,
         {"output bias", AT, NULL, 0, 'G', 1, NULL, IBID_NOTSUP, "attn_output.bias"}},
        {"llama", true, true, {"sound", AT, NULL, 0, 'G', 1, NULL, IBID_OK, NULL}},
        {"llama",
         true,
         false,
         {"another bias", TENSOR_NAME, "blk.0.attn_q.bias", 6, 'x', 1, NULL, IBID_NOTSUP,
          "blk.0.xttn_q.bias is not supported"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const damage *d = &cases[i].d;
        ibid_test_gguf spec = ibid_test_gguf_small();
        ibid_buf b;
        spec.arch = cases[i].arch;
        spec.biases = cases[i].biases;
        spec.rope_freqs = cases[i].factors;
        build(&spec, &b);
        do_damage(d, &b);
        ibid_err e = try_bytes(b.data, b.len);
        if (e != d->want || (d->detail && !strstr(ibid_err_detail(), d->detail)))
            fail_msg("%s, %s: %s: %s", spec.arch, d->what, ibid_err_code(e), ibid_err_detail());
        ibid_buf_fini(&b);
    }
}

static void a_token_twice(void **state) {
    (void)state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_buf b;
    build(&spec, &b);
    static const char needle[] = {1, 0, 0, 0, 0, 0, 0, 0, 'a'};
    char *hit = memmem(b.data, b.len, needle, sizeof needle);
    assert_non_null(hit);
    hit[8] = 'b';
    assert_int_equal(try_bytes(b.data, b.len), IBID_CORRUPT);
    assert_non_null(strstr(ibid_err_detail(), "in the vocabulary twice"));
    ibid_buf_fini(&b);
}

static void truncation_is_an_error(void **state) {
    (void)state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_buf b;
    build(&spec, &b);
    size_t cases = 0;
    for (size_t n = 0; n < b.len; n += n < 600 ? 1 : n < 12000 ? 61 : 4096, cases++)
        assert_int_equal(try_bytes(b.data, n), IBID_CORRUPT);
    for (size_t n = 4096; n < b.len; n += 4096, cases++)
        assert_int_equal(try_bytes(b.data, n), IBID_CORRUPT);
    assert_int_equal(try_bytes(b.data, b.len - 1), IBID_CORRUPT);
    print_message("%zu truncated files\n", cases + 1);
    ibid_buf_fini(&b);
}

/* Random bytes of the header changed: any result but a crash or an untyped error. */
static void random_damage(void **state) {
    (void)state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_buf b;
    build(&spec, &b);
    uint64_t random = seed;
    print_message("seed %llu\n", (unsigned long long)seed);
    char *copy = ibid_alloc(b.len);
    size_t refused = 0;
    for (int round = 0; round < 2000; round++) {
        memcpy(copy, b.data, b.len);
        for (int i = 0; i <= round % 4; i++) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            copy[random % 11000] = (char)(random >> 32);
        }
        ibid_err e = try_bytes(copy, b.len);
        assert_true(e == IBID_OK || e == IBID_CORRUPT || e == IBID_NOTSUP);
        refused += e != IBID_OK;
    }
    assert_true(refused > 100);
    ibid_free(copy);
    ibid_buf_fini(&b);
}

/* ---- sound files ---- */

static void every_type_opens(void **state) {
    (void)state;
    static const ibid_type types[] = {IBID_F32,  IBID_F16,  IBID_BF16, IBID_Q8_0,
                                      IBID_Q4_0, IBID_Q4_1, IBID_Q5_0, IBID_Q5_1,
                                      IBID_Q4_K, IBID_Q5_K, IBID_Q6_K};
    for (size_t i = 0; i < 2 * sizeof types / sizeof *types; i++) {
        ibid_test_gguf spec = ibid_test_gguf_small();
        spec.type = types[i / 2];
        bool super = ibid_type_block(spec.type) == 256;
        if (super) {
            spec.n_embd = spec.n_ff = 256;
            spec.head_dim = 64;
        }
        spec.tied = i % 2;
        spec.n_vocab = 300;
        ibid_buf b;
        ibid_model *m = NULL;
        char *block = NULL;
        build(&spec, &b);
        assert_int_equal(open_bytes(b.data, b.len, &m, &block), IBID_OK);
        assert_int_equal(m->n_layers, 2);
        assert_int_equal(m->head_dim, super ? 64 : 16);
        assert_int_equal(m->n_vocab, 300);
        assert_int_equal(m->n_ctx, 512);
        assert_int_equal(m->file_bytes, b.len);
        assert_int_equal(m->layers[1].down.rows, spec.n_embd);
        assert_int_equal(m->layers[1].down.cols, spec.n_ff);
        assert_int_equal(m->layers[1].down.type, spec.type);
        assert_int_equal(m->layers[1].down.row_bytes, ibid_type_row_bytes(spec.type, spec.n_ff));
        assert_int_equal(m->layers[0].attn_norm.type, IBID_F32);
        assert_int_equal(m->output.data == m->embed.data, spec.tied);
        assert_string_equal(m->chat->name, "chatml");
        assert_int_equal((uintptr_t)m->layers[0].wq.data % 32, 0);
        ibid_hash h = ibid_hash_bytes(b.data, b.len);
        assert_int_equal(ibid_hash_cmp(&h, &m->fingerprint), 0);
        ibid_model_close(m);
        ibid_free(block);
        ibid_buf_fini(&b);
    }
}

static void rope_is_read(void **state) {
    (void)state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    spec.head_dim = 32;
    spec.n_rot = 24;
    spec.rope_theta = 500000;
    spec.rope_linear = 4;
    spec.rope_freqs = true;
    ibid_buf b;
    ibid_model *m = NULL;
    char *block = NULL;
    build(&spec, &b);
    assert_int_equal(open_bytes(b.data, b.len, &m, &block), IBID_OK);
    assert_int_equal(m->head_dim, 32);
    assert_int_equal(m->rope.n_rot, 24);
    for (size_t i = 0; i < 12; i++) {
        double want = pow(500000, -2.0 * (double)i / 24) / (1 + 3 * (double)i / 12) / 4;
        assert_true(fabs((double)m->rope.freq[i] - want) <= 1e-6 * want);
    }
    ibid_model_close(m);
    ibid_free(block);
    ibid_buf_fini(&b);
    static const char *const refused[] = {"yarn", "dynamic", "longrope"};
    for (size_t i = 0; i < 3; i++) {
        spec.rope_type = refused[i];
        build(&spec, &b);
        assert_int_equal(try_bytes(b.data, b.len), IBID_NOTSUP);
        assert_non_null(strstr(ibid_err_detail(), refused[i]));
        ibid_buf_fini(&b);
    }
}

static void same_seed_same_file(void **state) {
    (void)state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_buf a, b;
    build(&spec, &a);
    build(&spec, &b);
    assert_int_equal(a.len, b.len);
    assert_memory_equal(a.data, b.data, a.len);
    ibid_buf_fini(&b);
    spec.seed = 2;
    build(&spec, &b);
    assert_int_equal(a.len, b.len);
    assert_memory_not_equal(a.data, b.data, a.len);
    ibid_buf_fini(&a);
    ibid_buf_fini(&b);
}

static void files_open(void **state) {
    (void)state;
    char dir[] = "/tmp/ibid-gguf-XXXXXX", path[64];
    assert_non_null(mkdtemp(dir));
    (void)snprintf(path, sizeof path, "%s/m.gguf", dir);
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_model *m = NULL;
    assert_int_equal(ibid_model_open(path, NULL, &m), IBID_NOTFOUND);
    assert_int_equal(ibid_model_open(dir, NULL, &m), IBID_IO);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fclose(f), 0);
    assert_int_equal(ibid_model_open(path, NULL, &m), IBID_CORRUPT);
    assert_int_equal(ibid_test_write_gguf(path, &spec), IBID_OK);
    ibid_hash given = {.b = {1, 2, 3}};
    assert_int_equal(ibid_model_open(path, &given, &m), IBID_OK);
    assert_int_equal(ibid_hash_cmp(&m->fingerprint, &given), 0);
    assert_string_equal(m->name, "a random test model");
    ibid_model_close(m);
    assert_int_equal(truncate(path, 30000), 0);
    assert_int_equal(ibid_model_open(path, NULL, &m), IBID_CORRUPT);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(dir), 0);
}

static void allocations_fail(void **state) {
    (void)state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_buf b;
    build(&spec, &b);
    int failures = 0;
    for (uint64_t nth = 1; nth < 100; nth++) {
        ibid_gguf *g = NULL;
        ibid_model *m = NULL;
        ibid_alloc_fail_at(nth);
        ibid_err e = ibid_gguf_parse(b.data, b.len, "test", &g);
        if (!e) e = ibidi_model_build(g, NULL, &m);
        ibid_alloc_fail_at(0);
        ibid_model_close(m);
        if (!e) break;
        assert_int_equal(e, IBID_NOMEM);
        failures++;
    }
    assert_true(failures > 15 && failures < 99);
    ibid_buf_fini(&b);
}

/* Every getter over a file with every type of value. */
static void getters_check_types(void **state) {
    (void)state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_buf b;
    ibid_gguf *g = NULL;
    build(&spec, &b);
    assert_int_equal(ibid_gguf_parse(b.data, b.len, "test", &g), IBID_OK);
    uint64_t u = 7;
    float f = 7;
    bool yes = true;
    ibid_gguf_str s = {0}, *strs = NULL;
    const void *ints = NULL;
    size_t n = 0;
    assert_int_equal(ibid_gguf_get_u64(g, "no.such.key", false, &u), IBID_OK);
    assert_int_equal(u, 7);
    assert_int_equal(ibid_gguf_get_u64(g, "no.such.key", true, &u), IBID_CORRUPT);
    assert_int_equal(ibid_gguf_get_u64(g, "llama.block_count", true, &u), IBID_OK);
    assert_int_equal(u, 2);
    assert_int_equal(ibid_gguf_get_u64(g, "general.name", false, &u), IBID_CORRUPT);
    assert_int_equal(ibid_gguf_get_u64(g, "tokenizer.ggml.token_type", false, &u), IBID_CORRUPT);
    assert_int_equal(ibid_gguf_get_f32(g, "llama.block_count", false, &f), IBID_CORRUPT);
    assert_int_equal(ibid_gguf_get_bool(g, "llama.block_count", false, &yes), IBID_CORRUPT);
    assert_int_equal(ibid_gguf_get_bool(g, "tokenizer.ggml.add_bos_token", true, &yes), IBID_OK);
    assert_false(yes);
    assert_int_equal(ibid_gguf_get_str(g, "tokenizer.ggml.tokens", false, &s), IBID_CORRUPT);
    assert_int_equal(ibid_gguf_get_strs(g, "tokenizer.ggml.token_type", true, &strs, &n),
                     IBID_CORRUPT);
    assert_int_equal(ibid_gguf_get_i32s(g, "tokenizer.ggml.tokens", true, &ints, &n), IBID_CORRUPT);
    assert_int_equal(ibid_gguf_get_strs(g, "tokenizer.ggml.tokens", true, &strs, &n), IBID_OK);
    assert_int_equal(n, IBID_TEST_MIN_VOCAB);
    assert_memory_equal(strs[2].data, "<|im_end|>", strs[2].n);
    ibid_free(strs);
    assert_int_equal(ibid_gguf_n_tensors(g), 20);
    assert_null(ibid_gguf_tensor_at(g, 20));
    assert_null(ibid_gguf_tensor_find(g, "blk.2.attn_q.weight"));
    ibid_gguf_close(g);
    ibid_buf_fini(&b);
}

static void default_model_opens(void **state) {
    (void)state;
    const char *path = ibid_test_model_path();
    ibid_model *m = NULL;
    if (!path) return; /* main() reports it */
    assert_int_equal(ibid_model_open(path, NULL, &m), IBID_OK);
    assert_int_equal(m->n_layers, 30);
    assert_int_equal(m->n_heads, 9);
    assert_int_equal(m->n_kv_heads, 3);
    assert_int_equal(m->head_dim, 64);
    assert_int_equal(m->n_embd, 576);
    assert_int_equal(m->n_ff, 1536);
    assert_int_equal(m->n_vocab, 49152);
    assert_int_equal(m->n_ctx, 8192);
    assert_int_equal(m->rope.n_rot, 64);
    assert_true(fabs(log((double)m->rope.freq[1]) * 32 + log(100000)) < 1e-4);
    assert_int_equal(m->embed.type, IBID_Q8_0);
    assert_int_equal(m->layers[29].down.type, IBID_Q4_1);
    assert_ptr_equal(m->output.data, m->embed.data);
    assert_string_equal(m->chat->name, "chatml");
    assert_int_equal(ibid_tokenizer_bos(m->tokenizer), 1);
    assert_int_equal(ibid_tokenizer_eos(m->tokenizer), 2);
    assert_false(ibid_tokenizer_add_bos(m->tokenizer));
    ibid_model_close(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(damage_of_architectures),
        cmocka_unit_test(every_type_opens),
        cmocka_unit_test(rope_is_read),
        cmocka_unit_test(same_seed_same_file),
        cmocka_unit_test(files_open),
        cmocka_unit_test(getters_check_types),
        cmocka_unit_test(damage_is_named),
        cmocka_unit_test(damage_in_two_places),
        cmocka_unit_test(a_token_twice),
        cmocka_unit_test(truncation_is_an_error),
        cmocka_unit_test(random_damage),
        cmocka_unit_test(allocations_fail),
        cmocka_unit_test(default_model_opens),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed ? 1 : ibid_test_model_exit();
}
