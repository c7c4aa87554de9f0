"""What a run needs besides the algorithm: processes, checkpoints, memory, logs, files."""
