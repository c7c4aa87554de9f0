"""Choice between cuDNN and the Triton kernel for each 1x1 convolution, measured on the GPU at hand.

Two questions per shape, each answered by the shorter time:

1. Convolution and statistics of the norm after it: cuDNN's convolution and a pass over its result,
   or kernels/triton/conv1x1.py with one of several tiles.
2. If the input comes from a norm and needs no gradient (the target network): that norm and the best
   of (1), or the kernel with the norm inside.

Times are those of a replayed CUDA graph, as in a captured or compiled step: launched from Python,
most of these kernels would be shorter than their launch. The kernel must be 2 % faster than cuDNN.

Choices are kept in the user's cache folder, in one file per GPU model and versions of the
libraries. A tile whose result differs from cuDNN's is not used.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.errors import first_line
from fastbyol.kernels.batch_norm_torch import Norm
from fastbyol.kernels.conv import Tile
from fastbyol.layers import Conv2d, batch_norms, pointwise_convs
from fastbyol.runtime.caches import own_folder
from fastbyol.runtime.distributed import World
from fastbyol.runtime.files import read_json_or, write_file
from fastbyol.runtime.logging import logger

CUDNN, NORM = "cudnn", "norm"
"""Names of measurements: cuDNN's convolution and its statistics; the norm before it."""

_TILES = (
    Tile(64, 128, 64, 8, 3),
    Tile(64, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(64, 64, 64, 4, 4),
)  # each costs a compilation of about two seconds per shape
_SMALLEST_SIDE = 16  # of a matrix product
_MARGIN = 0.98  # about the spread of such measurements


class Shape(NamedTuple):
    """What the time of a convolution depends on."""

    images: int
    """Of all views."""
    views: int
    """With separate statistics."""
    inputs: int
    channels: int
    height: int
    width: int
    """Of the input, in pixels."""
    stride: int
    dtype: str
    after_norm: bool
    """True if the input is the result of a BatchNorm and ReLU that nobody else reads."""

    def __str__(self) -> str:
        after = " after norm" if self.after_norm else ""
        return (
            f"{self.images}x{self.inputs}x{self.height}x{self.width} to {self.channels}, {self.views} views, "
            f"stride {self.stride}, {self.dtype}{after}"
        )


Times = dict[str, float]
"""Median milliseconds by CUDNN, NORM, or the name of a tile ("norm ..." with the norm inside)."""


def tiles(inputs: int, channels: int) -> list[Tile]:
    """Return the tiles to try; the first one suits most shapes."""
    k, c = (max(_SMALLEST_SIDE, 1 << (n - 1).bit_length()) for n in (inputs, channels))
    fitting = [tile._replace(inputs=min(tile.inputs, k), channels=min(tile.channels, c)) for tile in _TILES]
    return list(dict.fromkeys(fitting))


def choose(shape: Shape, times: Times) -> tuple[Tile | None, Tile | None]:
    """Return the fastest `Conv2d.tile` and `Conv2d.norm_tile`.

    None stands for cuDNN, and for a norm on its own.
    """
    if not times:
        return None, None
    by_name = {_name(tile): tile for tile in tiles(shape.inputs, shape.channels)}
    own = min((name for name in by_name if name in times), key=times.__getitem__, default=CUDNN)
    best = own if times[own] < _MARGIN * times[CUDNN] else CUDNN
    inside = min(
        (name for name in by_name if f"{NORM} {name}" in times), key=lambda n: times[f"{NORM} {n}"], default=None
    )
    if inside is None or times[f"{NORM} {inside}"] >= _MARGIN * (times[NORM] + times[best]):
        return by_name.get(best), None
    return by_name.get(best), by_name[inside]


def tune(
    networks: Iterable[nn.Module],
    images: int,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    *,
    again: bool = False,
) -> dict[Shape, Times]:
    """Set `Conv2d.tile` and `Conv2d.norm_tile` of networks of the same architecture.

    Every rank must call this. The first measures what its cache does not hold.

    Args:
        networks: backbones on `device`, a CUDA device.
        images: per rank and forward pass, each with as many views as the networks' norms separate.
        size: side of the views in pixels.
        dtype: of the views; 16 bits.
        again: measure everything again.

    Returns:
        The measurements of the networks' shapes.
    """
    networks = list(networks)
    if not any(pointwise_convs(networks[0])):
        return {}
    shapes = find_shapes(networks[0], images, size, dtype)
    with world.sync_errors():
        known = _times(dict.fromkeys(shapes), device, again) if world.is_main_process else None
    known = world.gather(known)[0]  # the same kernels on all ranks
    for network in networks:
        for (conv, _), shape in zip(pointwise_convs(network), shapes, strict=True):
            conv.tile, conv.norm_tile = choose(shape, known[shape])
    logger.info(summary(networks[0]))
    return known


def summary(network: nn.Module) -> str:
    """Return one line that says which kernels run."""
    convs = [conv for conv, _ in pointwise_convs(network)]
    own, inside = sum(conv.tile is not None for conv in convs), sum(conv.norm_tile is not None for conv in convs)
    return (
        f"1x1 convolutions: {own} of {len(convs)} compute statistics too, {inside} with the norm before them (target)"
    )


def find_shapes(network: nn.Module, images: int, size: int, dtype: torch.dtype) -> list[Shape]:
    """Return the shape of each of `pointwise_convs`."""
    views = batch_norms(network)[0].views
    network = copy.deepcopy(network).to("meta").eval()
    convs = dict(pointwise_convs(network))
    shapes: dict[Conv2d, Shape] = {}

    def note(conv: Conv2d, inputs: tuple[Tensor, ...]) -> None:
        _, k, height, width = inputs[0].shape
        name = str(dtype).removeprefix("torch.")
        shapes[conv] = Shape(
            views * images, views, k, conv.out_channels, height, width, conv.stride[0], name, convs[conv]
        )

    for conv in convs:
        conv.register_forward_pre_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size, device="meta"))
    return [shapes[conv] for conv in convs]


def _times(shapes: Collection[Shape], device: torch.device, again: bool) -> dict[Shape, Times]:
    """Return the measurements of shapes, from the cache or new; none of a shape that does not fit
    into memory.
    """
    machine = _machine(device)
    path = _path(machine)
    cached = {} if again or path is None else _read(path)
    known = {shape: cached[str(shape)] for shape in shapes if _is_complete(cached.get(str(shape)))}
    missing = [shape for shape in shapes if shape not in known]
    if not missing:
        return known
    logger.info(f"measuring {len(missing)} shapes of 1x1 convolutions once on this GPU (one to three minutes)")
    for shape in missing:
        try:
            known[shape] = measure(shape, device)
        except torch.OutOfMemoryError:
            known[shape] = {}
            logger.warning(f"1x1 convolution of {shape}: not enough memory to measure; cuDNN is used")
    torch.cuda.empty_cache()
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another run may have written since.
            kept = _read(path) | {str(shape): known[shape] for shape in missing if known[shape]}
            write_file(path, json.dumps({"machine": machine, "ms": kept}, indent=1) + "\n")
        except OSError as error:
            logger.warning(f"{path}: cannot be written ({error.strerror}); the next run measures again")
    return known


def _read(path: Path) -> dict[str, Times]:
    known = read_json_or(path).get("ms", {})
    return known if isinstance(known, dict) else {}


def _is_complete(times: Any) -> bool:
    """Return True if a cache's entry has the form of `Times`."""
    return isinstance(times, dict) and CUDNN in times and all(isinstance(t, float) for t in times.values())


def _machine(device: torch.device) -> dict[str, str]:
    """Return what the times depend on besides the shape."""
    import triton

    from fastbyol.kernels.triton import batch_norm, batch_norm_kernels, conv1x1

    code = b"".join(Path(module.__file__).read_bytes() for module in (batch_norm, batch_norm_kernels, conv1x1))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "kernel": hashlib.sha256(code + repr(_TILES).encode()).hexdigest()[:12],
    }


def _path(machine: dict[str, str]) -> Path | None:
    folder = own_folder()
    digest = hashlib.sha256(repr(machine).encode()).hexdigest()[:24]
    return None if folder is None else folder / f"conv1x1-{digest}.json"


def measure(shape: Shape, device: torch.device) -> Times:
    """Measure all ways to compute a convolution.

    Raises:
        torch.OutOfMemoryError: they do not fit into memory.
    """
    from triton.errors import TritonError
    from triton.testing import do_bench

    from fastbyol.kernels.triton.batch_norm import batch_norm_triton, statistics
    from fastbyol.kernels.triton.conv1x1 import conv1x1, norm_conv1x1

    rng = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def draw(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=rng, device=device, dtype=dtype)

    def norm(channels: int) -> Norm:
        batches = torch.zeros((), dtype=torch.int64, device=device)
        return Norm(draw(channels), draw(channels), 1e-5, draw(channels), draw(channels), batches, 0.1)

    x = draw(shape.images, shape.height, shape.width, shape.inputs, dtype=dtype).permute(0, 3, 1, 2)
    weight = (draw(shape.channels, shape.inputs, 1, 1) / shape.inputs**0.5).to(dtype)
    before, after, options = norm(shape.inputs), norm(shape.channels), {"views": shape.views}

    def by_cudnn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, weight, stride=shape.stride)
        return y, statistics(y, shape.views, after.running_mean, after.running_var, after.batches, after.momentum)

    def by_tile(tile: Tile) -> tuple[Tensor, Tensor]:
        return conv1x1(x, weight, after, stride=shape.stride, tile=tile, **options)

    times: Times = {}

    def add(name: str, call: Callable[[], Any], expected: tuple[Tensor, Tensor] | None = None) -> None:
        try:
            actual = call()
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError) as error:
            if expected is None:  # not a tile
                raise
            torch.cuda.synchronize(device)  # raises if the device itself has failed
            logger.info(f"1x1 convolution of {shape}, tile {name}: not available on this GPU: {first_line(error)}")
            return
        if expected is not None and not is_close(actual, expected):
            logger.warning(f"1x1 convolution of {shape}, tile {name}: differs from cuDNN's and is not used")
            return
        del actual
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        times[name] = float(do_bench(graph.replay, return_mode="median"))

    with torch.no_grad():
        expected = by_cudnn(x)
        add(CUDNN, lambda: by_cudnn(x))
        for tile in tiles(shape.inputs, shape.channels):
            add(_name(tile), lambda tile=tile: by_tile(tile), expected)
        if shape.after_norm:
            (normalized,), stats, _ = batch_norm_triton(x, before, relu=True, **options)
            expected = by_cudnn(normalized)
            # Its statistics are needed either way.
            add(NORM, lambda: batch_norm_triton(x, before, relu=True, stats=stats, **options))
            for tile in tiles(shape.inputs, shape.channels):
                add(
                    f"{NORM} {_name(tile)}",
                    lambda tile=tile: norm_conv1x1(x, before, stats, weight, after, tile=tile, **options),
                    expected,
                )
    return times


def is_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Return True if y and its statistics (3, V, C) equal others up to rounding in y's dtype."""
    (y, stats), (other, others) = actual, expected
    precision = 4 * torch.finfo(y.dtype).eps
    mean, other_mean = stats[0] + stats[1], others[0] + others[1]
    spread = others[2].sqrt()
    return bool(
        ((y - other).abs().max() <= precision * other.abs().max())
        & ((mean - other_mean).abs() <= precision * spread + precision * other_mean.abs()).all()
        & ((stats[2] - others[2]).abs() <= precision * others[2]).all()
    )


def lines(times: dict[Shape, Times]) -> list[str]:
    """Return a table of measurements and choices."""
    rows = []
    for shape, ms in times.items():
        if not ms:
            rows.append(f"{shape}: not measured, chosen {CUDNN}")
            continue
        tile, norm_tile = choose(shape, ms)
        best = ms[CUDNN if tile is None else _name(tile)]
        row = f"{shape}: cuDNN {ms[CUDNN]:.3f} ms, chosen {CUDNN if tile is None else _name(tile)} {best:.3f} ms"
        if norm_tile is not None:
            inside = ms[f"{NORM} {_name(norm_tile)}"]
            row += f"; with the norm before it {ms[NORM] + best:.3f} ms, inside {_name(norm_tile)} {inside:.3f} ms"
        rows.append(row)
    return rows


def _name(tile: Tile) -> str:
    rows, channels, inputs, warps, stages = tile
    return f"{rows}x{channels}x{inputs}, {warps} warps, {stages} stages"
