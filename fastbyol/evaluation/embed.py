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
import errno
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.data import open_split
from fastbyol.data.decode import BadImage, decode
from fastbyol.data.images import Images
from fastbyol.data.objects import as_images
from fastbyol.errors import InputError, RunError, error_reason
from fastbyol.evaluation.context import MAX_UNREADABLE_FRACTION, EvalContext
from fastbyol.evaluation.dense import check_maps
from fastbyol.evaluation.features import merge_ranks, network_outputs, no_readable_images, output_shape, unchanged
from fastbyol.evaluation.options import EmbedConfig
from fastbyol.evaluation.run import eval_context, evaluation_ranks
from fastbyol.layers import set_num_views
from fastbyol.runtime.distributed import World
from fastbyol.runtime.environment import has_module
from fastbyol.runtime.files import (
    LOCK,
    FolderLock,
    atomic_write,
    json_text,
    read_json,
    read_json_or,
    write_file,
    write_output,
)
from fastbyol.runtime.logging import logger
from fastbyol.weights.load import load_checkpoint_model

META = "meta.json"
_LOCATIONS = {"checkpoint", "step", "images"}  # where they were found, not what they are
_READS = 3  # of an image that the disk gives only at times
# Errors of links to nothing, which waiting does not cure, if the link itself is still there.
_LASTING = (errno.ENOENT, errno.ELOOP)
# Of a shard with --shard_images 0.
_SHARD_BYTES = 1 << 29
_MIN_SHARDS = 32  # for several ranks to share
_MOST_IMAGES, _FEWEST_IMAGES = 1 << 16, 1 << 8

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


def embed(options: EmbedConfig, source: Any = None) -> Path:
    """Write the features of all images; return the folder. Under torchrun, every rank calls this.

    Args:
        source: images instead of those of the options, see `as_images`.

    Raises:
        InputError: the checkpoint or the images cannot be used, or the folder holds something else.
        RunError: a file cannot be written, a feature is not a finite float16 number, or too many
            files of a shard cannot be read.
    """
    out, remedy = Path(options.out), "start it again: complete shards are kept"
    with (
        evaluation_ranks(options.device, remedy=remedy) as world,
        ExitStack() as stack,
    ):
        with world.sync_errors():
            if world.is_main_process:
                _check_folder(out)
                stack.enter_context(FolderLock(out, option="--out"))
        _embed(options, out, world, source)
    return out


def _embed(options: EmbedConfig, out: Path, world: World, source: Any) -> None:
    with world.sync_errors():
        if options.format == "parquet" and not has_module("pyarrow"):
            raise InputError("--format parquet: pyarrow is not installed: pip install pyarrow")
        path, config, model, step = load_checkpoint_model(Path(options.run))
        images = open_split(options.images, ".", key="--images") if source is None else as_images(source)
        # A rank makes whole shards, alone.
        context = replace(eval_context(config, options, world), world=World())
        network = set_num_views(model.online.backbone, 1).to(context.device, memory_format=torch.channels_last)
        if options.features == "patches":
            check_maps(network)
            network = Patches(network)
        shape = output_shape(network, context)
        size = options.shard_images or _shard_images(len(images), shape)
        meta = {
            "checkpoint": str(path.resolve()),
            "step": step,
            "weights": _weights(model.online.backbone),
            "image_size_px": context.size,
            "images": str(images.root.resolve() if isinstance(images.root, Path) else images.root),
            "count": len(images),
            "content": _content(images),
            "classes": images.classes,
            "features": options.features,
            "shape": list(shape),
            "format": options.format,
            "shard_images": size,
            "computed_in": str(context.dtype).removeprefix("torch."),
            "decoder": context.decoder,
        }
        if world.is_main_process:
            for note in images.notes:
                logger.warning(note)
            _prepare(out, meta)
    _check_ranks(out, meta, world)
    # Rank 0 looks, before any rank writes.
    shards = -(-len(images) // size)
    missing = world.gather([k for k in range(shards) if not _is_complete(out, k, options.format)])[0]
    logger.info(
        f"{len(images)} images, {'x'.join(map(str, shape))} values each: {len(missing)} of {shards} shards to write"
    )
    began, done = time.perf_counter(), 0
    bad: dict[int, str] = {}
    own = missing[world.rank :: world.size]
    own_rows = [np.arange(shard * size, min((shard + 1) * size, len(images))) for shard in own]
    tracked = context.track("features", own, sum(map(len, own_rows)), each=size) if world.is_main_process else own
    for shard, rows in zip(tracked, own_rows, strict=True):
        bad |= _write_shard(out, shard, rows, network, images, shape, options, context)
        done += len(rows)
    counts, parts = zip(*world.gather((done, bad)), strict=True)
    seconds, total = time.perf_counter() - began, sum(counts)
    all_bad = merge_ranks(list(parts))
    if len(all_bad) == len(images):
        for shard in own:  # the next start must not find them complete
            _shard_file(out, shard, options.format).unlink(missing_ok=True)
        raise no_readable_images(images, all_bad)
    context.skipped(images, all_bad)
    rate = f"{total} images in {seconds:.0f} s ({total / seconds:.0f} images/s), {len(all_bad)} of them unreadable"
    logger.info(f"wrote {out}: {rate if missing else 'it was complete'}")


def _check_ranks(out: Path, meta: dict[str, Any], world: World) -> None:
    """Check that all ranks compute the same, into the same folder. Every rank must call this.

    Raises:
        InputError: they do not.
    """
    metas, sees_it = zip(*world.gather((meta, (out / META).is_file())), strict=True)
    if any(_differences(other, metas[0]) for other in metas):
        raise InputError(
            "the ranks found different checkpoints or images: use a shared disk, and name a checkpoint file if a "
            "training still writes to the run"
        )
    if not all(sees_it):
        raise InputError(f"--out {out}: not all ranks see this folder: it must lie on a shared disk")


def _shard_images(images: int, shape: tuple[int, ...]) -> int:
    """Return the default number of images of a shard, a power of two.

    It does not depend on the number of ranks, which may change before the rest is written.
    """
    most = min(_SHARD_BYTES // (2 * int(np.prod(shape))), images // _MIN_SHARDS, _MOST_IMAGES)
    return max(1 << max(most, 1).bit_length() - 1, _FEWEST_IMAGES)


def _content(images: Images) -> dict[str, Any]:
    """Return a hash of the images' names, and hashes of the bytes of some of them."""
    names = json.dumps(images.fingerprint(), sort_keys=True).encode()
    return {"names": hashlib.blake2b(names, digest_size=8).hexdigest(), "samples": images.content_hashes()}


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the keys in which two contents of meta.json describe different features.

    A sample that one of them could not read counts as equal.
    """
    keys = [key for key in a if key not in {*_LOCATIONS, "content"} and a[key] != b.get(key)]
    x, y = a["content"], b["content"]
    samples = zip(x["samples"], y["samples"], strict=False)
    if x["names"] != y["names"] or any(p != q and p and q for p, q in samples):
        keys.append("content")
    return keys


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
    # An older version's "content" was a text.
    content = read_json_or(out / META, lambda text: None).get("content") if META in names else None
    is_ours = isinstance(content, dict) and content.keys() == {"names", "samples"}
    if not is_ours and any(name != LOCK and not _is_unfinished(name) for name in names):
        raise InputError(
            f"--out {out}: is neither empty nor written by this version of fastbyol embed; name another folder"
        )


def _is_unfinished(name: str) -> bool:
    return re.fullmatch(r"\.\w{8}\.partial", name) is not None  # of atomic_write


def _prepare(out: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, or check that the folder holds a part of the same features."""
    existing = read_json(out / META)
    for key in _differences(meta, existing) if existing else ():
        shown = {"weights": "checkpoint", "content": "images"}.get(key, key)
        was, now = existing.get(shown), meta[shown]
        values = " differ" if shown == "classes" else f" {was} changed" if was == now else f" is {was}, not {now}"
        raise InputError(f"--out {out}: holds other features: {shown}{values}; name another folder")
    if existing:
        for leftover in filter(lambda path: _is_unfinished(path.name), out.iterdir()):
            with suppress(OSError):  # of a process that was killed; the folder is locked
                leftover.unlink()
    else:
        write_output(out / META, json_text(meta), f"--out {out}")


def _shard_file(out: Path, shard: int, suffix: str) -> Path:
    return out / f"features-{shard:05d}.{suffix}"


def _table_file(out: Path, shard: int) -> Path:
    return out / f"images-{shard:05d}.csv"


def _is_complete(out: Path, shard: int, suffix: str) -> bool:
    """Return True if the files of a shard are there. Each appears when it is complete."""
    files = [_shard_file(out, shard, suffix)] + [_table_file(out, shard)] * (suffix == "npy")
    return all(path.is_file() and path.stat().st_size for path in files)


def _write_shard(
    out: Path,
    shard: int,
    rows: NDArray[np.int64],
    network: nn.Module,
    images: Images,
    shape: tuple[int, ...],
    options: EmbedConfig,
    context: EvalContext,
) -> dict[int, str]:
    """Write the features of the images `rows`; return the unreadable ones: index -> reason."""
    features, used, bad_rows = _features_of(images.subset(rows), network, shape, context, len(images))
    bad = {int(rows[row]): reason for row, reason in bad_rows.items()}
    table = _table(images, rows[used])
    skipped = out / f"skipped-{shard:05d}.csv"
    try:
        skipped.unlink(missing_ok=True)
        if bad:
            _write_csv(skipped, ("index", "name", "reason"), ((k, _text(images.name(k)), _text(bad[k])) for k in bad))
        # The file of the features is the last one: it marks the shard as complete.
        with atomic_write(_shard_file(out, shard, options.format)) as temporary:
            if options.format == "parquet":
                _write_parquet(temporary, features, table)
            else:
                _write_csv(_table_file(out, shard), ("index", "name", "class"), table)
                _write_npy(temporary, features)
    except OSError as error:
        raise RunError(f"--out {out}: shard {shard} cannot be written: {error_reason(error)}") from None
    return bad


def _features_of(
    part: Images, network: nn.Module, shape: tuple[int, ...], context: EvalContext, total: int
) -> tuple[NDArray[np.float16], NDArray[np.int64], dict[int, str]]:
    """Return the features of the n readable images of a shard.

    Images that the disk gives only at times are read up to _READS times.

    Args:
        total: number of images of all shards.

    Returns:
        The features (n, ...), the rows (n,) that they belong to, and the others: row -> reason.
    """
    features = np.empty((len(part), *shape), dtype=np.float16)
    found = np.zeros(len(part), dtype=bool)
    reasons: dict[int, str] = {}
    pending = np.arange(len(part))
    for _ in range(_READS):
        bad: dict[int, str] = {}
        subset = part.subset(pending)
        for (x,), k in network_outputs(network, subset, context, [unchanged], None, bad, images=total):
            features[pending[k]] = x.half().cpu().numpy()
            found[pending[k]] = True
        reasons |= {int(pending[k]): reason for k, reason in bad.items()}
        missing = np.flatnonzero(~found).tolist()
        lost = {row: why for row in missing if (why := _withheld(part, row)) is not None}
        pending = np.array([row for row, why in lost.items() if not why], dtype=np.int64)
        if not len(pending):
            break
    _check_lost(part, lost)
    features, used = features[found] if missing else features, np.flatnonzero(found)
    finite = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
    if not finite.all():
        first = int(used[np.argmin(finite)])
        raise RunError(f"{part.location(first)}: the features hold NaN, infinity or values too large for float16")
    return features, used, {row: reasons[row] for row in missing}


def _withheld(part: Images, row: int) -> str | None:
    """Return why an image that was left out is not known to be damaged or missing.

    None if it is, and an empty text if it can be read now.
    """
    try:
        decode(part.read(row))
    except BadImage:
        return None
    except OSError as error:
        lasts = error.errno in _LASTING and error.filename is not None and os.path.lexists(error.filename)
        return None if lasts else error_reason(error)
    return ""


def _check_lost(part: Images, lost: dict[int, str]) -> None:
    """Check that a shard does not lack what a disk withholds for a while.

    It is never written again.

    Raises:
        RunError: images can be read at times, or more than MAX_UNREADABLE_FRACTION, and more than
            one, cannot be read.
    """
    if not all(lost.values()) or len(lost) > max(MAX_UNREADABLE_FRACTION * len(part), 1):
        row = min(lost)
        raise RunError(
            f"{part.location(row)}: {lost[row] or 'can be read only at times'}; {len(lost)} of {len(part)} files of this "
            "shard cannot be read: start it again when they can, complete shards are kept"
        )


def _table(images: Images, indices: NDArray[np.int64]) -> Table:
    classes = [_text(images.classes[label]) if label >= 0 else "" for label in images.labels[indices]]
    return [(int(k), _text(images.name(int(k))), name) for k, name in zip(indices, classes, strict=True)]


def _text(name: str) -> str:
    """Return a name with escapes for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, text.getvalue())


def _write_npy(path: Path, features: NDArray[np.float16]) -> None:
    """Write as np.save does, whose OSError on a full disk would not say so."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(features))
        if features.size:
            file.write(memoryview(features).cast("B"))


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
