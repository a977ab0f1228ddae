#include "retriever/lexical_fts5.h"

#include "retriever/words.h"
#include "rpc/base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const double K1 = 1.2; /* of FTS5's bm25 */
enum { SCHEMA = 1, CHUNK_BITS = 24, TERMS_MAX = 256, SHARE_ROWS = 300 };
#define TITLE_WEIGHT 1.0
#define TEXT_WEIGHT 1.0

struct ibidi_lexical {
    sqlite3 *db;
    sqlite3_stmt *add, *remove;
    ibidi_words *words; /* of the FTS5 tokenizer: used inside SQLite's own lock only */
    char *path, *seal_path, *identity;
    uint64_t generation;
    bool open_txn, unsealed;
};

/* ---- Errors ---- */
static ibid_err map_code(int rc) {
    switch (rc & 0xff) {
    case SQLITE_OK:
    case SQLITE_ROW:
    case SQLITE_DONE:
        return IBID_OK;
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
    case SQLITE_FORMAT:
    case SQLITE_ERROR: /* a table of ours that is not there or not as we made it */
    case SQLITE_CONSTRAINT:
        return IBID_CORRUPT;
    case SQLITE_NOMEM:
        return IBID_NOMEM;
    case SQLITE_FULL:
        return IBID_DISKFULL;
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return IBID_BUSY;
    case SQLITE_IOERR:
        return rc == SQLITE_IOERR_SHORT_READ ? IBID_CORRUPT : IBID_IO;
    default:
        return IBID_IO;
    }
}

static ibid_err failed(ibidi_lexical *l, int rc, const char *what) {
    ibid_err e = map_code(rc);
    if (!e) return IBID_OK;
    return ibid_fail(e, "lexical index %s: %s: %s; ibid reindex builds it again", l->path, what,
                     l->db ? sqlite3_errmsg(l->db) : sqlite3_errstr(rc));
}

static ibid_err run(ibidi_lexical *l, const char *sql) {
    return failed(l, sqlite3_exec(l->db, sql, NULL, NULL, NULL), sql);
}

/* ---- The FTS5 tokenizer ---- */
typedef struct token_sink {
    void *ctx;
    int (*token)(void *, int, const char *, int, int, int);
} token_sink;

static int send_word(void *arg, const ibidi_word *w) {
    token_sink *s = arg;
    return s->token(s->ctx, w->extra ? FTS5_TOKEN_COLOCATED : 0, w->s, (int)w->n, (int)w->start,
                    (int)w->end);
}

static int tokenizer_create(void *ctx, const char **argv, int argc, Fts5Tokenizer **out) {
    (void)argv;
    (void)argc;
    *out = (Fts5Tokenizer *)ctx; /* the index's own word splitter */
    return SQLITE_OK;
}

static void tokenizer_delete(Fts5Tokenizer *t) {
    (void)t;
}

static int tokenizer_run(Fts5Tokenizer *t, void *ctx, int flags, const char *text, int n,
                         int (*token)(void *, int, const char *, int, int, int)) {
    /* What comes in a query was split and stemmed already: each quoted string is one word. */
    if (flags & FTS5_TOKENIZE_QUERY) return token(ctx, 0, text, n, 0, n);
    token_sink s = {ctx, token};
    return ibidi_words_each((ibidi_words *)t, text, (size_t)n, false, send_word, &s);
}

static ibid_err register_tokenizer(ibidi_lexical *l) {
    sqlite3_stmt *q = NULL;
    fts5_api *api = NULL;
    int rc = sqlite3_prepare_v2(l->db, "SELECT fts5(?1)", -1, &q, NULL);
    if (rc == SQLITE_OK) {
        sqlite3_bind_pointer(q, 1, &api, "fts5_api_ptr", NULL);
        sqlite3_step(q);
        rc = sqlite3_finalize(q);
    }
    if (rc != SQLITE_OK || !api)
        return ibid_fail(IBID_BACKEND, "this SQLite (%s) has no FTS5", sqlite3_libversion());
    fts5_tokenizer t = {tokenizer_create, tokenizer_delete, tokenizer_run};
    return failed(l, api->xCreateTokenizer(api, "ibid", l->words, &t, NULL), "tokenizer");
}

/* ---- The seal ---- */
typedef struct seal {
    uint64_t size, sum;
} seal;

static ibid_err measure_file(const char *path, seal *out) {
    struct stat st;
    ibid_err e = IBID_OK;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return ibid_fail_errno(errno, "open", path);
    if (fstat(fd, &st) != 0) e = ibid_fail_errno(errno, "stat", path);
    *out = (seal){0, 0};
    if (!e && st.st_size > 0) {
        size_t n = (size_t)st.st_size;
        void *p = mmap(NULL, n, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED)
            e = ibid_fail_errno(errno, "map", path);
        else {
            *out = (seal){n, ibid_checksum(p, n)};
            munmap(p, n);
        }
    }
    close(fd);
    return e;
}

/* false: there is none that can be read. */
static bool seal_read(const ibidi_lexical *l, seal *out) {
    FILE *f = fopen(l->seal_path, "re");
    if (!f) return false;
    bool ok = fscanf(f, "ibid-seal 1 %" SCNu64 " %" SCNx64, &out->size, &out->sum) == 2;
    fclose(f);
    return ok;
}

static ibid_err seal_write(const ibidi_lexical *l, const seal *s) {
    char tmp[4200];
    if (snprintf(tmp, sizeof tmp, "%s.new", l->seal_path) >= (int)sizeof tmp)
        return ibid_fail(IBID_INVAL, "path too long: %s", l->seal_path);
    FILE *f = fopen(tmp, "we");
    if (!f) return ibid_fail_errno(errno, "create", tmp);
    bool ok = fprintf(f, "ibid-seal 1 %" PRIu64 " %" PRIx64 "\n", s->size, s->sum) > 0;
    ok = fclose(f) == 0 && ok;
    if (!ok || rename(tmp, l->seal_path) != 0) return ibid_fail_errno(errno, "write", tmp);
    return IBID_OK;
}

ibid_err ibidi_lexical_seal(ibidi_lexical *l) {
    seal s;
    if (!l->unsealed || l->open_txn) return IBID_OK;
    ibid_err e = run(l, "PRAGMA wal_checkpoint(TRUNCATE)");
    if (!e) e = measure_file(l->path, &s);
    if (!e) e = seal_write(l, &s);
    if (!e) l->unsealed = false;
    return e;
}

/* ---- Opening ---- */
static void shut(ibidi_lexical *l) {
    sqlite3_finalize(l->add);
    sqlite3_finalize(l->remove);
    sqlite3_close(l->db);
    l->add = l->remove = NULL;
    l->db = NULL;
    l->open_txn = false;
}

static void erase(const ibidi_lexical *l) {
    static const char *const ends[] = {"", "-wal", "-shm", "-journal", ".seal"};
    char path[4200];
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (snprintf(path, sizeof path, "%s%s", l->path, ends[i]) < (int)sizeof path) unlink(path);
}

static ibid_err connect(ibidi_lexical *l) {
    int rc = sqlite3_open_v2(
        l->path, &l->db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_FULLMUTEX, NULL);
    ibid_err e = failed(l, rc, "open");
    if (e) return e;
    sqlite3_extended_result_codes(l->db, 1);
    /* One process owns the file. The log makes a commit cheap and a crash harmless. */
    e = run(l, "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
               "PRAGMA cache_size=-16384; PRAGMA temp_store=MEMORY;");
    return e ? e : register_tokenizer(l);
}

static ibid_err prepare(ibidi_lexical *l) {
    int rc = sqlite3_prepare_v2(l->db, "INSERT INTO chunk(rowid, title, text) VALUES(?1,?2,?3)", -1,
                                &l->add, NULL);
    if (rc == SQLITE_OK)
        rc = sqlite3_prepare_v2(l->db, "DELETE FROM chunk WHERE rowid BETWEEN ?1 AND ?2", -1,
                                &l->remove, NULL);
    return failed(l, rc, "prepare");
}

static ibid_err create(ibidi_lexical *l) {
    char sql[256];
    ibid_err e = connect(l);
    if (e) return e;
    snprintf(sql, sizeof sql, "PRAGMA user_version=%d", SCHEMA);
    e = run(l, "BEGIN IMMEDIATE");
    if (!e) e = run(l, sql);
    if (!e) e = run(l, "CREATE TABLE stamp(name TEXT PRIMARY KEY, value)");
    if (!e) e = run(l, "CREATE VIRTUAL TABLE chunk USING fts5(title, text, tokenize='ibid')");
    if (!e) {
        char *q = sqlite3_mprintf("INSERT INTO stamp VALUES('identity',%Q),('generation',0)",
                                  l->identity);
        e = q ? run(l, q) : ibid_fail(IBID_NOMEM, "out of memory");
        sqlite3_free(q);
    }
    if (!e) e = run(l, "COMMIT");
    l->generation = 0;
    l->unsealed = true;
    return e ? e : prepare(l);
}

/* One value of one row, as text or a number. */
static ibid_err one_u64(ibidi_lexical *l, const char *sql, uint64_t *out) {
    sqlite3_stmt *q = NULL;
    int rc = sqlite3_prepare_v2(l->db, sql, -1, &q, NULL);
    if (rc == SQLITE_OK) rc = sqlite3_step(q);
    if (rc == SQLITE_ROW) *out = (uint64_t)sqlite3_column_int64(q, 0);
    ibid_err e = rc == SQLITE_ROW    ? IBID_OK
                 : rc == SQLITE_DONE ? ibid_fail(IBID_CORRUPT, "%s: a row is missing", l->path)
                                     : failed(l, rc, sql);
    sqlite3_finalize(q);
    return e;
}

static ibid_err stamp_check(ibidi_lexical *l) {
    uint64_t version = 0, same = 0;
    ibid_err e = one_u64(l, "PRAGMA user_version", &version);
    if (!e && version != SCHEMA)
        e = ibid_fail(IBID_CORRUPT, "format %" PRIu64 ", not %d", version, SCHEMA);
    char *q = sqlite3_mprintf("SELECT value=%Q FROM stamp WHERE name='identity'", l->identity);
    if (!q) return ibid_fail(IBID_NOMEM, "out of memory");
    if (!e) e = one_u64(l, q, &same);
    sqlite3_free(q);
    if (!e && !same) e = ibid_fail(IBID_CORRUPT, "it belongs to another collection");
    if (!e) e = one_u64(l, "SELECT value FROM stamp WHERE name='generation'", &l->generation);
    return e;
}

ibid_err ibidi_lexical_check(ibidi_lexical *l) {
    sqlite3_stmt *q = NULL;
    int rc = sqlite3_prepare_v2(l->db, "PRAGMA quick_check(1)", -1, &q, NULL);
    if (rc == SQLITE_OK) rc = sqlite3_step(q);
    ibid_err e = failed(l, rc, "quick_check");
    if (!e && rc == SQLITE_ROW) {
        const char *said = (const char *)sqlite3_column_text(q, 0);
        if (!said || strcmp(said, "ok") != 0)
            e = ibid_fail(IBID_CORRUPT, "lexical index %s: %s", l->path, said ? said : "no answer");
    }
    sqlite3_finalize(q);
    return e ? e : run(l, "INSERT INTO chunk(chunk) VALUES('integrity-check')");
}

/* Opens a file that is there. CORRUPT for anything that is not, whole and ours. */
static ibid_err reopen(ibidi_lexical *l) {
    seal want, have;
    bool sealed = seal_read(l, &want);
    ibid_err e = IBID_OK;
    if (sealed) {
        e = measure_file(l->path, &have);
        if (!e && (have.size != want.size || have.sum != want.sum))
            e = ibid_fail(IBID_CORRUPT, "its bytes are not those that were sealed");
    }
    if (!e) e = connect(l);
    if (!e) e = stamp_check(l);
    if (!e && !sealed) e = ibidi_lexical_check(l); /* the last process did not close it */
    if (!e) e = prepare(l);
    l->unsealed = !sealed;
    return e;
}

ibid_err ibidi_lexical_reset(ibidi_lexical *l) {
    shut(l);
    erase(l);
    return create(l);
}

static void destroy(ibidi_lexical *l) {
    shut(l);
    ibidi_words_close(l->words);
    ibid_free(l->path);
    ibid_free(l->seal_path);
    ibid_free(l->identity);
    ibid_free(l);
}

ibid_err ibidi_lexical_open(const char *path, const char *identity, ibidi_lexical **out) {
    ibidi_lexical *l = ibid_calloc(1, sizeof *l);
    if (!l) return ibid_fail(IBID_NOMEM, "out of memory for a lexical index");
    ibid_err e = ibidi_words_open(&l->words);
    size_t n = strlen(path);
    l->path = ibid_strdup(path);
    l->seal_path = ibid_alloc(n + 8);
    l->identity = ibid_strdup(identity);
    if (!e && (!l->path || !l->seal_path || !l->identity))
        e = ibid_fail(IBID_NOMEM, "out of memory for a lexical index");
    if (!e) {
        snprintf(l->seal_path, n + 8, "%s.seal", path);
        if (access(path, F_OK) == 0)
            e = reopen(l);
        else
            e = ibidi_lexical_reset(l);
        if (e == IBID_CORRUPT) {
            ibid_log(IBID_LOG_WARN, "lexical index %s is thrown away and built again: %s", path,
                     ibid_err_detail());
            e = ibidi_lexical_reset(l);
        }
    }
    if (e) {
        destroy(l);
        return e;
    }
    *out = l;
    return IBID_OK;
}

void ibidi_lexical_close(ibidi_lexical *l) {
    if (!l) return;
    ibidi_lexical_rollback(l);
    if (ibidi_lexical_seal(l) != IBID_OK)
        ibid_log(IBID_LOG_WARN, "lexical index %s was not sealed: %s", l->path, ibid_err_detail());
    destroy(l);
}

uint64_t ibidi_lexical_generation(const ibidi_lexical *l) {
    return l->generation;
}

uint64_t ibidi_lexical_bytes(const ibidi_lexical *l) {
    struct stat st;
    return stat(l->path, &st) == 0 ? (uint64_t)st.st_size : 0;
}

/* ---- Changing ---- */
ibid_err ibidi_lexical_begin(ibidi_lexical *l) {
    if (!l->unsealed && unlink(l->seal_path) != 0 && errno != ENOENT)
        return ibid_fail_errno(errno, "remove", l->seal_path);
    l->unsealed = true;
    ibid_err e = run(l, "BEGIN IMMEDIATE");
    l->open_txn = !e;
    return e;
}

static sqlite3_int64 row_of(uint64_t document, uint64_t chunk) {
    return (sqlite3_int64)(document << CHUNK_BITS | chunk);
}

static ibid_err step(ibidi_lexical *l, sqlite3_stmt *q, const char *what) {
    int rc = sqlite3_step(q);
    ibid_err e = failed(l, rc, what);
    sqlite3_reset(q);
    return e;
}

ibid_err ibidi_lexical_remove(ibidi_lexical *l, uint64_t document) {
    sqlite3_bind_int64(l->remove, 1, row_of(document, 0));
    sqlite3_bind_int64(l->remove, 2, row_of(document, (1u << CHUNK_BITS) - 1));
    return step(l, l->remove, "remove");
}

ibid_err ibidi_lexical_add(ibidi_lexical *l, uint64_t document, uint64_t chunk, ibid_str title,
                           ibid_str text) {
    if (chunk >> CHUNK_BITS || document >> 39)
        return ibid_fail(IBID_TOOBIG,
                         "chunk %" PRIu64 " of document %" PRIu64
                         " is past the lexical index's numbers",
                         chunk, document);
    if (text.n > INT32_MAX || title.n > INT32_MAX)
        return ibid_fail(IBID_TOOBIG, "a chunk of %zu bytes", text.n);
    sqlite3_bind_int64(l->add, 1, row_of(document, chunk));
    sqlite3_bind_text(l->add, 2, title.n ? title.s : "", (int)title.n, SQLITE_STATIC);
    sqlite3_bind_text(l->add, 3, text.n ? text.s : "", (int)text.n, SQLITE_STATIC);
    ibid_err e = step(l, l->add, "add");
    sqlite3_clear_bindings(l->add);
    return e;
}

ibid_err ibidi_lexical_commit(ibidi_lexical *l, uint64_t generation) {
    char sql[128];
    ibid_err e = IBID_OK;
    if (generation) {
        snprintf(sql, sizeof sql, "UPDATE stamp SET value=%" PRIu64 " WHERE name='generation'",
                 generation);
        e = run(l, sql);
    }
    if (!e) e = run(l, "COMMIT");
    if (e) return e;
    l->open_txn = false;
    if (generation) l->generation = generation;
    return IBID_OK;
}

void ibidi_lexical_rollback(ibidi_lexical *l) {
    if (l->open_txn && l->db) sqlite3_exec(l->db, "ROLLBACK", NULL, NULL, NULL);
    l->open_txn = false;
}

/* ---- Searching ---- */
typedef struct terms { /* distinct words of a question */
    char *s[TERMS_MAX];
    size_t len[TERMS_MAX];
    bool stop[TERMS_MAX], seen[TERMS_MAX];
    size_t n, n_plain;
} terms;

static size_t term_at(const terms *t, const char *s, size_t n) {
    size_t i = 0;
    while (i < t->n && !(t->len[i] == n && memcmp(t->s[i], s, n) == 0)) i++;
    return i;
}

static int collect_term(void *arg, const ibidi_word *w) {
    terms *t = arg;
    if (t->n == TERMS_MAX) return 1; /* the rest of a very long question adds little */
    if (term_at(t, w->s, w->n) < t->n) return 0;
    char *copy = ibid_strndup(w->s, w->n);
    if (!copy) return SQLITE_NOMEM;
    t->s[t->n] = copy;
    t->len[t->n] = w->n;
    t->stop[t->n] = w->stop;
    t->n_plain += !w->stop;
    t->n++;
    return 0;
}

static void terms_fini(terms *t) {
    for (size_t i = 0; i < t->n; i++) ibid_free(t->s[i]);
}

static ibid_err terms_of(ibid_str question, terms *t) {
    ibidi_words *w = NULL;
    *t = (terms){.n = 0};
    ibid_err e = ibidi_words_open(&w);
    if (e) return e;
    if (ibidi_words_each(w, question.s, question.n, true, collect_term, t) == SQLITE_NOMEM)
        e = ibid_fail(IBID_NOMEM, "out of memory for a question's words");
    ibidi_words_close(w);
    if (e) terms_fini(t);
    return e;
}

static ibid_err quote(const terms *t, size_t i, const char *between, ibid_buf *out) {
    ibid_err e = ibid_buf_puts(out, out->len ? between : "");
    if (!e) e = ibid_buf_puts(out, "\"");
    for (size_t j = 0; j < t->len[i] && !e; j++) {
        e = ibid_buf_append(out, &t->s[i][j], 1);
        if (!e && t->s[i][j] == '"') e = ibid_buf_append(out, "\"", 1);
    }
    return e ? e : ibid_buf_puts(out, "\"");
}

/* "word" OR "word": quoted, so that nothing in it is syntax. Function words only if alone. */
static ibid_err match_text(const terms *t, ibid_buf *out) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < t->n && !e; i++) {
        if (t->stop[i] && t->n_plain) continue;
        e = quote(t, i, " OR ", out);
    }
    return e;
}

static ibid_err read_hits(ibidi_lexical *l, sqlite3_stmt *q, size_t limit, ibidi_lexical_hit **out,
                          size_t *n) {
    ibid_err e = IBID_OK;
    size_t room = 0;
    for (int rc; *n < limit && !e;) {
        rc = sqlite3_step(q);
        if (rc == SQLITE_DONE) break;
        if (rc != SQLITE_ROW) return failed(l, rc, "search");
        if (*n == room) {
            room = room ? room * 2 : 256;
            ibidi_lexical_hit *more = ibid_realloc(*out, room * sizeof **out);
            if (!more) return ibid_fail(IBID_NOMEM, "out of memory for %zu hits", room);
            *out = more;
        }
        uint64_t row = (uint64_t)sqlite3_column_int64(q, 0);
        (*out)[(*n)++] = (ibidi_lexical_hit){row >> CHUNK_BITS, row & ((1u << CHUNK_BITS) - 1),
                                             -sqlite3_column_double(q, 1)};
    }
    return e;
}

ibid_err ibidi_lexical_search(ibidi_lexical *l, ibid_str question, size_t limit,
                              ibidi_lexical_hit **out, size_t *n, bool *all) {
    sqlite3_stmt *q = NULL;
    ibid_buf match;
    terms t;
    char sql[160];
    *out = NULL;
    *n = 0;
    *all = true;
    ibid_err e = terms_of(question, &t);
    if (e) return e;
    ibid_buf_init(&match, TERMS_MAX * (2 * IBIDI_WORD_MAX + 8));
    e = match_text(&t, &match);
    if (e || !match.len) goto done;
    snprintf(sql, sizeof sql,
             "SELECT rowid, bm25(chunk,%.3f,%.3f) AS b FROM chunk WHERE chunk MATCH ?1"
             " ORDER BY b LIMIT ?2",
             TITLE_WEIGHT, TEXT_WEIGHT);
    int rc = sqlite3_prepare_v2(l->db, sql, -1, &q, NULL);
    if ((e = failed(l, rc, "search"))) goto done;
    sqlite3_bind_text(q, 1, match.data, (int)match.len, SQLITE_STATIC);
    sqlite3_bind_int64(q, 2, limit < INT32_MAX ? (sqlite3_int64)limit : INT32_MAX);
    e = read_hits(l, q, limit, out, n);
    *all = *n < limit;
done:
    sqlite3_finalize(q);
    ibid_buf_fini(&match);
    terms_fini(&t);
    if (e) {
        ibid_free(*out);
        *out = NULL;
        *n = 0;
    }
    return e;
}

static int mark_seen(void *arg, const ibidi_word *w) {
    terms *t = arg;
    size_t i = term_at(t, w->s, w->n);
    if (i < t->n) t->seen[i] = true;
    return 0;
}

/* Rows that hold a word. */
static ibid_err rows_with(ibidi_lexical *l, const char *word, size_t n, uint64_t *out) {
    char quoted[2 * IBIDI_WORD_MAX + 3];
    size_t len = 0;
    sqlite3_stmt *q = NULL;
    quoted[len++] = '"';
    for (size_t i = 0; i < n && i < IBIDI_WORD_MAX; i++) {
        if (word[i] == '"') quoted[len++] = '"';
        quoted[len++] = word[i];
    }
    quoted[len++] = '"';
    int rc =
        sqlite3_prepare_v2(l->db, "SELECT count(*) FROM chunk WHERE chunk MATCH ?1", -1, &q, NULL);
    if (rc == SQLITE_OK) {
        sqlite3_bind_text(q, 1, quoted, (int)len, SQLITE_STATIC);
        rc = sqlite3_step(q);
    }
    if (rc == SQLITE_ROW) *out = (uint64_t)sqlite3_column_int64(q, 0);
    ibid_err e = failed(l, rc, "count");
    sqlite3_finalize(q);
    return e;
}

ibid_err ibidi_lexical_most(ibidi_lexical *l, ibid_str question, double *out) {
    terms t;
    uint64_t rows = 0, with = 0;
    double sum = 0;
    *out = 0;
    ibid_err e = terms_of(question, &t);
    if (e) return e;
    e = ibidi_lexical_rows(l, &rows);
    for (size_t i = 0; i < t.n && !e; i++) {
        if (t.stop[i] && t.n_plain) continue;
        if ((e = rows_with(l, t.s[i], t.len[i], &with))) break;
        /* As FTS5 has it; a word that no text holds would weigh most. */
        double idf = with ? log(((double)rows - (double)with + 0.5) / ((double)with + 0.5))
                          : log((double)rows + 1);
        sum += fmax(idf, 1e-6);
    }
    if (!e) *out = (K1 + 1) * sum;
    terms_fini(&t);
    return e;
}

/* Letters and digits in one word, but no ordinal or decade (19th, 1990s). */
static bool is_code(const char *s, size_t n) {
    size_t digits = 0, letters = 0, first = 0;
    for (size_t i = 0; i < n; i++) {
        bool digit = s[i] >= '0' && s[i] <= '9';
        digits += digit;
        letters += (s[i] >= 'a' && s[i] <= 'z') || (s[i] & 0x80);
        if (digit && first == i) first++;
    }
    if (n < 3 || !digits || !letters) return false;
    bool ordinal =
        n - first == 2 && (memcmp(s + first, "st", 2) == 0 || memcmp(s + first, "nd", 2) == 0 ||
                           memcmp(s + first, "rd", 2) == 0 || memcmp(s + first, "th", 2) == 0);
    bool decade = first == n - 1 && s[n - 1] == 's';
    return !ordinal && !decade;
}

/* Appends the rows that match, unless there are more than most. */
static ibid_err rows_matching(ibidi_lexical *l, const ibid_buf *match, size_t most,
                              ibidi_lexical_hit **out, size_t *n) {
    sqlite3_stmt *q = NULL;
    ibidi_lexical_hit *found = NULL;
    size_t count = 0;
    int rc = sqlite3_prepare_v2(l->db, "SELECT rowid, 0.0 FROM chunk WHERE chunk MATCH ?1 LIMIT ?2",
                                -1, &q, NULL);
    ibid_err e = failed(l, rc, "search");
    if (!e) {
        sqlite3_bind_text(q, 1, match->data, (int)match->len, SQLITE_STATIC);
        sqlite3_bind_int64(q, 2, (sqlite3_int64)most + 1);
        e = read_hits(l, q, most + 1, &found, &count);
    }
    if (!e && count && count <= most) {
        ibidi_lexical_hit *more = ibid_realloc(*out, (*n + count) * sizeof **out);
        if (more) {
            *out = more;
            memcpy(more + *n, found, count * sizeof *more);
            *n += count;
        } else {
            e = ibid_fail(IBID_NOMEM, "out of memory for a search");
        }
    }
    sqlite3_finalize(q);
    ibid_free(found);
    return e;
}

ibid_err ibidi_lexical_exact(ibidi_lexical *l, ibid_str question, ibidi_lexical_hit **out,
                             size_t *n) {
    ibid_buf match;
    terms t;
    size_t codes = 0;
    *out = NULL;
    *n = 0;
    ibid_err e = terms_of(question, &t);
    if (e) return e;
    ibid_buf_init(&match, TERMS_MAX * (2 * IBIDI_WORD_MAX + 8));
    for (size_t i = 0; i < t.n && !e; i++) {
        if (!is_code(t.s[i], t.len[i])) continue;
        codes++;
        ibid_buf_clear(&match);
        e = quote(&t, i, "", &match);
        if (!e) e = rows_matching(l, &match, IBIDI_CODE_ROWS, out, n);
    }
    if (!e && !codes && t.n_plain && t.n_plain <= IBIDI_LOOKUP_WORDS) {
        for (size_t i = 0; i < t.n && !e; i++)
            if (!t.stop[i]) e = quote(&t, i, " AND ", &match);
        if (!e) e = rows_matching(l, &match, IBIDI_LOOKUP_ROWS, out, n);
    }
    ibid_buf_fini(&match);
    terms_fini(&t);
    if (e) {
        ibid_free(*out);
        *out = NULL;
        *n = 0;
    }
    return e;
}

ibid_err ibidi_lexical_share(ibidi_lexical *l, ibid_str question, ibid_str title, ibid_str text,
                             double *out) {
    ibidi_words *w = NULL;
    terms t;
    uint64_t rows = 0, with = 0;
    double sum = 0, found = 0;
    *out = 0;
    ibid_err e = terms_of(question, &t);
    if (e) return e;
    if ((e = ibidi_words_open(&w)) || (e = ibidi_lexical_rows(l, &rows))) goto done;
    ibidi_words_each(w, title.s, title.n, false, mark_seen, &t);
    ibidi_words_each(w, text.s, text.n, false, mark_seen, &t);
    for (size_t i = 0; i < t.n; i++) {
        if (t.stop[i] && t.n_plain) continue;
        if ((e = rows_with(l, t.s[i], t.len[i], &with))) goto done;
        double idf =
            log(((double)rows + SHARE_ROWS - (double)with + 0.5) / ((double)with + 0.5) + 1);
        sum += idf;
        if (t.seen[i]) found += idf;
    }
    if (sum > 0) *out = found / sum;
done:
    ibidi_words_close(w);
    terms_fini(&t);
    return e;
}

ibid_err ibidi_lexical_rows(ibidi_lexical *l, uint64_t *out) {
    return one_u64(l, "SELECT count(*) FROM chunk_docsize", out);
}

ibid_err ibidi_lexical_document_rows(ibidi_lexical *l, uint64_t document, uint64_t *out) {
    char sql[160];
    snprintf(sql, sizeof sql, "SELECT count(*) FROM chunk_docsize WHERE id BETWEEN %lld AND %lld",
             (long long)row_of(document, 0), (long long)row_of(document, (1u << CHUNK_BITS) - 1));
    return one_u64(l, sql, out);
}
