/* What a search costs by itself: exact scan, words, opening. Not a test; no threshold.
 *     bench_retriever [BLOCKS, 128 tokens each] */
#include "support.h"

#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <stdio.h>
#include <stdlib.h>

enum { PER_BLOCK = 128, BATCH = 256, ROUNDS = 20, QUESTION = 16 };

static void fill_store(t_store *t, size_t blocks, uint64_t *seed) {
    int32_t *tokens = malloc(sizeof *tokens * BATCH * PER_BLOCK);
    int8_t *keys = malloc((size_t)BATCH * PER_BLOCK * T_DIM);
    char *text = malloc(BATCH * PER_BLOCK * 8);
    ibid_chunk chunks[BATCH];
    for (size_t at = 0, doc = 0; at < blocks; at += BATCH, doc++) {
        ibid_block_put put[BATCH];
        uint64_t numbers[BATCH], number, generation;
        char id[32];
        size_t n = blocks - at < BATCH ? blocks - at : BATCH, len = 0;
        for (size_t i = 0; i < n; i++) {
            size_t start = len;
            for (size_t j = 0; j < PER_BLOCK; j++) {
                uint64_t word = t_rnd(seed) % 20000 * (t_rnd(seed) % 100) / 100;
                tokens[i * PER_BLOCK + j] = (int32_t)word;
                len += (size_t)sprintf(text + len, "w%llu ", (unsigned long long)word);
            }
            for (size_t j = 0; j < PER_BLOCK * T_DIM; j++)
                keys[i * PER_BLOCK * T_DIM + j] = (int8_t)(t_rnd(seed) % 61 - 30);
            chunks[i] = (ibid_chunk){start, len, {"", 0}, 0};
            put[i] = (ibid_block_put){.model = t->model,
                                      .prefix = ibid_hash_bytes("p", 1),
                                      .kv_type = IBID_KV_Q8_0,
                                      .n_tokens = PER_BLOCK,
                                      .tokens = tokens + i * PER_BLOCK,
                                      .calibration = t->calibration,
                                      .keys = keys + i * PER_BLOCK * T_DIM,
                                      .keys_dim = T_DIM};
        }
        assert_ok(ibid_store_blocks_put(t->s, put, n, numbers));
        for (size_t i = 0; i < n; i++) chunks[i].block = numbers[i];
        snprintf(id, sizeof id, "d%zu", doc);
        ibid_document_put d = {.collection = t_str("c"),
                               .id = t_str(id),
                               .title = t_str("Bench"),
                               .state = IBID_DOC_READY,
                               .text = {text, len},
                               .chunks = chunks,
                               .n_chunks = n};
        assert_ok(ibid_store_document_put(t->s, &d, &number, &generation));
    }
    free(tokens);
    free(keys);
    free(text);
}

static double searches(const t_store *t, size_t threads, uint64_t exact, bool keys,
                       double *open_ms) {
    ibidi_retriever *r;
    ibidi_retriever_opts o = t_opts(t);
    double ms = 0;
    o.threads = threads;
    o.exact_tokens = exact;
    o.keys.cells_min = 500000;
    uint64_t start = ibid_now_ns();
    assert_ok(ibidi_retriever_open(&o, &r));
    for (int i = -1; i < ROUNDS; i++) {
        ibidi_found f;
        uint64_t seed = (uint64_t)i + 900;
        char question[256] = "";
        for (int j = 0; j < QUESTION; j++)
            sprintf(question + strlen(question), "w%llu ",
                    (unsigned long long)(t_rnd(&seed) % 9000));
        ibid_search_request q = {.collection = t_str("c"),
                                 .question = t_str(question),
                                 .keys_only = keys,
                                 .lexical_only = !keys};
        assert_ok(ibidi_retriever_search(r, &q, &f));
        if (i < 0) { /* opens view and words */
            *open_ms = ibid_ms_since(start);
            if (exact == 1) assert_ok(ibidi_retriever_settle(r));
        } else
            ms += keys ? f.keys_ms : f.lexical_ms;
        ibidi_found_close(&f);
    }
    ibidi_retriever_close(r);
    return ms / ROUNDS;
}

int main(int argc, char **argv) {
    size_t blocks = argc > 1 ? strtoul(argv[1], NULL, 10) : 782;
    uint64_t seed = 4;
    t_store t;
    double open_ms, first_ms, unused;
    ibid_log_init("bench", IBID_LOG_INFO);
    t_open(&t);
    fill_store(&t, blocks, &seed);
    double words = searches(&t, 2, 0, false, &first_ms);
    double one = searches(&t, 1, 0, true, &open_ms), two = searches(&t, 2, 0, true, &unused);
    double index = searches(&t, 2, 1, true, &unused);
    printf("%zu blocks, %zu tokens of %d numbers, %d question tokens\n", blocks, blocks * PER_BLOCK,
           T_DIM, QUESTION);
    printf("  exact scan         %8.2f ms on one thread, %.2f ms on two\n", one, two);
    printf("  through key index  %8.2f ms\n", index);
    printf("  words (FTS5)       %8.2f ms\n", words);
    printf("  first search       %8.0f ms when the lexical index has to be built, %.0f ms after a "
           "restart\n",
           first_ms, open_ms);
    t_close(&t);
    return 0;
}
