#include "attention/kernels/kernels.h"

#include <string.h>

static size_t place(size_t dim, size_t i, size_t d) {
    return i / IBID_KEY_PANEL * IBID_KEY_PANEL * dim + d / 4 * 4 * IBID_KEY_PANEL +
           i % IBID_KEY_PANEL * 4;
}

void ibid_key_panels_pack(const int8_t *keys, size_t n_keys, size_t dim, uint8_t *out) {
    for (size_t i = 0; i < ibid_key_panels_of(n_keys) * IBID_KEY_PANEL; i++) {
        const int8_t *key = keys + (i < n_keys ? i : n_keys - 1) * dim;
        for (size_t d = 0; d < dim; d += 4) {
            uint32_t four;
            memcpy(&four, key + d, 4);
            four ^= 0x80808080u;
            memcpy(out + place(dim, i, d), &four, 4);
        }
    }
}

void ibid_key_panels_unpack(const uint8_t *panels, size_t i, size_t dim, int8_t *key) {
    for (size_t d = 0; d < dim; d += 4) {
        uint32_t four;
        memcpy(&four, panels + place(dim, i, d), 4);
        four ^= 0x80808080u;
        memcpy(key + d, &four, 4);
    }
}
