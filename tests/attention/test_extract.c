/* What questions ask for; spans of a text and their order; quotes around a passage. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "attention/plan/citation.h"
#include "attention/plan/extract.h"

#include <math.h>
#include <string.h>

static ibid_str str(const char *s) {
    return (ibid_str){s, strlen(s)};
}

static void wants(void **state) {
    static const struct {
        const char *question;
        ibid_wants wants;
        bool fact;
    } cases[] = {
        {"How many sheep were sold in 1911?", IBID_WANTS_NUMBER, true},
        {"How deep is the well?", IBID_WANTS_NUMBER, true},
        {"What percentage of the wool was white?", IBID_WANTS_NUMBER, true},
        {"When did the ferry stop running?", IBID_WANTS_TIME, true},
        {"In what year was the pier built?", IBID_WANTS_TIME, true},
        {"Who kept the light?", IBID_WANTS_PERSON, true},
        {"Whose boat was it?", IBID_WANTS_PERSON, true},
        {"Where do the seals rest?", IBID_WANTS_PLACE, true},
        {"In which town did she live?", IBID_WANTS_PLACE, true},
        {"What colour was the door?", IBID_WANTS_THING, true},
        {"Why did the ferry stop running?", IBID_WANTS_MANNER, false},
        {"How was the pier paid for?", IBID_WANTS_MANNER, true},
        {"Could you explain what the pier is for?", IBID_WANTS_THING, false},
        {"Which word is used to describe the sheep?", IBID_WANTS_THING, true},
        {"How do the seals find their way?", IBID_WANTS_MANNER, false},
        {"Summarise the report.", IBID_WANTS_THING, false},
        {"Describe who came to the fair and when.", IBID_WANTS_TIME, false},
        {"When was the pier built, and how long is it?", IBID_WANTS_NUMBER, false},
        {"", IBID_WANTS_THING, false},
        {"whole whoever howitzer", IBID_WANTS_THING, false},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        print_message("%s\n", cases[i].question);
        assert_int_equal(ibid_question_wants(str(cases[i].question)), cases[i].wants);
        assert_int_equal(ibid_question_wants_fact(str(cases[i].question)), cases[i].fact);
    }
}

static const char *const skerry =
    "The lighthouse on Skerry Rock was finished in 1874 by Dr. J. Barnes and his two brothers. "
    "Its keeper, Halvard Brekke, lived there with eleven goats. Supplies came by boat every "
    "fortnight.\n\nThe lamp burned whale oil until the winter of 1902.";
static const char *const market = "The market was held on Mondays. Nobody remembers who began it.";

static size_t spans(const char *question, const char *const *text, size_t n, size_t max,
                    ibid_span *out) {
    ibid_str t[4];
    size_t n_out = 0;
    for (size_t i = 0; i < n; i++) t[i] = str(text[i]);
    assert_int_equal(ibid_extract_spans(str(question), t, n, max, out, &n_out), IBID_OK);
    assert_true(n_out <= max);
    for (size_t i = 0; i < n_out; i++) {
        const ibid_span *s = &out[i];
        assert_true(s->block < n && s->start < s->end && s->end <= t[s->block].n);
        assert_true(s->sentence_start <= s->start && s->end <= s->sentence_end);
        assert_true(s->sentence_end <= t[s->block].n);
        assert_true(s->evidence >= 0 && s->evidence <= 1 && isfinite(s->score));
        assert_true(i == 0 || out[i - 1].score >= s->score);
        assert_null(memchr(t[s->block].s + s->start, '\n', s->end - s->start));
    }
    return n_out;
}

static bool is(const ibid_span *s, const char *const *text, const char *want) {
    return s->end - s->start == strlen(want) &&
           memcmp(text[s->block] + s->start, want, strlen(want)) == 0;
}

static void assert_first(const char *question, const char *want) {
    const char *const both[] = {market, skerry};
    ibid_span s[5];
    size_t n = spans(question, both, 2, 5, s), at = 0;
    while (at < n && !is(&s[at], both, want)) at++;
    print_message("%s -> %.*s\n", question, (int)(s[0].end - s[0].start),
                  both[s[0].block] + s[0].start);
    assert_true(at < n);
}

/* By the text alone, the answer is among the first five of hundreds. */
static void order(void **state) {
    (void)state;
    assert_first("When was the lighthouse on the rock finished?", "1874");
    assert_first("Who was the keeper?", "Halvard Brekke");
    assert_first("How many goats lived there?", "eleven");
    assert_first("On which day was the market held?", "Mondays");
}

/* Of several quantities in one sentence the kind that is asked for comes first. */
static void quantities(void **state) {
    static const char *const text =
        "The tower is 31 metres tall, cost $1.2 million and took 4 years to build.";
    static const char *const asks[][2] = {{"How tall is the tower?", "31 metres"},
                                          {"How much did the tower cost?", "$1.2 million"}};
    (void)state;
    for (size_t k = 0; k < sizeof asks / sizeof *asks; k++) {
        ibid_span s[64];
        size_t n = spans(asks[k][0], &text, 1, 64, s), at = 0;
        while (at < n && !is(&s[at], &text, asks[k][1])) at++;
        assert_true(at < n);
        for (size_t i = 0; i < at; i++) {
            print_message("%s before: %.*s\n", asks[k][0], (int)(s[i].end - s[i].start),
                          text + s[i].start);
            assert_false(is(&s[i], &text, asks[1 - k][1]) || is(&s[i], &text, "4 years"));
        }
    }
}

/* Whether a text's spans hold exactly this one. */
static bool cut(const char *question, const char *text, const char *want) {
    static ibid_span s[4096];
    const char *const one[] = {text};
    size_t n = spans(question, one, 1, 4096, s);
    for (size_t i = 0; i < n; i++)
        if (is(&s[i], one, want)) return true;
    return false;
}

/* Which spans there are at all: whole quantities, whole dates unless a part is asked for, no words
 * of the question over a verb, no function words at an edge unless they belong to a name. */
static void cuts(void **state) {
    static const struct {
        const char *question, *text, *whole, *part;
    } cases[] = {
        {"How tall is the tower?", "The tower is 31 metres tall.", "31 metres", "31"},
        {"How tall is the tower?", "The tower is 31 metres tall.", "31 metres", "The tower is 31"},
        {"How tall is it?", "The tower is 3.5 metres tall.", "3.5 metres", "5 metres"},
        {"What did it cost?", "It cost $1.2 million in all.", "$1.2 million", "$1.2"},
        {"What did it cost?", "It cost about 40 per cent more.", "40 per cent", "40 per"},
        {"How much was wool?", "Of the cloth 48% was wool.", "48%", "was wool"},
        {"When did it open?", "It opened on 3 May 1911 in rain.", "3 May 1911", "May 1911"},
        {"When did it open?", "It opened on May 3, 1911, in rain.", "May 3, 1911", "May 3"},
        {"When was it built?", "It stood there by 40 BC already.", "40 BC", "40"},
        {"When was it built?", "It is of the 12th century.", "12th century", "12th"},
        {"Who kept the light?", "The light was kept by J. Barnes then.", "J. Barnes", "Barnes"},
        {"Where did he go?", "He went to the U.S. Mint by rail.", "U.S. Mint", "S. Mint"},
        {"Which band played?", "That night The Herons played.", "The Herons", "night The"},
        {"Which band played?", "That night the herons played.", "herons", "the herons"},
        {"Who was it?", "It was Barnes's brother.", "Barnes", "Barnes's"},
        {"When did it open?", "It opened on 3 May 1911 in rain.", "3 May 1911", "on 3 May 1911"},
        {"In what year did it open?", "It opened on 3 May 1911.", "1911", "May 1911"},
        {"How long did he stay?", "He stayed for 27 years.", "27 years", "for 27 years"},
        {"What is the light?", "It is a lamp and a bell.", "lamp", "and a bell"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        print_message("%s %s: %s, not %s\n", cases[i].question, cases[i].text, cases[i].whole,
                      cases[i].part);
        assert_true(cut(cases[i].question, cases[i].text, cases[i].whole));
        assert_false(cut(cases[i].question, cases[i].text, cases[i].part));
    }
    /* What is asked for may be a part. */
    assert_true(cut("In what year did it open?", "It opened on 3 May 1911 in rain.", "1911"));
    assert_true(cut("In which month did it open?", "It opened on 3 May 1911.", "May"));
    assert_true(cut("How many metres tall is it?", "The tower is 31 metres tall.", "31"));
    assert_true(cut("How did they come?", "They came by boat.", "by boat"));
    assert_true(cut("Whose hat was it?", "It was Barnes's hat.", "Barnes's"));
    assert_true(cut("What do they need?", "All of them need vitamin A daily.", "vitamin A"));
    assert_true(cut("When did it open?", "It opened in May after all.", "May"));
    assert_false(cut("When did it open?", "It may open on Monday.", "may open"));
}

/* "Dr. J." ends no sentence, a line does. */
static void sentences(void **state) {
    ibid_span s[512];
    const char *const one[] = {skerry};
    size_t n = spans("Who finished the lighthouse?", one, 1, 512, s);
    bool with_brothers = false;
    (void)state;
    assert_true(n > 50);
    for (size_t i = 0; i < n; i++) {
        assert_true(skerry[s[i].sentence_end - 1] == '.');
        if (is(&s[i], one, "1874"))
            with_brothers = memcmp(skerry + s[i].sentence_end - 9, "brothers.", 9) == 0;
    }
    assert_true(with_brothers);
}

static void odd_texts(void **state) {
    ibid_span s[8];
    const char *const odd[] = {"", " \n\n ", "...!?", "\xFF\xFE\x80 Rome \xC3"};
    (void)state;
    assert_int_equal(spans("Where?", odd, 3, 8, s), 0);
    assert_true(spans("Where is Rome?", odd, 4, 8, s) >= 1);
    assert_int_equal(spans("Where?", odd, 0, 8, s), 0);
    assert_true(spans("", (const char *const[]){skerry}, 1, 8, s) == 8);
}

/* Pieces of text and stray bytes in any order: spans stay inside the text and its sentences. */
static void random_texts(void **state) {
    static const char *const bits[] = {
        "The ", "Rome", "1874",  " ",    ".",  "\n",          "\xE2\x80\x99", "\xC3",
        "Dr.",  "? ",   "U.S. ", "3.5%", "$",  "caf\xC3\xA9", "\xE3\x80\x82", "-",
        "'s",   " of ", " and ", ", ",   "\"", "who ",        "\xE2\x80",     "("};
    uint32_t x = 20261121;
    char text[2][512];
    ibid_span s[8];
    (void)state;
    print_message("seed %u\n", x);
    for (size_t round = 0; round < 4000; round++) {
        for (size_t k = 0; k < 2; k++) {
            text[k][0] = '\0';
            for (size_t i = round % 40; i > 0; i--) {
                x = x * 1664525 + 1013904223;
                strcat(text[k], bits[(x >> 16) % (sizeof bits / sizeof *bits)]);
            }
        }
        (void)spans(text[0], (const char *const[]){text[1]}, 1, 8, s);
        (void)ibid_question_wants_fact(str(text[0]));
    }
}

static void around(void **state) {
    ibid_str t = str(skerry);
    const char *at = strstr(skerry, "Halvard");
    uint64_t start = (uint64_t)(at - skerry), end = start + 7;
    uint64_t from = (uint64_t)(strstr(skerry, "Its") - skerry);
    uint64_t to = (uint64_t)(strstr(skerry, " Supplies") - skerry);
    ibid_cite c = {0};
    (void)state;
    ibid_cite_around(t, start, end, from, to, 300, &c);
    assert_true(c.start == from && c.end == to);
    for (size_t bytes = 1; bytes < 60; bytes++) {
        ibid_cite_around(t, start, end, from, to, bytes, &c);
        assert_true(c.start >= from && c.start <= start && c.end >= end && c.end <= to);
        assert_true(c.end - c.start <= (bytes > 7 ? bytes : 7));
        assert_true(c.start == start || skerry[c.start - 1] == ' ');
        assert_true(c.end == end || skerry[c.end] == ' ' || c.end == to);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(wants),      cmocka_unit_test(order),        cmocka_unit_test(cuts),
        cmocka_unit_test(quantities), cmocka_unit_test(sentences),    cmocka_unit_test(odd_texts),
        cmocka_unit_test(around),     cmocka_unit_test(random_texts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
