/* The command line: one table of commands, one of options. From them come parsing, --help, the
 * environment twin of every option (IBID_TOP for --top) and the INI file's keys (top = 5 under
 * [ibid]). Later wins: default, INI file, environment, command line. */
#ifndef IBID_FRONT_OPTIONS_H
#define IBID_FRONT_OPTIONS_H

#include "rpc/base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { IBID_OPT_LIST_MAX = 16 };

typedef struct ibid_many { /* an option that may be repeated */
    const char *v[IBID_OPT_LIST_MAX];
    size_t n;
} ibid_many;

typedef struct ibid_opts {
    /* everywhere */
    const char *data, *config, *color, *log_level;
    bool json, help;
    /* service */
    bool foreground;
    uint64_t threads, kv_budget, map_size;
    const char *kernels, *arithmetic, *backend;
    uint64_t gpu_pool;
    /* what is asked about */
    const char *collection, *model, *queries, *range, *name, *from, *sample;
    const char *kv_type, *text;
    uint64_t top, blocks, max_tokens, seed, context, max_matches, job;
    double temperature, top_p, min_score;
    const char *recompute; /* a number in [0,1], or "auto" */
    const char *document;  /* its id, or NULL: all */
    const char *mode;      /* "extract", "generate" or "auto" */
    const char *attention; /* "full", or "select[=SHARE][,recall]" */
    const char *filters[IBID_OPT_LIST_MAX];
    size_t n_filters;
    bool chunks, stream, always, exact_only, fast, explain, keys_only, lexical_only;
    /* index, jobs */
    bool prune, resume, force, dry_run, detach;
    const char *pause_job, *resume_job, *cancel_job;
    /* model calibrate */
    ibid_many train;
    const char *teacher;
    bool pairs;
    /* eval */
    const char *corpus, *qrels, *squad, *ktrlf, *lengths, *needles, *svg, *out;
    ibid_many systems, plans, books;
    uint64_t folds, limit;
} ibid_opts;

typedef struct ibid_cli {
    ibid_opts o;
    const char *command; /* "index" */
    char **args;         /* what is left after the options */
    size_t n_args;
    char *owned[128]; /* values from files that o points into */
    size_t n_owned;
} ibid_cli;

typedef struct ibid_command {
    const char *name;
    unsigned bit;          /* which options it takes: see options.c */
    const char *arguments; /* "PATH..." */
    const char *summary;
    const char *example;
    size_t min_args, max_args;
    int (*run)(ibid_cli *cli); /* exit status: 0, 1 nothing found, 2 error */
} ibid_command;

extern const ibid_command ibidi_commands[]; /* ends with a NULL name; ibid_main.c */

/* Finds the command and reads its options. Errors: INVAL with a detail naming the option. */
ibid_err ibidi_cli_parse(int argc, char **argv, ibid_cli *cli, const ibid_command **cmd);
void ibidi_cli_fini(ibid_cli *cli);
void ibidi_cli_help(const ibid_command *cmd); /* NULL: the whole program */
#endif
