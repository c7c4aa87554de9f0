"""Features of all images of a folder or .beton file, in files of a fixed number of images.

The output folder:

    meta.json                      checkpoint, images, shape; a resumed command compares it
    features-00000.npy             features of a shard, float16, and
    images-00000.csv               for each its index in the set, its name and its class; or
    features-00000.parquet         all of these, the features as float32 with float16's precision
    skipped-00000.csv              unreadable images of the shard, if there are any

A shard is a fixed number of consecutive images. It appears when it is complete, so the same command
continues where it was ended. Of R ranks, each makes every R-th shard that is missing.

Shapes: n readable images of a shard, F features; patches are (n, C, h, w).
"""

import csv
import hashlib
import io
import json
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.data import open_split
from fastbyol.data.images import ImageSet
from fastbyol.errors import InputError, RunError, error_reason
from fastbyol.evaluate.context import EvalContext
from fastbyol.evaluate.dense import check_maps
from fastbyol.evaluate.features import inference, network_outputs, unchanged
from fastbyol.evaluate.options import EmbedConfig
from fastbyol.evaluate.run import eval_context, evaluation_ranks
from fastbyol.layers import set_num_views
from fastbyol.runtime.distributed import World
from fastbyol.runtime.environment import has_module
from fastbyol.runtime.files import LOCK, FolderLock, atomic_write, json_text, read_json, write_output
from fastbyol.runtime.logging import logger
from fastbyol.weights.load import load_checkpoint_model

META = "meta.json"
_LOCATIONS = {"checkpoint", "step", "images"}  # where they were found, not what they are
_SHARD_BYTES = 1 << 29  # limit of a shard with --shard_images 0
_MOST_IMAGES, _FEWEST_IMAGES = 1 << 16, 1 << 8  # of such a shard

Table = list[tuple[int, str, str]]  # index, name and class of each image


class Patches(nn.Module):
    """The last feature map of a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, C, h, w). A transformer's tokens are arranged as its grid."""
        (last,) = self.backbone.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        return last


def embed(options: EmbedConfig) -> Path:
    """Write the features of all images; return the folder. Under torchrun, every rank calls this.

    Raises:
        InputError: the checkpoint or the images cannot be used, or the folder holds something else.
        RunError: a file cannot be written, or a feature is not a finite float16 number.
    """
    out = Path(options.out)
    with (
        evaluation_ranks(options.device, remedy="start it again: complete shards are kept") as world,
        ExitStack() as stack,
    ):
        with world.sync_errors():
            if world.is_main_process:
                _check_folder(out)
                stack.enter_context(FolderLock(out, option="--out"))
        _embed(options, out, world)
    return out


def _embed(options: EmbedConfig, out: Path, world: World) -> None:
    with world.sync_errors():
        if options.format == "parquet" and not has_module("pyarrow"):
            raise InputError("--format parquet: pyarrow is not installed: pip install pyarrow")
        path, config, model, step = load_checkpoint_model(Path(options.run))
        images = open_split(options.images, ".", key="--images")
        # A rank makes whole shards, alone.
        context = replace(eval_context(config, options, world), world=World())
        network = set_num_views(model.online.backbone, 1).to(context.device, memory_format=torch.channels_last)
        if options.features == "patches":
            check_maps(network)
            network = Patches(network)
        shape = _shape(network, context)
        meta = {
            "checkpoint": str(path.resolve()),
            "step": step,
            "weights": _weights(model.online.backbone),
            "image_size_px": context.size,
            "images": str(images.root.resolve()),
            "count": len(images),
            "content": _content(images),
            "classes": images.classes,
            "features": options.features,
            "shape": list(shape),
            "format": options.format,
            "shard_images": options.shard_images or _shard_images(shape),
        }
        if world.is_main_process:
            for note in images.notes:
                logger.warning(note)
            _prepare(out, meta)
    shards = -(-len(images) // meta["shard_images"])
    # Rank 0 looks, before any rank writes.
    missing = world.gather([k for k in range(shards) if not _shard_file(out, k, options.format).exists()])[0]
    logger.info(
        f"{len(images)} images, {'x'.join(map(str, shape))} values each: {len(missing)} of {shards} shards to write"
    )
    began, done = time.perf_counter(), 0
    bad: dict[int, str] = {}
    for shard in missing[world.rank :: world.size]:
        first = shard * meta["shard_images"]
        rows = np.arange(first, min(first + meta["shard_images"], len(images)))
        bad |= _write_shard(out, shard, rows, network, images, shape, options, context)
        done += len(rows)
    parts = world.gather((done, bad))
    seconds = time.perf_counter() - began
    all_bad = {index: reason for _, part in parts for index, reason in sorted(part.items())}
    context.skipped(images, all_bad)
    total = sum(done for done, _ in parts)
    rate = f"{total} images in {seconds:.0f} s ({total / seconds:.0f} images/s), {len(all_bad)} of them unreadable"
    logger.info(f"wrote {out}: {rate if missing else 'it was complete'}")


def _shape(network: nn.Module, context: EvalContext) -> tuple[int, ...]:
    """Return the shape of an image's features."""
    image = torch.zeros(1, 3, context.size, context.size, device=context.device)
    with inference(network, context):
        return tuple(network(image).shape[1:])


def _shard_images(shape: tuple[int, ...]) -> int:
    """Return the images of a shard of at most _SHARD_BYTES: a power of two."""
    fitting = _SHARD_BYTES // (2 * int(np.prod(shape)))
    return min(max(1 << fitting.bit_length() - 1, _FEWEST_IMAGES), _MOST_IMAGES)


def _content(images: ImageSet) -> str:
    """Return a hash of the images' names and of the bytes of some of them."""
    identity = [images.fingerprint(), images.content_hashes()]
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def _weights(network: nn.Module) -> str:
    """Return a hash of the network's state."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_folder(out: Path) -> None:
    """Raise InputError if a folder holds files, but none of ours."""
    try:
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be read: {error_reason(error)}") from None
    if META not in names and any(name != LOCK and not name.endswith(".partial") for name in names):
        raise InputError(f"--out {out}: is neither empty nor written by fastbyol embed; name another folder")


def _prepare(out: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, or check that the folder holds a part of the same features."""
    for leftover in out.glob(".*.partial"):  # of a process that was killed; the folder is locked
        leftover.unlink(missing_ok=True)
    existing = read_json(out / META)
    if not existing:
        write_output(out / META, json_text(meta), f"--out {out}")
        return
    for key, value in meta.items():
        if key not in _LOCATIONS and existing.get(key) != value:
            shown = {"weights": "checkpoint", "content": "images"}.get(key, key)
            values = f" is {existing.get(shown)}, not {meta[shown]}" if shown != "classes" else " differ"
            raise InputError(f"--out {out}: holds other features: {shown}{values}; name another folder")


def _shard_file(out: Path, shard: int, suffix: str) -> Path:
    return out / f"features-{shard:05d}.{suffix}"


def _write_shard(
    out: Path,
    shard: int,
    rows: NDArray[np.int64],
    network: nn.Module,
    images: ImageSet,
    shape: tuple[int, ...],
    options: EmbedConfig,
    context: EvalContext,
) -> dict[int, str]:
    """Write the features of the images `rows`; return the unreadable ones: index -> reason."""
    part = images.subset(rows)
    features = np.empty((len(rows), *shape), dtype=np.float16)
    bad_rows: dict[int, str] = {}
    kept, done = [np.empty(0, dtype=np.int64)], 0
    for (x,), found in network_outputs(
        network, part, context, [unchanged], f"shard {shard}", bad_rows, images=len(images)
    ):
        features[done : done + len(found)] = x.half().cpu().numpy()
        kept.append(found)
        done += len(found)
    features, used = features[:done], np.concatenate(kept)
    if not np.isfinite(features).all():
        first = int(used[np.argmin(np.isfinite(features).reshape(done, -1).all(1))])
        raise RunError(f"{part.location(first)}: the features hold NaN, infinity or values too large for float16")
    table = _table(images, rows[used])
    skipped = out / f"skipped-{shard:05d}.csv"
    bad = {int(rows[row]): reason for row, reason in sorted(bad_rows.items())}
    try:
        skipped.unlink(missing_ok=True)
        if bad:
            _write_csv(skipped, ("index", "name", "reason"), ((k, _text(images.name(k)), bad[k]) for k in bad))
        # The file of the features is the last one: it marks the shard as complete.
        with atomic_write(_shard_file(out, shard, options.format)) as temporary:
            if options.format == "parquet":
                _write_parquet(temporary, features, table)
            else:
                _write_csv(out / f"images-{shard:05d}.csv", ("index", "name", "class"), table)
                with open(temporary, "wb") as file:
                    np.save(file, features)
    except OSError as error:
        raise RunError(f"--out {out}: shard {shard} cannot be written: {error_reason(error)}") from None
    return bad


def _table(images: ImageSet, indices: NDArray[np.int64]) -> Table:
    classes = [_text(images.classes[label]) if label >= 0 else "" for label in images.labels[indices]]
    return [(int(k), _text(images.name(int(k))), name) for k, name in zip(indices, classes, strict=True)]


def _text(name: str) -> str:
    """Return a name with escapes for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.getvalue().encode())


def _write_parquet(path: Path, features: NDArray[np.float16], table: Table) -> None:
    """Write one row per image. Few readers of parquet know float16, so the values are float32."""
    import pyarrow as pa
    from pyarrow import parquet

    indices, names, classes = (list(column) for column in zip(*table, strict=True)) if table else ([], [], [])
    flat = pa.array(features.astype(np.float32).reshape(-1))
    columns = {
        "index": pa.array(indices, pa.int64()),
        "name": pa.array(names, pa.string()),
        "class": pa.array(classes, pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(flat, int(np.prod(features.shape[1:]))),
    }
    parquet.write_table(pa.table(columns), path, compression="zstd")
