/* The device interface over the CUDA runtime and cuBLASLt, which nothing else calls. Every call's
 * code is checked; what cannot be got over marks the device as lost. */
#include "attention/cuda/device.h"

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORKSPACE = 32 * 1024 * 1024, MIN_MAJOR = 8 };

struct ibid_device {
    int number;
    cublasLtHandle_t blas;
    void *workspace;
};
struct ibid_device_event {
    cudaEvent_t e;
};
struct ibid_device_graph {
    cudaGraphExec_t exec;
};

/* Kernel launches report here without a device at hand, and a process has one GPU. */
static bool lost;

/* After these codes no call on the context succeeds any more. */
static bool is_sticky(cudaError_t e) {
    switch (e) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorAssert:
    case cudaErrorContained:
    case cudaErrorDevicesUnavailable:
    case cudaErrorExternalDevice:
    case cudaErrorUnknown:
        return true;
    default:
        return false;
    }
}

extern "C" ibid_err ibidi_device_check(int code, const char *what) {
    cudaError_t e = (cudaError_t)code;
    if (e == cudaSuccess) return IBID_OK;
    (void)cudaGetLastError(); /* or the next launch reports it again */
    if (e == cudaErrorMemoryAllocation)
        return ibid_fail(IBID_NOMEM,
                         "GPU: %s: out of device memory; give the KV pool less (--gpu-pool), or ask "
                         "over fewer blocks",
                         what);
    if (is_sticky(e)) {
        lost = true;
        return ibid_fail(IBID_BACKEND, "GPU lost: %s: %s (%d)", what, cudaGetErrorString(e), code);
    }
    return ibid_fail(IBID_BACKEND, "GPU: %s: %s (%d)", what, cudaGetErrorString(e), code);
}

static ibid_err check(cudaError_t e, const char *what) {
    return ibidi_device_check((int)e, what);
}

static ibid_err check_blas(cublasStatus_t s, const char *what) {
    if (s == CUBLAS_STATUS_SUCCESS) return IBID_OK;
    if (s == CUBLAS_STATUS_ALLOC_FAILED)
        return ibid_fail(IBID_NOMEM, "cuBLASLt: %s: no memory", what);
    return ibid_fail(IBID_BACKEND, "cuBLASLt: %s: %s (%d)", what, cublasLtGetStatusString(s),
                     (int)s);
}

extern "C" const char *ibid_device_library(void) {
    static char text[64];
    (void)snprintf(text, sizeof text, "CUDA %d.%d", CUDART_VERSION / 1000,
                   CUDART_VERSION % 1000 / 10);
    return text;
}

extern "C" bool ibid_device_lost(const ibid_device *d) {
    (void)d;
    return lost;
}

static ibid_err find(int number, cudaDeviceProp *p) {
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0) {
        (void)cudaGetLastError();
        return ibid_fail(IBID_NOTSUP, "no GPU that CUDA can use: %s",
                         e == cudaSuccess ? "none is there" : cudaGetErrorString(e));
    }
    if (number < 0 || number >= n) return ibid_fail(IBID_NOTSUP, "GPU %d of %d", number, n);
    if (cudaGetDeviceProperties(p, number) != cudaSuccess || p->major < MIN_MAJOR) {
        (void)cudaGetLastError();
        return ibid_fail(IBID_NOTSUP, "GPU %d cannot be used: compute capability 8.0 is needed",
                         number);
    }
    return IBID_OK;
}

extern "C" ibid_err ibid_device_open(int number, ibid_device **out) {
    cudaDeviceProp p;
    ibid_err err = find(number, &p);
    if (err) return err;
    ibid_device *d = (ibid_device *)calloc(1, sizeof *d);
    if (!d) return ibid_fail(IBID_NOMEM, "no memory for a device");
    d->number = number;
    if ((err = check(cudaSetDevice(number), "choosing the device")) ||
        (err = check_blas(cublasLtCreate(&d->blas), "opening")) ||
        (err = check(cudaMalloc(&d->workspace, WORKSPACE), "a workspace"))) {
        ibid_device_close(d);
        return err;
    }
    *out = d;
    return IBID_OK;
}

extern "C" void ibid_device_close(ibid_device *d) {
    if (!d) return;
    if (d->workspace) (void)cudaFree(d->workspace);
    if (d->blas) (void)cublasLtDestroy(d->blas);
    (void)cudaGetLastError();
    free(d);
}

extern "C" ibid_err ibid_device_describe(ibid_device *d, ibid_device_info *out) {
    cudaDeviceProp p;
    size_t free_bytes = 0, total = 0;
    ibid_err err = check(cudaGetDeviceProperties(&p, d->number), "asking about the device");
    if (!err) err = check(cudaMemGetInfo(&free_bytes, &total), "asking about memory");
    if (err) return err;
    memset(out, 0, sizeof *out);
    (void)snprintf(out->name, sizeof out->name, "%.63s", p.name);
    out->major = p.major;
    out->minor = p.minor;
    out->n_units = p.multiProcessorCount;
    out->memory = total;
    out->free_memory = free_bytes;
    return IBID_OK;
}

extern "C" ibid_err ibid_device_alloc(ibid_device *d, size_t bytes, void **out) {
    (void)d;
    return check(cudaMalloc(out, bytes ? bytes : 1), "allocating");
}

extern "C" void ibid_device_free(ibid_device *d, void *p) {
    (void)d;
    if (p) (void)check(cudaFree(p), "freeing");
}

extern "C" ibid_err ibid_device_host_alloc(ibid_device *d, size_t bytes, void **out) {
    (void)d;
    return check(cudaMallocHost(out, bytes ? bytes : 1), "allocating pinned memory");
}

extern "C" void ibid_device_host_free(ibid_device *d, void *p) {
    (void)d;
    if (p) (void)check(cudaFreeHost(p), "freeing pinned memory");
}

extern "C" ibid_err ibid_device_stream_open(ibid_device *d, ibidi_cu_stream *out) {
    cudaStream_t s = NULL;
    (void)d;
    ibid_err err = check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "opening a stream");
    if (!err) *out = (ibidi_cu_stream)s;
    return err;
}

extern "C" void ibid_device_stream_close(ibid_device *d, ibidi_cu_stream s) {
    (void)d;
    if (s) (void)check(cudaStreamDestroy((cudaStream_t)s), "closing a stream");
}

extern "C" ibid_err ibid_device_sync(ibid_device *d, ibidi_cu_stream s) {
    (void)d;
    return check(cudaStreamSynchronize((cudaStream_t)s), "waiting for a stream");
}

static ibid_err copy(ibidi_cu_stream s, void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    return n ? check(cudaMemcpyAsync(to, from, n, kind, (cudaStream_t)s), "copying") : IBID_OK;
}

extern "C" ibid_err ibid_device_upload(ibid_device *d, ibidi_cu_stream s, void *to,
                                       const void *from, size_t n) {
    (void)d;
    return copy(s, to, from, n, cudaMemcpyHostToDevice);
}

extern "C" ibid_err ibid_device_download(ibid_device *d, ibidi_cu_stream s, void *to,
                                         const void *from, size_t n) {
    (void)d;
    return copy(s, to, from, n, cudaMemcpyDeviceToHost);
}

extern "C" ibid_err ibid_device_copy(ibid_device *d, ibidi_cu_stream s, void *to, const void *from,
                                     size_t n) {
    (void)d;
    return copy(s, to, from, n, cudaMemcpyDeviceToDevice);
}

extern "C" ibid_err ibid_device_fill(ibid_device *d, ibidi_cu_stream s, void *p, int byte,
                                     size_t n) {
    (void)d;
    return n ? check(cudaMemsetAsync(p, byte, n, (cudaStream_t)s), "filling") : IBID_OK;
}

extern "C" ibid_err ibid_device_event_open(ibid_device *d, ibid_device_event **out) {
    ibid_device_event *e = (ibid_device_event *)calloc(1, sizeof *e);
    (void)d;
    if (!e) return ibid_fail(IBID_NOMEM, "no memory for an event");
    ibid_err err = check(cudaEventCreate(&e->e), "opening an event");
    if (err)
        free(e);
    else
        *out = e;
    return err;
}

extern "C" void ibid_device_event_close(ibid_device *d, ibid_device_event *e) {
    (void)d;
    if (!e) return;
    (void)check(cudaEventDestroy(e->e), "closing an event");
    free(e);
}

extern "C" ibid_err ibid_device_record(ibid_device *d, ibid_device_event *e, ibidi_cu_stream s) {
    (void)d;
    return check(cudaEventRecord(e->e, (cudaStream_t)s), "recording an event");
}

extern "C" ibid_err ibid_device_wait(ibid_device *d, ibidi_cu_stream s, ibid_device_event *e) {
    (void)d;
    return check(cudaStreamWaitEvent((cudaStream_t)s, e->e, 0), "waiting for an event");
}

extern "C" ibid_err ibid_device_event_sync(ibid_device *d, ibid_device_event *e) {
    (void)d;
    return check(cudaEventSynchronize(e->e), "waiting for an event");
}

extern "C" ibid_err ibid_device_elapsed(ibid_device *d, ibid_device_event *from,
                                        ibid_device_event *to, double *ms) {
    float f = 0;
    (void)d;
    ibid_err err = check(cudaEventElapsedTime(&f, from->e, to->e), "timing");
    *ms = (double)f;
    return err;
}

extern "C" ibid_err ibid_device_graph_begin(ibid_device *d, ibidi_cu_stream s) {
    (void)d;
    return check(cudaStreamBeginCapture((cudaStream_t)s, cudaStreamCaptureModeThreadLocal),
                 "beginning a graph");
}

extern "C" ibid_err ibid_device_graph_end(ibid_device *d, ibidi_cu_stream s,
                                          ibid_device_graph **out) {
    cudaGraph_t graph = NULL;
    (void)d;
    ibid_err err = check(cudaStreamEndCapture((cudaStream_t)s, &graph), "ending a graph");
    if (err) return err;
    ibid_device_graph *g = (ibid_device_graph *)calloc(1, sizeof *g);
    if (!g)
        err = ibid_fail(IBID_NOMEM, "no memory for a graph");
    else
        err = check(cudaGraphInstantiate(&g->exec, graph, 0), "readying a graph");
    (void)cudaGraphDestroy(graph);
    if (err)
        free(g);
    else
        *out = g;
    return err;
}

extern "C" ibid_err ibid_device_graph_launch(ibid_device *d, ibid_device_graph *g,
                                             ibidi_cu_stream s) {
    (void)d;
    return check(cudaGraphLaunch(g->exec, (cudaStream_t)s), "running a graph");
}

extern "C" void ibid_device_graph_close(ibid_device *d, ibid_device_graph *g) {
    (void)d;
    if (!g) return;
    (void)check(cudaGraphExecDestroy(g->exec), "closing a graph");
    free(g);
}

/* ---- The library's product ---- */

typedef struct product {
    cublasLtMatmulDesc_t how;
    cublasLtMatrixLayout_t w, h, y;
    cublasLtMatmulPreference_t want;
} product;

/* Column-major: y^T [rows, n] = w^T^T h^T, w^T [cols, rows] transposed. */
static ibid_err describe(product *p, size_t rows, size_t cols, size_t n, size_t ldy) {
    cublasOperation_t turn = CUBLAS_OP_T;
    size_t space = WORKSPACE;
    ibid_err err;
    if ((err = check_blas(cublasLtMatmulDescCreate(&p->how, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                          "product")) ||
        (err = check_blas(cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_TRANSA, &turn,
                                                         sizeof turn),
                          "product")) ||
        (err = check_blas(cublasLtMatrixLayoutCreate(&p->w, CUDA_R_16F, cols, rows, (int64_t)cols),
                          "product")) ||
        (err = check_blas(cublasLtMatrixLayoutCreate(&p->h, CUDA_R_16F, cols, n, (int64_t)cols),
                          "product")) ||
        (err = check_blas(cublasLtMatrixLayoutCreate(&p->y, CUDA_R_32F, rows, n, (int64_t)ldy),
                          "product")) ||
        (err = check_blas(cublasLtMatmulPreferenceCreate(&p->want), "product")) ||
        (err = check_blas(
             cublasLtMatmulPreferenceSetAttribute(p->want, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                  &space, sizeof space),
             "product")))
        return err;
    return IBID_OK;
}

extern "C" ibid_err ibid_device_matmul(ibid_device *d, ibidi_cu_stream s, const uint16_t *w,
                                       size_t rows, size_t cols, const uint16_t *h, size_t n,
                                       float *y, size_t ldy) {
    product p = {};
    cublasLtMatmulHeuristicResult_t best;
    float one = 1, zero = 0;
    int found = 0;
    ibid_err err = describe(&p, rows, cols, n, ldy);
    if (!err)
        err = check_blas(cublasLtMatmulAlgoGetHeuristic(d->blas, p.how, p.w, p.h, p.y, p.y, p.want,
                                                        1, &best, &found),
                         "choosing");
    if (!err && found == 0)
        err = ibid_fail(IBID_BACKEND, "cuBLASLt has no product of %zu x %zu with %zu rows", rows,
                        cols, n);
    if (!err)
        err = check_blas(cublasLtMatmul(d->blas, p.how, &one, w, p.w, h, p.h, &zero, y, p.y, y, p.y,
                                        &best.algo, d->workspace, WORKSPACE, (cudaStream_t)s),
                         "multiplying");
    if (p.want) (void)cublasLtMatmulPreferenceDestroy(p.want);
    if (p.w) (void)cublasLtMatrixLayoutDestroy(p.w);
    if (p.h) (void)cublasLtMatrixLayoutDestroy(p.h);
    if (p.y) (void)cublasLtMatrixLayoutDestroy(p.y);
    if (p.how) (void)cublasLtMatmulDescDestroy(p.how);
    return err;
}
