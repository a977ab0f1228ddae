#include "rpc/front/commands.h"

#include <signal.h>
#include <stdio.h>

enum { MANY = 1 << 20 };

/* The bits are the ones options.c names, in this order. */
const ibid_command ibidi_commands[] = {
    {"up", 1 << 0, "", "Start the service", "ibid up", 0, 0, ibidi_cmd_up},
    {"down", 1 << 1, "", "Stop the service", "ibid down", 0, 0, ibidi_cmd_down},
    {"status", 1 << 2, "", "Show processes, models, collections, sizes on disk and jobs",
     "ibid status", 0, 0, ibidi_cmd_status},
    {"index", 1 << 3, "PATH...",
     "Read files and folders (.txt .md .html .pdf .jsonl) into a collection",
     "ibid index --collection papers ~/papers", 0, MANY, ibidi_cmd_index},
    {"search", 1 << 4, "QUESTION", "Find the best passages",
     "ibid search --top 3 \"boiling point of water\"", 0, 1, ibidi_cmd_search},
    {"ask", 1 << 5, "QUESTION", "Answer from the documents, with checked citations",
     "ibid ask \"When was the bridge opened?\"", 0, 1, ibidi_cmd_ask},
    {"find", 1 << 6, "QUERY FILE|DOCUMENT",
     "Find every match in one document, exact and by meaning",
     "ibid find \"cities in Italy\" report.pdf", 2, 2, ibidi_cmd_find},
    {"list", 1 << 7, "", "List the documents of a collection", "ibid list --collection papers", 0,
     0, ibidi_cmd_list},
    {"show", 1 << 8, "DOCUMENT", "Print a document's normalised text, or a byte range of it",
     "ibid show --range 120:480 notes.md", 1, 1, ibidi_cmd_show},
    {"rm", 1 << 9, "DOCUMENT...", "Remove documents", "ibid rm notes.md", 1, MANY, ibidi_cmd_rm},
    {"jobs", 1 << 10, "", "List indexing jobs; pause, continue or cancel one",
     "ibid jobs --pause 3", 0, 0, ibidi_cmd_jobs},
    {"verify", 1 << 11, "", "Check every checksum, reference count and index stamp", "ibid verify",
     0, 0, ibidi_cmd_verify},
    {"reindex", 1 << 12, "", "Build the search indexes again from the store", "ibid reindex", 0, 0,
     ibidi_cmd_reindex},
    {"model", 1 << 13, "add FILE | list | pull NAME | calibrate [NAME]",
     "Add, list, fetch or calibrate models", "ibid model pull smollm2", 1, 2, ibidi_cmd_model},
    {"version", 1 << 14, "", "Print the version", "ibid version", 0, 0, ibidi_cmd_version},
    {"kv-gate", 1 << 15, "[MODEL]",
     "Measure what storing KV in each type costs a model; refuse a type that costs too much",
     "ibid kv-gate --text sample.txt", 0, 1, ibidi_cmd_kv_gate},
    {"eval", 1 << 16, "retrieval | qa | find | long",
     "Measure search, answers, find and long documents on test questions",
     "ibid eval retrieval --squad dev.json --system keys,lexical,hybrid", 1, 1, ibidi_cmd_eval},
    {NULL, 0, NULL, NULL, NULL, 0, 0, NULL},
};

int main(int argc, char **argv) {
    ibid_cli cli;
    const ibid_command *cmd = NULL;
    (void)signal(SIGPIPE, SIG_IGN);
    ibid_err e = ibidi_cli_parse(argc, argv, &cli, &cmd);
    int status = 2;
    ibidi_out_init(&cli.o);
    if (e)
        status = ibidi_report(&cli, e);
    else if (cli.o.help)
        ibidi_cli_help(cmd), status = 0;
    else
        status = cmd->run(&cli);
    ibidi_cli_fini(&cli);
    if (fflush(stdout) != 0) status = 2;
    return status;
}
