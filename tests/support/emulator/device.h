/* The device that runs on the CPU, and how tests make it fail. */
#ifndef IBID_TEST_EMULATOR_DEVICE_H
#define IBID_TEST_EMULATOR_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
/* The device's memory; allocations beyond it fail. 0: a gigabyte. */
void ibidi_emulator_memory(size_t bytes);
size_t ibidi_emulator_in_use(void); /* bytes allocated now */
/* The nth call from now on that can fail, does (1: the next one); 0: none. lost: the device is gone
 * with it until it is opened again. */
void ibidi_emulator_fail_at(uint64_t nth, bool lost);
uint64_t ibidi_emulator_failing(void); /* calls until then, 0 if it has failed */
uint64_t ibidi_emulator_uploaded(void); /* bytes so far */
/* 0: threads in order; else shuffled by this seed, and anew at each barrier. */
void ibidi_emulator_order(uint64_t seed);
#ifdef __cplusplus
}
#endif
#endif
