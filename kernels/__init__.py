"""The hot path's kernels. Every file holds, side by side, the formula, a plain torch `*_reference` and the kernels.

Nothing here imports the rest of fastbyol. Imported as `fastbyol.kernels`.
"""
