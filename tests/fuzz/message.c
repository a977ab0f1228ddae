/* The message codec, the envelopes and the schema check, over any bytes. */
#include "tests/rpc/walk.h"

#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    (void)walk_message(data, size);
    return 0;
}
