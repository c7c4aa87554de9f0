"""What the tests on a GPU share: the device, networks whose compiled code serves many tests, batches, and a corpus.

FASTBYOL_TEST_DEVICE=cpu rehearses on the CPU whatever does not need CUDA itself. Nothing optional is imported here.
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
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA itself: graphs, streams or its allocator")
BATCH, SIZE = (32, 64) if DEVICE.type == "cuda" else (8, 32)  # a CPU computes in float16 at a snail's pace
STEPS = 20  # of a whole schedule, of which two warm up
HEADS = {"hidden_dim": 64, "projection_dim": 32}
# At the peak. Small: early training doubles a difference every other step, the faster the higher the rate is.
LR = {"lars": 0.125, "sgd": 0.02, "adamw": 0.001}


class Network:
    """An online/target pair that many steps train in turn, each from the same weights: Dynamo then compiles it once per dtype."""

    def __init__(self, backbone: str, **model: Any) -> None:
        self.config = ModelConfig(backbone=backbone, **HEADS | model)
        self.model = build_model(self.config, SIZE, 0).to(device=DEVICE, memory_format=torch.channels_last)
        self._start = state_of(self.model)

    def step(
        self, mode: str, precision: str, *, optim: dict[str, Any] | None = None, batch: int = BATCH, **step: Any
    ) -> TrainStep:
        """A new step on the weights that the pair began with; an earlier step must not be used any more."""
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
            set_scale(made, 1024.0)  # the first one is too high for a small network
        return made


def new_batch(k: int, dtype: torch.dtype, images: int = BATCH) -> Batch:
    """Two noisy views of smooth images, so that there is something to learn; equal for equal k."""
    rng = torch.Generator().manual_seed(k)
    side = SIZE // 4
    coarse = torch.randn(images, 3, 4, 4, generator=rng).repeat_interleave(side, 2).repeat_interleave(side, 3)
    views = [coarse + 0.5 * torch.randn(images, 3, SIZE, SIZE, generator=rng) for _ in range(2)]
    view1, view2 = (v.to(DEVICE, dtype, memory_format=torch.channels_last) for v in views)
    return Batch((view1, view2), torch.zeros(images, device=DEVICE), torch.arange(images, device=DEVICE))


def run(step: TrainStep, steps: int, start: int = 0) -> list[float]:
    """Losses of steps start .. start + steps - 1."""
    return [float(step(k, new_batch(k, step.dtype)).loss) for k in range(start, start + steps)]


def set_scale(step: TrainStep, value: float) -> None:
    """In place, since a captured graph reads it there."""
    step.loss_scale.scale.fill_(value)
    step.loss_scale.inverse.fill_(1 / value)


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors by name."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def weights_of(module: torch.nn.Module) -> Tensor:
    """A copy of all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def through_a_file(state: Any) -> Any:
    """As a checkpoint has it when it is read: on the CPU."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Torch raises where the host would wait for the GPU; on a CPU nothing happens."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def stall() -> None:
    """Keeps the current stream busy for some 20 ms, in which the host goes on."""
    if DEVICE.type == "cuda":
        torch.cuda._sleep(40_000_000)


@contextmanager
def memory_limited_to(more: int) -> Iterator[None]:
    """Torch's allocator gives this process `more` bytes beyond what it holds now. cuBLAS has no workspaces yet, as in a new process."""
    torch._C._cuda_clearCublasWorkspaces()
    give_back_memory()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + more) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
        give_back_memory()


def give_back_memory() -> None:
    """Frees what nothing refers to, on the GPU too."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def write_corpus(root: Path, *, classes: int = 6, train: int = 12, val: int = 8, side: int = 80) -> Path:
    """ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg: noisy waves, of one direction and tint a class. So many images a class."""
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
