"""Labeled splits of a data set, and features of their images: a backbone's, or raw pixels.

Ranks share a split block by block. Each stores the features of its own images; what follows adds up
over ranks, or gathers the few rows it needs.

Shapes: N images, M readable ones, n of this rank, F features.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.config import Config
from fastbyol.data import Sources, find_images
from fastbyol.data.crops import CENTER_FRACTION, center_crops, random_crops
from fastbyol.data.images import Images
from fastbyol.data.storage import is_url, may_exist
from fastbyol.errors import InputError, first_line, join_names
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.options import EvalConfig
from fastbyol.layers import set_num_views
from fastbyol.parallel import share_of_batch
from fastbyol.precision import autocast
from fastbyol.runtime.distributed import World
from fastbyol.runtime.logging import logger

BATCH = 256  # images that a network sees at a time
COMPILE_IMAGES = 1 << 17  # that repay a compilation, which takes about a minute
_MAX_SMALL_BLOCKS = 32  # of a split whose blocks are not the largest; smaller blocks slow down the kNN
_MAX_BATCHES_PER_BLOCK = 16
_GATHERED_ROWS = 1 << 12  # at a time, which bounds the copies
_NOT_COMPILABLE: WeakSet[nn.Module] = WeakSet()  # networks whose compilation failed
RAW_PIXELS_SIDES = (64, 32, 16)  # larger images are averaged to the first that fits
RAW_PIXELS_BYTES = 8 << 30  # 64 px up to 349,354 images, 32 px up to 1,395,375


class Splits(NamedTuple):
    """The labeled images of a data set."""

    train: Images
    val: Images

    @property
    def classes(self) -> list[str]:
        """Class names, the same in both splits."""
        return self.train.classes


def open_splits(
    options: EvalConfig,
    config: Config,
    sources: Sources = Sources(),  # noqa: B008 - immutable
    world: World = World(),  # noqa: B008
) -> Splits:
    """Open both splits: the run's classes, but all of their images, not only its training subset.

    Args:
        sources: images that replace those of the options and of the run.
        world: all ranks call this.

    Raises:
        InputError: a split is missing, or the splits do not match.
    """
    data = replace(
        config.data,
        root=options.root or config.data.root,
        train_split=options.train_split or config.data.train_split,
        val_split=options.val_split or config.data.val_split,
        fraction=1.0,
        images_per_class=0,
        file_list=None,
    )
    given = None not in sources
    if given != any(source is not None for source in sources):
        raise InputError("give both images and val_images, or none of them")
    elsewhere = all(is_url(split) or Path(split).is_absolute() for split in (data.train_split, data.val_split))
    if data.root is not None and not given and not elsewhere and not may_exist(data.root):
        remedy = "" if options.root else "; name it with --root"
        raise InputError(f"root: data set {data.root} does not exist{remedy}")
    if data.root is None and not given and not elsewhere:
        raise InputError("root: the run was trained on images that a program gave to it; name a data set with --root")

    def find() -> Splits:
        found = zip(("train", "val"), sources, strict=True)
        return Splits(*(find_images(data, split, root=source, key="root") for split, source in found))

    splits = world.first_on_machine(find)
    check_splits(*splits)
    return splits


def check_splits(train: Images, val: Images) -> None:
    """Check that a classifier can be trained on one split and evaluated on the other.

    Raises:
        InputError: fewer than two classes, or the splits' classes differ.
    """
    if len(train.classes) < 2:
        raise InputError(f"{train.root} has {len(train.classes)} class(es): a classifier needs at least 2")
    if train.classes != val.classes:
        differences = [text for a, b in ((train, val), (val, train)) if (text := _extra_classes(a, b))]
        order = (
            f"the order of their classes differs ({train.classes[:3]} and {val.classes[:3]}); "
            "pack both with fastbyol pack"
        )
        raise InputError(f"{train.root} and {val.root} have different classes: {'; '.join(differences) or order}")


def _extra_classes(a: Images, b: Images) -> str:
    """Describe the classes of `a` that `b` does not have; empty if there are none."""
    known = set(b.classes)
    names = [name for name in a.classes if name not in known]
    if not names:
        return ""
    if not b.classes:
        return f"{len(names)} of {len(a.classes)} in {a.root} are not in {b.root}, which has no classes"
    empty = [name for name in names if isinstance(b.root, Path) and os.path.lexists(b.root / name)]
    why = f", where folder {empty[0]} has no images" if empty else ""
    return f"{len(names)} of {len(a.classes)} in {a.root} are not in {b.root}: {join_names(names)}{why}"


Transform = Callable[[Tensor, NDArray[np.int64]], Tensor]
"""(normalized crops (n, 3, S, S), image indices (n,)) -> crops."""


def block_images(images: int) -> int:
    """Return the number of images of a block, the unit that ranks share.

    It depends on the number of images alone, so that batches and matrix products, and with them
    every bit of the result, are the same for any number of ranks.
    """
    return BATCH * min(max(-(-images // (_MAX_SMALL_BLOCKS * BATCH)), 1), _MAX_BATCHES_PER_BLOCK)


def own_indices(images: int, world: World) -> NDArray[np.int64]:
    """Return the indices of this rank's images: every R-th block."""
    return np.flatnonzero(np.arange(images) // block_images(images) % world.size == world.rank)


@dataclass(frozen=True)
class Features:
    """Features of this rank's images of a split: unit vectors in 16 bits, and their lengths.

    Rounding changes a value by at most 2^-11 of itself. M images of the split are readable.
    """

    unit: Tensor  # (n, F) float16, on the device; zero where the length is
    length: Tensor  # (n,) float32
    position: Tensor  # (n,) int64, among the readable images, ascending
    blocks: list[int]  # numbers of rows that come from the same block of images
    all_labels: Tensor  # (M,) int64, of all ranks' images
    classes: int
    bad: dict[int, str]  # index of an unreadable image of any rank -> reason
    world: World = field(default_factory=World)

    @property
    def labels(self) -> Tensor:
        """Labels (n,) of this rank's images."""
        return self.all_labels[self.position]

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.unit.device

    @property
    def dim(self) -> int:
        """F, the number of features of an image."""
        return self.unit.shape[1]

    def rows(self, rows: Tensor | slice) -> Tensor:
        """Return the features of some rows in float32, (B, F)."""
        if isinstance(rows, slice):
            return self.unit[rows].float().mul_(self.length[rows, None])
        # Twice as fast as indexing.
        unit, length = (values.index_select(0, rows) for values in (self.unit, self.length))
        return unit.float().mul_(length[:, None])

    def slices(self, most: int = BATCH) -> Iterator[slice]:
        """Yield slices of at most `most` rows that together are all rows."""
        for start in range(0, len(self.unit), most):
            yield slice(start, start + most)

    def gather(self, positions: Tensor) -> Tensor:
        """Return the features at `positions` (K,) of all ranks in float32, (K, F).

        Every rank must call this.
        """
        return self._gather(self.unit, positions).float() * self._gather(self.length, positions)[:, None]

    def gather_units(self) -> Tensor:
        """Return the unit vectors of all ranks, (M, F) float16. Every rank must call this."""
        return self._gather(self.unit, torch.arange(len(self.all_labels), device=self.device))

    def _gather(self, values: Tensor, positions: Tensor) -> Tensor:
        """Return the rows of `values` (n, ...) of all ranks at `positions`."""
        out = values.new_zeros(len(positions), *values.shape[1:])
        for rows in range(0, len(positions) if len(self.position) else 0, _GATHERED_ROWS):
            wanted = positions[rows : rows + _GATHERED_ROWS]
            row = torch.searchsorted(self.position, wanted).clamp_(max=len(self.position) - 1)
            own = self.position[row] == wanted
            out[rows : rows + _GATHERED_ROWS][own] = values[row[own]]
        return self.world.sum_(out)  # one rank adds a value, all others zero

    def mean(self) -> Tensor:
        """Return the mean (F,) over all ranks, float32. Every rank must call this."""
        total = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        for rows in self.slices():
            total += self.rows(rows).sum(0, dtype=torch.float64)
        return (self.world.sum(total) / len(self.all_labels)).float()

    def std(self, mean: Tensor) -> Tensor:
        """Return the standard deviation (F,) over all ranks. Every rank must call this."""
        total = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        for rows in self.slices():
            total += (self.rows(rows) - mean).square().sum(0, dtype=torch.float64)
        return (self.world.sum(total) / max(len(self.all_labels) - 1, 1)).sqrt().float()


def feature_bytes(images: int, features: int, world: World) -> int:
    """Return the most bytes that a rank stores of a split's features: 2 F + 12 per image."""
    blocks = -(-images // block_images(images))
    return min(images, -(-blocks // world.size) * block_images(images)) * (2 * features + 12)


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


def _unit(x: Tensor, length: Tensor) -> Tensor:
    return x / length[:, None].clamp(min=torch.finfo(torch.float32).tiny)


def extract_features(
    backbone: nn.Module, split: Images, context: EvalContext, description: str | None = "features"
) -> Features:
    """Return the features of a split. Arguments and errors are those of `extract_each`."""
    return extract_each(backbone, split, context, [unchanged], description)[0]


def unchanged(crops: Tensor, indices: NDArray[np.int64]) -> Tensor:
    """The transform that changes nothing."""
    return crops


def extract_each(
    backbone: nn.Module,
    split: Images,
    context: EvalContext,
    transforms: Sequence[Transform],
    description: str | None,
) -> list[Features]:
    """Return the features of center crops under each transform, in index order.

    Decodes every image once. Every rank must call this; each decodes its share of the images.

    Args:
        backbone: (n, 3, S, S) -> (n, F), run in eval mode under autocast.
        description: of the progress bar. None shows no progress, logs no unreadable images and
            accepts any values.

    Raises:
        InputError: no image of the split is readable, or a feature is not finite.
    """
    device, world, began = context.device, context.world, time.perf_counter()
    count, features = len(own_indices(len(split), world)), feature_dim(backbone, context)
    units = [torch.empty(count, features, dtype=torch.float16, device=device) for _ in transforms]
    lengths = [torch.empty(count, device=device) for _ in units]
    kept = [np.empty(0, dtype=np.int64)]
    bad: dict[int, str] = {}
    done = 0
    for outputs, indices in network_outputs(backbone, split, context, transforms, description, bad):
        rows = slice(done, done + len(indices))
        for x, unit, length in zip(outputs, units, lengths, strict=True):
            length[rows] = _length(x)
            unit[rows] = _unit(x, length[rows])
        kept.append(indices)
        done = rows.stop
    context.extractions.append((len(split) * len(units), time.perf_counter() - began))
    readable = readable_indices(split, bad, context, quiet=description is None)
    indices = np.concatenate(kept)
    position, all_labels = (
        torch.from_numpy(values).to(device) for values in (np.searchsorted(readable, indices), split.labels[readable])
    )
    blocks = np.unique(indices // block_images(len(split)), return_counts=True)[1].tolist()
    found = [
        Features(unit[:done], length[:done], position, blocks, all_labels, len(split.classes), bad, world)
        for unit, length in zip(units, lengths, strict=True)
    ]
    if description is not None:
        check_finite(*found)
    return found


def network_outputs(
    network: nn.Module,
    split: Images,
    context: EvalContext,
    transforms: Sequence[Transform],
    description: str | None,
    bad: dict[int, str],
    *,
    images: int | None = None,
) -> Iterator[tuple[list[Tensor], NDArray[np.int64]]]:
    """Yield the outputs of a network in eval mode for this rank's images, in index order.

    Args:
        transforms: of the center crops.
        description: of the progress bar; None shows none.
        bad: receives this rank's unreadable images, which are left out: index -> reason.
        images: that the network sees in all; default: the split's, under each transform.

    Yields:
        The outputs (n, F) float32 for each transform, and the images' indices (n,) in the split.
    """
    own = own_indices(len(split), context.world)
    # Transforms compute on the host, in float32.
    on_host = any(transform is not unchanged for transform in transforms)
    batches = _center_crops(
        split,
        own,
        context,
        bad,
        dtype=torch.float32 if on_host else crop_dtype(network, context),
        device=torch.device("cpu") if on_host else context.device,
    )
    if description is not None:
        batches = context.track(description, batches, len(own), each=BATCH)
    images = images or len(split) * len(transforms)
    forward = inference_function(network, context, images=images, batch_size=BATCH)
    for crops, indices in batches:
        if len(indices):
            yield [forward(transform(crops, indices).to(context.device)) for transform in transforms], indices


def _center_crops(
    split: Images,
    own: NDArray[np.int64],
    context: EvalContext,
    bad: dict[int, str],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield the center crops of the images `own`, and their indices in the split.

    Args:
        bad: receives the unreadable images: index in the split -> reason.
    """
    own_bad: dict[int, str] = {}
    for crops, rows in center_crops(
        split.subset(own),
        size=context.size,
        fraction=CENTER_FRACTION,
        batch_size=BATCH,
        threads=context.threads,
        bad=own_bad,
        dtype=dtype,
        device=device,
        decoder=context.decoder if device == context.device else "native",
    ):
        yield crops, own[rows]
    bad.update((int(own[k]), reason) for k, reason in own_bad.items())


def readable_indices(
    split: Images, bad: dict[int, str], context: EvalContext, *, quiet: bool = False
) -> NDArray[np.int64]:
    """Return the indices of the images that all ranks could read. Every rank must call this.

    Logs the others, unless `quiet`.

    Args:
        bad: this rank's unreadable images; receives those of the other ranks.

    Raises:
        InputError: there is none.
    """
    merged = merge_ranks(context.world.gather(bad))
    bad.clear()
    bad.update(merged)
    if len(bad) == len(split):
        raise no_readable_images(split, bad)
    if not quiet:
        context.skipped(split, bad)
    return np.delete(np.arange(len(split)), list(bad))


def merge_ranks(parts: list[dict[int, str]]) -> dict[int, str]:
    """Return the items of all ranks, sorted."""
    return dict(sorted(item for part in parts for item in part.items()))


def check_finite(*features: Features) -> None:
    """Raise InputError if a feature of any rank is NaN or infinite. Every rank must call this."""
    bad = torch.stack([torch.isfinite(f.length).logical_not_().any() for f in features])
    if features[0].world.maximum(bad.to(torch.uint8)).any():
        raise InputError("the features hold NaN or infinity: the network has diverged")


def inference_function(
    network: nn.Module, context: EvalContext, *, images: int, batch_size: int
) -> Callable[[Tensor], Tensor]:
    """Return a function: images (n, 3, S, S) -> the network's outputs (n, ...) float32.

    It runs the network in `inference`.

    Args:
        images: how many it will see, over all ranks, so that results do not depend on the number of
            ranks. If it is worth it, the network is compiled. If that fails, a warning is logged
            and the network runs eagerly from then on.
        batch_size: of a whole batch. Others run eagerly: each size would be compiled again.
    """
    is_worth_it = context.compiles and images >= COMPILE_IMAGES and not isinstance(network, RawPixels)
    compiled = torch.compile(network, dynamic=False) if is_worth_it and network not in _NOT_COMPILABLE else None

    def forward(x: Tensor) -> Tensor:
        nonlocal compiled
        if compiled is not None and len(x) == batch_size:
            try:
                with inference(network, context, stance="default"):
                    return compiled(x).float()
            except torch._dynamo.exc.TorchDynamoException as error:
                logger.warning(f"the network does not compile here, so it runs eagerly: {first_line(error)}")
                _NOT_COMPILABLE.add(network)
                compiled = None
        with inference(network, context):
            return network(x).float()

    return forward


@contextmanager
def inference(network: nn.Module, context: EvalContext, *, stance: str = "force_eager") -> Iterator[None]:
    """Context manager: eval mode, autocast, no gradients. Restores the mode of the network.

    By default a network that is compiled for training runs eagerly: eval mode would compile it
    again.
    """
    training = network.training
    network.eval()
    try:
        with (
            torch.no_grad(),
            autocast(context.device, context.dtype),
            torch.compiler.set_stance(stance),
        ):
            yield
    finally:
        network.train(training)


def no_readable_images(images: Images, bad: dict[int, str]) -> InputError:
    """Return the error for a set in which no image is readable."""
    first = min(bad)
    return InputError(
        f"{images.root}: none of the {len(images)} images can be read, for example {images.location(first)}: {bad[first]}"
    )


def feature_dim(backbone: nn.Module, context: EvalContext) -> int:
    """Return F, the number of features of an image of the context's size."""
    return output_shape(backbone, context)[0]


def output_shape(network: nn.Module, context: EvalContext) -> tuple[int, ...]:
    """Return the shape of the outputs for one image of the context's size."""
    image = torch.zeros(1, 3, context.size, context.size, device=context.device)
    with inference(network, context):
        return tuple(network(image).shape[1:])


def crop_dtype(network: nn.Module, context: EvalContext) -> torch.dtype:
    """Return the dtype of a network's crops: that of autocast, but pixels keep float32."""
    return torch.float32 if isinstance(network, RawPixels) else context.dtype


def training_batches(
    images: Images,
    context: EvalContext,
    *,
    epochs: range,
    batch_size: int,
    seed: int,
    description: str,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's part of batches of random crops and flips.

    Shows progress, logs unreadable images. Every rank must exhaust the batches.

    Args:
        epochs: numbers of the epochs, which determine order and views.
        batch_size: over all ranks.
        dtype: of the crops.

    Yields:
        Crops (n, 3, S, S) and labels (n,) on the device, and the images' indices (n,) on the CPU.
        The next readable image stands in for an unreadable one.

    Raises:
        InputError: no image is readable, or a batch does not split into equal parts.
    """
    world = context.world
    labels = torch.from_numpy(images.labels)
    steps_per_epoch = len(images) // batch_size
    shard = share_of_batch(batch_size, len(images), world)

    def batches() -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        for epoch in epochs:
            bad: dict[int, str] = {}
            for crops, indices in random_crops(
                images,
                size=context.size,
                seed=seed,
                epoch=epoch,
                batch_size=batch_size,
                shard=shard,
                threads=context.threads,
                bad=bad,
                dtype=dtype,
                device=context.device,
                decoder=context.decoder,
            ):
                if not len(indices):
                    raise no_readable_images(images, bad)
                yield crops, indices
            bad = merge_ranks(world.gather(bad))
            context.skipped(images, bad)

    for crops, indices in context.track(description, batches(), len(epochs) * steps_per_epoch, unit="steps"):
        rows = torch.from_numpy(indices)
        yield crops, labels[rows].to(context.device), rows


def calibrate_batchnorm(backbone: nn.Module, split: Images, context: EvalContext) -> None:
    """Set BatchNorm's running statistics to their average over the batches of a split, in float32.

    Every rank must call this; each runs its share of the batches.

    With its initial statistics (mean 0, variance 1), an untrained network would be a weaker
    baseline than random weights need to be.

    Raises:
        InputError: fewer than two images are readable.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    world, momenta = context.world, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0  # the running statistics are those of the last batch
    set_num_views(backbone, 1).train()
    own = np.flatnonzero(np.arange(len(split)) // BATCH % world.size == world.rank)
    bad: dict[int, str] = {}
    batches = _center_crops(split, own, context, bad, dtype=torch.float32, device=context.device)
    # In float64, the order of addition has no influence on the float32 result.
    sums = [[torch.zeros_like(value, dtype=torch.float64) for value in _statistics(norm)] for norm in norms]
    used = torch.zeros((), dtype=torch.int64, device=context.device)
    with torch.no_grad():
        for crops, _ in context.track("BatchNorm statistics", batches, len(own), each=BATCH):
            if len(crops) > 1:  # one value per channel has no variance
                backbone(crops)
                used += 1
                for norm, totals in zip(norms, sums, strict=True):
                    for total, value in zip(totals, _statistics(norm), strict=True):
                        total += value
    bad = merge_ranks(world.gather(bad))
    context.skipped(split, bad)
    count = int(world.sum(used))
    if not count:
        raise InputError(
            f"{split.root}: only {len(split) - len(bad)} image(s) can be read, but the BatchNorm statistics of the "
            "untrained network need 2; leave that row out with --baselines false"
        )
    for norm, momentum, totals in zip(norms, momenta, sums, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.fill_(count)
        for value, total in zip(_statistics(norm), totals, strict=True):
            value.copy_(world.sum(total) / count)


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var


class RawPixels(nn.Module):
    """The pixels themselves as features, averaged to `side` x `side` if the image is larger."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def features(self, size: int) -> int:
        """Return the number of features of an image of `size` x `size` pixels."""
        return 3 * min(size, self.side) ** 2

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, 3 * s * s), where s = min(S, side)."""
        if images.shape[-1] > self.side:
            images = F.adaptive_avg_pool2d(images, self.side)
        return images.flatten(1)


def raw_pixels_side(images: int) -> int:
    """Return the largest of RAW_PIXELS_SIDES whose features of all images fit RAW_PIXELS_BYTES."""
    fitting = (side for side in RAW_PIXELS_SIDES if feature_bytes(images, 3 * side**2, World()) <= RAW_PIXELS_BYTES)
    return next(fitting, RAW_PIXELS_SIDES[-1])
