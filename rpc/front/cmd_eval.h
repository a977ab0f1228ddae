/* What the kinds of `ibid eval` share: a service to measure on, the systems, tables. */
#ifndef IBID_FRONT_CMD_EVAL_H
#define IBID_FRONT_CMD_EVAL_H

#include "rpc/front/commands.h"
#include "rpc/front/eval/data.h"
#include "rpc/front/eval/rank.h"

/* One run. Without --data everything lies in a fresh temporary folder, with a service of its own
 * that ends with the run; with it, in that folder, in a collection named after the data's content,
 * so that a second run finds it indexed. --collection: an existing one, measured as it stands. */
typedef struct ibidi_eval {
    ibid_cli *cli;
    ibid_opts o; /* the command's, with the data folder of this run */
    ibid_service s;
    char folder[64];     /* temporary: the converted documents; data too unless --data */
    char data[80];       /* folder/data */
    char jsonl[80];      /* folder/documents.jsonl: what the loaders write */
    char collection[65]; /* measured on */
    FILE *out;           /* --out, or NULL */
} ibidi_eval;

/* Makes the folder, opens --out and takes Ctrl-C over. End it always, also after an error. */
ibid_err ibidi_eval_begin(ibid_cli *cli, ibidi_eval *ev);
/* Starts the service, makes sure there is a model, and indexes ev->jsonl into ev->collection (set
 * here, unless --collection names one that exists). Errors: CANCELLED, and those of indexing. */
ibid_err ibidi_eval_index(ibidi_eval *ev, const char *kind);
/* The two halves, for those that index several texts. */
ibid_err ibidi_eval_serve(ibidi_eval *ev);
ibid_err ibidi_eval_index_file(ibidi_eval *ev, const char *path);
/* Ends the run's service and removes its folder. */
void ibidi_eval_end(ibidi_eval *ev);
/* CANCELLED once Ctrl-C was pressed. */
ibid_err ibidi_eval_go_on(void);
/* "ibid: TEXT" to stderr; nothing with --json. */
void ibidi_eval_say(const ibidi_eval *ev, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/* A line of progress at most every few seconds. since_ns: 0 at first. */
void ibidi_eval_progress(const ibidi_eval *ev, uint64_t *since_ns, const char *what, size_t done,
                         size_t all);

/* A way to search. One more line in cmd_eval.c's table makes one more system. */
typedef struct ibidi_system {
    const char *name;
    void (*set)(ibid_search_request *q);
} ibidi_system;
enum { IBIDI_SYSTEMS_MAX = 16 };
/* Those of --system in its order, or all. Errors: INVAL (unknown; names the known). */
ibid_err ibidi_eval_systems(const ibid_opts *o, const ibidi_system *out[IBIDI_SYSTEMS_MAX],
                            size_t *n);

/* {"mean","low","high"}. */
json_t *ibidi_interval_json(const ibidi_interval *i);
/* Writes one line to --out and frees it; nothing without --out. Errors: IO, DISKFULL. */
ibid_err ibidi_eval_line(ibidi_eval *ev, json_t *j);

int ibidi_eval_retrieval(ibid_cli *cli);
int ibidi_eval_answers(ibid_cli *cli);
int ibidi_eval_find(ibid_cli *cli);
int ibidi_eval_long(ibid_cli *cli);
#endif
