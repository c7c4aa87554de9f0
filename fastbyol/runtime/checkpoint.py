"""Checkpoints: written atomically, verified on load, readable by torch.load(weights_only=True).

A checkpoint is a dict of plain values and tensors:

    format, version
    step        optimizer steps done
    config      nested dict
    images      number of training images; files and sample identify them, see resume.py
    model       state dict with plain names
    optimizer   state by parameter name; loss_scale with float16
    rng         torch's generators
    knn, ...    state of the callbacks, by name

A file is a zip archive with a CRC-32 per member. `load` checks all of them before it uses a value.
"""

import errno
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastbyol import __version__
from fastbyol.config import Config
from fastbyol.errors import InputError, RunError, error_reason, first_line
from fastbyol.runtime.files import atomic_write
from fastbyol.runtime.logging import logger

FORMAT = 1
BEST = "best.pt"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"step_(\d{8})\.pt")
_MOST_STEPS = 10**15
_KEYS = {
    "format": int,
    "step": int,
    "config": dict,
    "images": int,
    "model": dict,
    "optimizer": dict,
    "rng": dict,
    "knn": dict,
}


def save(folder: Path, state: dict[str, Any], *, keep_last: int, best: bool) -> Path:
    """Write FOLDER/step_XXXXXXXX.pt (temporary file, fsync, rename), then delete old checkpoints.

    Args:
        state: the dict described above, without format and version.
        keep_last: number of newest checkpoints to keep.
        best: also keep this one as FOLDER/best.pt.

    Raises:
        RunError: it cannot be written, for example because the disk is full. Older checkpoints are
            not touched.
    """
    path = folder / f"step_{state['step']:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.partial"):  # from a process killed while writing
            if not leftover.is_dir():
                leftover.unlink()
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": __version__, **state}, file)
        if best:
            _link(path, folder / BEST)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's writer turns a failed write into a RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        older = list_checkpoints(folder)
        keep = f"the last good checkpoint is {older[-1]}" if older else "there is no older checkpoint"
        remedy = "free some space and resume" if getattr(cause, "errno", None) in _FULL else "fix that and resume"
        raise RunError(f"checkpoint {path} could not be written ({error_reason(cause)}); {keep}; {remedy}") from None
    # Later checkpoints are damaged: the run continues from before them.
    for old in [old for old in list_checkpoints(folder) if old.name <= path.name][:-keep_last]:
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint. Tensors are on the CPU.

    Raises:
        InputError: the file is missing, damaged, not a fastbyol checkpoint, of another format, or
            holds more than plain data.
    """
    where = f"checkpoint {path}"
    state = read_archive(path, where)
    if any(not isinstance(state.get(key), kind) for key, kind in _KEYS.items()):
        raise InputError(f"{where} is not one of fastbyol's")
    if state["format"] != FORMAT:
        raise InputError(f"{where} has format {state['format']}, this version reads format {FORMAT}")
    if (fault := _fault(state)) is not None:
        raise InputError(f"{where} is damaged: {fault}")
    return state


def read_archive(path: Path, where: str) -> dict[str, Any]:
    """Read a dict that torch.save wrote, and verify its checksums. Tensors are on the CPU.

    Args:
        where: how messages name the file.

    Raises:
        InputError: the file is missing or damaged, or holds more than plain data.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{where} is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:
                raise InputError(f"{where} is damaged: {member} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error_reason(error)}") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError):
        raise InputError(f"{where} is damaged or not a checkpoint") from None
    except pickle.UnpicklingError:
        raise InputError(f"{where} is refused: it holds code, not only data") from None
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{where} is damaged or not a checkpoint: {first_line(error)}") from None
    if not isinstance(state, dict):
        raise InputError(f"{where} is not one of fastbyol's")
    return state


def _fault(state: dict[str, Any]) -> str | None:
    """Return what is wrong with the values of a checkpoint, None if they are valid."""
    if not 0 <= state["step"] < _MOST_STEPS:
        return f"its step is {state['step']}"
    files, sample = state.get("files", {}), state.get("sample", [])
    named = isinstance(files, dict) and all(isinstance(name, str) and _is_entry(e) for name, e in files.items())
    sampled = isinstance(sample, list) and all(isinstance(digest, str) for digest in sample)
    if not (named and sampled and state["images"] >= 1):
        return "it does not say what images it was made on"
    if not all(isinstance(values, dict) for values in state["optimizer"].values()):
        return "its optimizer state is not one dict per parameter"
    return None


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and list(map(type, entry)) == [int, str]


def checkpoint_config(path: Path, state: dict[str, Any]) -> Config:
    """Return the config of the run that wrote a checkpoint.

    Renamed settings have their current names.

    Raises:
        InputError: this version does not know a setting or value.
    """
    if missing := {"data", "model", "optim"} - state["config"].keys():
        raise InputError(f"checkpoint {path} cannot be used: its config has no {min(missing)}")
    try:
        return Config.from_dict(state["config"])
    except ValueError as error:
        raise InputError(f"checkpoint {path} cannot be used: {first_line(error)}") from None


def checkpoint_step(path: Path) -> int:
    """Return the optimizer steps done, from the name of a numbered checkpoint."""
    return int(path.stem.removeprefix("step_"))


def run_folder_of(path: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to, or the checkpoint's own folder."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the numbered checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*.pt") if _NAME.fullmatch(p.name))


def latest_valid(folder: Path, warn: Callable[[str], object] = logger.warning) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest valid checkpoint, None without one.

    `warn` receives one line for each newer, damaged one.
    """
    found = list_checkpoints(folder)
    while found:
        try:
            return found[-1], load(found[-1])
        except InputError as error:
            found.pop()
            warn(f"{error}; trying the one before" if found else str(error))
    return None


def resolve(run_or_file: Path, warn: Callable[[str], object] = logger.warning) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint of a file, or the newest valid one of a run's folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if run_or_file.is_dir():
        for folder in (run_or_file / "checkpoints", run_or_file):
            if (found := latest_valid(folder, warn)) is not None:
                return found
        best = run_or_file / "checkpoints" / BEST
        hint = f"; {best} is there" if best.exists() else ""
        raise InputError(f"{run_or_file}: no usable checkpoint in {run_or_file / 'checkpoints'}{hint}")
    return run_or_file, load(run_or_file)


def _link(path: Path, link: Path) -> None:
    """Make `link` a hard link to `path`, atomically; a copy on file systems without them."""
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        temporary.write_bytes(path.read_bytes())
    os.replace(temporary, link)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
