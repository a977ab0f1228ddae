/* Where this build has no CUDA toolkit: opening says so, and nothing else is ever called. */
#include "attention/cuda/gpu.h"

const char *ibid_device_library(void) {
    return "built without a CUDA toolkit";
}

ibid_err ibidi_gpu_open(const ibid_model *m, const ibid_engine_opts *o, ibid_pool *pool,
                        const ibid_kernels *k, struct ibidi_gpu **out) {
    (void)m, (void)o, (void)pool, (void)k, (void)out;
    return ibid_fail(IBID_NOTSUP,
                     "this ibid was built without a CUDA toolkit; build it where nvcc is found");
}

static ibid_err never(void) {
    return ibid_fail(IBID_INTERNAL, "a GPU in a build without one");
}

void ibidi_gpu_close(struct ibidi_gpu *g) {
    (void)g;
}

ibid_kv_type ibidi_gpu_kv_type(const struct ibidi_gpu *g) {
    (void)g;
    return IBID_KV_Q8_0;
}

size_t ibidi_gpu_cell_bytes(const struct ibidi_gpu *g) {
    (void)g;
    return 0;
}

bool ibidi_gpu_lost(const struct ibidi_gpu *g) {
    (void)g;
    return false;
}

void ibidi_gpu_look(const struct ibidi_gpu *g, ibid_engine_gpu *out) {
    (void)g, (void)out;
}

void ibidi_gpu_seq_close(struct ibidi_gpu *g, struct ibidi_gpu_seq *q) {
    (void)g, (void)q;
}

ibid_err ibidi_gpu_seq_read(const ibid_seq *s, size_t layer, size_t row0, size_t n) {
    (void)s, (void)layer, (void)row0, (void)n;
    return never();
}

const uint8_t *ibidi_gpu_page(const ibid_seq *s, size_t page, size_t layer, size_t head) {
    (void)s, (void)page, (void)layer, (void)head;
    return NULL;
}

ibid_err ibidi_gpu_forward(ibid_engine *e, ibid_step *steps, size_t n_steps,
                           const atomic_bool *cancel) {
    (void)e, (void)steps, (void)n_steps, (void)cancel;
    return never();
}
