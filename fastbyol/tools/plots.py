"""The palette of pages and figures, and matplotlib figures as PNG files."""

import functools
import io

import matplotlib
from matplotlib import font_manager, ft2font
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastbyol.errors import printable

INK, MUTED, ACCENT, GOOD, BAD = "#22262b", "#59636e", "#1f6feb", "#2e9e52", "#d1383d"
_MAX_TITLE_LENGTH = 44  # characters; longer titles would make matplotlib shrink the images below them


def line_style(k: int) -> dict[str, str]:
    """Return color and line style of the k-th of several curves: 20 colors, the last ten dashed.

    The names of the line styles are those of matplotlib and of CSS.
    """
    colors = matplotlib.colormaps["tab20"].colors
    colors = [*colors[::2], *colors[1::2]]  # the saturated ones first
    dashes = ("solid", "dashed", "dotted")
    return {"color": to_hex(colors[k % len(colors)]), "linestyle": dashes[k // 10 % len(dashes)]}


def to_png(figure: Figure) -> bytes:
    """Render a matplotlib figure to PNG.

    Texts may hold any file or class name: `$` does not start math mode, other installed fonts
    provide the glyphs that the default font lacks, and characters without a glyph are escaped.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        if not text.get_text().isascii():
            string, families = _with_fallback_fonts(text.get_text(), font_manager.findfont(text.get_fontproperties()))
            text.set_text(string)
            text.set_fontfamily([*text.get_fontfamily(), *families])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def image_title(name: str) -> str:
    """Return a name as the title of an image: printable, the middle of a long name elided."""
    name = printable(name)
    half = _MAX_TITLE_LENGTH // 2
    return name if len(name) <= _MAX_TITLE_LENGTH else f"{name[:half]}...{name[3 - half :]}"


def _with_fallback_fonts(text: str, default_font: str) -> tuple[str, list[str]]:
    """Return the drawable text and the font families it needs in addition to the default font.

    Characters that no installed font has are escaped.
    """
    families: list[str] = []
    drawable = []
    for character in text:
        known = character.isspace() or _has_glyph(default_font, character)
        family = "" if known else _family_with(character)
        drawable.append(character.encode("unicode_escape").decode() if family is None else character)
        if family and family not in families:
            families.append(family)
    return "".join(drawable), families


def _has_glyph(font_path: str, character: str) -> bool:
    return _font(font_path).get_char_index(ord(character)) != 0


@functools.lru_cache(maxsize=8)
def _font(path: str) -> ft2font.FT2Font:
    return font_manager.get_font(path)


@functools.cache
def _family_with(character: str) -> str | None:
    """Return the first installed font family that has the character, or None."""
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: entry.name):
        # LastResort draws a box for every character.
        if "LastResort" not in entry.fname and _has_glyph(entry.fname, character):
            return entry.name
    return None
