/* Inside of the span miner: words with their shape, and entities made of names. */
#ifndef IBID_RETRIEVER_SPANS_WORDS_H
#define IBID_RETRIEVER_SPANS_WORDS_H

#include "retriever/spans.h"

typedef enum ibidi_shape {
    IBIDI_SHAPE_OTHER, /* a script without case */
    IBIDI_SHAPE_LOWER,
    IBIDI_SHAPE_CAPITAL, /* Xxx, also McXxx */
    IBIDI_SHAPE_UPPER,   /* XX, X.X */
    IBIDI_SHAPE_INITIAL, /* X */
    IBIDI_SHAPE_MIXED,   /* xXx, Xxx.com */
    IBIDI_SHAPE_NUMBER,  /* begins with a digit */
    IBIDI_SHAPE_ADDRESS  /* a@b.c, http://... */
} ibidi_shape;

typedef enum ibidi_gap {                  /* what stands before a word */
                         IBIDI_GAP_SPACE, /* white space, perhaps behind an abbreviation's period */
                         IBIDI_GAP_COMMA,
                         IBIDI_GAP_AMPERSAND,
                         IBIDI_GAP_POSSESSIVE, /* white space behind 's */
                         IBIDI_GAP_OTHER,
                         IBIDI_GAP_QUOTE,
                         IBIDI_GAP_SENTENCE,
                         IBIDI_GAP_LINE
} ibidi_gap;

enum {                         /* flags */
       IBIDI_WORD_STARTS = 1,  /* a sentence, a line, a quotation: its capital tells little */
       IBIDI_WORD_HEADING = 2, /* in a line of capitalised words */
       IBIDI_WORD_POSSESSIVE = 4
};

typedef struct ibidi_text_word {
    uint64_t start, end; /* without 's */
    uint32_t id;         /* of its lower-case form, in this text */
    uint32_t lists;      /* ibidi_lexicon of it */
    uint8_t shape, gap, flags;
} ibidi_text_word;

typedef struct ibidi_word_stats { /* of a form, over the text */
    uint64_t hash;
    uint32_t lower, middle,
        starts; /* in lower case; capitalised inside sentences; at their start */
} ibidi_word_stats;

typedef struct ibidi_text_words {
    ibidi_text_word *v;
    size_t n, room;
    ibidi_word_stats *stats; /* [n_ids] */
    size_t n_ids, room_ids;
    uint32_t *slots; /* open addressing: id + 1 */
    size_t n_slots;
} ibidi_text_words;

ibid_err ibidi_text_words_split(ibid_str text, ibidi_text_words *out);
void ibidi_text_words_fini(ibidi_text_words *w);

/* Groups the names (all of out's spans; span i has words first[i] to last[i]) into entities. */
ibid_err ibidi_entities_find(ibid_str text, const ibidi_text_words *w, const size_t *first,
                             const size_t *last, ibidi_spans *out);
/* Sorts by start, longer first, entities' references along. */
ibid_err ibidi_spans_order(ibidi_spans *s);
#endif
