"""The error of a bad setting, and how messages show values and suggest names."""

import difflib
import reprlib
from collections.abc import Iterable


class BadSetting(ValueError):
    """A setting that is unknown, of the wrong type or out of range.

    Attributes:
        key: full name of the setting, e.g. "optim.epochs".
    """

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


def require(ok: bool, key: str, value: object, text: str) -> None:
    """Check a condition on a setting.

    Raises:
        BadSetting: `ok` is false. The message is "key=value: text".
    """
    if not ok:
        raise BadSetting(key, f"{key}: {text}" if value is None else f"{key}={format_value(value)}: {text}")


def unknown(name: str, what: str, known: Iterable[str]) -> BadSetting:
    """Return the error for an unknown name, with the nearest known name as a suggestion."""
    near = nearest(name, known)
    return BadSetting(name, f"{format_name(name)}: unknown {what}" + (f"; did you mean {near}?" if near else ""))


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 128 else f"a number of {value.bit_length()} bits"


def format_value(value: object) -> str:
    """Return a short text of any value. Tuples of numbers look as on the command line: 1,5,10."""
    if isinstance(value, tuple) and 0 < len(value) < 10 and all(type(item) in (int, float) for item in value):
        return ",".join(map(format_value, value))
    return _ShortRepr().repr(value)


def format_name(name: str) -> str:
    """Return a name that the user wrote, truncated to fit into a message."""
    if not name:
        return "''"
    return name if len(name) <= 80 else f"{name[:60]}..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant, or None.

    The order of preference: the same name up to case, dashes and underscores; a name that starts
    with it; the same last component ("epochs" for "optim.epochs"); a similar name; a similar last
    component.
    """

    def normalize(text: str) -> str:
        return text.lstrip("-").lower().replace("-", "_")

    def last(text: str) -> str:
        return text.rpartition(".")[2]

    asked, originals = normalize(name), {normalize(other): other for other in known}
    if asked in originals:
        return originals[asked]
    if longer := [other for other in originals if asked and other.startswith(asked)]:
        return originals[min(longer, key=len)]
    by_last: dict[str, list[str]] = {}
    for other in originals:
        by_last.setdefault(last(other), []).append(other)
    if last(asked) in by_last:
        close = difflib.get_close_matches(asked, by_last[last(asked)], 1, 0) or by_last[last(asked)]
        return originals[close[0]]
    if close := difflib.get_close_matches(asked, originals, 1, 0.6):
        return originals[close[0]]
    if close := difflib.get_close_matches(last(asked), by_last, 1, 0.7):
        return originals[by_last[close[0]][0]]
    return None
