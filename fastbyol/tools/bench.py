"""`fastbyol bench`: time the loader, the step and both together, and compare the step with its
bound and with BYOL in plain PyTorch.

Interleaves all measurements in one process; ratios are within a round. The bound is 3/8 of the
images/s of a supervised step with the same backbone, precision and mode: an image costs 3 forward
passes of one view there (forward, and backward twice as much), and 8 in BYOL (two views through the
online network, forward and backward, and through the target). The supervised step gets as many
images as BYOL has views, so that its convolutions are as large. Its network is timm's with torch's
own BatchNorm and convolutions, so that the bound does not depend on our layers. Where they are
faster than torch's, as on a CPU, the step can exceed its bound. BYOL in plain PyTorch
(references.py) has the same backbone, heads, precision and mode.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.build import Training, build_backbone
from fastbyol.config import Config
from fastbyol.data import Batch, choose_backend, native
from fastbyol.data.views import VIEWS
from fastbyol.errors import InputError
from fastbyol.runtime import environment
from fastbyol.runtime.device import seeded
from fastbyol.runtime.files import check_output, write_json
from fastbyol.runtime.logging import logger
from fastbyol.tools.instruments import Loop, open_training
from fastbyol.tools.profiling import loader_threads
from fastbyol.tools.references import CLASSES, PlainBYOL, graphs_mode, plain_step, supervised_step
from fastbyol.tools.roofline import count_step, measure_peaks

BOUND = 3 / 8
_NEAR = 0.9  # share of a bound above which no setting is worth a change


def bench(config: Config, *, rounds: int, steps: int, out: Path | None) -> dict[str, Any]:
    """Measure a config and report which part limits it.

    Under torchrun every rank calls this, and rates are of all ranks together. The supervised step
    exchanges no gradients.

    Args:
        rounds: repetitions of each measurement.
        steps: per repetition.
        out: JSON file to write.

    Returns:
        The content of the file.

    Raises:
        InputError: the config does not fit the data or the machine, or `out` cannot be written.
        RunError: writing `out` failed after the measurement.
    """
    for name, value in (("rounds", rounds), ("steps", steps)):
        if value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")

    def check() -> None:
        if out is not None:
            check_output(out, f"--out {out}")

    with open_training(config, check) as training:
        measured = _measure(training, rounds, steps)
    result: dict[str, Any] = {"what": training.describe(), "rounds": rounds, "steps": steps}
    result |= {"images_per_s": measured} | _ratios(measured)
    result["limit"] = limit(result, training.device)
    result["advice"] = advice(result, training)
    result |= {"config": training.config.to_dict(), "environment": environment.describe()}
    if training.world.is_main_process:
        if out is not None:
            result["rates"] = _rates(training, median(measured["step"]))
            write_json(out, result, f"--out {out}")
        for line in lines(result):
            logger.info(line)
    return result


def _measure(training: Training, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return images/s of every measurement, per round."""
    batch = training.config.data.batch_size
    loop = Loop(training)
    try:
        loop.warm_up()
        cached = loop.cached_batch()
        images = torch.cat(cached.views)
        model = _supervised(training).to(device=images.device, memory_format=torch.channels_last)
        step = supervised_step(model, len(images), images.device, training.step.dtype, training.step.mode)
        measurements = {
            "loader": (loop.skip, training.config.data.prefetch_batches + 1),
            "step": (lambda: loop.step(cached), 2),
            "supervised": (lambda: step(images), 2),
            "whole": (loop, training.config.data.prefetch_batches + 1),
        }
        for call, _ in measurements.values():  # compile everything before the first round
            loop.timed(2, call)
        try:
            call = _plain_call(training, cached)
            loop.timed(2, call)
            measurements["plain"] = call, 2
        except torch.OutOfMemoryError:
            logger.warning("BYOL in plain PyTorch is not measured: it does not fit into memory beside the others")
        found: dict[str, list[float]] = {name: [] for name in measurements}
        for _ in range(rounds):
            for name, (call, before) in measurements.items():
                loop.timed(before, call)  # use up what was prefetched during the measurement before
                images_a_call = batch * (VIEWS if name == "supervised" else 1)
                found[name].append(steps * images_a_call / loop.timed(steps, call))
        return found
    finally:
        loop.close()


def _supervised(training: Training) -> nn.Module:
    """Return timm's unmodified backbone with a classifier; the config's seed draws the weights."""
    with seeded(training.config.seed):
        backbone, features = build_backbone(training.config.model, training.config.data.image_size_px)
        return nn.Sequential(backbone, nn.Linear(features, CLASSES))


def _plain(training: Training) -> PlainBYOL:
    """Return plain BYOL with timm's unmodified backbone and the config's heads."""
    model = training.config.model
    with seeded(training.config.seed):
        backbone, features = build_backbone(model, training.config.data.image_size_px)
        return PlainBYOL(backbone, features, model.hidden_dim, model.projection_dim)


def _plain_call(training: Training, batch: Batch) -> Callable[[], Tensor]:
    """Return a call of one step of plain BYOL on `batch`."""
    device, mode = training.device, training.step.mode
    model = _plain(training).to(device=device, memory_format=torch.channels_last)
    step = plain_step(model, device, training.step.dtype, compiled=mode != "eager", mode=graphs_mode(device))
    return lambda: step(*batch.views)


def _rates(training: Training, step_images_per_s: float) -> dict[str, Any]:
    """Return the rates of this machine for `fastbyol plan --rates`."""
    images = training.config.data.batch_size // training.world.size
    peaks = measure_peaks(training.device, training.step.dtype)
    counted = count_step(training.config, images, training.step.dtype)
    roofline_s = sum(work.roofline_s(peaks) for work in counted.values())
    threads = loader_threads(training) or {}
    return {
        "peaks": asdict(peaks),
        "efficiency": roofline_s * step_images_per_s / training.config.data.batch_size,
        "loader_ms": {name: ms for name, ms in threads.items() if name != "read"},
        "image_size_px": training.config.data.image_size_px,
        "cores": native.resolve_threads(0),
        "device": training.device.type,
        "dtype": str(training.step.dtype).removeprefix("torch."),
    }


def _ratios(measured: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the ratios per round."""
    columns = list(zip(*(measured[name] for name in ("loader", "step", "supervised", "whole")), strict=True))
    ratios = {
        "step_over_bound": [step / (BOUND * supervised) for _, step, supervised, _ in columns],
        "whole_over_step": [whole / step for _, step, _, whole in columns],
        "whole_over_loader": [whole / loader for loader, _, _, whole in columns],
    }
    if "plain" in measured:
        ratios["step_over_plain"] = [a / b for a, b in zip(measured["step"], measured["plain"], strict=True)]
    return ratios


def limit(result: dict[str, Any], device: torch.device) -> str:
    """Return what limits the training: "loader", "step", or "cores" if both share the CPU cores."""
    loader, step = (median(result["images_per_s"][name]) for name in ("loader", "step"))
    if device.type == "cpu":
        return "cores"
    return "loader" if loader < step else "step"


def advice(result: dict[str, Any], training: Training) -> str:
    """Return one line that says what to change first."""
    rates = {name: median(values) for name, values in result["images_per_s"].items()}
    config, device = training.config, training.device
    share = median(result["step_over_bound"])
    if result["limit"] == "cores":
        loading = 1 - median(result["whole_over_step"])
        if loading > 1 - _NEAR:
            return f"the loader takes {loading:.0%} of the cores' time: {_faster_loader(training)}"
        return f"the step is {1 - loading:.0%} of the time and reaches {share:.0%} of its bound: {_faster_step(training, share)}"
    if result["limit"] == "loader":
        if choose_backend(config.data, training.images, device)[0] == "native":
            threads = native.resolve_threads(config.data.threads)
            needed = math.ceil(threads * rates["step"] / rates["loader"])
            return (
                f"the step could process {rates['step']:.0f} images/s, which needs about {needed} loader threads on as many cores "
                f"(now {threads}); {_faster_loader(training)}"
            )
        return f"the step could process {rates['step']:.0f} images/s: {_faster_loader(training)}"
    if median(result["whole_over_step"]) < _NEAR:
        return "loader and step are fast enough separately but compete for cores: lower data.threads to leave a core for the step"
    return f"the step limits, at {share:.0%} of its bound: {_faster_step(training, share)}"


def _faster_loader(training: Training) -> str:
    """Return the first remedy that the config does not use yet."""
    data = training.config.data
    backend = choose_backend(data, training.images, training.device)[0]
    if training.device.type == "cuda" and backend != "dali":
        return "data.backend=dali decodes and augments on the GPU"
    if not data.dct_scaling and backend == "native":
        return "data.dct_scaling=true decodes large JPEGs at a reduced size, and `fastbyol pack --max-side` makes the files smaller"
    return "`fastbyol pack` with --max-side of about 1.3 times data.image_size_px, or with --mode raw, leaves less to decode"


def _faster_step(training: Training, share: float) -> str:
    config, step = training.config, training.step
    if config.precision in ("fp32", "tf32"):
        return f"precision={config.precision} computes in 32 bits; precision=auto uses 16 bits if the hardware supports them"
    if training.device.type == "cuda" and step.mode == "eager":
        return "step.mode=compile fuses element-wise operators"
    if config.step.activation_checkpointing:
        return "step.activation_checkpointing computes the first stages twice; set it to 0 if memory allows"
    if share < _NEAR and training.device.type == "cuda" and step.mode == "compile" and training.world.size == 1:
        return "step.mode=cuda_graph removes the host's launch time; a larger data.batch_size hides it"
    return "no setting makes it faster; only a smaller model.backbone or data.image_size_px does"


def lines(result: dict[str, Any]) -> list[str]:
    """Return the result as text."""
    rates = result["images_per_s"]
    titles = {
        "loader": "loader only",
        "step": "step only, cached batch",
        "whole": "training",
        "supervised": "supervised step, same backbone",
        "plain": "BYOL step in plain PyTorch",
    }
    text = [f"{titles[name]:<40}{_spread(rates[name], 1):>32} images/s" for name in titles if name in rates]
    bound = [BOUND * rate for rate in rates["supervised"]]
    text.append(f"{'bound of the step: 3/8 of supervised':<40}{_spread(bound, 1):>32} images/s")
    for key, title in (
        ("step_over_bound", "step / bound"),
        ("whole_over_step", "whole / step"),
        ("whole_over_loader", "whole / loader"),
        ("step_over_plain", "step / plain PyTorch"),
    ):
        if key in result:
            text.append(f"{title:<40}{_spread(result[key], 3):>32}")
    return [*text, f"limit: {result['limit']}; {result['advice']}"]


def _spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
