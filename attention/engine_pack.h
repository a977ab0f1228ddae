/* The weights of a model in panels (kernels/panel.h): built once on all threads, and kept in a file
 * named after the model's fingerprint, which later starts map. */
#ifndef IBID_ATTENTION_ENGINE_PACK_H
#define IBID_ATTENTION_ENGINE_PACK_H

#include "attention/kernels/panel.h"
#include "attention/kernels/pool.h"
#include "attention/model/model.h"

/* In the order of a layer's pass. */
typedef enum ibidi_weight {
    IBIDI_WQ,
    IBIDI_WK,
    IBIDI_WV,
    IBIDI_WO,
    IBIDI_GATE,
    IBIDI_UP,
    IBIDI_DOWN,
    IBIDI_WEIGHTS /* how many */
} ibidi_weight;

typedef struct ibidi_pack {
    ibid_panels *layers; /* [n_layers, IBIDI_WEIGHTS]; data NULL: not a quantised type */
    ibid_panels head;
    void *memory;         /* all panels: mapped from the file, or of this process */
    size_t bytes, mapped; /* of the panels; of the file's map or 0 */
} ibidi_pack;

const ibid_tensor *ibidi_layer_weight(const ibid_layer *l, ibidi_weight w);

/* folder NULL: no file. A file that is missing, of another version or damaged is written anew; one
 * that cannot be written is done without, and the log says so. Errors: NOMEM. */
ibid_err ibidi_pack_open(const ibid_model *m, const char *folder, ibid_pool *pool, ibidi_pack *out);
void ibidi_pack_close(ibidi_pack *p);
#endif
