/* Where the [1], [2] of a human answer go. */
#ifndef IBID_FRONT_MARKERS_H
#define IBID_FRONT_MARKERS_H

#include "kvstore/kvstore.h"

/* For each quote: the byte in the answer after which its marker stands, namely the end of the
 * sentence that shares most words (case-folded ASCII letters and digits, 3 bytes or more) with it;
 * the answer's end when none does. Never inside a UTF-8 sequence. */
void ibidi_marker_places(ibid_str answer, const ibid_str *quotes, size_t n, size_t *places);
#endif
