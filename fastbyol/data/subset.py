"""Selection of the images that a run uses: by class, fraction, number per class, or list.

The same for every backend.
"""

import functools
import os
import posixpath
import re
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config import DataConfig
from fastbyol.data.images import Images, normalize_name
from fastbyol.errors import InputError

CLASS_LISTS = {"imagenet100": Path(__file__).with_name("imagenet100.txt")}  # shipped with the package
_LONGEST_QUOTE = 300  # characters of a list's line in a message


def read_class_list(name: str, key: str = "data.classes") -> dict[int, str]:
    """Return line number -> class name, from a list in `CLASS_LISTS` or a text file.

    A file has one name per line. Blank lines and those that begin with # are skipped.

    Raises:
        InputError: the file cannot be read. The message begins with `key` and `name`.
    """
    lines = read_lines(CLASS_LISTS.get(name, Path(name)), f"{key} {name}")
    return {n: line.strip() for n, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")}


def select_classes(images: Images, names: list[str], *, key: str = "data.classes") -> Images:
    """Return the images of the classes `names`, renumbered from 0 in the set's order of classes.

    The single name of a list in `CLASS_LISTS` stands for the list's names.

    Raises:
        InputError: a name is unknown or given twice.
    """
    if len(names) == 1 and names[0] in CLASS_LISTS and names[0] not in images.classes:
        names = list(read_class_list(names[0]).values())
    names = [normalize_name(name) for name in names]
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{key}: {duplicates[0]!r} is named twice")
    if unknown := sorted(set(names) - set(images.classes)):
        has = f"has classes like {images.classes[0]!r}" if images.classes else "has no classes"
        raise InputError(f"{key}: {unknown[0]!r} is no class of {images.root}, which {has}")
    wanted = [k for k, name in enumerate(images.classes) if name in set(names)]
    new_label = np.full(len(images.classes), -1)
    new_label[wanted] = np.arange(len(wanted))
    selected = images.subset(np.flatnonzero(new_label[images.labels] >= 0))
    return selected.with_labels(new_label[selected.labels], [images.classes[k] for k in wanted])


def select_training_images(images: Images, data: DataConfig, *, prefix: str = "data.") -> Images:
    """Return the images selected by data.fraction, images_per_class or file_list, in order.

    The selection depends only on data.subset_seed and the number of images, and selections are
    nested: 1 % is a subset of 10 %, 5 per class of 10.

    Args:
        images: the training split.
        data: the data section of the config.
        prefix: prefix of the config keys in error messages.

    Raises:
        InputError: a class would be empty or has too few images, or the list names an unknown
            image.
    """
    if data.file_list is not None:
        return images.subset(_read_file_list(images, Path(data.file_list), data.root))
    if data.fraction == 1 and data.images_per_class == 0:
        return images
    groups = [np.flatnonzero(images.labels == k) for k in range(len(images.classes))] or [np.arange(len(images))]
    keys = np.random.default_rng(data.subset_seed).random(len(images))
    selected = []
    for k, members in enumerate(groups):
        name = images.classes[k] if images.classes else str(images.root)
        count = data.images_per_class or round(data.fraction * len(members))
        if data.images_per_class and not images.classes:
            raise InputError(f"data.images_per_class={data.images_per_class}: {images.root} has no classes")
        if count == 0:
            raise InputError(
                f"{prefix}fraction={data.fraction:g} leaves none of the {len(members)} images of {name}: raise it to at least "
                f"{_smallest_fraction(len(members))}"
            )
        if count > len(members):
            raise InputError(f"data.images_per_class={count}: {name} has only {len(members)} images")
        selected.append(members[np.argsort(keys[members], kind="stable")[:count]])
    return images.subset(np.sort(np.concatenate(selected)))


def _smallest_fraction(count: int) -> str:
    """Return the smallest fraction (rounded up, four digits) that selects one of `count` images."""
    return f"{np.ceil(0.5001 / max(count, 1) * 1e4) / 1e4:g}" if count else "a class that has images"


def _read_file_list(images: Images, path: Path, root: str | None) -> NDArray[np.int64]:
    """Return the sorted indices of the images that a text file names, one per line.

    A line is a path or a unique file name; for a .beton file, the sample's number. A path may be
    absolute or relative to the split, the data set's `root`, the working directory or the list's
    folder.
    """
    location = f"data.file_list={path}"
    lines = {number: line for number, line in enumerate(read_lines(path, location), 1) if line.strip()}
    lookup = _ImageLookup(images, root, path.parent)
    lines = {n: line for n, line in lines.items() if not line.lstrip().startswith("#") or lookup.find(line) is not None}
    if not lines:
        raise InputError(f"{location}: it names no image")
    selected: dict[int, int] = {}  # index -> number of the line
    unknown = []
    for number, line in lines.items():
        index = lookup.find(line)
        if index is None:
            unknown.append(number)
        elif index < 0:
            raise InputError(
                f"{location}, line {number}: {_quote(line)} is the name of multiple images of {images.root}: give paths"
            )
        elif index in selected:
            name = images.name(index)
            raise InputError(
                f"{location}, line {number}: {_quote(line)} names {name} again, after line {selected[index]}"
            )
        else:
            selected[index] = number
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        line = lines[unknown[0]]
        path_is_known = lookup.find(re.split(r"[,;\s]", line.strip())[0].strip("\"'")) is not None
        hint = ": write one path per line, and nothing else" if path_is_known else ""
        raise InputError(f"{location}, line {unknown[0]}: {_quote(line)} is not in {images.root}{more}{hint}")
    return np.sort(list(selected))


def _quote(line: str) -> str:
    return repr(line if len(line) <= _LONGEST_QUOTE else f"{line[:_LONGEST_QUOTE]}...")


def read_lines(path: Path, location: str) -> list[str]:
    """Return the lines of a text file in UTF-8 (other bytes are allowed) or UTF-16 with BOM.

    Raises:
        InputError: it cannot be read, or is no text file. The message begins with `location`.
    """
    try:
        data = path.read_bytes()
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = data.decode("utf-16")
        else:
            text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{location}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    if "\0" in text:
        raise InputError(f"{location}: not a text file")
    return re.split("\r\n|\n|\r", text)


def _resolve(folder: str) -> str:
    """Resolve links; return the folder unchanged if the working directory is gone."""
    try:
        return os.path.realpath(folder)
    except FileNotFoundError:
        return folder


class _ImageLookup:
    """Finds the index of an image by the paths and names that people and programs use for it.

    Args:
        images: the set.
        root: folder of the data set.
        list_folder: folder of the file list.
    """

    def __init__(self, images: Images, root: str | None, list_folder: Path) -> None:
        names = [images.name(i) for i in range(len(images))]
        self._exact = {name: i for i, name in enumerate(names)}
        self._paths, self._files = dict[str, int](), dict[str, int]()
        for i, name in enumerate(names):
            for indices, form in (
                (self._paths, normalize_name(name)),
                (self._files, normalize_name(name.rpartition("/")[2])),
            ):
                indices[form] = -1 if form in indices else i
        base = os.path.normpath(images.root.absolute()) if isinstance(images.root, Path) else str(images.root)
        starts = (base, os.path.realpath(base), os.path.relpath(base, root or base))
        self._resolved = functools.cache(_resolve)
        self._folders = ("", str(list_folder.absolute()))  # relative paths begin here; "" is the working directory
        self._starts = ["", *(f"{normalize_name(start)}/" for start in starts)]

    def find(self, line: str) -> int | None:
        """Return the index of the image that a line names; -1 if ambiguous, None if unknown."""
        stripped = line.strip()
        forms = (line, stripped, stripped.replace("\\", "/"), os.path.expanduser(stripped))  # noqa: PTH111
        return next((index for form in forms if (index := self._find(form)) is not None), None)

    def _find(self, name: str) -> int | None:
        if name in self._exact:
            return self._exact[name]
        path = normalize_name(posixpath.normpath(name))
        if "/" not in name:
            return self._paths.get(path, self._files.get(path))
        index = self._find_below_starts(path)
        folder, _, file = name.rpartition("/")
        for start in self._folders:
            if index is None:
                index = self._find_below_starts(
                    normalize_name(f"{self._resolved(str(Path(start, folder or '/')))}/{file}")
                )
        return index

    def _find_below_starts(self, path: str) -> int | None:
        for start in self._starts:
            if path.startswith(start) and (index := self._paths.get(path.removeprefix(start))) is not None:
                return index
        return None
