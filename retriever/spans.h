/* Candidate spans of a text: what a person could point at and call an answer. Names, quoted titles,
 * dates, numbers, addresses; and which of them are forms of one entity. Pure: works on any bytes.
 *
 * Names are found by their capitals, weighed by the text itself: a capital at the start of a
 * sentence or in a heading counts only if the word is a name elsewhere too, or leads a longer name.
 * Scripts without capitals give no names. */
#ifndef IBID_RETRIEVER_SPANS_H
#define IBID_RETRIEVER_SPANS_H

#include "kvstore/kvstore.h"

typedef enum ibidi_span_kind {
    IBIDI_SPAN_NAME = 1,
    IBIDI_SPAN_DATE,   /* days, months, years; times of day */
    IBIDI_SPAN_NUMBER, /* with its unit or currency sign */
    IBIDI_SPAN_QUOTE,  /* inside quotation marks, at most 200 bytes */
    IBIDI_SPAN_ADDRESS /* of mail or web */
} ibidi_span_kind;

typedef struct ibidi_mined {
    uint64_t start,
        end;         /* bytes of the text: without possessive, title of person, quotation marks */
    uint32_t entity; /* names: index into entities; others: UINT32_MAX */
    uint8_t kind;
} ibidi_mined;

/* What the words of an entity's names and around them tell, in how many of its mentions. */
typedef struct ibidi_entity {
    uint32_t first;    /* its best form: index into spans */
    uint32_t mentions; /* spans of it */
    uint32_t words;    /* of the best form */
    uint32_t person;   /* mentions with a title, an age, or a verb of speech beside them */
    uint32_t place;    /* mentions behind "in", "at", "near" ... */
    uint32_t article;  /* mentions behind "the" */
    uint32_t acronyms; /* mentions in capitals only */
    uint8_t head;      /* ibidi_head of the best form's words */
    uint8_t given;     /* the best form begins with a given name */
} ibidi_entity;

typedef enum ibidi_head { /* the kind of thing a name itself says it is */
                          IBIDI_HEAD_NONE,
                          IBIDI_HEAD_ORGANIZATION, /* University, Association, Inc ... */
                          IBIDI_HEAD_PLACE,        /* County, River, Street ... */
                          IBIDI_HEAD_EVENT         /* Games, War, Festival ... */
} ibidi_head;

typedef struct ibidi_spans {
    ibidi_mined *v; /* ascending start; a name may lie inside a quote */
    size_t n;
    ibidi_entity *entities;
    size_t n_entities;
} ibidi_spans;

/* Errors: NOMEM, TOOBIG (4 GB of text or more). */
ibid_err ibidi_spans_mine(ibid_str text, ibidi_spans *out);
void ibidi_spans_fini(ibidi_spans *s);
#endif
