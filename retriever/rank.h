/* How well an entity of a document answers a question that names what is looked for: a linear model
 * over few features, whose weights were fitted by cross-validation (docs/quality.md, "Find"; how:
 * tools/find-rank). Pure. */
#ifndef IBID_RETRIEVER_RANK_H
#define IBID_RETRIEVER_RANK_H

#include "retriever/spans.h"
#include "retriever/words.h"

enum { IBIDI_STEMS_MAX = 64 };

typedef struct ibidi_asked {                /* of the question */
    bool person, place, organization, work; /* what its head names */
    unsigned kinds; /* 1 << ibidi_span_kind: dates, numbers, quotes, addresses are asked for */
    bool sentence;  /* it wants to be told something, not a list */
    uint64_t head[IBIDI_STEMS_MAX], rest[IBIDI_STEMS_MAX]; /* stems, hashed */
    size_t n_head, n_rest;
} ibidi_asked;
/* Errors: NOMEM. */
ibid_err ibidi_asked_of(ibidi_words *w, ibid_str question, ibidi_asked *out);
uint64_t ibidi_stem_hash(const char *s, size_t n);

typedef enum ibidi_feature {
    IBIDI_F_MENTIONS,          /* ln */
    IBIDI_F_TOKENS,            /* a word of its name */
    IBIDI_F_WORDS,             /* of its name, at most 5 */
    IBIDI_F_PERSON,            /* 1: a mention has a title, an age, or a verb of speech beside it */
    IBIDI_F_PLACE,             /* share of mentions behind a preposition of place */
    IBIDI_F_ARTICLE,           /* 1: a mention behind "the" */
    IBIDI_F_ACRONYM,           /* 1: a mention in capitals only */
    IBIDI_F_HEAD_ORGANIZATION, /* 1: its name says so */
    IBIDI_F_HEAD_PLACE,
    IBIDI_F_HEAD_EVENT,
    /* 1 (or the share) if the question asks for ... and the entity looks like ... */
    IBIDI_F_PERSON_PERSON,
    IBIDI_F_PERSON_PLACE,
    IBIDI_F_PLACE_PERSON,
    IBIDI_F_PLACE_PLACE,
    IBIDI_F_ORGANIZATION_PERSON,
    IBIDI_F_ORGANIZATION_PLACE,
    IBIDI_F_ORGANIZATION_ORGANIZATION,
    IBIDI_F_WORK_PERSON,
    IBIDI_F_NAME_HEAD,     /* 1: its name holds a word of what is asked for */
    IBIDI_F_NAME_REST,     /* 1: another word of the question */
    IBIDI_F_KEYS,          /* MaxSim of its mentions' token keys, standardised over the entities */
    IBIDI_F_GAIN,          /* ln P(name | question) - ln P(name | "Names:") by the model */
    IBIDI_F_GAIN_STANDARD, /* standardised over the entities */
    IBIDI_FEATURES
} ibidi_feature;

typedef struct ibidi_evidence { /* of one entity, beside what mining says */
    double tokens;              /* a word */
    double keys;                /* MaxSim, any scale */
    double gain;                /* NAN: not asked */
    const uint64_t *stems;      /* of the words of its forms */
    size_t n_stems;
} ibidi_evidence;

/* out [n, IBIDI_FEATURES]; gains are standardised over those that are there, the others get 0. */
void ibidi_rank_features(const ibidi_asked *q, const ibidi_entity *e, const ibidi_evidence *v,
                         size_t n, double *out);
/* ln odds that it answers the question; with_gain: the features IBIDI_F_GAIN* count. */
double ibidi_rank_score(const double f[IBIDI_FEATURES], bool with_gain);

/* An entity is a match if its probability reaches the threshold, or lies within `within` (in ln
 * odds) of the best one's. None is if not even one has a gain of `floor`. */
typedef struct ibidi_rank_limits {
    double threshold, within, floor;
} ibidi_rank_limits;
ibidi_rank_limits ibidi_rank_defaults(bool with_gain);
#endif
