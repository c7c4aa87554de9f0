"""What a run needs around the algorithm: processes, checkpoints, memory, logs, files, the
machine.
"""
