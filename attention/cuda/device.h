/* A GPU, as little of it as the engine needs: memory, copies, streams, events, graphs, one library
 * product. device_cuda.cu is the real one, none.c stands in where there is no toolkit, and
 * tests/support/emulator/device.cpp runs on the CPU for tests; which one it is, is settled when
 * linking.
 *
 * Errors: NOTSUP (no toolkit in this build, no driver, no GPU, one too old), NOMEM (the device's
 * memory is out; the device is usable), BACKEND (anything else; if ibid_device_lost, nothing works
 * any more in this process, which should end and be started again). Not thread-safe: one user at a
 * time. */
#ifndef IBID_ATTENTION_CUDA_DEVICE_H
#define IBID_ATTENTION_CUDA_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "rpc/base/err.h"

typedef struct ibid_device ibid_device;
typedef void *ibidi_cu_stream;
typedef struct ibid_device_event ibid_device_event;
typedef struct ibid_device_graph ibid_device_graph;

typedef struct ibid_device_info {
    char name[64];
    int major, minor; /* compute capability */
    int n_units;      /* multiprocessors */
    size_t memory, free_memory;
} ibid_device_info;

/* What this build can do about GPUs, in words, whether or not there is one: "CUDA 13.0 ...". */
const char *ibid_device_library(void);

ibid_err ibid_device_open(int number, ibid_device **out);
void ibid_device_close(ibid_device *d);
ibid_err ibid_device_describe(ibid_device *d, ibid_device_info *out);
bool ibid_device_lost(const ibid_device *d);

/* Device memory: at a multiple of 256, contents unspecified. */
ibid_err ibid_device_alloc(ibid_device *d, size_t bytes, void **out);
void ibid_device_free(ibid_device *d, void *p);
/* Host memory that copies go to and from without waiting. */
ibid_err ibid_device_host_alloc(ibid_device *d, size_t bytes, void **out);
void ibid_device_host_free(ibid_device *d, void *p);

/* Work on a stream happens in order; on several, in any, but for events. */
ibid_err ibid_device_stream_open(ibid_device *d, ibidi_cu_stream *out);
void ibid_device_stream_close(ibid_device *d, ibidi_cu_stream s);
ibid_err ibid_device_sync(ibid_device *d, ibidi_cu_stream s);
/* Copies between host and device, either way; the host's side must stay until they are done. */
ibid_err ibid_device_upload(ibid_device *d, ibidi_cu_stream s, void *to, const void *from,
                            size_t n);
ibid_err ibid_device_download(ibid_device *d, ibidi_cu_stream s, void *to, const void *from,
                              size_t n);
ibid_err ibid_device_copy(ibid_device *d, ibidi_cu_stream s, void *to, const void *from, size_t n);
ibid_err ibid_device_fill(ibid_device *d, ibidi_cu_stream s, void *p, int byte, size_t n);

ibid_err ibid_device_event_open(ibid_device *d, ibid_device_event **out);
void ibid_device_event_close(ibid_device *d, ibid_device_event *e);
ibid_err ibid_device_record(ibid_device *d, ibid_device_event *e, ibidi_cu_stream s);
/* What is put on s from now on waits for what was recorded. */
ibid_err ibid_device_wait(ibid_device *d, ibidi_cu_stream s, ibid_device_event *e);
/* The caller waits. */
ibid_err ibid_device_event_sync(ibid_device *d, ibid_device_event *e);
/* Between two recorded and reached events, in milliseconds. */
ibid_err ibid_device_elapsed(ibid_device *d, ibid_device_event *from, ibid_device_event *to,
                             double *ms);

/* What is put on s between begin and end is kept and not run; a launch runs it all. */
ibid_err ibid_device_graph_begin(ibid_device *d, ibidi_cu_stream s);
ibid_err ibid_device_graph_end(ibid_device *d, ibidi_cu_stream s, ibid_device_graph **out);
ibid_err ibid_device_graph_launch(ibid_device *d, ibid_device_graph *g, ibidi_cu_stream s);
void ibid_device_graph_close(ibid_device *d, ibid_device_graph *g);

/* y[i, r] = sum_c w[r, c] h[i, c]: w [rows, cols] and h [n, cols] f16 row-major and dense, y [n,
 * ldy] f32, sums in f32. cols a multiple of 64. */
ibid_err ibid_device_matmul(ibid_device *d, ibidi_cu_stream s, const uint16_t *w, size_t rows,
                            size_t cols, const uint16_t *h, size_t n, float *y, size_t ldy);

#ifdef __cplusplus
}
#endif
#endif
