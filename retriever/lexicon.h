/* Small closed lists of English: the words that tell what a capital or a name means. Pure. */
#ifndef IBID_RETRIEVER_LEXICON_H
#define IBID_RETRIEVER_LEXICON_H

#include "rpc/base/err.h"

#include <stdbool.h>
#include <stddef.h>

enum {
    IBIDI_LEX_FUNCTION = 1 << 0, /* begins sentences, is no name: pronouns, adverbs, verbs ... */
    IBIDI_LEX_TITLE = 1 << 1,    /* before a person's name: Mr, President, coach */
    IBIDI_LEX_ORG = 1 << 2,      /* in names of organisations: University, Inc */
    IBIDI_LEX_PLACE = 1 << 3,    /* in names of places: County, River */
    IBIDI_LEX_EVENT = 1 << 4,    /* in names of events: Games, War */
    IBIDI_LEX_DAY = 1 << 5,      /* days and months */
    IBIDI_LEX_ABBREVIATION = 1 << 6, /* ends with a period that ends no sentence */
    IBIDI_LEX_PREPOSITION = 1 << 7,  /* of place: in, at, near */
    IBIDI_LEX_SPEECH = 1 << 8,       /* verbs a person's name goes with: said, told */
    IBIDI_LEX_GIVEN = 1 << 9,        /* common given names */
    IBIDI_LEX_UNIT = 1 << 10,        /* behind a number: million, percent, km */
    IBIDI_LEX_GENERIC = 1 << 11, /* capitals that name nothing in particular: TV, CEO, Internet */
    /* What a question asks for: */
    IBIDI_LEX_ASK_PERSON = 1 << 12, /* people, actors ... */
    IBIDI_LEX_ASK_PLACE = 1 << 13,  /* places, cities ... */
    IBIDI_LEX_ASK_ORG = 1 << 14,    /* organisations, teams ... */
    IBIDI_LEX_ASK_WORK = 1 << 15,   /* films, books, products, events ... */
    IBIDI_LEX_LINK = 1 << 16, /* what follows it says more about what is asked for: in, that */
    IBIDI_LEX_ASK_DATE = 1 << 17,
    IBIDI_LEX_ASK_NUMBER = 1 << 18,
    IBIDI_LEX_ASK_QUOTE = 1 << 19,
    IBIDI_LEX_ASK_ADDRESS = 1 << 20,
    IBIDI_LEX_ASK_SENTENCE = 1 << 21 /* begins a question that no name answers: how, why, is */
};

/* Which lists hold a word, in lower case, without its period. */
unsigned ibidi_lexicon(const char *s, size_t n);
#endif
