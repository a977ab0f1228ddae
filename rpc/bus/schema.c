#include "rpc/bus/schema.h"

#include <stdio.h>
#include <string.h>

enum side { REQ, REP, SUB };
enum kind { NOTHING, U64, I64, F64, BOOL, STR, BIN, ANY, MAP, SUBMAP, LIST, SUBLIST };

struct field {
    const char *owner;
    enum side side;
    const char *name;
    enum kind kind;
    enum kind element; /* of LIST */
    const char *sub;   /* of SUBMAP and SUBLIST */
    bool required;
    uint64_t cap; /* 0 = the kind's default */
};

/* The words of the rows. */
#define REQUIRED true
#define OPTIONAL false
#define MAX(n) (n)
#define DEFAULT 0
#define MAP_OF(name) SUBMAP, NOTHING, name
#define ARRAY_OF(name) SUBLIST, NOTHING, name
#define ARRAY(kind) LIST, kind, NULL
#define FIELD(owner, side, name, ...) FIELD_(owner, side, name, __VA_ARGS__)
/* A plain kind is one word, the others are three: both become the row's three by position. */
#define FIELD_(owner, side, name, ...)                                                             \
    FIELD_PICK(__VA_ARGS__, 5, 4, 3)(owner, side, name, __VA_ARGS__)
#define FIELD_PICK(a, b, c, d, e, n, ...) FIELD_##n
#define FIELD_3(owner, side, name, kind, need, cap)                                                \
    {owner, side, name, kind, NOTHING, NULL, need, cap},
#define FIELD_5(owner, side, name, kind, element, sub, need, cap)                                  \
    {owner, side, name, kind, element, sub, need, cap},
#define NO_FIELDS(owner, side) {owner, side, NULL, NOTHING, NOTHING, NULL, false, 0},

static const struct field rows[] = {
#include "rpc/bus/schema.h"
};
enum { N_ROWS = sizeof rows / sizeof rows[0] };

#undef FIELD

static const uint64_t default_bytes = 1024 * 1024, default_count = 65536;

/* ---- Looking up ---- */

/* The owner whose rows serve a method: itself, or "*.verb"; NULL if neither has any. */
static const char *owner_of(const char *method) {
    const char *dot = strchr(method, '.');
    const char *common = NULL;
    if (!dot) return NULL;
    for (size_t i = 0; i < N_ROWS; i++) {
        if (strcmp(rows[i].owner, method) == 0) return rows[i].owner;
        if (rows[i].owner[0] == '*' && strcmp(rows[i].owner + 1, dot) == 0) common = rows[i].owner;
    }
    return common;
}

bool ibid_schema_knows(const char *method) {
    return owner_of(method) != NULL;
}

/* The rows of one side of one owner lie within [first, end); found once, not once per element. */
struct span {
    const char *owner;
    enum side side;
    size_t first, end;
};

static bool mine(const struct field *f, const char *owner, enum side side) {
    return f->side == side && f->name && strcmp(f->owner, owner) == 0;
}

static struct span span_of(const char *owner, enum side side) {
    struct span s = {.owner = owner, .side = side};
    for (size_t i = N_ROWS; i-- > 0;) {
        if (!mine(&rows[i], owner, side)) continue;
        if (!s.end) s.end = i + 1;
        s.first = i;
    }
    return s;
}

/* ---- Checking ---- */

struct place { /* for the text of an error: "kvstore.blocks_put: blocks[3].tokens" */
    const char *method, *field;
    const struct place *up;
    size_t index;
    bool indexed;
};

static void place_text(const struct place *p, char *out, size_t room) {
    char up[192] = "";
    if (p->up) place_text(p->up, up, sizeof up);
    const char *dot = p->up ? "." : "";
    if (p->indexed)
        (void)snprintf(out, room, "%.150s%s%s[%zu]", up, dot, p->field, p->index);
    else
        (void)snprintf(out, room, "%.150s%s%s", up, dot, p->field);
}

static ibid_err wrong(const struct place *p, ibid_err e, const char *what, uint64_t n) {
    char text[256];
    place_text(p, text, sizeof text);
    if (e == IBID_TOOBIG)
        return ibid_fail(e, "%s: %s is larger than %llu%s", p->method, text, (unsigned long long)n,
                         what);
    return ibid_fail(e, "%s: %s %s", p->method, text, what);
}

static ibid_err check_fields(const struct span *s, const ibid_val *map, const struct place *up,
                             const char *method);

static ibid_err check_plain(enum kind kind, uint64_t cap, const ibid_val *v,
                            const struct place *at) {
    uint64_t u;
    int64_t i;
    double d;
    bool b;
    const void *p;
    size_t n;
    switch (kind) {
    case U64:
        if (!ibid_val_u64(v, &u)) return wrong(at, IBID_PROTO, "must be an integer >= 0", 0);
        return cap && u > cap ? wrong(at, IBID_TOOBIG, "", cap) : IBID_OK;
    case I64:
        return ibid_val_i64(v, &i) ? IBID_OK : wrong(at, IBID_PROTO, "must be an integer", 0);
    case F64:
        return ibid_val_f64(v, &d) ? IBID_OK : wrong(at, IBID_PROTO, "must be a number", 0);
    case BOOL:
        return ibid_val_bool(v, &b) ? IBID_OK : wrong(at, IBID_PROTO, "must be a bool", 0);
    case STR:
    case BIN:
        if (!ibid_val_bin(v, &p, &n))
            return wrong(at, IBID_PROTO, kind == STR ? "must be text" : "must be bytes", 0);
        if (!cap) cap = default_bytes;
        return n > cap ? wrong(at, IBID_TOOBIG, " bytes", cap) : IBID_OK;
    default:
        return IBID_OK;
    }
}

static ibid_err check_list(const struct field *f, const ibid_val *v, const struct place *at,
                           const char *method) {
    ibid_err e = IBID_OK;
    uint64_t cap = f->cap ? f->cap : default_count;
    size_t n = ibid_val_count(v);
    if (!ibid_val_is_array(v)) return wrong(at, IBID_PROTO, "must be an array", 0);
    if (n > cap) return wrong(at, IBID_TOOBIG, " elements", cap);
    struct place el = *at;
    el.indexed = true;
    struct span sub = f->kind == SUBLIST ? span_of(f->sub, SUB) : (struct span){0};
    for (size_t i = 0; i < n && !e; i++) {
        const ibid_val *item = ibid_val_at(v, i);
        el.index = i;
        if (f->kind == LIST)
            e = check_plain(f->element, 0, item, &el);
        else if (!ibid_val_is_map(item))
            e = wrong(&el, IBID_PROTO, "must be a map", 0);
        else
            e = check_fields(&sub, item, &el, method);
    }
    return e;
}

static ibid_err check_field(const struct field *f, const ibid_val *v, const struct place *at,
                            const char *method) {
    struct span sub;
    switch (f->kind) {
    case LIST:
    case SUBLIST:
        return check_list(f, v, at, method);
    case MAP:
    case SUBMAP:
        if (!ibid_val_is_map(v)) return wrong(at, IBID_PROTO, "must be a map", 0);
        if (ibid_val_count(v) > (f->cap ? f->cap : default_count))
            return wrong(at, IBID_TOOBIG, " pairs", f->cap ? f->cap : default_count);
        if (f->kind == MAP) return IBID_OK;
        sub = span_of(f->sub, SUB);
        return check_fields(&sub, v, at, method);
    default:
        return check_plain(f->kind, f->cap, v, at);
    }
}

/* Recursion ends with the message's depth (16), whatever the sub-schemas say. */
static ibid_err check_fields(const struct span *s, const ibid_val *map, const struct place *up,
                             const char *method) {
    for (size_t i = s->first; i < s->end; i++) {
        const struct field *f = &rows[i];
        if (!mine(f, s->owner, s->side)) continue;
        struct place at = {.method = method, .field = f->name, .up = up};
        const ibid_val *v = ibid_val_get(map, f->name);
        if (ibid_val_is_nil(v)) {
            if (f->required) return wrong(&at, IBID_PROTO, "is missing", 0);
            continue;
        }
        ibid_err e = check_field(f, v, &at, method);
        if (e) return e;
    }
    return IBID_OK;
}

ibid_err ibid_schema_check(const char *method, const ibid_val *body, bool is_request) {
    const char *owner = owner_of(method);
    if (!owner) return ibid_fail(IBID_NOTSUP, "no method %s in the schema", method);
    if (!ibid_val_is_nil(body) && !ibid_val_is_map(body))
        return ibid_fail(IBID_PROTO, "%s: the body must be a map", method);
    struct span s = span_of(owner, is_request ? REQ : REP);
    return check_fields(&s, body, NULL, method);
}

/* ---- The table about itself ---- */

static bool has_sub(const char *name) {
    for (size_t i = 0; i < N_ROWS; i++)
        if (rows[i].side == SUB && strcmp(rows[i].owner, name) == 0) return true;
    return false;
}

static ibid_err verify_row(size_t i) {
    const struct field *f = &rows[i];
    const char *name = f->name ? f->name : "(none)";
    if ((f->side == SUB) != (strchr(f->owner, '.') == NULL))
        return ibid_fail(IBID_INTERNAL, "%s.%s: sub-schemas have no dot, methods do", f->owner,
                         name);
    if ((f->kind == SUBMAP || f->kind == SUBLIST) && !has_sub(f->sub))
        return ibid_fail(IBID_INTERNAL, "%s.%s: no sub-schema %s", f->owner, name, f->sub);
    if (f->kind == LIST && (f->element < U64 || f->element > BIN))
        return ibid_fail(IBID_INTERNAL, "%s.%s: an array of what?", f->owner, name);
    if (f->cap && (f->kind == I64 || f->kind == F64 || f->kind == BOOL || f->kind == ANY))
        return ibid_fail(IBID_INTERNAL, "%s.%s: this type takes no MAX", f->owner, name);
    for (size_t j = 0; f->name && j < i; j++)
        if (rows[j].side == f->side && rows[j].name && strcmp(rows[j].owner, f->owner) == 0 &&
            strcmp(rows[j].name, f->name) == 0)
            return ibid_fail(IBID_INTERNAL, "%s.%s: two rows", f->owner, f->name);
    return IBID_OK;
}

ibid_err ibid_schema_verify(void) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < N_ROWS && !e; i++) e = verify_row(i);
    return e;
}

void ibid_schema_each(void (*fn)(void *, const char *method), void *arg) {
    for (size_t i = 0; i < N_ROWS; i++) {
        bool seen = rows[i].side == SUB;
        for (size_t j = 0; j < i && !seen; j++) seen = strcmp(rows[j].owner, rows[i].owner) == 0;
        if (!seen) fn(arg, rows[i].owner);
    }
}
