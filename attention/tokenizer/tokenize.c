/* Text to tokens: special tokens are cut out first (longest text first, as llama.cpp does), what
 * lies between them is cut into words, and the byte pairs of each word are merged. */
#include "attention/tokenizer/internal.h"

#include "rpc/base/mem.h"

#include <string.h>

/* Either one special token or, with id -1, text still to be cut. */
typedef struct fragment {
    size_t start, end;
    int32_t id;
} fragment;

typedef struct fragments {
    fragment *v;
    size_t n, room;
} fragments;

static ibid_err add_fragment(fragments *f, size_t start, size_t end, int32_t id) {
    if (start == end) return IBID_OK;
    if (f->n == f->room) {
        size_t room = f->room ? 2 * f->room : 8, bytes;
        fragment *v = NULL;
        if (ibid_mul_size(room, sizeof *v, &bytes)) v = ibid_realloc(f->v, bytes);
        if (!v) return ibid_fail(IBID_NOMEM, "out of memory for a text's parts");
        f->v = v;
        f->room = room;
    }
    f->v[f->n++] = (fragment){.start = start, .end = end, .id = id};
    return IBID_OK;
}

/* Cuts every occurrence of one special token out of the text fragments. */
static ibid_err cut_special(const char *text, fragments *from, fragments *to, int32_t id,
                            const char *needle, size_t n) {
    ibid_err e = IBID_OK;
    to->n = 0;
    for (size_t i = 0; i < from->n && !e; i++) {
        fragment f = from->v[i];
        if (f.id >= 0) {
            e = add_fragment(to, f.start, f.end, f.id);
            continue;
        }
        const char *hit;
        while (!e && (hit = memmem(text + f.start, f.end - f.start, needle, n))) {
            size_t at = (size_t)(hit - text);
            if (!(e = add_fragment(to, f.start, at, -1))) e = add_fragment(to, at, at + n, id);
            f.start = at + n;
        }
        if (!e) e = add_fragment(to, f.start, f.end, -1);
    }
    return e;
}

static ibid_err cut_specials(const ibid_tokenizer *t, const char *text, size_t n,
                             bool parse_special, fragments *out) {
    fragments spare = {0};
    ibid_err e = add_fragment(out, 0, n, -1);
    for (size_t i = 0; i < t->n_special && !e; i++) {
        int32_t id = t->special[i];
        size_t len;
        const char *needle = ibid_token_bytes(t, id, &len);
        if (!parse_special && t->kind[id] != IBIDI_KIND_USER) continue;
        if (len > n || !memmem(text, n, needle, len)) continue;
        e = cut_special(text, out, &spare, id, needle, len);
        fragments swap = *out;
        *out = spare;
        spare = swap;
    }
    ibid_free(spare.v);
    return e;
}

typedef struct output {
    ibid_token *v;
    size_t n, room;
    size_t end; /* bytes of the text that tokens cover */
} output;

/* Adds a token that covers everything up to end. */
static ibid_err add_token(output *o, int32_t id, size_t end) {
    if (o->n == o->room) {
        size_t room = o->room + o->room / 2, bytes;
        ibid_token *v = NULL;
        if (ibid_mul_size(room, sizeof *v, &bytes)) v = ibid_realloc(o->v, bytes);
        if (!v) return ibid_fail(IBID_NOMEM, "out of memory for %zu tokens", room);
        o->v = v;
        o->room = room;
    }
    o->v[o->n++] = (ibid_token){.id = id, .start = o->end, .end = end};
    o->end = end;
    return IBID_OK;
}

/* Bytes that the vocabulary lacks give no token: the one before covers them too (the first one
 * those before it), so that tokens still tile the text. */
static void cover(output *o, size_t end) {
    if (o->n == 0) return;
    o->v[o->n - 1].end = end;
    o->end = end;
}

static ibid_err add_word(const ibid_tokenizer *t, ibidi_bpe *b, const char *text, size_t start,
                         size_t end, output *o) {
    if (t->whole_words) {
        int32_t id = ibidi_word_find(t, text + start, end - start);
        if (id >= 0) return add_token(o, id, end);
    }
    ibid_err e = ibidi_bpe_merge(b, text + start, end - start);
    size_t n = end - start;
    for (size_t i = 0; i < n && !e;) {
        size_t next = i + 1;
        while (next < n && b->id[next] == -2) next++;
        if (b->id[i] >= 0)
            e = add_token(o, b->id[i], start + next);
        else
            cover(o, start + next);
        i = next;
    }
    return e;
}

static ibid_err add_fragment_tokens(const ibid_tokenizer *t, ibidi_bpe *b, const char *text,
                                    const fragment *f, output *o) {
    if (f->id >= 0) return add_token(o, f->id, f->end);
    ibid_err e = IBID_OK;
    ibidi_splitter s;
    ibidi_splitter_init(&s, t->pre, text + f->start, f->end - f->start);
    while (s.pos < s.n && !e) {
        size_t start = f->start + s.pos, end = f->start + ibidi_split_next(&s);
        e = add_word(t, b, text, start, end, o);
    }
    return e;
}

ibid_err ibid_tokenize(const ibid_tokenizer *t, const char *text, size_t n, bool parse_special,
                       ibid_token **out, size_t *n_out) {
    if (n > (size_t)1 << 31)
        return ibid_fail(IBID_TOOBIG, "a text of %zu bytes; at most 2 GiB are tokenized at once",
                         n);
    ibid_err e = IBID_NOMEM;
    fragments f = {0};
    output o = {.room = n / 4 + 16};
    ibidi_bpe b;
    ibidi_bpe_init(&b, t);
    if (!(o.v = ibid_alloc(o.room * sizeof *o.v))) {
        (void)ibid_fail(IBID_NOMEM, "out of memory for the tokens of %zu bytes", n);
        goto done;
    }
    if ((e = cut_specials(t, text, n, parse_special, &f))) goto done;
    for (size_t i = 0; i < f.n; i++)
        if ((e = add_fragment_tokens(t, &b, text, &f.v[i], &o))) goto done;
    *out = o.v;
    *n_out = o.n;
    o.v = NULL;
done:
    ibid_free(o.v);
    ibid_free(f.v);
    ibidi_bpe_fini(&b);
    return e;
}
