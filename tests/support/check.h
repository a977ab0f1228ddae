/* Checks for tests that must also build on a bare machine, without cmocka (tools/gpu-check). */
#ifndef IBID_TEST_CHECK_H
#define IBID_TEST_CHECK_H

#include "rpc/base/err.h"

#include <stdio.h>
#include <stdlib.h>

/* Says what is wrong and where, and ends the program: a test that has failed has no more to say. */
#define CHECK(ok, ...)                                                                             \
    do {                                                                                           \
        if (!(ok)) {                                                                               \
            (void)fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #ok);                         \
            (void)fprintf(stderr, __VA_ARGS__);                                                    \
            (void)fputc('\n', stderr);                                                             \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)
#define MUST(call)                                                                                 \
    do {                                                                                           \
        ibid_err err_ = (call);                                                                    \
        CHECK(!err_, "%s: %s", ibid_err_text(err_), ibid_err_detail());                            \
    } while (0)
#endif
