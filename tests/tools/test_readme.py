"""The README is true: its tables come from the result files, its paths and commands exist."""

import re

import against
import readme_tables
from helpers.common import ROOT

from fastbyol import resume
from fastbyol.config import Config

README = (ROOT / "README.md").read_text()
FILE_ENDINGS = (".py", ".csv", ".md", ".yaml", ".beton", ".backward", ".html", ".sample")


def test_tables_and_picture_are_those_of_the_result_files():
    assert readme_tables._MARK.search(README)
    for page in readme_tables.PAGES:
        assert readme_tables.render(page.read_text()) == page.read_text(), page.name
    assert against.picture(against.comparisons()) == against.PICTURE.read_text()
    assert f"]({against.PICTURE.relative_to(ROOT)})" in README


def test_pages_link_to_what_exists_and_name_settings_that_exist():
    known = set(resume._flat(Config().to_dict()))
    for page in readme_tables.PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
        for key in re.findall(rf"(?<![\w/.])((?:{sections})\.[a-z][a-z0-9_]+)(?![\w(]|\.py)", text):
            if not key.endswith(FILE_ENDINGS):
                assert key in known, f"{page.name}: {key}"


def test_paths_of_the_tree_exist():
    tree = README.split("## Where things are")[1].split("## License")[0]
    for cell in re.findall(r"^\| (`.+?) \|", tree, re.MULTILINE):
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", cell):
            path = ROOT / name if "/" in name else folder / name
            assert path.exists(), name
            folder = path.parent


def test_make_targets_and_sub_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"^ +make ([\w-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    cli = (ROOT / "fastbyol" / "cli.py").read_text()
    for command in set(re.findall(r"^ +fastbyol (\w+)", README, re.MULTILINE)):
        assert re.search(rf'"{command}": (Command|Group)\(', cli), command
