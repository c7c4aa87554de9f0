"""Time one BYOL training step on a cached batch: fastbyol, other libraries, and the bound.

    make bench-step                                       # in the environment with all peers
    python benchmarks/bench_step.py --rounds 1 --only fastbyol "plain torch" --out /tmp/step.csv

A step consists of the forward passes, loss, backward pass, and updates of weights and target, on
random views in each contender's dtype and memory format. Rounds are interleaved (A B C A B C ...).
Each measurement builds the contender, warms up, times the next steps and frees everything. On a CPU
it runs in its own process, because fastbyol configures malloc to keep memory. On a GPU, where a new
process is slow to warm up, torch's global switches are restored instead, and the queue is
synchronized before and after timing. Float32 of the peers is PyTorch's default: on a GPU, TF32 for
convolutions and exact matrix products.

Contenders:
    fastbyol                        the step with the defaults of this device
    fastbyol eager fp32             step.mode=eager, precision=fp32
    fastbyol eager, compile, cuda_graph
                                    other values of step.mode (with --modes; cuda_graph on a GPU
                                    only)
    fastbyol cudnn                  step.conv1x1=cudnn (on a GPU)
    lightly                         the BYOL example in its documentation, with heads as wide as
                                    ours (4096, 256): separate forward passes per view, symmetric
                                    NegativeCosineSimilarity, update_momentum, SGD; float32, NCHW
    byol-pytorch                    the loop in its README: Adam, update_moving_average, both views
                                    in one batch (joint BatchNorm statistics), simplicial embeddings
                                    by default. Its augmentation inside the step is replaced by the
                                    identity
    stable-pretraining              its BYOL module around a timm backbone: separate views, its
                                    teacher update, SGD; float32, NCHW
    plain torch                     a typical PyTorch loop: float32, NCHW, separate views, torch's
                                    SGD, foreach EMA
    plain torch channels-last       the same with channels-last weights and views
    plain torch channels-last bf16  the same with bfloat16 autocast, fused SGD and cuDNN's autotuner
    plain torch compiled            the same with network and loss under torch.compile (on a CPU
                                    with --modes)
    plain torch compiled graphs     the same with torch.compile's mode reduce-overhead: CUDA graphs
                                    of forward and backward pass (on a GPU)
    supervised                      on a GPU: cross-entropy and fused SGD on the same backbone with
                                    torch.compile and CUDA graphs, channels-last, bfloat16. An image
                                    costs 3 units here and 8 in BYOL, so 3/8 of this throughput is
                                    the bound of BYOL

Writes benchmarks/results/step_DEVICE.csv after every measurement, one row per workload, round and
contender. The exit code is 1 if a contender failed. Contenders that exceed the GPU's memory are
skipped.
"""

import argparse
import copy
import gc
import importlib.util
import itertools
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import results_csv
import timm
import torch
import torchvision
from runner import Runner, Skipped, error_summary
from torch import Tensor, nn

from fastbyol.build import build_model
from fastbyol.config import Config, DataConfig, ModelConfig, OptimConfig, StepConfig
from fastbyol.data import Batch
from fastbyol.runtime import environment
from fastbyol.step import TrainStep
from fastbyol.tools.bench import BOUND
from fastbyol.tools.references import CLASSES, PlainBYOL, plain_step, supervised_step

SETS = {
    "cpu": ["R18 96 px, batch 32", "R50 224 px, batch 8"],
    "cuda": ["R50 224 px, batch 256", "R50 224 px, batch 64"],
}
WARM_UP = {"cpu": 2, "cuda": 15}  # steps
REPEATS = {"cpu": 3, "cuda": 5}  # timings per row, which contains their median
CALLS = {"cpu": 1, "cuda": 10}  # steps per timing
HIDDEN, PROJECTION, MOMENTUM = 4096, 256, 0.99
PACKAGES = {  # peers: distribution -> module
    "lightly": "lightly",
    "byol-pytorch": "byol_pytorch",
    "stable-pretraining": "stable_pretraining",
}


@dataclass(frozen=True)
class Work:
    """Workload of a step: a ResNet, and `batch` images (B) of `size` pixels (S), two views each."""

    backbone: str
    size: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Work":
        """Parse a name such as 'R50 224 px, batch 8'."""
        match = re.fullmatch(r"R(\d+) (\d+) px, batch (\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a workload such as 'R50 224 px, batch 8'")
        return cls(f"resnet{match[1]}", int(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"R{self.backbone.removeprefix('resnet')} {self.size} px, batch {self.batch}"


@dataclass(frozen=True)
class Trainer:
    """A contender's network and training step."""

    module: nn.Module
    step: Callable[[Tensor, Tensor], Tensor]  # views (B, 3, S, S) -> loss; updates all weights
    dtype: torch.dtype = torch.float32  # of the views
    memory_format: torch.memory_format = torch.contiguous_format  # of the views


@dataclass(frozen=True)
class Prepared:
    """A training step bound to a cached batch; calling it runs one step."""

    module: nn.Module
    run: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        """Run one step and return the loss."""
        return self.run()


def fastbyol_step(
    work: Work, device: torch.device, precision: str = "auto", mode: str = "auto", conv1x1: str = "auto"
) -> TrainStep:
    """Build fastbyol's step in the middle of its schedules, where the learning rate is not 0."""
    config = Config(
        precision=precision,
        data=DataConfig(batch_size=work.batch, image_size_px=work.size),
        model=ModelConfig(backbone=work.backbone, hidden_dim=HIDDEN, projection_dim=PROJECTION),
        optim=OptimConfig(warmup_epochs=0),
        step=StepConfig(mode=mode, conv1x1=conv1x1),
    )
    model = build_model(config.model, work.size, config.seed).to(device=device, memory_format=torch.channels_last)
    return TrainStep(model, config, 10**6, device)


def fastbyol(
    work: Work, device: torch.device, precision: str = "auto", mode: str = "auto", conv1x1: str = "auto"
) -> Trainer:
    step = fastbyol_step(work, device, precision, mode, conv1x1)
    labels, indices = torch.full((work.batch,), -1), torch.arange(work.batch)
    counter = itertools.count()

    def run(view1: Tensor, view2: Tensor) -> Tensor:
        return step(next(counter), Batch((view1, view2), labels, indices)).loss

    return Trainer(step.model, run, step.dtype, torch.channels_last)


class LightlyBYOL(nn.Module):
    """The module of lightly's example (docs.lightly.ai, examples/byol)."""

    def __init__(self, backbone: nn.Module, features: int, hidden: int = HIDDEN, projection: int = PROJECTION) -> None:
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        self.backbone, self.criterion = backbone, NegativeCosineSimilarity()
        self.projection_head = BYOLProjectionHead(features, hidden, projection)
        self.prediction_head = BYOLPredictionHead(projection, hidden, projection)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> predictions (B, D)."""
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> the target's projections (B, D)."""
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()

    def loss(self, view1: Tensor, view2: Tensor, decay: float) -> Tensor:
        """Update the target and return the loss of the example, which is half of the paper's."""
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, m=decay)
        update_momentum(self.projection_head, self.projection_head_momentum, m=decay)
        p1, z1 = self(view1), self.forward_momentum(view1)
        p2, z2 = self(view2), self.forward_momentum(view2)
        return 0.5 * (self.criterion(p1, z2) + self.criterion(p2, z1))


def lightly(work: Work, device: torch.device) -> Trainer:
    resnet = torchvision.models.get_model(work.backbone)
    model = LightlyBYOL(nn.Sequential(*list(resnet.children())[:-1]), resnet.fc.in_features).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def step(view1: Tensor, view2: Tensor) -> Tensor:
        loss = model.loss(view1, view2, MOMENTUM)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Trainer(model, step)


def byol_pytorch(work: Work, device: torch.device) -> Trainer:
    from byol_pytorch import BYOL

    resnet = torchvision.models.get_model(work.backbone).to(device)
    learner = BYOL(resnet, image_size=work.size, hidden_layer="avgpool", augment_fn=nn.Identity())
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-4)

    def step(view1: Tensor, view2: Tensor) -> Tensor:
        loss = learner(view1)  # creates both views itself
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
        return loss.detach()

    return Trainer(learner, step)


def stable_pretraining(work: Work, device: torch.device) -> Trainer:
    from stable_pretraining.methods.byol import BYOL

    model = BYOL(work.backbone, (HIDDEN, PROJECTION), (HIDDEN, PROJECTION), ema_decay_start=MOMENTUM).to(device).train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.03, momentum=0.9)

    def step(view1: Tensor, view2: Tensor) -> Tensor:
        loss = model(view1, view2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.backbone.update_teacher()
        model.projector.update_teacher()
        return loss.detach()

    return Trainer(model, step)


def plain_byol(work: Work) -> PlainBYOL:
    """Return plain BYOL with torchvision's backbone."""
    backbone = torchvision.models.get_model(work.backbone)
    features, backbone.fc = backbone.fc.in_features, nn.Identity()
    return PlainBYOL(backbone, features, HIDDEN, PROJECTION)


def plain_torch(
    work: Work,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
    *,
    tuned: bool = False,
    compiled: bool = False,
    mode: str | None = None,
) -> Trainer:
    """Build a plain PyTorch loop.

    Args:
        tuned: use fused SGD and cuDNN's autotuner.
        compiled: compile the model with torch.compile's `mode`.
    """
    torch.backends.cudnn.benchmark |= tuned
    model = plain_byol(work).to(device=device, memory_format=memory_format)
    step = plain_step(model, device, dtype, compiled=compiled, mode=mode, fused=tuned or None)
    return Trainer(model, step, dtype, memory_format)


def supervised(work: Work, device: torch.device) -> Trainer:
    """Build the supervised step of `fastbyol bench` with timm's network; uses one view."""
    torch.backends.cudnn.benchmark = True
    model = timm.create_model(work.backbone, num_classes=CLASSES).to(device=device, memory_format=torch.channels_last)
    mode = "compile" if device.type == "cuda" else "eager"
    step = supervised_step(model, work.batch, device, torch.bfloat16, mode)
    return Trainer(model, lambda view1, view2: step(view1), torch.bfloat16, torch.channels_last)


CONTENDERS: dict[str, Callable[[Work, torch.device], Trainer]] = {
    "fastbyol": fastbyol,
    "fastbyol eager fp32": lambda work, device: fastbyol(work, device, "fp32", "eager"),
    "fastbyol eager": lambda work, device: fastbyol(work, device, mode="eager"),
    "fastbyol compile": lambda work, device: fastbyol(work, device, mode="compile"),
    "fastbyol cuda_graph": lambda work, device: fastbyol(work, device, mode="cuda_graph"),
    "fastbyol cudnn": lambda work, device: fastbyol(work, device, conv1x1="cudnn"),
    "lightly": lightly,
    "byol-pytorch": byol_pytorch,
    "stable-pretraining": stable_pretraining,
    "plain torch": plain_torch,
    "plain torch channels-last": lambda work, device: plain_torch(work, device, torch.channels_last),
    "plain torch channels-last bf16": lambda work, device: plain_torch(
        work, device, torch.channels_last, torch.bfloat16, tuned=True
    ),
    "plain torch compiled": lambda work, device: plain_torch(
        work, device, torch.channels_last, torch.bfloat16, tuned=True, compiled=True
    ),
    "plain torch compiled graphs": lambda work, device: plain_torch(
        work, device, torch.channels_last, torch.bfloat16, tuned=True, compiled=True, mode="reduce-overhead"
    ),
    "supervised": supervised,
}


def defaults(device: torch.device, modes: bool) -> list[str]:
    """Return the contenders that run on a device by default, or with --modes."""
    excluded = set() if modes else {"fastbyol eager", "fastbyol compile", "fastbyol cuda_graph"}
    if device.type == "cpu":
        excluded |= {"fastbyol eager", "fastbyol cuda_graph", "fastbyol cudnn"}
        excluded |= {"plain torch compiled graphs", "supervised"}
        excluded |= set() if modes else {"plain torch compiled"}
    return [name for name in CONTENDERS if name not in excluded]


def is_installed(contender: str) -> bool:
    """Return True if the package that a contender needs, if any, is installed."""
    return contender not in PACKAGES or importlib.util.find_spec(PACKAGES[contender]) is not None


def prepare(contender: str, work: Work, device: torch.device) -> Prepared:
    """Build a contender and its cached batch."""
    torch.manual_seed(0)
    trainer = CONTENDERS[contender](work, device)
    view1, view2 = (
        torch.randn(work.batch, 3, work.size, work.size, device=device)
        .to(trainer.dtype)
        .contiguous(memory_format=trainer.memory_format)
        for _ in range(2)
    )
    return Prepared(trainer.module, lambda: trainer.step(view1, view2))


_SWITCHES = (
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
)


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Context: on exit, free memory and compiled code, and restore torch's global switches."""
    before = [getattr(owner, name) for owner, name in _SWITCHES]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        for (owner, name), value in zip(_SWITCHES, before, strict=True):
            if getattr(owner, name) != value:
                setattr(owner, name, value)
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def timed_ms(step: Callable[[], Tensor], device: torch.device) -> list[float]:
    """Return REPEATS timings in milliseconds per step, after the warm-up."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP[device.type]):
        step()
    values = []
    for _ in range(REPEATS[device.type]):
        synchronize()
        began = time.perf_counter()
        for _ in range(CALLS[device.type]):
            step()
        synchronize()
        values.append(1e3 * (time.perf_counter() - began) / CALLS[device.type])
    return values


def measure(contender: str, work: Work, device: torch.device, round_: int) -> dict[str, Any]:
    """Measure a contender once and return its row.

    Raises:
        Skipped: The contender raised an exception. Its traceback is printed.
    """
    with isolated(device):
        values, skipped = [], None
        try:
            values = timed_ms(prepare(contender, work, device), device)
        except torch.cuda.OutOfMemoryError:
            skipped = Skipped("out of GPU memory", failed=False)
        except Exception as error:  # the other contenders are measured nevertheless
            traceback.print_exc()
            skipped = Skipped(error_summary(error))
        if skipped is not None:  # the first exception no longer holds the contender's memory here
            raise skipped
        peak = f"{torch.cuda.max_memory_reserved() / 2**30:.2f}" if device.type == "cuda" else ""
    ms = median(values)
    return {
        "set": str(work),
        "round": round_,
        "contender": contender,
        "ms": f"{ms:.3f}",
        "n": len(values) * CALLS[device.type],
        "images_per_s": f"{1e3 * work.batch / ms:.2f}",
        "gpu_peak_gib": peak,
    }


def in_own_process(*arguments: Any) -> dict[str, Any]:
    """Call `measure` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(measure, *arguments).result()
        except BrokenProcessPool:
            raise Skipped("the process died") from None


def with_bound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the bound, 3/8 of the supervised throughput in the same round, and the share of it."""
    rates = {(r["set"], r["round"]): float(r["images_per_s"]) for r in rows if r["contender"] == "supervised"}
    for row in rows:
        rate = rates.get((row["set"], row["round"]))
        known = rate is not None and row["contender"] != "supervised"
        row["bound_images_per_s"] = f"{BOUND * rate:.1f}" if known else ""
        row["share_of_bound"] = f"{float(row['images_per_s']) / (BOUND * rate):.3f}" if known else ""
    return rows


def machine() -> dict[str, str]:
    """Return the columns on machine, versions and commit. load_before should be near 0."""
    facts = environment.describe()
    names = ("fastbyol", "cpu", "gpu", "python", "torch", "torchvision", "timm", "numba", "triton")
    peers = {name: environment.installed(name) or "" for name in PACKAGES}
    state = {"threads": str(torch.get_num_threads()), "load_before": f"{os.getloadavg()[0]:.2f}"}
    return {name: facts.get(name, "") for name in names} | state | peers


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print medians and ranges, and slowdowns relative to fastbyol within each round."""
    for name in dict.fromkeys(row["set"] for row in rows):
        print(name)
        times = results_csv.by_round([row for row in rows if row["set"] == name], "ms")
        for contender, ms in times.items():
            ratios = results_csv.ratios(ms, times.get("fastbyol", {}))
            ratio = f"slowdown {results_csv.spread(ratios, 2)}" if ratios else ""
            print(f"  {contender:<32} {results_csv.spread(list(ms.values()), 1):>26} ms  {ratio}")
        shares = [
            float(r["share_of_bound"])
            for r in rows
            if (r["set"], r["contender"]) == (name, "fastbyol")
            if r["share_of_bound"]
        ]
        if shares:
            print(f"  fastbyol / bound (3/8 of supervised): {results_csv.spread(shares, 2)}")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"],
        help="default: cuda if available",
    )
    options.add_argument(
        "--sets", nargs="+", type=Work.parse, help=f"workloads: any ResNet, size and batch (default: {SETS})"
    )
    options.add_argument("--rounds", type=int, default=5, help="measurements of every contender")
    options.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="measure only these contenders")
    options.add_argument(
        "--modes",
        action="store_true",
        help="add fastbyol's other step modes, and on a CPU plain torch compiled",
    )
    options.add_argument("--out", type=Path, help="default: benchmarks/results/step_DEVICE.csv")
    return options


def device_of(name: str) -> torch.device:
    """Return the device, or exit with an error if it is not available."""
    if name == "cuda" and not torch.cuda.is_available():
        parser().exit(2, "error: --device cuda: torch sees no CUDA device here\n")
    return torch.device(name)


def main() -> int:
    args = parser().parse_args()
    device = device_of(args.device)
    names = args.only or defaults(device, args.modes)
    for name in names:
        if not is_installed(name):
            print(f"{name} is not installed and is skipped: make bench-setup")
    names = [name for name in names if is_installed(name)]
    facts = machine()
    function = in_own_process if device.type == "cpu" else measure
    out = args.out or results_csv.FOLDER / f"step_{device.type}.csv"
    runner = Runner(out, lambda rows: [row | facts for row in with_bound(rows)])
    for round_ in range(args.rounds):
        for work in args.sets or [Work.parse(text) for text in SETS[device.type]]:
            for name in names:
                row = runner.measure((work, name), f"{work}: {name}", partial(function, name, work, device, round_))
                if row is not None:
                    print(f"round {round_}  {work}  {name:<32} {float(row['ms']):9.1f} ms", flush=True)
    print_summary(runner.rows)
    return runner.finish()


if __name__ == "__main__":
    sys.exit(main())
