/* PDF through poppler's pdftotext, in reading order (its default: columns one after another, words
 * divided at a line's end joined), as a process of its own that inherits our limits and dies with
 * us. Form feeds end pages. Lines of a paragraph are joined, so that a phrase is found across them.
 * Locators: "page N". A page without text makes the document PARTIAL, and the reason lists such
 * pages; none with text: EMPTY (a scan). */
#include "indexer/extract/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE_MAX = 8 * 1024 * 1024, PDF_TEXT_MAX = 256 * 1024 * 1024, LINE_MAX_JOIN = 40 };

struct pdf {
    ibidi_xt_norm norm;
    ibid_buf page; /* the page's bytes so far */
    uint64_t number, with_text, bytes;
    ibid_buf textless; /* "2, 5, 9" */
    uint64_t n_textless;
    ibid_buf title;
    const ibid_extract_sink *sink;
    bool begun, too_much;
};

static ibid_err begin(struct pdf *d) {
    if (d->begun) return IBID_OK;
    d->begun = true;
    return d->sink->begin(d->sink->arg, (ibid_str){"", 0},
                          (ibid_str){d->title.data ? d->title.data : "", d->title.len},
                          (ibid_str){"", 0});
}

/* Does this line of a paragraph go on in the next one? */
static bool goes_on(const char *line, size_t n, const char *next, size_t next_n) {
    if (n < LINE_MAX_JOIN || next_n == 0) return false;
    bool lower = next[0] >= 'a' && next[0] <= 'z';
    return lower || !strchr(".!?:;", line[n - 1]);
}

static ibid_err page_text(struct pdf *d, const char *p, size_t n) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < n;) {
        const char *lf = memchr(p + i, '\n', n - i);
        size_t end = lf ? (size_t)(lf - p) : n, len = end - i;
        while (len > 0 && (p[i + len - 1] == ' ' || p[i + len - 1] == '\r')) len--;
        const char *next = end + 1 < n ? p + end + 1 : "";
        const char *next_lf = end + 1 < n ? memchr(next, '\n', n - end - 1) : NULL;
        size_t next_n = end + 1 < n ? (next_lf ? (size_t)(next_lf - next) : n - end - 1) : 0;
        e = ibidi_xt_norm_text(&d->norm, p + i, len);
        if (!e) e = ibidi_xt_norm_puts(&d->norm, goes_on(p + i, len, next, next_n) ? " " : "\n");
        i = end + 1;
    }
    return e;
}

static ibid_err end_page(struct pdf *d) {
    char name[40];
    uint64_t before = d->norm.total;
    ibidi_xt_encoding enc = {.set =
                                 IBIDI_UTF8_DAMAGED}; /* pdftotext's output is not trusted either */
    ibid_buf clean;
    ibid_str text = {"", 0};
    d->number++;
    ibid_buf_init(&clean, 4 * PAGE_MAX);
    int n = snprintf(name, sizeof name, "page %llu", (unsigned long long)d->number);
    ibid_err e = begin(d);
    if (!e) e = ibidi_xt_norm_break(&d->norm, 1);
    if (!e) e = ibidi_xt_norm_locator(&d->norm, name, (size_t)n);
    if (!e && d->page.len)
        e = ibidi_xt_charset_whole(&enc, d->page.data, d->page.len, &clean, &text);
    if (!e) e = page_text(d, text.s, text.n);
    if (!e) e = ibidi_xt_norm_flush(&d->norm);
    if (!e && d->norm.total > before) d->with_text++;
    if (!e && d->norm.total == before && d->n_textless++ < 50)
        e = ibid_buf_printf(&d->textless, "%s%llu", d->n_textless > 1 ? ", " : "",
                            (unsigned long long)d->number);
    ibid_buf_clear(&d->page);
    ibid_buf_fini(&clean);
    return e;
}

static ibid_err take(struct pdf *d, const char *p, size_t n) {
    ibid_err e = IBID_OK;
    d->bytes += n;
    while (!e && n > 0) {
        const char *ff = memchr(p, '\f', n);
        size_t len = ff ? (size_t)(ff - p) : n;
        if (d->page.len + len > PAGE_MAX || d->bytes > PDF_TEXT_MAX) {
            d->too_much = true;
            return IBID_OK;
        }
        e = ibid_buf_append(&d->page, p, len);
        if (!e && ff) e = end_page(d);
        if (ff) len++;
        p += len;
        n -= len;
    }
    return e;
}

/* In the child: only calls that are safe after fork. */
static void exec_pdftotext(int file, int out) {
    static char *const argv[] = {"pdftotext", "-q",         "-enc", "UTF-8", "-eol",
                                 "unix",      "/dev/stdin", "-",    NULL};
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (dup2(file, 0) < 0 || dup2(out, 1) < 0) _exit(126);
    (void)execvp(argv[0], argv);
    static const char lost[] = "pdftotext cannot be started: install poppler-utils\n";
    (void)!write(2, lost, sizeof lost - 1);
    _exit(127);
}

/* The document's end from how the reading went. */
static ibid_err finish(struct pdf *d, int status) {
    char reason[IBID_EXTRACT_REASON_MAX];
    bool broke = !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    ibid_err e = ibidi_xt_norm_flush(&d->norm);
    if (!e) e = begin(d);
    if (e) return e;
    if ((broke || d->too_much) && d->with_text == 0) {
        if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
            (void)snprintf(reason, sizeof reason,
                           "pdftotext cannot be started: install poppler-utils");
        else if (WIFEXITED(status) && WEXITSTATUS(status) == 3)
            (void)snprintf(reason, sizeof reason, "its permissions forbid taking out text");
        else if (WIFSIGNALED(status) && !d->too_much)
            (void)snprintf(reason, sizeof reason, "pdftotext was stopped by a limit (signal %d)",
                           WTERMSIG(status));
        else
            (void)snprintf(reason, sizeof reason, "%s",
                           d->too_much ? "it holds more text than the limit"
                                       : "not a PDF that can be read: damaged or encrypted");
        return d->sink->end(d->sink->arg, IBID_DOC_FAILED, reason);
    }
    if (d->with_text == 0) {
        (void)snprintf(reason, sizeof reason,
                       "none of its %llu pages has text: scanned pages need text recognition first",
                       (unsigned long long)d->number);
        return d->sink->end(d->sink->arg, IBID_DOC_EMPTY, reason);
    }
    if (broke || d->too_much) {
        (void)snprintf(reason, sizeof reason, "reading stopped after page %llu: %s",
                       (unsigned long long)d->number,
                       d->too_much ? "more text than the limit"
                                   : "the rest is damaged or too large");
        return d->sink->end(d->sink->arg, IBID_DOC_PARTIAL, reason);
    }
    if (!d->n_textless) return d->sink->end(d->sink->arg, IBID_DOC_READY, "");
    (void)snprintf(reason, sizeof reason, "%llu of %llu pages have no text: %s%s",
                   (unsigned long long)d->n_textless, (unsigned long long)d->number,
                   d->textless.data, d->n_textless > 50 ? ", ..." : "");
    return d->sink->end(d->sink->arg, IBID_DOC_PARTIAL, reason);
}

static ibid_err read_all(struct pdf *d, int fd) {
    char buf[64 * 1024];
    ibid_err e = IBID_OK;
    while (!e && !d->too_much) {
        ssize_t n = read(fd, buf, sizeof buf);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return ibid_fail_errno(errno, "reading from", "pdftotext");
        if (n == 0) break;
        e = take(d, buf, (size_t)n);
    }
    /* What stands after the last form feed belongs to a page that did not end. */
    if (!e && !d->too_much && d->page.len) e = end_page(d);
    return e;
}

ibid_err ibid_extract_pdf(const char *name, int fd, const ibid_extract_sink *sink) {
    struct pdf d = {.sink = sink};
    int p[2] = {-1, -1}, status = 0;
    ibid_buf_init(&d.page, PAGE_MAX);
    ibid_buf_init(&d.textless, 64 * 1024);
    ibid_buf_init(&d.title, 64 * 1024);
    ibid_err e = ibidi_xt_norm_init(&d.norm, sink);
    if (!e) e = ibidi_xt_title_of_name(name, &d.title);
    if (!e && pipe2(p, O_CLOEXEC) != 0) e = ibid_fail_errno(errno, "opening a pipe for", name);
    pid_t pid = e ? -1 : fork();
    if (pid == 0) exec_pdftotext(fd, p[1]);
    if (!e && pid < 0) e = ibid_fail_errno(errno, "starting", "pdftotext");
    if (p[1] >= 0) (void)close(p[1]);
    if (!e) e = read_all(&d, p[0]);
    if (p[0] >= 0) (void)close(p[0]); /* a pdftotext that still writes ends by SIGPIPE */
    if (pid > 0) {
        if (e || d.too_much) (void)kill(pid, SIGKILL);
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    }
    if (!e) e = finish(&d, status);
    ibidi_xt_norm_fini(&d.norm);
    ibid_buf_fini(&d.page);
    ibid_buf_fini(&d.textless);
    ibid_buf_fini(&d.title);
    return e;
}
