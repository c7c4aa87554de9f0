"""Words of a command line -> settings, and the help pages.

jsonargparse parses. Every word is compared with the command's own options before, and values are read by settings.py, so that what a user is told
about a wrong one is said in one voice, and is the same for the command line and for YAML files.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.settings import (
    BadSetting,
    Settings,
    check,
    expanded,
    expected,
    leaves,
    nearest,
    parse,
    parts,
    read_yaml,
    sections,
    shown,
    shown_name,
)

HELP = ("-h", "--help", "--help-all")
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
        if not word:
            raise InputError(f"{' '.join(path)}: no subcommand given: name one of {', '.join(level.commands)}")
        if word.startswith("-"):
            raise InputError(
                f"unknown option {shown_name(word)}; {' '.join(path)} takes a subcommand first: {', '.join(level.commands)}"
            )
        if word not in level.commands:
            near = nearest(word, level.commands)
            raise InputError(
                f"unknown command {shown(word)}; "
                + (f"did you mean '{near}'?" if near else f"one of {', '.join(level.commands)}")
            )
        path.append(word)
        level = level.commands[word]
    reader = _Reader(level, " ".join(path))
    try:
        values = reader.read(words)
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(level.options) if f.name in values}
        return Call(path[-1], level, level.options.build(own), Config.build(values))
    except BadSetting as error:
        place = reader.places.get(error.key)
        raise InputError(f"{place}: {error}" if place else str(error)) from None


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


class _StoreWord(argparse.Action):
    """Keeps the value that a word stands for."""

    def __init__(self, *, option: Option, places: dict[str, str], **rest: Any) -> None:
        super().__init__(**rest)
        self._option, self._places = option, places

    def __call__(self, parser: Any, namespace: Namespace, word: Any, option_string: str | None = None) -> None:
        kind = self._option.field.type
        self._places.pop(self.dest, None)  # first: what is wrong with this word is no fault of a file's
        namespace[self.dest] = check(kind, True if self._option.flag else parse(kind, word), self._option.key)


class _StoreFile(argparse.Action):
    """Keeps what a YAML file holds, and which line holds it."""

    def __init__(self, *, places: dict[str, str], **rest: Any) -> None:
        super().__init__(**rest)
        self._places = places

    def __call__(self, parser: Any, namespace: Namespace, word: Any, option_string: str | None = None) -> None:
        for key, (value, place) in read_yaml(expanded(check(str, word, _CONFIG), _CONFIG), Config).items():
            namespace[key], self._places[key] = value, place


class _Reader:
    """Reads the words behind a command."""

    def __init__(self, command: Command, name: str) -> None:
        self._command, self._name = command, name
        self.places: dict[str, str] = {}  # of the settings that a file gave
        self._own = list(options_of(command.options))
        self._config = list(options_of(Config)) if command.takes_config else []
        self._named = {option.name: option for option in (*self._own, *self._config) if option.named}
        self._unnamed = [option for option in self._own if not option.named]

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Nested dict of the settings that the words, and the files which they name, give.

        Raises:
            InputError, BadSetting: a word is unknown or a value of the wrong type.
            HelpAsked: for this command.
        """
        # No option has a type or a default here: settings.py reads values, and only what is given is in the result.
        parser = ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
        if self._command.takes_config:
            parser.add_argument(
                _CONFIG, dest="config", action=_StoreFile, places=self.places, default=argparse.SUPPRESS
            )
        for option in (*self._own, *self._config):
            how: dict[str, Any] = {"dest": option.dest} if option.named else {"nargs": "?"}
            if option.flag:
                how["nargs"] = 0
            how |= {"action": _StoreWord, "option": option, "places": self.places, "default": argparse.SUPPRESS}
            parser.add_argument(option.name, **how)
        return parser.parse_args(self._in_one_form(words)).as_dict()

    def _in_one_form(self, words: Sequence[str]) -> list[str]:
        """--option=value for each, and behind them what has no name."""
        words, named, unnamed = list(words), [], []
        while words:
            word = words.pop(0)
            if word == "--":
                unnamed += words
                break
            if not word.startswith("-"):
                unnamed.append(word)
                continue
            if word in HELP:
                raise HelpAsked(self._help(everything=word == "--help-all"))
            name, equals, value = word.partition("=")
            if self._command.takes_config:
                name = _SHORT.get(name, name)
            if name == _CONFIG and self._command.takes_config:
                takes = "a YAML file"
            elif name in self._named:
                option = self._named[name]
                takes = "" if option.flag else expected(option.field.type)
            else:
                raise InputError(f"unknown option {shown_name(name)}; {self._meant(name)}")
            if equals and not takes:
                raise InputError(f"{name} takes no value")
            if takes and not equals:
                if not words or words[0].startswith("--"):
                    raise InputError(f"{name}: needs a value: {takes}")
                value = words.pop(0)
            named.append(f"{name}={value}" if takes else name)
        if len(unnamed) > len(self._unnamed):
            extra = unnamed[len(self._unnamed)]
            name, equals, _ = extra.partition("=")
            known = equals and f"--{name}" in self._named
            hint = f"did you mean --{shown_name(extra)}?" if known else f"see {self._name} --help"
            raise InputError(f"unexpected argument {shown(extra)}; {hint}")
        return [*named, "--", *unnamed] if unnamed else named

    def _meant(self, name: str) -> str:
        near = nearest(name, [*self._named, *((_CONFIG, *_SHORT) if self._command.takes_config else ())])
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
    import docstring_parser  # reads source files: only help pages need it

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
    if f.default is MISSING and f.default_factory is MISSING:
        return "required"
    value = f.default_factory() if f.default_factory is not MISSING else f.default
    if value is None or value in ((), []):
        return ""
    if isinstance(value, bool):
        return f"default {str(value).lower()}"
    if isinstance(value, tuple):
        return f"default {','.join(map(str, value))}"
    return f"default {value}"
