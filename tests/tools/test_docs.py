"""README, CONTRIBUTING and docs/: tables match their CSV files; links, paths, names, commands and
options exist; the site builds.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import against
import numpy as np
import pytest
import readme_tables
import results_csv
import summary
from helpers.common import ROOT
from helpers.pages import fastbyol_words, harmless

from fastbyol import cli, plugins
from fastbyol.config import RENAMED, Config

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
MIGRATION = (ROOT / "docs" / "migration.md").read_text()
# With the suffix: a parameter named "gpu" would count as the mark that skips without a CUDA device.
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FILE_ENDINGS = (
    *(".py", ".csv", ".md", ".yaml", ".beton", ".pt", ".html", ".json", ".jsonl", ".log", ".safetensors"),
    *(".tar", ".parquet", ".tsv", ".npz"),
)
FOREIGN_OPTIONS = {  # of torchrun, SLURM and Docker
    *("--nproc-per-node", "--max-restarts", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal", "--requeue"),
    "--entrypoint",
}


def without_tables(page: Path) -> str:
    """Return a page's text without its generated tables."""
    return re.sub(r"<!-- \w+:.*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def code_spans(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", without_tables(page), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def shell_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command of the page's shell blocks."""
    for block in fences(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.fixture
def parse_only(tmp_path, monkeypatch):
    """The command line without its commands, in a folder with the files that the pages name."""
    (tmp_path / "my.yaml").write_text(fences(ROOT / "README.md", "yaml")[0])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "COMMANDS", harmless(cli.COMMANDS))
    monkeypatch.setattr(plugins, "import_module", lambda name: None)


def leaf_commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaf_commands(command, (*path, name))
        else:
            yield (*path, name)


def settings() -> set[str]:
    def flat(values, prefix=""):
        for key, value in values.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]

    return set(flat(Config().to_dict()))


def resolve(name: str) -> object:
    """Return the module or attribute with this dotted name."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for k, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:k]))
        found = getattr(found, part)
    return found


def test_tables_and_pictures_match_the_result_files():
    for page in (ROOT / "README.md", *DOCS):
        assert page in readme_tables.PAGES, page.name
        assert readme_tables.render(page.read_text()) == page.read_text(), page.name
    assert against.picture(against.comparisons()) == against.PICTURE.read_text()
    assert summary.picture() == summary.PICTURE.read_text()


def test_every_table_and_picture_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    missing = {name for name in readme_tables.TABLES if f"<!-- {name}:" not in text}
    assert missing == {"train_run_cuda"}  # not measured yet
    for picture in (against.PICTURE, summary.PICTURE):
        assert f"](images/{picture.name})" in text


def test_readme_is_short_and_states_what_ran_on_a_gpu():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180
    top = "\n".join(lines[:25])
    commits = {row["fastbyol"].split()[-1] for name in ("step_cuda", "loader_cuda") for row in results_csv.read(name)}
    assert "Not yet run on a GPU" in top
    assert all(commit in top for commit in commits)


@each_page
def test_links_lead_to_files_and_anchors(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_pages_link_only_to_pages():
    """The site has no other files than those of docs/."""
    for page in DOCS:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            assert not target.startswith("../"), f"{page.name}: {target}"


@each_page
def test_paths_exist(page):
    for span in code_spans(page):
        if re.match(r"(fastbyol|benchmarks|configs|kernels|recipes|tests|docs|\.github)/", span):
            assert (ROOT / span).exists(), span


@each_page
def test_settings_exist(page):
    known = settings() | (set(RENAMED) if page.name == "migration.md" else set())
    sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    for key in re.findall(rf"(?<![\w/.])((?:{sections})\.[a-z][a-z0-9_]+)(?![\w(]|\.py)", without_tables(page)):
        if not key.endswith(FILE_ENDINGS):
            assert key in known, key


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in shell_commands(page) if words[0] == "make"}
    named |= {span.split()[1] for span in code_spans(page) if re.match(r"make [a-z]", span)}
    assert named <= targets


@each_page
def test_commands_parse(page, parse_only, capsys):
    """All options and values of the commands in shell blocks are accepted; their files need not
    exist.
    """
    for words in shell_commands(page):
        if (arguments := fastbyol_words(words)) is not None:
            assert cli.main(arguments) == 0, (arguments, capsys.readouterr().err)


@each_page
def test_commands_in_the_text_exist(page):
    files = [results_csv.read(path.stem) for path in results_csv.FOLDER.glob("*.csv")]
    contenders = {row["contender"] for rows in files for row in rows if "contender" in row}
    commands = set(leaf_commands(cli.COMMANDS))
    for span in code_spans(page):
        words = span.split()
        if words[0] == "fastbyol" and len(words) > 1 and span not in contenders:
            assert tuple(words[1:2]) in commands or tuple(words[1:3]) in commands, span


def test_commands_of_the_results_page_parse(parse_only, capsys):
    commands = {row["command"] for row in results_csv.read("variants") if row["command"].startswith("fastbyol train")}
    assert commands
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """Options of all commands, of benchmark scripts and of foreign tools."""
    helps = io.StringIO()
    with contextlib.redirect_stdout(helps):
        assert all(cli.main([*path, "--help-all"]) == 0 for path in leaf_commands(cli.COMMANDS))
    scripts = [path.read_text() for path in (ROOT / "benchmarks").glob("*.py")]
    found = re.findall(r"(?<![\w-])--[a-z][\w.-]*", helps.getvalue())
    found += [name for text in scripts for name in re.findall(r'"(--[a-z][\w-]*)"', text)]
    return {*found, *FOREIGN_OPTIONS, "--help", "--help-all", "--batch-size"}


def test_options_in_the_text_exist(known_options):
    for page in PAGES:
        for span in code_spans(page):
            for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span):
                assert option in known_options, f"{page.name}: {option}"


@each_page
def test_dotted_names_exist(page):
    text = without_tables(page)
    names = re.findall(r"^::: (fastbyol[\w.]+)", text, re.MULTILINE)
    if page.name != "migration.md":
        names += re.findall(r"`(fastbyol(?:\.\w+)+)`", text)
    for name in names:
        if not name.endswith(FILE_ENDINGS) and name not in (plugins.BACKBONE_GROUP, plugins.IMAGE_SET_GROUP):
            resolve(name)


def test_migration_lists_the_renamed_settings():
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", MIGRATION.split("## Modules")[0], re.MULTILINE)
    assert dict(rows) == RENAMED


def test_migration_lists_modules_that_moved():
    rows = re.findall(r"^\| (`fastbyol\..+) \| `(fastbyol[\w.]+)` \|$", MIGRATION, re.MULTILINE)
    assert len(rows) == 8
    for moved, package in rows:
        assert importlib.util.find_spec(package).submodule_search_locations is not None, package
        for old, was_module in re.findall(r"`([\w.]+)`( \(a module\))?", moved):
            assert (importlib.util.find_spec(old) is None) != bool(was_module), old


@pytest.mark.slow
@each_page
def test_python_examples_run(page, photos, tmp_path, installation):
    """One process per page, with the installed package; later blocks see earlier names."""
    blocks = fences(page, "python")
    blocks = [block for block in blocks if "--8<--" not in block]
    if not blocks:
        return
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "photos").symlink_to(photos)
    (tmp_path / "features").mkdir()  # as `fastbyol embed` writes them
    for part in range(2):
        np.save(tmp_path / "features" / f"features-{part:05d}.npy", np.zeros((3, 8), np.float16))
    for block in blocks:
        ast.parse(block)
    code = "\n".join(["import fastbyol", *blocks, "print(fastbyol.__file__)"])
    run = installation.run("python", "-c", code, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(installation.package / "__init__.py")


@pytest.mark.slow
def test_site_builds_without_warnings_and_loads_nothing_from_the_network(tmp_path):
    missing = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    pages = {path.stem: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in DOCS} <= pages.keys()
    for name, text in pages.items():
        assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]+', text), name
        assert "--8&lt;--" not in text, f"{name}: an include was not resolved"
    assert "class TrainStep" in re.sub(r"<[^>]+>", "", pages["architecture"])


def test_readme_claims_what_the_exactness_page_measures():
    """Word for word."""
    bullet = re.search(r"- \*\*Exact BYOL:\*\* (.*?) \(\[Exactness\]", (ROOT / "README.md").read_text(), re.DOTALL)
    claim = " ".join(bullet[1].split())
    assert f"{claim}." in " ".join((ROOT / "docs" / "exactness.md").read_text().split())
