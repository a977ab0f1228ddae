#include "tests/attention/cuda/kernel_fixture.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

fixture fx;

void fx_start(uint64_t seed) {
    ibid_err err = ibid_device_open(0, &fx.d);
    if (err == IBID_NOTSUP) {
        printf("skipped: %s\n", ibid_err_detail());
        exit(77);
    }
    MUST(err);
    MUST(ibid_device_stream_open(fx.d, &fx.s));
    MUST(ibid_kernels_get("reference", &fx.k));
    fx.random = seed * 0x9e3779b97f4a7c15u + 1;
    printf("seed %llu, %s\n", (unsigned long long)seed, ibid_device_library());
}

void fx_stop(void) {
    ibid_device_stream_close(fx.d, fx.s);
    ibid_device_close(fx.d);
}

void *fx_up(const void *from, size_t n) {
    void *p = NULL;
    MUST(ibid_device_alloc(fx.d, n, &p));
    if (from)
        MUST(ibid_device_upload(fx.d, fx.s, p, from, n));
    else
        MUST(ibid_device_fill(fx.d, fx.s, p, 0xff, n));
    MUST(ibid_device_sync(fx.d, fx.s));
    return p;
}

void fx_down(void *to, const void *from, size_t n) {
    MUST(ibid_device_download(fx.d, fx.s, to, from, n));
    MUST(ibid_device_sync(fx.d, fx.s));
}

void fx_free(void *p) {
    ibid_device_free(fx.d, p);
}

static uint64_t next(void) {
    fx.random ^= fx.random << 13;
    fx.random ^= fx.random >> 7;
    fx.random ^= fx.random << 17;
    return fx.random * 0x2545f4914f6cdd1du;
}

uint64_t fx_below(uint64_t n) {
    return (next() >> 11) % n;
}

float fx_uniform(void) {
    return (float)(next() >> 40) * 0x1p-24f;
}

float fx_normal(void) {
    float r = sqrtf(-2 * logf(1 - fx_uniform()));
    return r * cosf(6.2831853f * fx_uniform());
}

float *fx_normals(size_t n, float scale) {
    float *v = malloc((n + 1) * sizeof *v);
    CHECK(v, "no memory");
    for (size_t i = 0; i < n; i++) v[i] = scale * fx_normal();
    return v;
}

double fx_apart(const float *a, const double *b, size_t n) {
    double off = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - b[i];
        off += d * d;
        size += b[i] * b[i];
    }
    return sqrt(off / (size > 0 ? size : 1));
}
