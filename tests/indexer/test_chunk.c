/* Chunks: they tile the text's tokens, stay within bounds, follow the text's structure, and an edit
 * changes its neighbourhood only. Tokens here are words and marks as a byte-pair tokenizer would
 * cut them (a space belongs to the word behind it); the real tokenizer is used in test_job. */
#include "indexer/chunk.h"
#include "rpc/base/hash.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t rng;

static uint32_t draw(uint32_t n) {
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(rng >> 33) % n;
}

/* Words of at most six letters with the space before them, marks, line feeds alone. */
static size_t toy_tokens(ibid_str t, uint64_t *ends) {
    size_t n = 0;
    for (size_t i = 0; i < t.n;) {
        size_t end = i + 1;
        bool letter = false;
        if (t.s[i] == ' ' && end < t.n && t.s[end] != ' ' && t.s[end] != '\n') end++;
        letter = (t.s[end - 1] | 32) >= 'a' && (t.s[end - 1] | 32) <= 'z';
        while (letter && end < t.n && end - i < 6 && (t.s[end] | 32) >= 'a' &&
               (t.s[end] | 32) <= 'z')
            end++;
        ends[n++] = end;
        i = end;
    }
    return n;
}

/* All slabs' tokens of a text, as the indexer gathers them. */
static size_t slab_tokens(ibid_str t, uint64_t **out) {
    uint64_t *ends = malloc((t.n + 1) * sizeof *ends);
    size_t n = 0;
    assert_non_null(ends);
    for (size_t at = 0; at < t.n;) {
        size_t len = ibid_chunk_slab(t.s + at, t.n - at);
        assert_in_range(len, 1, t.n - at);
        size_t more = toy_tokens((ibid_str){t.s + at, len}, ends + n);
        for (size_t i = 0; i < more; i++) ends[n + i] += at;
        n += more;
        at += len;
    }
    *out = ends;
    return n;
}

static void sentence(ibid_buf *b) {
    static const char *const words[] = {"river", "stone",  "light",  "the", "of",
                                        "a",     "engine", "garden", "and", "slow",
                                        "year",  "letter", "found",  "Dr."};
    uint32_t n = 5 + draw(15);
    for (uint32_t i = 0; i < n; i++) {
        char word[16];
        (void)snprintf(word, sizeof word, "%s", words[draw(14)]);
        if (i == 0 && word[0] >= 'a') word[0] = (char)(word[0] - 32);
        assert_int_equal(ibid_buf_printf(b, "%s%s", i ? " " : "", word), IBID_OK);
    }
    assert_int_equal(ibid_buf_puts(b, draw(8) ? "." : "?"), IBID_OK);
}

/* About 100 pages of 500 tokens. */
static void book(ibid_buf *b, size_t paragraphs) {
    for (size_t p = 0; p < paragraphs; p++) {
        uint32_t n = 1 + draw(8);
        for (uint32_t i = 0; i < n; i++) {
            if (i) assert_int_equal(ibid_buf_puts(b, " "), IBID_OK);
            sentence(b);
        }
        if (p + 1 < paragraphs) assert_int_equal(ibid_buf_puts(b, "\n\n"), IBID_OK);
    }
}

struct cut_text {
    uint64_t *ends;
    size_t n_tokens, n;
    ibid_cut *cuts;
    ibid_hash *hashes;
};

static void check_tiling(ibid_str t, const struct cut_text *c, size_t max) {
    uint64_t at = 0;
    for (size_t i = 0; i < c->n; i++) {
        const ibid_cut *k = &c->cuts[i];
        for (uint64_t b = at; b < k->start; b++) assert_true(t.s[b] == ' ' || t.s[b] == '\n');
        assert_true(k->start >= at && k->end > k->start && k->end <= t.n);
        assert_in_range(k->n_tokens, 1, max);
        assert_int_equal(k->token0 ? c->ends[k->token0 - 1] : 0, k->start);
        assert_int_equal(c->ends[k->token0 + k->n_tokens - 1], k->end);
        at = k->end;
    }
    for (uint64_t b = at; b < t.n; b++) assert_true(t.s[b] == ' ' || t.s[b] == '\n');
}

static struct cut_text cut(ibid_str t, size_t max) {
    struct cut_text c = {0};
    c.n_tokens = slab_tokens(t, &c.ends);
    assert_int_equal(ibid_chunk_cut(t, c.ends, c.n_tokens, NULL, 0, max, &c.cuts, &c.n), IBID_OK);
    check_tiling(t, &c, max);
    c.hashes = calloc(c.n + 1, sizeof *c.hashes);
    assert_non_null(c.hashes);
    for (size_t i = 0; i < c.n; i++) {
        /* What a block's identity depends on: bytes and where its tokens end in them. */
        ibid_hasher h;
        ibid_hasher_init(&h);
        ibid_hasher_field(&h, t.s + c.cuts[i].start, c.cuts[i].end - c.cuts[i].start);
        for (size_t k = 0; k < c.cuts[i].n_tokens; k++)
            ibid_hasher_u64(&h, c.ends[c.cuts[i].token0 + k] - c.cuts[i].start);
        c.hashes[i] = ibid_hasher_final(&h);
    }
    return c;
}

static void cut_free(struct cut_text *c) {
    free(c->ends);
    free(c->hashes);
    ibid_free(c->cuts);
}

static bool has(const struct cut_text *c, const ibid_hash *h) {
    for (size_t i = 0; i < c->n; i++)
        if (ibid_hash_cmp(&c->hashes[i], h) == 0) return true;
    return false;
}

static void sizes_and_places(void **state) {
    (void)state;
    ibid_buf b;
    rng = 7;
    ibid_buf_init(&b, 1 << 24);
    book(&b, 900);
    ibid_str t = {b.data, b.len};
    struct cut_text c = cut(t, 231);
    size_t good = 0;
    for (size_t i = 0; i + 1 < c.n; i++) {
        assert_in_range(c.cuts[i].n_tokens, IBID_CHUNK_MIN - 8, 231);
        char last = t.s[c.cuts[i].end - 1];
        good += last == '.' || last == '?';
    }
    double mean = (double)c.n_tokens / (double)c.n;
    printf("%zu tokens, %zu chunks, mean %.1f, %zu end a sentence\n", c.n_tokens, c.n, mean, good);
    assert_true(mean > 130 && mean < 210);
    assert_true(good * 100 >= c.n * 97);
    cut_free(&c);
    ibid_buf_fini(&b);
}

/* 100 edits in the middle of 100 pages: at most 5 % of the chunks' tokens are new, each time. */
static void edits_stay_local(void **state) {
    (void)state;
    ibid_buf b;
    size_t worst = 0, total_new = 0;
    rng = 20260203;
    printf("seed %llu\n", (unsigned long long)rng);
    ibid_buf_init(&b, 1 << 24);
    book(&b, 900);
    struct cut_text before = cut((ibid_str){b.data, b.len}, 231);
    for (int round = 0; round < 100; round++) {
        size_t at = b.len / 4 + draw((uint32_t)b.len / 2), del = draw(400);
        static const char *const inserts[] = {"", "x", " new words come here", "\n\nA paragraph. ",
                                              "One. Two. Three. Four. Five. Six. Seven.\n\n"};
        const char *ins = inserts[draw(5)];
        size_t n_ins = strlen(ins), n = b.len - del + n_ins;
        char *edited = malloc(n);
        assert_non_null(edited);
        memcpy(edited, b.data, at);
        memcpy(edited + at, ins, n_ins);
        memcpy(edited + at + n_ins, b.data + at + del, b.len - at - del);
        struct cut_text after = cut((ibid_str){edited, n}, 231);
        size_t fresh = 0;
        for (size_t i = 0; i < after.n; i++)
            if (!has(&before, &after.hashes[i])) fresh += after.cuts[i].n_tokens;
        if (fresh * 10000 / after.n_tokens > worst) worst = fresh * 10000 / after.n_tokens;
        total_new += fresh;
        assert_true(fresh * 20 <= after.n_tokens);
        cut_free(&after);
        free(edited);
    }
    printf("%zu tokens; an edit makes %.2f %% new on average, %.2f %% at worst\n", before.n_tokens,
           (double)total_new / (double)before.n_tokens, (double)worst / 100);
    cut_free(&before);
    ibid_buf_fini(&b);
}

static void short_texts_stay_whole(void **state) {
    (void)state;
    ibid_buf b;
    rng = 3;
    ibid_buf_init(&b, 1 << 20);
    for (size_t words = 1; words <= 231; words += 10) {
        ibid_buf_clear(&b);
        for (size_t i = 0; i < words; i++)
            assert_int_equal(ibid_buf_puts(&b, i % 11 == 10 ? ".\n\n"
                                               : i          ? " abc"
                                                            : "abc"),
                             IBID_OK);
        struct cut_text c = cut((ibid_str){b.data, b.len}, 300);
        assert_int_equal(c.n, 1);
        cut_free(&c);
    }
    struct cut_text none = cut((ibid_str){"", 0}, 231);
    assert_int_equal(none.n, 0);
    cut_free(&none);
    none = cut((ibid_str){" \n ", 3}, 231);
    assert_int_equal(none.n, 0);
    cut_free(&none);
    ibid_buf_fini(&b);
}

/* No places to cut at: one endless word, and bytes of CJK where tokens end inside characters. */
static void text_without_places(void **state) {
    (void)state;
    size_t n = 30000;
    char *t = malloc(n);
    uint64_t *ends = malloc(n * sizeof *ends);
    ibid_cut *cuts = NULL;
    size_t n_cuts = 0;
    rng = 5;
    assert_non_null(t);
    assert_non_null(ends);
    for (size_t i = 0; i < n; i += 3) {
        memcpy(t + i, i % 999 == 333 ? "\xE3\x80\x82" : "\xE6\x9D\xB1", 3);
        if (i % 999 != 333) t[i + 2] = (char)(0x80 + draw(64));
    }
    for (size_t i = 0; i < n; i++) ends[i] = i + 1; /* a token a byte */
    assert_int_equal(ibid_chunk_cut((ibid_str){t, n}, ends, n, NULL, 0, 231, &cuts, &n_cuts),
                     IBID_OK);
    size_t wide = 0;
    for (size_t i = 0; i < n_cuts; i++) {
        assert_int_equal(cuts[i].start % 3, 0);
        assert_int_equal(cuts[i].end % 3, 0);
        assert_in_range(cuts[i].n_tokens, 1, 231);
        wide += memcmp(t + cuts[i].end - 3, "\xE3\x80\x82", 3) == 0;
    }
    printf("%zu chunks, %zu end at a wide mark\n", n_cuts, wide);
    assert_true(wide >= 5);
    ibid_free(cuts);
    free(ends);
    free(t);
}

static void locators_and_sections(void **state) {
    (void)state;
    ibid_buf b;
    rng = 11;
    ibid_buf_init(&b, 1 << 20);
    ibid_locator loc[40];
    char names[40][32];
    for (size_t i = 0; i < 40; i++) {
        (void)snprintf(names[i], sizeof names[i], "# Part %zu", i);
        loc[i] = (ibid_locator){b.len, {names[i], strlen(names[i])}};
        assert_int_equal(ibid_buf_printf(&b, "Part %zu\n\n", i), IBID_OK);
        book(&b, 4);
        if (i < 39) assert_int_equal(ibid_buf_puts(&b, "\n\n"), IBID_OK);
    }
    ibid_str t = {b.data, b.len};
    uint64_t *ends = NULL;
    size_t n = slab_tokens(t, &ends), n_cuts = 0, heads = 0;
    ibid_cut *cuts = NULL;
    assert_int_equal(ibid_chunk_cut(t, ends, n, loc, 40, 231, &cuts, &n_cuts), IBID_OK);
    for (size_t i = 0; i < n_cuts; i++) {
        size_t in = 0;
        while (in + 1 < 40 && loc[in + 1].at <= cuts[i].start) in++;
        assert_int_equal(cuts[i].locator.n, loc[in].name.n);
        assert_memory_equal(cuts[i].locator.s, loc[in].name.s, loc[in].name.n);
        heads += cuts[i].start == loc[in].at;
    }
    printf("%zu of %zu chunks begin with a heading\n", heads, n_cuts);
    assert_true(heads >= 20);
    ibid_free(cuts);
    free(ends);
    ibid_buf_fini(&b);
}

static void refuses_wrong_tokens(void **state) {
    (void)state;
    ibid_cut *cuts = NULL;
    size_t n = 0;
    ibid_str t = {"abc def", 7};
    const uint64_t good[] = {3, 7}, late[] = {3, 8}, back[] = {3, 3, 7}, little[] = {3};
    assert_int_equal(ibid_chunk_cut(t, good, 2, NULL, 0, 231, &cuts, &n), IBID_OK);
    ibid_free(cuts);
    assert_int_equal(ibid_chunk_cut(t, late, 2, NULL, 0, 231, &cuts, &n), IBID_INVAL);
    assert_int_equal(ibid_chunk_cut(t, back, 3, NULL, 0, 231, &cuts, &n), IBID_INVAL);
    assert_int_equal(ibid_chunk_cut(t, little, 1, NULL, 0, 231, &cuts, &n), IBID_INVAL);
    assert_int_equal(ibid_chunk_cut(t, good, 2, NULL, 0, 20, &cuts, &n), IBID_INVAL);
}

static void titles_are_cut_at_words(void **state) {
    (void)state;
    char title[400] = "";
    uint64_t ends[64];
    for (int i = 0; i < 40; i++) (void)strcat(title, i ? " word" : "word");
    ibid_str t = {title, strlen(title)};
    for (size_t i = 0; i < 40; i++) ends[i] = 4 + 5 * i;
    size_t keep = ibid_chunk_title(t, ends, 40);
    assert_int_equal(keep, 4 + 5 * 23);
    assert_int_equal(ibid_chunk_title((ibid_str){title, 9}, ends, 2), 9);
    memset(title, 'x', 300);
    for (size_t i = 0; i < 60; i++) ends[i] = 5 * (i + 1);
    assert_int_equal(ibid_chunk_title((ibid_str){title, 300}, ends, 60), 120);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_and_places),       cmocka_unit_test(edits_stay_local),
        cmocka_unit_test(short_texts_stay_whole), cmocka_unit_test(text_without_places),
        cmocka_unit_test(locators_and_sections),  cmocka_unit_test(refuses_wrong_tokens),
        cmocka_unit_test(titles_are_cut_at_words)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
