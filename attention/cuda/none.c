/* The device where this build has no CUDA toolkit: it is not there, and nothing else is ever called. */
#include "attention/cuda/device.h"

const char *ibid_device_library(void) {
    return "built without a CUDA toolkit";
}

ibid_err ibid_device_open(int number, ibid_device **out) {
    (void)number;
    (void)out;
    return ibid_fail(IBID_NOTSUP, "this build has no CUDA; build it where nvcc is found, or use the CPU");
}
