/* Writes small valid PDF files: one page per string, its lines separated by line feeds, in
 * Helvetica. */
#ifndef IBID_TEST_PDF_WRITE_H
#define IBID_TEST_PDF_WRITE_H

#include "rpc/base/mem.h"

#include <string.h>

static inline ibid_err test_pdf(ibid_buf *out, const char *const *pages, size_t n) {
    size_t offsets[256], n_objects = 3 + 2 * n, base = out->len;
    ibid_err e = n <= 120 ? ibid_buf_puts(out, "%PDF-1.4\n") : IBID_INVAL;
    if (e) return e;
    offsets[1] = out->len - base;
    e = ibid_buf_puts(out, "1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n");
    offsets[2] = out->len - base;
    if (!e) e = ibid_buf_puts(out, "2 0 obj<</Type/Pages/Kids[");
    for (size_t i = 0; !e && i < n; i++) e = ibid_buf_printf(out, "%zu 0 R ", 3 + 2 * i);
    if (!e) e = ibid_buf_printf(out, "]/Count %zu>>endobj\n", n);
    for (size_t i = 0; !e && i < n; i++) {
        ibid_buf s;
        ibid_buf_init(&s, 1 << 20);
        e = ibid_buf_puts(&s, "BT /F1 12 Tf 14 TL 72 720 Td ");
        for (const char *p = pages[i]; !e && *p;) {
            size_t len = strcspn(p, "\n");
            e = ibid_buf_printf(&s, "(%.*s) Tj T* ", (int)len, p);
            p += len + (p[len] == '\n');
        }
        if (!e) e = ibid_buf_puts(&s, "ET");
        offsets[3 + 2 * i] = out->len - base;
        if (!e)
            e = ibid_buf_printf(out,
                                "%zu 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents "
                                "%zu 0 R/Resources<</Font<</F1 %zu 0 R>>>>>>endobj\n",
                                3 + 2 * i, 4 + 2 * i, n_objects);
        offsets[4 + 2 * i] = out->len - base;
        if (!e)
            e = ibid_buf_printf(out, "%zu 0 obj<</Length %zu>>stream\n%s\nendstream endobj\n",
                                4 + 2 * i, s.len, s.data);
        ibid_buf_fini(&s);
    }
    offsets[n_objects] = out->len - base;
    if (!e)
        e = ibid_buf_printf(out, "%zu 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj\n",
                            n_objects);
    size_t xref = out->len - base;
    if (!e) e = ibid_buf_printf(out, "xref\n0 %zu\n0000000000 65535 f \n", n_objects + 1);
    for (size_t i = 1; !e && i <= n_objects; i++)
        e = ibid_buf_printf(out, "%010zu 00000 n \n", offsets[i]);
    if (!e)
        e = ibid_buf_printf(out, "trailer<</Size %zu/Root 1 0 R>>\nstartxref\n%zu\n%%%%EOF\n",
                            n_objects + 1, xref);
    return e;
}
#endif
