/* Decoding steps as recorded graphs: what a pass puts on the stream is the same from token to
 * token, but for what lies in its tables, which the kernels read anew each time. So a pass whose
 * launches were seen before is recorded, and from then on put on the stream as one. What the
 * launches' own arguments depend on is the key: rows, grids (padded, so that they seldom grow), and
 * where the pass's memory lies. */
#include "attention/cuda/gpu.h"
#include "rpc/base/log.h"

#include <string.h>

static ibidi_gpu_graph *find(struct ibidi_gpu *g, const ibidi_gpu_key *key) {
    ibidi_gpu_graph *oldest = &g->graphs[0];
    for (size_t i = 0; i < IBIDI_GPU_GRAPHS; i++) {
        ibidi_gpu_graph *e = &g->graphs[i];
        if (e->used && memcmp(&e->key, key, sizeof *key) == 0) return e;
        if (e->used < oldest->used) oldest = e;
    }
    ibid_device_graph_close(g->d, oldest->graph);
    *oldest = (ibidi_gpu_graph){.key = *key};
    return oldest;
}

/* An error on the way must not leave the stream recording. */
static ibid_err record(struct ibidi_gpu *g, ibid_err (*put)(const void *arg), const void *arg,
                       ibid_device_graph **out) {
    ibid_device_graph *made = NULL;
    ibid_err err = ibid_device_graph_begin(g->d, g->work);
    if (err) return err;
    err = put(arg);
    ibid_err ended = ibid_device_graph_end(g->d, g->work, &made);
    if (!err) err = ended;
    if (err)
        ibid_device_graph_close(g->d, made);
    else
        *out = made;
    return err;
}

ibid_err ibidi_gpu_put_recorded(struct ibidi_gpu *g, const ibidi_gpu_key *key,
                                ibid_err (*put)(const void *arg), const void *arg) {
    ibidi_gpu_graph *e = find(g, key);
    bool before = e->used != 0;
    e->used = ++g->graph_clock;
    if (before && !e->graph && !e->refused) {
        ibid_err err = record(g, put, arg, &e->graph);
        if (err && ibid_device_lost(g->d)) return err;
        if (err) {
            ibid_log(IBID_LOG_WARN, "a decoding step is not recorded: %s", ibid_err_detail());
            e->refused = true;
        }
    }
    if (!e->graph) return put(arg);
    g->noted.graph_steps++;
    return ibid_device_graph_launch(g->d, e->graph, g->work);
}

void ibidi_gpu_graphs_close(struct ibidi_gpu *g) {
    for (size_t i = 0; i < IBIDI_GPU_GRAPHS; i++) {
        ibid_device_graph_close(g->d, g->graphs[i].graph);
        g->graphs[i] = (ibidi_gpu_graph){0};
    }
}
