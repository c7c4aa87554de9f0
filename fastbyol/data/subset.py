"""Which images of a data set a run uses: classes, a fraction, so many per class, or a list. The same for every backend."""

import functools
import os
import posixpath
import re
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config import DataConfig
from fastbyol.data.images import ImageSet, composed
from fastbyol.errors import InputError

_LONGEST_SHOWN = 300  # characters of a list's line in a message


def only_classes(images: ImageSet, names: list[str], *, key: str = "data.classes") -> ImageSet:
    """The images of the classes `names`, labeled 0 .. len(names) - 1 in the set's own order of classes.

    Raises:
        InputError: a name is unknown or given twice.
    """
    names = [composed(name) for name in names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{key}: {twice[0]!r} is named twice")
    if unknown := sorted(set(names) - set(images.classes)):
        has = f"has classes like {images.classes[0]!r}" if images.classes else "has no classes"
        raise InputError(f"{key}: {unknown[0]!r} is no class of {images.root}, which {has}")
    wanted = [k for k, name in enumerate(images.classes) if name in set(names)]
    new = np.full(len(images.classes), -1)
    new[wanted] = np.arange(len(wanted))
    kept = images.take(np.flatnonzero(new[images.labels] >= 0))
    return kept.relabel(new[kept.labels], [images.classes[k] for k in wanted])


def training_part(images: ImageSet, data: DataConfig, *, prefix: str = "data.") -> ImageSet:
    """What data.fraction, data.images_per_class or data.file_list leave of the training split, in the set's order.

    The draw depends on data.subset_seed and the images' number alone, and a smaller part lies within a larger one: 1 %
    within 10 %, 5 per class within 10.

    Args:
        prefix: of the config keys named in error messages.

    Raises:
        InputError: a class would be empty or has too few images, or the list names what is not there.
    """
    if data.file_list is not None:
        return images.take(_listed(images, Path(data.file_list), data.root))
    if data.fraction == 1 and data.images_per_class == 0:
        return images
    groups = [np.flatnonzero(images.labels == k) for k in range(len(images.classes))] or [np.arange(len(images))]
    keys = np.random.default_rng(data.subset_seed).random(len(images))
    kept = []
    for k, members in enumerate(groups):
        name = images.classes[k] if images.classes else str(images.root)
        count = data.images_per_class or round(data.fraction * len(members))
        if data.images_per_class and not images.classes:
            raise InputError(f"data.images_per_class={data.images_per_class}: {images.root} has no classes")
        if count == 0:
            raise InputError(
                f"{prefix}fraction={data.fraction:g} leaves none of the {len(members)} images of {name}: raise it to at least "
                f"{_least(len(members))}"
            )
        if count > len(members):
            raise InputError(f"data.images_per_class={count}: {name} has only {len(members)} images")
        kept.append(members[np.argsort(keys[members], kind="stable")[:count]])
    return images.take(np.sort(np.concatenate(kept)))


def _least(count: int) -> str:
    """The smallest fraction, rounded up to four digits, of which one of `count` images is left."""
    return f"{np.ceil(0.5001 / max(count, 1) * 1e4) / 1e4:g}" if count else "a class that has images"


def _listed(images: ImageSet, path: Path, root: str | None) -> NDArray[np.int64]:
    """Places of the images that a text file names, one per line: path or unique file name, in a .beton file the sample's number.

    A path may begin at the split, at the data set's `root`, at the working directory, at the list's own folder or at /.
    """
    where = f"data.file_list={path}"
    lines = {number: line for number, line in enumerate(_lines(path, where), 1) if line.strip()}
    places = _Places(images, root, path.parent)
    lines = {n: line for n, line in lines.items() if not line.lstrip().startswith("#") or places.of(line) is not None}
    if not lines:
        raise InputError(f"{where}: it names no image")
    found: dict[int, int] = {}  # place -> number of the line
    unknown = []
    for number, line in lines.items():
        place = places.of(line)
        if place is None:
            unknown.append(number)
        elif place < 0:
            raise InputError(f"{where}, line {number}: {_shown(line)} is several images of {images.root}: give paths")
        elif place in found:
            name = images.name(place)
            raise InputError(f"{where}, line {number}: {_shown(line)} names {name} again, after line {found[place]}")
        else:
            found[place] = number
    if unknown:
        more = f" (as {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        line = lines[unknown[0]]
        known = places.of(re.split(r"[,;\s]", line.strip())[0].strip("\"'")) is not None
        hint = ": write one path a line, and nothing else" if known else ""
        raise InputError(f"{where}, line {unknown[0]}: {_shown(line)} is not in {images.root}{more}{hint}")
    return np.sort(list(found))


def _shown(line: str) -> str:
    return repr(line if len(line) <= _LONGEST_SHOWN else f"{line[:_LONGEST_SHOWN]}...")


def _lines(path: Path, where: str) -> list[str]:
    """A text file's lines without their ends: UTF-8, where other bytes may name files all the same, or UTF-16 with its mark."""
    try:
        data = path.read_bytes()
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = data.decode("utf-16")
        else:
            text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    if "\0" in text:
        raise InputError(f"{where}: not a text file")
    return re.split("\r\n|\n|\r", text)


def _resolved(folder: str) -> str:
    """The folder without links; as it is where the working directory is gone."""
    try:
        return os.path.realpath(folder)
    except FileNotFoundError:
        return folder


class _Places:
    """Finds an image's place in a set by what people and programs call it; -1 where several are called so."""

    def __init__(self, images: ImageSet, root: str | None, beside: Path) -> None:
        names = [images.name(i) for i in range(len(images))]
        self._exact = {name: i for i, name in enumerate(names)}
        self._composed, self._files = dict[str, int](), dict[str, int]()
        for i, name in enumerate(names):
            for places, form in ((self._composed, composed(name)), (self._files, composed(name.rpartition("/")[2]))):
                places[form] = -1 if form in places else i
        base = os.path.normpath(images.root.absolute())
        starts = (base, os.path.realpath(base), os.path.relpath(base, root or base))
        self._resolved = functools.cache(_resolved)
        # What relative names may begin at: the working directory, the list's folder.
        self._folders = ("", str(beside.absolute()))
        self._starts = ["", *(f"{composed(start)}/" for start in starts)]

    def of(self, line: str) -> int | None:
        """The place of the image that a line names, None where none is called so."""
        stripped = line.strip()
        forms = (line, stripped, stripped.replace("\\", "/"), os.path.expanduser(stripped))  # noqa: PTH111
        return next((place for form in forms if (place := self._find(form)) is not None), None)

    def _find(self, name: str) -> int | None:
        if name in self._exact:
            return self._exact[name]
        path = composed(posixpath.normpath(name))
        if "/" not in name:
            return self._composed.get(path, self._files.get(path))
        place = self._below(path)
        folder, _, file = name.rpartition("/")
        for start in self._folders:
            if place is None:
                place = self._below(composed(f"{self._resolved(str(Path(start, folder or '/')))}/{file}"))
        return place

    def _below(self, path: str) -> int | None:
        for start in self._starts:
            if path.startswith(start) and (place := self._composed.get(path.removeprefix(start))) is not None:
                return place
        return None
