/* ibid-extract FORMAT NAME < FILE: one file's documents as frames (frame.h) on standard output.
 * Started by ibid-indexer under limits; no use by hand. Exit: 0 done, 1 failed (the reason on
 * stderr), 2 usage, 3 out of memory. */
#include "indexer/extract/frame.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static ibid_err write_all(const char *p, size_t n) {
    while (n > 0) {
        ssize_t done = write(1, p, n);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return ibid_fail_errno(errno, "writing", "frames");
        p += done;
        n -= (size_t)done;
    }
    return IBID_OK;
}

static ibid_err flush(ibid_buf *b) {
    ibid_err e = write_all(b->data, b->len);
    ibid_buf_clear(b);
    return e;
}

static ibid_err put(ibid_buf *b, const ibid_frame *f) {
    ibid_err e = ibidi_xt_frame_put(b, f);
    return !e && b->len >= IBIDI_FRAME_MAX ? flush(b) : e;
}

static ibid_err on_begin(void *arg, ibid_str id, ibid_str title, ibid_str metadata) {
    return put(arg, &(ibid_frame){
                        .kind = IBID_FRAME_BEGIN, .id = id, .title = title, .metadata = metadata});
}
static ibid_err on_locator(void *arg, ibid_str name) {
    return put(arg, &(ibid_frame){.kind = IBID_FRAME_LOCATOR, .text = name});
}
static ibid_err on_text(void *arg, ibid_str piece) {
    return put(arg, &(ibid_frame){.kind = IBID_FRAME_TEXT, .text = piece});
}
static ibid_err on_end(void *arg, ibid_doc_state state, const char *reason) {
    return put(arg, &(ibid_frame){
                        .kind = IBID_FRAME_END, .state = state, .text = {reason, strlen(reason)}});
}
static ibid_err on_note(void *arg, uint64_t line, ibid_str id, const char *reason) {
    return put(arg, &(ibid_frame){.kind = IBID_FRAME_NOTE,
                                  .line = line,
                                  .id = {id.s, id.n < 256 ? id.n : 0},
                                  .text = {reason, strlen(reason)}});
}

static ibid_err run(ibid_format format, const char *name, ibid_buf *out) {
    const ibid_extract_sink sink = {.arg = out,
                                    .begin = on_begin,
                                    .locator = on_locator,
                                    .text = on_text,
                                    .end = on_end,
                                    .note = on_note};
    struct stat st;
    if (format == IBID_FORMAT_PDF) return ibid_extract_pdf(name, 0, &sink);
    if (fstat(0, &st) != 0) return ibid_fail_errno(errno, "reading", name);
    size_t n = st.st_size > 0 ? (size_t)st.st_size : 0;
    void *data = n ? mmap(NULL, n, PROT_READ, MAP_PRIVATE, 0, 0) : NULL;
    if (data == MAP_FAILED) return ibid_fail_errno(errno, "mapping", name);
    if (n) (void)madvise(data, n, MADV_SEQUENTIAL);
    return ibid_extract(format, name, data ? data : "", n, &sink);
}

int main(int argc, char **argv) {
    ibid_format format = IBID_FORMAT_NONE;
    for (int f = IBID_FORMAT_TEXT; argc == 3 && f <= IBID_FORMAT_JSONL; f++)
        if (strcmp(argv[1], ibid_format_name((ibid_format)f)) == 0) format = (ibid_format)f;
    if (format == IBID_FORMAT_NONE) {
        (void)fprintf(stderr, "usage: ibid-extract text|markdown|html|pdf|jsonl NAME < FILE\n");
        return 2;
    }
    ibid_buf out;
    ibid_buf_init(&out, 4 * IBIDI_FRAME_MAX);
    ibid_err e = run(format, argv[2], &out);
    if (!e) e = ibidi_xt_frame_put(&out, &(ibid_frame){.kind = IBID_FRAME_DONE});
    if (!e) e = flush(&out);
    if (e) (void)fprintf(stderr, "%s\n", ibid_err_detail());
    ibid_buf_fini(&out);
    return !e ? 0 : e == IBID_NOMEM || e == IBID_TOOBIG ? 3 : 1;
}
