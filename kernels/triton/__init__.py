"""The Triton kernels, one file per file of `fastbyol.kernels` beside which it stands; imported where there is a GPU.

Triton comes with torch's CUDA builds alone, so nothing of `fastbyol.kernels` but `dispatch` and `report` imports these.
"""
