"""ImageNet-1k from its official files, or from folders unpacked from them, as image folders.

Official names tell where an image belongs, whatever folder or archive it is in: training images are
WNID_NUMBER.JPEG, in one archive per class, validation images ILSVRC2012_val_NUMBER.JPEG. The
classes of the latter are in the development kit.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from fastbyol.data.subset import read_class_list, read_lines
from fastbyol.errors import InputError, first_line, join_names
from fastbyol.runtime.logging import logger
from fastbyol.tools.corpora import Progress, atomic_folder, check_free
from fastbyol.tools.sources import (
    Archive,
    Entry,
    Folder,
    NewImage,
    Written,
    image_of,
    open_source,
    warn_of_counts,
    write_images,
)

TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000
DEVKIT = "ILSVRC2012_devkit_t12"
_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.(JPEG|jpeg|jpg)")
_VAL_IMAGE = re.compile(r"(ILSVRC2012_val_\d{8})\.(JPEG|jpeg|jpg)")
_CLASS_ARCHIVE = re.compile(r"(n\d{8})\.tar")
_ARCHIVE = re.compile(r"ILSVRC2012_img_(train|val)\.tar|n\d{8}\.tar")


def imagenet_wnids() -> list[str]:
    """Return the WordNet ids of ImageNet-1k's 1000 classes, sorted: the order of class indices."""
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()


@dataclass(frozen=True)
class _Labels:
    """Classes of the validation images."""

    where: str
    """For messages."""
    classes: dict[str, str]
    """File name without .JPEG -> wnid."""
    train_counts: dict[str, int] = field(default_factory=dict)
    """wnid -> number of training images; empty if unknown."""


def prepare_imagenet(
    out: Path,
    source: Sequence[Path],
    devkit: Path | None = None,
    val_list: Path | None = None,
    classes: str | None = None,
    progress: Progress = lambda done, total: None,
) -> str:
    """Write ImageNet as OUT/train/WNID/*.JPEG and OUT/val/WNID/*.JPEG.

    The sources stay as they are. Files in folders are hard-linked where possible, else copied.

    Args:
        out: the new folder.
        source: official archives, or folders that hold them or their unpacked images. Either split
            may be missing.
        devkit: the development kit, an archive or a folder, with the classes of the validation
            images. None looks for it in the folders of `source`.
        val_list: text file with the classes instead: a file name and its wnid or index per line.
        classes: file with one wnid per line, or imagenet100; None takes all.
        progress: called after each image with the number done and the total.

    Returns:
        a one-line summary.

    Raises:
        InputError: `out` exists; a source, the kit or a list is missing, unusable or incomplete.
    """
    check_free(out)
    known = {wnid: k for k, wnid in enumerate(imagenet_wnids())}
    if devkit is not None and val_list is not None:
        raise InputError("--devkit and --val-list: give only one of them")
    if not source:
        raise InputError("--source: must not be empty")
    chosen = list(known) if classes is None else _read_classes(classes, known)
    sources, found_kit = _find_sources(source)
    devkit = devkit if devkit is not None or val_list is not None else found_kit
    labels = None
    if devkit is not None:
        labels = _read_devkit(devkit, known)
    elif val_list is not None:
        labels = _read_val_list(val_list, known)
    splits = _check_sources(sources, labels, known)
    share = len(chosen) / len(known)
    total = round(share * (TRAIN_IMAGES * ("train" in splits) + VAL_IMAGES * ("val" in splits)))
    with atomic_folder(out) as folder:
        written = write_images(folder, _images(sources, labels, known, set(chosen)), total, progress)
        where = f"--source {','.join(map(str, source))}"
        if not written.counts:
            raise InputError(
                f"{where}: holds no images of ImageNet: neither n01440764_10026.JPEG and others nor "
                "ILSVRC2012_val_00000001.JPEG and others, in folders or official archives"
            )
        _check_written(written, where, folder, labels, known, chosen)
    return f"ImageNet, {len(chosen)} classes, in {out}: {written.summary()}"


def _read_classes(name: str, known: Mapping[str, int]) -> list[str]:
    """Return the wnids of a class list.

    Raises:
        InputError: the file cannot be read, is empty, or has lines that are no class or repeat one.
    """
    lines = read_class_list(name, "--classes")
    _report_lines(f"--classes {name}", [n for n, wnid in lines.items() if wnid not in known], "one wnid of ImageNet")
    if not lines or len(set(lines.values())) < len(lines):
        raise InputError(f"--classes {name}: {'names a class twice' if lines else 'names no class'}")
    return sorted(lines.values())


def _report_lines(where: str, numbers: list[int], expected: str) -> None:
    """Raise an InputError with the numbers of unusable lines, if there are any."""
    if numbers:
        lines = f"line{'s' if len(numbers) > 1 else ''} {join_names(list(map(str, numbers)), most=10)}"
        raise InputError(f"{where}: {lines}: expected {expected}")


def _find_sources(paths: Sequence[Path]) -> tuple[list[Folder | Archive], Path | None]:
    """Return the folders and archives to read, and the development kit if a folder holds it."""
    sources, kit = list[Folder | Archive](), None
    for path in paths:
        source = open_source(path)
        sources.append(source)
        if isinstance(source, Folder):
            sources += [Archive(path / p) for p in source.paths if _ARCHIVE.fullmatch(p.rpartition("/")[2])]
            kits = [path / name for name in (f"{DEVKIT}.tar.gz", DEVKIT)]
            kit = next((k for k in kits if k.exists()), kit)
    return sources, kit


def _check_sources(sources: Sequence[Folder | Archive], labels: _Labels | None, known: Mapping[str, int]) -> set[str]:
    """Check what can be checked before an hour of reading, and return the splits that were seen.

    Raises:
        InputError: a split is in an archive and unpacked as well; or validation images have no
            class.
    """
    unpacked, packed = dict[str, str](), dict[str, str]()
    for source in sources:
        is_archive = isinstance(source, Archive)
        for entry in source.entries():
            is_val = _VAL_IMAGE.fullmatch(entry.name) is not None
            if is_val and labels is None and entry.parent not in known:
                raise _unlabeled(entry)
            if is_val or _TRAIN_IMAGE.fullmatch(entry.name) or (is_archive and _CLASS_ARCHIVE.fullmatch(entry.name)):
                (packed if is_archive else unpacked).setdefault("val" if is_val else "train", entry.where)
            if is_archive:
                break  # the first member tells
    for split in sorted(unpacked.keys() & packed.keys()):
        raise InputError(
            f"--source: {split} images are in an archive ({packed[split]}) and in a folder ({unpacked[split]}): "
            "name only one of them"
        )
    return unpacked.keys() | packed.keys()


def _unlabeled(entry: Entry) -> InputError:
    return InputError(
        f"{entry.where}: validation images need their classes: add --devkit {DEVKIT}.tar.gz or --val-list"
    )


def _images(
    sources: Sequence[Folder | Archive], labels: _Labels | None, known: Mapping[str, int], chosen: set[str]
) -> Iterator[NewImage]:
    """Yield the images of the chosen classes."""
    for source in sources:
        for entry in source.entries():
            images = iter([entry])
            if match := _CLASS_ARCHIVE.fullmatch(entry.name):
                if isinstance(source, Folder):
                    continue  # it is another source
                _check_known(match[1], entry, known)
                if match[1] not in chosen:
                    continue
                images = entry.members()
            for image in images:
                split, wnid = _place(image, labels, known)
                if wnid in chosen:
                    yield image_of(image, split, wnid)


def _place(entry: Entry, labels: _Labels | None, known: Mapping[str, int]) -> tuple[str, str]:
    """Return split and wnid of an entry; the wnid is '' if it is no image of ImageNet.

    Raises:
        InputError: the class is unknown, or the labels and the folder disagree.
    """
    if match := _TRAIN_IMAGE.fullmatch(entry.name):
        _check_known(match[1], entry, known)
        return "train", match[1]
    match = _VAL_IMAGE.fullmatch(entry.name)
    if match is None:
        return "", ""
    folder = entry.parent if entry.parent in known else None
    wnid = folder if labels is None else labels.classes.get(match[1])
    if wnid is None:
        raise _unlabeled(entry) if labels is None else InputError(f"{entry.where}: has no class in {labels.where}")
    if folder not in (None, wnid):
        raise InputError(f"{entry.where}: is in the folder of {folder}, but its class is {wnid} by {labels.where}")
    return "val", wnid


def _check_known(wnid: str, entry: Entry, known: Mapping[str, int]) -> None:
    if wnid not in known:
        raise InputError(f"{entry.where}: {wnid} is no class of ImageNet-1k")


def _check_written(
    written: Written, where: str, folder: Path, labels: _Labels | None, known: Mapping[str, int], chosen: list[str]
) -> None:
    """Compare what was written with the labels and the published numbers.

    Raises:
        InputError: a class or a listed validation image is missing.
    """
    share = len(chosen) / len(known)
    for split, published in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        found = written.images(split)
        if not found:
            continue
        if missing := [f"{split}/{wnid}" for wnid in chosen if not written.counts[split, wnid]]:
            hint = "" if share < 1 else "; --classes FILE prepares only the classes in a file"
            raise InputError(f"{where}: no images of {join_names(missing)}{hint}")
        if split == "val" and labels is not None:
            names = {path.stem for path in (folder / split).glob("*/*")}
            listed = [name for name, wnid in labels.classes.items() if (split, wnid) in written.counts]
            if missing := [f"{name}.JPEG" for name in listed if name not in names]:
                raise InputError(
                    f"{where}: {len(missing)} of {len(listed)} validation images are missing: {join_names(missing)}"
                )
        elif split == "train" and labels is not None and labels.train_counts:
            warn_of_counts(written, where, {(split, wnid): labels.train_counts[wnid] for wnid in chosen})
        elif share == 1 and found != published:
            logger.warning(f"{where}: {found} {split} images instead of {published}")


def _read_devkit(path: Path, known: Mapping[str, int]) -> _Labels:
    """Read data/meta.mat and data/ILSVRC2012_validation_ground_truth.txt.

    The k-th line of the latter is the ILSVRC2012_ID of image k, an order of its own: 1 to 1000 are
    the classes, higher ones are inner nodes of WordNet.

    Raises:
        InputError: one of them is missing or damaged, or the classes are not ImageNet's.
    """
    where = f"--devkit {path}"
    files = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    for entry in open_source(path, "--devkit").entries():
        if entry.name in files:
            files[entry.name] = entry.read()
    if missing := [name for name, content in files.items() if not content]:
        raise InputError(f"{where}: there is no {join_names(missing)} in it")
    meta, truth = files.values()
    wnids, train_counts = _read_meta(meta, where)
    if sorted(wnids.values()) != list(known):
        raise InputError(f"{where}: meta.mat lists {len(wnids)} classes, which are not ImageNet's {len(known)}")
    lines = truth.split()
    _report_lines(
        f"{where}: ILSVRC2012_validation_ground_truth.txt",
        [n for n, line in enumerate(lines, 1) if line not in wnids],
        f"a number from 1 to {len(known)}",
    )
    if len(lines) != VAL_IMAGES:
        raise InputError(
            f"{where}: ILSVRC2012_validation_ground_truth.txt has {len(lines)} lines instead of {VAL_IMAGES}: truncated"
        )
    return _Labels(where, {f"ILSVRC2012_val_{n:08d}": wnids[line] for n, line in enumerate(lines, 1)}, train_counts)


def _read_meta(data: bytes, where: str) -> tuple[dict[bytes, str], dict[str, int]]:
    """Return ILSVRC2012_ID (as text) -> wnid, and wnid -> training images, of meta.mat's leaves."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(BytesIO(data), squeeze_me=True, variable_names=["synsets"])["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        wnids = {b"%d" % int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        return wnids, {str(row["WNID"]): int(row["num_train_images"]) for row in leaves}
    except Exception as error:  # a damaged file raises almost anything
        raise InputError(f"{where}: meta.mat cannot be read: {first_line(error)}") from None


def _read_val_list(path: Path, known: Mapping[str, int]) -> _Labels:
    """Read lines of a file name and a wnid or index, and what follows on the line is ignored.

    Names may have a folder and lack .JPEG. Spaces, tabs or commas separate. The header of Kaggle's
    LOC_val_solution.csv is skipped.

    Raises:
        InputError: the file cannot be read, or has unusable lines, or gives an image two classes.
    """
    where = f"--val-list {path}"
    classes, unusable = dict[str, str](), list[int]()
    meaning = {wnid: wnid for wnid in known} | {str(k): wnid for wnid, k in known.items()}
    for number, line in enumerate(read_lines(path, where), 1):
        words = [word for word in re.split(r"[\s,\"]+", line) if word]
        if not words or words[0].startswith("#") or (number == 1 and words[0] == "ImageId"):
            continue
        name = words[0].replace("\\", "/").rpartition("/")[2]
        match = _VAL_IMAGE.fullmatch(name if "." in name else f"{name}.JPEG")
        wnid = meaning.get(words[1]) if len(words) > 1 else None
        if match is None or wnid is None:
            unusable.append(number)
        elif classes.setdefault(match[1], wnid) != wnid:
            raise InputError(f"{where}: line {number}: {name} is listed before, with class {classes[match[1]]}")
    _report_lines(
        where,
        unusable,
        f"a name like ILSVRC2012_val_00000001.JPEG and a wnid of ImageNet or an index 0 to {len(known) - 1}",
    )
    if not classes:
        raise InputError(f"{where}: lists no images")
    return _Labels(where, classes)
