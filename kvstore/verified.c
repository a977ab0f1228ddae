/* Which KV values this process has checked: one slot per block in an open-addressed table, a bit
 * per layer. A block written again has a new epoch, which clears its bits. The table starts over
 * when it reaches its bound: values are then checked once more, which costs time and nothing else.
 */
#include "kvstore/store_internal.h"

enum { SLOTS_FIRST = 1024, SLOTS_MAX = 1 << 20, LAYERS_KEPT = 128 };

typedef struct slot {
    uint64_t owner, epoch; /* epoch 0: the slot is free */
    uint64_t bits[LAYERS_KEPT / 64];
} slot;

struct ibidi_verified {
    pthread_mutex_t mu;
    slot *slots;
    size_t n_slots, used;
};

ibid_err ibidi_verified_open(ibidi_verified **out) {
    ibidi_verified *v = ibid_calloc(1, sizeof *v);
    if (!v) return ibid_fail(IBID_NOMEM, "out of memory for the table of checked values");
    (void)pthread_mutex_init(&v->mu, NULL);
    *out = v;
    return IBID_OK;
}

void ibidi_verified_close(ibidi_verified *v) {
    if (!v) return;
    (void)pthread_mutex_destroy(&v->mu);
    ibid_free(v->slots);
    ibid_free(v);
}

/* The owner's slot, or the free one where it would go. */
static slot *find(slot *slots, size_t n, uint64_t owner) {
    uint64_t h = owner * 0x9e3779b97f4a7c15u;
    size_t i = (size_t)(h >> 32) & (n - 1);
    while (slots[i].epoch && slots[i].owner != owner) i = (i + 1) & (n - 1);
    return &slots[i];
}

static void make_room(ibidi_verified *v) {
    if (v->slots && v->used < v->n_slots / 2) return;
    size_t n = v->slots ? v->n_slots * 2 : SLOTS_FIRST;
    if (n > SLOTS_MAX) {
        memset(v->slots, 0, v->n_slots * sizeof *v->slots);
        v->used = 0;
        return;
    }
    slot *grown = ibid_calloc(n, sizeof *grown);
    if (!grown) return;
    for (size_t i = 0; i < v->n_slots; i++)
        if (v->slots[i].epoch) *find(grown, n, v->slots[i].owner) = v->slots[i];
    ibid_free(v->slots);
    v->slots = grown;
    v->n_slots = n;
}

bool ibidi_verified_has(ibidi_verified *v, uint64_t owner, uint64_t epoch, size_t layer) {
    if (layer >= LAYERS_KEPT) return false;
    (void)pthread_mutex_lock(&v->mu);
    const slot *s = v->slots ? find(v->slots, v->n_slots, owner) : NULL;
    bool known = s && s->epoch == epoch && (s->bits[layer / 64] >> (layer % 64) & 1u);
    (void)pthread_mutex_unlock(&v->mu);
    return known;
}

void ibidi_verified_add(ibidi_verified *v, uint64_t owner, uint64_t epoch, size_t layer) {
    if (layer >= LAYERS_KEPT) return;
    (void)pthread_mutex_lock(&v->mu);
    make_room(v);
    /* One free slot must stay, or a search for an absent owner would not end. */
    slot *s = v->slots && v->used + 1 < v->n_slots ? find(v->slots, v->n_slots, owner) : NULL;
    if (s && !s->epoch) v->used++;
    if (s && s->epoch != epoch) *s = (slot){.owner = owner, .epoch = epoch};
    if (s) s->bits[layer / 64] |= (uint64_t)1 << (layer % 64);
    (void)pthread_mutex_unlock(&v->mu);
}
