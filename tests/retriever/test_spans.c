/* Candidate spans: which names, dates, numbers, quotes and addresses a text holds, which names are
 * one entity, and how entities are ranked. */
#include "support.h"

#include "retriever/rank.h"
#include "retriever/spans.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* want: the spans of one kind, "|" between them; behind names the number of their entity. */
static void expect(const char *text, ibidi_span_kind kind, const char *want) {
    ibidi_spans s;
    char got[2048] = "";
    char *exact = malloc(strlen(text) + 1); /* no byte behind the text may be read */
    memcpy(exact, text, strlen(text));
    assert_ok(ibidi_spans_mine((ibid_str){exact, strlen(text)}, &s));
    for (size_t i = 0; i < s.n; i++) {
        if (s.v[i].kind != kind) continue;
        size_t len = strlen(got);
        len += (size_t)snprintf(got + len, sizeof got - len, "%s%.*s", len ? "|" : "",
                                (int)(s.v[i].end - s.v[i].start), text + s.v[i].start);
        if (kind == IBIDI_SPAN_NAME) snprintf(got + len, sizeof got - len, "%u", s.v[i].entity);
    }
    if (strcmp(got, want) != 0) print_error("in '%s'\n got %s\nwant %s\n", text, got, want);
    assert_string_equal(got, want);
    ibidi_spans_fini(&s);
    free(exact);
}

static void names(const char *text, const char *want) {
    expect(text, IBIDI_SPAN_NAME, want);
}

static void test_names(void **state) {
    (void)state;
    names("", "");
    names("nothing to see here", "");
    names("We met Anna in Prague.", "Anna0|Prague1");
    /* a capital at the start of a sentence counts only with other evidence */
    names("Robots are sold in Prague. A robot helps.", "Prague0");
    names("Asimo walks. Asimo talks.", "Asimo0|Asimo0"); /* twice, and never in lower case */
    names("They came to Xanthia. Xanthia was quiet.", "Xanthia0|Xanthia0");
    names("Makers, they say, sell a robot. The makers left.", "");
    names("Wunmi said no.", "Wunmi0");
    /* longer names, connectors, abbreviations, titles, possessives */
    names("at the University of the Philippines today", "University of the Philippines0");
    names("by the Department of Health and Human Services",
          "Department of Health and Human Services0");
    names("we saw Ann Lee and Bob Ray there", "Ann Lee0|Bob Ray1");
    names("films by Warner Bros. in the U.S. and more", "Warner Bros0|U.S1");
    names("so President Barack Obama spoke", "Barack Obama0");
    names("and Advance Executive Editor Brian Laline wrote", "Advance0|Brian Laline1");
    names("in Staten Island's Holocaust museum", "Staten Island0|Holocaust1");
    names("by the Johnson & Wales college", "Johnson & Wales0");
    names("with Jean-Luc O'Neil of CERN", "Jean-Luc O'Neil0|CERN1");
    names("on Black Friday, on a Friday in May", "Black Friday0");
    names("the TV and the CEO, and I", "");
    names("see \xC3\x89lodie in \xC3\x8E"
          "le Rousse",
          "\xC3\x89lodie0|\xC3\x8E"
          "le Rousse1");
    names("we met \xD0\x98\xD0\xB2\xD0\xB0\xD0\xBD there", "\xD0\x98\xD0\xB2\xD0\xB0\xD0\xBD"
                                                           "0");
    /* a heading's capitals are believed only for what is a name elsewhere */
    names("New Rules For Everyone In Prague\n\nIt rained in Prague again.", "Prague0|Prague0");
}

static void test_entities(void **state) {
    (void)state;
    names("Then Goldie Smith came. We like Goldie. Smith left; so did Smith's dog.",
          "Goldie Smith0|Goldie0|Smith0|Smith0");
    names("the Jewish Community Center, or JCC for short", "Jewish Community Center0|JCC0");
    names("in the U.S. and the United States", "U.S0|United States0");
    names("a Republican met two Republicans", "Republican0|Republicans0");
    names("he likes STUTTHOF and Stutthof", "STUTTHOF0|Stutthof0");
    /* a place in a longer name is another thing */
    names("the Metro Manila line and in Manila itself", "Metro Manila0|Manila1");
    names("to San Angelo Independent School District and to San Angelo",
          "San Angelo Independent School District0|San Angelo1");
}

static void test_other_kinds(void **state) {
    (void)state;
    expect("on 3 May 2019, in June, since 1961 and Monday", IBIDI_SPAN_DATE,
           "3 May 2019|June|1961|Monday");
    expect("it may march on", IBIDI_SPAN_DATE, "");
    expect("paid 1,000 dollars for 3.5 million tons, 45 percent", IBIDI_SPAN_NUMBER,
           "1,000 dollars|3.5 million tons|45 percent");
    expect("she said \"come here\" and \xE2\x80\x9CWhere Life Leads\xE2\x80\x9D too",
           IBIDI_SPAN_QUOTE, "come here|Where Life Leads");
    expect("open \" and\nnever closed", IBIDI_SPAN_QUOTE, "");
    expect("write to a.b@c.org or see https://x.y/z?q=1.", IBIDI_SPAN_ADDRESS,
           "a.b@c.org|https://x.y/z?q=1");
}

/* Any bytes: offsets hold, entities add up (more of it in the fuzz target). */
static void test_any_bytes(void **state) {
    (void)state;
    static const char *const parts[] = {"Ann ",  "Lee",           " of ", ". ",   "\n",  "the ",
                                        "\"",    "X.Y. ",         "'s ",  "\xFF", " & ", "1961",
                                        "City ", "\xE2\x80\x99s "};
    uint64_t seed = 5;
    print_message("seed %llu\n", (unsigned long long)seed);
    for (int round = 0; round < 3000; round++) {
        char text[256] = "";
        for (size_t i = t_rnd(&seed) % 24; i > 0; i--)
            strcat(text, parts[t_rnd(&seed) % (sizeof parts / sizeof *parts)]);
        ibidi_spans s;
        size_t mentions = 0, found = 0;
        assert_ok(ibidi_spans_mine(t_str(text), &s));
        for (size_t i = 0; i < s.n; i++) {
            assert_true(s.v[i].start < s.v[i].end && s.v[i].end <= strlen(text));
            if (s.v[i].kind == IBIDI_SPAN_NAME) assert_true(s.v[i].entity < s.n_entities);
            found += s.v[i].kind == IBIDI_SPAN_NAME;
        }
        for (size_t i = 0; i < s.n_entities; i++) mentions += s.entities[i].mentions;
        assert_int_equal(mentions, found);
        ibidi_spans_fini(&s);
    }
}

static void test_no_memory(void **state) {
    (void)state;
    const char *text = "We met Ann Lee (the JCC) at the Jewish Community Center on 3 May 2019.";
    for (uint64_t nth = 1;; nth++) {
        ibidi_spans s;
        ibid_alloc_fail_at(nth);
        ibid_err e = ibidi_spans_mine(t_str(text), &s);
        ibid_alloc_fail_at(0);
        if (!e) {
            assert_true(nth > 5);
            ibidi_spans_fini(&s);
            return;
        }
        assert_int_equal(e, IBID_NOMEM);
        assert_null(s.v);
    }
}

static void test_asked(void **state) {
    (void)state;
    ibidi_words *w;
    ibidi_asked q;
    assert_ok(ibidi_words_open(&w));
    assert_ok(ibidi_asked_of(w, t_str("High schools in Texas"), &q));
    assert_true(q.organization && !q.place && !q.person);
    assert_int_equal(q.n_head, 2); /* high, school */
    assert_int_equal(q.n_rest, 1);
    assert_true(q.head[1] == ibidi_stem_hash("school", 6));
    assert_ok(ibidi_asked_of(w, t_str("people who worked at the lighthouse"), &q));
    assert_true(q.person && !q.organization);
    assert_ok(ibidi_asked_of(w, t_str("vessel"), &q));
    assert_false(q.person || q.place || q.organization || q.work || q.sentence);
    assert_ok(ibidi_asked_of(w, t_str("how does the lamp work"), &q));
    assert_true(q.sentence);
    assert_ok(ibidi_asked_of(w, t_str("what companies are there"), &q));
    assert_false(q.sentence);
    assert_ok(ibidi_asked_of(w, t_str("years it was dark"), &q));
    assert_true(q.kinds == 1u << IBIDI_SPAN_DATE);
    ibidi_words_close(w);
}

/* Of two entities alike in all else, the one that keys, gain or its own name speak for comes
 * first; and what is standardised does not depend on the scale of the keys. */
static void test_rank(void **state) {
    (void)state;
    ibidi_entity e[3];
    uint64_t school = ibidi_stem_hash("school", 6);
    ibidi_asked q = {.organization = true, .head = {school}, .n_head = 1};
    double f[3 * IBIDI_FEATURES], g[3 * IBIDI_FEATURES];
    for (int i = 0; i < 3; i++) e[i] = (ibidi_entity){.mentions = 2, .words = 2};
    for (int what = 0; what < 3; what++) {
        ibidi_evidence v[3];
        for (int i = 0; i < 3; i++) v[i] = (ibidi_evidence){.tokens = 1.5, .keys = 0.5, .gain = -1};
        if (what == 0) v[1].keys = 0.6;
        if (what == 1) v[1].gain = 0.5;
        if (what == 2) v[1].stems = &school, v[1].n_stems = 1;
        ibidi_rank_features(&q, e, v, 3, f);
        assert_true(ibidi_rank_score(f + IBIDI_FEATURES, true) > ibidi_rank_score(f, true));
        assert_true(ibidi_rank_score(f, true) == ibidi_rank_score(f + 2 * IBIDI_FEATURES, true));
        for (int i = 0; i < 3; i++) v[i].keys = v[i].keys * 7 + 3;
        ibidi_rank_features(&q, e, v, 3, g);
        for (int i = 0; i < 3 * IBIDI_FEATURES; i++) assert_true(fabs(f[i] - g[i]) < 1e-9);
    }
    ibidi_evidence one = {.tokens = 1, .keys = 0.5, .gain = NAN};
    ibidi_rank_features(&q, e, &one, 1, f);
    for (int i = 0; i < IBIDI_FEATURES; i++) assert_true(isfinite(f[i]));
    ibidi_rank_limits l = ibidi_rank_defaults(true);
    assert_true(l.threshold > 0 && l.threshold < 1 && l.within >= 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),       cmocka_unit_test(test_entities),
        cmocka_unit_test(test_other_kinds), cmocka_unit_test(test_any_bytes),
        cmocka_unit_test(test_no_memory),   cmocka_unit_test(test_asked),
        cmocka_unit_test(test_rank),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
