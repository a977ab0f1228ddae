/* For the fuzz target and tests of attention/model: opening a model from memory. */
#ifndef IBID_ATTENTION_MODEL_INTERNAL_H
#define IBID_ATTENTION_MODEL_INTERNAL_H

#include "attention/model/gguf.h"
#include "attention/model/model.h"

/* As ibid_model_open, over an open file, which the model then owns (and which is closed on failure,
 * too). */
ibid_err ibidi_model_build(ibid_gguf *g, const ibid_hash *fingerprint, ibid_model **out);
#endif
