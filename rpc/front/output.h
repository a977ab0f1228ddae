/* What people and programs see: JSON through jansson, human text with colour only on a terminal. */
#ifndef IBID_FRONT_OUTPUT_H
#define IBID_FRONT_OUTPUT_H

#include "kvstore/kvstore.h"
#include "rpc/bus/msg.h"
#include "rpc/front/options.h"

#include <jansson.h>

/* Decides about colour once, from --color and the terminal. */
void ibidi_out_init(const ibid_opts *o);
const char *ibidi_bold(void);
const char *ibidi_dim(void);
const char *ibidi_mark(void); /* for matches */
const char *ibidi_plain(void);

/* A JSON string of these bytes; bytes that are not UTF-8 become U+FFFD. Never NULL unless memory is
 * out, which jansson's setters take as an error. */
json_t *ibidi_json_text(const char *s, size_t n);
json_t *ibidi_json_str(ibid_str s);
/* The same tree as a decoded message (binary values as hex). */
json_t *ibidi_json_value(const ibid_val *v);
/* Prints one line and frees it. Exit status 0, or 2 when writing failed. */
int ibidi_json_print(json_t *j);

/* Prints "ibid: CODE text" to stderr (JSON {"error":{"code","message"}} to stdout with --json) and
 * returns the exit status 2. */
int ibidi_report(const ibid_cli *cli, ibid_err e);

/* "12.3 MB", "41 s", into a caller's buffer. */
const char *ibidi_bytes(uint64_t n, char out[32]);
const char *ibidi_seconds(double s, char out[32]);
/* Text on one line, at most width columns, control characters as spaces. */
void ibidi_print_line(ibid_str text, size_t width);
#endif
