"""The README is true: its tables come from the result files, its paths and commands exist."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

sys.path.append(str(ROOT / "benchmarks"))
import readme_tables  # noqa: E402


def test_tables_are_those_of_the_result_files():
    assert readme_tables._MARK.search(README)
    assert readme_tables.render(README) == README


def test_every_file_of_the_tree_exists_and_none_is_left_out():
    tree = README.split("## Where things are")[1].split("## Licence")[0]
    named = set(re.findall(r"[\w/]+\.py", tree))
    actual = {p.name for folder in ("fastbyol", "kernels") for p in (ROOT / folder).rglob("*.py")}
    assert named == {name for name in actual if not name.startswith("__")}


def test_make_targets_and_sub_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"^ +make ([\w-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    cli = (ROOT / "fastbyol" / "cli.py").read_text()
    for command in set(re.findall(r"^ +fastbyol (\w+)", README, re.MULTILINE)):
        assert f'"{command}": _{command}' in cli, command
