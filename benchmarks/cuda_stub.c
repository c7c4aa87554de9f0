/* As much of CUDA's runtime and driver as torch asks for while Inductor compiles for a GPU that is not there.

   benchmarks/cuda_bytes.py builds this file and preloads it: its cuda... functions stand before libcudart's, and torch takes it
   for libcuda.so.1. Nothing can be allocated or launched: every other call reaches the real libcudart, which finds no driver and
   says so. Never preload it on a machine with a GPU. Seen to suffice for torch 2.11 and 2.14 with CUDA 13. */

#include <string.h>

/* The device: number 0. */
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { (void)device; return 0; }

/* No context exists on it; torch asks before it goes back to a device. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { (void)device; *flags = *active = 0; return 0; }

/* For the stream objects of autograd. */
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }

/* cudaDeviceProp, of which torch's choice of a convolution reads the compute capability: int major at byte 360. */
int cudaGetDeviceProperties(void *properties, int device) {
    (void)device;
    memset(properties, 0, 364);
    *(int *)((char *)properties + 360) = 9;
    return 0;
}
