#include "rpc/base/mem.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Atomic uint64_t fail_countdown;

void ibid_alloc_fail_at(uint64_t nth) {
    atomic_store(&fail_countdown, nth);
}

/* True when the armed test failure falls on this allocation. */
static bool must_fail(void) {
    uint64_t left = atomic_load_explicit(&fail_countdown, memory_order_relaxed);
    while (left > 0)
        if (atomic_compare_exchange_weak(&fail_countdown, &left, left - 1)) return left == 1;
    return false;
}

void *ibid_alloc(size_t size) {
    return must_fail() ? NULL : malloc(size ? size : 1);
}

void *ibid_calloc(size_t n, size_t size) {
    size_t total; /* checked here too: sanitizers abort in calloc instead of returning NULL */
    if (must_fail() || !ibid_mul_size(n, size, &total)) return NULL;
    return calloc(n ? n : 1, size ? size : 1);
}

void *ibid_realloc(void *p, size_t size) {
    return must_fail() ? NULL : realloc(p, size ? size : 1);
}

void *ibid_alloc_aligned(size_t align, size_t size) {
    void *p = NULL;
    if (must_fail() || posix_memalign(&p, align, size ? size : 1) != 0) return NULL;
    return p;
}

void ibid_free(void *p) {
    free(p);
}

char *ibid_strdup(const char *s) {
    return ibid_strndup(s, strlen(s));
}

char *ibid_strndup(const char *s, size_t n) {
    size_t size;
    if (!ibid_add_size(n, 1, &size)) return NULL;
    char *copy = ibid_alloc(size);
    if (!copy) return NULL;
    if (n) memcpy(copy, s, n);
    copy[n] = '\0';
    return copy;
}

void ibid_buf_init(ibid_buf *b, size_t cap) {
    *b = (ibid_buf){.cap = cap};
}

void ibid_buf_fini(ibid_buf *b) {
    ibid_free(b->data);
    *b = (ibid_buf){.cap = b->cap};
}

ibid_err ibid_buf_reserve(ibid_buf *b, size_t more) {
    size_t need, room;
    if (!ibid_add_size(b->len, more, &need) || need > b->cap)
        return ibid_fail(IBID_TOOBIG, "a buffer would pass its limit of %zu bytes", b->cap);
    if (!ibid_add_size(need, 1, &room)) return IBID_NOMEM;
    if (room <= b->room) return IBID_OK;
    size_t grown = b->room < 64 ? 64 : b->room + b->room / 2;
    if (grown < room) grown = room;
    char *data = ibid_realloc(b->data, grown);
    if (!data) return ibid_fail(IBID_NOMEM, "out of memory for a buffer of %zu bytes", grown);
    b->data = data;
    b->room = grown;
    return IBID_OK;
}

ibid_err ibid_buf_append(ibid_buf *b, const void *data, size_t n) {
    ibid_err e = ibid_buf_reserve(b, n);
    if (e) return e;
    if (n) memcpy(b->data + b->len, data, n);
    b->len += n;
    b->data[b->len] = '\0';
    return IBID_OK;
}

ibid_err ibid_buf_puts(ibid_buf *b, const char *s) {
    return ibid_buf_append(b, s, strlen(s));
}

ibid_err ibid_buf_printf(ibid_buf *b, const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    ibid_err e = n < 0 ? IBID_INVAL : ibid_buf_reserve(b, (size_t)n);
    if (!e) {
        (void)vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
    return e;
}

enum { ARENA_CHUNK = 64 * 1024 };

struct chunk {
    struct chunk *next;
    size_t size, used;
    _Alignas(16) unsigned char data[];
};

struct ibid_arena {
    struct chunk *head; /* the newest chunk; the first one is last in the list */
    size_t cap, total;
};

ibid_err ibid_arena_open(size_t cap, ibid_arena **out) {
    ibid_arena *a = ibid_calloc(1, sizeof *a);
    if (!a) return ibid_fail(IBID_NOMEM, "out of memory for an arena");
    a->cap = cap;
    *out = a;
    return IBID_OK;
}

void ibid_arena_close(ibid_arena *a) {
    if (!a) return;
    for (struct chunk *c = a->head; c;) {
        struct chunk *next = c->next;
        ibid_free(c);
        c = next;
    }
    ibid_free(a);
}

void ibid_arena_reset(ibid_arena *a) {
    while (a->head && a->head->next) {
        struct chunk *next = a->head->next;
        a->total -= a->head->size;
        ibid_free(a->head);
        a->head = next;
    }
    if (a->head) a->head->used = 0;
}

void *ibid_arena_alloc(ibid_arena *a, size_t n) {
    size_t need;
    if (!ibid_add_size(n ? n : 1, 15, &need)) return NULL;
    need &= ~(size_t)15;
    if (!a->head || a->head->size - a->head->used < need) {
        size_t size = need > ARENA_CHUNK ? need : ARENA_CHUNK, bytes;
        if (a->total > a->cap || size > a->cap - a->total) {
            size = need;
            if (a->total > a->cap || size > a->cap - a->total) {
                (void)ibid_fail(IBID_TOOBIG, "a request needs more than %zu bytes", a->cap);
                return NULL;
            }
        }
        if (!ibid_add_size(size, sizeof(struct chunk), &bytes)) return NULL;
        struct chunk *c = ibid_alloc_aligned(16, bytes);
        if (!c) return NULL;
        *c = (struct chunk){.next = a->head, .size = size};
        a->head = c;
        a->total += size;
    }
    void *p = a->head->data + a->head->used;
    a->head->used += need;
    memset(p, 0, need);
    return p;
}

void *ibid_arena_copy(ibid_arena *a, const void *data, size_t n) {
    size_t size;
    if (!ibid_add_size(n, 1, &size)) return NULL;
    char *p = ibid_arena_alloc(a, size);
    if (p && n) memcpy(p, data, n);
    return p;
}

size_t ibid_arena_used(const ibid_arena *a) {
    size_t used = 0;
    for (const struct chunk *c = a->head; c; c = c->next) used += c->used;
    return used;
}
