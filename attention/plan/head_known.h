/* Retrieval heads that come with the program: trained for models that are known by fingerprint
 * (docs/quality.md and tools/train-head say how). */
#ifndef IBID_ATTENTION_HEAD_KNOWN_H
#define IBID_ATTENTION_HEAD_KNOWN_H

#include "attention/plan/calibration.h"

/* NOTFOUND: there is none for this model. End *out with ibid_calibration_fini. */
ibid_err ibid_known_head(const ibid_hash *fingerprint, ibid_calibration *out);

extern const unsigned char ibidi_known_head[]; /* generated from plan/smollm2.head */
extern const size_t ibidi_known_head_size;     /* 0: built without */
#endif
