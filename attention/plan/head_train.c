#include "attention/plan/head_train.h"

#include "rpc/base/mem.h"

#include <math.h>
#include <string.h>

enum {
    QUESTION_ROWS = 32, /* of a question at most */
    CHUNK_ROWS = 112,   /* of a chunk in a batch at most */
    RUN = 4,            /* neighbouring chunks taken together */
    ROWS_EACH = 128,    /* rows a thread takes at a time */
    ALIGN = 64,
    PCA_ROWS = 4096,
    PCA_ROUNDS = 24
};

/* Of the scores before softmax, at the start; of the teacher's similarities. */
static const float first_scale = 20, teacher_scale = 20;

struct ibidi_trainer {
    const ibid_train_set *set;
    const ibid_kernels *k;
    const ibid_keymap *map;
    ibid_pool *pool;
    size_t d, out, hidden, batch, n_parameters;
    float lambda;
    uint64_t random;
    size_t *first_question;   /* [n_chunks + 1] */
    size_t *deck, n_deck, at; /* chunks with questions, shuffled */
    float *parameters, *gradient, *moment, *square;
    float *w0, *w1, *b1, *w2, *log_scale;       /* into parameters */
    float *g_w0, *g_w1, *g_b1, *g_w2, *g_scale; /* into gradient */
    /* The batch: its questions' rows, then its chunks'. */
    size_t n, n_rows, n_asked; /* elements; rows; of them the questions' */
    size_t *question, *chunk;  /* [batch] */
    size_t *q0, *c0;           /* [batch + 1] where each one's rows start */
    size_t *source;            /* [rows] of the set */
    float *x, *z, *a, *y, *u,
        *length; /* [rows, D], [rows, hidden] twice, [rows, out] twice, [rows] */
    float *du, *dy, *da, *dz;
    float *xt, *at_, *dt;   /* transposed: x, a, and dy above dz */
    float *w2t;             /* [hidden, out] */
    float *dots;            /* [threads, QUESTION_ROWS, rows] */
    uint32_t *where;        /* [rows of questions, batch] row of the best token */
    float *score, *dscore;  /* [batch, batch] */
    unsigned char *scratch; /* [threads, scratch_bytes] of matmul */
    size_t scratch_bytes;
    void *memory[40];
    size_t n_memory;
};

/* ---- Small things ---- */

/* splitmix64 */
static uint64_t next_random(uint64_t *state) {
    uint64_t v = *state += UINT64_C(0x9E3779B97F4A7C15);
    v = (v ^ v >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    v = (v ^ v >> 27) * UINT64_C(0x94D049BB133111EB);
    return v ^ v >> 31;
}

static size_t below(uint64_t *state, size_t n) {
    return (size_t)(next_random(state) % n);
}

static float normal(uint64_t *state) {
    double r = ((double)(next_random(state) >> 11) + 0.5) / 9007199254740992.0;
    double p = (double)(next_random(state) >> 11) / 9007199254740992.0;
    return (float)(sqrt(-2 * log(r)) * cos(6.283185307179586 * p));
}

static void *take(ibidi_trainer *t, size_t n, size_t each) {
    size_t bytes;
    if (!ibid_mul_size(n, each, &bytes)) return NULL;
    void *p = ibid_alloc_aligned(ALIGN, bytes + ALIGN);
    if (p) memset(p, 0, bytes + ALIGN);
    if (p) t->memory[t->n_memory++] = p;
    return p;
}

static float *floats(ibidi_trainer *t, size_t n) {
    return take(t, n, sizeof(float));
}

/* ---- Parallel pieces: every number is made by one thread, in one order ---- */

typedef struct product { /* y[i, r] = sum_c w[r, c] x[i, c] */
    ibidi_trainer *t;
    ibid_tensor w;
    const float *x;
    float *y;
    size_t n, ldx, ldy;
    bool by_rows_of_w;
} product;

static void product_part(void *arg, size_t part, size_t thread) {
    const product *p = arg;
    void *scratch = p->t->scratch + thread * p->t->scratch_bytes;
    size_t all = p->by_rows_of_w ? p->w.rows : p->n, each = p->by_rows_of_w ? 32 : ROWS_EACH;
    size_t from = part * each, to = from + each < all ? from + each : all;
    if (p->by_rows_of_w)
        p->t->k->matmul(&p->w, from, to, p->x, p->ldx, p->n, p->y, p->ldy, scratch);
    else
        p->t->k->matmul(&p->w, 0, p->w.rows, p->x + from * p->ldx, p->ldx, to - from,
                        p->y + from * p->ldy, p->ldy, scratch);
}

/* w [rows, cols], x [n, cols], y [n, rows]. */
static void multiply(ibidi_trainer *t, const float *w, size_t rows, size_t cols, const float *x,
                     size_t n, float *y, bool by_rows_of_w) {
    product p = {t, {IBID_F32, rows, cols, cols * sizeof *w, w}, x, y, n, cols, rows, by_rows_of_w};
    size_t all = by_rows_of_w ? rows : n, each = by_rows_of_w ? 32 : ROWS_EACH;
    ibid_pool_run(t->pool, (all + each - 1) / each, product_part, &p);
}

typedef struct turn {
    const float *from;
    float *to;
    size_t rows, cols;
} turn;

static void turn_part(void *arg, size_t part, size_t thread) {
    const turn *u = arg;
    size_t to = (part + 1) * 16 < u->cols ? (part + 1) * 16 : u->cols;
    (void)thread;
    for (size_t i = 0; i < u->rows; i++)
        for (size_t c = part * 16; c < to; c++) u->to[c * u->rows + i] = u->from[i * u->cols + c];
}

/* to [cols, rows] = from [rows, cols], turned. */
static void transpose(ibidi_trainer *t, const float *from, size_t rows, size_t cols, float *to) {
    turn u = {from, to, rows, cols};
    ibid_pool_run(t->pool, (cols + 15) / 16, turn_part, &u);
}

static void each_rows(ibidi_trainer *t, void (*fn)(void *, size_t, size_t)) {
    ibid_pool_run(t->pool, (t->n_rows + ROWS_EACH - 1) / ROWS_EACH, fn, t);
}

/* ---- A batch ---- */

static void shuffle(ibidi_trainer *t) {
    for (size_t i = t->n_deck; i > 1; i--) {
        size_t k = below(&t->random, i), swap = t->deck[i - 1];
        t->deck[i - 1] = t->deck[k];
        t->deck[k] = swap;
    }
    t->at = 0;
}

static bool drawn(const ibidi_trainer *t, size_t chunk) {
    for (size_t i = 0; i < t->n; i++)
        if (t->chunk[i] == chunk) return true;
    return false;
}

static void add_chunk(ibidi_trainer *t, size_t c) {
    size_t first = t->first_question[c], n = t->first_question[c + 1] - first;
    if (t->n == t->batch || !n || drawn(t, c)) return;
    t->chunk[t->n] = c;
    t->question[t->n++] = first + below(&t->random, n);
}

/* Rows of the set: [row0, row0 + n) without a gap, at most so many, from a random one on. */
static size_t put_rows(ibidi_trainer *t, size_t at, size_t row0, size_t n, size_t gap0, size_t gap1,
                       size_t most) {
    size_t kept = n - (gap1 - gap0), skip = 0, from = at;
    if (kept < 4) { /* hardly anything would be left: leave nothing out */
        gap1 = gap0 = 0;
        kept = n;
    }
    if (kept > most) skip = below(&t->random, kept - most + 1);
    for (size_t i = 0; i < n && at - from < most; i++) {
        if (i >= gap0 && i < gap1) continue;
        if (skip) {
            skip--;
            continue;
        }
        t->source[at++] = row0 + i;
    }
    return at;
}

static void read_part(void *arg, size_t part, size_t thread) {
    ibidi_trainer *t = arg;
    size_t to = (part + 1) * ROWS_EACH < t->n_rows ? (part + 1) * ROWS_EACH : t->n_rows;
    (void)thread;
    for (size_t i = part * ROWS_EACH; i < to; i++) {
        float *x = t->x + i * t->d;
        t->k->kv_unpack(IBID_KV_F16, t->set->rows + t->source[i] * t->d, NULL, t->d, x);
        ibid_keymap_inputs(t->map, false, x, 1, x);
    }
}

void ibidi_trainer_draw(ibidi_trainer *t) {
    size_t at = 0;
    t->n = 0;
    while (t->n < t->batch) {
        if (t->at == t->n_deck) shuffle(t);
        size_t c = t->deck[t->at++];
        add_chunk(t, c);
        for (size_t i = 1; next_random(&t->random) >> 63 && i < RUN; i++)
            if (c + i < t->set->n_chunks) add_chunk(t, c + i);
        if (t->n == t->n_deck) break;
    }
    for (size_t i = 0; i < t->n; i++) {
        const ibid_train_question *q = &t->set->questions[t->question[i]];
        t->q0[i] = at;
        at = put_rows(t, at, q->row0, q->n < QUESTION_ROWS ? q->n : QUESTION_ROWS, 0, 0,
                      QUESTION_ROWS);
    }
    t->q0[t->n] = t->n_asked = at;
    for (size_t i = 0; i < t->n; i++) {
        const ibid_train_question *q = &t->set->questions[t->question[i]];
        const ibid_train_chunk *c = &t->set->chunks[t->chunk[i]];
        t->c0[i] = at;
        at = put_rows(t, at, c->row0, c->n, q->mask0, q->mask1, CHUNK_ROWS);
    }
    t->c0[t->n] = t->n_rows = at;
    each_rows(t, read_part);
}

/* ---- Forward ---- */

static void activate_part(void *arg, size_t part, size_t thread) {
    ibidi_trainer *t = arg;
    size_t h = t->hidden, from = part * ROWS_EACH;
    size_t to = from + ROWS_EACH < t->n_rows ? from + ROWS_EACH : t->n_rows;
    (void)thread;
    for (size_t i = from; i < to; i++)
        for (size_t c = 0; c < h; c++) t->a[i * h + c] = t->z[i * h + c] += t->b1[c];
    ibid_gelu(t->a + from * h, (to - from) * h);
}

/* y += what came of the hidden layer, which stands in du until gradients do; u = y / |y|. */
static void unit_part(void *arg, size_t part, size_t thread) {
    ibidi_trainer *t = arg;
    size_t o = t->out, to = (part + 1) * ROWS_EACH < t->n_rows ? (part + 1) * ROWS_EACH : t->n_rows;
    (void)thread;
    for (size_t i = part * ROWS_EACH; i < to; i++) {
        float *y = t->y + i * o, *u = t->u + i * o;
        double sum = 1e-12;
        for (size_t c = 0; t->hidden && c < o; c++) y[c] += t->du[i * o + c];
        for (size_t c = 0; c < o; c++) sum += (double)y[c] * (double)y[c];
        t->length[i] = (float)sqrt(sum);
        for (size_t c = 0; c < o; c++) u[c] = y[c] / t->length[i];
    }
}

/* One question against all chunks of the batch. */
static void score_part(void *arg, size_t i, size_t thread) {
    ibidi_trainer *t = arg;
    size_t o = t->out, n_c = t->n_rows - t->n_asked, n = t->q0[i + 1] - t->q0[i];
    float *dots = t->dots + thread * QUESTION_ROWS * (n_c + 16);
    ibid_tensor w = {IBID_F32, n_c, o, o * sizeof(float), t->u + t->n_asked * o};
    double weight = 0;
    t->k->matmul(&w, 0, n_c, t->u + t->q0[i] * o, o, n, dots, n_c,
                 t->scratch + thread * t->scratch_bytes);
    for (size_t r = t->q0[i]; r < t->q0[i + 1]; r++) weight += (double)t->set->weight[t->source[r]];
    for (size_t j = 0; j < t->n; j++) {
        double sum = 0;
        for (size_t r = t->q0[i]; r < t->q0[i + 1]; r++) {
            const float *row = dots + (r - t->q0[i]) * n_c;
            size_t best = t->c0[j] - t->n_asked;
            for (size_t c = best + 1; c < t->c0[j + 1] - t->n_asked; c++)
                if (row[c] > row[best]) best = c;
            t->where[r * t->batch + j] = (uint32_t)(best + t->n_asked);
            sum += (double)t->set->weight[t->source[r]] * (double)row[best];
        }
        t->score[i * t->batch + j] = weight > 0 ? (float)(sum / weight) : 0;
    }
}

static void forward(ibidi_trainer *t) {
    multiply(t, t->w0, t->out, t->d, t->x, t->n_rows, t->y, false);
    if (t->hidden) {
        multiply(t, t->w1, t->hidden, t->d, t->x, t->n_rows, t->z, false);
        each_rows(t, activate_part);
        multiply(t, t->w2, t->out, t->hidden, t->a, t->n_rows, t->du, false);
    }
    each_rows(t, unit_part);
    ibid_pool_run(t->pool, t->n, score_part, t);
}

/* ---- Loss ---- */

static void soften(double *x, size_t n) {
    double most = x[0], sum = 0;
    for (size_t i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    for (size_t i = 0; i < n; i++) sum += x[i] = exp(x[i] - most);
    for (size_t i = 0; i < n; i++) x[i] /= sum;
}

static double teacher_says(const ibidi_trainer *t, size_t i, size_t j) {
    const ibid_train_set *s = t->set;
    const float *q = s->teacher + (s->n_chunks + t->question[i]) * s->teacher_dim;
    const float *c = s->teacher + t->chunk[j] * s->teacher_dim;
    double sum = 0;
    for (size_t d = 0; d < s->teacher_dim; d++) sum += (double)q[d] * (double)c[d];
    return sum * (double)teacher_scale;
}

/* Loss, and its derivative by the scores and by the log of their scale. With targets r that sum to
 * 1 the cross entropy's derivative by the scaled scores is p - r. */
static double judge(ibidi_trainer *t) {
    double loss = 0, by_scale = 0, scale = exp((double)*t->log_scale), n = (double)t->n;
    double lambda = t->set->teacher ? (double)t->lambda : 0;
    double p[256], target[256];
    for (size_t i = 0; i < t->n; i++) {
        const float *s = t->score + i * t->batch;
        for (size_t j = 0; j < t->n; j++) p[j] = (double)s[j] * scale;
        for (size_t j = 0; lambda > 0 && j < t->n; j++) target[j] = teacher_says(t, i, j);
        soften(p, t->n);
        if (lambda > 0) soften(target, t->n);
        for (size_t j = 0; j < t->n; j++) {
            double r = (lambda > 0 ? lambda * target[j] : 0) + (j == i ? 1 - lambda : 0);
            loss -= r * log(p[j] + 1e-12) / n;
            double by_z = (p[j] - r) / n;
            t->dscore[i * t->batch + j] = (float)(by_z * scale);
            by_scale += by_z * (double)s[j] * scale;
        }
    }
    *t->g_scale = (float)by_scale;
    return loss;
}

/* ---- Backward ---- */

static void add_scaled(float *to, const float *x, float by, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] += by * x[i];
}

/* What a question's token adds per unit of its chunk's score. */
static void shares(const ibidi_trainer *t, size_t i, float *out) {
    double weight = 0;
    for (size_t r = t->q0[i]; r < t->q0[i + 1]; r++) weight += (double)t->set->weight[t->source[r]];
    for (size_t r = t->q0[i]; r < t->q0[i + 1]; r++)
        out[r - t->q0[i]] = weight > 0 ? (float)((double)t->set->weight[t->source[r]] / weight) : 0;
}

static void question_part(void *arg, size_t i, size_t thread) {
    ibidi_trainer *t = arg;
    size_t o = t->out;
    float share[QUESTION_ROWS];
    (void)thread;
    shares(t, i, share);
    for (size_t r = t->q0[i]; r < t->q0[i + 1]; r++) {
        float *du = t->du + r * o;
        memset(du, 0, o * sizeof *du);
        for (size_t j = 0; j < t->n; j++)
            add_scaled(du, t->u + t->where[r * t->batch + j] * o,
                       share[r - t->q0[i]] * t->dscore[i * t->batch + j], o);
    }
}

static void chunk_part(void *arg, size_t j, size_t thread) {
    ibidi_trainer *t = arg;
    size_t o = t->out;
    float share[QUESTION_ROWS];
    (void)thread;
    memset(t->du + t->c0[j] * o, 0, (t->c0[j + 1] - t->c0[j]) * o * sizeof *t->du);
    for (size_t i = 0; i < t->n; i++) {
        shares(t, i, share);
        for (size_t r = t->q0[i]; r < t->q0[i + 1]; r++)
            add_scaled(t->du + t->where[r * t->batch + j] * o, t->u + r * o,
                       share[r - t->q0[i]] * t->dscore[i * t->batch + j], o);
    }
}

static void unit_back_part(void *arg, size_t part, size_t thread) {
    ibidi_trainer *t = arg;
    size_t o = t->out, to = (part + 1) * ROWS_EACH < t->n_rows ? (part + 1) * ROWS_EACH : t->n_rows;
    (void)thread;
    for (size_t i = part * ROWS_EACH; i < to; i++) {
        const float *u = t->u + i * o, *du = t->du + i * o;
        double along = 0;
        for (size_t c = 0; c < o; c++) along += (double)u[c] * (double)du[c];
        for (size_t c = 0; c < o; c++)
            t->dy[i * o + c] = (du[c] - u[c] * (float)along) / t->length[i];
    }
}

/* dz = da * gelu'(z) */
static void gelu_back_part(void *arg, size_t part, size_t thread) {
    ibidi_trainer *t = arg;
    const float c = 0.7978845608f;
    size_t h = t->hidden, to = (part + 1) * ROWS_EACH;
    (void)thread;
    if (to > t->n_rows) to = t->n_rows;
    for (size_t i = part * ROWS_EACH * h; i < to * h; i++) {
        float z = t->z[i], th = tanhf(c * (z + 0.044715f * z * z * z));
        float slope = 0.5f * (1 + th) + 0.5f * z * (1 - th * th) * c * (1 + 0.134145f * z * z);
        t->dz[i] = t->da[i] * slope;
    }
}

static void bias_part(void *arg, size_t c, size_t thread) {
    ibidi_trainer *t = arg;
    const float *column = t->dt + (t->out + c) * t->n_rows;
    double sum = 0;
    (void)thread;
    for (size_t i = 0; i < t->n_rows; i++) sum += (double)column[i];
    t->g_b1[c] = (float)sum;
}

static void backward(ibidi_trainer *t) {
    size_t n = t->n_rows, o = t->out, h = t->hidden;
    ibid_pool_run(t->pool, t->n, question_part, t);
    ibid_pool_run(t->pool, t->n, chunk_part, t);
    each_rows(t, unit_back_part);
    transpose(t, t->dy, n, o, t->dt);
    transpose(t, t->x, n, t->d, t->xt);
    if (h) {
        transpose(t, t->w2, o, h, t->w2t);
        multiply(t, t->w2t, h, o, t->dy, n, t->da, false);
        each_rows(t, gelu_back_part);
        transpose(t, t->dz, n, h, t->dt + o * n);
        transpose(t, t->a, n, h, t->at_);
        multiply(t, t->at_, h, n, t->dt, o, t->g_w2, true);
        ibid_pool_run(t->pool, h, bias_part, t);
    }
    /* dw0 and dw1 lie one after the other, as dy and dz do in dt. */
    multiply(t, t->xt, t->d, n, t->dt, o + h, t->g_w0, true);
}

double ibidi_trainer_loss(ibidi_trainer *t) {
    forward(t);
    double loss = judge(t);
    backward(t);
    return loss;
}

/* ---- Opening ---- */

static void start_parameters(ibidi_trainer *t) {
    size_t d = t->d, o = t->out, h = t->hidden;
    float *p = t->parameters, *g = t->gradient;
    t->w0 = p;
    t->w1 = p + o * d;
    t->b1 = t->w1 + h * d;
    t->w2 = t->b1 + h;
    t->log_scale = t->w2 + o * h;
    t->g_w0 = g;
    t->g_w1 = g + o * d;
    t->g_b1 = t->g_w1 + h * d;
    t->g_w2 = t->g_b1 + h;
    t->g_scale = t->g_w2 + o * h;
    for (size_t i = 0; i < o * d; i++) t->w0[i] = normal(&t->random) / sqrtf((float)d);
    for (size_t i = 0; i < h * d; i++) t->w1[i] = normal(&t->random) / sqrtf((float)d);
    for (size_t i = 0; i < o * h; i++) t->w2[i] = 0.3f * normal(&t->random) / sqrtf((float)h);
    *t->log_scale = logf(first_scale);
}

static ibid_err open_memory(ibidi_trainer *t) {
    size_t d = t->d, o = t->out, h = t->hidden, b = t->batch, threads = ibid_pool_size(t->pool);
    size_t rows = b * (QUESTION_ROWS + CHUNK_ROWS), asked = b * QUESTION_ROWS;
    size_t most = rows > PCA_ROWS ? rows : PCA_ROWS, widest = most > d ? most : d;
    t->n_parameters = o * d + h * d + h + o * h + 1;
    t->scratch_bytes =
        ibid_align_up(t->k->matmul_scratch(widest, most > d ? most : d), ALIGN) + ALIGN;
    bool good =
        (t->parameters = floats(t, t->n_parameters)) &&
        (t->gradient = floats(t, t->n_parameters)) && (t->moment = floats(t, t->n_parameters)) &&
        (t->square = floats(t, t->n_parameters)) &&
        (t->first_question = take(t, t->set->n_chunks + 1, sizeof(size_t))) &&
        (t->deck = take(t, t->set->n_chunks, sizeof(size_t))) &&
        (t->question = take(t, b, sizeof(size_t))) && (t->chunk = take(t, b, sizeof(size_t))) &&
        (t->q0 = take(t, b + 1, sizeof(size_t))) && (t->c0 = take(t, b + 1, sizeof(size_t))) &&
        (t->source = take(t, rows, sizeof(size_t))) && (t->x = floats(t, most * d)) &&
        (t->xt = floats(t, most * d)) && (t->z = floats(t, rows * h)) &&
        (t->a = floats(t, rows * h)) && (t->at_ = floats(t, rows * h)) &&
        (t->da = floats(t, rows * h)) && (t->dz = floats(t, rows * h)) &&
        (t->y = floats(t, rows * o)) && (t->u = floats(t, rows * o)) &&
        (t->du = floats(t, rows * o)) && (t->dy = floats(t, rows * o)) &&
        (t->dt = floats(t, rows * (o + h))) && (t->length = floats(t, rows)) &&
        (t->w2t = floats(t, o * h)) &&
        (t->dots = floats(t, threads * QUESTION_ROWS * (b * CHUNK_ROWS + 16))) &&
        (t->where = take(t, asked * b, sizeof(uint32_t))) && (t->score = floats(t, b * b)) &&
        (t->dscore = floats(t, b * b)) && (t->scratch = take(t, threads, t->scratch_bytes));
    return good ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory to train a retrieval head");
}

static void find_questions(ibidi_trainer *t) {
    const ibid_train_set *s = t->set;
    size_t q = 0;
    for (size_t c = 0; c < s->n_chunks; c++) {
        while (q < s->n_questions && s->questions[q].chunk < c) q++;
        t->first_question[c] = q;
        while (q < s->n_questions && s->questions[q].chunk == c) q++;
        if (q > t->first_question[c]) t->deck[t->n_deck++] = c;
    }
    t->first_question[s->n_chunks] = q;
}

ibid_err ibidi_trainer_open(const ibid_train_set *set, const ibid_train_opts *o,
                            const ibid_keymap *map, ibidi_trainer **out) {
    ibidi_trainer *t = ibid_calloc(1, sizeof *t);
    if (!t) return ibid_fail(IBID_NOMEM, "no memory to train a retrieval head");
    t->set = set;
    t->map = map;
    t->d = ibid_keymap_input(map);
    t->out = map->out;
    t->hidden = map->hidden;
    t->batch = o->batch ? o->batch : 48;
    t->batch = t->batch > 256 ? 256 : t->batch;
    t->lambda = o->lambda > 0 ? o->lambda : 0.7f;
    t->random = o->seed ? o->seed : 1;
    ibid_err e = o->kernels ? IBID_OK : ibid_kernels_get(NULL, &t->k);
    if (o->kernels) t->k = o->kernels;
    if (!e) e = ibid_pool_open(o->n_threads, &t->pool);
    if (!e) e = open_memory(t);
    if (!e) {
        find_questions(t);
        if (t->n_deck < 8)
            e = ibid_fail(IBID_INVAL, "%zu chunks with questions are too few to learn from",
                          t->n_deck);
    }
    if (!e) {
        start_parameters(t);
        shuffle(t);
        *out = t;
    } else {
        ibidi_trainer_close(t);
    }
    return e;
}

void ibidi_trainer_close(ibidi_trainer *t) {
    if (!t) return;
    ibid_pool_close(t->pool);
    for (size_t i = 0; i < t->n_memory; i++) ibid_free(t->memory[i]);
    ibid_free(t);
}

float *ibidi_trainer_parameters(ibidi_trainer *t, size_t *n) {
    *n = t->n_parameters;
    return t->parameters;
}

const float *ibidi_trainer_gradient(const ibidi_trainer *t) {
    return t->gradient;
}

/* ---- Principal components: orthogonal iteration on the covariance of some rows ---- */

/* Rows of v [n, d] made orthogonal and of length 1, in order (Gram-Schmidt, twice for accuracy). */
static void orthogonal(float *v, size_t n, size_t d) {
    for (size_t i = 0; i < n; i++) {
        float *x = v + i * d;
        double sum = 0;
        for (size_t again = 0; again < 2; again++)
            for (size_t k = 0; k < i; k++) {
                double dot = 0;
                for (size_t c = 0; c < d; c++) dot += (double)x[c] * (double)v[k * d + c];
                add_scaled(x, v + k * d, (float)-dot, d);
            }
        for (size_t c = 0; c < d; c++) sum += (double)x[c] * (double)x[c];
        float by = sum > 0 ? (float)(1 / sqrt(sum)) : 0;
        for (size_t c = 0; c < d; c++) x[c] *= by;
    }
}

static ibid_err start_at_components(ibidi_trainer *t) {
    size_t d = t->d, o = t->out, n = 0, total = 0;
    float *cov = floats(t, d * d), *next = floats(t, o * d);
    if (!cov || !next) return ibid_fail(IBID_NOMEM, "no memory to train a retrieval head");
    for (size_t c = 0; c < t->set->n_chunks; c++) total += t->set->chunks[c].n;
    size_t each = total / PCA_ROWS + 1, seen = 0;
    for (size_t c = 0; c < t->set->n_chunks; c++) {
        for (size_t i = 0; i < t->set->chunks[c].n && n < PCA_ROWS; i++, seen++) {
            if (seen % each) continue;
            float *x = t->x + n++ * d;
            t->k->kv_unpack(IBID_KV_F16, t->set->rows + (t->set->chunks[c].row0 + i) * d, NULL, d,
                            x);
            ibid_keymap_inputs(t->map, false, x, 1, x);
        }
    }
    transpose(t, t->x, n, d, t->xt);
    multiply(t, t->xt, d, n, t->xt, d, cov, true);
    orthogonal(t->w0, o, d);
    for (size_t i = 0; i < PCA_ROUNDS; i++) {
        multiply(t, cov, d, d, t->w0, o, next, true);
        memcpy(t->w0, next, o * d * sizeof *next);
        orthogonal(t->w0, o, d);
    }
    multiply(t, cov, d, d, t->w0, o, next, true);
    for (size_t i = 0; i < o; i++) {
        double variance = 0;
        for (size_t c = 0; c < d; c++)
            variance += (double)t->w0[i * d + c] * (double)next[i * d + c] / (double)n;
        float by = variance > 1e-12 ? (float)(1 / sqrt(sqrt(variance))) : 1;
        for (size_t c = 0; c < d; c++) t->w0[i * d + c] *= by;
    }
    return IBID_OK;
}

/* ---- Steps ---- */

typedef struct update {
    ibidi_trainer *t;
    float rate, mend1, mend2; /* 1 / (1 - beta^step) */
} update;

enum { UPDATE_EACH = 8192 };

static void update_part(void *arg, size_t part, size_t thread) {
    const update *u = arg;
    ibidi_trainer *t = u->t;
    size_t to =
        (part + 1) * UPDATE_EACH < t->n_parameters ? (part + 1) * UPDATE_EACH : t->n_parameters;
    (void)thread;
    for (size_t i = part * UPDATE_EACH; i < to; i++) {
        float g = t->gradient[i];
        t->moment[i] = 0.9f * t->moment[i] + 0.1f * g;
        t->square[i] = 0.99f * t->square[i] + 0.01f * g * g;
        t->parameters[i] -=
            u->rate * (t->moment[i] * u->mend1) / (sqrtf(t->square[i] * u->mend2) + 1e-8f);
    }
}

static void update_all(ibidi_trainer *t, size_t step, size_t steps, float rate) {
    double s = (double)step, warm = s < 20 ? s / 20 : 1;
    update u = {
        t, (float)((double)rate * warm * 0.5 * (1 + cos(3.14159265358979 * s / (double)steps))),
        (float)(1 / (1 - pow(0.9, s))), (float)(1 / (1 - pow(0.99, s)))};
    ibid_pool_run(t->pool, (t->n_parameters + UPDATE_EACH - 1) / UPDATE_EACH, update_part, &u);
}

static void put_halves(const float *x, size_t n, uint16_t *out) {
    for (size_t i = 0; i < n; i++) out[i] = ibid_f32_to_f16(x[i]);
}

ibid_err ibid_head_train(const ibid_train_set *set, const ibid_train_opts *o, ibid_keymap *map) {
    ibidi_trainer *t = NULL;
    size_t steps = o->steps ? o->steps : 600;
    double smooth = 0;
    ibid_err e = ibidi_trainer_open(set, o, map, &t);
    if (!e) e = start_at_components(t);
    for (size_t s = 1; !e && s <= steps; s++) {
        if (o->cancel && atomic_load(o->cancel)) {
            e = ibid_fail(IBID_CANCELLED, "training was cancelled at step %zu", s);
            break;
        }
        ibidi_trainer_draw(t);
        double loss = ibidi_trainer_loss(t);
        smooth = s == 1 ? loss : 0.95 * smooth + 0.05 * loss;
        update_all(t, s, steps, o->rate > 0 ? o->rate : 0.002f);
        if (o->progress) o->progress(o->arg, s, steps, smooth);
    }
    if (!e) {
        put_halves(t->w0, t->out * t->d, map->w0);
        put_halves(t->w1, t->hidden * t->d, map->w1);
        put_halves(t->w2, t->out * t->hidden, map->w2);
        if (t->hidden) memcpy(map->b1, t->b1, t->hidden * sizeof *t->b1);
        if (!ibid_keymap_settle(map))
            e = ibid_fail(IBID_INVAL, "training diverged; use more or other text");
    }
    ibidi_trainer_close(t);
    return e;
}
