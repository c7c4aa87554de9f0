"""CPU kernels: numba, SIMD intrinsics, torch's OpenMP threads, and the cache of compiled code."""
