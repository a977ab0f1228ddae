#include "rpc/front/eval/needles.h"
#include "rpc/front/files.h"

#include <stdio.h>
#include <string.h>

enum { FILE_MAX = 16 << 20 };

/* needles.txt, written as C by CMake. */
extern const unsigned char ibidi_needles_text[];
extern const size_t ibidi_needles_text_size;

void ibidi_needles_fini(ibidi_needles *n) {
    ibid_free(n->text);
    ibid_free(n->facts);
    ibid_free(n->threads);
    *n = (ibidi_needles){0};
}

struct parse {
    const char *name;
    size_t line, have; /* have: lines of the group in hand */
    const char *marks; /* of that group: "SON" or "ABT" */
    ibid_str part[3];
};

static ibid_err bad(const struct parse *p, const char *what) {
    return ibid_fail(IBID_INVAL, "%s:%zu: %s", p->name, p->line, what);
}

/* The end of a group of three lines. */
static ibid_err end_group(struct parse *p, ibidi_needles *n) {
    if (p->have == 0) return IBID_OK;
    if (p->have < 3)
        return bad(p, "a group ends early; it is S, O and N, or A, B and T, one line each");
    p->have = 0;
    if (p->marks[0] == 'S')
        n->facts[n->n_facts++] = (ibidi_fact){p->part[0], p->part[1], p->part[2]};
    else
        n->threads[n->n_threads++] = (ibidi_thread){p->part[0], p->part[1], p->part[2]};
    return IBID_OK;
}

static ibid_err add_line(struct parse *p, ibid_str line, ibidi_needles *n) {
    while (line.n && (line.s[line.n - 1] == '\r' || line.s[line.n - 1] == ' ')) line.n--;
    if (line.n == 0) return end_group(p, n);
    if (line.s[0] == '#') return IBID_OK;
    if (p->have == 3) return bad(p, "an empty line must part two groups");
    if (p->have == 0) p->marks = line.s[0] == 'A' ? "ABT" : "SON";
    if (line.n < 4 || line.s[1] != ':' || line.s[2] != ' ' || line.s[0] != p->marks[p->have])
        return bad(p, "not the next line of a group: S:, O: and N:, or A:, B: and T:, with a text");
    p->part[p->have++] = (ibid_str){line.s + 3, line.n - 3};
    return IBID_OK;
}

ibid_err ibidi_needles_read(const char *path, ibidi_needles *out) {
    ibid_buf b;
    struct parse p = {.name = path ? path : "the built-in needles"};
    size_t lines = 1;
    *out = (ibidi_needles){0};
    ibid_buf_init(&b, FILE_MAX);
    ibid_err e = path ? ibidi_append_file(path, &b)
                      : ibid_buf_append(&b, ibidi_needles_text, ibidi_needles_text_size);
    for (size_t i = 0; !e && i < b.len; i++) lines += b.data[i] == '\n';
    if (!e) {
        out->facts = ibid_calloc(lines / 3 + 1, sizeof *out->facts);
        out->threads = ibid_calloc(lines / 3 + 1, sizeof *out->threads);
        if (!out->facts || !out->threads) e = IBID_NOMEM;
    }
    for (size_t at = 0; !e && at < b.len;) {
        const char *nl = memchr(b.data + at, '\n', b.len - at);
        size_t end = nl ? (size_t)(nl - b.data) : b.len;
        p.line++;
        e = add_line(&p, (ibid_str){b.data + at, end - at}, out);
        at = end + 1;
    }
    p.line++;
    if (!e) e = end_group(&p, out);
    if (!e && out->n_facts == 0) e = ibid_fail(IBID_INVAL, "%s: no needles in it", p.name);
    if (e)
        ibid_buf_fini(&b), ibidi_needles_fini(out);
    else
        out->text = b.data;
    return e;
}
