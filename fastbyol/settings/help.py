"""Help pages, wrapped at the terminal's width.

The docstring below a field is its help text. The docstring_parser package reads it from the source.
"""

import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fastbyol.config import Config
from fastbyol.settings.base import Settings, is_required, sections
from fastbyol.settings.commands import CONFIG, IMPORT, Command, Group, Option
from fastbyol.settings.types import parts

_MAX_WIDTH = 118
_DEFAULT_WIDTH = 120  # if standard output is not a terminal
_COMMON = (
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
    "data.backend",
    "model.backbone",
    "optim.epochs",
    "optim.base_lr",
    "step.mode",
    "knn.every_epochs",
    "probe.enabled",
)
"""Settings of a config that --help shows; --help-all shows all."""
_TRAIN_ONLY = ("name", "runs", "resume", "init", "knn.every_epochs", "probe.enabled")
"""Those that --help shows only for `train`."""


def _width() -> int:
    return min(shutil.get_terminal_size((_DEFAULT_WIDTH, 24)).columns - 2, _MAX_WIDTH)


def format_group(group: Group, path: list[str]) -> str:
    """Return the help page of a group of commands.

    Args:
        group: the commands.
        path: the words of the group, e.g. [fastbyol, eval].
    """
    name, column = " ".join(path), max(map(len, group.commands)) + 4
    lines = [f"usage: {name} COMMAND [--option value ...]", "", textwrap.fill(group.summary, _width()), ""]
    for word, command in group.commands.items():
        start = f"  {word}".ljust(column)
        lines.append(textwrap.fill(command.summary, _width(), initial_indent=start, subsequent_indent=" " * column))
    version = ", --version the version" if len(path) == 1 else ""
    lines += ["", textwrap.fill(f"{name} COMMAND --help shows a command's options{version}.", _width())]
    if len(path) == 1:
        lines += [
            "",
            "  fastbyol train --data.root /data/imagenet --name first",
            "  fastbyol eval knn --run runs/first",
        ]
    return "\n".join(lines)


def format_command(
    name: str, command: Command, own: Sequence[Option], config: Sequence[Option], *, everything: bool
) -> str:
    """Return the help page of a command.

    Args:
        name: the command's words, e.g. "fastbyol train".
        command: the command.
        own: its own options.
        config: the settings of a config that it takes.
        everything: show all settings of the config by section, rather than the common ones.
    """
    width = _width()
    column = min(40, width // 3)
    page = argparse.ArgumentParser(
        usage=" ".join([name, *(_usage(option) for option in own if not option.named), "[--option value ...]"]),
        description=command.summary,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=column, width=width),
        add_help=False,
    )
    if own:
        _add_options(page.add_argument_group("options"), own, field_docs(command.options))
    if command.takes_modules and (everything or not command.takes_config):
        text = "Python module with own backbones or image sets. It may be given several times."
        page.add_argument_group("code").add_argument(IMPORT, metavar="MODULE", help=text)
    if command.takes_config:
        _add_config(page, config, everything=everything, only_train=not own)
        if not everything:
            page.epilog = f"{name} --help-all shows all {len(config)} settings."
    return page.format_help().rstrip()


def _usage(option: Option) -> str:
    """Return a positional argument as the usage line shows it."""
    name = option.name.upper() + (" ..." if option.takes_rest else "")
    return name if is_required(option.field) else f"[{name}]"


def _add_config(
    page: argparse.ArgumentParser, options: Sequence[Option], *, everything: bool, only_train: bool
) -> None:
    docs = {"": field_docs(Config)} | {section: field_docs(kind) for section, kind in sections(Config).items()}
    texts = {option.dest: docs[option.dest.rpartition(".")[0]][option.field.name] for option in options}
    run = page.add_argument_group("run")
    run.add_argument(
        CONFIG, metavar="FILE|NAME", help="YAML file, or a name from `fastbyol configs`. Later options override it."
    )
    if not everything:
        known = {option.dest: option for option in options}
        shown = [known[dest] for dest in _COMMON if only_train or dest not in _TRAIN_ONLY]
        _add_options(run, shown, {dest: first_sentence(text) for dest, text in texts.items()})
        return
    _add_options(run, [option for option in options if "." not in option.dest], texts)
    for section, kind in sections(Config).items():
        title = first_sentence((kind.__doc__ or "").splitlines()[0]).rstrip(".")
        group = page.add_argument_group(f"{section}: {title}")
        _add_options(group, [option for option in options if option.dest.startswith(f"{section}.")], texts)


def first_sentence(text: str) -> str:
    """Return the first sentence, and remarks such as "0 uses all." that follow it."""
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0]


def field_docs(cls: type[Settings]) -> dict[str, str]:
    """Return field name -> docstring below the field, those of base classes included."""
    import docstring_parser  # slow: it parses source files

    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    found = {p.arg_name: p.description for base in bases for p in docstring_parser.parse_from_object(base).params}
    return {name: " ".join((text or "").split()) for name, text in found.items()}


def _add_options(group: Any, options: Sequence[Option], docs: Mapping[str, str]) -> None:
    for option in options:
        notes = [] if option.flag else [_type_note(option.field.type), _default_note(option.field)]
        notes = [note for note in notes if note]
        text = docs[option.dest] + (f" ({', '.join(notes)})" if notes else "")
        how = {"metavar": _metavar(option), "dest": option.dest} if option.named else {}
        if option.flag:
            how = {"action": "store_true", "dest": option.dest}
        group.add_argument(option.name, help=text.replace("%", "%%"), **how)


def _metavar(option: Option) -> str:
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "{true,false}"}
    texts = []
    for part in parts(option.field.type):
        if get_origin(part) is Literal:
            choices = ",".join(get_args(part))
            texts.append(f"{{{choices}}}" if "," in choices else choices)
        else:
            texts.append(names.get(part, "A,B,..."))
    return "|".join(texts)


def _type_note(kind: Any) -> str:
    return " or ".join({int: "integer", float: "number"}[part] for part in parts(kind) if part in (int, float))


def _default_note(f: dataclasses.Field) -> str:
    if is_required(f):
        return "required"
    value = f.default_factory() if f.default_factory is not MISSING else f.default
    if value is None or value in ((), []):
        return ""
    if isinstance(value, bool):
        return f"default {str(value).lower()}"
    if isinstance(value, tuple | list):
        return f"default {','.join(map(str, value))}"
    return f"default {value}"
