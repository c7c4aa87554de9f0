"""Types of settings: what a type accepts, how text becomes a value, and how a value is checked.

The types are int, float, bool, str, Path, Literal, list and tuple of one item type, dict of names
and plain values, unions of these, None, and Annotated versions, whose annotations (see limits.py)
are ignored here.

`parse` reads YAML files and the command line, so both accept the same spellings: 1e-6 is a number,
010 is ten, and yes is true for a bool and the text "yes" for a name.
"""

import math
import numbers
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from fastbyol.settings.messages import BadSetting, format_value, nearest, require

NULL_WORDS = ("null", "~")
_INT = re.compile(r"[+-]?[0-9][0-9_]{0,99}")
_FLOAT = re.compile(
    r"[+-]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][+-]?[0-9]{1,9})?|[+-]?\.?(inf|nan)", re.IGNORECASE
)
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_MAX_INT, _MAX_FLOAT = 2**63 - 1, 1e30  # what int64 and float32 hold
_MAX_PATH_BYTES, _MAX_NAME_BYTES = 4095, 255  # Linux


@dataclass(frozen=True)
class Malformed:
    """Input that no type accepts, such as a nested list. Messages show `text` unchanged."""

    text: str

    def __repr__(self) -> str:
        return self.text


def union_members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _bare(kind: Any) -> Any:
    """Return a type without its annotations."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _flatten(kind: Any) -> list[Any]:
    """Return the members of a union, nested ones too, or the type itself, without annotations."""
    members = union_members(_bare(kind))
    return [_bare(kind)] if len(members) == 1 else [part for member in members for part in _flatten(member)]


def parts(kind: Any) -> list[Any]:
    """Return the members of a union, or the type itself, without annotations and None."""
    return [part for part in _flatten(kind) if part is not NoneType]


def is_optional(kind: Any) -> bool:
    """Return True if the type accepts None."""
    return NoneType in _flatten(kind)


def expected(kind: Any) -> str:
    """Return what a type accepts, e.g. "an integer or auto"."""
    return " or ".join(map(_expected_part, parts(kind)))


def is_sequence(kind: Any) -> bool:
    """Return True if the type is a list or tuple, or accepts one."""
    return any(get_origin(part) in (list, tuple) for part in parts(kind))


def _expected_part(kind: Any) -> str:
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(kind) in (list, tuple):
        item = _bare(get_args(kind)[0])
        if get_origin(item) is Literal:
            return f"a list of {', '.join(get_args(item))}"
        lists = {int: "integers, such as 1,5,10", float: "numbers, such as 0.1,0.3", Path: "paths"}
        return lists.get(item, "names, such as cat,dog")
    if get_origin(kind) is dict:
        return "names and values, such as {img_size: 64}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}[kind]


class _WrongType(Exception):
    """A value is not of the type. `hint` is appended to the message."""

    def __init__(self, hint: str = "") -> None:
        super().__init__(hint)
        self.hint = hint


def check(kind: Any, value: Any, key: str) -> Any:
    """Return the value as a field of this type holds it.

    Numbers convert without loss: 3.0 is an integer and 3 is a number, but True is neither.

    Raises:
        BadSetting: the value is of another type, not finite, too large, or text that no path can
            hold.
    """
    if value is None:
        if is_optional(kind):
            return None
        raise BadSetting(key, f"{key}: has no value (blank); expected {expected(kind)}")
    hints = ""
    for part in parts(kind):
        try:
            return _CHECKS[get_origin(part) or part](part, value, key)
        except _WrongType as wrong:
            hints += wrong.hint
    raise BadSetting(key, f"{key}={format_value(value)}: expected {expected(kind)}{hints}")


def _check_choice(kind: Any, value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _WrongType
    if value not in get_args(kind):
        near = nearest(value, get_args(kind))
        raise _WrongType(f"; did you mean {near}?" if near else "")
    return value


def _check_sequence(kind: Any, value: Any, key: str) -> list | tuple:
    if not isinstance(value, list | tuple):
        raise _WrongType
    for item in value:
        require(not isinstance(item, Malformed), key, item, f"expected {expected(kind)}")
    return get_origin(kind)(check(get_args(kind)[0], item, key) for item in value)


def _check_mapping(kind: Any, value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _WrongType
    for name, item in value.items():
        require(isinstance(name, str), key, name, "names must be text")
        for part in item if isinstance(item, list | tuple) else [item]:
            plain = part is None or isinstance(part, bool | int | float | str)
            require(plain, f"{key}.{name}", part, "must be a number, text, true, false, null or a list of these")
    return {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}


def _check_bool(kind: Any, value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise _WrongType
    return value


def _check_number(kind: Any, value: Any, key: str) -> int | float:
    if kind is float and isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip()):
        raise _WrongType(f"; write {value.strip().replace(',', '.')}")
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _WrongType
    require(isinstance(value, numbers.Integral) or math.isfinite(value), key, value, "must be finite")
    most = _MAX_FLOAT if kind is float else _MAX_INT
    require(abs(value) <= most, key, value, f"must lie within {most:.3g} of 0")
    if kind is int and value != int(value):
        raise _WrongType
    return value if type(value) in (int, kind) else kind(value)


def _check_text(kind: Any, value: Any, key: str) -> str | Path:
    if not isinstance(value, str | os.PathLike):
        raise _WrongType
    text = os.fspath(value)
    require("\0" not in text, key, text, "has a NUL character")
    try:
        text.encode("utf-8", "surrogateescape")  # bytes of a file name that are not UTF-8 are fine
    except UnicodeEncodeError:
        require(False, key, text, "has characters that are not valid Unicode")
    return Path(expand_path(value, key)) if kind is Path and isinstance(value, str) else kind(value)


_CHECKS: dict[Any, Callable[[Any, Any, str], Any]] = {
    Literal: _check_choice,
    list: _check_sequence,
    tuple: _check_sequence,
    dict: _check_mapping,
    bool: _check_bool,
    int: _check_number,
    float: _check_number,
    str: _check_text,
    Path: _check_text,
}


def parse(kind: Any, word: Any) -> Any:
    """Return the value that a word of the command line or of a YAML file stands for.

    A word that is not of this type is returned unchanged; `check` rejects it.

    Args:
        kind: the type.
        word: text, or a list of texts; anything else is returned unchanged.
    """
    if isinstance(word, list):
        return [parse(_item_type(kind), item) for item in word]
    if not isinstance(word, str):
        return word
    text = word.strip()
    if is_optional(kind) and text.lower() in NULL_WORDS:
        return None
    for part in parts(kind):
        parser = _PARSERS.get(get_origin(part) or part)
        value = None if parser is None else parser(part, text)
        if value is not None:
            return value
    return word


def _parse_int(kind: Any, text: str) -> int | float | None:
    """Also return non-integers: 1e3 is an integer, and a message shows 3.5 as a number."""
    return int(text.replace("_", "")) if _INT.fullmatch(text) else _parse_float(kind, text)


def _parse_float(kind: Any, text: str) -> float | None:
    if not _FLOAT.fullmatch(text):
        return None
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


def _parse_bool(kind: Any, text: str) -> bool | None:
    return _BOOLS.get(text.lower())


def _parse_sequence(kind: Any, text: str) -> list[Any]:
    return [parse(get_args(kind)[0], item) for item in _split(text)]


def _parse_mapping(kind: Any, text: str) -> dict[str, Any] | None:
    """Return the mapping of {img_size: 64}; None if it is none."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader) if text.startswith("{") else None
    except (yaml.YAMLError, RecursionError):
        return None
    return None if not isinstance(node, yaml.MappingNode) else mapping_values(node)


def mapping_values(node: yaml.MappingNode) -> Any:
    """Return names and values of a YAML mapping; quoted words are text. Malformed for others."""

    def value(item: yaml.Node) -> Any:
        if isinstance(item, yaml.SequenceNode):
            return [value(part) for part in item.value]
        if not isinstance(item, yaml.ScalarNode):
            return Malformed("a mapping")
        if item.style is not None:
            return item.value
        return None if item.value.lower() in ("", *NULL_WORDS) else parse(_AnyValue, item.value)

    found: dict[str, Any] = {}
    for key, item in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        if name in found:
            return Malformed(f"a mapping with {name!r} twice")
        found[name] = value(item)
    return found


def _split(text: str) -> list[Any]:
    """Return the items of 1,5,10 or of [1, 5, 10], which may be quoted."""
    if text.startswith(("[", "{")):
        try:
            node = yaml.compose(text, Loader=yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError):
            node = None
        if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
            return [item.value for item in node.value]
        if text.startswith("[") or isinstance(node, yaml.MappingNode):
            return [Malformed(format_value(text))]
    return [item.strip() for item in text.split(",")] if text else []


_PARSERS: dict[Any, Callable[[Any, str], Any]] = {
    int: _parse_int,
    float: _parse_float,
    bool: _parse_bool,
    list: _parse_sequence,
    tuple: _parse_sequence,
    dict: _parse_mapping,
}
_AnyValue = int | float | bool | str | None


def _item_type(kind: Any) -> Any:
    """Return the item type of a list, or str for a type that is not a list."""
    return next((get_args(part)[0] for part in parts(kind) if get_origin(part) in (list, tuple)), str)


def expand_path(path: str, key: str) -> str:
    """Return the path with a leading ~ or ~user expanded. A file named ~x is ./~x.

    Raises:
        BadSetting: the path is empty, too long for a file system, or names an unknown home folder.
    """
    require(path != "", key, path, "must not be empty")
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError as error:
        raise BadSetting(
            key, f"{key}={format_value(path)}: paths are {error.encoding} here; set LC_ALL=C.UTF-8"
        ) from None
    fits = sum(map(len, names)) + len(names) <= _MAX_PATH_BYTES and max(map(len, names)) <= _MAX_NAME_BYTES
    limits = f"a path has at most {_MAX_PATH_BYTES} bytes, each name in it {_MAX_NAME_BYTES}"
    require(fits, key, path, f"is too long: {limits}")
    full = os.path.expanduser(path)  # noqa: PTH111 - Path would change ./~x to ~x
    known = full != path or not path.startswith("~")
    require(known, key, path, "this home folder is not known; write the path in full")
    return full
