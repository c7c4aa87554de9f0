"""Evaluation of a checkpoint's backbone: one module per task, `run.py` runs them, `options.py` holds their settings.

Importing the package itself imports nothing, so that the command line can build its help without torch.
"""
