#include "attention/plan/load.h"

#define WINS_BY 1.2
#define QUICK_S 0.02
#define NEW_SHARE 0.3 /* of what was just seen, in a running estimate */
#define PACE_TOKENS 128

ibid_load_choice ibid_load_choose(const ibid_load_rates *r, uint64_t missing, uint64_t tokens,
                                  bool encoding) {
    if (missing == 0) return IBID_LOAD_READ;
    if (!(r->bytes_per_s > 0)) return IBID_LOAD_TIME_DISK;
    double load_s = (double)missing / r->bytes_per_s;
    if (!(r->tokens_per_s > 0)) return load_s <= QUICK_S ? IBID_LOAD_READ : IBID_LOAD_TIME_ENCODER;
    double encode_s = (double)tokens / r->tokens_per_s;
    return load_s > (encoding ? encode_s : WINS_BY * encode_s) ? IBID_LOAD_ENCODE : IBID_LOAD_READ;
}

ibid_load_rates ibid_load_rates_now(ibid_load_meter *m, uint64_t now_ns) {
    uint64_t at = atomic_load(&m->disk_ns);
    bool stale = at == 0 || (now_ns > at && now_ns - at > IBID_LOAD_STALE_S * UINT64_C(1000000000));
    return (ibid_load_rates){.bytes_per_s = stale ? 0 : atomic_load(&m->bytes_per_s),
                             .tokens_per_s = atomic_load(&m->tokens_per_s)};
}

/* Two threads at once may lose one of their updates, which an estimate bears. */
static void blend(_Atomic double *rate, double seen) {
    double was = atomic_load(rate);
    atomic_store(rate, was > 0 ? was + NEW_SHARE * (seen - was) : seen);
}

void ibid_load_encoded(ibid_load_meter *m, uint64_t tokens, uint64_t ns) {
    if (tokens == 0 || ns == 0) return;
    if (tokens < PACE_TOKENS && atomic_load(&m->tokens_per_s) > 0) return;
    blend(&m->tokens_per_s, (double)tokens * 1e9 / (double)ns);
}

void ibid_load_came(ibid_load_meter *m, uint64_t bytes, uint64_t ns, bool at_least,
                    uint64_t now_ns) {
    if (bytes == 0 || ns == 0) return;
    double seen = (double)bytes * 1e9 / (double)ns;
    bool fresh = ibid_load_rates_now(m, now_ns).bytes_per_s > 0;
    if (at_least && (!fresh || seen <= atomic_load(&m->bytes_per_s))) return;
    if (fresh)
        blend(&m->bytes_per_s, seen);
    else
        atomic_store(&m->bytes_per_s, seen);
    atomic_store(&m->disk_ns, now_ns);
}
