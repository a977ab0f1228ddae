/* Find: folded occurrences, sentences, token alignment, spans, and the whole over a real store. */
#include "support.h"

#include "retriever/find.h"
#include "retriever/folded.h"
#include "retriever/rank.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* want: the byte ranges as "start-end", '=' behind those with the very bytes. */
static void expect(const char *text, const char *query, const char *want) {
    ibidi_occurrence *o = NULL;
    size_t n = 0;
    char got[1024] = "";
    char *exact = malloc(strlen(text) + 1);
    memcpy(exact, text, strlen(text));
    assert_ok(ibidi_occurrences((ibid_str){exact, strlen(text)}, t_str(query), 100, &o, &n));
    for (size_t i = 0; i < n; i++) {
        size_t len = strlen(got);
        snprintf(got + len, sizeof got - len, "%s%d-%d%s", i ? " " : "", (int)o[i].start,
                 (int)o[i].end, o[i].same ? "=" : "");
    }
    if (strcmp(got, want) != 0) print_error("'%s' in '%s'\n", query, text);
    assert_string_equal(got, want);
    ibid_free(o);
    free(exact);
}

static void test_occurrences(void **state) {
    (void)state;
    expect("The cat and the Cat", "the", "0-3 12-15=");
    expect("aaaa", "aa", "0-2= 2-4=");
    expect("abc", "x", "");
    expect("abc", "", "");
    expect("abc", "  ", "");
    expect("", "a", "");
    expect("a", "a", "0-1=");
    expect("two\n  lines here", "two lines", "0-11");
    expect("two lines", " two  lines ", "0-9");
    expect("caf\xC3\xA9 cafe\xCC\x81", "caf\xC3\xA9", "0-5= 6-12");
    expect("caf\xC3\xA9 cafe\xCC\x81", "cafe\xCC\x81", "0-5 6-12=");
    expect("caf\xC3\xA9 cafe\xCC\x81 cafe", "cafe", "13-17=");
    expect("Stra\xC3\x9F"
           "e STRASSE",
           "strasse", "0-7 8-15");
    expect("Stra\xC3\x9F"
           "e",
           "s", "0-1"); /* not half a sharp s */
    expect("Stra\xC3\x9F"
           "e",
           "ss", "4-6");
    expect("\xEF\xBC\xB8\xEF\xBC\x91 X1", "x1", "0-6 7-9");
    expect("so\xC2\xAD"
           "ft soft",
           "soft", "0-6 7-11=");
    expect("\xEA\xB0\x81 \xEA\xB0\x80", "\xEA\xB0\x80", "4-7="); /* a syllable is whole */
    expect("\xE6\x9D\xB1\xE4\xBA\xAC\xE3\x81\xA7", "\xE4\xBA\xAC", "3-6=");
    expect("go \xF0\x9F\x9A\x80!", "\xF0\x9F\x9A\x80", "3-7=");
    expect("a\xFF"
           "b\xC3",
           "b", "2-3=");
    expect("I. \"quoted\" (x)", "\"quoted\"", "3-11=");
    expect("\xCE\xA3\xCE\x91\xCE\xA3 \xCF\x83\xCE\xB1\xCF\x82", "\xCF\x83\xCE\xB1\xCF\x82",
           "0-6 7-13=");
    expect("o\xCC\x88\xCC\xA3 o\xCC\xA3\xCC\x88", "\xE1\xBB\x8D\xCC\x88", "0-5 6-11");
}

/* Long texts are folded in pieces; what crosses a border is found all the same. */
static void test_long(void **state) {
    (void)state;
    size_t n = 3 << 20, found = 0;
    char *text = malloc(n);
    uint64_t seed = 3, at[200];
    print_message("seed %llu\n", (unsigned long long)seed);
    for (size_t i = 0; i < n; i++) text[i] = "abcdefgh ijk\n"[t_rnd(&seed) % 13];
    for (size_t i = 0; i < 200; i++) {
        at[i] = 1000 + i * (n - 3000) / 200;
        if (i % 40 == 0) at[i] = (i / 40 + 1) * (1 << 18) - 3 - i / 40; /* over the borders */
    }
    for (size_t i = 0; i < 200; i++) memcpy(text + at[i], "Needle  X", 9);
    ibidi_occurrence *o;
    assert_ok(ibidi_occurrences((ibid_str){text, n}, t_str("needle x"), 1000, &o, &found));
    assert_int_equal(found, 200);
    for (size_t i = 0; i < found; i++) {
        bool known = false;
        for (size_t j = 0; j < 200; j++) known |= at[j] == o[i].start;
        assert_true(known && o[i].end == o[i].start + 9);
    }
    ibid_free(o);
    assert_ok(ibidi_occurrences((ibid_str){text, n}, t_str("needle x"), 7, &o, &found));
    assert_int_equal(found, 7);
    ibid_free(o);
    free(text);
}

static void expect_sentences(const char *text, const char *want) {
    ibidi_sentence *s;
    size_t n;
    char got[2048] = "";
    assert_ok(ibidi_sentences(t_str(text), &s, &n));
    for (size_t i = 0; i < n; i++) {
        size_t len = strlen(got);
        snprintf(got + len, sizeof got - len, "[%.*s]", (int)(s[i].end - s[i].start),
                 text + s[i].start);
    }
    assert_string_equal(got, want);
    ibid_free(s);
}

static void test_sentences(void **state) {
    (void)state;
    expect_sentences("One is here. Two  is there!  Three?",
                     "[One is here.][Two  is there!][Three?]");
    expect_sentences("It wraps\nover lines. End.", "[It wraps\nover lines.][End.]");
    expect_sentences("Intro\n- item one\n- item two", "[Intro][- item one][- item two]");
    expect_sentences("A\n\nB", "[A][B]");
    expect_sentences("", "");
    expect_sentences(" \n ", "");
    expect_sentences("\xE6\x9D\xB1\xE3\x80\x82\xE4\xBA\xAC\xE3\x80\x82",
                     "[\xE6\x9D\xB1\xE3\x80\x82][\xE4\xBA\xAC\xE3\x80\x82]");
    expect_sentences("\xFF\xFE ok", "[\xFF\xFE ok]");
}

static void test_align(void **state) {
    (void)state;
    int32_t ids[] = {1, 2, 3, 4, 5}, other[] = {1, 2, 9, 8, 7, 5};
    uint64_t ends[] = {2, 4, 6, 8, 10}, other_ends[] = {2, 4, 5, 6, 8, 10}, out[5];
    ibidi_align_ends(ids, 5, ids, ends, 5, 10, out);
    assert_memory_equal(out, ends, sizeof ends);
    ibidi_align_ends(ids, 5, other, other_ends, 6, 10, out);
    uint64_t want[] = {2, 4, 6, 8, 10};
    assert_memory_equal(out, want, sizeof want);
    ibidi_align_ends(ids, 5, NULL, NULL, 0, 10, out); /* nothing agrees: even */
    assert_memory_equal(out, ends, sizeof ends);
    ibidi_align_ends(ids, 0, other, other_ends, 6, 10, out);
    /* whatever comes, ends ascend and stay inside */
    uint64_t seed = 11;
    print_message("seed %llu\n", (unsigned long long)seed);
    for (int round = 0; round < 2000; round++) {
        int32_t a[20], b[20];
        uint64_t e[20], o[20];
        size_t n = t_rnd(&seed) % 20, m = t_rnd(&seed) % 20;
        for (size_t i = 0; i < 20; i++) {
            a[i] = (int32_t)(t_rnd(&seed) % 3);
            b[i] = (int32_t)(t_rnd(&seed) % 3);
            e[i] = i + 1;
        }
        ibidi_align_ends(a, n, b, e, m, m, o);
        for (size_t i = 0; i < n; i++) {
            assert_true(o[i] <= m);
            if (i) assert_true(o[i] >= o[i - 1]);
        }
    }
}

/* ---- The whole ---- */
static const char story[] =
    "The harbour was quiet that night. A vessel came in late without lights.\n\n"
    "Nobody had seen the doctor since spring. Her notes lay on the table.\n\n"
    "In the morning the boat was gone. The monarch slept. Prices rose again in June.";

static size_t run_find(ibidi_retriever *r, const char *doc, const char *query, double min_score,
                       bool exact_only, ibidi_matches *m) {
    ibid_find_request q = {.collection = t_str("c"),
                           .document = t_str(doc),
                           .query = t_str(query),
                           .exact_only = exact_only,
                           .min_score = min_score};
    assert_ok(ibidi_retriever_find(r, &q, m));
    for (size_t i = 0; i < m->n; i++) {
        assert_int_equal(m->matches[i].end - m->matches[i].start, m->matches[i].text.n);
        assert_memory_equal(m->matches[i].text.s, story + m->matches[i].start,
                            m->matches[i].text.n);
        if (i && !m->matches[i].exact) {
            assert_true(m->matches[i - 1].exact || m->matches[i - 1].score >= m->matches[i].score);
        }
    }
    return m->n;
}

static void test_find(void **state) {
    (void)state;
    t_store t;
    ibidi_retriever *r;
    ibidi_matches m;
    t_open(&t);
    t_put(&t, "c", "story", "Tale", story, NULL);
    t_put(&t, "c", "empty", "Nothing", "", NULL);
    ibidi_retriever_opts o = t_opts(&t);
    assert_ok(ibidi_retriever_open(&o, &r));

    /* "boat" exactly once; the vessel by its meaning; not the boat's own sentence again */
    assert_int_equal(run_find(r, "story", "Boat", -1, false, &m), 2);
    assert_true(m.matches[0].exact && t_eq(m.matches[0].text, "boat"));
    assert_true(m.matches[0].score > 0.9 && m.matches[0].score < 1); /* other case */
    assert_false(m.matches[1].exact);
    assert_true(t_eq(m.matches[1].text, "A vessel came in late without lights."));
    assert_true(t_eq(m.matches[1].locator, "page 1"));
    assert_true(m.matches[1].score >= m.threshold && m.coverage == 1);
    assert_null(m.degraded);
    ibidi_matches_close(&m);

    assert_int_equal(run_find(r, "story", "physician", -1, false, &m), 1);
    assert_true(t_eq(m.matches[0].text, "Nobody had seen the doctor since spring."));
    ibidi_matches_close(&m);
    assert_int_equal(run_find(r, "story", "king", -1, false, &m), 1);
    assert_true(t_eq(m.matches[0].text, "The monarch slept."));
    ibidi_matches_close(&m);

    assert_int_equal(run_find(r, "story", "zebra", -1, false, &m), 0); /* an empty answer */
    assert_true(m.coverage == 1);
    ibidi_matches_close(&m);
    assert_int_equal(run_find(r, "story", "physician", -1, true, &m), 0);
    ibidi_matches_close(&m);
    assert_int_equal(run_find(r, "story", "physician", 0.99, false, &m), 0);
    ibidi_matches_close(&m);
    assert_int_equal(run_find(r, "story", "zebra", 0, false, &m), 7); /* no threshold: sentences */
    ibidi_matches_close(&m);
    assert_int_equal(run_find(r, "story", "JUNE", -1, false, &m), 1);
    ibidi_matches_close(&m);
    assert_int_equal(run_find(r, "empty", "JUNE", -1, false, &m), 0);
    ibidi_matches_close(&m);

    ibid_find_request q = {
        .collection = t_str("c"), .document = t_str("none"), .query = t_str("x")};
    assert_err(ibidi_retriever_find(r, &q, &m), IBID_NOTFOUND);
    q.collection = t_str("nowhere");
    assert_err(ibidi_retriever_find(r, &q, &m), IBID_NOCOLLECTION);
    q.collection = t_str("c");

    /* the list ends where it was told to, and says so */
    q = (ibid_find_request){
        .collection = t_str("c"), .document = t_str("story"), .query = t_str("in")};
    q.exact_only = true;
    for (q.max_matches = 0; q.max_matches < 9; q.max_matches++) {
        assert_ok(ibidi_retriever_find(r, &q, &m));
        assert_int_equal(m.n, q.max_matches && q.max_matches < 7 ? q.max_matches : 7);
        assert_int_equal(m.more, q.max_matches && q.max_matches < 7);
        ibidi_matches_close(&m);
    }
    q.query = t_str(" \n");
    assert_err(ibidi_retriever_find(r, &q, &m), IBID_INVAL);
    ibidi_retriever_close(r);

    /* without the attention room: exact matches, and it says so */
    o.hooks = (ibidi_retriever_hooks){.arg = NULL};
    assert_ok(ibidi_retriever_open(&o, &r));
    assert_int_equal(run_find(r, "story", "boat", -1, false, &m), 1);
    assert_non_null(m.degraded);
    assert_true(m.coverage == 0);
    ibidi_matches_close(&m);
    ibidi_retriever_close(r);
    t_close(&t);
}

/* ---- Names ---- */
static const char tale[] =
    "The ship left Prague on 3 May 2019. Goldie Smith sang there, at the Jewish Community "
    "Center.\n\nThe JCC paid 45 dollars. Smith was in Prague again. He likes boating and boats.";

/* The model takes one name to be likelier behind a question, the rest to be less so. */
static ibid_err t_likelihoods(void *arg, const ibid_hash *model, ibid_str prompt,
                              const ibid_str *texts, size_t n, double *out) {
    const char *liked = arg;
    (void)model;
    assert_true(prompt.n > 1 && prompt.s[prompt.n - 1] == ':');
    for (size_t i = 0; i < n; i++) {
        assert_true(texts[i].n > 1 && texts[i].s[0] == ' ');
        bool names = t_eq(prompt, "Names:");
        out[i] = names ? -20 : t_eq((ibid_str){texts[i].s + 1, texts[i].n - 1}, liked) ? -5 : -30;
    }
    return IBID_OK;
}

static ibid_err no_likelihoods(void *arg, const ibid_hash *model, ibid_str prompt,
                               const ibid_str *texts, size_t n, double *out) {
    (void)arg, (void)model, (void)prompt, (void)texts, (void)n, (void)out;
    return ibid_fail(IBID_UNAVAIL, "nobody there");
}

/* Matches as "text kind entity", "|" between them. */
static void expect_names(ibidi_retriever *r, const char *query, double min_score,
                         const char *want) {
    ibidi_matches m;
    char got[2048] = "";
    ibid_find_request q = {.collection = t_str("c"),
                           .document = t_str("tale"),
                           .query = t_str(query),
                           .min_score = min_score};
    assert_ok(ibidi_retriever_find(r, &q, &m));
    for (size_t i = 0; i < m.n; i++) {
        const ibid_match *x = &m.matches[i];
        size_t len = strlen(got);
        assert_memory_equal(x->text.s, tale + x->start, x->text.n);
        assert_true(x->score >= 0 && x->score <= 1);
        snprintf(got + len, sizeof got - len, "%s%.*s %.*s %d", len ? "|" : "", (int)x->text.n,
                 x->text.s, (int)x->kind.n, x->kind.s, (int)x->entity);
        if (x->entity) assert_true(x->name.n >= x->text.n);
    }
    if (strcmp(got, want) != 0) print_error("'%s'\n got %s\nwant %s\n", query, got, want);
    assert_string_equal(got, want);
    ibidi_matches_close(&m);
}

static void test_find_names(void **state) {
    (void)state;
    t_store t;
    ibidi_retriever *r;
    char liked[] = "Prague";
    t_open(&t);
    t_put(&t, "c", "tale", "Tale", tale, NULL);
    ibidi_retriever_opts o = t_opts(&t);
    o.hooks.arg = liked;
    o.hooks.likelihoods = t_likelihoods;
    assert_ok(ibidi_retriever_open(&o, &r));
    /* every mention of the one that answers, in the order of the text */
    expect_names(r, "zebra places", -1, "Prague name 1|Prague name 1");
    strcpy(liked, "");
    expect_names(r, "zebra places", 0.9, ""); /* none is likely: an empty answer */
    /* other forms of a name that is found exactly; of words */
    expect_names(r, "JCC", 0.8, "JCC exact 0|Jewish Community Center form 3");
    expect_names(r, "Goldie Smith", 0.8, "Goldie Smith exact 0|Smith form 2");
    expect_names(r, "boats", 0.8, "boats exact 0|boating form 0");
    expect_names(r, "all dates", 0.4, "3 May 2019 date 0");
    expect_names(r, "numbers", 0.4, "45 dollars number 0");
    /* the slider at its lowest end: every name; and what an explanation lists */
    ibidi_matches m;
    ibid_find_request q = {.collection = t_str("c"),
                           .document = t_str("tale"),
                           .query = t_str("zebra"),
                           .explain = true};
    assert_ok(ibidi_retriever_find(r, &q, &m));
    assert_int_equal(m.n, 6);
    assert_int_equal(m.n_candidates, 3);
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(m.candidates[i].mentions, 2);
        assert_int_equal(m.candidates[i].n_features, IBIDI_FEATURES);
        if (i) assert_true(m.candidates[i].score <= m.candidates[i - 1].score);
    }
    ibidi_matches_close(&m);
    ibidi_retriever_close(r);
    /* without the model's pass, as asked or because nobody answers, the rest still ranks */
    o.hooks.likelihoods = no_likelihoods;
    assert_ok(ibidi_retriever_open(&o, &r));
    q.fast = true;
    for (int i = 0; i < 2; i++, q.fast = false) {
        assert_ok(ibidi_retriever_find(r, &q, &m));
        assert_int_equal(m.n, 6);
        assert_null(m.degraded);
        ibidi_matches_close(&m);
    }
    /* a changed document is mined again */
    t_put(&t, "c", "tale", "Tale", "Now only Vienna is left, in Vienna.", NULL);
    assert_ok(ibidi_retriever_find(r, &q, &m));
    assert_int_equal(m.n, 2);
    assert_true(t_eq(m.matches[0].text, "Vienna"));
    ibidi_matches_close(&m);
    ibidi_retriever_close(r);
    t_close(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_occurrences), cmocka_unit_test(test_long),
        cmocka_unit_test(test_sentences),   cmocka_unit_test(test_align),
        cmocka_unit_test(test_find),        cmocka_unit_test(test_find_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
