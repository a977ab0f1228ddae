#include "rpc/front/eval/svg.h"

#include <stdio.h>

enum {
    CELL_W = 64,
    CELL_H = 22,
    LEFT = 70,
    TOP = 34,
    BOTTOM = 44,
    GAP = 26,
    HEAD = 40,
    LEGEND = 46,
    TITLE_W = 210
};

static ibid_err put_text(ibid_buf *out, const char *s) {
    ibid_err e = IBID_OK;
    for (; !e && *s; s++) {
        if (*s == '<')
            e = ibid_buf_puts(out, "&lt;");
        else if (*s == '&')
            e = ibid_buf_puts(out, "&amp;");
        else
            e = ibid_buf_append(out, s, 1);
    }
    return e;
}

static ibid_err label(ibid_buf *out, size_t x, size_t y, const char *anchor, const char *style,
                      const char *text) {
    ibid_err e = ibid_buf_printf(out, "<text x=\"%zu\" y=\"%zu\" text-anchor=\"%s\"%s>", x, y,
                                 anchor, style);
    if (!e) e = put_text(out, text);
    return e ? e : ibid_buf_puts(out, "</text>\n");
}

/* From red over yellow to green, dark enough at both ends to be told apart without colour. */
static void colour(double v, char out[8]) {
    static const int stop[3][3] = {{178, 34, 52}, {247, 214, 112}, {26, 135, 84}};
    double at = v <= 0 ? 0 : v >= 1 ? 2 : 2 * v;
    int low = at >= 1 ? 1 : 0, c[3];
    for (int i = 0; i < 3; i++)
        c[i] = stop[low][i] + (int)((at - low) * (stop[low + 1][i] - stop[low][i]));
    (void)snprintf(out, 8, "#%02x%02x%02x", c[0] & 255, c[1] & 255, c[2] & 255);
}

static ibid_err cell(ibid_buf *out, size_t x, size_t y, double v) {
    char fill[8] = "#dddddd", text[16] = "";
    if (v >= 0) {
        colour(v, fill);
        (void)snprintf(text, sizeof text, "%.2f", v);
    }
    ibid_err e = ibid_buf_printf(out,
                                 "<rect x=\"%zu\" y=\"%zu\" width=\"%d\" height=\"%d\" "
                                 "fill=\"%s\" stroke=\"#fff\"/>\n",
                                 x, y, CELL_W, CELL_H, fill);
    const char *style = v >= 0.25 && v <= 0.75 ? " fill=\"#222\"" : " fill=\"#fff\"";
    return e ? e : label(out, x + CELL_W / 2, y + 15, "middle", style, text);
}

static ibid_err panel(const ibidi_grid *g, const ibidi_panel *p, size_t x0, size_t y0,
                      ibid_buf *out) {
    size_t left = x0 + LEFT, top = y0 + TOP, bottom = top + g->n_rows * CELL_H;
    ibid_err e = label(out, left, y0 + 22, "start", " font-weight=\"bold\"", p->title);
    for (size_t r = 0; !e && r < g->n_rows; r++) {
        e = label(out, left - 6, top + r * CELL_H + 15, "end", "", g->rows[r]);
        for (size_t c = 0; !e && c < g->n_columns; c++)
            e = cell(out, left + c * CELL_W, top + r * CELL_H, p->cells[r * g->n_columns + c]);
    }
    for (size_t c = 0; !e && c < g->n_columns; c++)
        e = label(out, left + c * CELL_W + CELL_W / 2, bottom + 15, "middle", "", g->columns[c]);
    if (!e)
        e = label(out, left + g->n_columns * CELL_W / 2, bottom + 32, "middle", " fill=\"#555\"",
                  g->x_name);
    return e ? e : label(out, left - 6, y0 + 22, "end", " fill=\"#555\"", g->y_name);
}

static ibid_err legend(size_t x, size_t y, ibid_buf *out) {
    ibid_err e = IBID_OK;
    for (int i = 0; !e && i <= 10; i++) {
        char fill[8];
        colour(i / 10.0, fill);
        e = ibid_buf_printf(out,
                            "<rect x=\"%zu\" y=\"%zu\" width=\"18\" height=\"12\" fill=\"%s\"/>\n",
                            x + 18 * (size_t)i, y, fill);
    }
    if (!e) e = label(out, x, y + 26, "start", "", "0");
    return e ? e : label(out, x + 198, y + 26, "end", "", "1");
}

ibid_err ibidi_eval_svg(const ibidi_grid *g, ibid_buf *out) {
    size_t per = g->per_line ? g->per_line : 1, lines = (g->n_panels + per - 1) / per;
    size_t w = LEFT + g->n_columns * CELL_W + GAP, h = TOP + g->n_rows * CELL_H + BOTTOM;
    if (w < LEFT + TITLE_W) w = LEFT + TITLE_W;
    size_t width = per * w + GAP;
    ibid_err e = ibid_buf_printf(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%zu\" height=\"%zu\" "
        "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" "
        "fill=\"#fff\"/>\n",
        width, HEAD + lines * h + LEGEND);
    if (!e) e = label(out, 16, 26, "start", " font-size=\"16\" font-weight=\"bold\"", g->title);
    for (size_t i = 0; !e && i < g->n_panels; i++)
        e = panel(g, &g->panels[i], (i % per) * w, HEAD + (i / per) * h, out);
    if (!e) e = legend(LEFT, HEAD + lines * h + 4, out);
    return e ? e : ibid_buf_puts(out, "</svg>\n");
}
