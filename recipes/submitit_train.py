"""Train on SLURM with submitit, and continue after time limits and preemptions.

    pip install submitit
    python recipes/submitit_train.py --config imagenet_r50_300ep_h100_8gpu --runs /shared/runs

The arguments are those of `fastbyol train`.
"""

import os
import subprocess
import sys

import submitit

NODES, GPUS = 1, 8
SAVE_S = 120  # seconds to finish the step and to save


class Training:
    """One torchrun per node.

    Args:
        words: the arguments of `fastbyol train`.
    """

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def __call__(self) -> None:
        """Run on each node.

        Raises:
            RuntimeError: torchrun failed.
        """
        job = submitit.JobEnvironment()
        command = ["torchrun", "--nnodes", str(NODES), "--nproc-per-node", str(GPUS), "--max-restarts", "3"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{job.hostnames[0]}:29500", "--rdzv-id", job.job_id]
        command += ["-m", "fastbyol", "train", *self._words, "--resume", "auto"]
        # submitit's signal may reach all processes of the job and would end torchrun at once.
        command = ["env", "--ignore-signal=USR2", *command]
        self._process = subprocess.Popen(command, env=os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_S)})
        if code := self._process.wait():
            raise RuntimeError(f"torchrun ended with exit code {code}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Save; return what to run when the job starts again. submitit calls this on its signal."""
        self._process.terminate()  # fastbyol finishes its step and saves
        # Not Popen.wait, which this signal has interrupted and which holds a lock.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Training(self._words))

    __submitit_checkpoint__ = checkpoint  # its name after submitit 1.5


if __name__ == "__main__":
    executor = submitit.AutoExecutor(folder="logs/%j")
    executor.update_parameters(
        name="byol",
        nodes=NODES,
        tasks_per_node=1,
        gpus_per_node=GPUS,
        cpus_per_task=96,
        timeout_min=24 * 60,
        slurm_signal_delay_s=SAVE_S + 30,
    )
    print("job", executor.submit(Training(sys.argv[1:])).job_id)
