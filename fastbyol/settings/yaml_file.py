"""Read settings from a YAML file."""

from typing import Any, get_origin

import yaml

from fastbyol.errors import InputError
from fastbyol.settings.base import Settings, expected_section, leaves, names, sections
from fastbyol.settings.messages import BadSetting, format_name, format_value, unknown
from fastbyol.settings.types import NULL_WORDS, Malformed, check, mapping_values, parse

_MAX_KIB = 256  # a config has one or two
_MERGE_KEY = "<<"
_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))

# Part of PyYAML's message -> our message, and True if the error is at the start of the construct
# rather than where PyYAML stopped.
_YAML_ERRORS = {
    "another document": ("a second document begins (---): keep one", False),
    "'<document start>'": ("the lines above are indented more than this one: begin them all at column 1", False),
    "'\\t'": ("a tab: use spaces", False),
    "mapping values are not allowed": (
        "unexpected ':': quote text that contains ': ', or check the indentation and the ':' of the line above",
        False,
    ),
    "could not find expected ':'": ("expected KEY: VALUE, with a space after the colon", True),
    "parsing a flow": ("a bracket opened here is not closed, or a comma is missing", True),
    "parsing a block": ("this does not fit the lines above: check indentation, '-' and brackets", False),
    "cannot start any token": ("quote text that begins with this character", False),
    "mapping keys are not allowed": ("quote text that begins with ?", False),
    "sequence entries are not allowed": ("a list item, '- x', starts on its own line", False),
    "scanning a block scalar": ("quote text that begins with > or |", True),
    "scanning a quoted scalar": ("a quote opened here is not closed", True),
    "undefined alias": ("the alias after * has no anchor (&) before it", False),
}


def read_yaml(path: str, cls: type[Settings]) -> dict[str, tuple[Any, str]]:
    """Return the settings in a YAML file: full name -> (value, "FILE, line N").

    Keys and types are checked. Limits are checked when the object is built, since the command line
    may override a value.

    Args:
        path: the file.
        cls: the settings that the file may hold.

    Raises:
        InputError: the file cannot be read, is not YAML, or has an unknown key or a value of the
            wrong type.
    """
    text = _read_text(path)
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        if node is None:
            raise InputError(f"{path}: has no settings")
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}: expected settings, such as `optim: {{epochs: 100}}`, found {_describe(node)}")
        found = _NodeReader(path, cls).settings(node, cls)
        return {key: (value, f"{path}, line {line}") for key, (value, line) in found.items()}
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{path}{_explain(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"the character U+{error.character:04X}"
        raise InputError(f"{path}, line {line}: {character} is not allowed in a config: remove it") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None


def _explain(error: yaml.MarkedYAMLError) -> str:
    """Return the position and a plain explanation of a syntax error."""
    problem, mark = f"{error.context}, {error.problem}", error.problem_mark or error.context_mark
    text = f"the config is not valid YAML: {error.problem or error.context}"
    for known, (explanation, at_start) in _YAML_ERRORS.items():
        if known in problem:
            text, mark = explanation, (error.context_mark if at_start else None) or mark
            break
    return f", line {mark.line + 1}, column {mark.column + 1}: {text}" if mark else f": {text}"


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_KIB * 1024 + 1)
    except OSError as error:
        raise InputError(f"config={format_name(path)}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_KIB * 1024:
        raise InputError(f"{path}: is not a config: it has more than {_MAX_KIB} KiB")
    if data.count(b"\0") > len(data) / 4:  # UTF-16, whose ASCII characters are valid UTF-8 too
        raise InputError(f"{path}: is not UTF-8 text; save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: is not UTF-8 text; save the file as UTF-8") from None


class _NodeReader:
    """Turns YAML nodes into values, using the field types of a class."""

    def __init__(self, path: str, cls: type[Settings]) -> None:
        self._path, self._names, self._root = path, names(cls), cls
        self._types = {key: f.type for key, f, _ in leaves(cls)}
        # Mappings by id(node), since aliases refer to one node many times.
        self._mappings: dict[int, dict[str, tuple[yaml.Node, int]]] = {}

    def settings(self, node: yaml.MappingNode, cls: type[Settings], prefix: str = "") -> dict[str, tuple[Any, int]]:
        """Return full name -> (value, line) of a section."""
        self._reject_tags(node)
        inner = sections(cls)
        found: dict[str, tuple[Any, int]] = {}
        for name, (value, line) in self._entries(node).items():
            where = f"{self._path}, line {line}"
            key = self._root.current_name(prefix + name, f"{where}: ")
            try:
                if name in inner:
                    new = self._section(value, inner[name], key, where)
                elif key in self._types:
                    kind = self._types[key]
                    words = self._root.current_value(prefix + name, self._words(value, kind))
                    new = {key: (check(kind, parse(kind, words), key), line)}
                else:
                    raise unknown(key, "key", self._names)
            except BadSetting as error:
                raise InputError(f"{where}: {error}") from None
            for twice in new.keys() & found.keys():  # nested and dotted, or old and new name
                raise self._set_twice(twice, line, found[twice][1])
            found |= new
        return found

    def _section(self, node: yaml.Node, cls: type[Settings], key: str, where: str) -> dict[str, tuple[Any, int]]:
        if isinstance(node, yaml.MappingNode):
            return self.settings(node, cls, f"{key}.")
        blank = isinstance(node, yaml.ScalarNode) and self._words(node) is None
        given = f"{key}: has no value (blank)" if blank else f"{key}={_describe(node)}"
        raise InputError(f"{where}: {given}: {expected_section(cls, key)}")

    def _set_twice(self, name: str, line: int, other: int) -> InputError:
        return InputError(f"{self._path}, line {line}: {format_name(name)} is set twice, on line {other} too: keep one")

    def _entries(self, node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, int]]:
        """Return key -> (value, line). Own keys override merged ones (`<<: *name`)."""
        if id(node) in self._mappings:
            return self._mappings[id(node)]
        self._mappings[id(node)] = {}  # a mapping that is merged into itself adds nothing
        own: dict[str, tuple[yaml.Node, int]] = {}
        merged: dict[str, tuple[yaml.Node, int]] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            self._reject_tags(key, value)
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{self._path}, line {line}: expected a name as key, found {_describe(key)}")
            if key.value == _MERGE_KEY and key.style is None:
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(part, yaml.MappingNode):
                        raise InputError(f"{self._path}, line {line}: << merges a mapping, found {_describe(part)}")
                    merged = self._entries(part) | merged
                continue
            if key.value in own:
                raise self._set_twice(key.value, line, own[key.value][1])
            own[key.value] = value, line
        self._mappings[id(node)] = merged | own
        return self._mappings[id(node)]

    def _words(self, node: yaml.Node, kind: Any = None) -> Any:
        """Return text, None, or a list of these; names and words if `kind` is a dict; Malformed for
        anything else.
        """
        if isinstance(node, yaml.SequenceNode):
            self._reject_tags(*node.value)
            return [
                self._words(item) if isinstance(item, yaml.ScalarNode) else Malformed(_describe(item))
                for item in node.value
            ]
        if isinstance(node, yaml.MappingNode):
            if get_origin(kind) is not dict:
                return Malformed(_describe(node))
            self._reject_tags(*(part for pair in node.value for part in pair))
            return mapping_values(node)
        blank = node.style is None and node.value.lower() in ("", *NULL_WORDS)
        return None if blank else node.value

    def _reject_tags(self, *nodes: yaml.Node) -> None:
        """Raise InputError for a tag such as !!python/object. The fields' types decide."""
        for node in nodes:
            if node.tag not in _TAGS:
                tag = format_value(node.tag.replace("tag:yaml.org,2002:", "!!"))
                line = node.start_mark.line + 1
                raise InputError(f"{self._path}, line {line}: the tag {tag} is not accepted: write only the value")


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return format_value(node.value) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
