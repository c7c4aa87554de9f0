"""Tar shards in WebDataset's layout: members of one sample follow each other and share a key.

    train-0000.tar:  0001.jpg 0001.cls 0002.jpg 0002.cls ...

A member's key is its path up to the first dot of its file name; the rest is its extension. The
image is the member with an image's extension. The class is the text of `cls`, or an entry of
`json`. An archive without either is labeled by its top folders, as an image folder is.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fastbyol.data.decode import EXTENSIONS
from fastbyol.data.images import number_classes
from fastbyol.data.shards import FileIndex, Position, ShardImages, as_positions, open_shards
from fastbyol.data.storage import RangeFile
from fastbyol.errors import InputError, first_line
from fastbyol.runtime.logging import logger

SUFFIX = ".tar"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LABEL_KEYS = ("label", "cls", "class", "class_id", "class_name")  # of json members
_MAX_LABEL_BYTES = 1 << 20
_PADDING = 1 << 16  # bytes; tar fills the last 10 KiB with zeros


def open_tars(root: Path | str, files: Sequence[RangeFile]) -> ShardImages:
    """Return the images of tar shards, in the order of the files and their members.

    Raises:
        InputError: a file is no tar archive or is damaged, or there is no image.
    """
    images = open_shards(root, files, "tar", _index)
    if images.classes or not all("/" in name for name in images.names):
        return images
    folders = [name.split("/", 1)[0] for name in images.names]
    classes, numbers = number_classes(folders)
    if len(classes) < 2:  # the folder that was archived, not classes
        return images
    return replace(images, labels=numbers, classes=classes)


def _index(file: RangeFile) -> FileIndex:
    """List the images of one archive."""
    positions, names, labels, left_out = list[Position](), list[str](), list[int | str | None](), list[str]()
    try:
        with tarfile.open(fileobj=file.stream(), mode="r:") as archive:
            for image, label in _samples(archive, file, left_out):
                positions.append(Position(image.offset_data, image.size))
                names.append(_name(image))
                labels.append(label)
            _check_end(archive.offset, file)
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        packed = file.path.endswith(_COMPRESSED) or file.read(0, min(file.size, 4))[:2] in (b"\x1f\x8b", b"BZ")
        why = "is compressed: unpack it, since members are read at random" if packed else first_line(error)
        raise InputError(f"{file.path}: not a readable tar archive: {why}") from None
    return FileIndex(as_positions(positions), names, labels, left_out)


def _check_end(offset: int, file: RangeFile) -> None:
    """Check that an archive ends where tarfile found no further member.

    tarfile takes a damaged header for the end. A complete archive ends with blocks of zeros.

    Raises:
        tarfile.ReadError: something else follows.
    """
    rest = file.read(offset, min(_PADDING, max(file.size - offset, 0)))
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise tarfile.ReadError(f"the header of a member at byte {offset} is damaged")
    if rest.strip(b"\0"):
        raise tarfile.ReadError(f"another archive follows its end at byte {offset}: write them into separate files")
    if not rest:
        logger.warning(f"{file.path}: the end of the archive is missing: was its writing interrupted?")


def _samples(
    archive: tarfile.TarFile, file: RangeFile, left_out: list[str]
) -> Iterator[tuple[tarfile.TarInfo, int | str | None]]:
    """Yield the images and labels of all samples; add the names of other images to `left_out`."""
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        archive.members = []  # it would keep all of them
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if member.isdir() or name.startswith("."):
            continue
        if not member.isreg() or member.issparse() or (f"{folder}/{stem}" == key and extension.lower() in members):
            if _is_image(extension):
                left_out.append(_name(member))
            continue
        if (new := f"{folder}/{stem}") != key:
            yield from _sample(members, file, left_out)
            key, members = new, {}
        members[extension.lower()] = member
    yield from _sample(members, file, left_out)


def _sample(
    members: dict[str, tarfile.TarInfo], file: RangeFile, left_out: list[str]
) -> Iterator[tuple[tarfile.TarInfo, int | str | None]]:
    """Yield the image of a sample, or all of them if nothing else tells that it is one sample."""
    images = sorted(filter(_is_image, members), key=lambda extension: extension.count("."))
    if not images:
        return
    label = None
    if (cls := members.get("cls")) is not None:
        label = _as_label(_read_text(cls, file))
    elif (entries := members.get("json")) is not None:
        label = _json_label(_read_text(entries, file), f"{file.path}, {entries.name}")
    # `jpg` comes before `seg.png`, which is a mask. photo.1.jpg and photo.2.jpg are two images.
    several = len(images) == len(members) and all("." in extension for extension in images)
    chosen = images if several else images[:1]
    left_out += [_name(members[extension]) for extension in images if extension not in chosen]
    for extension in chosen:
        yield members[extension], label


def _is_image(extension: str) -> bool:
    return f".{extension.lower().rpartition('.')[2]}" in EXTENSIONS


def _name(member: tarfile.TarInfo) -> str:
    return member.name.removeprefix("./")


def _read_text(member: tarfile.TarInfo, file: RangeFile) -> str:
    if member.size > _MAX_LABEL_BYTES:
        raise InputError(f"{file.path}, {member.name}: {member.size:,} bytes are too many for a label")
    try:
        return file.read(member.offset_data, member.size).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file.path}, {member.name}: {first_line(error)}") from None


def _as_label(text: str) -> int | str | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text or None


def _json_label(text: str, where: str) -> int | str | None:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON") from None
    if not isinstance(entries, dict):
        return None
    value = next((entries[key] for key in _LABEL_KEYS if key in entries), None)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
