"""Figures as files."""

import functools
import io

from matplotlib import font_manager, ft2font
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastbyol.errors import printable

_LONGEST_NAME = 44  # characters of a name that stand above a picture; a longer one would squeeze the pictures


def to_png(figure: Figure) -> bytes:
    """A matplotlib figure as the bytes of a PNG file.

    Its texts may hold any names: `$` starts no mathematics, other fonts draw what the usual one lacks, and what no font here has is escaped.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        if not text.get_text().isascii():
            string, fonts = _drawable(text.get_text(), font_manager.findfont(text.get_fontproperties()))
            text.set_text(string)
            text.set_fontfamily([*text.get_fontfamily(), *fonts])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def title(name: str) -> str:
    """A name to stand above a picture: printable, and without its middle if it is long."""
    name = printable(name)
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}...{name[3 - half :]}"


def _drawable(text: str, usual: str) -> tuple[str, list[str]]:
    """The text with what no installed font has escaped, and the families that its other characters need beside the usual font."""
    families: list[str] = []
    drawn = []
    for character in text:
        family = "" if character.isspace() or _has(usual, character) else _family_with(character)
        drawn.append(character.encode("unicode_escape").decode() if family is None else character)
        if family and family not in families:
            families.append(family)
    return "".join(drawn), families


def _has(path: str, character: str) -> bool:
    return _font(path).get_char_index(ord(character)) != 0


@functools.lru_cache(maxsize=8)
def _font(path: str) -> ft2font.FT2Font:
    return font_manager.get_font(path)


@functools.cache
def _family_with(character: str) -> str | None:
    """The first installed family that draws a character; None if there is none."""
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: entry.name):
        # LastResort draws a box for everything.
        if "LastResort" not in entry.fname and _has(entry.fname, character):
            return entry.name
    return None
