"""One BYOL training step on a batch that is already there: fastbyol against other people's loops, and against its bound.

    make bench-step                                       # in the peers' environment
    python benchmarks/bench_step.py --sets "R18 32 px, batch 4" --rounds 1 --only fastbyol "plain torch" --out /tmp/step.csv

The contenders take turns (A B C A B C ...). A turn builds its contender, does the warm-up steps, times the next ones and drops
everything again, so that one network at a time lies in memory. On a CPU a turn is a process of its own, since fastbyol tells malloc
to keep memory and its peers do not; on a GPU, where a process takes long to warm up, torch's switches that a contender sets
are set back before the next. A contender that raises is named and has no further turns. Every contender does all of an optimizer step (forward passes, loss, backward pass, weights,
target) on random views of its own dtype and memory format. On a GPU its queue is waited for before and after the timed calls, and
peers' float32 is torch's default there: convolutions in TF32, matrix products exact.

Contenders:
    fastbyol                        step.py as it runs by default on this device
    fastbyol eager fp32             its step in mode eager, precision fp32
    fastbyol eager, compile, cuda_graph
                                    its modes (--modes; cuda_graph on a GPU, eager where it is not the default)
    lightly                         the BYOL example of its documentation: views one by one, NegativeCosineSimilarity both ways,
                                    update_momentum, SGD; float32, NCHW. Heads as wide as ours (4096, 256)
    byol-pytorch                    the loop of its README: Adam, update_moving_average; both views as one batch (joint BatchNorm
                                    statistics), simplicial embeddings as by default. It augments inside the step: here it gets
                                    the identity for that, so that only the step is measured
    stable-pretraining              its BYOL module around a timm backbone: views one by one, its teacher update, SGD; float32, NCHW
    plain torch                     a loop of the usual kind: float32, NCHW, views one by one, torch's SGD, foreach EMA
    plain torch channels-last       the same with channels-last weights and views
    plain torch channels-last bf16  the same under bfloat16 autocast, with fused SGD and cuDNN's choice of the fastest algorithm
    plain torch compiled            the same with networks and loss under torch.compile: what one gets for one line more (by default on a GPU, with
                                    --modes on a CPU)
    supervised                      on a GPU: cross-entropy and fused SGD on the same backbone with torch.compile and its CUDA graphs,
                                    channels-last, bfloat16. One image costs it 3 units and BYOL 8: 3/8 of its rate is BYOL's bound

Writes benchmarks/results/step_DEVICE.csv, one row per set, round and contender, after every turn. The exit code is 1 where a contender
failed; one that the GPU's memory does not hold is left out and named.
"""

import argparse
import copy
import gc
import importlib.util
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
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from turns import LeftOut, Turns, one_line

from fastbyol.build import build_model
from fastbyol.config import Config, DataConfig, ModelConfig, OptimConfig, StepConfig
from fastbyol.data import Batch
from fastbyol.runtime import environment
from fastbyol.step import TrainStep
from fastbyol.tools.bench import BOUND, CLASSES, supervised_step

SETS = {
    "cpu": ["R18 96 px, batch 32", "R50 224 px, batch 8"],
    "cuda": ["R50 224 px, batch 256", "R50 224 px, batch 64"],
}
WARM_UP = {"cpu": 2, "cuda": 15}  # steps
REPEATS = {"cpu": 3, "cuda": 5}  # measurements of a turn; its row has their median
CALLS = {"cpu": 1, "cuda": 10}  # steps in a measurement
HIDDEN, PROJECTION, MOMENTUM = 4096, 256, 0.99
PACKAGES = {  # distributions of peers and their modules
    "lightly": "lightly",
    "byol-pytorch": "byol_pytorch",
    "stable-pretraining": "stable_pretraining",
}


@dataclass(frozen=True)
class Work:
    """What a step is done on: `batch` images (B) of `size` pixels (S), two views each."""

    backbone: str
    size: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Work":
        """From a set's name, e.g. 'R50 224 px, batch 8'."""
        match = re.fullmatch(r"R(\d+) (\d+) px, batch (\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r}: a set is named like 'R50 224 px, batch 8'")
        return cls(f"resnet{match[1]}", int(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"R{self.backbone.removeprefix('resnet')} {self.size} px, batch {self.batch}"


@dataclass(frozen=True)
class Trainer:
    """A contender's network and its step."""

    module: nn.Module
    step: Callable[[Tensor, Tensor], Tensor]  # two views (B, 3, S, S) -> loss; weights and target have moved
    dtype: torch.dtype = torch.float32  # of the views
    memory_format: torch.memory_format = torch.contiguous_format  # of the views


@dataclass(frozen=True)
class Prepared:
    """A zero-argument callable: one step of a trainer on its resident batch; returns the loss."""

    module: nn.Module
    run: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        """One step; the loss."""
        return self.run()


def fastbyol_step(work: Work, device: torch.device, precision: str = "auto", mode: str = "auto") -> TrainStep:
    """fastbyol's step, far enough from the ends of its schedules that no learning rate is 0."""
    config = Config(
        precision=precision,
        data=DataConfig(batch_size=work.batch, image_size_px=work.size),
        model=ModelConfig(backbone=work.backbone, hidden_dim=HIDDEN, projection_dim=PROJECTION),
        optim=OptimConfig(warmup_epochs=0),
        step=StepConfig(mode=mode),
    )
    model = build_model(config.model, work.size, config.seed).to(device=device, memory_format=torch.channels_last)
    return TrainStep(model, config, 10**6, device)


def fastbyol(work: Work, device: torch.device, precision: str = "auto", mode: str = "auto") -> Trainer:
    step = fastbyol_step(work, device, precision, mode)
    labels, indices = torch.full((work.batch,), -1), torch.arange(work.batch)
    done = 0

    def run(view1: Tensor, view2: Tensor) -> Tensor:
        nonlocal done
        done += 1
        return step(done - 1, Batch((view1, view2), labels, indices)).loss

    return Trainer(step.model, run, step.dtype, torch.channels_last)


class LightlyBYOL(nn.Module):
    """The module of lightly's example (docs.lightly.ai, examples/byol) around a backbone of F features, heads as wide as ours."""

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
        """Moves the target, then the loss of its documentation: half of what the paper sums."""
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
        loss = learner(view1)  # it makes both views of the batch itself
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


class PlainBYOL(nn.Module):
    """Online network, predictor and target as one writes them down from the paper."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        backbone = torchvision.models.get_model(work.backbone)
        features, backbone.fc = backbone.fc.in_features, nn.Identity()
        self.online = nn.Sequential(backbone, self.head(features))
        self.predictor = self.head(PROJECTION)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @staticmethod
    def head(features: int) -> nn.Sequential:
        """Projector or predictor."""
        return nn.Sequential(
            nn.Linear(features, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PROJECTION, bias=False)
        )

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """The loss of two views (B, 3, S, S)."""
        q1, q2 = self.predictor(self.online(view1)), self.predictor(self.online(view2))
        with torch.no_grad():
            t1, t2 = self.target(view1), self.target(view2)
        cosines = F.cosine_similarity(q1.float(), t2.float()) + F.cosine_similarity(q2.float(), t1.float())
        return (4 - 2 * cosines).mean()


def plain_torch(
    work: Work,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
    *,
    tuned: bool = False,
    compiled: bool = False,
) -> Trainer:
    """`tuned` takes the switches that cost nothing: fused SGD and cuDNN's search for the fastest algorithm."""
    torch.backends.cudnn.benchmark |= tuned
    model = PlainBYOL(work).to(device=device, memory_format=memory_format)
    loss_of = torch.compile(model) if compiled else model
    weights, targets = list(model.online.parameters()), list(model.target.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.03, momentum=0.9, fused=tuned or None)

    def step(view1: Tensor, view2: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(view1, view2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(targets, weights, 1 - MOMENTUM)
        return loss.detach()

    return Trainer(model, step, dtype, memory_format)


def supervised(work: Work, device: torch.device) -> Trainer:
    """`fastbyol bench`'s step of timm's network as it is; uses one view."""
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
    "supervised": supervised,
}


def defaults(device: torch.device, modes: bool) -> list[str]:
    """The contenders of a plain run on this device."""
    left_out = set() if modes else {"fastbyol eager", "fastbyol compile", "fastbyol cuda_graph"}
    if device.type == "cpu":
        left_out |= {"fastbyol eager", "fastbyol cuda_graph", "supervised"}
        left_out |= set() if modes else {"plain torch compiled"}
    return [name for name in CONTENDERS if name not in left_out]


def is_installed(contender: str) -> bool:
    """Whether the peer behind a contender can be imported; all that needs no peer can."""
    return contender not in PACKAGES or importlib.util.find_spec(PACKAGES[contender]) is not None


def prepare(contender: str, work: Work, device: torch.device) -> Prepared:
    """Builds a contender and its batch."""
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
def own_turn(device: torch.device) -> Iterator[None]:
    """Afterwards nothing of a contender is left: memory, compiled code, torch's process-wide switches."""
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
    """Milliseconds per step, one value per measurement, after the warm-up."""

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


def turn(contender: str, work: Work, device: torch.device, round_: int) -> dict[str, Any]:
    """One row.

    Raises:
        LeftOut: the contender raised something; the traceback has been printed.
    """
    with own_turn(device):
        values, why = [], None
        try:
            values = timed_ms(prepare(contender, work, device), device)
        except torch.cuda.OutOfMemoryError:
            why = LeftOut("it does not fit into the GPU's memory", failed=False)
        except Exception as error:  # whatever it is, the next contender has its turn
            traceback.print_exc()
            why = LeftOut(one_line(error))
        if why is not None:  # out here the exception no longer holds the contender's memory
            raise why
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
    """`turn` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(turn, *arguments).result()
        except BrokenProcessPool:
            raise LeftOut("its process died") from None


def with_bound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds 3/8 of the supervised rate of the same set and round, and BYOL's share of it."""
    rates = {(r["set"], r["round"]): float(r["images_per_s"]) for r in rows if r["contender"] == "supervised"}
    for row in rows:
        rate = rates.get((row["set"], row["round"]))
        known = rate is not None and row["contender"] != "supervised"
        row["bound_images_per_s"] = f"{BOUND * rate:.1f}" if known else ""
        row["share_of_bound"] = f"{float(row['images_per_s']) / (BOUND * rate):.3f}" if known else ""
    return rows


def machine() -> dict[str, str]:
    """Machine, versions and commit of every row; the load before the first measurement should be near 0."""
    facts = environment.describe()
    names = ("fastbyol", "cpu", "gpu", "python", "torch", "torchvision", "timm", "numba", "triton")
    peers = {name: environment.installed(name) or "" for name in PACKAGES}
    state = {"threads": str(torch.get_num_threads()), "load_before": f"{os.getloadavg()[0]:.2f}"}
    return {name: facts.get(name, "") for name in names} | state | peers


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Medians and ranges, and how many times as long as fastbyol's step, within the same round."""
    for name in dict.fromkeys(row["set"] for row in rows):
        print(name)
        times = results_csv.by_round([row for row in rows if row["set"] == name], "ms")
        for contender, ms in times.items():
            ratios = results_csv.ratios(ms, times.get("fastbyol", {}))
            ratio = f"{results_csv.spread(ratios, 2)} times fastbyol's" if ratios else ""
            print(f"  {contender:<32} {results_csv.spread(list(ms.values()), 1):>26} ms  {ratio}")
        shares = [
            float(r["share_of_bound"])
            for r in rows
            if (r["set"], r["contender"]) == (name, "fastbyol")
            if r["share_of_bound"]
        ]
        if shares:
            print(f"  fastbyol's share of 3/8 of the supervised rate: {results_csv.spread(shares, 2)}")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"],
        help="where it runs",
    )
    options.add_argument(
        "--sets", nargs="+", type=Work.parse, help=f"by default {SETS}; any ResNet, size and batch will do"
    )
    options.add_argument("--rounds", type=int, default=5, help="how often every contender has its turn")
    options.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="these contenders alone")
    options.add_argument(
        "--modes",
        action="store_true",
        help="fastbyol's other modes too: compile, on a GPU eager and cuda_graph; on a CPU plain torch compiled as well",
    )
    options.add_argument("--out", type=Path, help="by default benchmarks/results/step_DEVICE.csv")
    return options


def device_of(name: str) -> torch.device:
    """The device, or the end with one line where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        parser().exit(2, "error: --device cuda: torch sees no CUDA device here\n")
    return torch.device(name)


def main() -> int:
    args = parser().parse_args()
    device = device_of(args.device)
    names = args.only or defaults(device, args.modes)
    for name in names:
        if not is_installed(name):
            print(f"{name} is not installed here and is left out: make bench-setup")
    names = [name for name in names if is_installed(name)]
    facts = machine()
    measure = in_own_process if device.type == "cpu" else turn
    out = args.out or results_csv.FOLDER / f"step_{device.type}.csv"
    turns = Turns(out, lambda rows: [row | facts for row in with_bound(rows)])
    for round_ in range(args.rounds):
        for work in args.sets or [Work.parse(text) for text in SETS[device.type]]:
            for name in names:
                row = turns.take((work, name), f"{work}: {name}", partial(measure, name, work, device, round_))
                if row is not None:
                    print(f"round {round_}  {work}  {name:<32} {float(row['ms']):9.1f} ms", flush=True)
    print_summary(turns.rows)
    return turns.end()


if __name__ == "__main__":
    sys.exit(main())
