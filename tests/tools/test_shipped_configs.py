"""Shipped configs by name, on the command line and from Python, and `fastbyol configs`."""

import os
import re

import pytest
from helpers.common import ROOT

from fastbyol import cli
from fastbyol.cli import train_config
from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.settings.config_files import find_config, shipped_configs
from fastbyol.tools.configs import read_header

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def run(capsys, *words):
    code = cli.main(words)
    done = capsys.readouterr()
    return code, done.out, done.err


def test_configs_of_the_package_are_those_of_the_top_level_folder():
    assert list(shipped_configs()) == NAMES
    assert all(path.samefile(ROOT / "configs" / f"{name}.yaml") for name, path in shipped_configs().items())


@pytest.mark.parametrize("name", NAMES)
def test_name_is_the_same_config_as_the_file(name):
    from_file = train_config(["--config", str(ROOT / "configs" / f"{name}.yaml")])
    assert from_file.name.replace("-", "_") == name
    assert train_config(["--config", name]) == Config.from_yaml(name) == from_file


def test_existing_file_comes_before_a_shipped_config(tmp_path):
    (tmp_path / "demo").write_text("seed: 7\n")
    assert train_config(["--config", "demo"]) == Config.from_yaml("demo") == Config(seed=7)


def test_file_without_a_reader_comes_before_a_shipped_config(tmp_path):
    os.mkfifo(tmp_path / "demo")
    assert find_config("demo").resolve() == tmp_path / "demo"


def test_folder_does_not_hide_a_shipped_config(tmp_path):
    """Such as the folder of a run."""
    (tmp_path / "demo").mkdir()
    assert find_config("demo").samefile(ROOT / "configs" / "demo.yaml")


def test_path_never_is_the_name_of_a_shipped_config(tmp_path):
    with pytest.raises(InputError, match=r"config=\./demo: there is no such file; did you mean demo\?"):
        find_config("./demo")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert find_config("configs/demo.yaml").samefile(ROOT / "configs" / "demo.yaml")


NEITHER = "there is no such file and no shipped config of this name"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("imagenet_r50", f"{NEITHER}; did you mean imagenet_r50_100ep?"),
        ("cifar10-r18", f"{NEITHER}; did you mean cifar10_r18?"),
        ("min", f"{NEITHER}; did you mean mine.yaml?"),
        ("demo.yaml", f"{NEITHER}; did you mean demo?"),
        ("configs/demo.yaml", "there is no such file; did you mean demo?"),
        ("zzz", f"{NEITHER}; `fastbyol configs` lists the shipped configs"),
        ("other/zzz", "there is no such file; `fastbyol configs` lists the shipped configs"),
    ],
)
def test_unknown_name_is_one_line_with_the_nearest(capsys, tmp_path, given, message):
    (tmp_path / "mine.yaml").write_text("seed: 1")
    assert run(capsys, "train", "--config", given) == (2, "", f"fastbyol: error: config={given}: {message}\n")
    with pytest.raises(InputError, match=f"^{re.escape(f'config={given}: {message}')}$"):
        Config.from_yaml(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  warmup_epochs: 200\n", "c.yaml, line 2: optim.warmup_epochs=200.0: must lie between 0 and"),
        ("seed: 1\noptim:\n  epoch: 2\n", "c.yaml, line 3: optim.epoch: unknown key; did you mean optim.epochs?"),
        ("data:\n  batch_size: many\n", "c.yaml, line 2: data.batch_size='many': expected"),
        ("data: {images_per_class: 2, file_list: x}", "c.yaml: data.fraction=1.0: give only one of data.fraction,"),
        ("", "c.yaml: has no settings"),
    ],
)
def test_error_of_from_yaml_names_file_and_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        Config.from_yaml("c.yaml")


def test_from_yaml_takes_paths_and_current_and_old_names(tmp_path, log_lines):
    (tmp_path / "c.yaml").write_text("data.recipe: none\noptim: {epochs: 3}\n")
    config = Config.from_yaml(tmp_path / "c.yaml")
    assert (config.data.augmentation, config.optim.epochs) == ("none", 3)
    assert log_lines == [
        f"warning: {tmp_path}/c.yaml, line 1: data.recipe is now called data.augmentation; the old name still works"
    ]


@pytest.mark.parametrize("name", ["", "a\0b", "a" * 300, "~nobody-here/x"])
def test_impossible_path_is_an_input_error(name):
    with pytest.raises(InputError, match=r"^config="):
        Config.from_yaml(name)


def test_list_has_name_description_hardware_and_hours(capsys):
    code, out, err = run(capsys, "configs")
    assert (code, err) == (0, "")
    assert re.findall(r"^(\w+)  ", out, re.MULTILINE) == NAMES
    lines = out.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("imagenet_r50_100ep "))
    assert lines[at].endswith("  ImageNet-1k, ResNet-50, 100 epochs: the paper's preset for short runs.")
    assert lines[at + 1].split("  ")[-1] == "8 x H100 80 GB, 1.7 hours (estimate)"
    assert "2 CPU cores, 0.1 hours\n" in out  # fashion_mnist: neither estimated nor measured
    assert "2 CPU cores, 0.05 hours (measured)\n" in out


@pytest.mark.parametrize("columns", [60, 100])
def test_list_wraps_at_the_width_of_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    *lines, _, _ = run(capsys, "configs")[1].splitlines()
    assert max(map(len, lines)) in range(columns - 12, columns + 1)


@pytest.mark.parametrize("name", NAMES)
def test_printed_config_is_the_file(capsys, name):
    assert run(capsys, "configs", name) == (0, (ROOT / "configs" / f"{name}.yaml").read_text(), "")


def test_unknown_config_to_print_is_one_line(capsys):
    assert run(capsys, "configs", "dmo") == (2, "", "fastbyol: error: dmo: unknown config; did you mean demo?\n")
    message = "fastbyol: error: zzz: unknown config; `fastbyol configs` lists all\n"
    assert run(capsys, "configs", "zzz") == (2, "", message)


def test_config_without_a_header_has_no_cost():
    assert (read_header("seed: 1\n").title, read_header("seed: 1\n").cost) == ("", "")
    assert read_header("# Mine.\n#   hours     2\n").cost == "2 hours"
    assert read_header("# Mine.\n#   hardware  1 x A100\n").cost == "1 x A100"


def test_usage_shows_that_the_name_is_optional(capsys):
    assert run(capsys, "configs", "--help")[1].startswith("usage: fastbyol configs [NAME] [--option value ...]\n")
    assert run(capsys, "pack", "--help")[1].startswith("usage: fastbyol pack SOURCE OUT [--option value ...]\n")
