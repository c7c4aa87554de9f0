"""Self-contained HTML pages: style, sections, tables, pictures."""

import base64
import html
from pathlib import Path

from fastbyol.errors import printable
from fastbyol.runtime.files import write_output

INK, ACCENT, GOOD, BAD = "#22262b", "#1f6feb", "#2e9e52", "#d1383d"

_STYLE = f"""
body {{ font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: {INK}; max-width: 1080px; margin: 2em auto; padding: 0 1em }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2em; border-bottom: 1px solid #d8dde3; padding-bottom: .2em }}
table {{ border-collapse: collapse; margin: .6em 0 }} td, th {{ padding: .25em 1em .25em 0; text-align: left; vertical-align: top }}
th {{ font-weight: 600 }} td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
tr.best td {{ font-weight: 600 }} .note {{ color: #59636e; font-size: 13px }} img {{ max-width: 100%; height: auto }}
.columns {{ display: flex; flex-wrap: wrap; gap: 0 3em }} pre {{ background: #f4f6f8; padding: .8em; overflow-x: auto; font-size: 12px }}
.bar {{ display: inline-block; height: .7em; background: {ACCENT}; border-radius: 2px }} .bar.baseline {{ background: #b8c2cc }}
"""


def write_page(out: Path, title: str, parts: list[str]) -> Path:
    """Writes a page whole or not at all.

    Returns:
        the file written.

    Raises:
        RunError: it cannot be written.
    """
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{text(title)}</title>"
    page += f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    write_output(out, page, str(out))
    return out


def text(name: object) -> str:
    """A name or number as HTML: what has a meaning in it, or cannot be shown, is escaped."""
    return html.escape(printable(str(name)))


def section(title: str, body: str) -> str:
    """A heading and what follows it (HTML)."""
    return f"<h2>{text(title)}</h2>{body}"


def image(png: bytes) -> str:
    """A picture inside the page."""
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns of text."""
    cells = "".join(f"<tr><th>{text(a)}</th><td>{text(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"
