#include "attention/plan/prompt.h"

#include "attention/tokenizer/template.h"

#include <string.h>

enum { PREFIX_LAYOUT = 1, QUESTION_MAX = 1024 * 1024 };

/* Of the wordings tried on XQuAD with the default model (one block, 60 questions, 64 tokens) the
 * one with the most gold answers in the reply (48 %; "Documents: ... Question: ..." with a demand
 * for a sentence of the documents 45 %, for one in their words 47 %) and in the quotes (78 %, 72 %,
 * 72 %). */
const ibid_wording ibid_wording_default = {
    .system = "You are a helpful assistant.",
    .lead_in = "Read this text.\n\n",
    .ask = "\n\nQuote the sentence of the text that answers this question: ",
    .answer = "",
    .reply = "",
};

static ibid_err add_ids(ibid_ids *to, const ibid_token *t, size_t n) {
    size_t bytes;
    if (n == 0) return IBID_OK;
    if (!ibid_mul_size(to->n + n, sizeof *to->ids, &bytes))
        return ibid_fail(IBID_NOMEM, "a prompt is too long");
    int32_t *p = ibid_realloc(to->ids, bytes);
    if (!p) return ibid_fail(IBID_NOMEM, "no memory for a prompt of %zu tokens", to->n + n);
    to->ids = p;
    for (size_t i = 0; i < n; i++) p[to->n++] = t[i].id;
    return IBID_OK;
}

/* Appends text; control tokens in it are parsed only if it is the template's. */
static ibid_err add_text(ibid_ids *to, const ibid_model *m, const char *s, size_t n,
                         bool from_template) {
    ibid_token *t = NULL;
    size_t n_tokens = 0;
    if (n == 0) return IBID_OK;
    ibid_err e = ibid_tokenize(m->tokenizer, s, n, from_template, &t, &n_tokens);
    if (!e) e = add_ids(to, t, n_tokens);
    ibid_free(t);
    return e;
}

/* Several strings in turn: from the template, of ours, from the template, ... */
static ibid_err add_parts(ibid_ids *to, const ibid_model *m, const char *const *parts, size_t n) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < n; i++)
        e = add_text(to, m, parts[i], strlen(parts[i]), i % 2 == 0);
    return e;
}

static ibid_err finish(ibid_err e, ibid_ids *ids, ibid_ids *out) {
    if (e)
        ibid_free(ids->ids);
    else
        *out = *ids;
    return e;
}

ibid_err ibid_prompt_prefix(const ibid_model *m, const ibid_wording *w, ibid_ids *out) {
    ibid_ids ids = {NULL, 0};
    ibid_err e = IBID_OK;
    const ibid_template *c = m->chat;
    int32_t bos = ibid_tokenizer_bos(m->tokenizer);
    if (ibid_tokenizer_add_bos(m->tokenizer) && bos >= 0 && (!c || !*c->begin_text))
        e = add_ids(&ids, &(ibid_token){.id = bos}, 1);
    if (!e && c) {
        const char *parts[] = {c->begin_text,   "", c->system_open, w->system,
                               c->system_close, "", c->user_open,   w->lead_in};
        e = add_parts(&ids, m, parts, sizeof parts / sizeof *parts);
    } else if (!e) {
        const char *parts[] = {"", w->system, "", "\n\n", "", w->lead_in};
        e = add_parts(&ids, m, parts, sizeof parts / sizeof *parts);
    }
    if (!e && ids.n == 0) e = ibid_fail(IBID_NOTSUP, "the model's tokenizer gives no prefix");
    return finish(e, &ids, out);
}

ibid_err ibid_prompt_question(const ibid_model *m, const ibid_wording *w, ibid_str question,
                              ibid_ids *out) {
    ibid_ids ids = {NULL, 0};
    const ibid_template *c = m->chat;
    ibid_buf text;
    if (question.n > QUESTION_MAX)
        return ibid_fail(IBID_TOOBIG, "a question of %zu bytes; at most %d", question.n,
                         QUESTION_MAX);
    ibid_buf_init(&text, QUESTION_MAX + 4096);
    ibid_err e = ibid_buf_puts(&text, w->ask);
    if (!e) e = ibid_buf_append(&text, question.s, question.n);
    if (!e) e = ibid_buf_puts(&text, w->answer);
    if (!e) e = add_text(&ids, m, text.data, text.len, false);
    const char *parts[] = {c ? c->user_close : "", "", c ? c->assistant_open : "",
                           c ? w->reply : "\n\nAnswer:"};
    if (!e) e = add_parts(&ids, m, parts, sizeof parts / sizeof *parts);
    ibid_buf_fini(&text);
    return finish(e, &ids, out);
}

/* Of seven wordings tried on 127 XQuAD questions the one under which the likeliest span of the text
 * was the answer most often (26 %; the same examples with the reply in a turn of its own 10 %,
 * without examples 5 to 12 %). */
static const char extract_lead[] =
    "\n\nAnswer with a name, a number or a few words of the text, as here.\n"
    "Question: Who wrote Hamlet?\nAnswer: William Shakespeare\n"
    "Question: When did the war end?\nAnswer: 1945\n"
    "Question: What do bees make?\nAnswer: honey\nQuestion: ";

ibid_err ibid_prompt_extract(const ibid_model *m, ibid_str question, ibid_ids *out) {
    ibid_ids ids = {NULL, 0};
    ibid_buf text;
    if (question.n > QUESTION_MAX)
        return ibid_fail(IBID_TOOBIG, "a question of %zu bytes; at most %d", question.n,
                         QUESTION_MAX);
    ibid_buf_init(&text, QUESTION_MAX + 4096);
    ibid_err e = ibid_buf_puts(&text, extract_lead);
    if (!e) e = ibid_buf_append(&text, question.s, question.n);
    if (!e) e = ibid_buf_puts(&text, "\nAnswer:");
    if (!e) e = add_text(&ids, m, text.data, text.len, false);
    ibid_buf_fini(&text);
    return finish(e, &ids, out);
}

ibid_err ibid_prompt_keys(const ibid_model *m, ibid_str question, ibid_ids *out) {
    ibid_ids ids = {NULL, 0};
    ibid_buf text;
    if (question.n > QUESTION_MAX)
        return ibid_fail(IBID_TOOBIG, "a question of %zu bytes; at most %d", question.n,
                         QUESTION_MAX);
    ibid_buf_init(&text, QUESTION_MAX + 4096);
    ibid_err e = ibid_buf_puts(&text, " ");
    if (!e) e = ibid_buf_append(&text, question.s, question.n);
    if (!e) e = add_text(&ids, m, text.data, text.len, false);
    ibid_buf_fini(&text);
    return finish(e, &ids, out);
}

ibid_hash ibid_prefix_id(const ibid_model *m, ibid_kv_type type, const int32_t *ids, size_t n) {
    ibid_hasher h;
    ibid_hasher_init(&h);
    ibid_hasher_field(&h, m->fingerprint.b, sizeof m->fingerprint.b);
    ibid_hasher_u64(&h, (uint64_t)type);
    ibid_hasher_u64(&h, PREFIX_LAYOUT);
    ibid_hasher_field(&h, ids, n * sizeof *ids);
    return ibid_hasher_final(&h);
}
