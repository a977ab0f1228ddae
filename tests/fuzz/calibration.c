/* A stored calibration: any bytes give a calibration that holds together, or an error. */
#include "attention/plan/calibration.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Token keys of any raw keys are defined, and read back what was written. */
static void use(ibid_calibration *c) {
    size_t d = ibid_keymap_input(c->map), dim = ibid_keymap_dim(c->map);
    float *raw = malloc(2 * d * sizeof *raw);
    int8_t *keys = malloc(2 * dim);
    ibid_calibration again;
    ibid_buf out;
    if (!raw || !keys) abort();
    for (size_t i = 0; i < 2 * d; i++) raw[i] = (float)i - 100;
    if (ibid_token_keys(c->map, NULL, false, raw, 2, keys) != IBID_OK) abort();
    if (ibid_token_keys(c->map, NULL, true, raw, 2, keys) != IBID_OK) abort();
    ibid_buf_init(&out, 8 << 20);
    if (ibid_calibration_encode(c, &out) != IBID_OK) abort();
    if (ibid_calibration_decode(out.data, out.len, &again) != IBID_OK) abort();
    if (ibid_hash_cmp(&again.id, &c->id) != 0 || again.dim != dim) abort();
    ibid_calibration_fini(&again);
    ibid_buf_fini(&out);
    free(raw);
    free(keys);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ibid_calibration c, brief;
    ibid_hash id = {{1}};
    ibid_err e = ibid_calibration_decode(data, size, &c);
    if (ibid_calibration_decode_brief(data, size, &id, &brief) == IBID_OK && brief.map) abort();
    if (e) return 0;
    if (c.dim != ibid_keymap_dim(c.map) || brief.dim != c.dim) abort();
    if (!isfinite(c.relevant) || !(c.keys_weight >= 0 && c.keys_weight <= 1)) abort();
    if (c.map) use(&c);
    ibid_calibration_fini(&c);
    return 0;
}
