/* Where a span may begin and end. */
#include "attention/plan/chars.h"
#include "attention/plan/extract_words.h"

#include <string.h>

static bool is_number(const ibidi_word *w) {
    return (w->is & (DIGIT | NUMERAL)) != 0;
}

static bool is_day(const ibidi_word *w) {
    return w->is & DIGIT && !(w->is & YEAR) && w->end - w->start <= 4;
}

/* Whether words k and k + 1 are parts of one quantity, or of one name. */
static bool one_quantity(const ibidi_word *w, size_t k) {
    const ibidi_word *a = &w[k], *b = &w[k + 1];
    if (a->is & CURRENCY && is_number(b)) return true;
    if (is_number(a) && b->is & MEASURE) return !(b->hit > 0); /* "How many metres": 31 will do */
    if (a->is & MEASURE && b->is & MEASURE) return k > 0 && is_number(&w[k - 1]);
    if (a->is & NUMERAL && b->is & NUMERAL) return true;
    if (a->is & INITIAL && b->is & CAPITAL) return true;
    return false;
}

static bool one_date(const ibidi_word *w, size_t n, size_t k) {
    const ibidi_word *a = &w[k], *b = &w[k + 1];
    if (a->is & MONTH && b->is & DIGIT) return true;
    if (is_day(a) && b->is & MONTH) return true;
    if (b->is & COMMA && k > 0 && k + 2 < n)
        return w[k - 1].is & MONTH && is_day(a) && w[k + 2].is & YEAR;
    if (a->is & COMMA && k > 1) return w[k - 2].is & MONTH && is_day(&w[k - 1]) && b->is & YEAR;
    return false;
}

/* "The tower is 31 metres" where the question speaks of the tower: all that is asked about stands
 * on one side of a verb. */
static bool asked_over_verb(const ibidi_word *w, size_t i, size_t j) {
    for (size_t k = i; k <= j; k++) {
        bool before = true, after = true;
        if (!(w[k].is & VERB)) continue;
        for (size_t x = i; x < k; x++)
            before = before && (!(w[x].is & IS_WORD) || w[x].is & STOP || w[x].hit > 0);
        for (size_t x = k + 1; x <= j; x++)
            after = after && (!(w[x].is & IS_WORD) || w[x].is & STOP || w[x].hit > 0);
        if (before || after) return true;
    }
    return false;
}

/* A date is whole, or one word of it where the question asks for a part. */
static bool date_well(const ibidi_word *w, size_t n, size_t i, size_t j, bool parts) {
    bool before = i > 0 && one_date(w, n, i - 1), after = j + 1 < n && one_date(w, n, j);
    if (!before && !after) return true;
    if (!parts) return false;
    return !(before && i < j && one_date(w, n, i)) && !(after && i < j && one_date(w, n, j - 1));
}

bool ibidi_cut_well(const ibidi_word *w, size_t n, size_t i, size_t j, const ibidi_cuts *c) {
    if (!(w[i].is & IS_WORD) || !(w[j].is & IS_WORD) || w[j].is & STOP) return false;
    /* "The Hague", but not at the beginning of a sentence */
    bool name = i > 0 && i < j && w[i].is & CAPITAL && w[i + 1].is & CAPITAL;
    if (w[i].is & LEADS && !name) return false;
    if (w[i].is & IN && !c->manner && !name) return false;
    if (i > 0 && one_quantity(w, i - 1)) return false;
    if (j + 1 < n && one_quantity(w, j)) return false;
    return date_well(w, n, i, j, c->parts) && !asked_over_verb(w, i, j);
}

size_t ibidi_cut_end(const char *text, const ibidi_word *w) {
    static const char *const owns[] = {"'s", "\xE2\x80\x99s"};
    for (size_t i = 0; i < sizeof owns / sizeof *owns; i++) {
        size_t n = strlen(owns[i]);
        if (w->end - w->start > n && memcmp(text + w->end - n, owns[i], n) == 0) return w->end - n;
    }
    return w->end;
}
