"""Triton kernels for GPUs, one file per operation, named like its file in `fastbyol.kernels`.

Only torch's CUDA builds include Triton, so `fastbyol.kernels` imports these modules lazily, when a
GPU needs them.
"""
