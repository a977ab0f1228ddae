/* Byte-level byte-pair tokenizer, by its GGUF `tokenizer.ggml.pre` name. Text is never truncated.
 * Immutable and safe to share between threads. */
#ifndef IBID_ATTENTION_TOKENIZER_H
#define IBID_ATTENTION_TOKENIZER_H

#include "rpc/base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ibid_tokenizer ibid_tokenizer;

/* One token of a text: bytes [start, end) of it. Consecutive tokens of a text without special
 * tokens tile it exactly: token i ends where i + 1 starts, and the bytes of the tokens concatenated
 * are the text. A token may end inside a UTF-8 sequence. Some vocabularies lack a token for some
 * bytes (the default model's for 21 of them: six control characters, and bytes of which text has
 * hardly any). As in llama.cpp such bytes give no token: the token before them (or else the one
 * after) spans them too, and a text of nothing else has no tokens. */
typedef struct ibid_token {
    int32_t id;
    uint64_t start, end;
} ibid_token;

/* Encodes n bytes (any bytes; invalid UTF-8 is encoded byte-wise, nothing is lost). With
 * parse_special false, text that looks like a control token is encoded as ordinary text: document
 * and user text always go this way. Linear in n for practical text: a run of 16 MiB of one
 * character takes at most 1 s per MiB. *out is one allocation (ibid_free). Errors: NOMEM, TOOBIG (n
 * > 2^31). */
ibid_err ibid_tokenize(const ibid_tokenizer *t, const char *text, size_t n, bool parse_special,
                       ibid_token **out, size_t *n_out);

/* The bytes of one token (control tokens: their text). Borrowed; NULL and 0 for an unknown id. */
const char *ibid_token_bytes(const ibid_tokenizer *t, int32_t id, size_t *n);
bool ibid_token_is_control(const ibid_tokenizer *t, int32_t id);
size_t ibid_tokenizer_size(const ibid_tokenizer *t);
/* -1 where the model has none. */
int32_t ibid_tokenizer_bos(const ibid_tokenizer *t);
int32_t ibid_tokenizer_eos(const ibid_tokenizer *t);
/* The id of a control token by its exact text ("<|im_end|>"), or -1. */
int32_t ibid_tokenizer_control(const ibid_tokenizer *t, const char *text);
bool ibid_tokenizer_add_bos(const ibid_tokenizer *t);
/* True for a token that ends the assistant's turn or the text (eos, eot, <|im_end|> and the like).
 */
bool ibid_tokenizer_is_end(const ibid_tokenizer *t, int32_t id);
#endif
