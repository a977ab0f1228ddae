/* One file read by a child process, ibid-extract, as a stream of frames.
 *
 * The child gets the open file as its standard input and nothing else: no other descriptor, no
 * privileges to gain, limits on processor time, memory and files, and it dies with its parent. Its
 * output is checked frame by frame; what it says on stderr becomes part of a failure's text. */
#ifndef IBID_EXTRACT_CHILD_H
#define IBID_EXTRACT_CHILD_H

#include "indexer/extract/frame.h"

#include <stdatomic.h>

typedef struct ibid_extract_limits { /* zero: the default */
    uint64_t cpu_s;          /* processor seconds of each process (60, and 1 more a MiB of input) */
    uint64_t idle_ms;        /* without a byte from it while we wait (120,000) */
    uint64_t memory;         /* address space of each process (1 GiB) */
    uint64_t output;         /* bytes of frames (1 GiB) */
    const atomic_bool *stop; /* set: give up with CANCELLED */
} ibid_extract_limits;

typedef struct ibid_extraction ibid_extraction;

/* Where ibid-extract is: $IBID_EXTRACT, else beside this program, else ../libexec/ibid from there.
 * NOTFOUND says where it was looked for. */
ibid_err ibid_extract_program(char *out, size_t room);

/* fd: the file, open for reading; stays the caller's. */
ibid_err ibid_extraction_open(const char *program, int fd, const char *name, ibid_format format,
                              const ibid_extract_limits *limits, ibid_extraction **out);
/* The next frame; its strings are valid until the next call. DONE comes last. Errors: TIMEOUT (too
 * long), TOOBIG (memory or output), IO (it ended early), PROTO, CANCELLED; the detail is a sentence
 * for a person. */
ibid_err ibid_extraction_next(ibid_extraction *x, ibid_frame *out);
void ibid_extraction_close(ibid_extraction *x); /* kills and reaps; NULL is fine */
#endif
