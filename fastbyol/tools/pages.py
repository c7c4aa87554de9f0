"""Self-contained HTML pages, rendered from the Jinja templates in fastbyol/tools/templates."""

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastbyol import __version__
from fastbyol.errors import printable
from fastbyol.runtime.files import write_output
from fastbyol.tools import plots

HTML_START = b"<!doctype html>"  # of every page


def write_page(out: Path, template: str, **values: Any) -> Path:
    """Render a template and write the page atomically.

    Args:
        out: The file to write.
        template: Name of a template, without ".html.j2".
        **values: The template's variables.

    Returns:
        The path of the written file.

    Raises:
        RunError: The file cannot be written.
    """
    page = TEMPLATES.get_template(f"{template}.html.j2").render(values)
    write_output(out, page, str(out))
    return out


def data_uri(png: bytes) -> str:
    """Return a PNG image as a data URI, so that the page needs no other files."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def format_setting(value: object) -> str:
    """Format a setting as in a YAML config."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _printable(value: object) -> object:
    """Escape control characters and undecodable bytes; leave rendered HTML unchanged."""
    return value if isinstance(value, Markup) else printable(str(value))


def _format_number(value: float, spec: str) -> str:
    """Format a number by a Python format specification: `{{ ms | number(".2f") }}`."""
    return format(value, spec)


# `finalize` sees every value before autoescaping, so no template can forget to escape a name.
TEMPLATES = Environment(
    loader=PackageLoader("fastbyol.tools"),
    autoescape=True,
    finalize=_printable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"number": _format_number, "data_uri": data_uri}
TEMPLATES.globals |= {
    "version": __version__,
    "palette": {"ink": plots.INK, "muted": plots.MUTED, "accent": plots.ACCENT, "good": plots.GOOD, "bad": plots.BAD},
}
