#include "attention/plan/head_known.h"

ibid_err ibid_known_head(const ibid_hash *fingerprint, ibid_calibration *out) {
    ibid_calibration c;
    ibid_err e = ibidi_known_head_size
                     ? ibid_calibration_decode(ibidi_known_head, ibidi_known_head_size, &c)
                     : ibid_fail(IBID_NOTFOUND, "no retrieval head comes with this program");
    if (e) return e;
    if (!c.map || !c.has_model || ibid_hash_cmp(&c.model, fingerprint) != 0) {
        ibid_calibration_fini(&c);
        return ibid_fail(IBID_NOTFOUND, "no retrieval head for this model comes with the program");
    }
    *out = c;
    return IBID_OK;
}
