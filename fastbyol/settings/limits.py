"""Limits of settings, attached to their types: `epochs: Annotated[int, AtLeast(1), AtMost(10**6)]`.

A limit is any callable (value, key) -> value that raises BadSetting. Settings applies the limits of
a field, in order, after its type has been checked; None is not limited.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from fastbyol.settings.messages import BadSetting, require
from fastbyol.settings.types import expand_path, union_members


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


class Limit:
    """Base class of limits of a number, or of every number in a list. Other values pass."""

    def __call__(self, value: Any, key: str) -> Any:
        """Check the value and return it unchanged."""
        many = isinstance(value, list | tuple)
        numbers = [item for item in (value if many else [value]) if isinstance(item, int | float)]
        text = self._text.replace("must", "must all", 1) if many else self._text
        require(all(map(self._allows, numbers)), key, value, text)
        return value

    @property
    def _text(self) -> str:
        raise NotImplementedError

    def _allows(self, number: float) -> bool:
        raise NotImplementedError


@dataclass(frozen=True)
class AtLeast(Limit):
    """number >= low. `zero` says what 0 means, `message` replaces the derived message."""

    low: float
    zero: str = ""
    message: str = ""

    @property
    def _text(self) -> str:
        if self.message or self.low != 0:
            return self.message or f"must be at least {self.low}"
        return f"must be 0 ({self.zero}) or more" if self.zero else "must be 0 or more"

    def _allows(self, number: float) -> bool:
        return number >= self.low


@dataclass(frozen=True)
class Above(Limit):
    """number > low."""

    low: float

    @property
    def _text(self) -> str:
        return f"must be above {self.low}"

    def _allows(self, number: float) -> bool:
        return number > self.low


@dataclass(frozen=True)
class AtMost(Limit):
    """number <= high."""

    high: float

    @property
    def _text(self) -> str:
        return f"must be at most {self.high}"

    def _allows(self, number: float) -> bool:
        return number <= self.high


@dataclass(frozen=True)
class Interval(Limit):
    """low <= number <= high; an open end is excluded. `zero` allows 0 in addition."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    zero: bool = False

    @property
    def _text(self) -> str:
        start, end = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"must {'be 0 or ' if self.zero else ''}lie in {start}{self.low}, {self.high}{end}"

    def _allows(self, number: float) -> bool:
        if number == 0 and self.zero:
            return True
        above = number > self.low if self.open_low else number >= self.low
        return above and (number < self.high if self.open_high else number <= self.high)


def absolute_path(path: str, key: str) -> str:
    """Return an absolute path, with ~ expanded. '..' stays, since links change its meaning.

    Raises:
        BadSetting: as `expand_path`; or the working directory is gone.
    """
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
Count = Annotated[int, AtLeast(1), AtMost(MAX_COUNT)]
Threads = Annotated[int, AtLeast(0, "all cores"), AtMost(MAX_THREADS)]
Seed = Annotated[int, AtLeast(0)]
Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, AtLeast(0)]
Seconds = Annotated[float, Above(0), AtMost(10**8)]
UnitInterval = Annotated[float, Interval(0, 1)]
BelowOne = Annotated[float, Interval(0, 1, open_high=True)]
Fraction = Annotated[float, Interval(0, 1, open_low=True)]
ExpandedPath = Annotated[str, expand_path]
AbsolutePath = Annotated[str, absolute_path]
