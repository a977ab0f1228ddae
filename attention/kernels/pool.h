/* A small pool of threads that splits one job into parts. The caller's thread works too, so a pool
 * of one thread starts none. Between jobs the workers spin briefly, then sleep. */
#ifndef IBID_ATTENTION_POOL_H
#define IBID_ATTENTION_POOL_H

#include "rpc/base/err.h"

#include <stddef.h>

typedef struct ibid_pool ibid_pool;

/* n_threads 0: the physical cores this process may use. Errors: NOMEM, BACKEND. */
ibid_err ibid_pool_open(size_t n_threads, ibid_pool **out);
void ibid_pool_close(ibid_pool *p);
size_t ibid_pool_size(const ibid_pool *p);
/* Calls fn(arg, part, thread) once for every part in [0, n_parts), parts handed out dynamically,
 * thread in [0, size). Returns when all are done. One run at a time: callers serialise. */
void ibid_pool_run(ibid_pool *p, size_t n_parts, void (*fn)(void *arg, size_t part, size_t thread),
                   void *arg);
#endif
