"""Evaluation of a checkpoint's backbone. One module per task; start reading at run.py.

The package imports nothing itself, so that options.py can be imported without torch.
"""
