#include "kvstore/record.h"

enum { RECORD_MAX = 256 * 1024 * 1024 };

const uint8_t *ibidi_rd_bytes(ibidi_rd *r, size_t n) {
    if (r->bad || n > r->n - r->at) {
        r->bad = true;
        return NULL;
    }
    const uint8_t *p = r->p + r->at;
    r->at += n;
    return p;
}

uint32_t ibidi_rd_u32(ibidi_rd *r) {
    const uint8_t *p = ibidi_rd_bytes(r, 4);
    return p ? ibidi_load32(p) : 0;
}

uint64_t ibidi_rd_u64(ibidi_rd *r) {
    const uint8_t *p = ibidi_rd_bytes(r, 8);
    return p ? ibidi_load64(p) : 0;
}

ibid_hash ibidi_rd_hash(ibidi_rd *r) {
    ibid_hash h = {{0}};
    const uint8_t *p = ibidi_rd_bytes(r, sizeof h.b);
    if (p) memcpy(h.b, p, sizeof h.b);
    return h;
}

ibid_str ibidi_rd_str(ibidi_rd *r) {
    size_t n = ibidi_rd_u32(r);
    const uint8_t *p = ibidi_rd_bytes(r, n);
    return p ? (ibid_str){(const char *)p, n} : (ibid_str){"", 0};
}

void ibidi_rd_pad(ibidi_rd *r) {
    size_t to = ibid_align_up(r->at, 8);
    if (!r->bad) (void)ibidi_rd_bytes(r, to - r->at);
}

bool ibidi_rd_done(const ibidi_rd *r) {
    if (r->bad || r->n - r->at > 7) return false;
    for (size_t i = r->at; i < r->n; i++)
        if (r->p[i]) return false;
    return true;
}

void ibidi_wr_init(ibidi_wr *w) {
    ibid_buf_init(&w->b, RECORD_MAX);
    w->e = IBID_OK;
}

void ibidi_wr_fini(ibidi_wr *w) {
    ibid_buf_fini(&w->b);
}

void ibidi_wr_bytes(ibidi_wr *w, const void *p, size_t n) {
    if (!w->e) w->e = ibid_buf_append(&w->b, p, n);
}

void ibidi_wr_u32(ibidi_wr *w, uint32_t v) {
    uint8_t le[4];
    ibidi_store32(le, v);
    ibidi_wr_bytes(w, le, sizeof le);
}

void ibidi_wr_u64(ibidi_wr *w, uint64_t v) {
    uint8_t le[8];
    ibidi_store64(le, v);
    ibidi_wr_bytes(w, le, sizeof le);
}

void ibidi_wr_hash(ibidi_wr *w, const ibid_hash *h) {
    ibidi_wr_bytes(w, h->b, sizeof h->b);
}

void ibidi_wr_str(ibidi_wr *w, ibid_str s) {
    if (!w->e && s.n > UINT32_MAX) w->e = ibid_fail(IBID_TOOBIG, "a text is longer than 4 GiB");
    ibidi_wr_u32(w, (uint32_t)s.n);
    ibidi_wr_bytes(w, s.s, s.n);
}

void ibidi_wr_pad(ibidi_wr *w) {
    static const uint8_t zero[8];
    ibidi_wr_bytes(w, zero, ibid_align_up(w->b.len, 8) - w->b.len);
}
