/* Pre-tokenizers: text is cut into words that byte pairs are then merged in. Each family is a
 * regular expression in its model's tokenizer; here they are written out by hand over Unicode
 * classes, so that every step is linear and nothing can backtrack. Source: the expressions in
 * llama.cpp's vocabulary loader, whose reading of them is what GGUF files are made for. Where a
 * family applies several expressions, each one cuts the words of the one before it, matches and
 * what lies between them alike. */
#include "attention/tokenizer/internal.h"

typedef struct code {
    uint32_t cp;
    ibidi_class cls;
    size_t len;
} code;

static code at(const ibidi_splitter *s, size_t pos, size_t end) {
    code c = {.cp = UINT32_MAX, .cls = IBIDI_NONE};
    if (pos >= end) return c;
    c.cp = ibidi_utf8_decode(s->text + pos, end - pos, &c.len);
    c.cls = ibidi_unicode_class(c.cp);
    return c;
}

/* Neither space, letter nor number. */
static bool is_mark(ibidi_class c) {
    return c == IBIDI_PUNCT || c == IBIDI_OTHER;
}

static bool same_group(ibidi_class a, ibidi_class b) {
    return a == b || (is_mark(a) && is_mark(b));
}

/* The end of the run of one group ('letters', 'numbers' or 'marks') at pos. */
static size_t run_end(const ibidi_splitter *s, size_t pos, size_t end, ibidi_class group) {
    for (code c = at(s, pos, end); c.cls != IBIDI_NONE && same_group(c.cls, group);
         c = at(s, pos, end))
        pos += c.len;
    return pos;
}

/* Bytes of an English contraction ('s 't 'm 'd 're 've 'll) at pos, or 0. */
static size_t contraction(const ibidi_splitter *s, size_t pos, size_t end, bool any_case) {
    char a = 0, b = 0;
    if (s->text[pos] != '\'') return 0;
    if (pos + 1 < end) a = s->text[pos + 1];
    if (pos + 2 < end) b = s->text[pos + 2];
    if (any_case && a >= 'A' && a <= 'Z') a = (char)(a + 32);
    if (any_case && b >= 'A' && b <= 'Z') b = (char)(b + 32);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    return 0;
}

/* A run of spaces at pos: all of it at the end, else all but its last (which joins the next word if
 * it can), but at least one. With by_line, everything up to the last line end in it comes first. */
static size_t spaces_end(const ibidi_splitter *s, size_t pos, size_t end, bool by_line) {
    size_t next = pos, last = pos, line_end = 0;
    for (code c = at(s, next, end); c.cls == IBIDI_SPACE; c = at(s, next, end)) {
        last = next;
        next += c.len;
        if (c.cp == '\r' || c.cp == '\n') line_end = next;
    }
    if (by_line && line_end) return line_end;
    return next == end || last == pos ? next : last;
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t gpt2_end(const ibidi_splitter *s, size_t pos, size_t end) {
    size_t short_end = contraction(s, pos, end, false);
    if (short_end) return pos + short_end;
    code c = at(s, pos, end);
    size_t first = pos;
    if (c.cp == ' ') {
        first += c.len;
        c = at(s, first, end);
    }
    if (c.cls == IBIDI_SPACE || c.cls == IBIDI_NONE) return spaces_end(s, pos, end, false);
    return run_end(s, first, end, c.cls);
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|
 * \s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t llama3_end(const ibidi_splitter *s, size_t pos, size_t end, size_t digits) {
    size_t short_end = contraction(s, pos, end, true);
    if (short_end) return pos + short_end;
    code c = at(s, pos, end), next = at(s, pos + c.len, end);
    bool line = c.cp == '\r' || c.cp == '\n';
    if (c.cls == IBIDI_LETTER || (!line && c.cls != IBIDI_NUMBER && next.cls == IBIDI_LETTER))
        return run_end(s, pos + c.len, end, IBIDI_LETTER);
    if (c.cls == IBIDI_NUMBER) {
        for (size_t i = 0; i < digits && c.cls == IBIDI_NUMBER; i++) {
            pos += c.len;
            c = at(s, pos, end);
        }
        return pos;
    }
    size_t first = c.cp == ' ' ? pos + c.len : pos;
    if (is_mark(c.cp == ' ' ? next.cls : c.cls)) {
        pos = run_end(s, first, end, IBIDI_OTHER);
        while (pos < end && (s->text[pos] == '\r' || s->text[pos] == '\n')) pos++;
        return pos;
    }
    return spaces_end(s, pos, end, true);
}

/* SMOLLM's first expression, \p{N}: each number alone, the rest between them. */
static void next_smollm_part(ibidi_splitter *s) {
    code c = at(s, s->pos, s->n);
    s->part_cut = c.cls == IBIDI_NUMBER;
    s->part_end = s->pos;
    do {
        s->part_end += c.len;
        c = at(s, s->part_end, s->n);
    } while (!s->part_cut && c.cls != IBIDI_NUMBER && c.cls != IBIDI_NONE);
}

static bool is_default_punct(code c) {
    switch (c.cp) {
    case '$':
    case '+':
    case '<':
    case '=':
    case '>':
    case '^':
    case '~':
    case '|':
        return true;
    default:
        return c.cls == IBIDI_PUNCT;
    }
}

/* DEFAULT's first expression, [\p{P}\$\+<=>\^~\|]+. */
static void next_default_part(ibidi_splitter *s) {
    code c = at(s, s->pos, s->n);
    bool punct = is_default_punct(c);
    s->part_end = s->pos;
    do {
        s->part_end += c.len;
        c = at(s, s->part_end, s->n);
    } while (c.cls != IBIDI_NONE && is_default_punct(c) == punct);
}

static bool three_digits(const ibidi_splitter *s, size_t pos, size_t end) {
    for (size_t i = pos; i < pos + 3; i++)
        if (i >= end || s->text[i] < '0' || s->text[i] > '9') return false;
    return true;
}

/* DEFAULT's later expressions: GPT-2's; then \p{N}+ apart from what is not; then ASCII digits by
 * threes from the left. */
static size_t default_end(ibidi_splitter *s) {
    if (s->pos == s->word_end) s->word_end = gpt2_end(s, s->pos, s->part_end);
    if (s->pos == s->run_end) {
        code c = at(s, s->pos, s->word_end);
        bool number = c.cls == IBIDI_NUMBER;
        do {
            s->run_end += c.len;
            c = at(s, s->run_end, s->word_end);
        } while (c.cls != IBIDI_NONE && (c.cls == IBIDI_NUMBER) == number);
    }
    if (three_digits(s, s->pos, s->run_end)) return s->pos + 3;
    size_t end = s->pos + 1;
    while (end < s->run_end && !three_digits(s, end, s->run_end)) end++;
    return end;
}

void ibidi_splitter_init(ibidi_splitter *s, ibidi_pre pre, const char *text, size_t n) {
    *s = (ibidi_splitter){.pre = pre, .text = text, .n = n};
    if (pre != IBIDI_PRE_SMOLLM && pre != IBIDI_PRE_DEFAULT) s->part_end = n;
}

size_t ibidi_split_next(ibidi_splitter *s) {
    if (s->pos == s->part_end && s->pre == IBIDI_PRE_SMOLLM) next_smollm_part(s);
    if (s->pos == s->part_end && s->pre == IBIDI_PRE_DEFAULT) next_default_part(s);
    switch (s->pre) {
    case IBIDI_PRE_GPT2:
        s->pos = gpt2_end(s, s->pos, s->part_end);
        break;
    case IBIDI_PRE_SMOLLM:
        s->pos = s->part_cut ? s->part_end : gpt2_end(s, s->pos, s->part_end);
        break;
    case IBIDI_PRE_DEFAULT:
        s->pos = default_end(s);
        break;
    case IBIDI_PRE_LLAMA3:
        s->pos = llama3_end(s, s->pos, s->part_end, 3);
        break;
    case IBIDI_PRE_QWEN2:
        s->pos = llama3_end(s, s->pos, s->part_end, 1);
        break;
    }
    return s->pos;
}
