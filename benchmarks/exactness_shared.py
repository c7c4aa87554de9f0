"""What the comparisons of exactness.py share: the authors' modules, layouts, names and rows."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import haiku as hk
import jax
import numpy as np
import skimage.data
import sklearn.datasets
import torch

from fastbyol.weights.authors import network_tensors

NORM = {"decay_rate": 0.9, "eps": 1e-5, "create_scale": True, "create_offset": True}
"""Arguments of their BatchNorms."""
Row = dict[str, Any]


def import_authors(folder: Path) -> SimpleNamespace:
    """Import the authors' modules with stand-ins for what is missing."""
    for name in ("acme", "acme.jax", "acme.jax.utils", "tensorflow_datasets"):
        sys.modules[name] = ModuleType(name)
    sys.modules["acme.jax"].utils = sys.modules["acme.jax.utils"]
    sys.modules["tensorflow_datasets"].Split = None  # an annotation
    jax.tree_map = jax.tree_multimap = jax.tree.map
    sys.path.insert(0, str(folder))
    names = ("networks", "augmentations", "optimizers", "schedules", "helpers", "dataset")
    modules = {name: importlib.import_module(f"byol.utils.{name}") for name in names}
    modules["experiment"] = importlib.import_module("byol.byol_experiment")
    return SimpleNamespace(**modules, get_config=importlib.import_module("byol.configs.byol").get_config)


def compare(part: str, compared: str, ours: Any, theirs: Any, *, rounding: Any = None) -> Row:
    """Return the row of two arrays, or of two lists of arrays; `rounding`: theirs in float64."""

    def flat(values: Any) -> np.ndarray:
        arrays = values if isinstance(values, list | tuple) else [values]
        return np.concatenate([np.asarray(a.detach() if torch.is_tensor(a) else a, np.float64).ravel() for a in arrays])

    ours, theirs = flat(ours), flat(theirs)
    difference = np.abs(ours - theirs)
    row = {
        "part": part,
        "compared": compared,
        "error": f"{difference.max():.3g}",
        "mean_error": f"{difference.mean():.3g}",
        "magnitude": f"{np.abs(theirs).max():.3g}",
        "n": len(theirs),
        "differ": "",
        "rounding": "" if rounding is None else f"{np.abs(flat(rounding) - theirs).max():.3g}",
    }
    print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
    return row


def compare_boxes(part: str, compared: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    """Return the row of crop boxes (n, 4) in pixels."""
    row = compare(part, compared, ours, theirs)
    row |= {"n": len(theirs), "differ": int((np.asarray(ours) != theirs).any(1).sum())}
    print(f"  {row['differ']} of {row['n']} differ")
    return row


def photographs() -> dict[str, bytes]:
    """Return the JPEGs that scikit-image and scikit-learn bring along."""
    folders = Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"
    return {path.name: path.read_bytes() for folder in folders for path in sorted(folder.glob("*.jpg"))}


def normal(seed: int, *shape: int, mean: float = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


def in_float64(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args) with all floating-point arrays in float64."""

    def widen(x: Any) -> Any:
        return np.asarray(x, np.float64) if np.issubdtype(np.asarray(x).dtype, np.floating) else np.asarray(x)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*jax.tree.map(widen, args)))


def transform(function: Callable[..., Any]) -> hk.TransformedWithState:
    return hk.without_apply_rng(hk.transform_with_state(function))


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def to_torch(params: Any, state: Any = None, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return their parameters (or gradients) and moving averages by our names, in torch's layout.

    Only the modules whose names start with `prefix`, which is removed.
    """
    trees = (jax.tree.map(np.asarray, dict(tree or {})) for tree in (params, state))
    found = network_tensors(*trees)
    return {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}


def compare_tensors(part: str, compared: str, ours: Any, theirs: Any, exact: Any = None) -> Row:
    """Return the row of dicts of tensors, each divided by the largest value of theirs.

    Biases before a BatchNorm are left out: their gradients are zero but for rounding.
    """
    names = [name for name in theirs if not re.search(r"(^|projector\.|predictor\.)0\.bias", name)]
    scale = {name: theirs[name].abs().max() for name in names}
    ours, theirs, exact = (
        None if values is None else [values[name] / scale[name] for name in names] for values in (ours, theirs, exact)
    )
    return compare(part, f"{compared}; of each tensor's largest", ours, theirs, rounding=exact)
