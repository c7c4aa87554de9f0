"""Experiment trackers: the callbacks that `log.trackers` names.

base         what the trackers have in common: continuing a run, failing
tensorboard  event files in the run's folder
wandb        Weights & Biases
mlflow       MLflow
trackio      Trackio

Settings of a service come from its own environment variables.
"""

from importlib.util import find_spec

from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.runtime.distributed import world_from_environment
from fastbyol.trackers.base import Tracker
from fastbyol.trackers.mlflow import MLflow
from fastbyol.trackers.tensorboard import TensorBoard
from fastbyol.trackers.trackio import Trackio
from fastbyol.trackers.wandb import Wandb

_TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def configured_trackers(config: Config) -> list[Tracker]:
    """Return the trackers of `log.trackers`. Only rank 0 has any, and needs their packages.

    Raises:
        InputError: a package is not installed.
    """
    if not world_from_environment().is_main_process:
        return []
    for name in config.log.trackers:
        # Each has the name of its package. A folder of this name, as W&B creates, has no origin.
        if (spec := find_spec(name)) is None or spec.origin is None:
            raise InputError(f"log.trackers={name}: {name} is not installed: pip install {name}")
    return [_TRACKERS[name]() for name in config.log.trackers]
