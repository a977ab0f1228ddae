/* What benchmarks and tests of plans begin with: a model, an engine, and the model's prefix read
 * and stored as q8_0. */
#ifndef IBID_TESTS_READY_H
#define IBID_TESTS_READY_H

#include "attention/plan/encode.h"
#include "attention/plan/prompt.h"

typedef struct ready {
    ibid_model *m;
    ibid_engine *e;
    ibid_sched sched;
    ibid_ids prefix;
    ibid_kv_blob kv; /* of the prefix */
    ibid_reader r;
} ready;

/* Errors: as of what it calls. x: zeros before; ready_close takes it also after an error. */
static inline ibid_err ready_open(ready *x, const char *path, const ibid_engine_opts *o,
                                  const ibid_wording *w) {
    ibid_sched_init(&x->sched);
    ibid_err err = ibid_model_open(path, NULL, &x->m);
    if (!err) err = ibid_engine_open(x->m, o, &x->e);
    if (err) return err;
    if ((err = ibid_prompt_prefix(x->m, w, &x->prefix)) ||
        (err = ibid_read_prefix(x->m, x->e, &x->sched, x->prefix.ids, x->prefix.n, IBID_KV_Q8_0,
                                &x->kv)))
        return err;
    x->r = (ibid_reader){.model = x->m,
                         .engine = x->e,
                         .sched = &x->sched,
                         .kv_type = IBID_KV_Q8_0,
                         .prefix = {.layers = x->kv.layers},
                         .n_prefix = x->prefix.n};
    return IBID_OK;
}

static inline void ready_close(ready *x) {
    ibid_kv_blob_fini(&x->kv);
    ibid_free(x->prefix.ids);
    ibid_engine_close(x->e);
    ibid_model_close(x->m);
    ibid_sched_fini(&x->sched);
}
#endif
