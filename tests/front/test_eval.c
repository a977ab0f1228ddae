/* The measures of `ibid eval` against examples worked by hand. */
#include "rpc/front/eval/data.h"
#include "rpc/front/eval/needles.h"
#include "rpc/front/eval/rank.h"
#include "rpc/front/eval/spans.h"
#include "rpc/front/eval/svg.h"
#include "rpc/front/eval/text.h"

#include <libstemmer.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static ibid_str str(const char *s) {
    return (ibid_str){s, strlen(s)};
}

#define NEAR(a, b) assert_true(fabs((a) - (b)) < 1e-6)

/* ---- rankings ---- */

static void test_rank(void **state) {
    (void)state;
    double gains[] = {0, 4, 0, 1}, judged[] = {1, 4, 2};
    ibidi_rank_scores s;
    ibidi_rank(gains, 4, judged, 3, &s);
    /* (4 / log2 3 + 1 / log2 5) / (4 + 2 / log2 3 + 1 / 2) = 2.9543956 / 5.7618595 */
    NEAR(s.ndcg10, 0.5127504);
    NEAR(s.mrr10, 0.5);
    NEAR(s.recall[0], 0);
    NEAR(s.recall[1], 2.0 / 3);
    NEAR(s.recall[3], 2.0 / 3);
    double late[11] = {0};
    late[10] = 1;
    double one[] = {1};
    ibidi_rank(late, 11, one, 1, &s); /* eleventh: beyond every cut at ten */
    NEAR(s.ndcg10, 0);
    NEAR(s.mrr10, 0);
    NEAR(s.recall[2], 0);
    NEAR(s.recall[3], 1);
    ibidi_rank(NULL, 0, one, 1, &s);
    NEAR(s.ndcg10, 0);
    ibidi_rank(one, 1, NULL, 0, &s);
    NEAR(s.ndcg10, 0);
}

static void test_bootstrap(void **state) {
    (void)state;
    enum { N = 400 };
    double a[N], b[N];
    ibidi_interval i, again;
    for (int k = 0; k < N; k++) a[k] = 0.5, b[k] = 0.75;
    assert_int_equal(ibidi_bootstrap(a, b, N, IBIDI_EVAL_SEED, &i), IBID_OK);
    NEAR(i.mean, 0.25); /* the same difference everywhere: no spread at all */
    NEAR(i.low, 0.25);
    NEAR(i.high, 0.25);
    for (int k = 0; k < N; k++) b[k] = k % 2;
    assert_int_equal(ibidi_bootstrap(NULL, b, N, IBIDI_EVAL_SEED, &i), IBID_OK);
    NEAR(i.mean, 0.5);
    /* A proportion's standard error is sqrt(0.25 / 400) = 0.025; 1.96 of them each way. */
    assert_true(fabs(i.low - 0.451) < 0.006 && fabs(i.high - 0.549) < 0.006);
    assert_int_equal(ibidi_bootstrap(NULL, b, N, IBIDI_EVAL_SEED, &again), IBID_OK);
    assert_memory_equal(&i, &again, sizeof i);
    assert_int_equal(ibidi_bootstrap(a, b, 0, 1, &i), IBID_INVAL);
}

static void test_percentile_fold(void **state) {
    (void)state;
    double v[] = {5, 1, 4, 2, 3};
    NEAR(ibidi_percentile(v, 5, 0.5), 3);
    NEAR(ibidi_percentile(v, 5, 0.99), 5);
    NEAR(ibidi_percentile(v, 5, 0), 1);
    NEAR(ibidi_percentile(v, 0, 0.5), 0);
    size_t count[4] = {0};
    for (int i = 0; i < 4000; i++) {
        char id[16];
        (void)snprintf(id, sizeof id, "q%d", i);
        size_t f = ibidi_fold(id, 4);
        assert_true(f < 4);
        assert_int_equal(f, ibidi_fold(id, 4));
        count[f]++;
    }
    for (int f = 0; f < 4; f++) assert_in_range(count[f], 800, 1200);
}

/* ---- answers ---- */

static void check_qa(const char *answer, const char *gold, double exact, double f1,
                     double contains) {
    ibidi_qa_scores s;
    assert_int_equal(ibidi_eval_qa(str(answer), str(gold), &s), IBID_OK);
    if (fabs(s.exact - exact) + fabs(s.f1 - f1) + fabs(s.contains - contains) > 1e-6)
        fail_msg("\"%s\" against \"%s\": %.4f %.4f %.4f", answer, gold, s.exact, s.f1, s.contains);
}

static void test_qa(void **state) {
    (void)state;
    check_qa("The Normans!", "normans", 1, 1, 1);
    check_qa("In the year 1066 AD.", "1066", 0, 2.0 / 5, 1); /* in year 1066 ad */
    check_qa("It is 31 metres tall", "3", 0, 0, 0);
    check_qa("a cat, a dog and a cat", "cat cat fish", 0, 2.0 * 2 / (4 + 3), 0);
    check_qa("\u201e\u00dcber alles\u201c", "\u00fcber alles", 1, 1, 1);
    check_qa("don\u2019t", "don't", 1, 1, 1);
    check_qa("\u5728\u5317\u4eac\u5e02\u3002", "\u5317\u4eac", 0, 2.0 * 2 / (4 + 2), 1);
    check_qa("", "x", 0, 0, 0);
    check_qa("$5", "5", 1, 1, 1);
    check_qa("an answer", "the answer", 1, 1, 1);
    ibidi_qa_scores s;
    ibid_str golds[] = {str("eleven"), str("11 years")};
    assert_int_equal(ibidi_eval_qa_best(str("after 11 years"), golds, 2, &s), IBID_OK);
    NEAR(s.f1, 2.0 * 2 / 5);
    NEAR(s.contains, 1);
    assert_int_equal(ibidi_eval_word_count(str(" one  two\nthree ")), 3);
    assert_int_equal(ibidi_eval_word_count(str("\u5317\u4eac city")), 3);
}

static void test_normal(void **state) {
    (void)state;
    ibid_buf b;
    ibid_buf_init(&b, 1000);
    assert_int_equal(
        ibidi_eval_normal(IBIDI_NORM_KTRLF, str(" The  U.S. Army\u2019s \xff AN end "), &b),
        IBID_OK);
    assert_string_equal(b.data, "us army\u2019s end"); /* ASCII's punctuation alone */
    ibid_buf_fini(&b);
}

/* ---- spans ---- */

static size_t common(const char *a, const char *b) {
    int32_t *pa = NULL, *pb = NULL;
    size_t na, nb, work[1024];
    assert_int_equal(ibidi_eval_points(str(a), &pa, &na), IBID_OK);
    assert_int_equal(ibidi_eval_points(str(b), &pb, &nb), IBID_OK);
    assert_true(2 * (nb + 1) <= 1024);
    size_t n = ibidi_eval_common(pa, na, pb, nb, work);
    ibid_free(pa);
    ibid_free(pb);
    return n;
}

static void test_common(void **state) {
    (void)state;
    char b[202] = "";
    assert_int_equal(common("new york city", "york"), 4);
    assert_int_equal(common("abc", "xyz"), 0);
    assert_int_equal(common("\u00e9t\u00e9", "l\u00e9t"), 2);
    for (int i = 0; i < 200; i += 2) memcpy(b + i, "ab", 2);
    b[200] = 'q';
    /* From 200 characters on difflib seeds no match at frequent ones (values from Python 3.11). */
    assert_int_equal(common("abq", b), 3);
    assert_int_equal(common("abab", b), 4);
    assert_int_equal(common("baba", b), 0);
    assert_int_equal(common("baba", "abababa"), 4);
}

static void check_spans(const char **found, size_t nf, const char **gold, size_t ng, double em,
                        double p, double r) {
    ibid_str f[8], g[8];
    ibidi_span_scores s;
    for (size_t i = 0; i < nf; i++) f[i] = str(found[i]);
    for (size_t i = 0; i < ng; i++) g[i] = str(gold[i]);
    assert_int_equal(ibidi_eval_spans(f, nf, g, ng, &s), IBID_OK);
    NEAR(s.em_f1, em);
    NEAR(s.overlap_p, p);
    NEAR(s.overlap_r, r);
    NEAR(s.overlap_f1, p + r > 0 ? 2 * p * r / (p + r) : 0);
}

static void test_spans(void **state) {
    (void)state;
    const char *twice[] = {"Paris", "PARIS", "the Rome"}, *cities[] = {"paris", "Rome."};
    check_spans(twice, 3, cities, 2, 0.8, 1, 1); /* credit 2 of 3 and 2 of 2 */
    const char *york[] = {"New York"}, *yorks[] = {"New York City", "New York"};
    /* Greedy: the first gold takes the only prediction, 8 of its 13; the second has none left. */
    check_spans(york, 1, yorks, 2, 2 * 1 * 0.5 / 1.5, 1, 8.0 / 13 / 2);
    const char *near[] = {"lake", "blue lake"}, *lakes[] = {"lake"};
    check_spans(near, 2, lakes, 1, 2 * 0.5 * 1 / 1.5, (1 + 4.0 / 9) / 2, 1);
    check_spans(NULL, 0, NULL, 0, 1, 1, 1);
    check_spans(NULL, 0, lakes, 1, 0, 0, 0);
    check_spans(lakes, 1, NULL, 0, 0, 0, 0);
}

static void test_capitalised(void **state) {
    (void)state;
    static const char *const wanted[] = {
        "Harl", "Maren Tolliver of Oster", "June", "NASA", "\u00c9cole", "Maren"};
    const char *text = "The Harl bridge was built by Maren Tolliver of Oster. In June, NASA left "
                       "the \u00c9cole of art. It was Maren";
    ibid_str *list = NULL;
    size_t n = 0;
    assert_int_equal(ibidi_eval_capitalised(str(text), &list, &n), IBID_OK);
    assert_int_equal(n, sizeof wanted / sizeof *wanted);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(list[i].n, strlen(wanted[i]));
        assert_memory_equal(list[i].s, wanted[i], list[i].n);
    }
    ibid_free(list);
}

/* ---- the picture ---- */

static void test_svg(void **state) {
    (void)state;
    const double cells[] = {0, 1, 0.5, -1};
    const char *columns[] = {"1k", "10k"}, *rows[] = {"0 %", "50 %"};
    ibidi_panel panels[] = {{"a < b & c", cells}, {"two", cells}};
    ibidi_grid g = {"title", "tokens", "depth", columns, rows, 2, 2, panels, 2, 2};
    ibid_buf b;
    ibid_buf_init(&b, 1 << 20);
    assert_int_equal(ibidi_eval_svg(&g, &b), IBID_OK);
    assert_non_null(strstr(b.data, "a &lt; b &amp; c"));
    assert_non_null(strstr(b.data, ">0.50<"));
    size_t open = 0, shut = 0;
    for (const char *p = b.data; (p = strstr(p, "<text")); p++) open++;
    for (const char *p = b.data; (p = strstr(p, "</text>")); p++) shut++;
    assert_int_equal(open, shut);
    assert_int_equal(open, 1 + 2 * (3 + 2 + 2 + 4) + 2); /* names, rows, columns, cells; legend */
    assert_memory_equal(b.data + b.len - 7, "</svg>\n", 7);
    ibid_buf_fini(&b);
}

/* ---- the needles ---- */

static const char *const function_words[] = {
    "a",       "about", "after",    "all",   "always",   "among", "an",     "and",    "any",
    "as",      "at",    "away",     "be",    "because",  "been",  "before", "behind", "between",
    "both",    "by",    "can",      "come",  "did",      "do",    "does",   "down",   "each",
    "every",   "for",   "from",     "get",   "gets",     "going", "got",    "had",    "has",
    "have",    "he",    "her",      "him",   "his",      "how",   "if",     "in",     "inside",
    "instead", "into",  "is",       "it",    "its",      "many",  "may",    "near",   "not",
    "now",     "of",    "off",      "on",    "one",      "only",  "or",     "our",    "out",
    "over",    "she",   "since",    "so",    "somebody", "than",  "that",   "the",    "their",
    "them",    "they",  "to",       "two",   "under",    "until", "up",     "was",    "were",
    "what",    "when",  "whenever", "where", "which",    "while", "who",    "whom",   "whose",
    "why",     "will",  "with",     "own",   "made",     "make",  "makes",  "take"};

static bool is_function_word(const char *w) {
    for (size_t i = 0; i < sizeof function_words / sizeof *function_words; i++)
        if (strcmp(w, function_words[i]) == 0) return true;
    return false;
}

/* Stems of a sentence's content words, sorted by nothing; at most 64. A possessive is its word. */
static size_t stems(struct sb_stemmer *st, ibid_str text, char out[64][40]) {
    size_t n = 0;
    for (size_t i = 0; i < text.n;) {
        char w[40];
        size_t k = 0;
        while (i < text.n && !((text.s[i] | 32) >= 'a' && (text.s[i] | 32) <= 'z')) i++;
        while (i < text.n && k < sizeof w - 1 && (text.s[i] | 32) >= 'a' && (text.s[i] | 32) <= 'z')
            w[k++] = (char)(text.s[i++] | 32);
        w[k] = '\0';
        if (k < 2 || is_function_word(w)) continue;
        const sb_symbol *s = sb_stemmer_stem(st, (const sb_symbol *)w, (int)k);
        assert_true(n < 64);
        (void)snprintf(out[n++], 40, "%s", (const char *)s);
    }
    return n;
}

static size_t shared(struct sb_stemmer *st, ibid_str a, ibid_str b, char word[40]) {
    static char sa[64][40], sb[64][40];
    size_t na = stems(st, a, sa), nb = stems(st, b, sb), n = 0;
    for (size_t i = 0; i < na; i++)
        for (size_t j = 0; j < nb; j++)
            if (strcmp(sa[i], sb[j]) == 0) {
                memcpy(word, sa[i], 40);
                n++;
            }
    return n;
}

static void test_needles(void **state) {
    (void)state;
    ibidi_needles n;
    char word[40];
    struct sb_stemmer *st = sb_stemmer_new("english", NULL);
    assert_non_null(st);
    assert_int_equal(ibidi_needles_read(NULL, &n), IBID_OK);
    assert_true(n.n_facts >= 50);
    assert_true(n.n_threads >= 10);
    size_t bad = 0;
    for (size_t i = 0; i < n.n_facts; i++) {
        const ibidi_fact *f = &n.facts[i];
        if (shared(st, f->statement, f->apart, word)) {
            print_error("\"%s\" is in both: %.*s | %.*s\n", word, (int)f->statement.n,
                        f->statement.s, (int)f->apart.n, f->apart.s);
            bad++;
        }
        assert_true(shared(st, f->statement, f->alike, word) >= 2);
        for (size_t k = 0; k < i; k++) /* no two alike: a question has one needle */
            assert_false(f->statement.n == n.facts[k].statement.n &&
                         memcmp(f->statement.s, n.facts[k].statement.s, f->statement.n) == 0);
    }
    for (size_t i = 0; i < n.n_threads; i++) {
        const ibidi_thread *t = &n.threads[i];
        assert_true(shared(st, t->first, t->second, word) >= 1); /* what ties them */
        assert_true(shared(st, t->first, t->question, word) >= 1);
    }
    assert_int_equal(bad, 0);
    ibidi_needles_fini(&n);
    sb_stemmer_delete(st);
}

static void write_text(const char *path, const char *text) {
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

static void test_needles_bad(void **state) {
    (void)state;
    static const struct {
        const char *text, *what;
    } cases[] = {{"S: one.\nO: two?\n", ":3:"},
                 {"X: one.\n", ":1:"},
                 {"S: one.\nN: x?\nO: two?\n", ":2:"},
                 {"A: one.\nB: two.\n\n", ":3:"},
                 {"# nothing\n", "no needles"}};
    char path[] = "/tmp/ibid-needles-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ibidi_needles n;
        write_text(path, cases[i].text);
        assert_int_equal(ibidi_needles_read(path, &n), IBID_INVAL);
        if (!strstr(ibid_err_detail(), cases[i].what))
            fail_msg("case %zu: %s", i, ibid_err_detail());
    }
    (void)unlink(path);
}

/* ---- data ---- */

static void test_beir(void **state) {
    (void)state;
    char dir[] = "/tmp/ibid-beir-XXXXXX", c[64], q[64], r[64], out[64];
    assert_non_null(mkdtemp(dir));
    (void)snprintf(c, sizeof c, "%s/c", dir), (void)snprintf(q, sizeof q, "%s/q", dir);
    (void)snprintf(r, sizeof r, "%s/r", dir), (void)snprintf(out, sizeof out, "%s/o", dir);
    write_text(c,
               "{\"_id\":\"b\",\"title\":\"T\",\"text\":\"x\"}\n{\"_id\":\"a\",\"text\":\"y\"}\n");
    write_text(q, "{\"_id\":\"1\",\"text\":\"x?\"}\n{\"_id\":\"2\",\"text\":\"y?\"}\n");
    write_text(r, "query-id\tcorpus-id\tscore\n1\tb\t2\n1\ta\t1\n1\tzz\t1\n2\ta\t0\n9\ta\t1\n");
    ibidi_set s;
    assert_int_equal(ibidi_set_beir(c, q, r, out, &s), IBID_OK);
    assert_int_equal(s.n_documents, 2);
    assert_int_equal(s.n_questions, 1); /* query 2 has nothing relevant */
    assert_int_equal(s.unjudged, 1);
    assert_int_equal(s.missing, 1);
    assert_int_equal(s.questions[0].n_judged, 3);
    assert_string_equal(s.questions[0].judged[0].document, "a");
    NEAR(s.questions[0].judged[1].gain, 2);
    ibidi_set_fini(&s);
    static const struct {
        const char *corpus, *qrels, *what;
    } bad[] = {
        {"{\"_id\":\"b\",\"text\":1}\n", "1\tb\t1\n", "/c:1:"},
        {"{\"_id\":\"b\",\"text\":\"x\"}\n\nnope\n", "1\tb\t1\n", "/c:3:"},
        {"{\"_id\":\"b\",\"text\":\"x\"}\n", "h\tb\tscore\n1 b 1\n", "/r:2:"},
        {"{\"_id\":\"b\",\"text\":\"x\"}\n", "h\tb\tscore\n1\tb\tmuch\n", "/r:2:"},
        {"{\"_id\":\"b\",\"text\":\"x\"}\n", "1\tb\t1\n1\tb\t2\n", "twice"},
        {"{\"_id\":\"b\",\"text\":\"x\"}\n{\"_id\":\"b\",\"text\":\"x\"}\n", "1\tb\t1\n", "twice"},
        {"", "1\tb\t1\n", "no documents"},
        {"{\"_id\":\"b\",\"text\":\"x\"}\n", "7\tb\t1\n", "no query"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_text(c, bad[i].corpus);
        write_text(r, bad[i].qrels);
        assert_int_equal(ibidi_set_beir(c, q, r, out, &s), IBID_INVAL);
        if (!strstr(ibid_err_detail(), bad[i].what)) fail_msg("case %zu: %s", i, ibid_err_detail());
    }
    (void)unlink(c), (void)unlink(q), (void)unlink(r), (void)unlink(out), (void)rmdir(dir);
}

static void test_limit(void **state) {
    (void)state;
    ibidi_question q[10] = {0};
    for (size_t i = 0; i < 10; i++) q[i].document = i;
    ibidi_set s = {.questions = q, .n_questions = 10};
    ibidi_set_limit(&s, 4);
    assert_int_equal(s.n_questions, 4);
    assert_int_equal(q[1].document, 2);
    assert_int_equal(q[3].document, 7);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rank),
        cmocka_unit_test(test_bootstrap),
        cmocka_unit_test(test_percentile_fold),
        cmocka_unit_test(test_qa),
        cmocka_unit_test(test_normal),
        cmocka_unit_test(test_common),
        cmocka_unit_test(test_spans),
        cmocka_unit_test(test_capitalised),
        cmocka_unit_test(test_svg),
        cmocka_unit_test(test_needles),
        cmocka_unit_test(test_needles_bad),
        cmocka_unit_test(test_beir),
        cmocka_unit_test(test_limit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
