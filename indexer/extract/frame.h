/* What ibid-extract writes to its standard output: frames.
 *
 *   0  u8 kind   1  u8 state (END)   2  u16 0   4  u32 n: bytes that follow, little-endian
 *   BEGIN    u32 id bytes, u32 title bytes, then id, title, metadata
 *   LOCATOR  name    TEXT  normalised text    END  reason
 *   NOTE     u64 line, u32 id bytes, then id, reason
 *   DONE     nothing: the file was read to its end; a stream without it is a failure
 *
 * The reader takes nothing on trust: order, kinds and lengths are checked. Pure functions. */
#ifndef IBID_EXTRACT_FRAME_H
#define IBID_EXTRACT_FRAME_H

#include "indexer/extract/extract.h"

enum { IBIDI_FRAME_HEADER = 8, IBIDI_FRAME_MAX = 128 * 1024 };

typedef enum ibid_frame_kind {
    IBID_FRAME_BEGIN = 1,
    IBID_FRAME_LOCATOR,
    IBID_FRAME_TEXT,
    IBID_FRAME_END,
    IBID_FRAME_NOTE,
    IBID_FRAME_DONE
} ibid_frame_kind;

typedef struct ibid_frame {
    ibid_frame_kind kind;
    ibid_str id, title, metadata; /* BEGIN, NOTE (id) */
    ibid_str text;                /* LOCATOR, TEXT, END (reason), NOTE (reason) */
    ibid_doc_state state;         /* END */
    uint64_t line;                /* NOTE */
} ibid_frame;

/* Writes one frame. TOOBIG past IBIDI_FRAME_MAX. */
ibid_err ibidi_xt_frame_put(ibid_buf *out, const ibid_frame *f);
/* Reads the header: kind, state and the payload's length. PROTO. */
ibid_err ibidi_xt_frame_header(const unsigned char header[IBIDI_FRAME_HEADER], ibid_frame *f,
                               size_t *payload);
/* Fills the rest from the payload, which it borrows; payload texts must be UTF-8. PROTO. */
ibid_err ibidi_xt_frame_payload(const char *p, size_t n, ibid_frame *f);
#endif
