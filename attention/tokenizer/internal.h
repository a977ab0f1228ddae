/* What the files of attention/tokenizer share. */
#ifndef IBID_ATTENTION_TOKENIZER_INTERNAL_H
#define IBID_ATTENTION_TOKENIZER_INTERNAL_H

#include "attention/model/gguf.h"
#include "attention/tokenizer/tokenizer.h"

/* Classes of code points, as far as pre-tokenizers tell them apart. */
typedef enum ibidi_class {
    IBIDI_NONE, /* past the end */
    IBIDI_LETTER,
    IBIDI_NUMBER,
    IBIDI_PUNCT,
    IBIDI_SPACE,
    IBIDI_OTHER
} ibidi_class;

ibidi_class ibidi_unicode_class(uint32_t cp);
/* Decodes the code point at text[0], n >= 1 bytes; *len is 1 to 4. A byte that starts no
 * well-formed sequence is one code point on its own, 0x110000 + byte (class OTHER). */
uint32_t ibidi_utf8_decode(const char *text, size_t n, size_t *len);

/* How text is cut into words before byte pairs are merged, one per family of `tokenizer.ggml.pre`.
 */
typedef enum ibidi_pre {
    IBIDI_PRE_GPT2,
    IBIDI_PRE_SMOLLM, /* GPT-2 with each digit alone */
    IBIDI_PRE_DEFAULT,
    IBIDI_PRE_LLAMA3,
    IBIDI_PRE_QWEN2
} ibidi_pre;

typedef struct ibidi_splitter {
    ibidi_pre pre;
    const char *text;
    size_t n, pos;
    size_t part_end; /* end of the part that the next words are cut from; no look-ahead passes it */
    bool part_cut;   /* the part is a word already */
    size_t word_end; /* end of the word that DEFAULT cuts further */
    size_t run_end;  /* end of the piece of that word */
} ibidi_splitter;

void ibidi_splitter_init(ibidi_splitter *s, ibidi_pre pre, const char *text, size_t n);
/* The end of the next word, which starts at s->pos; s->pos moves there. Only while s->pos < s->n.
 */
size_t ibidi_split_next(ibidi_splitter *s);

typedef enum ibidi_kind { /* numbered as tokenizer.ggml.token_type is */
                          IBIDI_KIND_UNDEFINED = 0,
                          IBIDI_KIND_NORMAL = 1,
                          IBIDI_KIND_UNKNOWN = 2,
                          IBIDI_KIND_CONTROL = 3,
                          IBIDI_KIND_USER = 4,
                          IBIDI_KIND_UNUSED = 5,
                          IBIDI_KIND_BYTE = 6
} ibidi_kind;

/* An open-addressing table from bytes to a token id; 2^k slots, -1 where empty. */
typedef struct ibidi_table {
    int32_t *slots;
    size_t mask;
} ibidi_table;

/* A merge: the pair (left, right), its rank (lower first) and what it makes. */
typedef struct ibidi_merge {
    int32_t left, right; /* left is -1 in an empty slot */
    int32_t rank, made;
} ibidi_merge;

struct ibid_tokenizer {
    ibidi_pre pre;
    bool whole_words; /* a word that is a token is taken as it is, whatever the merges say */
    bool add_bos;
    int32_t bos, eos;
    size_t n;
    uint32_t *offset; /* [n + 1] into bytes */
    char *bytes;
    uint8_t *kind;        /* [n] ibidi_kind */
    uint8_t *is_end;      /* [n] */
    int32_t byte_id[256]; /* -1: the vocabulary lacks this byte */
    ibidi_table words;    /* used with whole_words; ordinary tokens only */
    ibidi_merge *merges;  /* an open-addressing table, merge_mask + 1 slots */
    size_t merge_mask;
    int32_t *special; /* control, unknown and user-defined tokens, longest text first */
    size_t n_special;
};

/* pre overrides what the file says; NULL: the file's. Nothing of g is borrowed. */
ibid_err ibidi_tokenizer_open(const ibid_gguf *g, const char *pre, ibid_tokenizer **out);
void ibidi_tokenizer_close(ibid_tokenizer *t);

int32_t ibidi_word_find(const ibid_tokenizer *t, const char *word, size_t n); /* or -1 */
const ibidi_merge *ibidi_merge_find(const ibid_tokenizer *t, int32_t left, int32_t right);

/* Merging one word: symbols in place, lowest rank first, leftmost first among equals. */
typedef struct ibidi_bpe {
    const ibid_tokenizer *t;
    int32_t *id;           /* [n] symbol ids; -2 where merged away, -1 for a byte without a token */
    uint32_t *next, *prev; /* [n] neighbours; for long words only */
    uint64_t *heap;        /* rank << 32 | place */
    size_t n, room, n_heap, heap_room;
} ibidi_bpe;

void ibidi_bpe_init(ibidi_bpe *b, const ibid_tokenizer *t);
void ibidi_bpe_fini(ibidi_bpe *b);
/* After IBID_OK, id[0..n) holds one id at each place where a symbol starts, -2 elsewhere. */
ibid_err ibidi_bpe_merge(ibidi_bpe *b, const char *word, size_t n);
#endif
