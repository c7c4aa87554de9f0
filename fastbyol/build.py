"""Config -> model, training step and loader: used by train, profile, bench and evaluation."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fastbyol.backbones import create_backbone
from fastbyol.batch_size import find_batch_size, global_batch_size
from fastbyol.config import Config, ModelConfig
from fastbyol.data import Batch, Images, Loader, Sources, build_loader, choose_backend, find_images
from fastbyol.errors import InputError, first_line
from fastbyol.kernels.cpu.jit_cache import compile_cpu_kernels
from fastbyol.layers import fuse_layers
from fastbyol.model import BYOL, Encoder, mlp
from fastbyol.runtime.device import seeded
from fastbyol.runtime.distributed import World
from fastbyol.runtime.logging import logger
from fastbyol.schedules import scaled_lr
from fastbyol.spans import WAIT, span
from fastbyol.step import TrainStep
from fastbyol.variants import BYOLVariant, departs_from_byol, linear_head, modify_layers


@dataclass
class Training:
    """The parts of a training, ready for the first step."""

    config: Config
    world: World
    device: torch.device
    images: Images
    model: BYOL
    step: TrainStep
    loader: Loader
    sources: Sources = Sources()  # noqa: RUF009 - immutable
    """Images that were given as objects."""

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, batch) for steps start .. stop - 1.

        Leaving the loop early stops the loader.
        """
        with closing(self.loader.batches(start, stop)) as batches:
            for step in range(start, stop):
                with span(WAIT):
                    batch = next(batches)
                yield step, batch

    def describe(self) -> str:
        """Return one line that says what runs where."""
        config, step = self.config, self.step
        return (
            f"{config.model.backbone} (width {config.model.width:g}) at {config.data.image_size_px} px, batch {config.data.batch_size} on "
            f"{self.world.size} x {self.device}, {str(step.dtype).removeprefix('torch.')}, step {step.mode} ({step.mode_reason}), "
            f"images by {choose_backend(config.data, self.images, self.device)[0]}"
        )


def build_training(
    config: Config, world: World, device: torch.device, images: Images, on_model: Callable[[BYOL], None] | None = None
) -> Training:
    """Build model, training step and loader. Every rank must call this.

    Args:
        config: data.batch_size must be a number, see `with_batch_size`.
        images: the training split.
        on_model: receives the model before it moves to the device.

    Raises:
        InputError: the config does not fit the data or the machine.
    """
    with world.sync_errors():
        model = build_model(config.model, config.data.image_size_px, config.seed)
        if on_model is not None:
            on_model(model)
        model = model.to(device=device, memory_format=torch.channels_last)
    with world.sync_errors():
        steps_per_epoch = max(Fraction(len(images), config.data.batch_size), Fraction(1))
        step = TrainStep(model, config, steps_per_epoch, device, world)
        loader = build_loader(
            config.data,
            images,
            seed=config.seed,
            device=device,
            dtype=step.dtype,
            shard=world.shard(config.data.batch_size, config.step.micro_batches),
        )
    return Training(config, world, device, images, model, step, loader)


def find_training_images(config: Config, world: World, source: Any = None) -> Images:
    """Return the training split. Every rank must call this.

    Args:
        source: replaces data.root, see `Sources`.

    Raises:
        InputError: see `find_images`.
    """
    key = "data.root" if source is None else "images"
    return world.first_on_machine(lambda: find_images(config.data, "train", root=source, key=key))


def with_batch_size(config: Config, images: Images, device: torch.device, world: World) -> Config:
    """Return the config with the batch size that data.batch_size=auto means.

    Every rank must call this.

    Raises:
        InputError: not even two images per rank and micro-batch fit, or the split is smaller.
    """
    if config.data.batch_size != "auto":
        return config
    with world.sync_errors():
        compile_cpu_kernels()  # the trial steps need them
        fits = find_batch_size(config, device, world, build_model(config.model, config.data.image_size_px, config.seed))
    with world.sync_errors():
        size = global_batch_size(fits, images, config, world)
    peak = scaled_lr(config.optim.base_lr, size)
    logger.info(f"data.batch_size=auto: {size}; the peak learning rate is {peak:.4g} (optim.base_lr * {size} / 256)")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))


def build_model(config: ModelConfig, image_size: int, seed: int) -> BYOL:
    """Return the pair in train mode, with weights drawn from `seed`. torch's global generator does
    not change.

    Raises:
        InputError: see `build_backbone`.
    """
    with seeded(seed):
        online = _build_encoder(config, image_size)
        predictor = _build_head(config.projection_dim, config)
        target = None
        if config.target == "ema":
            target = copy.deepcopy(online) if config.target_init == "copy" else _build_encoder(config, image_size)
    online, predictor = fuse_layers(online), fuse_layers(predictor)
    target = None if target is None else fuse_layers(target)
    if departs_from_byol(config):
        return BYOLVariant(online, target, predictor, config).train()
    return BYOL(online, target, predictor).train()


def build_backbone(config: ModelConfig, image_size: int) -> tuple[nn.Module, int]:
    """Return a backbone without classifier, and its number of features F.

    Raises:
        InputError: see `create_backbone`; or the image size does not suit the network.
    """
    backbone = create_backbone(config)
    modify_layers(backbone, config, "backbone")
    try:
        with torch.no_grad():
            output = backbone.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # RuntimeError, AssertionError, and whatever a user's network raises
        raise InputError(
            f"model.backbone={config.backbone} does not accept data.image_size_px={image_size}: {first_line(error)}"
        ) from None
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != 1:
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise InputError(
            f"model.backbone={config.backbone}: returns {shape} for one image; it must return features (1, F)"
        )
    return backbone.train(), output.shape[1]


def _build_encoder(config: ModelConfig, image_size: int) -> Encoder:
    backbone, features = build_backbone(config, image_size)
    return Encoder(backbone, _build_head(features, config))


def _build_head(inputs: int, config: ModelConfig) -> nn.Module:
    """Return the projector or the predictor."""
    if config.heads == "linear":
        head = linear_head(inputs, config.projection_dim)
    else:
        head = mlp(inputs, config.hidden_dim, config.projection_dim)
    return modify_layers(head, config, "a head")
