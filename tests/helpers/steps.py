"""Small training steps and batches."""

import torch
from helpers.common import BATCH

from fastbyol.build import build_model
from fastbyol.config import Config, DataConfig, ModelConfig, OptimConfig, StepConfig
from fastbyol.data import Batch
from fastbyol.step import TrainStep

CPU = torch.device("cpu")
SIZE = 32
MODEL = {"backbone": "resnet18", "width": 0.125, "hidden_dim": 32, "projection_dim": 16}


def new_step(
    *,
    backbone="resnet18",
    batch=BATCH,
    precision="fp32",
    optim=None,
    target_init="copy",
    layout=torch.channels_last,
    **step,
):
    """Return a TrainStep of a small network with a 100-step schedule without warmup."""
    model = MODEL if backbone == "resnet18" else MODEL | {"backbone": backbone, "width": 1}
    config = Config(
        precision=precision,
        data=DataConfig(batch_size=batch, image_size_px=SIZE),
        model=ModelConfig(**model, target_init=target_init),
        optim=OptimConfig(**{"epochs": 10, "warmup_epochs": 0, "base_lr": 2.0, "tau_base": 0.9} | (optim or {})),
        step=StepConfig(**step),
    )
    pair = build_model(config.model, SIZE, 0)
    pair = pair if layout is None else pair.to(memory_format=layout)
    return TrainStep(pair, config, 10, CPU)


def new_batch(k, batch=BATCH, dtype=torch.float32):
    """Return two noisy views of smooth images, which are learnable."""
    rng = torch.Generator().manual_seed(k)
    coarse = torch.randn(batch, 3, 4, 4, generator=rng).repeat_interleave(8, 2).repeat_interleave(8, 3)
    views = [coarse + 0.5 * torch.randn(batch, 3, SIZE, SIZE, generator=rng) for _ in range(2)]
    view1, view2 = (v.to(dtype=dtype, memory_format=torch.channels_last) for v in views)
    return Batch((view1, view2), torch.zeros(batch), torch.arange(batch))
