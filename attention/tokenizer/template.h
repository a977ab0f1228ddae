/* Chat templates: a table of known ones, chosen by what the GGUF's template text contains. No
 * template interpreter (template text from a file is data, never code). */
#ifndef IBID_ATTENTION_TEMPLATE_H
#define IBID_ATTENTION_TEMPLATE_H

#include "rpc/base/err.h"

#include <stddef.h>

/* Turn texts; control tokens in them are parsed, all else around them is not. A conversation is
 * [begin_text] {system_open TEXT system_close} {user_open TEXT user_close | assistant_open TEXT
 * assistant_close}... and the reply is led in by assistant_open. */
typedef struct ibid_template {
    const char *name;  /* "chatml", "llama3", ... */
    const char *match; /* a piece of the GGUF's template text that only this one has */
    const char *begin_text;
    const char *system_open, *system_close;
    const char *user_open, *user_close;
    const char *assistant_open, *assistant_close;
} ibid_template;

/* The known template whose `match` is in the text, or NULL. */
const ibid_template *ibid_template_find(const char *gguf_template);
const ibid_template *ibid_template_by_name(const char *name);
#endif
