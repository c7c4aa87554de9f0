"""Settings: the base class of dataclasses whose fields are checked when an object is created.

The same checks run whoever creates the object: Python code, a checkpoint, a YAML file or the
command line.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Self

from fastbyol.runtime.logging import logger
from fastbyol.settings.limits import apply_limits
from fastbyol.settings.messages import BadSetting, format_value, unknown
from fastbyol.settings.types import check, expected


@dataclass(kw_only=True)
class Settings:
    """Base class of all settings.

    Fields are checked against their type and the limits in its annotations (limits.py). A field
    whose type is a subclass of Settings is a section: it accepts an object of that class or a dict.
    """

    PREFIX: ClassVar[str] = ""
    """Prefix of the fields' full names, e.g. "optim."."""

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Old full name of a setting -> its current full name."""

    def __post_init__(self) -> None:
        inner = sections(type(self))
        for f in dataclasses.fields(self):
            value, key = getattr(self, f.name), self.key(f.name)
            if section := inner.get(f.name):
                value = value if isinstance(value, section) else section.build(value, key)
            else:
                value = apply_limits(f.type, check(f.type, value, key), key)
            setattr(self, f.name, value)

    @classmethod
    def key(cls, name: str) -> str:
        """Return the full name of a field."""
        return cls.PREFIX + name

    @classmethod
    def build(cls, values: Any, key: str = "") -> Self:
        """Return an object from nested dicts.

        Args:
            values: field name -> value.
            key: full name of the section, e.g. "optim"; empty for the outermost.

        Raises:
            BadSetting: a key is unknown or missing, or a value is invalid.
        """
        if not isinstance(values, Mapping):
            name = key or "the settings"
            given = f"{name}: has no value" if values is None else f"{name}={format_value(values)}"
            raise BadSetting(key, f"{given}: {expected_section(cls, key)}")
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise cls._unknown_key(name, key)
        for f in dataclasses.fields(cls):
            if is_required(f) and f.name not in values:
                raise BadSetting(cls.key(f.name), f"{cls.key(f.name)}: is missing; expected {expected(f.type)}")
        return cls(**values)

    @classmethod
    def _unknown_key(cls, name: Any, key: str) -> BadSetting:
        full = f"{key}.{name}" if key else str(name)
        if isinstance(name, str) and full in names(cls, key):
            outer, _, inner = name.partition(".")
            nested = f"{{'{outer}': {{'{inner}': ...}}}}"
            return BadSetting(name, f"{name}: dotted keys are not accepted here: write {nested}")
        return unknown(full, "key", names(cls, key))

    @classmethod
    def current_name(cls, name: str, where: str) -> str:
        """Return the current name of a setting.

        An old name logs a warning that starts with `where`.
        """
        if name not in cls.RENAMED:
            return name
        logger.warning(f"{where}{name} is now called {cls.RENAMED[name]}; the old name still works")
        return cls.RENAMED[name]

    @classmethod
    def with_current_names(cls, values: Any) -> Any:
        """Return nested settings, such as those of an old checkpoint, with current names.

        Raises:
            BadSetting: a setting is given under both names.
        """
        if not isinstance(values, Mapping):
            return values
        values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        for old, new in cls.RENAMED.items():
            (section, old_key), new_key = old.split("."), new.split(".")[1]
            inner = values.get(section)
            if isinstance(inner, dict) and old_key in inner:
                if new_key in inner:
                    raise BadSetting(new, f"{new} is set twice, as {old} too: keep one")
                inner[new_key] = inner.pop(old_key)
        return values


def is_required(f: dataclasses.Field) -> bool:
    """Return True if a field has no default."""
    return f.default is MISSING and f.default_factory is MISSING


def sections(cls: type[Settings]) -> dict[str, type[Settings]]:
    """Return the fields that are sections: name -> class."""
    return {
        f.name: f.type for f in dataclasses.fields(cls) if isinstance(f.type, type) and issubclass(f.type, Settings)
    }


def leaves(cls: type[Settings]) -> Iterator[tuple[str, dataclasses.Field, type[Settings]]]:
    """Yield (full name, field, class with the field) of every setting, sections last."""
    inner = sections(cls)
    for f in dataclasses.fields(cls):
        if f.name not in inner:
            yield f.name, f, cls
    for section, kind in inner.items():
        for name, f, owner in leaves(kind):
            yield f"{section}.{name}", f, owner


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"optim.epochs": 3} as {"optim": {"epochs": 3}}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *outer, last = key.split(".")
        section = result
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = value
    return result


def names(cls: type[Settings], section: str = "") -> list[str]:
    """Return the full names of all settings and sections of the class of section `section`."""
    found = [*(key for key, _, _ in leaves(cls)), *sections(cls)]
    return [f"{section}.{name}" if section else name for name in found]


def expected_section(cls: type[Settings], section: str) -> str:
    """Return the part of a message that says what a section holds."""
    return f"expected a section with settings such as {names(cls, section)[0]}"
