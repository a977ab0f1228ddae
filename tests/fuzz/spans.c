/* The miner of candidate spans over any bytes: offsets inside the text, entities that add up. */
#include "retriever/spans.h"
#include "retriever/rank.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ibid_str text = {(const char *)data, size};
    ibidi_spans s;
    ibidi_words *words = NULL;
    ibidi_asked asked;
    if (ibidi_spans_mine(text, &s)) return 0;
    size_t names = 0, mentions = 0;
    for (size_t i = 0; i < s.n; i++) {
        const ibidi_mined *m = &s.v[i];
        if (m->start >= m->end || m->end > size) abort();
        if (i && m->start < s.v[i - 1].start) abort();
        if ((m->kind == IBIDI_SPAN_NAME) != (m->entity < s.n_entities)) abort();
        names += m->kind == IBIDI_SPAN_NAME;
    }
    for (size_t i = 0; i < s.n_entities; i++) {
        const ibidi_entity *e = &s.entities[i];
        if (e->first >= s.n || s.v[e->first].entity != i || !e->mentions || !e->words) abort();
        mentions += e->mentions;
    }
    if (names != mentions) abort();
    ibidi_spans_fini(&s);
    if (ibidi_words_open(&words) == IBID_OK) {
        if (!ibidi_asked_of(words, text, &asked) &&
            (asked.n_head > IBIDI_STEMS_MAX || asked.n_rest > IBIDI_STEMS_MAX))
            abort();
        ibidi_words_close(words);
    }
    return 0;
}
