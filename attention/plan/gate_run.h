/* Measures what storing KV in a type costs: windows of a text, the first half of each as stored KV
 * of that type, the second half computed over it, against the same with live f32 KV. */
#ifndef IBID_ATTENTION_GATE_RUN_H
#define IBID_ATTENTION_GATE_RUN_H

#include "attention/plan/gate.h"
#include "attention/plan/scheduler.h"
#include "kvstore/kvstore.h"

enum {
    IBID_GATE_WINDOW = 512, /* tokens, or the model's context */
    IBID_GATE_POSITIONS = 2000,
    IBID_GATE_TYPES = 3 /* KV types there are */
};
/* A type may be used up to this mean divergence, and from this share of equal likeliest tokens on.
 */
#define IBID_GATE_KL 1e-3
#define IBID_GATE_TOP1 0.98

const char *ibid_kv_type_name(ibid_kv_type type);
bool ibid_kv_type_from_name(ibid_str name, ibid_kv_type *out);
/* q8_0 has one scale per 32 values of a head. */
bool ibid_kv_type_fits(const ibid_model *m, ibid_kv_type type);
bool ibid_gate_passes(const ibid_gate_score *s);

typedef struct ibid_gate_job {
    ibid_engine *engine; /* without int8, so that nothing else is rounded */
    ibid_sched *sched;   /* a turn per forward, after questions; NULL: the engine is one's own */
    ibid_str text;       /* s NULL: the text built into the program */
    size_t positions;    /* to score; fewer where the text ends before */
    const ibid_kv_type *types;
    size_t n_types;
    const atomic_bool *cancel;
} ibid_gate_job;

/* out [n_types]. Errors: INVAL (a text of under 16 tokens), NOTSUP (the type does not fit the
 * model), NOMEM, CANCELLED. */
ibid_err ibid_gate_run(const ibid_gate_job *j, ibid_gate_score *out);
#endif
