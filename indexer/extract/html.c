/* HTML with gumbo (HTML5 rules), rendered as plain text: block elements on lines of their own, list
 * items with "- " or "1. ", table cells with " | ", <pre> as it stands, images as their alternative
 * text; scripts, styles and other content that is not shown are dropped. Locators: the path of
 * headings.
 *
 * gumbo does not check its allocator's answers and frees its tree recursively. So it allocates from
 * an arena here, which is freed at once, and an arena that is full leaves the parser by longjmp:
 * the one such jump in ibid, confined to parse(). */
#include "indexer/extract/internal.h"

#include <gumbo.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>

enum { ARENA_PER_BYTE = 200 };

struct heap {
    ibid_arena *arena;
    jmp_buf full;
};

static void *heap_alloc(void *arg, size_t n) {
    struct heap *h = arg;
    void *p = ibid_arena_alloc(h->arena, n);
    if (!p) longjmp(h->full, 1);
    return p;
}

static void heap_free(void *arg, void *p) {
    (void)arg, (void)p; /* the arena goes as a whole */
}

static ibid_err parse(struct heap *h, const char *p, size_t n, GumboOutput **out) {
    GumboOptions o = kGumboDefaultOptions;
    o.allocator = heap_alloc;
    o.deallocator = heap_free;
    o.userdata = h;
    o.max_errors = 0;
    if (setjmp(h->full) != 0)
        return ibid_fail(IBID_TOOBIG, "the HTML needs more memory than the limit");
    *out = gumbo_parse_with_options(&o, p, n);
    return IBID_OK;
}

struct html {
    ibidi_xt_norm norm;
    ibidi_xt_headings headings;
    size_t pre;      /* open <pre> elements */
    bool gap;        /* white space came since the last text */
    bool line_start; /* nothing on this line yet */
    bool item_start; /* an item's marker was just written */
    size_t depth;    /* open lists */
    ibid_buf scratch;
};

enum kind { INLINE, LINE, BLOCK, DROP, HEADING, LIST, ITEM, CELL, BREAK, PRE, IMAGE };

static enum kind kind_of(GumboTag tag) {
    switch (tag) {
    case GUMBO_TAG_SCRIPT:
    case GUMBO_TAG_STYLE:
    case GUMBO_TAG_HEAD:
    case GUMBO_TAG_TEMPLATE:
    case GUMBO_TAG_NOSCRIPT:
    case GUMBO_TAG_IFRAME:
    case GUMBO_TAG_OBJECT:
    case GUMBO_TAG_SVG:
    case GUMBO_TAG_SELECT:
    case GUMBO_TAG_CANVAS:
    case GUMBO_TAG_AUDIO:
    case GUMBO_TAG_VIDEO:
        return DROP;
    case GUMBO_TAG_H1:
    case GUMBO_TAG_H2:
    case GUMBO_TAG_H3:
    case GUMBO_TAG_H4:
    case GUMBO_TAG_H5:
    case GUMBO_TAG_H6:
        return HEADING;
    case GUMBO_TAG_UL:
    case GUMBO_TAG_OL:
        return LIST;
    case GUMBO_TAG_LI:
        return ITEM;
    case GUMBO_TAG_TD:
    case GUMBO_TAG_TH:
        return CELL;
    case GUMBO_TAG_BR:
        return BREAK;
    case GUMBO_TAG_PRE:
    case GUMBO_TAG_TEXTAREA:
        return PRE;
    case GUMBO_TAG_IMG:
        return IMAGE;
    case GUMBO_TAG_TR:
    case GUMBO_TAG_DT:
    case GUMBO_TAG_DD:
    case GUMBO_TAG_OPTION:
    case GUMBO_TAG_CAPTION:
    case GUMBO_TAG_FIGCAPTION:
    case GUMBO_TAG_LEGEND:
        return LINE;
    case GUMBO_TAG_P:
    case GUMBO_TAG_DIV:
    case GUMBO_TAG_SECTION:
    case GUMBO_TAG_ARTICLE:
    case GUMBO_TAG_ASIDE:
    case GUMBO_TAG_HEADER:
    case GUMBO_TAG_FOOTER:
    case GUMBO_TAG_NAV:
    case GUMBO_TAG_MAIN:
    case GUMBO_TAG_BLOCKQUOTE:
    case GUMBO_TAG_TABLE:
    case GUMBO_TAG_DL:
    case GUMBO_TAG_FIGURE:
    case GUMBO_TAG_FORM:
    case GUMBO_TAG_FIELDSET:
    case GUMBO_TAG_ADDRESS:
    case GUMBO_TAG_DETAILS:
    case GUMBO_TAG_SUMMARY:
    case GUMBO_TAG_HR:
    case GUMBO_TAG_BODY:
        return BLOCK;
    default:
        return INLINE;
    }
}

static bool is_space(char c) {
    return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f';
}

static ibid_err new_line(struct html *h, size_t blank) {
    h->gap = false;
    h->line_start = true;
    h->item_start = false;
    return ibidi_xt_norm_break(&h->norm, blank);
}

/* Inline text: runs of white space are one space, none at the start of a line. */
static ibid_err flow(struct html *h, const char *p, size_t n) {
    ibid_err e = IBID_OK;
    if (h->pre) {
        h->line_start = n == 0 ? h->line_start : p[n - 1] == '\n';
        return ibidi_xt_norm_text(&h->norm, p, n);
    }
    for (size_t i = 0; !e && i < n;) {
        if (is_space(p[i])) {
            h->gap = true;
            i++;
            continue;
        }
        size_t end = i;
        while (end < n && !is_space(p[end])) end++;
        if (h->gap && !h->line_start) e = ibidi_xt_norm_puts(&h->norm, " ");
        if (!e) e = ibidi_xt_norm_text(&h->norm, p + i, end - i);
        h->gap = h->line_start = h->item_start = false;
        i = end;
    }
    return e;
}

static const GumboVector *children(const GumboNode *n) {
    if (n->type == GUMBO_NODE_ELEMENT) return &n->v.element.children;
    if (n->type == GUMBO_NODE_DOCUMENT) return &n->v.document.children;
    return NULL;
}

static const GumboNode *parent_of(const GumboNode *n, const GumboNode *root) {
    return n == root ? NULL : n->parent;
}

/* The node after this one in document order below root, or NULL; skip: not its children. */
static const GumboNode *next_node(const GumboNode *n, const GumboNode *root, bool skip) {
    const GumboVector *kids = children(n);
    if (kids && kids->length && !skip) return kids->data[0];
    const GumboNode *up = parent_of(n, root);
    while (up && n->index_within_parent + 1 >= children(up)->length) {
        n = up;
        up = parent_of(n, root);
    }
    return up ? children(up)->data[n->index_within_parent + 1] : NULL;
}

/* The text below a node, dropped elements left out, at most max bytes, spaces as they come. */
static ibid_err inner_text(const GumboNode *root, size_t max, ibid_buf *out) {
    const GumboNode *n = root;
    ibid_err e = IBID_OK;
    while (n && !e && out->len < max) {
        bool text = n->type == GUMBO_NODE_TEXT || n->type == GUMBO_NODE_WHITESPACE ||
                    n->type == GUMBO_NODE_CDATA;
        if (text) {
            size_t len = strlen(n->v.text.text);
            e = ibid_buf_append(out, n->v.text.text,
                                ibidi_xt_utf8_cut(n->v.text.text, len, max - out->len));
        } else if (n->type == GUMBO_NODE_ELEMENT && n->v.element.tag == GUMBO_TAG_BR) {
            e = ibid_buf_puts(out, " ");
        }
        n = next_node(n, root,
                      n != root && n->type == GUMBO_NODE_ELEMENT &&
                          kind_of(n->v.element.tag) == DROP);
    }
    return e;
}

/* A heading begins: its locator comes first. */
static ibid_err enter_heading(struct html *h, const GumboNode *n) {
    ibid_buf line, path;
    unsigned level = (unsigned)(n->v.element.tag - GUMBO_TAG_H1) + 1;
    ibid_buf_init(&line, 64 * 1024);
    ibid_buf_init(&path, 64 * 1024);
    ibid_buf_clear(&h->scratch);
    ibid_err e = inner_text(n, 8192, &h->scratch);
    if (!e && h->scratch.len) e = ibidi_xt_norm_line(h->scratch.data, h->scratch.len, 4096, &line);
    if (!e && line.len)
        e = ibidi_xt_headings_enter(&h->headings, level, line.data, line.len, &path);
    if (!e) e = new_line(h, 1);
    if (!e && path.len) e = ibidi_xt_norm_locator(&h->norm, path.data, path.len);
    ibid_buf_fini(&line);
    ibid_buf_fini(&path);
    return e;
}

static ibid_err enter_item(struct html *h, const GumboNode *n) {
    char marker[24] = "- ";
    const GumboNode *list = n->parent;
    if (list && list->type == GUMBO_NODE_ELEMENT && list->v.element.tag == GUMBO_TAG_OL) {
        const GumboAttribute *v = gumbo_get_attribute(&n->v.element.attributes, "value");
        size_t number = 1;
        /* Number of earlier items, looked for near by only: lists of thousands must stay linear. */
        for (size_t i = 0; !v && i < n->index_within_parent && i < 2000; i++) {
            const GumboNode *k = list->v.element.children.data[i];
            number += k->type == GUMBO_NODE_ELEMENT && k->v.element.tag == GUMBO_TAG_LI;
        }
        if (!v && n->index_within_parent < 2000)
            (void)snprintf(marker, sizeof marker, "%zu. ", number);
    }
    ibid_err e = new_line(h, 0);
    for (size_t i = 1; !e && i < h->depth && i < 16; i++) e = ibidi_xt_norm_puts(&h->norm, "  ");
    h->item_start = true;
    return e ? e : ibidi_xt_norm_puts(&h->norm, marker);
}

static ibid_err enter(struct html *h, const GumboNode *n) {
    const GumboAttribute *alt;
    switch (kind_of(n->v.element.tag)) {
    case HEADING:
        return enter_heading(h, n);
    case LIST:
        return new_line(h, h->depth++ ? 0 : 1);
    case ITEM:
        return enter_item(h, n);
    case LINE:
        return new_line(h, 0);
    case BLOCK:
        if (h->item_start) return IBID_OK; /* it stands behind its marker */
        return new_line(h, h->depth ? 0 : 1);
    case PRE:
        h->pre++;
        return new_line(h, 1);
    case CELL:
        if (n->index_within_parent == 0 || h->line_start) return IBID_OK;
        h->gap = false;
        return ibidi_xt_norm_puts(&h->norm, " | ");
    case BREAK:
        return new_line(h, 0);
    case IMAGE:
        alt = gumbo_get_attribute(&n->v.element.attributes, "alt");
        return alt ? flow(h, alt->value, strlen(alt->value)) : IBID_OK;
    default:
        return IBID_OK;
    }
}

static ibid_err leave(struct html *h, const GumboNode *n) {
    if (n->type != GUMBO_NODE_ELEMENT) return IBID_OK;
    switch (kind_of(n->v.element.tag)) {
    case PRE:
        h->pre--;
        return new_line(h, 1);
    case LIST:
        return new_line(h, --h->depth ? 0 : 1);
    case HEADING:
    case BLOCK:
        return new_line(h, h->depth ? 0 : 1);
    case ITEM:
    case LINE:
        return new_line(h, 0);
    default:
        return IBID_OK;
    }
}

/* Walks the tree without recursion: 5,000 nested elements are 5,000 steps, not frames. */
static ibid_err walk(struct html *h, const GumboNode *root) {
    const GumboNode *n = root;
    ibid_err e = IBID_OK;
    while (n && !e) {
        bool drop = n->type == GUMBO_NODE_TEMPLATE;
        if (n->type == GUMBO_NODE_ELEMENT) {
            drop = kind_of(n->v.element.tag) == DROP;
            if (!drop) e = enter(h, n);
        } else if (n->type == GUMBO_NODE_TEXT || n->type == GUMBO_NODE_WHITESPACE ||
                   n->type == GUMBO_NODE_CDATA) {
            e = flow(h, n->v.text.text, strlen(n->v.text.text));
        }
        const GumboVector *kids = children(n);
        if (e) break;
        if (kids && kids->length && !drop) {
            n = kids->data[0];
            continue;
        }
        const GumboNode *up = parent_of(n, root);
        if (!drop) e = leave(h, n);
        while (!e && up && n->index_within_parent + 1 >= children(up)->length) {
            n = up;
            up = parent_of(n, root);
            e = leave(h, n);
        }
        n = up ? children(up)->data[n->index_within_parent + 1] : NULL;
    }
    return e;
}

/* The first element with one of these tags, in document order. */
static const GumboNode *find(const GumboNode *root, GumboTag first, GumboTag last) {
    for (const GumboNode *n = root; n; n = next_node(n, root, false))
        if (n->type == GUMBO_NODE_ELEMENT && n->v.element.tag >= first && n->v.element.tag <= last)
            return n;
    return NULL;
}

static ibid_err find_title(const GumboNode *root, const char *name, ibid_buf *scratch,
                           ibid_buf *title) {
    ibid_err e = IBID_OK;
    const GumboNode *from[] = {find(root, GUMBO_TAG_TITLE, GUMBO_TAG_TITLE),
                               find(root, GUMBO_TAG_H1, GUMBO_TAG_H1),
                               find(root, GUMBO_TAG_H1, GUMBO_TAG_H6)};
    for (size_t i = 0; !e && !title->len && i < 3; i++) {
        ibid_buf_clear(scratch);
        if (from[i]) e = inner_text(from[i], 8192, scratch);
        if (!e && scratch->len)
            e = ibidi_xt_norm_line(scratch->data, scratch->len, IBID_EXTRACT_TITLE_MAX, title);
    }
    return e || title->len ? e : ibidi_xt_title_of_name(name, title);
}

static ibid_err read_text(const char *name, ibid_str all, const ibidi_xt_encoding *enc,
                          const ibid_extract_sink *sink) {
    struct heap heap = {.arena = NULL};
    GumboOutput *tree = NULL;
    ibid_buf title;
    struct html h = {.line_start = true};
    ibid_buf_init(&title, 64 * 1024);
    ibid_buf_init(&h.scratch, 64 * 1024);
    ibid_err e = ibidi_xt_norm_init(&h.norm, sink);
    size_t room = 64 * 1024 * 1024 + ARENA_PER_BYTE * all.n;
    if (!e) e = ibid_arena_open(room, &heap.arena);
    if (!e) e = parse(&heap, all.s, all.n, &tree);
    if (!e) e = find_title(tree->document, name, &h.scratch, &title);
    if (!e)
        e = sink->begin(sink->arg, (ibid_str){"", 0},
                        (ibid_str){title.data ? title.data : "", title.len}, (ibid_str){"", 0});
    if (!e) e = walk(&h, tree->document);
    if (!e) e = ibidi_xt_finish(&h.norm, enc);
    ibidi_xt_headings_fini(&h.headings);
    ibidi_xt_norm_fini(&h.norm);
    ibid_arena_close(heap.arena);
    ibid_buf_fini(&h.scratch);
    ibid_buf_fini(&title);
    return e;
}

ibid_err ibidi_xt_html(const char *name, const char *p, size_t n, const ibid_extract_sink *sink) {
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

ibid_err ibidi_xt_entity_decode(const char *p, size_t n, ibid_buf *out) {
    struct heap heap = {.arena = NULL};
    GumboOutput *tree = NULL;
    size_t before = out->len;
    ibid_err e = ibid_arena_open(4 * 1024 * 1024, &heap.arena);
    if (!e) e = parse(&heap, p, n, &tree);
    if (!e) e = inner_text(tree->root, 64, out);
    if (!e && out->len == before) e = ibid_buf_append(out, p, n);
    ibid_arena_close(heap.arena);
    return e;
}
