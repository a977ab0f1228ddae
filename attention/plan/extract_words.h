/* A text as spans see it: sentences of words, what each word is, and where a span of them may begin
 * and end (extract.h). Pure. */
#ifndef IBID_ATTENTION_EXTRACT_WORDS_H
#define IBID_ATTENTION_EXTRACT_WORDS_H

#include "attention/plan/extract.h"

enum { IBIDI_PARTS_MAX = 4 };

enum { /* what a word is */
       IS_WORD = 1 << 0,
       STOP = 1 << 1,
       ARTICLE = 1 << 2,
       PREP = 1 << 3,
       JOINS = 1 << 4, /* and, or */
       VERB = 1 << 5,  /* is, has, which, ... : a span that runs over one is rather a clause */
       CAPITAL = 1 << 6,
       DIGIT = 1 << 7,
       YEAR = 1 << 8,
       CALENDAR = 1 << 9,
       NUMERAL = 1 << 10,
       UNIT = 1 << 11,
       LY = 1 << 12,
       PARTICIPLE = 1 << 13,
       BREAKS = 1 << 14, /* punctuation that no span runs over */
       LEADS = 1 << 15,  /* the, is, and, ... : no span begins with it but inside a name */
       MONTH = 1 << 16,
       MEASURE = 1 << 17, /* metres, percent, million, BC, ... : belongs to the number before it */
       INITIAL = 1 << 18, /* "J." */
       COMMA = 1 << 19,
       CURRENCY = 1 << 20, /* "$" on its own */
       IN = 1 << 21,       /* in, at, ... : says nothing of its own before an answer */
};

enum { /* what a quantity is of; a question may ask for several */
       OF_LENGTH = 1,
       OF_TIME = 2,
       OF_MONEY = 4,
       OF_SHARE = 8,
       OF_WEIGHT = 16,
};

typedef struct ibidi_word {
    size_t start, end;
    unsigned is;
    unsigned measures;              /* what the word is a measure of: metres, $5, 3% */
    uint64_t part[IBIDI_PARTS_MAX]; /* stems: "well-known" has two */
    size_t n_parts;
    double hit; /* weight of the question's word it is, or 0 */
} ibidi_word;

typedef struct ibidi_text_sentence {
    size_t text, word0, n_words, start, end;
    double evidence;
} ibidi_text_sentence;

typedef struct ibidi_text_words { /* of all texts */
    ibidi_word *w;
    size_t n_words, word_room;
    ibidi_text_sentence *s;
    size_t n, room;
} ibidi_text_words;

/* Appends a text's sentences. Errors: NOMEM. */
ibid_err ibidi_text_words_read(ibidi_text_words *p, size_t number, ibid_str text);
void ibidi_text_words_fini(ibidi_text_words *p);
/* The word or mark at `at`, which is no white space. end: of its sentence. */
ibidi_word ibidi_word_at(const char *text, size_t at, size_t end);

typedef struct ibidi_cuts {
    bool parts;  /* the question asks for a part of a date */
    bool manner; /* or how something is done: "by boat" */
    bool whose;  /* or whose: "Barnes's" */
} ibidi_cuts;

/* Whether a span may be words [i, j] of the n of a sentence: it begins and ends with a word of
 * content, keeps a number with its unit and a date whole, and holds more than words of the question
 * and a verb at either end. */
bool ibidi_cut_well(const ibidi_word *w, size_t n, size_t i, size_t j, const ibidi_cuts *c);
/* Where a span that ends with the word ends in the text: before a possessive's 's. */
size_t ibidi_cut_end(const char *text, const ibidi_word *w);

/* Whether a list of words, a space on both sides of each, has this one. */
bool ibidi_listed(const char *list, const char *w, size_t n);
/* Lower case into out, at most room bytes. */
size_t ibidi_lower(const char *s, size_t n, char *out, size_t room);
static inline bool ibidi_is_space(char c) {
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}
#endif
