"""Pre-training: config -> loader, model and step -> loop -> checkpoints.

    loader -> step -> callbacks -> log -> checkpoint

Read run.py (what surrounds a step), build.py (what a run consists of) and step.py (one step) next.
"""

import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbyol.callbacks import Callback
from fastbyol.config import Config
from fastbyol.data import Sources
from fastbyol.run import build_run
from fastbyol.runtime.cores import respect_quota
from fastbyol.runtime.device import choose_device
from fastbyol.runtime.distributed import ProcessGroup, StopConsensus, world_from_environment
from fastbyol.runtime.files import read_json_or
from fastbyol.runtime.logging import muted
from fastbyol.runtime.run_files import SUMMARY
from fastbyol.runtime.run_folder import open_run_folder
from fastbyol.runtime.run_log import EarlyRecords, read_metrics
from fastbyol.runtime.signals import StopSignals


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    step: int  # optimizer steps done
    total_steps: int
    is_main_process: bool
    stopped_by: signal.Signals | None  # the signal that ended it early
    already_finished: bool = False  # there was nothing to do
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Content of summary.json: loss, images_per_s, knn_last, knn_best, rank_me, ..."""

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl of all attempts: training steps (kind "train"), and
        evaluations ("knn", "quality", "probe").
        """
        return read_metrics(self.folder)


def train_loop(config: Config, callbacks: Sequence[Callback] = (), sources: Sources = Sources()) -> RunResult:  # noqa: B008
    """Pre-train a backbone. Everything is written under config.runs/config.name.

    Initial weights, evaluations and trackers of the config are callbacks, which this function does
    not add.

    Under torchrun, every rank calls this; rank 0 writes and logs.

    Args:
        callbacks: hooks, called in this order.
        sources: images that replace the splits of data.root.

    Raises:
        InputError: the config does not fit the data, the machine or the checkpoint. Nothing was
            started.
        RunError: the run had to stop; the message names the last good checkpoint.
    """
    respect_quota()
    world = world_from_environment()
    device = choose_device(config.device, world.local_rank)
    # Signals are handled until the process group is closed: torchrun sends SIGTERM to ranks that
    # lost a peer.
    with ExitStack() as stack, ProcessGroup(world, config.distributed, device):
        stack.enter_context(muted(not world.is_main_process))
        early = stack.enter_context(EarlyRecords())
        folder = stack.enter_context(open_run_folder(config, world))
        with world.sync_errors():
            finished = folder.finished_step(config)
        if (done := world.gather(finished)[0]) is not None:  # as rank 0 sees it: all ranks leave or none
            folder.log_finished(config)
            metrics = read_json_or(folder.path / SUMMARY)
            return RunResult(
                folder.path, done, done, world.is_main_process, None, already_finished=True, metrics=metrics
            )
        run = build_run(config, world, device, folder, callbacks, sources)
        stop = stack.enter_context(StopSignals())
        done, total = run.start, run.step.total_steps
        with (
            closing(run.step),
            run.open_log(early) as log,
            run.errors_to_callbacks(),
            run.user_facing_errors(),
            StopConsensus(world) as consensus,
            closing(run.training.batches(run.start, total)) as batches,
        ):
            run.announce()
            run.start_callbacks()
            for step, batch in batches:
                output = run.first_step(step, batch) if step == run.start else run.step(step, batch)
                for callback in callbacks:
                    callback.on_step(run, batch, output)
                done = step + 1
                log.advance(done)
                if done % config.log.log_every_steps == 0 or done == total:
                    run.log_step(step, output)
                if run.step.schedule.ends_epoch(done):
                    run.end_of_epoch(done)
                if consensus.agree(stop.received is not None):
                    break
            run.save(done)
            metrics = world.gather(run.summarize(done))[0]
    stopped_by = (stop.received or signal.SIGTERM) if done < total else None  # another rank may have received it
    return RunResult(folder.path, done, total, world.is_main_process, stopped_by, metrics=metrics)
