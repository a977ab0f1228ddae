/* Needles: statements to put into a book, and the questions they answer. The format is told at the
 * head of needles.txt, which is built in. */
#ifndef IBID_FRONT_EVAL_NEEDLES_H
#define IBID_FRONT_EVAL_NEEDLES_H

#include "kvstore/kvstore.h"
#include "rpc/base/mem.h"

typedef struct ibidi_fact {
    ibid_str statement;
    ibid_str alike; /* question with the statement's words */
    ibid_str apart; /* question without any content word of it */
} ibidi_fact;

typedef struct ibidi_thread { /* the question needs both statements */
    ibid_str first, second, question;
} ibidi_thread;

typedef struct ibidi_needles {
    char *text; /* what the strings point into */
    ibidi_fact *facts;
    ibidi_thread *threads;
    size_t n_facts, n_threads;
} ibidi_needles;

/* path NULL: the built-in ones. Errors: INVAL naming the line; NOTFOUND, IO, NOMEM. */
ibid_err ibidi_needles_read(const char *path, ibidi_needles *out);
void ibidi_needles_fini(ibidi_needles *n);
#endif
