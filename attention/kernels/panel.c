#include "attention/kernels/panel.h"

#include "attention/kernels/kernels.h"

#include <string.h>

enum { ROWS = IBID_PANEL_ROWS, GROUP = IBID_PANEL_GROUP };

bool ibid_panels_shape(const ibid_tensor *w, ibid_panels *out) {
    ibid_panels p = {.rows = w->rows, .cols = w->cols, .bits = 8, .n_scales = 1};
    switch (w->type) {
    case IBID_Q4_0:
        p.bits = 4;
        p.zero = 8;
        break;
    case IBID_Q4_1:
    case IBID_Q4_K:
        p.bits = 4;
        p.has_offset = true;
        break;
    case IBID_Q5_0:
        p.zero = 16;
        break;
    case IBID_Q5_1:
    case IBID_Q5_K:
        p.has_offset = true;
        break;
    case IBID_Q6_K:
        p.n_scales = 2;
        p.zero = 32;
        break;
    case IBID_Q8_0:
        p.zero = 128;
        break;
    default:
        return false;
    }
    p.group_bytes = 2u * ROWS * (p.n_scales + p.has_offset) + (size_t)ROWS * GROUP * p.bits / 8;
    p.panel_bytes = p.cols / GROUP * p.group_bytes;
    *out = p;
    return true;
}

size_t ibid_panels_bytes(const ibid_panels *p) {
    return (p->rows + ROWS - 1) / ROWS * p->panel_bytes;
}

static void put_half(uint8_t *at, float f) {
    uint16_t h = ibid_f32_to_f16(f);
    memcpy(at, &h, sizeof h);
}

/* One row of one group. */
static void pack_row(const ibid_panels *p, size_t r, const uint8_t u[GROUP], const float d[2],
                     const float m[2], uint8_t *group) {
    uint8_t *q = group + 2u * ROWS * (p->n_scales + p->has_offset);
    for (size_t s = 0; s < p->n_scales; s++) put_half(group + 2 * (s * ROWS + r), d[s]);
    if (p->has_offset) put_half(group + 2 * (p->n_scales * ROWS + r), m[0]);
    for (size_t c = 0; c < GROUP; c++) {
        size_t step = c / 4, lane = 4 * r + c % 4;
        if (p->bits == 8)
            q[step * 4 * ROWS + lane] = u[c];
        else
            q[step % 4 * 4 * ROWS + lane] |= (uint8_t)(step < 4 ? u[c] : u[c] << 4);
    }
}

void ibid_panels_pack(const ibid_panels *p, const ibid_tensor *w, size_t panel, uint8_t *to) {
    size_t row0 = panel * ROWS, n = p->rows - row0 < ROWS ? p->rows - row0 : ROWS;
    memset(to, 0, p->panel_bytes);
    for (size_t r = 0; r < n; r++) {
        const uint8_t *row = (const uint8_t *)w->data + (row0 + r) * w->row_bytes;
        for (size_t g = 0; g < p->cols / GROUP; g++) {
            uint8_t u[GROUP];
            float d[2], m[2];
            ibid_weights_split(w->type, row, g, u, d, m);
            pack_row(p, r, u, d, m, to + g * p->group_bytes);
        }
    }
}
