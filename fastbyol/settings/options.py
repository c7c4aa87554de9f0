"""Words of a command line -> settings, and the help pages.

Values are read by settings.py, so that what a user is told about a wrong one is the same for the command line and for YAML files.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.settings.base import Settings, is_required, leaves, read_yaml, sections
from fastbyol.settings.messages import BadSetting, format_name, format_value, nearest
from fastbyol.settings.types import check, expand_path, expected, parse, parts

HELP = ("-h", "--help", "--help-all")
VERSION = ("-V", "--version")
_CONFIG = "--config"
_SHORT = {"--batch-size": "--data.batch_size"}
_COMMON = (  # what --help shows of a config's settings
    *(
        "data.root",
        "name",
        "runs",
        "resume",
        "init",
        "seed",
        "device",
        "precision",
        "data.batch_size",
        "data.image_size_px",
    ),
    *(
        "data.backend",
        "model.backbone",
        "optim.epochs",
        "optim.base_lr",
        "step.mode",
        "knn.every_epochs",
        "probe.enabled",
    ),
)
_OF_TRAINING = (
    "name",
    "runs",
    "resume",
    "init",
    "knn.every_epochs",
    "probe.enabled",
)  # other commands' --help goes without
_HELP_WIDTH = 118
_DASHES = "-\N{HYPHEN}\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"  # what word processors make of --


@dataclass(kw_only=True)
class Options(Settings):
    """Options of a command that are no part of a config."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ()
    """Fields that are given without a name, in this order."""

    @classmethod
    def key(cls, name: str) -> str:
        """--NAME, or the name alone of what is given without one."""
        return name if name in cls.POSITIONAL else f"--{name}"


class HelpAsked(Exception):
    """Its text is the help page."""


@dataclass(frozen=True)
class Command:
    """One sub-command."""

    work: Callable[["Call"], int]
    options: type[Settings] = Options
    text: str = ""
    """What it does; by default the first line of its options' docstring."""
    takes_config: bool = False
    takes_ranks: bool = False
    """Whether torchrun may start it in several processes."""

    @property
    def summary(self) -> str:
        """One line for the help page."""
        return self.text or (self.options.__doc__ or "").splitlines()[0]


@dataclass(frozen=True)
class Group:
    """Sub-commands by name, and what they have in common."""

    summary: str
    commands: Mapping[str, "Command | Group"]


@dataclass(frozen=True)
class Call:
    """A command line that has been read: what to do, with which settings."""

    name: str
    """The last of the command's words, e.g. knn."""
    command: Command
    options: Any
    config: Config
    """The defaults where the command takes none."""


def read(words: Sequence[str], group: Group) -> Call:
    """What a command line asks for.

    Raises:
        InputError: it is none.
        HelpAsked: it asks for help.
    """
    words = [*words[1:], "--help"] if words[:1] == ["help"] else list(words)
    level: Command | Group = group
    path = ["fastbyol"]
    while isinstance(level, Group):
        word = words.pop(0) if words else ""
        if word in HELP:
            raise HelpAsked(_overview(level, path))
        if not word or word.startswith("-"):
            given = f"unknown option {format_name(word)}; " if word else ""
            raise InputError(f"{given}{' '.join(path)} takes a command first: one of {', '.join(level.commands)}")
        if word not in level.commands:
            raise InputError(f"unknown command {format_value(word)}; {_instead(word, level)}")
        path.append(word)
        level = level.commands[word]
    reader = _Reader(level, " ".join(path))
    try:
        values = reader.read(words)
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(level.options) if f.name in values}
        reader.require_own(own)
        return Call(path[-1], level, level.options.build(own), Config.build(values))
    except BadSetting as error:
        raise InputError(reader.placed(error)) from None


def _instead(word: str, group: Group) -> str:
    """A command of the group, or of a group in it, whose name is nearest."""
    known = dict.fromkeys(group.commands, "")
    for name, inner in group.commands.items():
        if isinstance(inner, Group):
            known = dict.fromkeys(inner.commands, f"{name} ") | known
    if near := nearest(word, known):
        return f"did you mean '{known[near]}{near}'?"
    return f"one of {', '.join(group.commands)}"


@dataclass(frozen=True)
class Option:
    """One option or positional argument of a command."""

    name: str
    """As it is given, e.g. --optim.epochs; without dashes where it has no name on the command line."""
    dest: str
    """Full name of the setting, e.g. optim.epochs."""
    key: str
    """As messages name it."""
    field: dataclasses.Field
    flag: bool
    """Takes no value."""

    @property
    def named(self) -> bool:
        """Whether it is given by name."""
        return self.name.startswith("-")


class _Reader:
    """Reads the words behind a command."""

    def __init__(self, command: Command, name: str) -> None:
        self._command, self._name = command, name
        self.places: dict[str, str] = {}  # of the settings that a file gave
        self._own = list(options_of(command.options))
        self._config = list(options_of(Config)) if command.takes_config else []
        self._named = {option.name: option for option in (*self._own, *self._config) if option.named}
        self._short = (_CONFIG, *_SHORT) if command.takes_config else ()
        self._unnamed = [option for option in self._own if not option.named]

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Nested dict of the settings that the words, and the files which they name, give.

        Raises:
            InputError, BadSetting: a word is unknown or a value of the wrong type.
            HelpAsked: for this command.
        """
        given: dict[str, Any] = {}
        unnamed: list[str] = []
        words = list(words)
        while words:
            word = words.pop(0)
            if word == "--":
                unnamed += words
                break
            name, equals, value = word.partition("=")
            if name in (*HELP, *VERSION) and equals:
                raise InputError(f"{name} takes no value")
            if name in HELP:
                raise HelpAsked(self._help(everything=name == "--help-all"))
            if not word.startswith("-"):
                unnamed.append(word)
                continue
            if self._command.takes_config:
                name = _SHORT.get(name, name)
                name = f"--{Config.current_name(name[2:], '--')}" if name[2:] in Config.RENAMED else name
            option = self._named.get(name)
            if option is None and not (name == _CONFIG and self._command.takes_config):
                raise InputError(f"unknown option {format_name(name)}; {self._meant(name)}")
            if option is not None and option.flag:
                if equals:
                    raise InputError(f"{name} takes no value")
                self._keep(given, option, True)
                continue
            if not equals:
                if not words or words[0].startswith("--"):
                    raise InputError(
                        f"{name}: needs a value: {expected(option.field.type) if option else 'a YAML file'}"
                    )
                value = words.pop(0)
            if option is not None:
                self._keep(given, option, parse(option.field.type, value))
                continue
            for key, (setting, place) in read_yaml(expand_path(check(str, value, _CONFIG), _CONFIG), Config).items():
                given[key], self.places[key] = setting, place
        if len(unnamed) > len(self._unnamed):
            raise InputError(self._unexpected(unnamed[len(self._unnamed)]))
        for option, word in zip(self._unnamed, unnamed, strict=False):
            self._keep(given, option, parse(option.field.type, word))
        return _nested(given)

    def require_own(self, given: Mapping[str, Any]) -> None:
        """Raises InputError where an option without a default is not among the given ones."""
        for option in self._own:
            if is_required(option.field) and option.dest not in given:
                text = _docs(self._command.options)[option.dest].rstrip(".")
                raise InputError(f"{option.name} is missing ({expected(option.field.type)}): {text}")

    def placed(self, error: BadSetting) -> str:
        """The error's text with the place of the setting: a line of a file, or the option's dashes."""
        text = str(error)
        if place := self.places.get(error.key):
            return f"{place}: {text}"
        return f"--{text}" if f"--{error.key}" in self._named else text

    def _keep(self, given: dict[str, Any], option: Option, value: Any) -> None:
        self.places.pop(option.dest, None)  # first: what is wrong with this word is no fault of a file's
        given[option.dest] = check(option.field.type, value, option.key)

    def _unexpected(self, word: str) -> str:
        """What to say of a word that is no option, and too many without a name."""
        name = word.partition("=")[0].lstrip(_DASHES)
        if f"--{name}" in (*self._named, *self._short):
            return f"unexpected argument {format_value(word)}; did you mean --{format_name(word.lstrip(_DASHES))}?"
        return f"unexpected argument {format_value(word)}; see {self._name} --help"

    def _meant(self, name: str) -> str:
        if name in VERSION:
            return "fastbyol --version shows the version"
        near = nearest(name, [*self._named, *self._short])
        if near:
            return f"did you mean {near}?"
        return f"{self._name} {'--help-all' if self._command.takes_config else '--help'} lists all"

    def _help(self, *, everything: bool) -> str:
        """The options; of a config's only the common ones unless everything is asked for, and those by section."""
        page = argparse.ArgumentParser(
            usage=" ".join([self._name, *(option.name.upper() for option in self._unnamed), "[--option value ...]"]),
            description=self._command.summary,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=_HELP_WIDTH),
            add_help=False,
        )
        if self._own:
            _list_options(page.add_argument_group("options"), self._own, _docs(self._command.options), brief=False)
        if self._command.takes_config:
            docs = {"": _docs(Config)} | {section: _docs(kind) for section, kind in sections(Config).items()}
            texts = {o.dest: docs[o.dest.rpartition(".")[0]][o.field.name] for o in self._config}
            common = page.add_argument_group("the run")
            common.add_argument(_CONFIG, metavar="FILE", help="YAML file of settings; later options override it.")
            if everything:
                _list_options(common, [o for o in self._config if "." not in o.dest], texts, brief=False)
                for section, kind in sections(Config).items():
                    group = page.add_argument_group(f"{section}: {(kind.__doc__ or '').splitlines()[0].rstrip('.')}")
                    _list_options(
                        group, [o for o in self._config if o.dest.startswith(f"{section}.")], texts, brief=False
                    )
            else:
                known = {o.dest: o for o in self._config}
                first = [known[dest] for dest in _COMMON if not (self._own and dest in _OF_TRAINING)]
                _list_options(common, first, texts, brief=True)
                page.epilog = f"{self._name} --help-all shows all {len(self._config)} settings."
        return page.format_help().rstrip()


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.epochs": 3} -> {"optim": {"epochs": 3}}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *outer, last = key.split(".")
        place = result
        for section in outer:
            place = place.setdefault(section, {})
        place[last] = value
    return result


def options_of(cls: type[Settings]) -> Iterator[Option]:
    """What a class of settings gives a command line."""
    for dest, f, owner in leaves(cls):
        key = owner.key(f.name)
        name = key if f.name in getattr(owner, "POSITIONAL", ()) else f"--{key.removeprefix('--')}"
        yield Option(name, dest, key, f, flag=f.type is bool and issubclass(owner, Options))


def _overview(group: Group, path: list[str]) -> str:
    """The help page of what takes sub-commands."""
    name, wide = " ".join(path), max(map(len, group.commands)) + 2
    lines = [f"usage: {name} COMMAND [--option value ...]", "", group.summary, ""]
    lines += [f"  {word:<{wide}}{command.summary}" for word, command in group.commands.items()]
    lines += [
        "",
        f"{name} COMMAND --help shows a command's options" + (", --version the version." if len(path) == 1 else "."),
    ]
    if len(path) == 1:
        lines += [
            "",
            "  fastbyol train --data.root /data/imagenet --name first",
            "  fastbyol eval knn --run runs/first",
        ]
    return "\n".join(lines)


def _docs(cls: type[Settings]) -> dict[str, str]:
    """The docstring below each field, inherited ones too."""
    import docstring_parser  # reads source files: only help pages and missing options need it

    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    found = {p.arg_name: p.description for base in bases for p in docstring_parser.parse_from_object(base).params}
    return {name: " ".join((text or "").split()) for name, text in found.items()}


def _list_options(group: Any, options: Sequence[Option], docs: Mapping[str, str], *, brief: bool) -> None:
    for option in options:
        text = docs[option.dest]
        if brief:
            text = text.split("; ")[0].rstrip(".") + "."
        notes = [] if option.flag else [_type_note(option.field.type), _default_note(option.field)]
        notes = [note for note in notes if note]
        text += f" ({', '.join(notes)})" if notes else ""
        how = {"metavar": _metavar(option), "dest": option.dest} if option.named else {}
        if option.flag:
            how = {"action": "store_true", "dest": option.dest}
        group.add_argument(option.name, help=text.replace("%", "%%"), **how)


def _metavar(option: Option) -> str:
    marks = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "{true,false}"}
    texts = []
    for part in parts(option.field.type):
        if get_origin(part) is Literal:
            choices = ",".join(get_args(part))
            texts.append(f"{{{choices}}}" if "," in choices else choices)
        else:
            texts.append(marks.get(part, "A,B,..."))
    return "|".join(texts)


def _type_note(kind: Any) -> str:
    return " or ".join({int: "whole number", float: "number"}.get(part, "") for part in parts(kind)).removesuffix(
        " or "
    )


def _default_note(f: dataclasses.Field) -> str:
    if is_required(f):
        return "required"
    value = f.default_factory() if f.default_factory is not MISSING else f.default
    if value is None or value in ((), []):
        return ""
    if isinstance(value, bool):
        return f"default {str(value).lower()}"
    if isinstance(value, tuple):
        return f"default {','.join(map(str, value))}"
    return f"default {value}"
