"""Load the model of a checkpoint."""

from pathlib import Path
from typing import NamedTuple

from fastbyol.build import build_model
from fastbyol.config import Config
from fastbyol.errors import InputError, first_line
from fastbyol.model import BYOL
from fastbyol.runtime import checkpoint


class LoadedCheckpoint(NamedTuple):
    """A checkpoint's file and contents."""

    path: Path
    config: Config  # of the run that wrote it
    model: BYOL
    step: int  # optimizer steps done


def load_checkpoint_model(run_or_file: Path) -> LoadedCheckpoint:
    """Load a checkpoint file, or the newest valid checkpoint of a run's folder.

    Newer, damaged checkpoints are logged.

    Raises:
        InputError: no valid checkpoint, or this version does not know its config or model.
    """
    path, state = checkpoint.resolve(run_or_file)
    config = checkpoint.checkpoint_config(path, state)
    try:
        model = build_model(config.model, config.data.image_size_px, config.seed)
        model.load_state_dict(state["model"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"checkpoint {path} cannot be used: {first_line(error)}") from None
    return LoadedCheckpoint(path, config, model, state["step"])
