/* Markdown with md4c, rendered as plain text: blocks apart by a blank line, list items on lines
 * with
 * "- " or "1. ", table cells with " | ", code as it stands, links and emphasis as their text,
 * images as their alternative text. HTML inside is stripped to its text. Locators: the path of
 * headings,
 * "# Heading > Sub". A front matter (between two lines "---") gives a title and is left out. */
#include "indexer/extract/internal.h"

#include <md4c.h>
#include <stdio.h>
#include <string.h>

enum { LIST_DEPTH = 32, HEADING_MAX = 32 * 1024 };

struct list {
    bool ordered, tight;
    unsigned next;
};

struct markdown {
    ibidi_xt_norm norm;
    ibid_err err;
    ibidi_xt_headings headings;
    ibid_buf heading; /* text of the heading we are in, or a scratch */
    bool in_heading, title_only, cell_open;
    unsigned level;
    ibid_buf *title;
    unsigned title_level; /* of the heading that gave the title; 0 = none yet */
    size_t depth;         /* of open lists, may pass LIST_DEPTH */
    struct list lists[LIST_DEPTH];
    bool item_start; /* the marker of an item was just written */
    enum { HTML_TEXT, HTML_TAG, HTML_COMMENT } html;
    char tag[8]; /* the beginning of the tag or comment we are in */
    size_t n_tag;
    bool html_drop; /* inside script or style */
};

/* md4c stops at once on a negative answer only. */
static int go_on(const struct markdown *m) {
    return m->err ? -1 : 0;
}

static int put(struct markdown *m, const char *p, size_t n) {
    if (m->in_heading) { /* held back until its locator is known */
        if (!m->err && m->heading.len + n < HEADING_MAX)
            m->err = ibid_buf_append(&m->heading, p, n);
        return go_on(m);
    }
    if (!m->err && !m->title_only) m->err = ibidi_xt_norm_text(&m->norm, p, n);
    return go_on(m);
}

static int puts_text(struct markdown *m, const char *s) {
    return put(m, s, strlen(s));
}

static bool in_tight_list(const struct markdown *m) {
    return m->depth > 0 && m->depth <= LIST_DEPTH && m->lists[m->depth - 1].tight;
}

/* Before a block: a line of its own, indented as deep as its list. */
static int open_block(struct markdown *m, size_t blank) {
    if (m->err || m->title_only) return go_on(m);
    if (m->item_start) return m->item_start = false, 0; /* it stands behind its marker */
    m->err = ibidi_xt_norm_break(&m->norm, blank);
    for (size_t i = 0; !m->err && i < m->depth && i < LIST_DEPTH; i++)
        m->err = ibidi_xt_norm_puts(&m->norm, "  ");
    return go_on(m);
}

static int open_item(struct markdown *m) {
    char marker[24] = "- ";
    size_t depth = m->depth < LIST_DEPTH ? m->depth : LIST_DEPTH;
    m->item_start = false;
    if (m->err || m->title_only || depth == 0) return go_on(m);
    struct list *l = &m->lists[depth - 1];
    m->err = ibidi_xt_norm_break(&m->norm, l->tight ? 0 : 1);
    for (size_t i = 1; !m->err && i < depth; i++) m->err = ibidi_xt_norm_puts(&m->norm, "  ");
    if (l->ordered) (void)snprintf(marker, sizeof marker, "%u. ", l->next++);
    if (!m->err) m->err = ibidi_xt_norm_puts(&m->norm, marker);
    m->item_start = true;
    return go_on(m);
}

static int enter_block(MD_BLOCKTYPE type, void *detail, void *arg) {
    struct markdown *m = arg;
    switch (type) {
    case MD_BLOCK_UL:
    case MD_BLOCK_OL:
        m->item_start = false;
        if (m->depth < LIST_DEPTH) {
            bool ordered = type == MD_BLOCK_OL;
            bool tight = ordered ? ((MD_BLOCK_OL_DETAIL *)detail)->is_tight
                                 : ((MD_BLOCK_UL_DETAIL *)detail)->is_tight;
            m->lists[m->depth] =
                (struct list){ordered, tight, ordered ? ((MD_BLOCK_OL_DETAIL *)detail)->start : 0};
        }
        m->depth++;
        if (m->depth == 1 && !m->title_only) m->err = ibidi_xt_norm_break(&m->norm, 1);
        return go_on(m);
    case MD_BLOCK_LI:
        return open_item(m);
    case MD_BLOCK_H:
        m->in_heading = true;
        m->level = ((MD_BLOCK_H_DETAIL *)detail)->level;
        ibid_buf_clear(&m->heading);
        return open_block(m, 1);
    case MD_BLOCK_P:
        return open_block(m, in_tight_list(m) ? 0 : 1);
    case MD_BLOCK_CODE:
    case MD_BLOCK_TABLE:
        return open_block(m, 1);
    case MD_BLOCK_HTML:
        m->html = HTML_TEXT;
        m->html_drop = false;
        return open_block(m, 1);
    case MD_BLOCK_TR:
        m->cell_open = false;
        if (!m->title_only) m->err = ibidi_xt_norm_break(&m->norm, 0);
        return go_on(m);
    case MD_BLOCK_TH:
    case MD_BLOCK_TD:
        if (m->cell_open && puts_text(m, " | ")) return -1;
        m->cell_open = true;
        return 0;
    default:
        return 0;
    }
}

/* First pass: a heading ended. Non-zero once the title cannot get better. */
static int take_title(struct markdown *m) {
    m->in_heading = false;
    if (m->err || !m->heading.len || (m->title_level && m->level > 1)) return go_on(m);
    ibid_buf_clear(m->title);
    m->err = ibidi_xt_norm_line(m->heading.data, m->heading.len, IBID_EXTRACT_TITLE_MAX, m->title);
    if (m->title->len) m->title_level = m->level;
    return m->err || m->title_level == 1 ? -1 : 0;
}

/* Second pass: the heading's text goes out behind its locator. */
static int leave_heading(struct markdown *m) {
    ibid_buf line, path;
    ibid_buf_init(&line, 64 * 1024);
    ibid_buf_init(&path, 64 * 1024);
    m->in_heading = false;
    if (!m->err && m->heading.len)
        m->err = ibidi_xt_norm_line(m->heading.data, m->heading.len, 4096, &line);
    if (!m->err && line.len)
        m->err = ibidi_xt_headings_enter(&m->headings, m->level, line.data, line.len, &path);
    if (!m->err && path.len) m->err = ibidi_xt_norm_locator(&m->norm, path.data, path.len);
    if (!m->err && line.len) m->err = ibidi_xt_norm_text(&m->norm, line.data, line.len);
    if (!m->err) m->err = ibidi_xt_norm_break(&m->norm, 1);
    ibid_buf_fini(&line);
    ibid_buf_fini(&path);
    return go_on(m);
}

static int leave_block(MD_BLOCKTYPE type, void *detail, void *arg) {
    struct markdown *m = arg;
    (void)detail;
    if (type == MD_BLOCK_UL || type == MD_BLOCK_OL) {
        m->depth--;
        m->item_start = false;
        if (m->depth == 0 && !m->title_only) m->err = ibidi_xt_norm_break(&m->norm, 1);
    }
    if (type == MD_BLOCK_LI) m->item_start = false;
    if (type == MD_BLOCK_H) return m->title_only ? take_title(m) : leave_heading(m);
    return go_on(m);
}

static int enter_span(MD_SPANTYPE type, void *detail, void *arg) {
    (void)type, (void)detail, (void)arg;
    return 0;
}

/* Raw HTML: its text without tags, comments, scripts and styles. */
static int strip_html(struct markdown *m, const char *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (m->html == HTML_TEXT) {
            if (p[i] == '<') {
                m->html = HTML_TAG;
                m->n_tag = 0;
            } else if (!m->html_drop) {
                size_t end = i + 1;
                while (end < n && p[end] != '<') end++;
                if (put(m, p + i, end - i)) return -1;
                i = end - 1;
            }
            continue;
        }
        if (m->n_tag < sizeof m->tag - 1) {
            m->tag[m->n_tag++] = p[i] >= 'A' && p[i] <= 'Z' ? (char)(p[i] | 32) : p[i];
            if (m->n_tag == 3 && memcmp(m->tag, "!--", 3) == 0) m->html = HTML_COMMENT;
        }
        if (p[i] != '>') continue;
        if (m->html == HTML_COMMENT && !(i >= 2 && p[i - 1] == '-' && p[i - 2] == '-')) continue;
        m->tag[m->n_tag] = '\0';
        if (m->html == HTML_TAG) {
            if (!strncmp(m->tag, "script", 6) || !strncmp(m->tag, "style", 5)) m->html_drop = true;
            if (!strncmp(m->tag, "/script", 7) || !strncmp(m->tag, "/style", 6))
                m->html_drop = false;
            if (!m->html_drop && !strncmp(m->tag, "br", 2) && puts_text(m, "\n")) return -1;
        }
        m->html = HTML_TEXT;
    }
    return go_on(m);
}

static int text(MD_TEXTTYPE type, const MD_CHAR *p, MD_SIZE n, void *arg) {
    struct markdown *m = arg;
    m->item_start = false;
    switch (type) {
    case MD_TEXT_NULLCHAR:
        return put(m, "\xEF\xBF\xBD", 3);
    case MD_TEXT_BR:
        return put(m, "\n", 1);
    case MD_TEXT_SOFTBR:
        return put(m, " ", 1);
    case MD_TEXT_HTML:
        return strip_html(m, p, n);
    case MD_TEXT_ENTITY: {
        ibid_buf one;
        ibid_buf_init(&one, 4096);
        m->err = ibidi_xt_entity_decode(p, n, &one);
        if (!m->err && one.len) (void)put(m, one.data, one.len);
        ibid_buf_fini(&one);
        return go_on(m);
    }
    default:
        return put(m, p, n);
    }
}

/* Bytes of the front matter, 0 if there is none; its title goes into *title. */
static ibid_err front_matter(const char *p, size_t n, size_t *skip, ibid_buf *title) {
    enum { MAX = 16 * 1024 };
    *skip = 0;
    if (n < 8 || (memcmp(p, "---\n", 4) != 0 && memcmp(p, "---\r\n", 5) != 0)) return IBID_OK;
    size_t found = 0, found_n = 0;
    for (size_t i = (size_t)((const char *)memchr(p, '\n', n) - p) + 1; i < n && i < MAX;) {
        const char *lf = memchr(p + i, '\n', n - i);
        size_t end = lf ? (size_t)(lf - p) : n, len = end - i;
        while (len > 0 && (p[i + len - 1] == '\r' || p[i + len - 1] == ' ')) len--;
        if (len == 3 && (memcmp(p + i, "---", 3) == 0 || memcmp(p + i, "...", 3) == 0)) {
            *skip = end < n ? end + 1 : n;
            if (found_n > 1 && (p[found] == '"' || p[found] == '\'') &&
                p[found + found_n - 1] == p[found])
                found++, found_n -= 2;
            return ibidi_xt_norm_line(p + found, found_n, IBID_EXTRACT_TITLE_MAX, title);
        }
        if (len > 6 && memcmp(p + i, "title:", 6) == 0) {
            found = i + 6;
            found_n = len - 6;
            while (found_n > 0 && p[found] == ' ') found++, found_n--;
        }
        i = end + 1;
    }
    return IBID_OK;
}

static void run(struct markdown *m, const char *p, size_t n) {
    const MD_PARSER parser = {.flags = MD_FLAG_TABLES | MD_FLAG_STRIKETHROUGH | MD_FLAG_TASKLISTS,
                              .enter_block = enter_block,
                              .leave_block = leave_block,
                              .enter_span = enter_span,
                              .leave_span = enter_span,
                              .text = text};
    int rc = md_parse(p, (MD_SIZE)n, &parser, m);
    bool found = m->title_only && m->title_level == 1;
    if (rc < 0 && !m->err && !found) m->err = ibid_fail(IBID_NOMEM, "out of memory for Markdown");
}

static ibid_err read_text(const char *name, ibid_str all, const ibidi_xt_encoding *enc,
                          const ibid_extract_sink *sink) {
    ibid_buf title, front;
    size_t skip = 0;
    struct markdown first = {.title_only = true, .title = &title};
    struct markdown m = {.err = IBID_OK};
    ibid_buf_init(&title, 64 * 1024);
    ibid_buf_init(&front, 64 * 1024);
    ibid_buf_init(&first.heading, 64 * 1024);
    ibid_buf_init(&m.heading, 64 * 1024);
    ibid_err e = ibidi_xt_norm_init(&m.norm, sink);
    if (!e) e = front_matter(all.s, all.n, &skip, &front);
    if (!e) {
        run(&first, all.s + skip, all.n - skip);
        e = first.err;
    }
    if (!e && first.title_level != 1 && front.len) {
        ibid_buf_clear(&title);
        e = ibid_buf_append(&title, front.data, front.len);
    }
    if (!e && !title.len) e = ibidi_xt_title_of_name(name, &title);
    if (!e)
        e = sink->begin(sink->arg, (ibid_str){"", 0},
                        (ibid_str){title.data ? title.data : "", title.len}, (ibid_str){"", 0});
    if (!e) {
        run(&m, all.s + skip, all.n - skip);
        e = m.err;
    }
    if (!e) e = ibidi_xt_finish(&m.norm, enc);
    ibidi_xt_headings_fini(&m.headings);
    ibidi_xt_norm_fini(&m.norm);
    ibid_buf_fini(&m.heading);
    ibid_buf_fini(&first.heading);
    ibid_buf_fini(&title);
    ibid_buf_fini(&front);
    return e;
}

ibid_err ibidi_xt_markdown(const char *name, const char *p, size_t n,
                           const ibid_extract_sink *sink) {
    char reason[IBID_EXTRACT_REASON_MAX];
    ibidi_xt_encoding enc = ibidi_xt_charset_detect(p, n);
    ibid_buf buf;
    ibid_str all;
    if (enc.set == IBIDI_BINARY)
        return ibidi_xt_state(sink, name, ibidi_xt_charset_state(&enc, reason), reason);
    ibid_buf_init(&buf, IBID_EXTRACT_INPUT_MAX);
    ibid_err e = ibidi_xt_charset_whole(&enc, p, n, &buf, &all);
    if (!e) e = read_text(name, all, &enc, sink);
    ibid_buf_fini(&buf);
    return e;
}
