/* Answers: one thread each, from the request to the last event of its stream. */
#include "attention/attention_internal.h"
#include "attention/plan/citation.h"
#include "attention/plan/extract_run.h"
#include "rpc/base/clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCKS_MAX = 256, MAX_TOKENS = 64, QUOTES = 3, QUOTE_BYTES = 300, TEXT_MAX = 1 << 30 };
#define LONG_WAIT_S 0.25 /* for the disk */

/* Why a block is encoded again for an answer. */
enum { EVICTED = 1, DAMAGED = 2, SLOW = 4 /* to read, more so than to encode */ };

typedef struct block { /* one of the plan, in position order */
    ibid_answer_block ask;
    ibid_kv_view *layers; /* [n_layers] in the store's map, or in kv */
    ibidi_stored stored;
    ibid_kv_type kv_type; /* as stored */
    int32_t *tokens;
    size_t n_tokens, n_title;
    unsigned why;    /* it is to be encoded again, or was */
    ibid_kv_blob kv; /* of a block encoded again */
    float *mass;     /* [n_tokens] */
} block;

typedef struct ibidi_answering {
    struct ibidi_answering *next;
    ibidi_room *r;
    ibid_stream *stream;
    uint64_t id, request, start_ns;
    atomic_bool cancel;
    /* The request. */
    ibid_hash model;
    char *question;
    size_t question_n;
    ibid_answer_block *asked; /* descending relevance */
    size_t n;
    double recompute, temperature, top_p;
    uint64_t seed, max_tokens, max_quotes, quote_bytes;
    bool extracts; /* or generates */
    ibid_select select; /* share 0: full attention */
    /* While it runs. */
    ibidi_loaded *m;
    ibid_reader reader;
    ibid_snap *snap;
    block *blocks;         /* [n] */
    ibidi_stored **stored; /* [n] those of blocks */
    ibidi_loading loading;
    uint64_t encoded_tokens, reused_tokens, prompt_tokens, kv_bytes, disk_bytes;
    ibid_extracted spans;
    const ibid_tried *said; /* of those, what was answered; NULL: nothing, or in other words */
} ibidi_answering;

typedef ibidi_answering answering;

/* ---- Blocks ---- */

/* The chunk must still be that document's and stand on that block. */
static ibid_err check_chunk(answering *a, const ibid_answer_block *q) {
    const ibid_chunk *chunks;
    size_t n;
    ibid_err e = ibid_snap_chunks(a->snap, q->document, &chunks, &n);
    if (e == IBID_NOTFOUND || (!e && (q->chunk >= n || chunks[q->chunk].block != q->block)))
        return ibid_fail(IBID_NOTFOUND, "document %llu changed or is gone: search again",
                         (unsigned long long)q->document);
    return e;
}

/* Where the block's KV lies; nothing of it is read. */
static ibid_err views_from_store(answering *a, block *b) {
    const ibid_model *m = a->m->model;
    ibid_kv_shape shape = {b->kv_type, b->n_tokens, m->n_kv_heads, m->head_dim};
    b->stored.layers = b->layers;
    ibid_err e = ibidi_stored_find(a->snap, b->ask.block, &shape, m->n_layers, &b->stored);
    if (e == IBID_NOTFOUND) b->why = EVICTED;
    if (e == IBID_CORRUPT) {
        ibid_log(IBID_LOG_ERROR, "encoded again: %s", ibid_err_detail());
        b->why = DAMAGED;
    }
    return e == IBID_NOTFOUND || e == IBID_CORRUPT ? IBID_OK : e;
}

/* Given back to the store, if it takes it. */
static void put_back(answering *a, const block *b) {
    uint64_t number;
    ibid_block_put put = {.model = a->model,
                          .prefix = a->m->prefix_id,
                          .kv_type = b->kv_type,
                          .n_title = b->n_title,
                          .n_tokens = b->n_tokens,
                          .tokens = b->tokens,
                          .n_layers = b->kv.n_layers,
                          .value_size = b->kv.value_size,
                          .values = b->kv.values};
    if (b->kv_type == a->reader.kv_type && ibid_kvc_blocks_put(a->r->kvstore, &put, 1, &number))
        ibid_log(IBID_LOG_WARN, "a block encoded again was not stored: %s", ibid_err_detail());
}

static bool to_encode(const block *b) {
    return b->why && !b->kv.memory;
}

/* Encodes for this answer what is marked, many blocks at a time. */
static ibid_err encode_again(answering *a) {
    size_t n = 0, done = 0;
    ibid_reading *t = ibid_calloc(a->n + 1, sizeof *t);
    block **of = ibid_calloc(a->n + 1, sizeof(block *));
    ibid_err e = t && of ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory to encode blocks again");
    for (size_t i = 0; !e && i < a->n; i++) {
        block *b = &a->blocks[i];
        if (!to_encode(b)) continue;
        t[n] = (ibid_reading){.tokens = b->tokens, .n = b->n_tokens};
        of[n++] = b;
    }
    while (!e && done < n) e = ibid_read_some(&a->reader, t, n, &done, true, NULL, &a->cancel);
    for (size_t i = 0; i < n; i++) {
        block *b = of[i];
        if (e) {
            ibid_kv_blob_fini(&t[i].kv);
            continue;
        }
        b->kv = t[i].kv;
        b->stored.here = false;
        memcpy(b->layers, b->kv.layers, a->m->model->n_layers * sizeof *b->layers);
        a->encoded_tokens += b->n_tokens;
        if (!(b->why & SLOW)) put_back(a, b);
    }
    ibid_free(t);
    ibid_free(of);
    return e;
}

static ibid_err open_block(answering *a, block *b) {
    ibid_block rec;
    ibid_err e = ibid_snap_block(a->snap, b->ask.block, &rec);
    if (e == IBID_NOTFOUND)
        return ibid_fail(IBID_NOTFOUND, "block %llu is gone: search again",
                         (unsigned long long)b->ask.block);
    if (e) return e;
    if (ibid_hash_cmp(&rec.model, &a->model) != 0 ||
        ibid_hash_cmp(&rec.prefix, &a->m->prefix_id) != 0)
        return ibid_fail(IBID_MISMATCH,
                         "block %llu was encoded by another model or behind another "
                         "prefix: index its document again",
                         (unsigned long long)b->ask.block);
    if ((e = check_chunk(a, &b->ask))) return e;
    b->n_tokens = rec.n_tokens;
    b->n_title = rec.n_title;
    b->kv_type = rec.kv_type;
    b->layers = ibid_calloc(a->m->model->n_layers, sizeof *b->layers);
    b->tokens = ibid_alloc(rec.n_tokens * sizeof *b->tokens);
    b->mass = ibid_calloc(rec.n_tokens, sizeof *b->mass);
    if (!b->layers || !b->tokens || !b->mass)
        return ibid_fail(IBID_NOMEM, "no memory for a block of %zu tokens", rec.n_tokens);
    memcpy(b->tokens, rec.tokens, rec.n_tokens * sizeof *b->tokens);
    if (rec.has_kv) return views_from_store(a, b);
    b->why = EVICTED;
    return IBID_OK;
}

/* Blocks whose KV would come from disk slower than they can be encoded. */
static ibid_err weigh_loading(answering *a) {
    size_t n_slow = 0;
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < a->n; i++) {
        block *b = &a->blocks[i];
        if (!b->stored.here || !ibidi_stored_loses(&a->m->meter, &b->stored, a->m->model->n_layers,
                                                   b->n_tokens, &a->disk_bytes))
            continue;
        b->why |= SLOW;
        n_slow++;
        /* The first one shows how fast encoding is. */
        if (!(atomic_load(&a->m->meter.tokens_per_s) > 0)) e = encode_again(a);
    }
    if (n_slow)
        ibid_log(IBID_LOG_INFO,
                 "%zu of %zu blocks are encoded again: their KV is not in memory, and the disk "
                 "gives %.1f MB/s, the encoder %.0f tokens/s",
                 n_slow, a->n, atomic_load(&a->m->meter.bytes_per_s) / 1e6,
                 atomic_load(&a->m->meter.tokens_per_s));
    return e;
}

/* Before a layer is computed. */
static ibid_err layer_ready(void *arg, size_t layer) {
    answering *a = arg;
    return ibidi_load_layer(&a->loading, layer);
}

/* Marks what loading found damaged; false: nothing new. */
static bool mark_damaged(answering *a) {
    bool found = false;
    for (size_t i = 0; i < a->n; i++) {
        block *b = &a->blocks[i];
        if (!b->stored.damaged || b->why) continue;
        b->why = DAMAGED;
        found = true;
    }
    return found;
}

/* The snapshot is of one age; when that passes, it is renewed and what lies in the map is looked up
 * again. Also where a client that went away is noticed. */
static ibid_err tick(void *arg) {
    answering *a = arg;
    ibid_block rec;
    if (ibid_stream_cancelled(a->stream)) atomic_store(&a->cancel, true);
    if (atomic_load(&a->cancel)) return ibid_fail(IBID_CANCELLED, "the answer was cancelled");
    if (a->n == 0) return IBID_OK;
    ibid_err e = ibid_snap_block(a->snap, a->blocks[0].ask.block, &rec);
    if (e != IBID_BUSY) return e == IBID_NOTFOUND ? IBID_OK : e;
    e = ibid_snap_renew(a->snap);
    for (size_t i = 0; !e && i < a->n; i++) {
        block *b = &a->blocks[i];
        if (b->kv.memory) continue;
        for (size_t l = 0; !e && l < a->m->model->n_layers; l++)
            e = ibid_snap_kv(a->snap, b->ask.block, l, &b->layers[l]);
        if (e == IBID_NOTFOUND && !(e = ibid_snap_block(a->snap, b->ask.block, &rec)))
            b->why = EVICTED;
    }
    return e ? e : encode_again(a);
}

/* ---- Events ---- */

static ibid_err push(answering *a, ibid_enc *e, bool last) {
    ibid_enc_end(e);
    ibid_err err = ibid_enc_done(e);
    if (!err) err = ibid_stream_push(a->stream, e, last);
    ibid_enc_fini(e);
    return err;
}

static void event(ibid_enc *e, const char *kind) {
    ibid_enc_init(e, IBID_BUS_MESSAGE_MAX / 2);
    ibid_enc_map(e, NULL);
    ibid_enc_cstr(e, "kind", kind);
}

static ibid_err push_text(void *arg, const char *s, size_t n) {
    ibid_enc e;
    event(&e, "token");
    ibid_enc_str(&e, "text", s, n);
    return push(arg, &e, false);
}

static ibid_err push_progress(answering *a) {
    ibid_enc e;
    event(&e, "progress");
    return push(a, &e, false);
}

/* ---- Citations ---- */

typedef struct cited { /* of one block */
    ibid_buf text;
    ibid_cite_block b;
    uint64_t *ends;
    bool shared_text; /* the text is an earlier block's */
} cited;

static ibid_err open_ends(const answering *a, const block *b, cited *c) {
    size_t n = b->n_tokens - b->n_title;
    ibid_str *pieces = ibid_calloc(n + 1, sizeof *pieces);
    c->ends = ibid_calloc(n + 1, sizeof *c->ends);
    if (!pieces || !c->ends) {
        ibid_free(pieces);
        return ibid_fail(IBID_NOMEM, "no memory for citations");
    }
    for (size_t t = 0; t < n; t++)
        pieces[t].s =
            ibid_token_bytes(a->m->model->tokenizer, b->tokens[b->n_title + t], &pieces[t].n);
    ibid_cite_token_ends(c->b.text, c->b.start, c->b.end, pieces, n, c->ends);
    c->b.token_ends = c->ends;
    c->b.mass = b->mass + b->n_title;
    c->b.n_tokens = n;
    ibid_free(pieces);
    return IBID_OK;
}

/* A document that changed meanwhile gives no citation. */
static ibid_err open_cited(answering *a, cited *c, size_t i) {
    const block *b = &a->blocks[a->n - 1 - i]; /* best first */
    const ibid_chunk *chunks;
    size_t n;
    ibid_err e = check_chunk(a, &b->ask);
    if (e) return e == IBID_NOTFOUND ? IBID_OK : e;
    if ((e = ibid_snap_chunks(a->snap, b->ask.document, &chunks, &n))) return e;
    uint64_t start = chunks[b->ask.chunk].start, end = chunks[b->ask.chunk].end;
    for (size_t k = 0; k < i && !c[i].shared_text; k++) {
        if (a->blocks[a->n - 1 - k].ask.document != b->ask.document || !c[k].b.text.n) continue;
        c[i].b.text = c[k].b.text;
        c[i].shared_text = true;
    }
    if (!c[i].shared_text) {
        e = ibid_snap_text(a->snap, b->ask.document, &c[i].text);
        if (e) return e == IBID_NOTFOUND ? IBID_OK : e;
        c[i].b.text = (ibid_str){c[i].text.data ? c[i].text.data : "", c[i].text.len};
    }
    if (start > end || end > c[i].b.text.n)
        return ibid_fail(IBID_CORRUPT, "a chunk of document %llu ends past its text",
                         (unsigned long long)b->ask.document);
    c[i].b.start = start;
    c[i].b.end = end;
    return open_ends(a, b, &c[i]);
}

/* Nothing leaves here that is not in the stored text, byte for byte, inside its chunk. */
static bool quote_holds(const ibid_cite *q, const ibid_cite_block *b) {
    return q->start < q->end && q->start >= b->start && q->end <= b->end && q->end <= b->text.n &&
           (b->text.s[q->start] & 0xC0) != 0x80 &&
           (q->end == b->text.n || (b->text.s[q->end] & 0xC0) != 0x80);
}

/* Where text that begins about `at` bytes into a chunk stands in the document. */
static const char *find_near(const ibid_cite_block *b, uint64_t at, const char *s, size_t n) {
    const char *best = NULL, *expected = b->text.s + b->start + at;
    for (uint64_t i = b->start; n && i + n <= b->end; i++) {
        const char *p = b->text.s + i;
        if (*p != *s || memcmp(p, s, n) != 0) continue;
        if (!best || llabs((long long)(p - expected)) < llabs((long long)(best - expected)))
            best = p;
    }
    return best;
}

/* The sentence the answer was taken from. False: it cannot be found in the document. */
static bool cite_said(const answering *a, const ibid_cite_block *blocks, ibid_cite *q) {
    const ibid_span *s = &a->said->span;
    const ibid_cite_block *b = &blocks[s->block];
    const char *text = a->spans.texts[s->block].s;
    size_t n = s->sentence_end - s->sentence_start;
    if (!b->text.n) return false;
    const char *p = find_near(b, s->sentence_start, text + s->sentence_start, n);
    const char *at = p ? p + (s->start - s->sentence_start)
                       : find_near(b, s->start, text + s->start, s->end - s->start);
    if (!at) return false;
    uint64_t start = (uint64_t)(at - b->text.s), end = start + (s->end - s->start);
    uint64_t from = p ? (uint64_t)(p - b->text.s) : start;
    ibid_cite_around(b->text, start, end, from, p ? from + n : end, a->quote_bytes, q);
    q->block = s->block;
    q->weight = a->said->share;
    return true;
}

static ibid_err put_citations(answering *a, ibid_str answer, ibid_enc *e) {
    ibid_str question = {a->question, a->question_n};
    cited *c = ibid_calloc(a->n + 1, sizeof *c);
    ibid_cite_block *b = ibid_calloc(a->n + 1, sizeof *b);
    ibid_cite *q = ibid_calloc(a->max_quotes + 1, sizeof *q);
    size_t n = 0;
    ibid_err err = c && b && q ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for citations");
    for (size_t i = 0; c && i < a->n; i++) ibid_buf_init(&c[i].text, TEXT_MAX);
    for (size_t i = 0; !err && i < a->n; i++) {
        err = open_cited(a, c, i);
        b[i] = c[i].b;
    }
    if (!err && a->said && cite_said(a, b, q))
        n = 1;
    else if (!err)
        err = ibid_cite_find(answer, question, b, a->n, a->max_quotes, a->quote_bytes, q, &n);
    ibid_enc_array(e, "citations");
    for (size_t i = 0; !err && i < n; i++) {
        const ibid_answer_block *at = &a->blocks[a->n - 1 - q[i].block].ask;
        if (!quote_holds(&q[i], &b[q[i].block])) continue;
        ibid_enc_map(e, NULL);
        ibid_enc_u64(e, "document", at->document);
        ibid_enc_u64(e, "chunk", at->chunk);
        ibid_enc_u64(e, "start", q[i].start);
        ibid_enc_u64(e, "end", q[i].end);
        ibid_enc_str(e, "quote", b[q[i].block].text.s + q[i].start,
                     (size_t)(q[i].end - q[i].start));
        ibid_enc_f64(e, "weight", q[i].weight);
        ibid_enc_end(e);
    }
    ibid_enc_end(e);
    for (size_t i = 0; c && i < a->n; i++) {
        ibid_buf_fini(&c[i].text);
        ibid_free(c[i].ends);
    }
    ibid_free(c);
    ibid_free(b);
    ibid_free(q);
    return err;
}

static void put_reasons(const answering *a, ibid_enc *e) {
    static const char *const names[] = {"evicted", "damaged", "slow_disk"};
    unsigned why = 0;
    ibid_enc_array(e, "encoded_why");
    for (size_t i = 0; i < a->n; i++) why |= a->blocks[i].why;
    for (size_t i = 0; i < 3; i++)
        if (why >> i & 1) ibid_enc_cstr(e, NULL, names[i]);
    ibid_enc_end(e);
}

static ibid_err push_done(answering *a, const ibid_answered *out, double share) {
    ibid_enc e;
    ibid_str text = {out->text.data ? out->text.data : "", out->text.len};
    event(&e, "done");
    ibid_enc_str(&e, "text", text.s, text.n);
    ibid_err err = tick(a); /* a fresh snapshot */
    if (!err) err = put_citations(a, text, &e);
    if (err) {
        ibid_enc_fini(&e);
        return err;
    }
    ibid_enc_cstr(&e, "finish", out->finish);
    ibid_enc_u64(&e, "prompt_tokens", a->prompt_tokens);
    ibid_enc_u64(&e, "reused_tokens", a->reused_tokens - out->recomputed_tokens);
    ibid_enc_u64(&e, "recomputed_tokens", out->recomputed_tokens);
    ibid_enc_u64(&e, "encoded_tokens", a->encoded_tokens);
    put_reasons(a, &e);
    ibid_enc_u64(&e, "completion_tokens", out->completion_tokens);
    ibid_enc_u64(&e, "kv_bytes_read", a->kv_bytes);
    ibid_enc_u64(&e, "kv_bytes_from_disk", a->disk_bytes);
    ibid_enc_f64(&e, "kv_wait_ms", (double)a->loading.waited_ns / 1e6);
    ibid_enc_f64(&e, "recompute", share);
    ibid_enc_cstr(&e, "mode", a->extracts ? "extract" : "generate");
    ibid_enc_f64(&e, "evidence", a->said ? a->said->share : 0);
    const ibid_select *s = &a->select;
    ibid_enc_f64(&e, "attention_share", s->seen ? (double)s->read / (double)s->seen : 1);
    if (s->n_recall) ibid_enc_f64(&e, "attention_recall", s->recall / (double)s->n_recall);
    ibid_enc_f64(&e, "first_token_ms", (double)(out->first_token_ns - a->start_ns) / 1e6);
    ibid_enc_f64(&e, "total_ms", ibid_ms_since(a->start_ns));
    return push(a, &e, true);
}

/* ---- The plan ---- */

/* Query heads that share the calibrated kv heads; a bitmap over layer * n_heads + head. */
static ibid_err cite_heads(const ibidi_loaded *m, const ibid_calibration *cal, uint64_t **out) {
    size_t heads = m->model->n_heads, group = heads / m->model->n_kv_heads;
    uint64_t *bits = ibid_calloc((m->model->n_layers * heads + 63) / 64, sizeof *bits);
    if (!bits) return ibid_fail(IBID_NOMEM, "out of memory");
    for (size_t i = 0; i < cal->n_heads; i++) {
        if (cal->heads[i].layer >= m->model->n_layers) continue;
        for (size_t g = 0; g < group; g++) {
            size_t bit = cal->heads[i].layer * heads + cal->heads[i].kv_head * group + g;
            bits[bit / 64] |= UINT64_C(1) << bit % 64;
        }
    }
    *out = bits;
    return IBID_OK;
}

/* A request that cannot fit is refused before anything is read or encoded. */
static ibid_err check_context(answering *a, size_t n_question) {
    ibid_block rec;
    a->prompt_tokens = a->reader.n_prefix + n_question;
    for (size_t i = 0; i < a->n; i++)
        if (!ibid_snap_block(a->snap, a->asked[i].block, &rec)) a->prompt_tokens += rec.n_tokens;
    if (a->prompt_tokens + a->max_tokens <= a->m->model->n_ctx) return IBID_OK;
    return ibid_fail(IBID_CONTEXT,
                     "the request needs %llu tokens (%llu of them for the answer), the model's "
                     "context has %zu; use fewer blocks, or ask for a shorter answer",
                     (unsigned long long)(a->prompt_tokens + a->max_tokens),
                     (unsigned long long)a->max_tokens, a->m->model->n_ctx);
}

static ibid_err open_blocks(answering *a, ibid_placed_block *placed, float **mass) {
    uint64_t offset = 0;
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < a->n; i++) {
        block *b = &a->blocks[i];
        b->ask = a->asked[a->n - 1 - i]; /* best last, next to the question */
        a->stored[i] = &b->stored;
        if ((e = open_block(a, b))) break;
        placed[i] = (ibid_placed_block){b->layers, b->tokens, a->reader.n_prefix, offset, b->ask.block};
        mass[i] = b->mass;
        offset += b->n_tokens;
    }
    if (!e) e = weigh_loading(a);
    return e ? e : encode_again(a);
}

/* A disk that is slow, though not slower than encoding, is waited for here: in the engine's turn,
 * other answers would wait with this one. */
static ibid_err load_first(answering *a) {
    double speed = atomic_load(&a->m->meter.bytes_per_s);
    ibid_err e = IBID_OK;
    if (!(speed > 0) || (double)a->loading.missing <= LONG_WAIT_S * speed) return IBID_OK;
    for (size_t l = 0; !e && l < a->m->model->n_layers; l++) {
        e = ibidi_load_layer(&a->loading, l);
        if (!e && atomic_load(&a->cancel)) e = ibid_fail(IBID_CANCELLED, "cancelled");
    }
    return e;
}

/* The best span as the whole answer. */
static ibid_err extract(answering *a, const ibid_answer_plan *plan, ibid_answered *out) {
    size_t *n_title = ibid_calloc(a->n + 1, sizeof *n_title);
    if (!n_title) return ibid_fail(IBID_NOMEM, "no memory for an answer");
    for (size_t i = 0; i < a->n; i++) n_title[i] = a->blocks[i].n_title;
    ibid_extract_plan x = {.blocks = plan->blocks,
                           .n_title = n_title,
                           .n_blocks = a->n,
                           .question = {a->question, a->question_n},
                           .prompt = plan->question,
                           .n_prompt = plan->n_question,
                           .share = plan->share,
                           .tick = plan->tick,
                           .ready = plan->ready,
                           .arg = plan->arg,
                           .cancel = plan->cancel};
    memset(out, 0, sizeof *out);
    ibid_buf_init(&out->text, IBID_ANSWER_TEXT_MAX);
    out->finish = "stop";
    ibid_err e = ibid_extract_run(&a->reader, &x, &a->spans);
    ibid_free(n_title);
    if (e) return e;
    out->recomputed_tokens = a->spans.recomputed_tokens;
    out->first_token_ns = a->spans.first_ns;
    for (size_t i = 0; i < a->spans.n && !a->said; i++)
        if (a->spans.tried[i].n_tokens <= a->max_tokens) a->said = &a->spans.tried[i];
    if (!a->said) return IBID_OK;
    out->completion_tokens = a->said->n_tokens;
    const ibid_span *s = &a->said->span;
    const char *text = a->spans.texts[s->block].s + s->start;
    e = ibid_buf_append(&out->text, text, s->end - s->start);
    return e ? e : push_text(a, text, s->end - s->start);
}

/* Values are checked as they are needed: where one turns out to be damaged, its block is encoded
 * again and the question put once more. Nothing was said by then. */
static ibid_err run_answer(answering *a, const ibid_answer_plan *plan, ibid_answered *out) {
    for (;;) {
        a->loading = (ibidi_loading){.store = a->r->store,
                                     .meter = &a->m->meter,
                                     .blocks = a->stored,
                                     .n = a->n,
                                     .n_layers = a->m->model->n_layers};
        ibidi_load_begin(&a->loading);
        a->disk_bytes += a->loading.missing;
        ibid_err e = load_first(a);
        if (!e) e = (a->extracts ? extract(a, plan, out) : ibid_answer_run(&a->reader, plan, out));
        if (e != IBID_CORRUPT || !mark_damaged(a)) return e;
        ibid_log(IBID_LOG_ERROR, "encoded again: %s", ibid_err_detail());
        ibid_buf_fini(&out->text);
        memset(out, 0, sizeof *out);
        if ((e = encode_again(a))) return e;
    }
}

/* What the disk was too slow for comes meanwhile, for the next question. */
static void fetch_slow(const answering *a) {
    for (size_t i = 0; i < a->n; i++)
        if (a->blocks[i].why & SLOW)
            ibid_kv_places_willneed(a->blocks[i].stored.places, a->m->model->n_layers);
}

static void count_reused(answering *a) {
    for (size_t i = 0; i < a->n; i++) {
        const block *b = &a->blocks[i];
        if (!b->kv.memory) a->reused_tokens += b->n_tokens;
        for (size_t l = 0; l < a->m->model->n_layers; l++)
            a->kv_bytes += ibid_kv_view_bytes(&b->layers[l]);
    }
}

static ibid_err run_plan(answering *a) {
    ibid_ids question = {NULL, 0};
    ibid_answered out = {0};
    ibid_calibration *cal = ibid_calloc(1, sizeof *cal);
    ibid_placed_block *placed = ibid_calloc(a->n + 1, sizeof *placed);
    float **mass = ibid_calloc(a->n + 1, sizeof *mass);
    uint64_t *heads = NULL;
    a->blocks = ibid_calloc(a->n + 1, sizeof *a->blocks);
    a->stored = ibid_calloc(a->n + 1, sizeof(ibidi_stored *));
    /* Spans of two or three blocks are found as well with nothing recomputed (docs/quality.md). */
    double by_default = a->extracts ? 0 : ibid_recompute_auto(a->n);
    double share = a->recompute < 0 ? by_default : a->recompute;
    ibid_err e = cal && placed && mass && a->blocks && a->stored
                     ? ibid_snap_begin(a->r->store, &a->snap)
                     : ibid_fail(IBID_NOMEM, "no memory for an answer");
    ibid_str asked = {a->question, a->question_n};
    if (!e && a->extracts) e = ibid_prompt_extract(a->m->model, asked, &question);
    if (!e && !a->extracts)
        e = ibid_prompt_question(a->m->model, &ibid_wording_default, asked, &question);
    if (!e) e = check_context(a, question.n);
    if (!e) e = push_progress(a);
    if (!e) e = open_blocks(a, placed, mass);
    if (!e) {
        ibidi_model_calibration(a->m, cal);
        e = cite_heads(a->m, cal, &heads);
    }
    ibid_answer_plan plan = {.blocks = placed,
                             .n_blocks = a->n,
                             .question = question.ids,
                             .n_question = question.n,
                             .share = share,
                             .max_tokens = a->max_tokens,
                             .temperature = a->temperature,
                             .top_p = a->top_p,
                             .seed = a->seed,
                             .select = a->select.share > 0 ? &a->select : NULL,
                             .heads = heads,
                             .mass = cal && cal->n_heads ? mass : NULL,
                             .tick = tick,
                             .ready = layer_ready,
                             .text = push_text,
                             .arg = a,
                             .cancel = &a->cancel};
    if (!e) e = run_answer(a, &plan, &out);
    if (!e) count_reused(a);
    if (!e) e = push_done(a, &out, share);
    if (!e) fetch_slow(a);
    (void)pthread_mutex_lock(&a->m->lock);
    a->m->answers++;
    a->m->completion_tokens += out.completion_tokens;
    (void)pthread_mutex_unlock(&a->m->lock);
    ibid_buf_fini(&out.text);
    ibid_free(question.ids);
    ibid_free(cal);
    ibid_free(placed);
    ibid_free(mass);
    ibid_free(heads);
    return e;
}

static void touch(answering *a) {
    uint64_t blocks[BLOCKS_MAX];
    for (size_t i = 0; i < a->n; i++) blocks[i] = a->asked[i].block;
    if (a->n) (void)ibid_kvc_touch(a->r->kvstore, blocks, a->n);
}

/* ---- Threads ---- */

static void answering_free(answering *a) {
    for (size_t i = 0; a->blocks && i < a->n; i++) {
        ibid_free(a->blocks[i].layers);
        ibid_free(a->blocks[i].tokens);
        ibid_free(a->blocks[i].mass);
        ibid_kv_blob_fini(&a->blocks[i].kv);
        ibidi_stored_drop(&a->blocks[i].stored);
    }
    ibid_extracted_fini(&a->spans);
    ibid_snap_end(a->snap);
    ibid_free(a->blocks);
    ibid_free(a->stored);
    ibid_free(a->asked);
    ibid_free(a->question);
    ibid_free(a);
}

static void list_remove(answering *a) {
    ibidi_room *r = a->r;
    (void)pthread_mutex_lock(&r->lock);
    answering **at = &r->answering;
    while (*at && *at != a) at = &(*at)->next;
    if (*at) *at = a->next;
    (void)pthread_mutex_unlock(&r->lock);
}

static void *answer_thread(void *arg) {
    answering *a = arg;
    ibidi_room *r = a->r;
    ibid_log_request(a->request);
    ibid_err e = ibidi_model_get(r, &a->model, &a->m);
    if (!e) {
        a->reader = a->m->reader;
        a->reader.urgent = true;
        ibid_sched_question_begin(&a->m->sched);
        e = run_plan(a);
        ibid_sched_question_end(&a->m->sched);
    }
    if (e) {
        if (e != IBID_CANCELLED) ibid_log(IBID_LOG_WARN, "answer failed: %s", ibid_err_detail());
        ibid_stream_fail(a->stream, e, ibid_err_detail());
    } else {
        touch(a);
    }
    ibid_stream_release(a->stream);
    list_remove(a);
    answering_free(a);
    (void)pthread_mutex_lock(&r->lock);
    if (--r->n_answering == 0) (void)pthread_cond_broadcast(&r->idle);
    (void)pthread_mutex_unlock(&r->lock);
    return NULL;
}

static ibid_err read_blocks(const ibid_val *list, answering *a) {
    a->n = ibid_val_count(list);
    if (a->n > BLOCKS_MAX)
        return ibid_fail(IBID_TOOBIG, "%zu blocks for one answer; at most %d", a->n, BLOCKS_MAX);
    a->asked = ibid_calloc(a->n + 1, sizeof *a->asked);
    if (!a->asked) return ibid_fail(IBID_NOMEM, "out of memory");
    for (size_t i = 0; i < a->n; i++) {
        const ibid_val *b = ibid_val_at(list, i);
        a->asked[i] = (ibid_answer_block){.document = ibid_get_u64(b, "document", 0),
                                          .chunk = ibid_get_u64(b, "chunk", 0),
                                          .block = ibid_get_u64(b, "block", 0),
                                          .score = ibid_get_f64(b, "score", 0)};
    }
    return IBID_OK;
}

static ibid_err read_request(const ibid_val *body, answering *a) {
    ibid_str q = ibidi_get_str(body, "question");
    if (!ibidi_get_hash(body, "model", &a->model))
        return ibid_fail(IBID_PROTO, "field model is not 32 bytes");
    if (q.n == 0) return ibid_fail(IBID_INVAL, "an empty question");
    if (!(a->question = ibid_strndup(q.s, q.n))) return ibid_fail(IBID_NOMEM, "out of memory");
    a->question_n = q.n;
    a->recompute = ibid_get_f64(body, "recompute", -1);
    a->temperature = ibid_get_f64(body, "temperature", 0);
    a->top_p = ibid_get_f64(body, "top_p", 0);
    a->seed = ibid_get_u64(body, "seed", 0);
    a->max_tokens = ibid_get_u64(body, "max_tokens", 0);
    uint64_t mode = ibid_get_u64(body, "mode", IBID_ANSWER_GENERATE);
    if (mode > IBID_ANSWER_AUTO)
        return ibid_fail(IBID_INVAL, "mode %llu is none", (unsigned long long)mode);
    a->extracts =
        mode == IBID_ANSWER_EXTRACT || (mode == IBID_ANSWER_AUTO && ibid_question_wants_fact(q));
    a->select.share = ibid_get_f64(body, "attention_share", 0);
    a->select.measure = ibid_get_bool(body, "attention_recall", false);
    if (!(a->select.share >= 0 && a->select.share <= 1))
        return ibid_fail(IBID_INVAL, "attention_share is a share from 0 (full attention) to 1");
    a->max_quotes = ibid_get_u64(body, "max_quotes", 0);
    a->quote_bytes = ibid_get_u64(body, "quote_bytes", 0);
    if (a->max_tokens == 0) a->max_tokens = MAX_TOKENS;
    if (a->max_quotes == 0) a->max_quotes = QUOTES;
    if (a->quote_bytes == 0) a->quote_bytes = QUOTE_BYTES;
    if (isnan(a->recompute) || a->recompute > 1)
        return ibid_fail(IBID_INVAL, "recompute is a share from 0 to 1, or negative for auto");
    return read_blocks(ibid_val_get(body, "blocks"), a);
}

ibid_err ibidi_answer_begin(ibidi_room *r, const ibid_call *call) {
    pthread_t thread;
    answering *a = ibid_calloc(1, sizeof *a);
    if (!a) return ibid_fail(IBID_NOMEM, "no memory for an answer");
    a->r = r;
    a->request = call->id;
    a->start_ns = ibid_now_ns();
    ibid_err e = read_request(call->body, a);
    if (!e) e = ibid_stream_begin(r->streams, &a->id, &a->stream);
    if (e) {
        answering_free(a);
        return e;
    }
    uint64_t id = a->id;
    (void)pthread_mutex_lock(&r->lock);
    a->next = r->answering;
    r->answering = a;
    r->n_answering++;
    (void)pthread_mutex_unlock(&r->lock);
    if (pthread_create(&thread, NULL, answer_thread, a) != 0) {
        list_remove(a);
        ibid_stream_release(a->stream);
        answering_free(a);
        (void)pthread_mutex_lock(&r->lock);
        r->n_answering--;
        (void)pthread_mutex_unlock(&r->lock);
        return ibid_fail(IBID_NOMEM, "no thread for an answer");
    }
    (void)pthread_detach(thread);
    ibid_enc_u64(call->reply, "stream", id);
    return IBID_OK;
}

void ibidi_answer_cancel(ibidi_room *r, uint64_t stream) {
    (void)pthread_mutex_lock(&r->lock);
    for (answering *a = r->answering; a; a = a->next)
        if (a->id == stream) atomic_store(&a->cancel, true);
    (void)pthread_mutex_unlock(&r->lock);
}

void ibidi_answers_stop(ibidi_room *r) {
    (void)pthread_mutex_lock(&r->lock);
    for (answering *a = r->answering; a; a = a->next) atomic_store(&a->cancel, true);
    while (r->n_answering) (void)pthread_cond_wait(&r->idle, &r->lock);
    (void)pthread_mutex_unlock(&r->lock);
}
