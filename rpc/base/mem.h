/* Memory: one allocation hook, checked size arithmetic, a capped growable buffer, a capped arena.
 *
 * Own code allocates through ibid_alloc and its siblings only, so that a test can make the Nth
 * allocation of a thread fail (ibid_alloc_fail_at). All of them return NULL on failure and never
 * exit. ibid_free(NULL) is fine. Memory from ibid_alloc may be freed by ibid_free only. */
#ifndef IBID_BASE_MEM_H
#define IBID_BASE_MEM_H

#include "rpc/base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *ibid_alloc(size_t size);              /* uninitialised; size 0 gives a valid pointer */
void *ibid_calloc(size_t n, size_t size);   /* zeroed, n * size checked */
void *ibid_realloc(void *p, size_t size);   /* old block kept on failure */
void *ibid_alloc_aligned(size_t align, size_t size); /* align: power of two >= 8 */
void ibid_free(void *p);
char *ibid_strdup(const char *s);
char *ibid_strndup(const char *s, size_t n); /* copies n bytes, appends NUL */
/* Tests: the nth allocation from now on (1 = the next) in this process fails once; 0 = off. */
void ibid_alloc_fail_at(uint64_t nth);

/* Both return false on overflow and leave *out alone. */
static inline bool ibid_add_size(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_add_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}
static inline bool ibid_mul_size(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}
static inline size_t ibid_align_up(size_t n, size_t align) {
    return (n + align - 1) & ~(align - 1);
}

/* A growable byte buffer that declares its maximum. data[len] is always NUL once anything was
 * appended, so text may be read as a C string. Errors: IBID_NOMEM, IBID_TOOBIG (would pass cap). */
typedef struct ibid_buf {
    char *data;
    size_t len;
    size_t room; /* bytes allocated */
    size_t cap;  /* most bytes it may ever hold */
} ibid_buf;

void ibid_buf_init(ibid_buf *b, size_t cap);
void ibid_buf_fini(ibid_buf *b); /* frees; the buffer may be used again with the same cap */
ibid_err ibid_buf_reserve(ibid_buf *b, size_t more);
ibid_err ibid_buf_append(ibid_buf *b, const void *data, size_t n);
ibid_err ibid_buf_puts(ibid_buf *b, const char *s);
ibid_err ibid_buf_printf(ibid_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static inline void ibid_buf_clear(ibid_buf *b) {
    b->len = 0;
    if (b->data) b->data[0] = '\0';
}

/* A bump arena for one request: freed whole. Allocations are 16-byte aligned and zeroed. Returns
 * NULL past its cap or when memory is out. Not thread-safe. */
typedef struct ibid_arena ibid_arena;
ibid_err ibid_arena_open(size_t cap, ibid_arena **out);
void ibid_arena_close(ibid_arena *a);
void ibid_arena_reset(ibid_arena *a); /* keeps its first chunk */
void *ibid_arena_alloc(ibid_arena *a, size_t n);
void *ibid_arena_copy(ibid_arena *a, const void *data, size_t n); /* appends a NUL byte */
size_t ibid_arena_used(const ibid_arena *a);
#endif
