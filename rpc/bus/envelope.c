#include "rpc/bus/envelope.h"
#include "rpc/bus/bus.h"

#include <string.h>

enum { VERSION = 1 };

const char ibidi_empty_body[1] = {(char)0x80}; /* fixmap of no pairs */

static void head_open(ibid_enc *e) {
    ibid_enc_init(e, IBIDI_HEAD_MAX + IBIDI_ERROR_TEXT_MAX);
    ibid_enc_map(e, NULL);
    ibid_enc_u64(e, "v", VERSION);
}

/* The map's last pair is the body: counted and named here, its value is appended by the caller. */
static ibid_err head_close(ibid_enc *e) {
    static const char key[5] = {(char)0xa4, 'b', 'o', 'd', 'y'};
    e->count[0]++;
    ibid_enc_end(e);
    if (!e->err) e->err = ibid_buf_append(&e->buf, key, sizeof key);
    return ibid_enc_done(e);
}

ibid_err ibidi_request_head(ibid_enc *e, uint64_t id, const char *method, uint64_t deadline_ms,
                            uint64_t sent_ms) {
    head_open(e);
    ibid_enc_u64(e, "id", id);
    ibid_enc_cstr(e, "method", method);
    ibid_enc_u64(e, "deadline_ms", deadline_ms);
    ibid_enc_u64(e, "sent_ms", sent_ms);
    return head_close(e);
}

ibid_err ibidi_reply_head(ibid_enc *e, uint64_t id, ibid_err code, const char *error) {
    head_open(e);
    ibid_enc_u64(e, "id", id);
    ibid_enc_cstr(e, "code", ibid_err_code(code));
    ibid_enc_str(e, "error", error, strnlen(error, IBIDI_ERROR_TEXT_MAX - 1));
    return head_close(e);
}

/* Copies a text field into a C string. */
static bool copy_text(const ibid_val *map, const char *key, char *out, size_t room) {
    const char *s;
    size_t n;
    if (!ibid_get_str(map, key, &s, &n) || n >= room || memchr(s, 0, n)) return false;
    memcpy(out, s, n);
    out[n] = '\0';
    return true;
}

static ibid_err check_version(const ibid_val *root) {
    if (!ibid_val_is_map(root)) return ibid_fail(IBID_PROTO, "a message must be a map");
    uint64_t v = ibid_get_u64(root, "v", 0);
    if (v != VERSION)
        return ibid_fail(IBID_PROTO, "messages of version %llu are not known here (this is %d)",
                         (unsigned long long)v, VERSION);
    return IBID_OK;
}

ibid_err ibidi_request_open(const void *data, size_t n, ibidi_request *r) {
    *r = (ibidi_request){0};
    ibid_err e = ibid_msg_open(data, n, &r->msg);
    if (e) return e;
    const ibid_val *root = ibid_msg_root(r->msg);
    r->id = ibid_get_u64(root, "id", 0);
    e = check_version(root);
    if (e) return e;
    if (!r->id) return ibid_fail(IBID_PROTO, "a request needs an id > 0");
    if (!copy_text(root, "method", r->method, sizeof r->method))
        return ibid_fail(IBID_PROTO, "a request needs a method");
    r->deadline_ms = ibid_get_u64(root, "deadline_ms", 0);
    r->sent_ms = ibid_get_u64(root, "sent_ms", 0);
    r->body = ibid_val_get(root, "body");
    return IBID_OK;
}

ibid_err ibidi_reply_open(const void *data, size_t n, ibidi_answer *r) {
    char code[64];
    *r = (ibidi_answer){0};
    ibid_err e = ibid_msg_open(data, n, &r->msg);
    if (e) return e;
    const ibid_val *root = ibid_msg_root(r->msg);
    e = check_version(root);
    if (e) return e;
    r->id = ibid_get_u64(root, "id", 0);
    if (!copy_text(root, "code", code, sizeof code))
        return ibid_fail(IBID_PROTO, "a reply needs a code");
    r->code = ibid_err_from_code(code);
    (void)copy_text(root, "error", r->error, sizeof r->error);
    r->body = ibid_val_get(root, "body");
    return IBID_OK;
}

/* ---- Seen ids: a ring, and chains by hash over its slots ---- */

struct ibidi_seen {
    uint64_t id[IBIDI_SEEN];
    uint32_t chain[IBIDI_SEEN]; /* next slot + 1; 0 ends */
    uint32_t head[IBIDI_SEEN];
    uint32_t next; /* the slot to use, and so the oldest one */
    bool full;
};

static uint32_t bucket(uint64_t id) {
    return (uint32_t)((id * 0x9e3779b97f4a7c15u) >> 51); /* 13 bits */
}
_Static_assert(IBIDI_SEEN == 1 << 13, "bucket() makes 13 bits");

ibidi_seen *ibidi_seen_open(void) {
    return ibid_calloc(1, sizeof(ibidi_seen));
}

void ibidi_seen_close(ibidi_seen *s) {
    ibid_free(s);
}

static void forget(ibidi_seen *s, uint32_t slot) {
    uint32_t *at = &s->head[bucket(s->id[slot])];
    while (*at != slot + 1) at = &s->chain[*at - 1];
    *at = s->chain[slot];
}

bool ibidi_seen_add(ibidi_seen *s, uint64_t id) {
    uint32_t *head = &s->head[bucket(id)];
    for (uint32_t at = *head; at; at = s->chain[at - 1])
        if (s->id[at - 1] == id) return true;
    uint32_t slot = s->next;
    if (s->full) forget(s, slot);
    s->id[slot] = id;
    s->chain[slot] = *head;
    *head = slot + 1;
    s->next = (slot + 1) % IBIDI_SEEN;
    if (!s->next) s->full = true;
    return false;
}

void ibid_request_begin(ibid_enc *body, size_t cap) {
    ibid_enc_init(body, cap);
    ibid_enc_map(body, NULL);
}

ibid_err ibid_request_finish(ibid_client *c, const char *method, ibid_enc *body,
                             uint64_t deadline_ms, ibid_reply *out) {
    ibid_enc_end(body);
    ibid_err e = ibid_enc_done(body);
    if (!e) e = ibid_client_call(c, method, body, deadline_ms, out);
    ibid_enc_fini(body);
    return e;
}
