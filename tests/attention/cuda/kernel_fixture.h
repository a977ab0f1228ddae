/* Device memory, random numbers and comparing, for the tests of the CUDA kernels; they run on a GPU
 * or on the emulator, whichever they are linked with. */
#ifndef IBID_TEST_KERNEL_FIXTURE_H
#define IBID_TEST_KERNEL_FIXTURE_H

#include "attention/cuda/device.h"
#include "attention/cuda/launch.h"
#include "attention/kernels/kernels.h"
#include "tests/support/check.h"

typedef struct fixture {
    ibid_device *d;
    ibidi_cu_stream s;
    const ibid_kernels *k; /* the CPU's reference */
    uint64_t random;
} fixture;
extern fixture fx;

void fx_start(uint64_t seed); /* exits with 77 where there is no GPU */
void fx_stop(void);
/* Device memory with n bytes of `from` (NULL: filled with NaN). fx_free() it. */
void *fx_up(const void *from, size_t n);
void fx_down(void *to, const void *from, size_t n);
void fx_free(void *p);
uint64_t fx_below(uint64_t n);
float fx_uniform(void); /* [0, 1) */
float fx_normal(void);
float *fx_normals(size_t n, float scale); /* free() it */
/* |a - b| / |b| */
double fx_apart(const float *a, const double *b, size_t n);
#endif
