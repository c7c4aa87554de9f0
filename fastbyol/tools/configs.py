"""`fastbyol configs`: list the configs that come with the package, or print one."""

import re
import shutil
import sys
import textwrap
from dataclasses import dataclass

from fastbyol.errors import InputError
from fastbyol.runtime.logging import logger
from fastbyol.settings.config_files import shipped_configs
from fastbyol.settings.messages import format_name, nearest

_WIDTH = 120  # if standard output is not a terminal


def print_configs() -> None:
    """Log name, description, hardware and hours of every shipped config."""
    shipped = shipped_configs()
    column, width = max(map(len, shipped), default=0) + 2, shutil.get_terminal_size((_WIDTH, 24)).columns
    for name, path in shipped.items():
        header = read_header(path.read_text())
        lines = [line for line in (header.title, header.cost) if line]
        wrapped = [part for line in lines for part in textwrap.wrap(line, max(width - column, 20))]
        for k, line in enumerate(wrapped):
            logger.info(f"{name if k == 0 else '':<{column}}{line}")
    logger.info("")
    logger.info("`fastbyol train --config NAME` uses one, `fastbyol configs NAME > my.yaml` copies it.")


def print_config(name: str) -> None:
    """Write the text of a shipped config to standard output.

    Raises:
        InputError: there is no shipped config of this name.
    """
    shipped = shipped_configs()
    if name not in shipped:
        near = nearest(name, shipped)
        hint = f"did you mean {near}?" if near else "`fastbyol configs` lists all"
        raise InputError(f"{format_name(name)}: unknown config; {hint}")
    sys.stdout.write(shipped[name].read_text())


@dataclass(frozen=True)
class Header:
    """The comment at the top of a config."""

    title: str
    """What the config trains, in one line."""
    fields: dict[str, str]
    """command, hardware, hours, ...; a field of several lines is joined by spaces."""

    @property
    def cost(self) -> str:
        """Hardware and hours, e.g. "8 x H100 80 GB, 5.2 hours (estimate)"; empty if not given."""
        hours = re.match(r"([\d.]+)(?: \(([a-z]+))?", self.fields.get("hours", ""))
        note = f" ({hours[2]})" if hours and hours[2] else ""
        parts = [self.fields.get("hardware", ""), f"{hours[1]} hours{note}" if hours else ""]
        return ", ".join(part for part in parts if part)


def read_header(text: str) -> Header:
    """Return the header of a config's text."""
    fields, key = {"title": ""}, "title"
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if match := re.match(r"#   (\w+) +(.*)", line):
            key = match[1]
        words = line.removeprefix("#").strip().removeprefix(key).strip()
        fields[key] = f"{fields.get(key, '')} {words}".strip()
    return Header(fields.pop("title"), fields)
