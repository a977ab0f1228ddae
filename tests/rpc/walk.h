/* Reads everything of a message that can be read: shared by the damage test and the fuzzer. */
#ifndef IBID_TESTS_WALK_H
#define IBID_TESTS_WALK_H

#include <stdbool.h>
#include <stddef.h>

/* True if the bytes are a message. Checks it against every method of the schema too. */
bool walk_message(const void *data, size_t n);
#endif
