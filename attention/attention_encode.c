/* Blocks for the indexer: found in the store, or encoded and sent there. */
#include "attention/attention_internal.h"
#include "rpc/base/clock.h"

#include <string.h>

enum { UNKNOWN = 0 }; /* block numbers start at 1 */

typedef struct job {
    ibidi_room *r;
    ibidi_loaded *m;
    uint64_t id;
    const ibid_encode_block *blocks;
    size_t n;
    const ibid_call *call;
    uint64_t *numbers; /* [n], UNKNOWN until known */
    size_t *same;      /* [n] the first block of this request with the same hash */
    ibid_hash *hashes; /* [n] */
    ibid_calibration cal;
    ibid_encode_result *out;
} job;

static ibid_err check_blocks(const ibidi_loaded *m, const ibid_encode_block *b, size_t n) {
    size_t vocab = m->model->n_vocab;
    for (size_t i = 0; i < n; i++) {
        if (b[i].n_tokens == 0 || b[i].n_tokens > IBID_BLOCK_TOKENS_MAX ||
            b[i].n_title > b[i].n_tokens)
            return ibid_fail(IBID_INVAL, "block %zu has %zu tokens, %zu of them title; 1 to %d fit",
                             i, b[i].n_tokens, b[i].n_title, IBID_BLOCK_TOKENS_MAX);
        for (size_t t = 0; t < b[i].n_tokens; t++)
            if (b[i].tokens[t] < 0 || (size_t)b[i].tokens[t] >= vocab)
                return ibid_fail(IBID_INVAL, "block %zu holds token %d; the model has %zu", i,
                                 (int)b[i].tokens[t], vocab);
    }
    if (m->reader.n_prefix + IBID_BLOCK_TOKENS_MAX > m->model->n_ctx)
        return ibid_fail(IBID_CONTEXT,
                         "a block of %d tokens does not fit the model's context of "
                         "%zu behind a prefix of %zu",
                         IBID_BLOCK_TOKENS_MAX, m->model->n_ctx, m->reader.n_prefix);
    return IBID_OK;
}

static ibid_err still_wanted(const job *j) {
    if (atomic_load(&j->r->closing) || (j->call && ibid_call_closing(j->call)))
        return ibid_fail(IBID_UNAVAIL, "the attention room is closing");
    if (j->call && j->call->deadline_ns && ibid_now_ns() > j->call->deadline_ns)
        return ibid_fail(IBID_TIMEOUT, "the deadline passed; what was encoded is stored");
    return IBID_OK;
}

/* ---- Looking up ---- */

/* Token keys from stored K, for a block whose keys are missing or another calibration's. keys:
 * ibid_free. */
static ibid_err derive_keys(ibidi_loaded *m, ibid_snap *s, const ibid_block *b,
                            const ibid_calibration *cal, int8_t **keys) {
    ibid_kv_view *views = ibid_calloc(m->model->n_layers, sizeof *views);
    int8_t *out = ibid_alloc(b->n_tokens * cal->dim);
    ibid_err e = views && out ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for token keys");
    for (size_t h = 0; !e && h < cal->map->n_inputs; h++) {
        size_t layer = cal->map->inputs[h].layer;
        if (layer >= m->model->n_layers)
            e = ibid_fail(IBID_MISMATCH, "the calibration is another model's");
        else if (!views[layer].k) /* inputs share layers */
            e = ibid_snap_kv(s, b->number, layer, &views[layer]);
    }
    if (!e) e = ibid_keys_from_stored(&m->reader, views, cal, out);
    ibid_free(views);
    if (e)
        ibid_free(out);
    else
        *keys = out;
    return e;
}

static bool keys_current(ibid_snap *s, uint64_t block, const ibid_calibration *cal) {
    ibid_keys k;
    if (!cal->map) return true;
    return !ibid_snap_keys(s, block, &k) && ibid_hash_cmp(&k.calibration, &cal->id) == 0;
}

static ibid_err look_up(job *j, size_t i, ibid_snap *s) {
    const ibid_encode_block *b = &j->blocks[i];
    ibid_block found;
    int8_t *keys = NULL;
    ibid_err e = ibid_snap_block_find(s, &j->hashes[i], b->n_title, b->tokens, b->n_tokens, &found);
    if (e == IBID_NOTFOUND || (!e && !found.has_kv)) return IBID_OK;
    if (e) return e;
    if (!keys_current(s, found.number, &j->cal)) {
        e = derive_keys(j->m, s, &found, &j->cal, &keys);
        if (e == IBID_NOTFOUND || e == IBID_CORRUPT) return IBID_OK; /* encode it again */
        if (!e)
            e = ibid_kvc_keys_put(j->r->kvstore, &j->cal.id, found.number, keys, b->n_tokens,
                                  j->cal.dim);
        ibid_free(keys);
        if (e) return e;
    }
    j->numbers[i] = found.number;
    return IBID_OK;
}

/* Finds what is stored, and holds it for the job. */
static ibid_err find_stored(job *j) {
    ibid_snap *s = NULL;
    size_t n_held = 0;
    uint64_t *held = ibid_calloc(j->n, sizeof *held);
    ibid_err e = held ? ibid_snap_begin(j->r->store, &s) : ibid_fail(IBID_NOMEM, "out of memory");
    for (size_t i = 0; !e && i < j->n; i++) {
        j->numbers[i] = UNKNOWN;
        if (j->same[i] != i) continue;
        e = look_up(j, i, s);
        if (e == IBID_BUSY && !(e = ibid_snap_renew(s))) e = look_up(j, i, s);
        if (j->numbers[i] != UNKNOWN) held[n_held++] = j->numbers[i];
    }
    ibid_snap_end(s);
    if (!e && n_held && j->id) e = ibid_kvc_blocks_hold(j->r->kvstore, j->id, held, n_held);
    ibid_free(held);
    return e;
}

/* ---- Encoding what is missing ---- */

static ibid_err send(job *j, const ibid_reading *t, const size_t *which, size_t n) {
    const ibid_calibration *cal = &j->cal;
    ibid_block_put *puts = ibid_calloc(n, sizeof *puts);
    uint64_t *numbers = ibid_calloc(n, sizeof *numbers);
    ibid_err e = puts && numbers ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory");
    for (size_t i = 0; !e && i < n; i++) {
        const ibid_encode_block *b = &j->blocks[which[i]];
        puts[i] = (ibid_block_put){.model = j->m->model->fingerprint,
                                   .prefix = j->m->prefix_id,
                                   .kv_type = j->m->reader.kv_type,
                                   .n_title = b->n_title,
                                   .n_tokens = b->n_tokens,
                                   .tokens = b->tokens,
                                   .n_layers = t[i].kv.n_layers,
                                   .value_size = t[i].kv.value_size,
                                   .values = t[i].kv.values,
                                   .calibration = cal->id,
                                   .keys = t[i].keys,
                                   .keys_dim = t[i].keys ? cal->dim : 0,
                                   .job = j->id};
    }
    if (!e) e = ibid_kvc_blocks_put(j->r->kvstore, puts, n, numbers);
    for (size_t i = 0; !e && i < n; i++) {
        j->numbers[which[i]] = numbers[i];
        j->out->encoded_tokens += j->blocks[which[i]].n_tokens;
        j->out->encoded_blocks++;
    }
    ibid_free(puts);
    ibid_free(numbers);
    return e;
}

static void readings_drop(ibid_reading *t, size_t n) {
    for (size_t i = 0; i < n; i++) {
        ibid_kv_blob_fini(&t[i].kv);
        ibid_free(t[i].keys);
        t[i].keys = NULL;
    }
}

static size_t blob_bytes(const ibid_kv_blob *b) {
    return b->n_layers * b->value_size;
}

/* Encodes in micro-batches and sends what has piled up before a message would grow too large. */
static ibid_err encode_missing(job *j, ibid_reading *t, const size_t *which, size_t n) {
    size_t done = 0, sent = 0;
    ibid_err e = IBID_OK;
    while (!e && done < n) {
        size_t before = done, bytes = 0;
        if ((e = still_wanted(j))) break;
        e = ibid_read_some(&j->m->reader, t, n, &done, true, &j->cal, &j->r->closing);
        for (size_t i = sent; !e && i < done; i++) bytes += blob_bytes(&t[i].kv);
        size_t step = !e && done > before ? bytes / (done - sent) * (done - before) : 0;
        if (e || (done < n && bytes + 2 * step < IBID_BLOCKS_PUT_MAX)) continue;
        while (!e && sent < done) { /* usually one message */
            size_t count = 0;
            bytes = 0;
            while (sent + count < done &&
                   (!count || bytes + blob_bytes(&t[sent + count].kv) <= IBID_BLOCKS_PUT_MAX))
                bytes += blob_bytes(&t[sent + count++].kv);
            e = send(j, t + sent, which + sent, count);
            readings_drop(t + sent, count);
            sent += count;
        }
    }
    readings_drop(t, n);
    return e;
}

static ibid_err encode_rest(job *j) {
    size_t n = 0;
    ibid_reading *t = ibid_calloc(j->n, sizeof *t);
    size_t *which = ibid_calloc(j->n, sizeof *which);
    ibid_err e = t && which ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory");
    for (size_t i = 0; !e && i < j->n; i++) {
        if (j->same[i] != i || j->numbers[i] != UNKNOWN) continue;
        t[n] = (ibid_reading){.tokens = j->blocks[i].tokens, .n = j->blocks[i].n_tokens};
        which[n++] = i;
    }
    if (!e && n) e = ibidi_gate_check(j->r, j->m);
    if (!e) e = encode_missing(j, t, which, n);
    ibid_free(t);
    ibid_free(which);
    return e;
}

static void find_same(job *j) {
    for (size_t i = 0; i < j->n; i++) {
        const ibid_encode_block *b = &j->blocks[i];
        j->hashes[i] = ibid_block_hash(&j->m->model->fingerprint, &j->m->prefix_id,
                                       j->m->reader.kv_type, b->n_title, b->tokens, b->n_tokens);
        j->same[i] = i;
        for (size_t k = 0; k < i; k++)
            if (ibid_hash_cmp(&j->hashes[k], &j->hashes[i]) == 0) {
                j->same[i] = k;
                break;
            }
    }
}

ibid_err ibidi_encode(ibidi_room *r, ibidi_loaded *m, uint64_t id, const ibid_encode_block *blocks,
                      size_t n, const ibid_call *call, uint64_t *numbers, ibid_encode_result *out) {
    uint64_t start = ibid_now_ns(), total = 0;
    job *j = ibid_calloc(1, sizeof *j);
    if (!j) return ibid_fail(IBID_NOMEM, "out of memory");
    *out = (ibid_encode_result){0};
    *j = (job){.r = r,
               .m = m,
               .id = id,
               .blocks = blocks,
               .n = n,
               .call = call,
               .numbers = numbers,
               .out = out};
    ibidi_model_calibration(m, &j->cal);
    j->same = ibid_calloc(n, sizeof *j->same);
    j->hashes = ibid_calloc(n, sizeof *j->hashes);
    ibid_err e =
        j->same && j->hashes ? check_blocks(m, blocks, n) : ibid_fail(IBID_NOMEM, "out of memory");
    if (!e) find_same(j);
    if (!e) e = find_stored(j);
    if (e == IBID_NOTFOUND) e = find_stored(j); /* a block went between the look and the hold */
    if (!e) e = encode_rest(j);
    for (size_t i = 0; !e && i < n; i++) {
        numbers[i] = numbers[j->same[i]];
        total += blocks[i].n_tokens;
    }
    out->reused_tokens = total > out->encoded_tokens ? total - out->encoded_tokens : 0;
    out->ms = ibid_ms_since(start);
    (void)pthread_mutex_lock(&m->lock);
    m->encoded_tokens += out->encoded_tokens;
    m->reused_tokens += e ? 0 : out->reused_tokens;
    (void)pthread_mutex_unlock(&m->lock);
    ibid_free(j->same);
    ibid_free(j->hashes);
    ibid_free(j);
    return e;
}

/* ---- New keys for old blocks ---- */

enum { REKEY_BATCH = 64 };

typedef struct rekey {
    ibidi_loaded *m;
    const ibid_calibration *cal;
    uint64_t *blocks; /* to do */
    size_t n, room;
    ibid_snap *snap;
} rekey;

static ibid_err note_stale(void *arg, const ibid_block *b) {
    rekey *k = arg;
    if (ibid_hash_cmp(&b->model, &k->m->model->fingerprint) != 0 ||
        ibid_hash_cmp(&b->prefix, &k->m->prefix_id) != 0 ||
        keys_current(k->snap, b->number, k->cal))
        return IBID_OK;
    if (k->n == k->room) {
        size_t room = k->room ? 2 * k->room : 256;
        uint64_t *p = ibid_realloc(k->blocks, room * sizeof *p);
        if (!p) return ibid_fail(IBID_NOMEM, "no memory for %zu blocks", room);
        k->blocks = p;
        k->room = room;
    }
    k->blocks[k->n++] = b->number;
    return IBID_OK;
}

/* One batch of blocks: keys from stored K, or by reading the tokens again as far as the last head.
 */
static ibid_err rekey_batch(ibidi_room *r, const rekey *k, const uint64_t *blocks, size_t n) {
    ibid_snap *s = NULL;
    ibid_block b;
    size_t dim = k->cal->dim, n_puts = 0;
    ibid_block_put puts[REKEY_BATCH];
    ibid_reading t[REKEY_BATCH];
    uint64_t numbers[REKEY_BATCH];
    memset(t, 0, sizeof t);
    ibid_err e = ibid_snap_begin(r->store, &s);
    for (size_t i = 0; !e && i < n; i++) {
        size_t done = 0;
        e = ibid_snap_block(s, blocks[i], &b);
        if (e == IBID_NOTFOUND) {
            e = IBID_OK;
            continue;
        }
        ibid_reading *x = &t[n_puts];
        if (!e && b.has_kv) e = derive_keys(k->m, s, &b, k->cal, &x->keys);
        if (!e && !b.has_kv) {
            *x = (ibid_reading){.tokens = b.tokens, .n = b.n_tokens};
            e = ibid_read_some(&k->m->reader, x, 1, &done, false, k->cal, &r->closing);
        }
        if (e) break;
        puts[n_puts++] = (ibid_block_put){.model = b.model,
                                          .prefix = b.prefix,
                                          .kv_type = b.kv_type,
                                          .n_title = b.n_title,
                                          .n_tokens = b.n_tokens,
                                          .tokens = b.tokens,
                                          .calibration = k->cal->id,
                                          .keys = x->keys,
                                          .keys_dim = dim};
    }
    if (!e && n_puts) e = ibid_kvc_blocks_put(r->kvstore, puts, n_puts, numbers);
    readings_drop(t, n);
    ibid_snap_end(s);
    return e;
}

ibid_err ibidi_rekey(ibidi_room *r, ibidi_loaded *m, uint64_t *n) {
    ibid_calibration *cal = ibid_calloc(1, sizeof *cal);
    rekey k = {.m = m, .cal = cal};
    *n = 0;
    if (!cal) return ibid_fail(IBID_NOMEM, "out of memory");
    ibidi_model_calibration(m, cal);
    ibid_err e = cal->map ? ibid_snap_begin(r->store, &k.snap) : IBID_OK;
    if (!e && cal->map) e = ibid_snap_each_block(k.snap, note_stale, &k);
    ibid_snap_end(k.snap);
    for (size_t i = 0; !e && i < k.n; i += REKEY_BATCH) {
        size_t count = k.n - i < REKEY_BATCH ? k.n - i : REKEY_BATCH;
        if (atomic_load(&r->closing))
            e = ibid_fail(IBID_UNAVAIL, "the attention room is closing");
        else
            e = rekey_batch(r, &k, k.blocks + i, count);
        if (!e) *n += count;
    }
    ibid_free(k.blocks);
    ibid_free(cal);
    return e;
}
