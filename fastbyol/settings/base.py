"""Settings: dataclasses whose fields are read and checked in one place, with errors in plain words.

`Settings.__post_init__` checks every field against its type, whoever builds the object: Python code, a checkpoint, a YAML file or the command
line. YAML files and the command line hold words, which `parse` turns into values first, so that both take the same spellings: 1e-6 is a
number, 010 is ten, yes is true where a field is true or false and a name where it is a name.
"""

import dataclasses
import difflib
import math
import numbers
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

import yaml

from fastbyol.errors import InputError
from fastbyol.runtime.logging import logger

_WHOLE = re.compile(r"[+-]?[0-9][0-9_]{0,99}")
_NUMBER = re.compile(
    r"[+-]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][+-]?[0-9]{1,9})?|[+-]?\.?(inf|nan)", re.IGNORECASE
)
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULL = ("null", "~")
_LARGEST_WHOLE, _LARGEST = 2**63 - 1, 1e30  # of fields without a limit of their own: what int64 and float32 hold
_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # Linux
# What the parser says -> what to tell, and whether the fault lies where the construct begins (True) or where the parser stops.
_YAML_FAULTS = {
    "another document": ("a second document begins (---): keep one", False),
    "'<document start>'": ("the lines above are indented more than this one: begin them all at column 1", False),
    "'\\t'": ("a tab: write spaces", False),
    "mapping values are not allowed": (
        "this ':' does not fit: quote text that holds ': ', or check the indentation and the ':' of the line above",
        False,
    ),
    "could not find expected ':'": ("expected KEY: VALUE, with a space after the colon", True),
    "parsing a flow": ("a bracket opened here is not closed, or a comma is missing", True),
    "parsing a block": ("this does not fit the lines above: check indentation, '-' and brackets", False),
    "cannot start any token": ("quote a text that begins with this character", False),
    "mapping keys are not allowed": ("quote a text that begins with ?", False),
    "sequence entries are not allowed": ("a list item, '- x', starts on its own line", False),
    "scanning a block scalar": ("quote a text that begins with > or |", True),
    "scanning a quoted scalar": ("a quote opened here is not closed", True),
    "undefined alias": ("the alias behind * has no anchor (&) before it", False),
}
_FILE_KIB = 256  # a config has one or two
_MERGE = "<<"


class BadSetting(ValueError):
    """A setting is unknown, of the wrong type or impossible; `key` is its full name."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 128 else f"a number of {value.bit_length()} bits"


def format_value(value: object) -> str:
    """A value as a message shows it: short, whatever it is; a tuple as it is given, 1,5,10."""
    if isinstance(value, tuple) and 0 < len(value) < 10 and all(type(item) in (int, float) for item in value):
        return ",".join(map(format_value, value))
    return _Brief().repr(value)


def require(ok: bool, key: str, value: object, need: str) -> None:
    """Refuses a setting.

    Raises:
        BadSetting: not ok.
    """
    if not ok:
        raise BadSetting(key, f"{key}: {need}" if value is None else f"{key}={format_value(value)}: {need}")


def expand_path(path: str, key: str) -> str:
    """The path with a leading ~ or ~user replaced by that home folder; a file named ~x is ./~x.

    Raises:
        BadSetting: it is empty, longer than a file system allows, or of a home folder that is not known.
    """
    require(path != "", key, path, "must not be empty")
    try:
        parts = os.fsencode(path).split(b"/")
    except UnicodeEncodeError as error:
        raise BadSetting(
            key, f"{key}={format_value(path)}: paths are {error.encoding} here; set LC_ALL=C.UTF-8"
        ) from None
    long = sum(map(len, parts)) + len(parts) > _LONGEST_PATH or max(map(len, parts)) > _LONGEST_NAME
    need = f"is too long: a path has at most {_LONGEST_PATH} bytes, each name in it {_LONGEST_NAME}"
    require(not long, key, path, need)
    full = os.path.expanduser(path)  # noqa: PTH111 - Path would take ./~x for ~x
    require(
        full != path or not path.startswith("~"), key, path, "this home folder is not known; write the path in full"
    )
    return full


@dataclass(kw_only=True)
class Settings:
    """Base of all dataclasses of settings."""

    PREFIX: ClassVar[str] = ""
    """What messages put before a field's name, e.g. "optim."."""
    MOST: ClassVar[Mapping[str, float]] = {}
    """Largest values of fields that have a natural limit."""

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Old full name -> current full name, of settings that have been renamed."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            key = self.key(f.name)
            value = check(f.type, getattr(self, f.name), key)
            if (most := self.MOST.get(f.name)) is not None:
                for number in value if isinstance(value, list | tuple) else [value]:
                    small = not isinstance(number, int | float) or number <= most
                    require(small, key, value, f"must be at most {most}")
            setattr(self, f.name, value)

    @classmethod
    def key(cls, name: str) -> str:
        """A field as messages and users name it."""
        return cls.PREFIX + name

    @classmethod
    def current_name(cls, name: str, where: str) -> str:
        """Return the current name of a setting. An old name logs one warning that starts with `where`."""
        if name not in cls.RENAMED:
            return name
        logger.warning(f"{where}{name} is now called {cls.RENAMED[name]}; the old name still works")
        return cls.RENAMED[name]

    @classmethod
    def with_current_names(cls, values: Any) -> Any:
        """Return nested settings, such as those of an old checkpoint, with renamed keys under their current names."""
        if not isinstance(values, Mapping):
            return values
        values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        for old, new in cls.RENAMED.items():
            (section, old_key), new_key = old.split("."), new.split(".")[1]
            inner = values.get(section)
            if isinstance(inner, dict) and old_key in inner and new_key not in inner:
                inner[new_key] = inner.pop(old_key)
        return values

    @classmethod
    def build(cls, values: Any, key: str = "") -> Self:
        """An object of nested dicts.

        Args:
            values: of fields, by name.
            key: of the section itself, e.g. "optim".

        Raises:
            BadSetting: a key is unknown or missing, or a value impossible.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, Mapping):
            at = (
                f"{key or 'the settings'}: has no value"
                if values is None
                else f"{key or 'the settings'}={format_value(values)}"
            )
            raise BadSetting(key, f"{at}: {_wanted(cls, key)}")
        for name in values:
            if isinstance(name, str) and name not in known and f"{key}.{name}".lstrip(".") in names(cls, key):
                outer, _, inner = name.partition(".")
                raise BadSetting(
                    name, f"{name}: dotted keys are not accepted here: write {{'{outer}': {{'{inner}': ...}}}}"
                )
            if name not in known:
                raise unknown(f"{key}.{name}" if key else str(name), "key", names(cls, key))
        for f in dataclasses.fields(cls):
            if is_required(f) and f.name not in values:
                raise BadSetting(cls.key(f.name), f"{cls.key(f.name)}: is missing; expected {expected(f.type)}")
        return cls(**values)


def is_required(f: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return f.default is MISSING and f.default_factory is MISSING


def sections(cls: type[Settings]) -> dict[str, type[Settings]]:
    """Fields that are sections of their own."""
    return {
        f.name: f.type for f in dataclasses.fields(cls) if isinstance(f.type, type) and issubclass(f.type, Settings)
    }


def leaves(cls: type[Settings]) -> Iterator[tuple[str, dataclasses.Field, type[Settings]]]:
    """Every setting: its full name, its field, and the class that has it; sections come last."""
    inner = sections(cls)
    for f in dataclasses.fields(cls):
        if f.name not in inner:
            yield f.name, f, cls
    for section, kind in inner.items():
        for name, f, owner in leaves(kind):
            yield f"{section}.{name}", f, owner


def names(cls: type[Settings], section: str = "") -> list[str]:
    """Full names of all settings and sections; `section` is that of the class itself."""
    found = [*(key for key, _, _ in leaves(cls)), *sections(cls)]
    return [f"{section}.{name}" if section else name for name in found]


def _wanted(cls: type[Settings], section: str) -> str:
    return f"expected a section with settings such as {names(cls, section)[0]}"


def parts(kind: Any) -> list[Any]:
    """The types of a union, without None."""
    is_union = get_origin(kind) in (Union, UnionType)
    return [part for part in get_args(kind) if part is not NoneType] if is_union else [kind]


def expected(kind: Any) -> str:
    """What a type accepts, in plain words."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(expected, parts(kind)))
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(kind) in (list, tuple):
        item = get_args(kind)[0]
        return {int: "whole numbers, such as 1,5,10", float: "numbers, such as 0.1,0.3"}.get(
            item, "names, such as cat,dog"
        )
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}[kind]


def check(kind: Any, value: Any, key: str) -> Any:
    """The value as a field of this type holds it: 3.0 is a whole number, 3 a number, and True neither.

    Raises:
        BadSetting: it is of another type, not finite, or a text with a NUL.
    """
    if isinstance(kind, type) and issubclass(kind, Settings):
        return value if isinstance(value, kind) else kind.build(value, key)
    if value is None:
        if NoneType in get_args(kind):
            return None
        raise BadSetting(key, f"{key}: has no value (blank); expected {expected(kind)}")
    wrong = f"expected {expected(kind)}"
    for option in parts(kind):
        if get_origin(option) is Literal and isinstance(value, str):
            if value in get_args(option):
                return value
            near = nearest(value, get_args(option))
            wrong += f"; did you mean {near}?" if near else ""
        elif get_origin(option) in (list, tuple) and isinstance(value, list | tuple):
            other = next((item for item in value if isinstance(item, _Other)), None)
            if other is None:
                return get_origin(option)(check(get_args(option)[0], item, key) for item in value)
            value = other
        elif option is bool and isinstance(value, bool):
            return value
        elif option in (int, float) and isinstance(value, numbers.Real) and not isinstance(value, bool):
            require(isinstance(value, numbers.Integral) or math.isfinite(value), key, value, "must be finite")
            most = _LARGEST if option is float else _LARGEST_WHOLE
            require(abs(value) <= most, key, value, f"must lie within {most:.3g} of 0")
            if type(value) is option or (option is float and type(value) is int):
                return value
            if option is float or value == int(value):
                return option(value)
        elif option in (str, Path) and isinstance(value, str | os.PathLike):
            _check_text(os.fspath(value), key)
            return Path(expand_path(value, key)) if option is Path and isinstance(value, str) else option(value)
        elif option is float and isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip()):
            wrong += f"; write {value.strip().replace(',', '.')}"
    raise BadSetting(key, f"{key}={format_value(value)}: {wrong}")


def _check_text(text: str, key: str) -> None:
    """No path has a NUL, and none can be made of half a character; bytes that are not UTF-8 are fine."""
    require("\0" not in text, key, text, "holds a NUL character")
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        require(False, key, text, "holds characters that are no text")


def parse(kind: Any, word: Any) -> Any:
    """A word of the command line or of a YAML file as a value of this type; what is none stays as it is, for `check` to refuse."""
    if isinstance(word, list):
        return [parse(_item(kind), item) for item in word]
    if not isinstance(word, str):
        return word
    options, text = parts(kind), word.strip()
    if NoneType in get_args(kind) and text.lower() in _NULL:
        return None
    if int in options and _WHOLE.fullmatch(text):
        return int(text.replace("_", ""))
    if (int in options or float in options) and _NUMBER.fullmatch(text):
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    if bool in options:
        return _TRUTH.get(text.lower(), word)
    if any(get_origin(option) in (list, tuple) for option in options):
        return [parse(_item(kind), item) for item in _items(text)]
    return word


def _item(kind: Any) -> Any:
    """The type of a list's items."""
    return get_args(kind)[0] if get_origin(kind) in (list, tuple) else str


def _items(text: str) -> list[Any]:
    """1,5,10 as well as [1, 5, 10], whose items may be quoted."""
    if text.startswith(("[", "{")):
        try:
            node = yaml.compose(text, Loader=yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError):
            node = None
        if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
            return [item.value for item in node.value]
        if text.startswith("[") or isinstance(node, yaml.MappingNode):
            return [_Other(format_value(text))]
    return [item.strip() for item in text.split(",")] if text else []


def nearest(name: str, among: Iterable[str]) -> str | None:
    """The name that was probably meant: the same last part, or nearly the same letters; - and _ count as one."""

    def plain(text: str) -> str:
        return text.lstrip("-").lower().replace("-", "_")

    def last(text: str) -> str:
        return text.rpartition(".")[2]

    asked, known = plain(name), {plain(other): other for other in among}
    if asked in known:
        return known[asked]
    if begun := [other for other in known if asked and other.startswith(asked)]:
        return known[min(begun, key=len)]
    ends: dict[str, list[str]] = {}
    for other in known:
        ends.setdefault(last(other), []).append(other)
    # A whole name comes before a last part, and a last part that is exact before letters that are alike.
    if last(asked) in ends:
        close = difflib.get_close_matches(asked, ends[last(asked)], 1, 0) or ends[last(asked)]
        return known[close[0]]
    if close := difflib.get_close_matches(asked, known, 1, 0.6):
        return known[close[0]]
    if close := difflib.get_close_matches(last(asked), ends, 1, 0.7):
        return known[ends[close[0]][0]]
    return None


def unknown(name: str, what: str, among: Iterable[str], more: str = "") -> BadSetting:
    """The error of a name that is not known, with the one that was probably meant."""
    near = nearest(name, among)
    return BadSetting(name, f"{format_name(name)}: unknown {what}" + (f"; did you mean {near}?" if near else more))


def format_name(name: str) -> str:
    """A name that a user wrote, cut to a length that fits into a line."""
    if not name:
        return "''"
    return name if len(name) <= 80 else f"{name[:60]}..."


def read_yaml(path: str, cls: type[Settings]) -> dict[str, tuple[Any, str]]:
    """The settings in a YAML file: full name -> value, and the place as "FILE, line N".

    Keys and types are checked; whether values fit together is not known before the command line's are there.

    Raises:
        InputError: the file cannot be read, is not YAML, or holds something else than settings of `cls`.
    """
    text = _read_text(path)
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        if node is None:
            raise InputError(f"{path}: holds no settings")
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}: expected settings, such as `optim: {{epochs: 100}}`, found {_found(node)}")
        return {
            key: (value, f"{path}, line {line}")
            for key, (value, line) in _Reader(path, cls).settings(node, cls).items()
        }
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{path}{_yaml_fault(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        shown_character = f"the character U+{error.character:04X}"
        raise InputError(f"{path}, line {line}: {shown_character} is not allowed in a config: remove it") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None


def _yaml_fault(error: yaml.MarkedYAMLError) -> str:
    """Where a file is wrong and what to do, in words of people who write it."""
    problem, mark = f"{error.context}, {error.problem}", error.problem_mark or error.context_mark
    text = f"the config is not YAML: {error.problem or error.context}"
    for known, (told, at_begin) in _YAML_FAULTS.items():
        if known in problem:
            text, mark = told, (error.context_mark if at_begin else None) or mark
            break
    return f", line {mark.line + 1}, column {mark.column + 1}: {text}" if mark else f": {text}"


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_FILE_KIB * 1024 + 1)
    except FileNotFoundError:
        folder, asked = Path(path).parent, Path(path).name
        near = nearest(asked, [file.name for file in folder.iterdir() if file.is_file()]) if folder.is_dir() else None
        hint = f"; did you mean {folder / near}?" if near else ""
        raise InputError(f"config={format_name(path)}: there is no such file{hint}") from None
    except OSError as error:
        raise InputError(f"config={format_name(path)}: cannot be read: {error.strerror}") from None
    if len(data) > _FILE_KIB * 1024:
        raise InputError(f"{path}: is no config: it has more than {_FILE_KIB} KiB")
    if data.count(b"\0") > len(data) / 4:  # UTF-16, which is valid UTF-8 where it holds ASCII alone
        raise InputError(f"{path}: is not UTF-8 text; save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: is not UTF-8 text; save the file as UTF-8") from None


class _Reader:
    """Turns the nodes of a YAML file into words, by the names and sections of a class."""

    def __init__(self, path: str, cls: type[Settings]) -> None:
        self._path, self._names, self._root = path, names(cls), cls
        # By the id of a mapping's node: aliases refer to one node many times.
        self._entries: dict[int, dict[str, tuple[yaml.Node, int]]] = {}

    def settings(self, node: yaml.MappingNode, cls: type[Settings], prefix: str = "") -> dict[str, tuple[Any, int]]:
        """Full name -> value, line."""
        self._refuse_tags(node)
        inner, kinds = sections(cls), {key: f.type for key, f, _ in leaves(cls)}
        found: dict[str, tuple[Any, int]] = {}
        for name, (value, line) in self._of(node).items():
            where = f"{self._path}, line {line}"
            key = self._root.current_name(prefix + name, f"{where}: ")
            try:
                if name in inner and isinstance(value, yaml.MappingNode):
                    new = self.settings(value, inner[name], f"{key}.")
                elif name in inner:
                    blank = isinstance(value, yaml.ScalarNode) and self._words(value) is None
                    at = f"{key}: has no value (blank)" if blank else f"{key}={_found(value)}"
                    raise InputError(f"{where}: {at}: {_wanted(inner[name], key)}")
                elif name in kinds:
                    new = {key: (check(kinds[name], parse(kinds[name], self._words(value)), key), line)}
                else:
                    raise unknown(key, "key", self._names)
            except BadSetting as error:
                raise InputError(f"{where}: {error}") from None
            for twice in new.keys() & found.keys():  # as a section and with a dot
                raise self._set_twice(twice, line, found[twice][1])
            found |= new
        return found

    def _set_twice(self, name: str, line: int, other: int) -> InputError:
        return InputError(f"{self._path}, line {line}: {format_name(name)} is set twice, on line {other} too: keep one")

    def _of(self, node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, int]]:
        """Key -> value, line, with merged mappings (`<<: *name`) below the mapping's own keys."""
        if id(node) in self._entries:
            return self._entries[id(node)]
        self._entries[id(node)] = {}  # a mapping that is merged into itself adds nothing
        own: dict[str, tuple[yaml.Node, int]] = {}
        merged: dict[str, tuple[yaml.Node, int]] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            self._refuse_tags(key, value)
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{self._path}, line {line}: expected a name as key, found {_found(key)}")
            if key.value == _MERGE and key.style is None:
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(part, yaml.MappingNode):
                        raise InputError(f"{self._path}, line {line}: << merges a mapping, found {_found(part)}")
                    merged = self._of(part) | merged
                continue
            if key.value in own:
                raise self._set_twice(key.value, line, own[key.value][1])
            own[key.value] = value, line
        self._entries[id(node)] = merged | own
        return self._entries[id(node)]

    def _words(self, node: yaml.Node) -> Any:
        """Text, None, a list of texts, or a description of what can be no setting."""
        if isinstance(node, yaml.SequenceNode):
            self._refuse_tags(*node.value)
            return [
                self._words(item) if isinstance(item, yaml.ScalarNode) else _Other(_found(item)) for item in node.value
            ]
        if isinstance(node, yaml.MappingNode):
            return _Other(_found(node))
        blank = node.style is None and node.value.lower() in ("", *_NULL)
        return None if blank else node.value

    def _refuse_tags(self, *nodes: yaml.Node) -> None:
        """Raises InputError where a tag such as !!python/object asks for a type: fields have theirs."""
        for node in nodes:
            if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
                tag = node.tag.replace("tag:yaml.org,2002:", "!!")
                raise InputError(
                    f"{self._path}, line {node.start_mark.line + 1}: the tag {format_value(tag)} is not accepted: write the value alone"
                )


@dataclass(frozen=True)
class _Other:
    """Something in a YAML file that no setting takes."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _found(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return format_value(node.value) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
