/* The commands, one file per family; the table that names them is in ibid_main.c. Each returns the
 * exit status: 0, 1 nothing found, 2 error. */
#ifndef IBID_FRONT_COMMANDS_H
#define IBID_FRONT_COMMANDS_H

#include "retriever/retriever.h"
#include "rpc/front/options.h"
#include "rpc/front/output.h"
#include "rpc/front/service.h"

int ibidi_cmd_up(ibid_cli *cli);
int ibidi_cmd_down(ibid_cli *cli);
int ibidi_cmd_status(ibid_cli *cli);
int ibidi_cmd_version(ibid_cli *cli);
int ibidi_cmd_index(ibid_cli *cli);
int ibidi_cmd_jobs(ibid_cli *cli);
int ibidi_cmd_search(ibid_cli *cli);
int ibidi_cmd_ask(ibid_cli *cli);
int ibidi_cmd_find(ibid_cli *cli);
int ibidi_cmd_list(ibid_cli *cli);
int ibidi_cmd_show(ibid_cli *cli);
int ibidi_cmd_rm(ibid_cli *cli);
int ibidi_cmd_verify(ibid_cli *cli);
int ibidi_cmd_reindex(ibid_cli *cli);
int ibidi_cmd_model(ibid_cli *cli);
int ibidi_cmd_kv_gate(ibid_cli *cli);
int ibidi_cmd_eval(ibid_cli *cli);

static inline ibid_str ibidi_str(const char *s) {
    return (ibid_str){s ? s : "", s ? __builtin_strlen(s) : 0};
}

/* Runs fn for the question on the command line (id NULL), or for each line of --queries (id: the
 * line's "id", any JSON). fn prints its own result and returns an exit status; the worst error
 * wins, and 1 only if nothing at all was found. */
int ibidi_each_question(ibid_cli *cli, int (*fn)(void *arg, ibid_str text, json_t *id), void *arg);

/* Searches, starting the service again and repeating when a room went away. */
ibid_err ibidi_search(ibid_service *s, const ibid_search_request *q, ibid_search_result *out);
/* A line about ibid_search_result.coverage, if it is not 1. */
void ibidi_print_coverage(double coverage);
/* Splits KEY=VALUE options, and --document, into filters [IBID_OPT_LIST_MAX + 1]. */
size_t ibidi_filters(const ibid_opts *o, ibid_filter *out);
#endif
