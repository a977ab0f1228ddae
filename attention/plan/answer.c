#include "attention/plan/answer.h"

#include "attention/plan/sampler.h"
#include "rpc/base/clock.h"

#include <string.h>

enum {
    HELD_MAX = 4096,
    REPEAT_MIN = 12, /* bytes */
    TOKEN_BYTES = 8, /* room made for a token's text beforehand; most have fewer */
    ROOM_MAX = 65536
};

static const float BELOW_ONE = 0x1.fffffep-1f;

double ibid_recompute_auto(size_t n_blocks) {
    return n_blocks <= 1 ? 0 : n_blocks == 2 ? 0.15 : 0.5;
}

/* ---- Characters ---- */

void ibid_utf8_stream_init(ibid_utf8_stream *s) {
    memset(s, 0, sizeof *s);
    ibid_buf_init(&s->held, HELD_MAX);
}

void ibid_utf8_stream_fini(ibid_utf8_stream *s) {
    ibid_buf_fini(&s->held);
}

/* Length of the character that starts with c, or 0. */
static size_t utf8_length(unsigned char c) {
    return c < 0x80 ? 1 : c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
}

/* Whether n bytes can start a character: 1 yes and it is whole, 0 yes but more is needed, -1 no. */
static int utf8_state(const unsigned char *p, size_t n) {
    size_t want = utf8_length(p[0]);
    if (want == 0) return -1;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return -1;
    if (n > 1 && ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F) ||
                  (p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F)))
        return -1;
    return n == want ? 1 : 0;
}

static ibid_err put_char(ibid_utf8_stream *s, const char *c, size_t n, ibid_buf *out) {
    bool space = n == 1 && (*c == ' ' || *c == '\n' || *c == '\t' || *c == '\r');
    ibid_err e = IBID_OK;
    if (space && !s->started) return IBID_OK;
    if (space && s->held.len + n < HELD_MAX) return ibid_buf_append(&s->held, c, n);
    s->started = true;
    if (s->held.len) e = ibid_buf_append(out, s->held.data, s->held.len);
    ibid_buf_clear(&s->held);
    return e ? e : ibid_buf_append(out, c, n);
}

ibid_err ibid_utf8_stream_put(ibid_utf8_stream *s, const char *bytes, size_t n, bool end,
                              ibid_buf *out) {
    static const char broken[] = "\xEF\xBF\xBD";
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < n; i++) {
        s->tail[s->n_tail++] = bytes[i];
        int state = utf8_state((const unsigned char *)s->tail, s->n_tail);
        if (state < 0 && s->n_tail > 1) { /* the byte may start the next character */
            s->n_tail = 0;
            e = put_char(s, broken, 3, out);
            i--;
        } else if (state < 0) {
            s->n_tail = 0;
            e = put_char(s, broken, 3, out);
        } else if (state > 0) {
            e = put_char(s, s->tail, s->n_tail, out);
            s->n_tail = 0;
        }
    }
    if (!e && end && s->n_tail) {
        s->n_tail = 0;
        e = put_char(s, broken, 3, out);
    }
    return e;
}

/* ---- The answer ---- */

typedef struct run {
    const ibid_reader *r;
    const ibid_answer_plan *p;
    ibid_answered *out;
    ibid_asked asked;
    ibid_decoder decoder;
    ibid_sampler *sampler;
    ibid_utf8_stream chars;
    ibid_buf piece; /* whole characters that were not handed on yet */
    float *logits;  /* of the question's last token; on the CPU of each */
    ibid_draw draw; /* where the device draws tokens: the next one, once drawn */
    bool drawn;
    float **mass; /* [1 + n_blocks]: the prefix has none */
} run;

static ibid_err check_context(const ibid_reader *r, const ibid_answer_plan *p) {
    size_t need = r->n_prefix + p->n_question + p->max_tokens;
    for (size_t b = 0; b < p->n_blocks; b++) need += p->blocks[b].layers[0].n_tokens;
    if (need <= r->model->n_ctx) return IBID_OK;
    return ibid_fail(IBID_CONTEXT,
                     "the request needs %zu tokens (%zu of them for the answer), the model's "
                     "context has %zu; use fewer blocks, or ask for a shorter answer",
                     need, p->max_tokens, r->model->n_ctx);
}

static ibid_err run_open(run *a) {
    const ibid_answer_plan *p = a->p;
    ibid_err e =
        ibid_sampler_open(a->r->model->n_vocab, p->temperature, p->top_p, p->seed, &a->sampler);
    if (e) return e;
    a->logits = ibid_alloc(a->r->model->n_vocab * sizeof *a->logits);
    a->mass = ibid_calloc(p->n_blocks + 1, sizeof *a->mass);
    if (!a->logits || !a->mass) return ibid_fail(IBID_NOMEM, "no memory for an answer");
    for (size_t b = 0; p->mass && b < p->n_blocks; b++) a->mass[b + 1] = p->mass[b];
    /* Before the first token, so that none allocates. */
    size_t room = p->max_tokens < ROOM_MAX / TOKEN_BYTES ? p->max_tokens * TOKEN_BYTES : ROOM_MAX;
    if ((e = ibid_buf_reserve(&a->out->text, room)) || (e = ibid_buf_reserve(&a->piece, HELD_MAX)))
        return e;
    return ibid_buf_reserve(&a->chars.held, HELD_MAX);
}

static ibid_err ask(run *a) {
    const ibid_answer_plan *p = a->p;
    ibid_question q = {.prefix = &a->r->prefix,
                       .blocks = p->blocks,
                       .n_blocks = p->n_blocks,
                       .tokens = p->question,
                       .n = p->n_question,
                       .share = p->share,
                       .will_select = p->select != NULL,
                       .ready = p->ready,
                       .ready_arg = p->arg};
    ibid_sched_enter(a->r->sched, true);
    ibid_err e =
        ibid_question_run(a->r->engine, &q, p->max_tokens, p->cancel, &a->asked, a->logits);
    ibid_sched_leave(a->r->sched);
    if (!e) a->out->recomputed_tokens = a->asked.choice.n_rows;
    return e;
}

static ibid_err step(run *a, int32_t token) {
    ibid_probe probe = {.heads = a->p->heads, .mass = a->mass, .n_rows = 1};
    uint32_t position = a->asked.position++;
    bool draws = ibid_engine_draws(a->r->engine);
    ibid_step s = {.seq = a->asked.seq,
                   .tokens = &token,
                   .positions = &position,
                   .n = 1,
                   .n_logits = 1,
                   .logits = a->logits,
                   .draw = draws ? &a->draw : NULL,
                   .probe = a->p->mass && a->p->n_blocks ? &probe : NULL,
                   .select = a->p->select};
    if (draws) {
        double u = a->p->temperature > 0 ? ibid_sampler_unit(a->sampler) : 0;
        a->draw = (ibid_draw){.temperature = (float)a->p->temperature,
                              .top_p = a->p->top_p > 0 ? (float)a->p->top_p : 1,
                              .uniform = u < BELOW_ONE ? (float)u : BELOW_ONE};
    }
    ibid_err e = ibid_sched_decode(a->r->sched, &a->decoder, a->r->engine, &s, a->p->cancel);
    a->drawn = !e && draws;
    return e;
}

/* The first one from the question's logits, the others where they were computed. */
static ibid_err next_token(run *a, int32_t *token) {
    if (!a->drawn) return ibid_sampler_pick(a->sampler, a->logits, token);
    *token = a->draw.token;
    return IBID_OK;
}

static bool ends_sentence(char c) {
    return c == '.' || c == '!' || c == '?' || c == '\n';
}

static bool is_gap(char c) {
    return ends_sentence(c) || c == ' ';
}

/* How the text goes on compared with its own earlier sentences: n bytes from s on, which follow the
 * end of a sentence. */
typedef enum likeness { NEW, BEGINS_AS_ONE, SAYS_ONE_AGAIN } likeness;

static likeness compare(const ibid_buf *text, const char *s, size_t n, bool end_of_text) {
    likeness is = NEW;
    while (n && is_gap(*s)) s++, n--;
    if (n == 0) return BEGINS_AS_ONE;
    for (size_t i = 0; i < text->len;) {
        while (i < text->len && is_gap(text->data[i])) i++;
        size_t end = i;
        while (end < text->len && !ends_sentence(text->data[end])) end++;
        size_t one = end - i, same = 0;
        while (same < one && same < n && text->data[i + same] == s[same]) same++;
        if (same == one && one >= REPEAT_MIN && (n == one ? end_of_text : ends_sentence(s[one])))
            return SAYS_ONE_AGAIN;
        if (same == n) is = BEGINS_AS_ONE;
        i = end;
    }
    return is;
}

static ibid_err hand_on(run *a) {
    ibid_err e =
        a->piece.len ? ibid_buf_append(&a->out->text, a->piece.data, a->piece.len) : IBID_OK;
    if (!e && a->piece.len && a->p->text) e = a->p->text(a->p->arg, a->piece.data, a->piece.len);
    ibid_buf_clear(&a->piece);
    return e;
}

/* Hands on what a token adds to the text. A sentence that begins like an earlier one is held back;
 * if it turns out to be the same one, small models are in a loop: it is dropped, and *over set. */
static ibid_err say(run *a, const char *bytes, size_t n, bool end, bool *over) {
    const ibid_buf *text = &a->out->text;
    ibid_err e = ibid_utf8_stream_put(&a->chars, bytes, n, end, &a->piece);
    if (e || a->piece.len == 0) return e;
    bool at_start =
        text->len && (ends_sentence(text->data[text->len - 1]) || ends_sentence(a->piece.data[0]));
    likeness is = at_start ? compare(text, a->piece.data, a->piece.len, end) : NEW;
    if (is == SAYS_ONE_AGAIN) {
        ibid_buf_clear(&a->piece);
        *over = true;
        return IBID_OK;
    }
    return is == BEGINS_AS_ONE && !end ? IBID_OK : hand_on(a);
}

static ibid_err decode(run *a) {
    const ibid_tokenizer *t = a->r->model->tokenizer;
    ibid_err e = IBID_OK;
    int32_t token;
    size_t n;
    bool over = false;
    a->out->finish = "length";
    while (!over && a->out->completion_tokens < a->p->max_tokens) {
        if ((e = next_token(a, &token))) return e;
        if (!a->out->first_token_ns) a->out->first_token_ns = ibid_now_ns();
        if (ibid_tokenizer_is_end(t, token)) {
            a->out->finish = "stop";
            break;
        }
        a->out->completion_tokens++;
        const char *bytes = ibid_token_bytes(t, token, &n);
        if (bytes && !ibid_token_is_control(t, token) && (e = say(a, bytes, n, false, &over)))
            return e;
        if (over) a->out->finish = "stop";
        if (over || a->out->completion_tokens == a->p->max_tokens) break;
        if (a->p->tick && (e = a->p->tick(a->p->arg))) return e;
        if ((e = step(a, token))) return e;
    }
    return say(a, "", 0, true, &over);
}

ibid_err ibid_answer_run(const ibid_reader *r, const ibid_answer_plan *p, ibid_answered *out) {
    run a = {.r = r, .p = p, .out = out};
    memset(out, 0, sizeof *out);
    out->finish = "stop";
    ibid_buf_init(&out->text, IBID_ANSWER_TEXT_MAX);
    ibid_buf_init(&a.piece, IBID_ANSWER_TEXT_MAX);
    ibid_utf8_stream_init(&a.chars);
    ibid_err e = check_context(r, p);
    if (!e) e = run_open(&a);
    if (!e) e = ask(&a);
    if (!e) e = decode(&a);
    ibid_decoder_leave(r->sched, &a.decoder);
    ibid_asked_close(&a.asked);
    ibid_sampler_close(a.sampler);
    ibid_utf8_stream_fini(&a.chars);
    ibid_buf_fini(&a.piece);
    ibid_free(a.logits);
    ibid_free(a.mass);
    return e;
}
