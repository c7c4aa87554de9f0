"""Functions of the public API: what the commands do, with a program's own images and backbone."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastbyol import data
from fastbyol.callbacks import Callback
from fastbyol.config import Config, DataConfig
from fastbyol.data import Images, Loader, Sources, find_images, open_split
from fastbyol.data.objects import as_images
from fastbyol.errors import InputError
from fastbyol.evaluation.embed import embed as write_features
from fastbyol.evaluation.online import online_callbacks
from fastbyol.evaluation.options import EVALUATIONS, EmbedConfig
from fastbyol.evaluation.run import evaluate as run_evaluation
from fastbyol.layers import set_num_views
from fastbyol.loop import RunResult, train_loop
from fastbyol.plugins import OBJECT, backbone_object
from fastbyol.trackers import configured_trackers
from fastbyol.weights import files
from fastbyol.weights.load import InitialWeights, load_checkpoint_model, open_backbone, with_init_settings

Backbone = nn.Module | Callable[..., nn.Module] | str


def train(
    config: Config | str | PathLike,
    callbacks: Sequence[Callback] = (),
    *,
    images: Any = None,
    val_images: Any = None,
    backbone: Backbone | None = None,
) -> RunResult:
    """Pre-train a backbone, as `fastbyol train` does, but without writing a report.

    Under torchrun, every rank calls this.

    Args:
        config: a config, the path of a YAML file, or the name of a shipped config.
        callbacks: hooks, called after fastbyol's own.
        images: training images instead of `config.data.root`: a path or URL, an `ImageSet`, a list
            of images or of (image, label), an array (N, H, W, 3), a torch Dataset or a Hugging Face
            dataset.
        val_images: labeled images for the online kNN, likewise; a path is the split itself.
        backbone: instead of `config.model.backbone`: a module (B, 3, H, W) -> (B, F), which is
            copied; a function that returns one; or a name of timm.

    Raises:
        InputError: the config does not fit the data, the machine or the checkpoint. Nothing was
            started.
        RunError: the run had to stop; the message names the last good checkpoint.
    """
    config = config if isinstance(config, Config) else Config.from_yaml(fspath(config))
    if isinstance(images, str | PathLike):
        config = replace(config, data=replace(config.data, root=fspath(images)))
        images = None
    sources = Sources(images, _split(val_images, "val_images"))
    with nullcontext(None) if backbone is None else backbone_object(backbone) as name:
        if name is not None:
            config = replace(config, model=replace(config.model, backbone=name))
        own = [InitialWeights(), *online_callbacks(config), *configured_trackers(config)]
        return train_loop(with_init_settings(config), [*own, *callbacks], sources)


def build_loader(
    images: Any,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Loader:
    """Return a loader of augmented views. It has a length, N // batch_size, and is iterable: every
    iteration is the next epoch. A batch is valid until the next one is requested.

    Args:
        images: as in `train`.
        seed: of the order and the views.
        device: where batches are delivered.
        dtype: of the views.
        options: fields of `DataConfig`, e.g. batch_size, image_size_px, augmentation, threads.

    Raises:
        InputError: there are fewer images than one batch, or an option does not suit them.
        BadSetting: an option is unknown or invalid. It is a ValueError.
    """
    config = DataConfig.build(options, "data")
    if config.batch_size == "auto":
        raise InputError("data.batch_size=auto: the loader alone does not know the network; give a number")
    found = find_images(config, "train", root=images, key="images")
    return data.build_loader(config, found, seed=seed, device=torch.device(device), dtype=dtype)


def load_backbone(run_or_file: str | PathLike, backbone: Backbone | None = None) -> nn.Module:
    """Return a trained backbone (B, 3, S, S) -> (B, F), in eval mode on the CPU, without heads.

    Args:
        run_or_file: a run's folder (its newest valid checkpoint), a checkpoint, a .safetensors file
            of `fastbyol export`, or a .pkl of BYOL's authors.
        backbone: for a run whose backbone was an object: the object, or a function that makes it.

    Raises:
        InputError: there is no valid checkpoint, or its network cannot be built.
    """
    path = Path(run_or_file)
    with _given_backbone(backbone):
        if path.suffix == files.SUFFIX and path.is_file():
            return open_backbone(path)
        model = load_checkpoint_model(path).model
        return set_num_views(model.online.backbone, 1).eval()


def embed(
    run: str | PathLike, images: Any, out: str | PathLike, *, backbone: Backbone | None = None, **options: Any
) -> Path:
    """Write the features of images into files, as `fastbyol embed`; return the folder.

    Args:
        run: a run's folder or a checkpoint.
        images: as in `train`; a path is a folder of images or of class folders, or a file.
        out: the folder to write. If it holds a part of the same features, the rest is added.
        backbone: as in `load_backbone`.
        options: fields of `EmbedConfig`, e.g. features, format, device.

    Raises:
        InputError, RunError: see `fastbyol.evaluation.embed.embed`.
    """
    is_path = isinstance(images, str | PathLike)
    names = {"run": fspath(run), "images": fspath(images) if is_path else "images", "out": fspath(out)}
    with _given_backbone(backbone):
        return write_features(EmbedConfig.build(names | options), None if is_path else as_images(images))


def evaluate(
    task: Literal["knn", "linear", "finetune", "fewshot", "robustness", "segmentation", "detection"],
    run: str | PathLike,
    *,
    images: Any = None,
    val_images: Any = None,
    backbone: Backbone | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a run, as `fastbyol eval TASK`; return the contents of the result file.

    Its entry "rows" has the metrics of the run's network, of an untrained one, and of raw pixels.

    Args:
        task: name of the protocol.
        run: a run's folder or a checkpoint.
        images, val_images: labeled images of both splits instead of the run's, as in `train`; a
            path is the split itself.
        backbone: as in `load_backbone`.
        options: the protocol's options, as on the command line, e.g. k, epochs, root, device.

    Raises:
        InputError, RunError: see `fastbyol.evaluation.run.evaluate`.
    """
    if task not in EVALUATIONS:
        raise InputError(f"{task!r} is no evaluation; one of {', '.join(EVALUATIONS)}")
    sources = Sources(_split(images, "images"), _split(val_images, "val_images"))
    with _given_backbone(backbone):
        return run_evaluation(task, EVALUATIONS[task].build({"run": fspath(run)} | options), sources)


def _split(images: Any, name: str) -> Images | None:
    """Return images of a split; None if there are none."""
    if images is None:
        return None
    return open_split(images, ".", key=name) if isinstance(images, str | PathLike) else as_images(images, name=name)


def _given_backbone(backbone: Backbone | None) -> Any:
    if isinstance(backbone, str):
        raise InputError(
            f"backbone={backbone!r}: the run names its backbone; give a module or function for {OBJECT} ones"
        )
    return nullcontext() if backbone is None else backbone_object(backbone)
