/* Choosing a backend, and the few functions every backend shares. */
#include "attention/kernels/internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef IBIDI_KERNELS_X86
#include <cpuid.h>
#endif

#ifdef IBIDI_KERNELS_X86
/* The builtin checks the operating system's saving of the registers too (XGETBV). Every CPU with
 * AVX2 has F16C, which clang 14 cannot ask about by name. */
bool ibidi_cpu_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

/* By CPUID leaf 7, subleaf 1: compilers of our time cannot all ask by name. */
bool ibidi_cpu_avxvnni(void) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return ibidi_cpu_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

bool ibidi_cpu_avx512(void) {
    return ibidi_cpu_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

bool ibidi_cpu_avx512vnni(void) {
    return ibidi_cpu_avx512() && __builtin_cpu_supports("avx512vnni");
}
#endif

static const ibid_kernels *const all_kernels[] = {
    &ibidi_kernels_reference,
#ifdef IBIDI_KERNELS_X86
    &ibidi_kernels_avx2,
    &ibidi_kernels_avxvnni, /* of clients; CPUs with AVX-512 too have its VNNI, and take that */
    &ibidi_kernels_avx512,
    &ibidi_kernels_avx512vnni,
#endif
    NULL,
};

const ibid_kernels *const *ibid_kernels_all(void) {
    return all_kernels;
}

static ibid_err no_such_backend(const char *name) {
    char list[128] = "";
    size_t len = 0;
    for (const ibid_kernels *const *k = all_kernels; *k; k++) {
        int n = snprintf(list + len, sizeof list - len, "%s%s", len ? ", " : "", (*k)->name);
        if (n < 0 || (size_t)n >= sizeof list - len) break;
        len += (size_t)n;
    }
    return ibid_fail(IBID_NOTFOUND, "no kernels named \"%s\"; this build has %s", name, list);
}

ibid_err ibid_kernels_get(const char *name, const ibid_kernels **out) {
    if (!name) name = getenv("IBID_KERNELS");
    const ibid_kernels *best = NULL;
    for (const ibid_kernels *const *k = all_kernels; *k; k++) {
        if (!name || !*name) {
            if ((*k)->supported()) best = *k;
        } else if (strcmp((*k)->name, name) == 0) {
            if (!(*k)->supported()) {
                return ibid_fail(IBID_NOTSUP,
                                 "this CPU cannot run the %s kernels; choose another "
                                 "by IBID_KERNELS or leave it unset",
                                 name);
            }
            best = *k;
        }
    }
    if (!best) return no_such_backend(name);
    *out = best;
    return IBID_OK;
}

void ibid_attn_merge(ibid_attn_state *into, float *into_acc, const ibid_attn_state *other,
                     const float *other_acc, size_t head_dim) {
    if (!(other->max > -INFINITY)) return; /* it saw nothing */
    if (!(into->max > -INFINITY)) {
        *into = *other;
        memcpy(into_acc, other_acc, head_dim * sizeof *into_acc);
        return;
    }
    float max = into->max > other->max ? into->max : other->max;
    float mine = expf(into->max - max), theirs = expf(other->max - max);
    into->max = max;
    into->sum = into->sum * mine + other->sum * theirs;
    for (size_t d = 0; d < head_dim; d++) {
        into_acc[d] = into_acc[d] * mine + other_acc[d] * theirs;
    }
}

static uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

float ibid_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 31u, frac = h & 0x3ffu;
    if (exp == 31) return float_of(sign | 0x7f800000u | frac << 13 | (frac ? 0x400000u : 0));
    if (exp == 0) { /* zero or subnormal: frac * 2^-24, exact in f32 */
        float v = (float)frac * 0x1p-24f;
        return float_of(bits_of(v) | sign);
    }
    return float_of(sign | (exp + 112) << 23 | frac << 13);
}

uint16_t ibid_f32_to_f16(float f) {
    uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
    uint32_t h = 0;
    if (mag > 0x7f800000u) { /* NaN: quiet, keep the payload's top */
        h = 0x7e00u | (mag >> 13 & 0x3ffu);
    } else if (mag >= 0x477ff000u) { /* 65520 and above round to infinity */
        h = 0x7c00u;
    } else if (mag >= 0x38800000u) { /* normal in f16 */
        mag += 0xfffu + (mag >> 13 & 1u);
        h = (mag >> 13) - (112u << 10);
    } else { /* adding 0.5 leaves round-to-even(value * 2^24) in the low bits */
        h = bits_of(float_of(mag) + 0.5f) - bits_of(0.5f);
    }
    return (uint16_t)(sign | h);
}
