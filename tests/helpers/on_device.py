"""Shared helpers of the GPU tests: device, networks that are compiled once, batches and a corpus.

FASTBYOL_TEST_DEVICE=cpu runs the tests that need no CUDA on the CPU. This module imports no
optional dependencies.
"""

import gc
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from torch import Tensor

from fastbyol.build import build_model
from fastbyol.config import Config, DataConfig, ModelConfig, OptimConfig, StepConfig
from fastbyol.data import Batch
from fastbyol.step import TrainStep

DEVICE = torch.device("cpu") if os.environ.get("FASTBYOL_TEST_DEVICE") == "cpu" else torch.device("cuda", 0)
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA graphs, streams or the CUDA allocator")
BATCH, SIZE = (32, 64) if DEVICE.type == "cuda" else (8, 32)  # float16 is very slow on a CPU
STEPS = 20  # of the schedule, including 2 warmup steps
HEADS = {"hidden_dim": 64, "projection_dim": 32}
# Peak learning rates. They are small because early training doubles rounding differences every
# other step, and faster at higher rates.
LR = {"lars": 0.125, "sgd": 0.02, "adamw": 0.001}


class Network:
    """BYOL model whose steps all start from the same weights; Dynamo compiles it once per dtype."""

    def __init__(self, backbone: str, **model: Any) -> None:
        self.config = ModelConfig(backbone=backbone, **HEADS | model)
        self.model = build_model(self.config, SIZE, 0).to(device=DEVICE, memory_format=torch.channels_last)
        self._start = state_of(self.model)

    def step(
        self, mode: str, precision: str, *, optim: dict[str, Any] | None = None, batch: int = BATCH, **step: Any
    ) -> TrainStep:
        """Return a new step on the initial weights; this invalidates earlier steps."""
        schedule = {"name": "lars", "epochs": STEPS, "warmup_epochs": 2, "tau_base": 0.9} | (optim or {})
        schedule = {"base_lr": LR[schedule["name"]] * 256 / batch} | schedule
        config = Config(
            precision=precision,
            data=DataConfig(batch_size=batch, image_size_px=SIZE),
            model=self.config,
            optim=OptimConfig(**schedule),
            step=StepConfig(mode=mode, **step),
        )
        self.model.load_state_dict(self._start)
        made = TrainStep(self.model, config, 1, DEVICE)
        if made.loss_scale is not None:
            set_scale(made, 1024.0)  # the default initial scale is too high for a small network
        return made


def new_batch(k: int, dtype: torch.dtype, images: int = BATCH) -> Batch:
    """Return two noisy views of smooth images, which are learnable; deterministic in `k`."""
    rng = torch.Generator().manual_seed(k)
    side = SIZE // 4
    coarse = torch.randn(images, 3, 4, 4, generator=rng).repeat_interleave(side, 2).repeat_interleave(side, 3)
    views = [coarse + 0.5 * torch.randn(images, 3, SIZE, SIZE, generator=rng) for _ in range(2)]
    view1, view2 = (v.to(DEVICE, dtype, memory_format=torch.channels_last) for v in views)
    return Batch((view1, view2), torch.zeros(images, device=DEVICE), torch.arange(images, device=DEVICE))


def run(step: TrainStep, steps: int, start: int = 0) -> list[float]:
    """Return the losses of steps `start` to `start + steps - 1`."""
    return [float(step(k, new_batch(k, step.dtype)).loss) for k in range(start, start + steps)]


def set_scale(step: TrainStep, value: float) -> None:
    """Set the loss scale in place, since a captured graph reads it from the same address."""
    step.loss_scale.scale.fill_(value)
    step.loss_scale.inverse.fill_(1 / value)


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of all tensors by name."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def weights_of(module: torch.nn.Module) -> Tensor:
    """Return a copy of all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def save_and_load(state: Any) -> Any:
    """Save and load the state, as a checkpoint does; the result is on the CPU."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Raise an error if the host synchronizes with the GPU; no effect on a CPU."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def stall() -> None:
    """Keep the current stream busy for about 20 ms without blocking the host."""
    if DEVICE.type == "cuda":
        torch.cuda._sleep(40_000_000)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Limit torch's allocator to `more` bytes above the current usage.

    Frees cuBLAS's workspaces first, to match a new process.
    """
    torch._C._cuda_clearCublasWorkspaces()
    release_memory()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + more) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
        release_memory()


def release_memory() -> None:
    """Collect garbage and empty the CUDA cache."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def write_corpus(root: Path, *, classes: int = 6, train: int = 12, val: int = 8, side: int = 80) -> Path:
    """Write ROOT/{train,val}/CLASS/*.jpg, noisy waves with one direction and tint per class.

    Args:
        root: folder of the corpus.
        classes: number of classes.
        train: training images per class.
        val: validation images per class.
        side: height of the images in pixels.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, : side + 10] / side
    for split, count in (("train", train), ("val", val)):
        for k in range(classes):
            folder = root / split / f"class{k}"
            folder.mkdir(parents=True)
            angle, tint = np.pi * k / classes, np.roll([1.0, 0.7, 0.4], k)
            for i in range(count):
                wave = np.sin(2 * np.pi * (4 * (np.cos(angle) * x + np.sin(angle) * y) + rng.random()))
                image = 128 + 90 * wave[..., None] * tint + rng.normal(0, 15, (*x.shape, 3))
                pixels = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
                content = simplejpeg.encode_jpeg(pixels, quality=92, colorsubsampling="420")
                (folder / f"{i:03d}.jpg").write_bytes(content)
    return root
