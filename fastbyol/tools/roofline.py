"""Work of a training step, counted on the meta device, and the peak rates of the device at hand.

Counted for every operator in eager mode: floating-point operations of convolutions and matrix
products (a multiplication and an addition are two), and bytes (every operand and result once).
BatchNorm and max-pool count the passes of their CPU kernels (those of a GPU move less), the update
of weights and target the formula of its optimizer. A compiler that fuses element-wise operators
moves fewer bytes.

The roofline of an operator is max(flops / peak, bytes / bandwidth) (Williams et al. 2009), that of
a part the sum over its operators. Peaks are measured: the rate of a large matrix product in the
step's dtype, and the rate of a large copy.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastbyol.build import build_model
from fastbyol.config import Config
from fastbyol.data.views import VIEWS
from fastbyol.layers import BatchNorm, MaxPool, activation_checkpointing, batch_norms
from fastbyol.model import BYOL
from fastbyol.runtime.memory import SavedTensorBytes
from fastbyol.spans import BACKWARD, ONLINE, TARGET, UPDATE

_NO_TRAFFIC = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "promote_types",
}
_CAST_BYTES = 6  # read float32 and write 16 bits; the reverse for gradients
_PEAK_SIDES = {"cpu": (512, 1024, 2048, 4096), "cuda": (8192,)}  # of the matrix product
_LONG_ENOUGH_S = 0.05  # a larger product is no faster
_PEAK_BYTES = {"cpu": 2**28, "cuda": 2**30}  # of the copy
_PEAK_CALLS = 7  # the fastest counts


@dataclass
class Work:
    """Operators of a part of the step, as (flops, bytes)."""

    operators: list[tuple[int, int]] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Total floating-point operations."""
        return sum(flops for flops, _ in self.operators)

    @property
    def bytes(self) -> int:
        """Total bytes."""
        return sum(size for _, size in self.operators)

    def roofline_s(self, peaks: "Peaks") -> float:
        """Return the lower bound of the operators' time, run one after the other."""
        return sum(max(f / peaks.flops_per_s, b / peaks.bytes_per_s) for f, b in self.operators)


@dataclass(frozen=True)
class Peaks:
    """Measured peak rates of a device."""

    flops_per_s: float
    """Matrix product."""
    bytes_per_s: float
    """Copy: bytes read plus bytes written."""


def count_step(config: Config, images: int, dtype: torch.dtype) -> dict[str, Work]:
    """Return the work of one optimizer step by part.

    Args:
        images: B of this rank. The step sees both views of each.
        dtype: of activations.
    """
    parts = config.step.micro_batches
    model = meta_model(config)
    activation_checkpointing(model.online.backbone, config.step.activation_checkpointing)
    counted = {name: Work() for name in (TARGET, ONLINE, BACKWARD, UPDATE)}
    if dtype.itemsize < 4:
        _count_casts(model, counted)
        _cast(model, dtype)
    view = _meta_view(config, images // parts, dtype)
    inputs = model.inputs(view, view)
    note = _count_by_formula(model)
    with _Counter(counted[TARGET], note):
        targets = model.target_projections(inputs)
    with _Counter(counted[ONLINE], note):
        loss = model.online_loss(inputs, targets).loss
    with _Counter(counted[BACKWARD], note):
        loss.backward()
    for work in counted.values():
        work.operators *= parts
    counted[UPDATE] = Work([(0, update_bytes(config.optim.name, model))])
    return counted


def saved_tensor_bytes(config: Config, images: int, dtype: torch.dtype) -> int:
    """Return the bytes that autograd saves for the backward pass, without parameters."""
    model = meta_model(config)
    activation_checkpointing(model.online.backbone, config.step.activation_checkpointing)
    _cast(model, dtype)
    view = _meta_view(config, images // config.step.micro_batches, dtype)
    inputs = model.inputs(view, view)
    _count_by_formula(model)
    with SavedTensorBytes(model) as saved:
        loss = model.online_loss(inputs, model.target_projections(inputs)).loss
    del loss
    return saved.total


def meta_model(config: Config) -> BYOL:
    """Return the config's pair on the meta device."""
    with torch.device("meta"):
        return build_model(config.model, config.data.image_size_px, config.seed)


def update_bytes(optimizer: str, model: BYOL) -> int:
    """Return the bytes that the update of weights and target moves, in float32.

    LARS (kernels/lars_ema.py) reads w and g for the norms, then reads w, g, m and writes w, m; the
    target is read and written in the same pass. SGD and Adam write their states, and the target is
    a separate pass that reads the weights again.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moved = sum(t.numel() for _, t in model.target_pairs())
    values, target = {"lars": (7, 2), "sgd": (5, 3), "adam": (7, 3), "adamw": (7, 3)}[optimizer]
    return 4 * (values * trained + target * moved)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Return the best rates of several large matrix products and copies, on all of the process's
    threads.

    Products grow until one takes long enough: a processor that emulates bfloat16 needs minutes for
    the largest.
    """
    flops_per_s = 0.0
    for n in _PEAK_SIDES[device.type]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = torch.empty(n, n, device=device, dtype=dtype)
        seconds = _fastest(partial(torch.mm, a, b, out=product), device)
        flops_per_s = max(flops_per_s, 2 * n**3 / seconds)
        if seconds > _LONG_ENOUGH_S:
            break
    source = torch.ones(_PEAK_BYTES[device.type] // 4, device=device)
    copy = torch.empty_like(source)
    bytes_per_s = 2 * 4 * source.numel() / _fastest(lambda: copy.copy_(source), device)
    return Peaks(flops_per_s, bytes_per_s)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several calls, after a warm-up call."""
    times = []
    for _ in range(1 + _PEAK_CALLS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _meta_view(config: Config, images: int, dtype: torch.dtype) -> Tensor:
    size = config.data.image_size_px
    return torch.empty(images, 3, size, size, device="meta", dtype=dtype).to(memory_format=torch.channels_last)


def _count_casts(model: BYOL, counted: dict[str, Work]) -> None:
    """Count autocast: weights to 16 bits in each forward pass, gradients back to 32 bits."""
    for part, networks in ((TARGET, (model.target,)), (ONLINE, (model.online, model.predictor))):
        values = sum(p.numel() for net in networks if net is not None for p in net.parameters() if p.ndim > 1)
        counted[part].operators.append((0, _CAST_BYTES * values))
        if part == ONLINE:
            counted[BACKWARD].operators.append((0, _CAST_BYTES * values))


def _cast(model: BYOL, dtype: torch.dtype) -> None:
    """Give the model the dtypes that autocast computes in."""
    model.to(dtype)
    for norm in batch_norms(model):
        norm.float()


class _Counter(TorchDispatchMode):
    """Records flops and bytes of every operator."""

    def __init__(self, work: Work, note: "_Note") -> None:
        super().__init__()
        self._work = note.work = work

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        packet = op._overloadpacket
        if op.is_view or packet.__name__ in _NO_TRAFFIC:
            return out
        flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        moved = [*read.values(), *(t for t in tree_leaves(out) if isinstance(t, Tensor))]
        self._work.operators.append((flops, _bytes(*moved)))
        return out


class _Note:
    """Receives the bytes of layers that are counted by formula."""

    def __init__(self) -> None:
        self.work = Work()

    def add(self, size: int) -> None:
        """Add an operator of `size` bytes."""
        self.work.operators.append((0, size))


def _count_by_formula(model: nn.Module) -> _Note:
    """Make BatchNorm and max-pool of a model on the meta device record the bytes of their kernels'
    passes and compute nothing.
    """
    note = _Note()

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
            ctx.save_for_backward(x, weight, bias)
            ctx.residual, ctx.reads_y = residual is not None, residual is not None and relu
            note.add((3 + ctx.residual) * _bytes(x))
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, weight, bias = ctx.saved_tensors
            note.add((5 + 2 * ctx.reads_y) * _bytes(x))
            residual = torch.empty_like(x) if ctx.residual else None
            return torch.empty_like(x), residual, torch.empty_like(weight), torch.empty_like(bias), None

    class Pool(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = torch.empty_like(x[..., ::2, ::2], memory_format=torch.channels_last)
            places = torch.empty_like(y, dtype=torch.uint8)
            ctx.save_for_backward(places)
            ctx.shape = x.shape
            note.add(_bytes(x) + _bytes(y) + _bytes(places))
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            dx = torch.empty(ctx.shape, device="meta", dtype=dy.dtype, memory_format=torch.channels_last)
            note.add(_bytes(dx) + _bytes(dy) + _bytes(*ctx.saved_tensors))
            return dx

    def normalize(norm: BatchNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        statistics = torch.empty(2, norm.views, x.shape[1], device=x.device)
        return Norm.apply(x, residual, norm.weight, norm.bias, norm.relu), statistics[0], statistics[1]

    for norm in batch_norms(model):
        norm.normalize = partial(normalize, norm)
    for module in model.modules():
        if isinstance(module, MaxPool):
            module.forward = Pool.apply
    return note


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def units(works: dict[str, Work]) -> float:
    """Return the step's work in forward passes of one view through the online network.

    BYOL's is 8 (2 online, 2 target, 4 backward), minus the input gradient of the stem.
    """
    return VIEWS * sum(work.flops for work in works.values()) / works[ONLINE].flops
