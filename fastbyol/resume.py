"""What a checkpoint holds of a run, and whether a run may continue from it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastbyol.build import Training
from fastbyol.callbacks import Callback
from fastbyol.config import Config, OptimConfig
from fastbyol.data import Images
from fastbyol.errors import InputError, first_line
from fastbyol.runtime import checkpoint
from fastbyol.runtime.logging import logger
from fastbyol.runtime.run_folder import Checkpoint
from fastbyol.schedules import Schedule

_MAX_DIFFERENCES = 3  # between two image sets that a message names
_ENTRIES = (
    "format",
    "version",
    "step",
    "config",
    "images",
    "files",
    "sample",
    "model",
    "optimizer",
    "loss_scale",
    "rng",
)
_MUST_NOT_CHANGE = ("optim.name", "data.batch_size", "data.image_size_px")
# Settings that change nothing of what is computed; they change silently.
_MAY_CHANGE = (
    *("resume", "runs", "name", "device", "init"),
    *("data.threads", "data.prefetch_batches", "data.timeout_s", "data.readers", "data.cache_dir", "data.cache_gb"),
    *("step.", "distributed.", "log.", "knn.", "probe.", "checkpoint."),
)


class ImageIdentity:
    """Fingerprint of an image set: tells it from other sets without reading all of it."""

    def __init__(self, images: Images) -> None:
        self.root, self.count = images.root, len(images)
        self.files, self.sample = images.fingerprint(), images.content_hashes()

    def state_dict(self) -> dict[str, Any]:
        """Return the entries of a checkpoint."""
        return {"images": self.count, "files": self.files, "sample": self.sample}

    def check_same(self, path: Path, state: dict[str, Any]) -> None:
        """Compare with the images of a checkpoint; log a warning if a few of them changed.

        Raises:
            InputError: the checkpoint was made on other images.
        """
        changes = _other_files(state, self.files, self.count)
        pairs = [pair for pair in zip(state.get("sample", []), self.sample, strict=False) if all(pair)]
        others = sum(before != now for before, now in pairs)
        if not changes and others > len(pairs) / 2:
            changes = "files of the same names hold other images"
        elif not changes and others:
            logger.warning(f"{others} of {len(pairs)} compared images have changed since the run began")
        if changes:
            raise InputError(
                f"checkpoint {path} was made on other images than those of {self.root}: {changes}; resume with the same "
                "images, or start a new run with another --name (--init loads the backbone)"
            )


def with_checkpoint_batch_size(config: Config, found: Checkpoint) -> Config:
    """Return the config; data.batch_size=auto means the checkpoint's batch size."""
    if config.data.batch_size != "auto":
        return config
    return replace(config, data=replace(config.data, batch_size=found[1]["config"]["data"]["batch_size"]))


def check_compatible(config: Config, identity: ImageIdentity, found: Checkpoint) -> None:
    """Check that a run may continue from a checkpoint; log changed settings.

    Raises:
        InputError: the model, the batch or the images differ.
    """
    path, state = found
    before = checkpoint.checkpoint_config(path, state)
    # Compare the value that a default means.
    ours = _flat(config.to_dict()) | {"optim.warmup_epochs": config.optim.warmup}
    theirs = _flat(Config.upgraded(state["config"])) | {"optim.warmup_epochs": before.optim.warmup}
    changed = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    for key in changed:
        if key.startswith("model.") or key in _MUST_NOT_CHANGE:
            raise InputError(
                f"checkpoint {path} was made with {key}={theirs[key]}, this run has {key}={ours[key]}: "
                "use the same value, or another --name"
            )
    identity.check_same(path, state)
    named = [f"{key} {theirs[key]} -> {ours[key]}" for key in changed if not key.startswith(_MAY_CHANGE)]
    if named:
        logger.warning(f"resumed with other settings than the run began with: {', '.join(named)}")


def check_callback_names(callbacks: Sequence[Callback]) -> None:
    """Check that no callback's state would replace another entry of a checkpoint.

    Raises:
        ValueError: two callbacks have the same name, or a callback has the name of an entry.
    """
    names = [callback.name for callback in callbacks if callback.name]
    for name in names:
        if name in _ENTRIES or names.count(name) > 1:
            raise ValueError(f"the name {name!r} of a callback is already used in checkpoints: choose another one")


def capture(training: Training, identity: ImageIdentity, callbacks: Sequence[Callback], done: int) -> dict[str, Any]:
    """Return everything that an exact resume needs, after `done` steps."""
    state = {
        "step": done,
        "config": training.config.to_dict(),
        **identity.state_dict(),
        "model": training.model.state_dict(),
        **training.step.state_dict(),
        "rng": _rng_state(),
        "knn": {},  # every checkpoint has this entry
    }
    return state | {callback.name: callback.state_dict() for callback in callbacks if callback.name}


def restore(training: Training, callbacks: Sequence[Callback], found: Checkpoint) -> int:
    """Load a checkpoint; return the number of steps done.

    Raises:
        InputError: it does not fit this model.
    """
    path, state = found
    try:
        training.model.load_state_dict(state["model"])
        if state["step"] and not state["optimizer"] and training.config.optim.momentum:
            raise ValueError("it holds no momenta")
        training.step.load_state_dict(state)
        for callback in callbacks:
            if state.get(callback.name):
                callback.load_state_dict(state[callback.name])
            elif callback.name:
                logger.info(f"checkpoint {path} has no state of {callback.name!r}: it starts from scratch")
        _set_rng_state(state["rng"])
        _log_new_schedule(training, checkpoint.checkpoint_config(path, state).optim, state["step"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path} does not fit this model: {first_line(error)}") from None
    return state["step"]


def _log_new_schedule(training: Training, before: OptimConfig, step: int) -> None:
    """Log what a changed number of epochs means for the learning rate and tau of the next step."""
    now = training.config.optim
    if (before.epochs, before.warmup) == (now.epochs, now.warmup):
        return
    new = training.step.schedule
    old = Schedule(before, training.config.data.batch_size, new.steps_per_epoch)
    logger.info(
        f"optim.epochs {before.epochs} -> {now.epochs}: the schedules span {now.epochs} epochs, so at step {step} the "
        f"learning rate is {new.lr(step):.4g} instead of {old.lr(step):.4g}, tau {new.tau(step):.4g} instead of "
        f"{old.tau(step):.4g}"
    )


def _other_files(state: dict[str, Any], ours: dict[str, list[int | str]], images: int) -> str:
    """Return how the files of an image set differ from a checkpoint's, "" if they are the same.

    Old checkpoints hold only the number of images.
    """
    theirs = state.get("files")
    if theirs is None:
        return "" if state["images"] == images else f"{images} images instead of {state['images']}"
    differences = []
    for name in sorted(theirs.keys() | ours.keys()):
        (before, digest), (now, other) = theirs.get(name, (0, "")), ours.get(name, (0, ""))
        where = f"class {name!r}" if name else "the split"
        if before != now:
            differences.append(f"{where} has {now} images instead of {before}")
        elif digest != other:
            differences.append(f"{where} has other files")
    if len(differences) > 1 and all(text.endswith("has other files") for text in differences):
        return "every class has other files (a folder and a .beton file made from it cannot be compared)"
    hidden = len(differences) - _MAX_DIFFERENCES
    return "; ".join(differences[:_MAX_DIFFERENCES]) + (f" (and {hidden} more differences)" if hidden > 0 else "")


def _rng_state() -> dict[str, Any]:
    """torch's generators. BYOL does not use them, but a backbone with dropout does."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """{"data": {"root": x}} -> {"data.root": x}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
