"""Limits of settings, attached to their types: `k: Annotated[int, at_least(1), at_most(10**6)]`.

A limit is any callable (value, key) -> value that raises BadSetting. Settings applies the limits of
a field, in order, after its type has been checked; None is not limited.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from fastbyol.settings.messages import BadSetting, require
from fastbyol.settings.types import expand_path, union_members

URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


def apply_limits(kind: Any, value: Any, key: str) -> Any:
    """Return the value after all limits in the annotations of `kind`, which may convert it.

    Raises:
        BadSetting: a limit is violated.
    """
    for limit in _limits(kind) if value is not None else ():
        value = limit(value, key)
    return value


def _limits(kind: Any) -> list[Callable[[Any, str], Any]]:
    if get_origin(kind) is Annotated:
        inner, *limits = get_args(kind)
        return [*_limits(inner), *limits]
    members = union_members(kind)
    return [] if members == (kind,) else [limit for member in members for limit in _limits(member)]


@dataclass(frozen=True)
class Limit:
    """Limit of a number, or of every number in a list. Other values pass."""

    text: str
    """What messages say: "must ..."."""
    allows: Callable[[float], bool]

    def __call__(self, value: Any, key: str) -> Any:
        """Check the value and return it unchanged."""
        many = isinstance(value, list | tuple)
        numbers = [item for item in (value if many else [value]) if isinstance(item, int | float)]
        text = self.text.replace("must", "must all", 1) if many else self.text
        require(all(map(self.allows, numbers)), key, value, text)
        return value


def at_least(low: float, zero: str = "", message: str = "") -> Limit:
    """number >= low. `zero` says what 0 means, `message` replaces the derived message."""
    derived = f"must be at least {low}" if low else f"must be 0{f' ({zero})' if zero else ''} or more"
    return Limit(message or derived, lambda number: number >= low)


def above(low: float) -> Limit:
    """number > low."""
    return Limit(f"must be above {low}", lambda number: number > low)


def at_most(high: float) -> Limit:
    """number <= high."""
    return Limit(f"must be at most {high}", lambda number: number <= high)


def interval(low: float, high: float, *, open_low: bool = False, open_high: bool = False, zero: bool = False) -> Limit:
    """low <= number <= high; an open end is excluded. `zero` allows 0 in addition."""

    def allows(number: float) -> bool:
        inside = (number > low if open_low else number >= low) and (number < high if open_high else number <= high)
        return inside or (zero and number == 0)

    start, end = "(" if open_low else "[", ")" if open_high else "]"
    return Limit(f"must {'be 0 or ' if zero else ''}lie in {start}{low}, {high}{end}", allows)


def absolute_path(path: str, key: str) -> str:
    """Return an absolute path, with ~ expanded. '..' stays, since links change its meaning. URLs
    are returned unchanged.

    Raises:
        BadSetting: as `expand_path`; or the working directory is gone.
    """
    if URL.match(path):
        return path
    try:
        return str(Path(expand_path(path, key)).absolute())
    except FileNotFoundError:
        raise BadSetting(key, f"{key}={path!r}: the working directory is gone; write the path in full") from None


def folder_name(name: str, key: str) -> str:
    """Return the name if it can be that of a folder.

    Raises:
        BadSetting: it is empty, '.' or '..', or too long; has a '/', unprintable characters, blanks
            around it or a leading '-'.
    """
    require(bool(name.strip()), key, name, "must not be empty")
    ok = "/" not in name and name not in (".", "..")
    require(ok, key, name, "must be a non-empty name without '/', and not '.' or '..'")
    ok = name.isprintable() and name == name.strip()
    require(ok, key, name, "must be of printable UTF-8 characters, without blanks around it")
    require(not name.startswith("-"), key, name, "must not begin with '-'")
    # File systems allow 255 bytes. Files next to the folder use its name plus a suffix.
    require(len(name.encode()) <= 200, key, name, "must have at most 200 bytes in UTF-8")
    return name


MAX_THREADS, MAX_SIDE_PX, MAX_COUNT = 4096, 2**16, 10**6
Count = Annotated[int, at_least(1), at_most(MAX_COUNT)]
Threads = Annotated[int, at_least(0, "all cores"), at_most(MAX_THREADS)]
Seed = Annotated[int, at_least(0)]
Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, at_least(0)]
Seconds = Annotated[float, above(0), at_most(10**8)]
UnitInterval = Annotated[float, interval(0, 1)]
BelowOne = Annotated[float, interval(0, 1, open_high=True)]
Fraction = Annotated[float, interval(0, 1, open_low=True)]
ExpandedPath = Annotated[str, expand_path]
AbsolutePath = Annotated[str, absolute_path]
