#include "attention/plan/extract_words.h"
#include "attention/plan/chars.h"

#include "rpc/base/mem.h"

#include <string.h>
#include <utf8proc.h>

/* ---- Lists of words; lower case, a space on both sides of each ---- */

static const char stop_words[] =
    " a an the of in on at to for from by with and or but as is are was were be been being it its "
    "this that these those which who whom whose what when where why how do does did has have had "
    "not no than then their his her they he she we you i there also into over under about after "
    "before between during such can could may might would will should shall must if so because "
    "while up out only other some any each both more most very just our your my them him us one "
    "all many much same s t ";
static const char prepositions[] =
    " of in on at to for from by with as into over under about after before between during than ";
static const char verbs[] = " is was are were has had have be been which that who ";
static const char months[] =
    " january february march april may june july august september october november december ";
static const char other_calendar[] =
    " monday tuesday wednesday thursday friday saturday sunday century centuries ";
static const char numerals[] =
    " one two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty "
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen half "
    "third quarter first second ";
static const char counted[] = " people students species ";
/* What a number is of: it is no whole answer without them. */
static const char measures[] =
    " % percent percentage million billion trillion thousand hundred dozen dollar dollars euro "
    "euros "
    "cent cents pence yen franc francs mark marks ruble rubles rupee rupees usd eur gbp mm cm km "
    "millimetres millimeters centimetres centimeters metre meter metres meters kilometre kilometer "
    "kilometres kilometers inch inches foot feet ft yard yards mile miles mi acre acres hectare "
    "hectares ha square cubic nautical nanometres nanometers gram grams kg kilogram kilograms "
    "milligrams mg tonne tonnes ton tons pound pounds lb lbs ounce ounces oz litre liter litres "
    "liters gallon gallons barrels second seconds minute minutes hour hours day days week weeks "
    "month months year years decade decades century centuries millennia mph kph knots degree "
    "degrees "
    "celsius fahrenheit kelvin watt watts kw mw gw megawatts kilowatts gigawatts volt volts "
    "amperes "
    "hertz hz khz mhz ghz joules newtons pascals bytes kb mb gb tb megabytes gigabytes bits "
    "horsepower bc bce ad ce am pm a.m a.m. p.m p.m. ";
/* A span never begins with these, unless they begin a name. */
static const char leads[] =
    " a an the and or but nor is are was were be been being am do does did has have had can could "
    "may might would will should shall must than then that which who whom whose where when if so "
    "because while as of it its he she they we you i this these those his her their his our your "
    "my there also ";

bool ibidi_listed(const char *list, const char *w, size_t n) {
    char key[40];
    if (n == 0 || n > sizeof key - 3) return false;
    key[0] = ' ';
    memcpy(key + 1, w, n);
    key[n + 1] = ' ';
    key[n + 2] = '\0';
    return strstr(list, key) != NULL;
}

/* ---- Characters ---- */

static bool is_money(int32_t c) {
    return c == '$' || c == '%' || c == 0xA3 || c == 0x20AC;
}

static bool is_upper(int32_t c) {
    return c >= 0 && utf8proc_category(c) == UTF8PROC_CATEGORY_LU;
}

/* Between letters these join a word: 3.5, it's, well-known, 2010/11. */
static bool joins(int32_t c) {
    return c == '.' || c == ',' || c == '\'' || c == '-' || c == '/' || c == 0x2019 || c == 0x2013;
}

static const char into[] = " of in on at to from by with for into as ";
static const char lengths[] =
    " mm cm km millimetres millimeters centimetres centimeters metre meter metres meters kilometre "
    "kilometer kilometres kilometers inch inches foot feet ft yard yards mile miles mi nautical ";
static const char times[] =
    " second seconds minute minutes hour hours day days week weeks month months year years decade "
    "decades century centuries millennia ";
static const char moneys[] = " dollar dollars euro euros cents pence yen franc francs mark marks "
                             "ruble rubles rupee rupees usd "
                             "eur gbp ";
static const char shares[] = " % percent percentage per ";
static const char weights[] = " gram grams kg kilogram kilograms milligrams mg tonne tonnes ton "
                              "tons pounds lb lbs ounce ounces "
                              "oz ";

static unsigned measures_of(int32_t first, const char *low, size_t n) {
    unsigned m = 0;
    if (ibidi_listed(lengths, low, n)) m |= OF_LENGTH;
    if (ibidi_listed(times, low, n)) m |= OF_TIME;
    if (ibidi_listed(moneys, low, n) || (is_money(first) && first != '%')) m |= OF_MONEY;
    if (ibidi_listed(shares, low, n) || (n > 1 && low[n - 1] == '%')) m |= OF_SHARE;
    if (ibidi_listed(weights, low, n)) m |= OF_WEIGHT;
    return m;
}

static bool all_capitals(const char *s, size_t n) {
    size_t len;
    for (size_t at = 0; at < n; at += len)
        if (!is_upper(ibidi_char_at(s + at, n - at, &len))) return false;
    return true;
}

size_t ibidi_lower(const char *s, size_t n, char *out, size_t room) {
    size_t at = 0, k = 0, len;
    while (at < n && k + 4 <= room) {
        int32_t c = ibidi_char_at(s + at, n - at, &len);
        at += len;
        if (c < 0) continue;
        utf8proc_ssize_t put =
            utf8proc_encode_char(utf8proc_tolower(c), (utf8proc_uint8_t *)(out + k));
        k += put > 0 ? (size_t)put : 0;
    }
    return k;
}

static bool ends_with(const char *w, size_t n, const char *suffix) {
    size_t k = strlen(suffix);
    return n >= k && memcmp(w + n - k, suffix, k) == 0;
}

/* A rough stem: enough to see that "invaded" and "invasion" may differ and "invades" does not. */
static uint64_t stem_of(const char *w, size_t n) {
    static const char *const suffixes[] = {"ations", "ation", "ings", "ing", "ies",
                                           "ed",     "es",    "s",    "ly",  "e"};
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        if (!ends_with(w, n, suffixes[i]) || n - strlen(suffixes[i]) < 3) continue;
        n -= strlen(suffixes[i]);
        break;
    }
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)w[i]) * UINT64_C(0x100000001b3);
    return h;
}

/* ---- Words ---- */

static bool is_year(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (s[i] < '0' || s[i] > '9') return false;
    return n == 4 && (s[0] == '1' || (s[0] == '2' && s[1] == '0'));
}

static void classify(ibidi_word *w, const char *text) {
    char low[256];
    const char *s = text + w->start;
    size_t bytes = w->end - w->start, n, len;
    int32_t c = ibidi_char_at(s, bytes, &len);
    if (!ibidi_is_word_char(c) && !is_money(c)) {
        w->is = c == ',' ? COMMA
                : strchr(";:()\".?!", c < 128 && c > 0 ? c : ' ') || c == 0x201C || c == 0x201D
                    ? BREAKS
                    : 0;
        return;
    }
    n = ibidi_lower(s, bytes, low, sizeof low);
    bool capital = is_upper(c), may = n == 3 && memcmp(low, "may", 3) == 0;
    w->is = IS_WORD;
    if (!(may && capital) && ibidi_listed(stop_words, low, n)) w->is |= STOP;
    if (ibidi_listed(" a an the ", low, n)) w->is |= ARTICLE;
    if (ibidi_listed(prepositions, low, n)) w->is |= PREP;
    if (ibidi_listed(" and or ", low, n)) w->is |= JOINS;
    if (ibidi_listed(verbs, low, n)) w->is |= VERB;
    if (ibidi_listed(months, low, n) && !(may && !capital)) w->is |= CALENDAR | MONTH;
    if (ibidi_listed(other_calendar, low, n)) w->is |= CALENDAR;
    if (ibidi_listed(numerals, low, n)) w->is |= NUMERAL;
    if (ibidi_listed(measures, low, n)) w->is |= UNIT | MEASURE;
    if (ibidi_listed(counted, low, n)) w->is |= UNIT;
    if (!(may && capital) && ibidi_listed(leads, low, n)) w->is |= LEADS;
    if (capital && n == 2 && low[1] == '.') w->is |= INITIAL;
    if (is_money(c) && c != '%' && bytes == len) w->is |= CURRENCY;
    if (capital) w->is |= CAPITAL;
    if (ibidi_listed(into, low, n)) w->is |= IN;
    w->measures = measures_of(c, low, n);
    if ((c >= '0' && c <= '9') || (is_money(c) && c != '%')) w->is |= DIGIT;
    if (is_year(s, bytes)) w->is |= YEAR;
    if (ends_with(low, n, "ly")) w->is |= LY;
    if (ends_with(low, n, "ed") || ends_with(low, n, "ing")) w->is |= PARTICIPLE;
    for (size_t at = 0; at < n && w->n_parts < IBIDI_PARTS_MAX;) {
        size_t from = at;
        while (at < n && ibidi_is_word_char(ibidi_char_at(low + at, n - at, &len))) at += len;
        if (at > from)
            w->part[w->n_parts++] = stem_of(low + from, at - from);
        else
            at += len;
    }
}

static bool is_abbreviation(const char *text, size_t start, size_t dot) {
    static const char known[] =
        " mr mrs ms dr st no vs jr sr lt col ca cf prof mt gen gov sen rep rev capt ";
    char low[16];
    size_t at = dot;
    while (at > start && !ibidi_is_space(text[at - 1]) && text[at - 1] != '(') at--;
    if (dot - at == 1 && text[at] >= 'A' && text[at] <= 'Z') return true;
    if (dot - at >= 3 && dot - at <= 7 && text[dot - 2] == '.') return true; /* "U.S" */
    return dot - at < 8 &&
           ibidi_listed(known, low, ibidi_lower(text + at, dot - at, low, sizeof low));
}

/* The full stop of an abbreviation belongs to it, except at the end of a sentence ("No." the only
 * word of one, "Barnes and J. Brown, Jr."): there it may be either. */
ibidi_word ibidi_word_at(const char *text, size_t at, size_t end) {
    ibidi_word w = {.start = at};
    size_t len, next_len;
    int32_t c = ibidi_char_at(text + at, end - at, &len);
    at += len;
    if (ibidi_is_word_char(c) || is_money(c)) {
        while (at < end) {
            c = ibidi_char_at(text + at, end - at, &len);
            bool go = ibidi_is_word_char(c) || is_money(c);
            if (!go && joins(c) && at + len < end) {
                int32_t d = ibidi_char_at(text + at + len, end - at - len, &next_len);
                go = ibidi_is_word_char(d) || d == '%';
            }
            if (!go) break;
            at += len;
        }
    }
    if (at + 1 < end && at > w.start && text[at] == '.' && is_abbreviation(text, w.start, at)) at++;
    w.end = at;
    classify(&w, text);
    return w;
}

static ibid_err grow(void **p, size_t *room, size_t n, size_t size) {
    size_t want = *room ? 2 * *room : 256, bytes;
    if (n < *room) return IBID_OK;
    void *q = ibid_mul_size(want, size, &bytes) ? ibid_realloc(*p, bytes) : NULL;
    if (!q) return ibid_fail(IBID_NOMEM, "no memory to look for spans");
    *p = q;
    *room = want;
    return IBID_OK;
}

/* ---- Sentences ---- */

static size_t sentence_end(const char *t, size_t start, size_t end) {
    size_t len;
    for (size_t at = start; at < end; at++) {
        if (t[at] == '\n') return at + 1;
        if (end - at >= 3 &&
            (memcmp(t + at, "\xE3\x80\x82", 3) == 0 || memcmp(t + at, "\xEF\xBC\x9F", 3) == 0))
            return at + 3;
        if (t[at] != '.' && t[at] != '!' && t[at] != '?') continue;
        size_t after = at + 1;
        while (after < end &&
               (t[after] == '"' || t[after] == '\'' || t[after] == ')' || t[after] == ']'))
            after++;
        if (after == end) return end;
        if (!ibidi_is_space(t[after]) || (t[at] == '.' && is_abbreviation(t, start, at))) continue;
        while (after < end && ibidi_is_space(t[after])) after++;
        if (after == end) return end;
        int32_t c = ibidi_char_at(t + after, end - after, &len);
        if (ibidi_is_word_char(c) && !is_upper(c) && !(c >= '0' && c <= '9') && c < 0x250) continue;
        return after;
    }
    return end;
}

/* What a word is beside its neighbours. */
static void look_around(const char *text, ibidi_word *w, size_t n) {
    for (size_t k = 1; k < n; k++) {
        if (w[k].is & CAPITAL) w[k].is &= ~(unsigned)VERB; /* in a title */
        bool one = w[k].end - w[k].start == 1, named = w[k - 1].is & CAPITAL;
        char c = text[w[k].start];
        /* "vitamin A", "Elizabeth I" */
        if (one && (c == 'A' || (c == 'I' && named)))
            w[k].is &= ~(unsigned)(STOP | ARTICLE | LEADS);
        /* "US", "WHO" */
        if (w[k].end - w[k].start > 1 && all_capitals(text + w[k].start, w[k].end - w[k].start))
            w[k].is &= ~(unsigned)(STOP | LEADS | IN | VERB | PREP | JOINS);
    }
    for (size_t k = 0; k + 1 < n; k++) {
        ibid_str a = {text + w[k].start, w[k].end - w[k].start};
        ibid_str b = {text + w[k + 1].start, w[k + 1].end - w[k + 1].start};
        if (a.n == 3 && b.n == 4 && memcmp(a.s, "per", 3) == 0 && memcmp(b.s, "cent", 4) == 0)
            w[k].is |= UNIT | MEASURE;
    }
}

static ibid_err add_sentence(ibidi_text_words *p, size_t number, const char *t, size_t start,
                             size_t end) {
    while (end > start && ibidi_is_space(t[end - 1])) end--;
    ibidi_text_sentence s = {.text = number, .word0 = p->n_words, .start = start, .end = end};
    for (size_t at = start; at < end;) {
        if (ibidi_is_space(t[at])) {
            at++;
            continue;
        }
        ibid_err e = grow((void **)&p->w, &p->word_room, p->n_words, sizeof *p->w);
        if (e) return e;
        p->w[p->n_words] = ibidi_word_at(t, at, end);
        at = p->w[p->n_words++].end;
    }
    s.n_words = p->n_words - s.word0;
    if (s.n_words == 0) return IBID_OK;
    look_around(t, p->w + s.word0, s.n_words);
    ibid_err e = grow((void **)&p->s, &p->room, p->n, sizeof *p->s);
    if (!e) p->s[p->n++] = s;
    return e;
}

ibid_err ibidi_text_words_read(ibidi_text_words *p, size_t number, ibid_str t) {
    ibid_err e = IBID_OK;
    for (size_t at = 0; !e && at < t.n;) {
        while (at < t.n && ibidi_is_space(t.s[at])) at++;
        if (at == t.n) break;
        size_t end = sentence_end(t.s, at, t.n);
        e = add_sentence(p, number, t.s, at, end);
        at = end > at ? end : at + 1;
    }
    return e;
}

void ibidi_text_words_fini(ibidi_text_words *p) {
    ibid_free(p->w);
    ibid_free(p->s);
    memset(p, 0, sizeof *p);
}
