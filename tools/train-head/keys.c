/* Keys of texts, for training a head outside the program: reads records, encodes chunks and
 * questions exactly as the indexer and a question do, and writes keys before RoPE.
 *
 *   train_head_keys MODEL.gguf RECORDS OUT --layers A-B [--threads N] [--cache DIR]
 *
 * RECORDS, little-endian: u8 kind ('c' chunk, 'q' question), u32 title bytes, title, u32 text
 * bytes, text. A chunk's text is cut as a document is, so one record may give several blocks; a
 * question has no title. Writes
 *   OUT.keys  f16 [token][layer - A][kv head][head_dim]
 *   OUT.ids   i32 [token]
 *   OUT.ends  u32 [token] end in its own text in bytes; 0 in a title line
 *   OUT.blocks u32 [block][4]: record, first token, tokens, tokens of the title line */
#include "attention/kernels/kernels.h"
#include "attention/plan/encode.h"
#include "attention/plan/prompt.h"
#include "indexer/chunk.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 48 }; /* blocks of a forward pass, at most */

typedef struct block {
    uint32_t record;
    size_t n, n_title;
    int32_t *ids;
    uint32_t *ends;
} block;

typedef struct dump {
    ibid_model *m;
    ibid_engine *e;
    ibid_sched sched;
    ibid_kv_blob prefix_kv;
    ibid_reader r;
    const ibid_kernels *kernels;
    size_t first, last; /* layers */
    FILE *keys, *ids, *ends, *blocks;
    block pending[PIECE];
    size_t n_pending, rows, tokens;
} dump;

static void check(ibid_err e) {
    if (!e) return;
    (void)fprintf(stderr, "train_head_keys: %s: %s\n", ibid_err_text(e), ibid_err_detail());
    exit(2);
}

static void *need(size_t n, size_t size) {
    void *p = ibid_calloc(n ? n : 1, size);
    if (!p) check(ibid_fail(IBID_NOMEM, "%zu times %zu bytes", n, size));
    return p;
}

static FILE *open_out(const char *base, const char *ending) {
    char path[4096];
    (void)snprintf(path, sizeof path, "%s.%s", base, ending);
    FILE *f = fopen(path, "wb");
    if (!f) check(ibid_fail(IBID_IO, "cannot write %s", path));
    return f;
}

static void put(FILE *f, const void *p, size_t n) {
    if (n && fwrite(p, n, 1, f) != 1) check(ibid_fail(IBID_IO, "cannot write"));
}

static void write_block(dump *d, const block *b, const ibid_seq *s) {
    size_t dim = d->m->head_dim, heads = d->m->n_kv_heads, layers = d->last - d->first + 1;
    size_t row = layers * heads * dim;
    float *one = need(b->n * dim, sizeof *one);
    uint16_t *half = need(b->n * dim, sizeof *half), *all = need(b->n * row, sizeof *all);
    for (size_t l = 0; l < layers; l++) {
        for (size_t h = 0; h < heads; h++) {
            check(ibid_seq_raw_keys(s, d->first + l, h, 0, b->n, one));
            d->kernels->kv_pack(IBID_KV_F16, one, b->n * dim, half, NULL);
            for (size_t t = 0; t < b->n; t++)
                memcpy(all + t * row + (l * heads + h) * dim, half + t * dim, dim * sizeof *half);
        }
    }
    const uint32_t at[] = {b->record, (uint32_t)d->tokens, (uint32_t)b->n, (uint32_t)b->n_title};
    put(d->keys, all, b->n * row * sizeof *all);
    put(d->ids, b->ids, b->n * sizeof *b->ids);
    put(d->ends, b->ends, b->n * sizeof *b->ends);
    put(d->blocks, at, sizeof at);
    d->tokens += b->n;
    ibid_free(one);
    ibid_free(half);
    ibid_free(all);
}

static void flush(dump *d) {
    ibid_reading t[PIECE];
    ibid_seq *seqs[PIECE];
    memset(t, 0, sizeof t);
    if (d->n_pending == 0) return;
    for (size_t i = 0; i < d->n_pending; i++)
        t[i] = (ibid_reading){.tokens = d->pending[i].ids, .n = d->pending[i].n};
    check(ibidi_read_batch(&d->r, t, d->n_pending, d->last + 1, NULL, seqs));
    for (size_t i = 0; i < d->n_pending; i++) {
        write_block(d, &d->pending[i], seqs[i]);
        ibid_seq_close(seqs[i]);
        ibid_free(d->pending[i].ids);
        ibid_free(d->pending[i].ends);
    }
    d->n_pending = d->rows = 0;
}

static block *next_block(dump *d, uint32_t record, size_t n) {
    if (d->n_pending == PIECE || d->rows + n > IBID_ENCODE_STEP) flush(d);
    block *b = &d->pending[d->n_pending++];
    *b = (block){record, n, 0, need(n, sizeof *b->ids), need(n, sizeof *b->ends)};
    d->rows += n;
    return b;
}

static void question(dump *d, uint32_t record, ibid_str text) {
    ibid_ids ids = {NULL, 0};
    check(ibid_prompt_keys(d->m, text, &ids));
    if (ids.n) memcpy(next_block(d, record, ids.n)->ids, ids.ids, ids.n * sizeof *ids.ids);
    ibid_free(ids.ids);
}

static size_t title_line(const dump *d, ibid_str title, int32_t *out) {
    ibid_token *t = NULL;
    size_t n = 0;
    char line[4096];
    check(ibid_tokenize(d->m->tokenizer, title.s, title.n, false, &t, &n));
    uint64_t *ends = need(n, sizeof *ends);
    for (size_t i = 0; i < n; i++) ends[i] = t[i].end;
    size_t keep = title.n ? ibid_chunk_title(title, ends, n) : 0;
    ibid_free(t);
    ibid_free(ends);
    if (keep == 0 || keep + 1 > sizeof line) return 0;
    memcpy(line, title.s, keep);
    line[keep] = '\n';
    check(ibid_tokenize(d->m->tokenizer, line, keep + 1, false, &t, &n));
    if (n > IBID_TITLE_TOKENS + 1) n = 0;
    for (size_t i = 0; i < n; i++) out[i] = t[i].id;
    ibid_free(t);
    return n;
}

static void chunks(dump *d, uint32_t record, ibid_str title, ibid_str text) {
    int32_t head[IBID_TITLE_TOKENS + 1];
    ibid_token *t = NULL;
    ibid_cut *cuts = NULL;
    size_t n = 0, n_cuts = 0, n_title = title_line(d, title, head);
    check(ibid_tokenize(d->m->tokenizer, text.s, text.n, false, &t, &n));
    uint64_t *ends = need(n, sizeof *ends);
    for (size_t i = 0; i < n; i++) ends[i] = t[i].end;
    check(ibid_chunk_cut(text, ends, n, NULL, 0, IBID_BLOCK_TOKENS_MAX - n_title, &cuts, &n_cuts));
    for (size_t c = 0; c < n_cuts; c++) {
        block *b = next_block(d, record, n_title + cuts[c].n_tokens);
        b->n_title = n_title;
        memcpy(b->ids, head, n_title * sizeof *head);
        for (size_t i = 0; i < cuts[c].n_tokens; i++) {
            b->ids[n_title + i] = t[cuts[c].token0 + i].id;
            b->ends[n_title + i] = (uint32_t)t[cuts[c].token0 + i].end;
        }
    }
    ibid_free(t);
    ibid_free(ends);
    ibid_free(cuts);
}

static char *read_text(FILE *f, size_t *n) {
    uint32_t size;
    if (fread(&size, sizeof size, 1, f) != 1) check(ibid_fail(IBID_CORRUPT, "records end early"));
    char *p = need((size_t)size + 1, 1);
    if (size && fread(p, size, 1, f) != 1) check(ibid_fail(IBID_CORRUPT, "records end early"));
    *n = size;
    return p;
}

static void run(dump *d, FILE *in) {
    uint32_t record = 0;
    for (int kind; (kind = fgetc(in)) != EOF; record++) {
        ibid_str title, text;
        char *a = read_text(in, &title.n), *b = read_text(in, &text.n);
        title.s = a;
        text.s = b;
        if (kind == 'q')
            question(d, record, text);
        else
            chunks(d, record, title, text);
        ibid_free(a);
        ibid_free(b);
        if (record % 500 == 0) (void)fprintf(stderr, "\r%u records, %zu tokens", record, d->tokens);
    }
    flush(d);
    (void)fprintf(stderr, "\r%u records, %zu tokens\n", record, d->tokens);
}

static void open_all(dump *d, const char *model, const ibid_engine_opts *o) {
    ibid_ids prefix;
    check(ibid_model_open(model, NULL, &d->m));
    if (d->last >= d->m->n_layers || d->first > d->last)
        check(ibid_fail(IBID_INVAL, "the model has %zu layers", (size_t)d->m->n_layers));
    check(ibid_engine_open(d->m, o, &d->e));
    check(ibid_kernels_get(NULL, &d->kernels));
    ibid_sched_init(&d->sched);
    check(ibid_prompt_prefix(d->m, &ibid_wording_default, &prefix));
    check(
        ibid_read_prefix(d->m, d->e, &d->sched, prefix.ids, prefix.n, IBID_KV_Q8_0, &d->prefix_kv));
    d->r = (ibid_reader){.model = d->m,
                         .engine = d->e,
                         .sched = &d->sched,
                         .kv_type = IBID_KV_Q8_0,
                         .prefix = {.layers = d->prefix_kv.layers},
                         .n_prefix = prefix.n};
    ibid_free(prefix.ids);
}

static bool read_options(dump *d, ibid_engine_opts *o, int argc, char **argv) {
    char *end = NULL;
    bool layers = false;
    for (int i = 4; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--layers") == 0) {
            d->first = strtoul(argv[i + 1], &end, 10);
            d->last = *end == '-' ? strtoul(end + 1, NULL, 10) : d->first;
            layers = true;
        } else if (strcmp(argv[i], "--threads") == 0) {
            o->n_threads = strtoul(argv[i + 1], NULL, 10);
        } else if (strcmp(argv[i], "--cache") == 0) {
            o->cache = argv[i + 1];
        } else {
            return false;
        }
    }
    return argc >= 6 && argc % 2 == 0 && layers;
}

int main(int argc, char **argv) {
    static dump d;
    ibid_engine_opts o = {.int8 = true};
    if (!read_options(&d, &o, argc, argv)) {
        (void)fprintf(stderr, "usage: train_head_keys MODEL.gguf RECORDS OUT --layers A-B "
                              "[--threads N] [--cache DIR]\n");
        return 2;
    }
    FILE *in = fopen(argv[2], "rb");
    if (!in) check(ibid_fail(IBID_IO, "cannot open %s", argv[2]));
    d.keys = open_out(argv[3], "keys");
    d.ids = open_out(argv[3], "ids");
    d.ends = open_out(argv[3], "ends");
    d.blocks = open_out(argv[3], "blocks");
    open_all(&d, argv[1], &o);
    run(&d, in);
    if (fclose(d.keys) || fclose(d.ids) || fclose(d.ends) || fclose(d.blocks))
        check(ibid_fail(IBID_IO, "cannot write %s", argv[3]));
    (void)fclose(in);
    ibid_kv_blob_fini(&d.prefix_kv);
    ibid_sched_fini(&d.sched);
    ibid_engine_close(d.e);
    ibid_model_close(d.m);
    return 0;
}
