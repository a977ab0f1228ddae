/* A table of tests only; see avxvnni_evex.c. */
#ifndef IBID_TESTS_AVXVNNI_EVEX_H
#define IBID_TESTS_AVXVNNI_EVEX_H

#include "attention/kernels/kernels.h"

extern const ibid_kernels avxvnni_evex;
#endif
