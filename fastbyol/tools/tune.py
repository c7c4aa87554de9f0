"""`fastbyol tune`: measure the 1x1 convolutions of a config again and print the choices."""

import torch

from fastbyol.build import build_model
from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.precision import compute_dtype
from fastbyol.runtime.device import choose_device, tune_device
from fastbyol.runtime.distributed import World
from fastbyol.runtime.logging import logger
from fastbyol.tuning import lines, tune


def tune_config(config: Config) -> None:
    """Measure all ways to compute each 1x1 convolution, keep the times for later runs, and print
    them.

    Raises:
        InputError: there is no GPU, the config does not train in 16 bits, or data.batch_size is
            auto.
    """
    device = choose_device(config.device)
    dtype = compute_dtype(config.precision, device)
    if device.type != "cuda":
        raise InputError("tune needs a GPU; on a CPU there is nothing to choose")
    if dtype.itemsize != 2:
        raise InputError(f"precision={config.precision}: tune measures 16-bit kernels; use bf16 or fp16")
    if config.data.batch_size == "auto":
        raise InputError("data.batch_size=auto: tune needs a number; `fastbyol train` prints the one it takes")
    tune_device(device)
    model = build_model(config.model, config.data.image_size_px, config.seed)
    backbone = model.online.backbone.to(device=device, memory_format=torch.channels_last)
    images = config.data.batch_size // config.step.micro_batches
    times = tune([backbone], images, config.data.image_size_px, device, dtype, World(), again=True)
    for line in lines(times):
        logger.info(line)
