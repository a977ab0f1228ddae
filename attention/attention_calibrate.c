/* Calibration of a loaded model: heads found, trained or known, then new token keys for its blocks.
 */
#include "attention/attention_internal.h"
#include "attention/plan/head_known.h"
#include "attention/plan/head_train_run.h"

#include <string.h>

/* Whether the program has a trained head for the model that it does not use: one of raw heads, or
 * of an earlier program. What a user has trained stays. */
bool ibidi_model_outdated(ibidi_loaded *m) {
    ibid_calibration known, now;
    ibidi_model_calibration(m, &now);
    if (now.map && now.map->out && !now.has_model) return false;
    if (ibid_known_head(&m->model->fingerprint, &known)) return false;
    bool other = ibid_hash_cmp(&known.id, &now.id) != 0;
    ibid_calibration_fini(&known);
    return other;
}

/* Takes over what cal owns. Who holds a copy of the old calibration goes on with its map, so that
 * one is kept until the model is closed. */
static ibid_err adopt(ibidi_loaded *m, ibid_calibration *cal) {
    (void)pthread_mutex_lock(&m->lock);
    ibid_keymap **more = ibid_realloc(m->retired, (m->n_retired + 1) * sizeof *more);
    if (more) {
        m->retired = more;
        if (m->cal.map) m->retired[m->n_retired++] = m->cal.map;
        m->cal = *cal;
        m->calibrated = true;
        cal->map = NULL;
    }
    (void)pthread_mutex_unlock(&m->lock);
    return more ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for a calibration");
}

static void log_progress(void *arg, size_t step, size_t steps, double loss) {
    const ibidi_loaded *m = arg;
    if (step % 50 == 0 || step == steps)
        ibid_log(IBID_LOG_INFO, "%s: training its retrieval head, step %zu of %zu, loss %.3f",
                 m->name, step, steps, loss);
}

/* Raw heads first, to choose the inputs by and to be compared with; *cal is then theirs or the
 * trained one's. */
static ibid_err train(ibidi_room *r, ibidi_loaded *m, const ibidi_calibrating *c,
                      ibid_calibration *cal) {
    ibid_train_texts texts = {.n_chunks = 0};
    ibid_calibration raw = {.map = NULL}, known = {.map = NULL};
    ibid_train_result result;
    ibid_cal_ranking *ranking = ibid_calloc(1, sizeof *ranking);
    ibid_train_opts o = {.n_threads = (size_t)r->opts.threads,
                         .cancel = &r->closing,
                         .progress = log_progress,
                         .arg = m};
    ibid_err e = ranking ? ibid_train_texts_open(m->model, c->train, &texts)
                         : ibid_fail(IBID_NOMEM, "out of memory");
    if (!e) e = ibid_calibrate(&m->reader, c->sample, NULL, &r->closing, &raw, ranking, c->report);
    if (!e)
        e = ibid_calibrate_train(&m->reader, &texts, (ibid_teacher){c->teacher.s, c->teacher.n},
                                 &raw, ranking, &o, &known, &result, c->report);
    if (!e && result.kept) {
        e = ibid_calibrate(&m->reader, c->sample, &known, &r->closing, cal, NULL, c->report);
    } else if (!e) {
        *cal = raw;
        raw.map = NULL;
    }
    ibid_calibration_fini(&known);
    ibid_calibration_fini(&raw);
    ibid_train_texts_close(&texts);
    ibid_free(ranking);
    return e;
}

/* The head that comes with the program, or the raw heads that the sample chooses. */
static ibid_err find(ibidi_room *r, ibidi_loaded *m, const ibidi_calibrating *c,
                     ibid_calibration *cal) {
    ibid_calibration known = {.map = NULL};
    (void)ibid_known_head(&m->model->fingerprint, &known);
    ibid_err e = ibid_calibrate(&m->reader, c->sample, known.map ? &known : NULL, &r->closing, cal,
                                NULL, c->report);
    ibid_calibration_fini(&known);
    return e;
}

ibid_err ibidi_model_calibrate(ibidi_room *r, ibidi_loaded *m, const ibidi_calibrating *c) {
    ibid_calibration cal = {.map = NULL};
    ibid_buf encoding;
    uint64_t n = 0;
    ibid_buf_init(&encoding, IBIDI_CALIBRATION_MAX);
    ibid_err e = c->train.n ? train(r, m, c, &cal) : find(r, m, c, &cal);
    if (!e) e = ibid_calibration_encode(&cal, &encoding); /* sets its id */
    if (!e) {
        (void)pthread_mutex_lock(&r->load_lock);
        e = adopt(m, &cal);
        if (!e) e = ibidi_model_save(r, m);
        (void)pthread_mutex_unlock(&r->load_lock);
    }
    if (!e) e = ibidi_rekey(r, m, &n);
    if (!e && c->report)
        (void)ibid_buf_printf(c->report, "token keys derived for %llu blocks\n",
                              (unsigned long long)n);
    ibid_buf_fini(&encoding);
    ibid_calibration_fini(&cal);
    return e;
}

ibid_err ibidi_model_train_texts(ibidi_loaded *m, ibid_str text, ibid_buf *out) {
    ibid_train_texts texts = {.n_chunks = 0};
    ibid_err e = ibid_train_texts_open(m->model, text, &texts);
    if (!e) e = ibid_train_texts_write(m->model, &texts, out);
    ibid_train_texts_close(&texts);
    return e;
}
