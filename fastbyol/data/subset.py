"""Which images of a data set a run uses: classes, a fraction, so many per class, or a list. The same for every backend."""

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config import DataConfig
from fastbyol.data.images import ImageSet
from fastbyol.errors import InputError


def only_classes(images: ImageSet, names: list[str], *, key: str = "data.classes") -> ImageSet:
    """The images of the classes `names`, labelled 0 .. len(names) - 1 in the set's own order of classes.

    Raises:
        InputError: a name is unknown or given twice.
    """
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
        return images.take(_listed(images, Path(data.file_list)))
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


def _listed(images: ImageSet, path: Path) -> NDArray[np.int64]:
    """Places of the images that a text file names, one per line: path or file name, in a .beton file the sample's number."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"data.file_list={path}: {reason}") from None
    wanted = [line for line in lines if line and not line.startswith("#")]
    if not wanted:
        raise InputError(f"data.file_list={path}: it names no image")
    if twice := [name for name, count in Counter(wanted).items() if count > 1]:
        raise InputError(f"data.file_list={path}: {twice[0]!r} is named twice")
    names = [images.name(i) for i in range(len(images))]
    short = [name.rpartition("/")[2] for name in names]
    ambiguous = {name for name, count in Counter(short).items() if count > 1}
    places = {name: i for i, name in enumerate(short) if name not in ambiguous} | {n: i for i, n in enumerate(names)}
    for name in wanted:
        if name not in places:
            several = f"several images of {images.root}: give paths" if name in ambiguous else f"not in {images.root}"
            raise InputError(f"data.file_list={path}: {name!r} is {several}")
    found = np.sort([places[name] for name in wanted])
    if (found[1:] == found[:-1]).any():
        raise InputError(
            f"data.file_list={path}: it names {images.name(int(found[np.argmin(np.diff(found))]))!r} twice"
        )
    return found
