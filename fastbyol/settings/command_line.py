"""Read a command line: the command, its options and the settings of a config.

Values are read and checked as in YAML files, with the same messages.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.settings.base import is_required, nest
from fastbyol.settings.commands import CONFIG, HELP, IMPORT, VERSION, Call, Command, Group, Option, options_of
from fastbyol.settings.config_files import find_config
from fastbyol.settings.help import field_docs, first_sentence, format_command, format_group
from fastbyol.settings.messages import BadSetting, format_name, format_value, nearest
from fastbyol.settings.types import check, expand_path, expected, parse
from fastbyol.settings.yaml_file import read_yaml

_SHORT = {"--batch-size": "--data.batch_size"}
_DASHES = "-\N{HYPHEN}\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"  # what word processors turn -- into


class HelpRequested(Exception):
    """The command line asks for help. The text is the help page."""


def parse_command_line(words: Sequence[str], group: Group) -> Call:
    """Return what a command line asks for.

    Args:
        words: the arguments after the program's name.
        group: all commands.

    Raises:
        InputError: a command, an option or a value is unknown or invalid.
        HelpRequested: the command line asks for help.
    """
    words = [*words[1:], "--help"] if words[:1] == ["help"] else list(words)
    command, path = _find_command(words, group)
    reader = _Reader(command, " ".join(path))
    try:
        values = reader.read(words)
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(command.options) if f.name in values}
        reader.check_required(own)
        return Call(path[-1], command, command.options.build(own), Config.build(values), tuple(reader.modules))
    except BadSetting as error:
        raise InputError(reader.with_source(error)) from None


def _find_command(words: list[str], group: Group) -> tuple[Command, list[str]]:
    """Pop the command's words, and return the command and [fastbyol, *words]."""
    level: Command | Group = group
    path = ["fastbyol"]
    while isinstance(level, Group):
        word = words.pop(0) if words else ""
        if word in HELP:
            raise HelpRequested(format_group(level, path))
        if not word or word.startswith("-"):
            given = f"unknown option {format_name(word)}; " if word else ""
            raise InputError(f"{given}{' '.join(path)} takes a command first: one of {', '.join(level.commands)}")
        if word not in level.commands:
            raise InputError(f"unknown command {format_value(word)}; {_suggest_command(word, level)}")
        path.append(word)
        level = level.commands[word]
    return level, path


def _suggest_command(word: str, group: Group) -> str:
    """Suggest the nearest command of the group or of one of its groups."""
    known = dict.fromkeys(group.commands, "")
    for name, inner in group.commands.items():
        if isinstance(inner, Group):
            known = dict.fromkeys(inner.commands, f"{name} ") | known
    if near := nearest(word, known):
        return f"did you mean '{known[near]}{near}'?"
    return f"one of {', '.join(group.commands)}"


class _Reader:
    """Reads the words after a command.

    Args:
        command: the command.
        name: its words, e.g. "fastbyol eval knn".
    """

    def __init__(self, command: Command, name: str) -> None:
        self._command, self._name = command, name
        self._own = list(options_of(command.options))
        self._config = list(options_of(Config)) if command.takes_config else []
        self._named = {option.name: option for option in (*self._own, *self._config) if option.named}
        self._positional = [option for option in self._own if not option.named]
        self._extra = (
            *((CONFIG, *_SHORT) if command.takes_config else ()),
            *([IMPORT] if command.takes_modules else []),
        )
        self.modules: list[str] = []
        self._values: dict[str, Any] = {}  # full name -> value
        self._sources: dict[str, str] = {}  # full name -> "FILE, line N", of settings from a file

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the settings, as a nested dict, that the words and the config files in them give.

        A later word overrides an earlier one.

        Raises:
            InputError, BadSetting: a word is unknown, or a value has the wrong type.
            HelpRequested: the words ask for help.
        """
        left, positional = list(words), []
        while left:
            word = left.pop(0)
            if word == "--":
                positional += left
                break
            if word.startswith("-"):
                self._read_option(word, left)
            else:
                positional.append(word)
        for option in self._positional:
            if not positional:
                break
            given, positional = (positional, []) if option.takes_rest else (positional[0], positional[1:])
            self._set(option, parse(option.field.type, given))
        if positional:
            raise InputError(self._explain_unexpected(positional[0]))
        return nest(self._values)

    def _read_option(self, word: str, left: list[str]) -> None:
        """Read one option. Without a "=", its value is popped from the words that are left."""
        name, equals, value = word.partition("=")
        if name in (*HELP, *VERSION) and equals:
            raise InputError(f"{name} takes no value")
        if name in HELP:
            raise HelpRequested(self._help(everything=name == "--help-all"))
        if self._command.takes_config:
            given = name = _SHORT.get(name, name)
            name = f"--{Config.current_name(name.removeprefix('--'), '--')}" if name.startswith("--") else name
        option = self._named.get(name)
        is_config = name == CONFIG and self._command.takes_config
        is_import = name == IMPORT and self._command.takes_modules
        if option is None and not is_config and not is_import:
            raise InputError(f"unknown option {format_name(name)}; {self._suggest_option(name)}")
        if option is not None and option.flag:
            if equals:
                raise InputError(f"{name} takes no value")
            self._set(option, True)
            return
        if not equals:
            if not left or left[0].startswith("--"):
                extra = "the name of a module" if is_import else "a YAML file"
                wanted = extra if option is None else expected(option.field.type)
                raise InputError(f"{name}: needs a value: {wanted}")
            value = left.pop(0)
        if is_import:
            self._read_import(value)
            return
        if option is None:
            self._read_config(value)
            return
        if self._command.takes_config:
            value = Config.current_value(given.removeprefix("--"), value)
        self._set(option, parse(option.field.type, value))

    def _read_config(self, path: str) -> None:
        file = find_config(expand_path(check(str, path, CONFIG), CONFIG))
        for key, (value, source) in read_yaml(str(file), Config).items():
            self._values[key], self._sources[key] = value, source

    def _read_import(self, name: str) -> None:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            hint = f"; write {name[:-3].replace('/', '.')}" if name.endswith(".py") else ""
            raise InputError(f"{IMPORT} {format_value(name)}: expected the name of a module, such as my_module{hint}")
        self.modules.append(name)

    def _set(self, option: Option, value: Any) -> None:
        self._sources.pop(option.dest, None)  # an error in this word is not the file's
        self._values[option.dest] = check(option.field.type, value, option.key)

    def check_required(self, given: Mapping[str, Any]) -> None:
        """Raise InputError if an option without a default is not given."""
        for option in self._own:
            if is_required(option.field) and option.dest not in given:
                text = first_sentence(field_docs(self._command.options)[option.dest]).rstrip(".")
                raise InputError(f"{option.name} is missing ({expected(option.field.type)}): {text}")

    def with_source(self, error: BadSetting) -> str:
        """Return the message with the file and line of the setting, or the option's dashes."""
        text = str(error)
        if source := self._sources.get(error.key):
            return f"{source}: {text}"
        return f"--{text}" if f"--{error.key}" in self._named else text

    def _explain_unexpected(self, word: str) -> str:
        name = word.partition("=")[0].lstrip(_DASHES)
        if f"--{name}" in (*self._named, *self._extra):
            return f"unexpected argument {format_value(word)}; did you mean --{format_name(word.lstrip(_DASHES))}?"
        return f"unexpected argument {format_value(word)}; see {self._name} --help"

    def _suggest_option(self, name: str) -> str:
        if name in VERSION:
            return "fastbyol --version shows the version"
        if near := nearest(name, [*self._named, *self._extra]):
            return f"did you mean {near}?"
        return f"{self._name} {'--help-all' if self._command.takes_config else '--help'} lists all"

    def _help(self, *, everything: bool) -> str:
        return format_command(self._name, self._command, self._own, self._config, everything=everything)
