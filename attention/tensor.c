#include "attention/tensor.h"

/* Weights in a block, bytes of it, name. */
typedef struct layout {
    size_t block, bytes;
    const char *name;
} layout;

static const layout layouts[] = {
    [IBID_F32] = {1, 4, "F32"},       [IBID_F16] = {1, 2, "F16"},
    [IBID_Q4_0] = {32, 18, "Q4_0"},   [IBID_Q4_1] = {32, 20, "Q4_1"},
    [IBID_Q5_0] = {32, 22, "Q5_0"},   [IBID_Q5_1] = {32, 24, "Q5_1"},
    [IBID_Q8_0] = {32, 34, "Q8_0"},   [IBID_Q4_K] = {256, 144, "Q4_K"},
    [IBID_Q5_K] = {256, 176, "Q5_K"}, [IBID_Q6_K] = {256, 210, "Q6_K"},
    [IBID_BF16] = {1, 2, "BF16"},
};

static const layout *layout_of(ibid_type type) {
    static const layout unknown = {0, 0, "unknown"};
    size_t i = (size_t)type;
    return i < sizeof layouts / sizeof *layouts && layouts[i].name ? &layouts[i] : &unknown;
}

size_t ibid_type_row_bytes(ibid_type type, size_t cols) {
    const layout *l = layout_of(type);
    if (!l->block || cols % l->block != 0 || cols / l->block > SIZE_MAX / l->bytes) return 0;
    return cols / l->block * l->bytes;
}

size_t ibid_type_block(ibid_type type) {
    return layout_of(type)->block;
}

const char *ibid_type_name(ibid_type type) {
    return layout_of(type)->name;
}
