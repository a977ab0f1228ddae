#include "attention/tensor.h"

enum { BLOCK = 32 };

size_t ibid_type_row_bytes(ibid_type type, size_t cols) {
    size_t per_block;
    switch (type) {
    case IBID_F32:
        return cols <= SIZE_MAX / 4 ? cols * 4 : 0;
    case IBID_F16:
        return cols <= SIZE_MAX / 2 ? cols * 2 : 0;
    case IBID_Q4_0:
        per_block = 2 + BLOCK / 2;
        break;
    case IBID_Q4_1:
        per_block = 4 + BLOCK / 2;
        break;
    case IBID_Q8_0:
        per_block = 2 + BLOCK;
        break;
    default:
        return 0;
    }
    if (cols % BLOCK != 0 || cols / BLOCK > SIZE_MAX / per_block) return 0;
    return cols / BLOCK * per_block;
}

const char *ibid_type_name(ibid_type type) {
    switch (type) {
    case IBID_F32:
        return "F32";
    case IBID_F16:
        return "F16";
    case IBID_Q4_0:
        return "Q4_0";
    case IBID_Q4_1:
        return "Q4_1";
    case IBID_Q8_0:
        return "Q8_0";
    }
    return "unknown";
}
