/* The key index's manifest and, over the same bytes, what splits and folds text. */
#include "retriever/folded.h"
#include "retriever/key_index.h"
#include "retriever/sentences.h"
#include "retriever/words.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int check_word(void *arg, const ibidi_word *w) {
    size_t n = *(size_t *)arg;
    if (w->n == 0 || w->n > IBIDI_WORD_MAX || w->start >= w->end || w->end > n) abort();
    return 0;
}

static void read_text(const uint8_t *data, size_t size) {
    ibidi_words *w;
    ibidi_occurrence *o = NULL;
    ibidi_sentence *s = NULL;
    size_t n = 0, query = size < 8 ? size : 8;
    ibid_str text = {(const char *)data, size};
    if (ibidi_words_open(&w) == IBID_OK) {
        (void)ibidi_words_each(w, text.s, size, false, check_word, &size);
        (void)ibidi_words_each(w, text.s, size, true, check_word, &size);
        ibidi_words_close(w);
    }
    if (ibidi_occurrences(text, (ibid_str){text.s + size - query, query}, 100, &o, &n) == IBID_OK) {
        for (size_t i = 0; i < n; i++)
            if (o[i].start >= o[i].end || o[i].end > size) abort();
        ibid_free(o);
    }
    if (ibidi_sentences(text, &s, &n) == IBID_OK) {
        for (size_t i = 0; i < n; i++)
            if (s[i].start >= s[i].end || s[i].end > size) abort();
        ibid_free(s);
    }
}

/* The bytes as they are, and with the checksum made right, so that what lies behind it is reached.
 */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ibidi_manifest m;
    uint64_t sum;
    uint8_t *copy = malloc(size + 1);
    if (!copy) return 0;
    memcpy(copy, data, size);
    if (size >= 8) {
        sum = ibid_checksum(copy, size - 8);
        for (size_t i = 0; i < 8; i++) copy[size - 8 + i] = (uint8_t)(sum >> (8 * i));
    }
    for (int i = 0; i < 2; i++) {
        const void *p = i ? copy : data;
        if (ibidi_manifest_read(p, size, &m) == IBID_OK) {
            uint64_t total = 0;
            for (size_t j = 0; j < m.n_blocks; j++) {
                total += m.blocks[j].n_tokens;
                if (j && m.blocks[j].block <= m.blocks[j - 1].block) abort();
            }
            if (total != m.rows) abort();
            ibid_free(m.blocks);
        }
    }
    read_text(data, size);
    free(copy);
    return 0;
}
