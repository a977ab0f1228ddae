/* The engine over a real store: what is acknowledged is found, filters never starve, both ways of
 * scoring agree, damaged and stale files are built again. */
#include "support.h"

#include "rpc/base/clock.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static ibidi_retriever *open_r(const ibidi_retriever_opts *o) {
    ibidi_retriever *r;
    assert_ok(ibidi_retriever_open(o, &r));
    return r;
}

static void expect(ibidi_retriever *r, const char *collection, const char *question,
                   const char *want) {
    char got[1024];
    t_search(r, collection, question, 1, got);
    if (strcmp(got, want) != 0) print_error("question: %s\n", question);
    assert_string_equal(got, want);
}

static void basic(t_store *t) {
    t_put(t, "c", "sea", "Harbour", "The boat left the harbour at dawn.\n\nGulls cried over it.",
          NULL);
    t_put(t, "c", "road", "Streets", "An automobile stood in the street.",
          "{\"lang\":\"en\",\"year\":1999}");
    t_put(t, "c", "court", "Palace", "The king received the doctor in the hall.",
          "{\"lang\":\"de\",\"tags\":[\"old\",\"law\"],\"in\":{\"city\":\"Rome\"},\"ok\":true}");
}

static void test_search(void **state) {
    (void)state;
    t_store t;
    ibidi_found f;
    t_open(&t);
    basic(&t);
    ibidi_retriever_opts o = t_opts(&t);
    ibidi_retriever *r = open_r(&o);
    expect(r, "c", "Where is the boat?", "sea");
    expect(r, "c", "vessel", "sea"); /* no word in common: keys alone */
    expect(r, "c", "car", "road");
    expect(r, "c", "physician", "court");
    expect(r, "c", "streets", "road");

    ibid_search_request q = {.collection = t_str("c"), .question = t_str("vessel"), .top = 3};
    assert_ok(ibidi_retriever_search(r, &q, &f));
    assert_int_equal(f.n, 3); /* one hit a document */
    assert_true(f.relevant && f.relevance >= 0.5 && f.coverage == 1 && !f.degraded);
    assert_true(f.hits[0].keys > 0.8 && f.hits[0].keys <= 1.01 && f.hits[0].lexical == 0);
    assert_true(f.hits[0].keys > f.hits[1].keys && f.hits[0].score >= f.hits[1].score);
    assert_true(t_eq(f.hits[0].text, "The boat left the harbour at dawn."));
    assert_true(t_eq(f.hits[0].title, "Harbour") && t_eq(f.hits[0].locator, "page 1"));
    assert_int_equal(f.hits[0].start, 0);
    assert_int_equal(f.hits[0].end, f.hits[0].text.n);
    assert_true(f.hits[0].document > 0 && f.hits[0].block > 0 && f.hits[0].chunk == 0);
    ibidi_found_close(&f);
    q.chunks = true;
    q.top = 10;
    assert_ok(ibidi_retriever_search(r, &q, &f));
    assert_int_equal(f.n, 4);
    ibidi_found_close(&f);
    q.question = t_str("zebra");
    assert_ok(ibidi_retriever_search(r, &q, &f));
    assert_true(!f.relevant && f.relevance < 0.5);
    ibidi_found_close(&f);
    q.question = t_str("boat");
    q.lexical_only = true;
    assert_ok(ibidi_retriever_search(r, &q, &f));
    assert_int_equal(f.n, 1);
    assert_true(f.hits[0].keys == 0 && f.hits[0].lexical > 0 && f.relevant && !f.degraded);
    ibidi_found_close(&f);
    q.lexical_only = false;
    q.keys_only = true;
    assert_ok(ibidi_retriever_search(r, &q, &f));
    assert_int_equal(f.n, 4);
    assert_true(f.hits[0].lexical == 0 && f.hits[0].keys > 0.8);
    ibidi_found_close(&f);

    q = (ibid_search_request){.collection = t_str("nope"), .question = t_str("x")};
    assert_err(ibidi_retriever_search(r, &q, &f), IBID_NOCOLLECTION);
    q.collection = t_str("c");
    q.question = t_str(" \n\t");
    assert_err(ibidi_retriever_search(r, &q, &f), IBID_INVAL);
    q.question = t_str("?");
    assert_ok(ibidi_retriever_search(r, &q, &f));
    ibidi_found_close(&f);
    ibidi_retriever_close(r);
    t_close(&t);
}

/* Keys that say the same whatever is asked. */
static ibid_err deaf_keys(void *arg, const ibid_hash *model, ibid_str question,
                          ibid_question_keys *out) {
    (void)question;
    return t_question_keys(arg, model, t_str("The boat left the harbour at dawn."), out);
}

/* A code or a name that stands in one chunk of many is found first, whatever keys say; and what it
 * stands in is not forced to the front of other questions. */
static void test_exact(void **state) {
    (void)state;
    t_store t;
    char id[32], got[1024];
    t_open(&t);
    for (int i = 0; i < 60; i++) {
        snprintf(id, sizeof id, "boat%d", i);
        t_put(&t, "c", id, "Harbour", "The boat left the harbour at dawn.", NULL);
    }
    t_put(&t, "c", "part", "Repairs", "Pump QX-4711 was replaced twice last winter.", NULL);
    t_put(&t, "c", "keeper", "People", "Halvard Brekke kept a light in the north.", NULL);
    ibidi_retriever_opts o = t_opts(&t);
    ibidi_retriever *r = open_r(&o);
    for (int deaf = 0; deaf < 2; deaf++) {
        expect(r, "c", "QX-4711", "part");
        expect(r, "c", "Did the boat that left the harbour at dawn need qx4711?", "part");
        expect(r, "c", "Halvard Brekke", "keeper");
        expect(r, "c", "brekke", "keeper");
        t_search(r, "c", "boat harbour", 3, got);
        assert_null(strstr(got, "part"));
        assert_null(strstr(got, "keeper"));
        /* Numbers and ordinals are no codes. */
        t_search(r, "c", "Did the boat leave the harbour at dawn in the 19th or in 1850?", 3, got);
        assert_null(strstr(got, "part"));
        ibidi_retriever_close(r);
        o.hooks.question_keys = deaf_keys;
        r = open_r(&o);
    }
    ibidi_retriever_close(r);
    t_close(&t);
}

static void test_updates(void **state) {
    (void)state;
    t_store t;
    uint64_t faults;
    ibid_buf b;
    t_open(&t);
    t_collection(&t, "other");
    ibid_buf_init(&b, 1 << 20);
    ibidi_retriever_opts o = t_opts(&t);
    ibidi_retriever *r = open_r(&o);
    expect(r, "c", "boat", ""); /* an empty collection */
    basic(&t);
    expect(r, "c", "gulls", "sea");
    t_put(&t, "c", "sea", "Harbour", "The boat left the harbour at dawn.\n\nWhales sang.", NULL);
    expect(r, "c", "whales", "sea");
    char got[1024];
    ibidi_found f;
    ibid_search_request q = {
        .collection = t_str("c"), .question = t_str("gulls cried"), .lexical_only = true};
    assert_ok(ibidi_retriever_search(r, &q, &f));
    assert_int_equal(f.n, 0); /* the old chunk is gone */
    ibidi_found_close(&f);
    /* a chunk shared by two collections and two documents goes with its last user only */
    t_put(&t, "other", "copy", "Harbour", "The boat left the harbour at dawn.", NULL);
    t_put(&t, "c", "twin", "Harbour", "The boat left the harbour at dawn.", NULL);
    t_search(r, "c", "boat harbour dawn", 2, got);
    assert_true(strcmp(got, "sea twin") == 0 || strcmp(got, "twin sea") == 0);
    t_delete(&t, "c", "sea");
    t_search(r, "c", "boat harbour dawn", 1, got);
    assert_string_equal(got, "twin");
    t_delete(&t, "c", "twin");
    t_search(r, "c", "vessel", 5, got);
    assert_null(strstr(got, "twin"));
    assert_null(strstr(got, "sea"));
    expect(r, "other", "vessel", "copy");
    assert_ok(ibidi_retriever_verify(r, &b, &faults));
    if (faults) print_error("%s", b.data);
    assert_int_equal(faults, 0);
    /* after a restart: the same, from the files */
    assert_ok(ibidi_retriever_settle(r));
    ibidi_retriever_close(r);
    t_put(&t, "c", "late", "Late", "Written while nobody watched: gulls.", NULL);
    r = open_r(&o);
    expect(r, "c", "gulls", "late");
    expect(r, "other", "vessel", "copy");
    /* a dropped collection takes its folder along */
    char path[512];
    assert_ok(ibid_store_collection_drop(t.s, t_str("other")));
    assert_ok(ibidi_retriever_settle(r));
    q = (ibid_search_request){.collection = t_str("other"), .question = t_str("boat")};
    assert_err(ibidi_retriever_search(r, &q, &f), IBID_NOCOLLECTION);
    snprintf(path, sizeof path, "%s/index", t.dir);
    char first[512];
    assert_true(t_glob(path, "1", "", first));
    assert_false(t_glob(path, "2", "", first));
    assert_ok(ibidi_retriever_verify(r, &b, &faults));
    assert_int_equal(faults, 0);
    ibidi_retriever_close(r);
    ibid_buf_fini(&b);
    t_close(&t);
}

static size_t filtered(ibidi_retriever *r, const char *key, const char *value, const char *question,
                       size_t top, const char *want) {
    ibid_filter filter = {t_str(key), t_str(value)};
    ibid_search_request q = {.collection = t_str("c"),
                             .question = t_str(question),
                             .top = top,
                             .filters = &filter,
                             .n_filters = 1};
    ibidi_found f;
    assert_ok(ibidi_retriever_search(r, &q, &f));
    size_t n = f.n;
    if (want) {
        assert_int_equal(n, 1);
        assert_true(t_eq(f.hits[0].id, want));
    }
    ibidi_found_close(&f);
    return n;
}

/* Thousands of better documents stand before those that pass. */
static void test_filters(void **state) {
    (void)state;
    t_store t;
    char id[32], text[128];
    t_open(&t);
    basic(&t);
    for (int i = 0; i < 900; i++) {
        snprintf(id, sizeof id, "d%d", i);
        snprintf(text, sizeof text, "boat boat boat number%d", i);
        t_put(&t, "c", id, "Boats", text,
              i % 300 == 7 ? "{\"rare\":\"yes\"}" : "{\"rare\":\"no\"}");
    }
    for (int way = 0; way < 2; way++) {
        ibidi_retriever_opts o = t_opts(&t);
        o.exact_tokens = way ? 100 : 0; /* then from the key index */
        ibidi_retriever *r = open_r(&o);
        assert_ok(ibidi_retriever_settle(r));
        filtered(r, "lang", "de", "boat", 5, "court");
        filtered(r, "year", "1999", "boat", 5, "road");
        filtered(r, "tags", "law", "boat", 5, "court");
        filtered(r, "in.city", "Rome", "boat", 5, "court");
        filtered(r, "ok", "true", "boat", 5, "court");
        assert_int_equal(filtered(r, "lang", "fr", "boat", 5, NULL), 0);
        assert_int_equal(filtered(r, "rare", "yes", "boat boat", 5, NULL), 3);
        assert_int_equal(filtered(r, "rare", "no", "boat boat", 50, NULL), 50);
        ibidi_retriever_close(r);
    }
    t_close(&t);
}

/* Two passages answer half the question equally well; one is about what the full answers are about,
 * the other about what nobody asked for. */
static size_t place_of(ibidi_retriever *r, const char *id, bool keys, bool words) {
    ibidi_found f;
    ibid_search_request q = {.collection = t_str("c"),
                             .question = t_str("gulls whales"),
                             .keys_only = keys && !words,
                             .lexical_only = words && !keys,
                             .top = 40};
    size_t i = 0;
    assert_ok(ibidi_retriever_search(r, &q, &f));
    while (i < f.n && !t_eq(f.hits[i].id, id)) i++;
    for (size_t k = 1; k < f.n; k++) assert_true(f.hits[k - 1].score >= f.hits[k].score);
    ibidi_found_close(&f);
    return i;
}

static void test_neighbours(void **state) {
    (void)state;
    t_store t;
    char id[32], text[128];
    t_open(&t);
    t_put(&t, "c", "far", "", "gulls lantern copper velvet saddle one", NULL);
    t_put(&t, "c", "near", "", "gulls granite chisel mortar quarry two", NULL);
    for (int i = 0; i < 60; i++) {
        static const char *const form[] = {"gulls whales granite chisel mortar quarry only%d",
                                           "lantern copper velvet saddle other%d more%d",
                                           "filler%d about%d nothing%d else%d"};
        snprintf(id, sizeof id, "d%d", i);
        snprintf(text, sizeof text, form[i < 11 ? 0 : i < 20 ? 1 : 2], i, i, i, i);
        t_put(&t, "c", id, "", text, NULL);
    }
    ibidi_retriever_opts o = t_opts(&t);
    ibidi_retriever *r = open_r(&o);
    assert_int_equal(place_of(r, "far", false, true), 11); /* a tie: the one that came first */
    assert_int_equal(place_of(r, "near", false, true), 12);
    assert_int_equal(place_of(r, "far", true, false), 11); /* by a chance likeness of its words */
    assert_true(place_of(r, "near", true, false) > 11);
    assert_int_equal(place_of(r, "near", true, true), 11);
    assert_true(place_of(r, "far", true, true) > 11);
    ibidi_retriever_close(r);
    t_close(&t);
}

static double coverage(ibidi_retriever *r, const char *document, bool chunks, bool words) {
    ibid_filter filter = {t_str(IBID_FILTER_DOCUMENT), t_str(document ? document : "")};
    ibid_search_request q = {.collection = t_str("c"),
                             .question = t_str("a boat at x7"),
                             .top = 3,
                             .chunks = chunks,
                             .filters = &filter,
                             .n_filters = document ? 1 : 0,
                             .lexical_only = words};
    ibidi_found f;
    assert_ok(ibidi_retriever_search(r, &q, &f));
    double share = f.coverage;
    ibidi_found_close(&f);
    return share;
}

/* Scanned whole, all is covered; from cells, what lies in those near the question. What a filter
 * leaves few of is scanned. Every chunk has tokens of its own. */
static void test_coverage(void **state) {
    (void)state;
    t_store t;
    ibid_buf text;
    t_open(&t);
    ibid_buf_init(&text, 1 << 20);
    for (int d = 0; d < 3; d++) {
        char id[16];
        snprintf(id, sizeof id, "long%d", d);
        ibid_buf_clear(&text);
        for (int i = d * 400; i < (d + 1) * 400; i++)
            assert_ok(ibid_buf_printf(&text, "%sx%d y%d.", i % 400 ? "\n\n" : "", i, i));
        t_put(&t, "c", id, "", text.data, NULL);
    }
    t_put(&t, "c", "short", "", "The boat.\n\nThe harbour.", NULL);
    for (int way = 0; way < 2; way++) {
        ibidi_retriever_opts o = t_opts(&t);
        if (way) {
            o.exact_tokens = 1;
            o.keys = (ibidi_keyindex_opts){.min_rows = 1, .cells_min = 1, .cell_rows = 4};
        }
        ibidi_retriever *r = open_r(&o);
        assert_ok(ibidi_retriever_settle(r));
        double all = coverage(r, NULL, true, false), one = coverage(r, "long1", true, false);
        print_message("%s: %.3f of the collection, %.3f of a long document\n",
                      way ? "cells" : "scan", all, one);
        if (way)
            assert_true(all > 0 && all < 0.9 && one > 0 && one <= 1);
        else
            assert_true(all == 1 && one == 1);
        assert_true(coverage(r, "short", true, false) == 1);
        assert_true(coverage(r, NULL, true, true) == 1);
        ibidi_retriever_close(r);
    }
    ibid_buf_fini(&text);
    t_close(&t);
}

/* No keys at all, keys of another calibration, a room that does not answer. */
static ibid_err no_answer(void *arg, const ibid_hash *model, ibid_str question,
                          ibid_question_keys *out) {
    (void)arg;
    (void)model;
    (void)question;
    (void)out;
    return ibid_fail(IBID_UNAVAIL, "nobody there");
}

static ibid_err no_head(void *arg, const ibid_hash *model, ibid_str question,
                        ibid_question_keys *out) {
    (void)arg;
    (void)model;
    (void)question;
    *out = (ibid_question_keys){.ids = ibid_calloc(1, 4), .n = 1};
    return IBID_OK;
}

static void test_degraded(void **state) {
    (void)state;
    t_store t;
    ibidi_found f;
    ibid_search_request q = {.collection = t_str("c"), .question = t_str("boats in harbours")};
    t_open(&t);
    basic(&t);
    ibidi_retriever_hooks hooks[] = {
        {.arg = NULL}, {.question_keys = no_answer}, {.question_keys = no_head}};
    for (size_t i = 0; i < 4; i++) {
        ibidi_retriever_opts o = t_opts(&t);
        if (i < 3)
            o.hooks = hooks[i];
        else
            t_calibrate(&t, 2, 0.5f, 0.6f); /* stored keys are of the old one now */
        ibidi_retriever *r = open_r(&o);
        assert_ok(ibidi_retriever_search(r, &q, &f));
        assert_int_equal(f.n, 1);
        assert_true(t_eq(f.hits[0].id, "sea"));
        assert_non_null(f.degraded);
        assert_true(f.relevant); /* both words are there */
        assert_true(f.hits[0].keys == 0);
        ibidi_found_close(&f);
        q.question = t_str("boats of zanzibar merchants"); /* a third of the weight at most */
        assert_ok(ibidi_retriever_search(r, &q, &f));
        assert_false(f.relevant);
        ibidi_found_close(&f);
        q.question = t_str("boats in harbours");
        ibidi_retriever_close(r);
    }
    t_close(&t);
}

/* New keys for every block, as calibrate writes them: searched at once, index file made anew. */
static ibid_err new_keys(void *arg, const ibid_block *b) {
    t_store *t = arg;
    int8_t keys[256 * T_DIM];
    for (size_t i = 0; i < b->n_tokens; i++) t_key(b->tokens[i], keys + i * T_DIM);
    return ibid_store_keys_put(t->s, &t->calibration, b->number, keys, b->n_tokens, T_DIM);
}

static void test_recalibrated(void **state) {
    (void)state;
    t_store t;
    ibidi_found f;
    ibid_snap *snap;
    char dir[300];
    ibidi_keyindex *x;
    t_open(&t);
    basic(&t);
    ibidi_retriever_opts o = t_opts(&t);
    o.exact_tokens = 1;
    o.keys = (ibidi_keyindex_opts){.min_rows = 1, .cells_min = 1, .cell_rows = 4};
    ibidi_retriever *r = open_r(&o);
    assert_ok(ibidi_retriever_settle(r));
    snprintf(dir, sizeof dir, "%s/index/1", t.dir);
    ibidi_keyindex_stamp old = {1000, t.calibration, T_DIM};
    assert_ok(ibidi_keyindex_load(dir, &old, &x));
    ibidi_keyindex_close(x);
    t_calibrate(&t, 2, 0.5f, 0.6f);
    assert_ok(ibid_snap_begin(t.s, &snap));
    assert_ok(ibid_snap_each_block(snap, new_keys, &t));
    ibid_snap_end(snap);
    ibid_search_request q = {.collection = t_str("c"), .question = t_str("vessel"), .top = 1};
    for (int i = 0; i < 2; i++) {
        assert_ok(ibidi_retriever_search(r, &q, &f));
        assert_null(f.degraded);
        assert_true(t_eq(f.hits[0].id, "sea") && f.hits[0].keys > 0.8);
        ibidi_found_close(&f);
        assert_ok(ibidi_retriever_settle(r));
    }
    ibidi_keyindex_stamp now = {1000, t.calibration, T_DIM};
    assert_ok(ibidi_keyindex_load(dir, &now, &x));
    ibidi_keyindex_close(x);
    assert_err(ibidi_keyindex_load(dir, &old, &x), IBID_MISMATCH);
    ibidi_retriever_close(r);
    t_close(&t);
}

/* Random documents of few words; the answers of both ways, and of a rebuilt index. */
static void random_docs(t_store *t, size_t n, uint64_t *seed) {
    char id[32], text[4096];
    for (size_t i = 0; i < n; i++) {
        size_t len = 0, words = 30 + t_rnd(seed) % 60, topic = t_rnd(seed) % 40;
        for (size_t j = 0; j < words; j++)
            len += (size_t)snprintf(
                text + len, sizeof text - len, "%sw%llu", j ? j == words / 2 ? "\n\n" : " " : "",
                (unsigned long long)(t_rnd(seed) % 3 ? topic * 25 + t_rnd(seed) % 25
                                                     : 1000 + t_rnd(seed) % 4000));
        snprintf(id, sizeof id, "r%zu", i);
        t_put(t, "c", id, "Random", text, NULL);
    }
}

static void question_of(uint64_t *seed, char out[256]) {
    size_t len = 0, topic = t_rnd(seed) % 40;
    for (int i = 0; i < 6; i++)
        len += (size_t)snprintf(out + len, 256 - len, "w%llu ",
                                (unsigned long long)(i < 4 ? topic * 25 + t_rnd(seed) % 25
                                                           : 1000 + t_rnd(seed) % 4000));
}

/* Four documents in a hundred pass: all of them come, however far down they are. */
static void rare_ones(ibidi_retriever *r, char out[1024]) {
    ibidi_found f;
    ibid_filter filter = {t_str("rare"), t_str("yes")};
    ibid_search_request q = {.collection = t_str("c"),
                             .question = t_str("w3 w7 w12 w1500"),
                             .filters = &filter,
                             .n_filters = 1};
    assert_ok(ibidi_retriever_search(r, &q, &f));
    assert_int_equal(f.n, 4);
    out[0] = '\0';
    for (size_t i = 0; i < f.n; i++)
        snprintf(out + strlen(out), 1024 - strlen(out), "%.*s ", (int)f.hits[i].id.n,
                 f.hits[i].id.s);
    ibidi_found_close(&f);
}

static void test_two_ways(void **state) {
    (void)state;
    t_store t;
    char rare[2][1024];
    uint64_t seed = 2024, same = 0, total = 0;
    print_message("seed %llu\n", (unsigned long long)seed);
    t_open(&t);
    random_docs(&t, 400, &seed);
    for (int i = 0; i < 4; i++) {
        char id[16], text[64];
        snprintf(id, sizeof id, "rare%d", i);
        snprintf(text, sizeof text, "w%d w%d w%d w%d", 7 + i, 600 + i, 4000 + i, 700 + i);
        t_put(&t, "c", id, "Random", text, "{\"rare\":\"yes\"}");
    }
    ibidi_retriever_opts o = t_opts(&t), small = o;
    small.exact_tokens = 1;
    small.keys = (ibidi_keyindex_opts){.min_rows = 1, .cells_min = 1000, .cell_rows = 32};
    ibidi_retriever *exact = open_r(&o);
    assert_ok(ibidi_retriever_settle(exact));
    char answers[40][1024], got[1024], question[40][256];
    for (int i = 0; i < 40; i++) {
        question_of(&seed, question[i]);
        t_search(exact, "c", question[i], 10, answers[i]);
    }
    rare_ones(exact, rare[0]);
    ibidi_retriever_close(exact); /* the lexical index has one owner */
    ibidi_retriever *index = open_r(&small);
    assert_ok(ibidi_retriever_settle(index));
    for (int i = 0; i < 40; i++) {
        t_search(index, "c", question[i], 10, got);
        for (char *p = strtok(got, " "); p; p = strtok(NULL, " ")) {
            const char *at = strstr(answers[i], p); /* as a whole word */
            size_t len = strlen(p);
            while (at && !((at == answers[i] || at[-1] == ' ') && (at[len] == ' ' || !at[len])))
                at = strstr(at + 1, p);
            same += at != NULL;
            total++;
        }
    }
    print_message("ten best through the key index that are ten best of the scan: %.4f\n",
                  (double)same / (double)total);
    assert_int_equal(total, 400);
    assert_true(same * 100 >= total * 98);
    rare_ones(index, rare[1]);
    assert_string_equal(rare[0], rare[1]);
    /* documents the key index has not got yet are found at once */
    t_put(&t, "c", "new", "Fresh", "the vessel of tomorrow", NULL);
    expect(index, "c", "ship", "new");
    assert_ok(ibidi_retriever_settle(index));
    expect(index, "c", "ship", "new");
    t_delete(&t, "c", "new");
    t_search(index, "c", "ship", 50, got);
    assert_null(strstr(got, "new"));
    ibidi_retriever_close(index);
    t_close(&t);
}

/* ---- Damage ---- */
typedef struct files {
    char dir[300], words[400], keys[512], manifest[400];
} files;

static void locate(const t_store *t, files *f) {
    snprintf(f->dir, sizeof f->dir, "%s/index/1", t->dir);
    snprintf(f->words, sizeof f->words, "%s/words.sqlite", f->dir);
    snprintf(f->manifest, sizeof f->manifest, "%s/keys.manifest", f->dir);
    assert_true(t_glob(f->dir, "keys-", ".cells", f->keys));
}

static void copy(const char *from, const char *to) {
    char command[1200];
    snprintf(command, sizeof command, "cp -a '%s' '%s'", from, to);
    assert_int_equal(system(command), 0);
}

static void test_damage(void **state) {
    (void)state;
    t_store t;
    uint64_t seed = 77, faults;
    char question[10][256], want[10][1024], got[1024], old[600], seal[500];
    files f;
    ibid_buf b;
    print_message("seed %llu\n", (unsigned long long)seed);
    ibid_buf_init(&b, 1 << 20);
    t_open(&t);
    basic(&t);
    random_docs(&t, 100, &seed);
    ibidi_retriever_opts o = t_opts(&t);
    o.exact_tokens = 1;
    o.keys = (ibidi_keyindex_opts){
        .min_rows = 1, .cells_min = 1u << 30, .cell_rows = 16, .extra_rows = 1};
    ibidi_retriever *r = open_r(&o);
    assert_ok(ibidi_retriever_settle(r));
    ibidi_retriever_close(r);
    locate(&t, &f);
    snprintf(old, sizeof old, "%s/old", t.dir);
    snprintf(seal, sizeof seal, "%s.seal", f.words);
    copy(f.dir, old); /* an older generation, sound in itself */
    t_put(&t, "c", "road", "Streets", "Nothing drives here; otters swim.", NULL);
    t_delete(&t, "c", "r3");
    r = open_r(&o);
    assert_ok(ibidi_retriever_settle(r));
    for (int i = 0; i < 10; i++) {
        question_of(&seed, question[i]);
        t_search(r, "c", question[i], 10, want[i]);
    }
    ibidi_retriever_close(r);
    for (int how = 0; how < 10; how++) {
        locate(&t, &f);
        char command[1200];
        switch (how) {
        case 0:
            t_truncate(f.words, 0.4);
            break;
        case 1:
            t_flip(f.words, -2000);
            break;
        case 2:
            unlink(seal);
            t_truncate(f.words, 0.7);
            break;
        case 3:
            t_truncate(f.keys, 0.9);
            break;
        case 4:
            t_flip(f.keys, 5000);
            break;
        case 5:
            t_flip(f.manifest, 20);
            break;
        case 6:
            unlink(f.keys);
            break;
        case 7:
            unlink(f.words);
            break;
        case 8: /* files of an older generation: brought forward */
            snprintf(command, sizeof command, "rm -r '%s'", f.dir);
            assert_int_equal(system(command), 0);
            copy(old, f.dir);
            break;
        default: /* everything gone */
            snprintf(command, sizeof command, "rm -r '%s/index'", t.dir);
            assert_int_equal(system(command), 0);
        }
        r = open_r(&o);
        for (int i = 0; i < 10; i++) {
            t_search(r, "c", question[i], 10, got);
            assert_string_equal(got, want[i]);
        }
        expect(r, "c", "otters", "road");
        assert_ok(ibidi_retriever_settle(r));
        for (int i = 0; i < 10; i++) {
            t_search(r, "c", question[i], 10, got);
            assert_string_equal(got, want[i]);
        }
        assert_ok(ibidi_retriever_verify(r, &b, &faults));
        if (faults) print_error("case %d: %s", how, b.data);
        assert_int_equal(faults, 0);
        ibidi_retriever_close(r);
    }
    /* reindex makes everything anew; verify sees a file that was damaged under it */
    r = open_r(&o);
    assert_ok(ibidi_retriever_reindex(r, t_str("")));
    t_search(r, "c", question[0], 10, got);
    assert_string_equal(got, want[0]);
    assert_err(ibidi_retriever_reindex(r, t_str("none")), IBID_NOCOLLECTION);
    locate(&t, &f);
    t_flip(f.keys, 3000);
    assert_ok(ibidi_retriever_verify(r, &b, &faults));
    assert_int_equal(faults, 1);
    assert_non_null(strstr(b.data, "keys-"));
    ibidi_retriever_close(r);
    ibid_buf_fini(&b);
    t_close(&t);
}

/* The store does not exist yet; it appears; its history is shorter than the index is old. */
static void test_store_comes_late(void **state) {
    (void)state;
    char dir[256];
    ibidi_found f;
    ibidi_retriever *r;
    t_dir(dir);
    ibidi_retriever_opts o = {.data_dir = dir, .hooks = t_hooks};
    ibid_search_request q = {.collection = t_str("c"), .question = t_str("x")};
    assert_ok(ibidi_retriever_open(&o, &r));
    assert_err(ibidi_retriever_search(r, &q, &f), IBID_UNAVAIL);
    ibidi_retriever_close(r);
    t_drop(dir);
}

/* A store that was made anew under an old index: its generations went back. */
static void test_store_went_back(void **state) {
    (void)state;
    t_store a, b;
    char command[1200];
    t_open(&a);
    basic(&a);
    for (int i = 0; i < 5; i++) t_put(&a, "c", "more", "More", i % 2 ? "one" : "two", NULL);
    ibidi_retriever_opts o = t_opts(&a);
    ibidi_retriever *r = open_r(&o);
    assert_ok(ibidi_retriever_settle(r));
    expect(r, "c", "gulls", "sea");
    ibidi_retriever_close(r);
    t_open(&b);
    t_put(&b, "c", "only", "Only", "An otter.", NULL);
    snprintf(command, sizeof command, "cp -a '%s/index' '%s/'", a.dir, b.dir);
    assert_int_equal(system(command), 0);
    o = t_opts(&b);
    r = open_r(&o);
    char got[1024];
    expect(r, "c", "otter", "only");
    t_search(r, "c", "gulls", 10, got);
    assert_string_equal(got, "only");
    assert_ok(ibidi_retriever_settle(r));
    expect(r, "c", "otter", "only");
    ibidi_retriever_close(r);
    t_close(&a);
    t_close(&b);
}

/* Searches from two threads while documents come and go, with the keeper at work. */
typedef struct racer {
    ibidi_retriever *r;
    int searches;
    bool stop;
} racer;

static void *race(void *arg) {
    racer *x = arg;
    while (!__atomic_load_n(&x->stop, __ATOMIC_RELAXED)) {
        ibidi_found f;
        ibid_search_request q = {
            .collection = t_str("c"), .question = t_str("vessel in the harbour"), .top = 3};
        if (ibidi_retriever_search(x->r, &q, &f) != IBID_OK) return "failed";
        if (f.n < 3 || !t_eq(f.hits[0].id, "sea")) {
            ibidi_found_close(&f);
            return "wrong";
        }
        ibidi_found_close(&f);
        x->searches++;
    }
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    t_store t;
    pthread_t th[2];
    racer x[2];
    uint64_t seed = 1, faults;
    ibid_buf b;
    ibid_buf_init(&b, 1 << 16);
    t_open(&t);
    basic(&t);
    ibidi_retriever_opts o = t_opts(&t);
    o.exact_tokens = 100;
    o.quiet_ms = 1;
    o.keys =
        (ibidi_keyindex_opts){.min_rows = 200, .cells_min = 4000, .cell_rows = 16, .extra_rows = 1};
    ibidi_retriever *r = open_r(&o);
    assert_ok(ibidi_engine_keeper_start(r));
    for (int i = 0; i < 2; i++) {
        x[i] = (racer){r, 0, false};
        assert_int_equal(pthread_create(&th[i], NULL, race, &x[i]), 0);
    }
    random_docs(&t, 150, &seed);
    for (int i = 0; i < 100; i += 2) {
        char id[32];
        snprintf(id, sizeof id, "r%d", i);
        t_delete(&t, "c", id);
        ibidi_retriever_notify(r);
    }
    for (int i = 0; i < 2; i++) {
        void *why = NULL;
        __atomic_store_n(&x[i].stop, true, __ATOMIC_RELAXED);
        pthread_join(th[i], &why);
        if (why) fail_msg("%s", (char *)why);
        assert_true(x[i].searches > 0);
    }
    print_message("%d searches\n", x[0].searches + x[1].searches);
    assert_ok(ibidi_retriever_verify(r, &b, &faults));
    if (faults) print_error("%s", b.data);
    assert_int_equal(faults, 0);
    ibidi_retriever_close(r);
    ibid_buf_fini(&b);
    t_close(&t);
}

typedef struct patient {
    ibidi_retriever *r;
    atomic_int searches;
    atomic_bool stop;
    double longest_ms;
} patient;

static void *ask_on(void *arg) {
    patient *p = arg;
    while (!atomic_load(&p->stop)) {
        ibidi_found f;
        ibid_search_request q = {.collection = t_str("c"), .question = t_str("vessel"), .top = 3};
        if (ibidi_retriever_search(p->r, &q, &f) != IBID_OK) return "failed";
        bool right = f.n == 3 && t_eq(f.hits[0].id, "sea");
        if (f.total_ms > p->longest_ms) p->longest_ms = f.total_ms;
        ibidi_found_close(&f);
        if (!right) return "wrong";
        atomic_fetch_add(&p->searches, 1);
    }
    return NULL;
}

/* Searches go on while an index that lost a third of its blocks is built again. */
static void test_no_pause(void **state) {
    (void)state;
    t_store t;
    pthread_t th;
    uint64_t seed = 31;
    void *why = NULL;
    t_open(&t);
    basic(&t);
    random_docs(&t, 240, &seed);
    ibidi_retriever_opts o = t_opts(&t);
    o.exact_tokens = 1000;
    o.keys = (ibidi_keyindex_opts){
        .min_rows = 1, .cells_min = 1000, .cell_rows = 4, .extra_rows = 1, .threads = 1};
    ibidi_retriever *r = open_r(&o);
    assert_ok(ibidi_retriever_settle(r));
    for (int i = 0; i < 80; i++) {
        char id[32];
        snprintf(id, sizeof id, "r%d", i);
        t_delete(&t, "c", id);
    }
    patient p = {.r = r};
    assert_int_equal(pthread_create(&th, NULL, ask_on, &p), 0);
    while (atomic_load(&p.searches) < 3) usleep(1000);
    int before = atomic_load(&p.searches);
    uint64_t start = ibid_now_ns();
    assert_ok(ibidi_retriever_settle(r));
    double ms = ibid_ms_since(start);
    int during = atomic_load(&p.searches) - before;
    atomic_store(&p.stop, true);
    pthread_join(th, &why);
    if (why) fail_msg("%s", (char *)why);
    print_message("%d searches during %.0f ms of building; the longest took %.1f ms\n", during, ms,
                  p.longest_ms);
    /* A busy machine may give the searches no turn in a short build, but none may wait for its end.
     */
    assert_true(during >= 3 || p.longest_ms < ms / 2);
    ibidi_retriever_close(r);
    t_close(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_search),           cmocka_unit_test(test_exact),
        cmocka_unit_test(test_updates),          cmocka_unit_test(test_filters),
        cmocka_unit_test(test_neighbours),       cmocka_unit_test(test_coverage),
        cmocka_unit_test(test_degraded),         cmocka_unit_test(test_recalibrated),
        cmocka_unit_test(test_two_ways),         cmocka_unit_test(test_damage),
        cmocka_unit_test(test_store_comes_late), cmocka_unit_test(test_store_went_back),
        cmocka_unit_test(test_threads),          cmocka_unit_test(test_no_pause),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
