#include "tests/rpc/walk.h"
#include "rpc/base/hash.h"
#include "rpc/bus/envelope.h"
#include "rpc/bus/schema.h"

#include <stdint.h>

/* The bytes read are summed, so that no read is optimised away and sanitizers see each. */
static volatile uint64_t sum;

static void touch(const void *p, size_t n) {
    uint64_t s = 0;
    for (size_t i = 0; i < n; i++) s += ((const unsigned char *)p)[i];
    sum += s;
}

static void walk(const ibid_val *v) {
    const char *key, *s;
    const void *p;
    const ibid_val *inner;
    size_t n;
    uint64_t u;
    int64_t i;
    double d;
    if (ibid_val_u64(v, &u)) sum += u;
    if (ibid_val_i64(v, &i)) sum += (uint64_t)i;
    if (ibid_val_f64(v, &d)) sum += d > 0;
    if (ibid_val_bin(v, &p, &n)) touch(p, n);
    if (ibid_val_str(v, &s, &n)) touch(s, n);
    for (size_t k = 0; k < ibid_val_count(v); k++) {
        if (ibid_val_is_array(v)) walk(ibid_val_at(v, k));
        if (!ibid_val_pair(v, k, &key, &n, &inner)) continue;
        touch(key, n);
        walk(inner);
    }
}

/* Every method is fuzzed, a few per input, chosen by its bytes so that an input always does the
 * same. */
enum { METHODS_MAX = 1024, A_FEW = 4 };
static const char *methods[METHODS_MAX];
static size_t n_methods;

static void collect(void *arg, const char *method) {
    (void)arg;
    if (method[0] == '*') method = method[2] == 'p' ? "any.ping" : "any.next";
    if (n_methods < METHODS_MAX) methods[n_methods++] = method;
}

static void check(const char *method, const ibid_val *body) {
    sum += (uint64_t)ibid_schema_check(method, body, true);
    sum += (uint64_t)ibid_schema_check(method, body, false);
}

bool walk_message(const void *data, size_t n) {
    ibid_msg *m = NULL;
    ibidi_request q;
    ibidi_answer a;
    if (!n_methods) ibid_schema_each(collect, NULL);
    if (ibidi_request_open(data, n, &q) == IBID_OK) check(q.method, q.body);
    ibid_msg_close(q.msg);
    (void)ibidi_reply_open(data, n, &a);
    ibid_msg_close(a.msg);
    if (ibid_msg_open(data, n, &m)) return false;
    const ibid_val *root = ibid_msg_root(m), *body = ibid_val_get(root, "body");
    uint64_t h = ibid_checksum(data, n);
    walk(root);
    for (size_t i = 0; i < A_FEW; i++) check(methods[(h + i) % n_methods], body ? body : root);
    ibid_msg_close(m);
    return true;
}
