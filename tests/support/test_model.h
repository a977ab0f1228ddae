/* The default model, for tests that need it: IBID_TEST_MODEL, or where `ibid model pull` puts it.
 */
#ifndef IBID_TEST_MODEL_H
#define IBID_TEST_MODEL_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The file's path, or NULL if it is not there. */
static inline const char *ibid_test_model_path(void) {
    static char path[4096];
    const char *given = getenv("IBID_TEST_MODEL"), *data = getenv("XDG_DATA_HOME");
    const char *home = getenv("HOME");
    if (given && *given)
        (void)snprintf(path, sizeof path, "%s", given);
    else
        (void)snprintf(path, sizeof path, "%s%s/ibid/models/SmolLM2-135M-Instruct.Q4_1.gguf",
                       data && *data ? data
                       : home        ? home
                                     : "",
                       data && *data ? "" : "/.local/share");
    return access(path, R_OK) == 0 ? path : NULL;
}

/* The exit status of a program whose other tests passed: 0 with the model; without it 77 (skipped),
 * or 1 where IBID_TEST_REQUIRE_MODEL=1 says that it must be there. */
static inline int ibid_test_model_exit(void) {
    const char *required = getenv("IBID_TEST_REQUIRE_MODEL");
    if (ibid_test_model_path()) return 0;
    (void)fprintf(stderr, "the default model is not there: its tests were skipped\n");
    return required && strcmp(required, "1") == 0 ? 1 : 77;
}
#endif
