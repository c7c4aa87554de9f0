"""What a command line consists of: commands, groups of commands, and their options."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastbyol.config import Config
from fastbyol.settings.base import Settings, leaves
from fastbyol.settings.types import is_sequence

HELP = ("-h", "--help", "--help-all")
VERSION = ("-V", "--version")
CONFIG = "--config"
IMPORT = "--import"


@dataclass(kw_only=True)
class Options(Settings):
    """Base class of a command's own options, which are not part of a config."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ()
    """Fields given without a name, in this order. The last one may be a list: it takes all words
    that are left."""

    @classmethod
    def key(cls, name: str) -> str:
        """Return --NAME, or NAME for a positional argument."""
        return name if name in cls.POSITIONAL else f"--{name}"


@dataclass(frozen=True)
class Command:
    """One command."""

    run: Callable[["Call"], int]
    options: type[Settings] = Options
    text: str = ""
    """One-line description; by default the first line of the docstring of `options`."""
    takes_config: bool = False
    """Accept --config and all settings of a Config."""
    takes_ranks: bool = False
    """May be started in multiple processes by torchrun."""
    builds_networks: bool = False
    """Accept --import, since a backbone may be code of a module. So do commands with a config."""

    @property
    def takes_modules(self) -> bool:
        """True if --import is accepted."""
        return self.takes_config or self.builds_networks

    @property
    def summary(self) -> str:
        """One-line description."""
        return self.text or (self.options.__doc__ or "").splitlines()[0]


@dataclass(frozen=True)
class Group:
    """Commands by name, with a common one-line description."""

    summary: str
    commands: Mapping[str, "Command | Group"]


@dataclass(frozen=True)
class Call:
    """A parsed command line."""

    name: str
    """Last word of the command, e.g. "knn" for `fastbyol eval knn`."""
    command: Command
    options: Any
    """An object of `command.options`."""
    config: Config
    """The defaults if the command takes no config."""
    modules: tuple[str, ...] = ()
    """Names of the modules to import."""


@dataclass(frozen=True)
class Option:
    """One option or positional argument of a command."""

    name: str
    """As on the command line, e.g. --optim.epochs; without dashes for a positional argument."""
    dest: str
    """Full name of the setting, e.g. optim.epochs."""
    key: str
    """Name in messages."""
    field: dataclasses.Field
    flag: bool
    """Takes no value."""

    @property
    def named(self) -> bool:
        """True if this is not a positional argument."""
        return self.name.startswith("-")

    @property
    def takes_rest(self) -> bool:
        """True for a positional argument that takes all words that are left."""
        return not self.named and is_sequence(self.field.type)


def options_of(cls: type[Settings]) -> Iterator[Option]:
    """Yield the options that a class of settings adds to a command line."""
    for dest, f, owner in leaves(cls):
        key = owner.key(f.name)
        name = key if f.name in getattr(owner, "POSITIONAL", ()) else f"--{key.removeprefix('--')}"
        yield Option(name, dest, key, f, flag=f.type is bool and issubclass(owner, Options))
