/* A picture of recall over length and depth, one panel a system. Pure: text in, text out. */
#ifndef IBID_FRONT_EVAL_SVG_H
#define IBID_FRONT_EVAL_SVG_H

#include "rpc/base/mem.h"

typedef struct ibidi_panel {
    const char *title;
    const double *cells; /* [n_rows, n_columns] in 0..1; negative: nothing was measured there */
} ibidi_panel;

typedef struct ibidi_grid {
    const char *title, *x_name, *y_name;
    const char *const *columns; /* [n_columns] names under the grid */
    const char *const *rows;    /* [n_rows] names beside it, the first one on top */
    size_t n_columns, n_rows;
    const ibidi_panel *panels;
    size_t n_panels, per_line; /* panels beside each other */
} ibidi_grid;

/* Appends a whole SVG document. Errors: NOMEM, TOOBIG. */
ibid_err ibidi_eval_svg(const ibidi_grid *g, ibid_buf *out);
#endif
