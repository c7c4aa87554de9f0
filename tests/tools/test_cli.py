import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.common import ROOT
from PIL import Image

import fastbyol
from fastbyol import cli
from fastbyol.api import train
from fastbyol.cli import main, train_config
from fastbyol.config import Config
from fastbyol.errors import InputError, LoaderTimeout, RunError
from fastbyol.evaluation.options import EVALUATIONS
from fastbyol.loop import RunResult
from fastbyol.settings.base import leaves
from fastbyol.settings.commands import options_of

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def run(capsys, *arguments):
    """Run a command; return (exit code, stdout, stderr)."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fastbyol {fastbyol.__version__}\n", "")


def test_help_shows_type_unit_and_default_of_every_field(capsys):
    code, out, _ = run(capsys, "train", "--help-all")
    text = " ".join(out.split())
    assert code == 0
    assert "--data.image_size_px N Height and width of both views in pixels. (integer, default 224)" in text
    assert "--optim.base_lr X Learning rate per 256 images" in text
    assert "--optim.name {lars,sgd,adamw,adam}" in text
    described = re.findall(r"--([\w.]+) \S+ [\w\"`'0-9]", text)
    assert set(described) >= {name for name, _, _ in leaves(Config)} | {"config"}
    assert "typing." not in text
    assert "optim: Optimizer, schedules and target update: " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data.bach_size", "3"], "data.bach_size"),
        (["train", "--data.batch_size", "many"], "data.batch_size.*many"),
        (["train", "--data.batch_size", "1"], "data.batch_size=1: BatchNorm needs at least 2 images"),
        (["train", "--batch-size", "1"], "data.batch_size=1: BatchNorm needs at least 2 images"),
        (["train", "--batch-size=1"], "data.batch_size=1: BatchNorm needs at least 2 images"),
        (["train", "--optim.tau_base", "1.5"], "optim.tau_base=1.5: must lie in"),
        (["train", "--optim.name", "sdg"], "optim.name.*sdg"),
        (["train", "--config", "/nowhere.yaml"], "config.*nowhere.yaml"),
        (["train"], "data.root is not set"),
        (["train", "--data.root", "/nowhere"], "data.root=/nowhere: there is no folder /nowhere/train"),
        (["train", "--device", "cuda", "--data.root", "x"], "device=cuda: torch finds no GPU"),
        (["eval", "knn", "--run", "/nowhere"], "checkpoint /nowhere cannot be read"),
        (["eval", "knn", "--run", "x", "--k", "0"], "k=0: must be at least 1"),
        (["eval", "knn"], "run"),
        (["eval", "fewshot", "--run", "x", "--shots", "1,x"], "shots.*x"),
        (["eval", "fewshot", "--run", "x", "--shots", "0"], r"shots=0: must all be at least 1"),
        (["eval", "finetune", "--run", "x", "--fraction", "0"], r"fraction=0.0: must lie in \(0, 1\]"),
        (["eval", "linear", "--run", "x", "--base_lrs=0.1,-1"], r"base_lrs=0.1,-1.0: must all be above 0"),
        (["train", "--model.norm", "instance"], "model.norm.*instance"),
        (
            ["train", "--data.root", "x", "--model.feature_noise", "1"],
            "model.feature_noise=1.0: .*set data.augmentation=none",
        ),
        (["prepare", "photos"], "out"),
        (["prepare", "photos", "--out", "/tmp"], "--out /tmp exists"),
        (["preview", "--data.root", "/nowhere"], "there is no folder /nowhere/train"),
        (["report", "--run", "/nowhere"], "--run /nowhere: folder not found"),
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["eval", "kn", "--run", "x"], "unknown command 'kn'; did you mean 'knn'?"),
        (["prepare", "fashion-mnis"], "unknown command 'fashion-mnis'; did you mean 'fashion-mnist'?"),
        (["train", "--epochs", "3"], "unknown option --epochs; did you mean --optim.epochs?"),
        (["train", "--data.batch-size", "3"], "unknown option --data.batch-size; did you mean --data.batch_size?"),
        (["bench", "--round", "3"], "unknown option --round; did you mean --rounds?"),
        (["train", "--zebra"], "unknown option --zebra; fastbyol train --help-all lists all"),
        (["train", "optim.epochs=3"], "unexpected argument 'optim.epochs=3'; did you mean --optim.epochs=3?"),
        (["pack", "a", "b", "c"], "unexpected argument 'c'; see fastbyol pack --help"),
        (["pack", "a"], r"out is missing \(a path\): \.beton file to write$"),
        (["pack", "a", "b", "--skip-bad=3"], "--skip-bad takes no value"),
        (["pack", "a", "b", "--threads", "-1"], "--threads=-1: must be 0"),
        (["pack", "a", "b", "--threads", "9" * 18], "--threads=9+: must be at most 4096"),
        (["pack", "a", "b", "--mode", "rw"], "--mode='rw': expected one of jpg, raw, auto; did you mean raw?"),
        (["prepare", "photos", "--out", "x", "--seed", "-1"], "--seed=-1: must be 0 or more"),
        (["prepare", "photos", "--out", "x", "--images", "-5"], "--images -5: at least 72"),
        (["prepare", "photos", "--out", "x", "--images", "1" + 12 * "0"], "--images=10+: must be at most 10000000"),
        (["prepare", "fashion-mnist", "--out", "x", "--val_images", "0"], "--val_images=0: must be at least 1"),
        (["prepare", "imagenette", "--out", "x"], r"--source is missing \(a path\)"),
        (["prepare", "imagenet", "--out", "x", "--source="], "--source: must not be empty"),
        (["prepare", "imagenet", "--out", "x", "--source", "y", "--val_list", "z"], "did you mean --val-list?"),
        (["bench", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (["bench", "--steps=0"], "--steps 0: must be at least 1"),
        (["profile", "--steps", "-3"], "--steps -3: must be at least 1"),
        (["export", "x", "--format", "tim"], "--format='tim': expected one of timm, .*; did you mean timm?"),
        (["report"], r"--run is missing \(a path\): The run.s folder$"),
        (["train", "--data.root"], "--data.root: needs a value: text"),
        (["train", "--data.root", "--name", "x"], "--data.root: needs a value: text"),
        (["train", "--optim.epochs", "three"], "optim.epochs='three': expected an integer$"),
        (["train", "--optim.epochs", "3.5"], "optim.epochs='?3.5'?: expected an integer$"),
        (["train", "--optim.epochs", "1" + 18 * "0"], "optim.epochs=10+: must be at most 1000000"),
        (["train", "--optim.base_lr", "nan"], "optim.base_lr=nan: must be finite"),
        (["train", "--optim.base_lr", "-1e-3"], "optim.base_lr=-0.001: must be above 0"),
        (["train", "--probe.enabled", "maybe"], "probe.enabled='maybe': expected true or false"),
        (
            ["train", "--model.norm", "grop"],
            "model.norm='grop': expected one of batch, layer, group; did you mean group?",
        ),
        (["train", "--data.batch_size", "many"], "data.batch_size='many': expected an integer or auto$"),
        (["train", "--data.root", "a\0b"], "data.root='a.x00b': has a NUL character"),
        (["train", "--config", "a\0b"], "--config=.a.x00b.: has a NUL character"),
        (
            ["train", "--config", "x" * 300],
            "--config=.x+.*: is too long: a path has at most 4095 bytes, each name in it 255",
        ),
        (["train", "--config", "/tmp"], "config=/tmp: cannot be read: Is a directory"),
        (["train", "--name", ".."], "name='..': must be"),
        (["train", "--name", ""], "name='': must not be empty"),
        (["train", "--name=-x"], "name='-x': must not begin with '-'"),
        (["train", "--name", "a\nb"], "name='a.nb': must be of printable UTF-8 characters"),
        (["train", "--name", "\ud800"], "name=.*: has characters that are not valid Unicode"),
        (["train", "--name", "ü" * 101], "name='ü.*: must have at most 200 bytes in UTF-8"),
        (["eval", "fewshot", "--run", "x", "--shots", "1" + 18 * "0"], "shots=.*: must all be at most 1000000"),
        (["eval", "knn", "--run", "x", "--threads", "-1"], "threads=-1: must be 0"),
        (["eval", "knn", "--run", "x", "--k=0"], "error: --k=0: must be at least 1"),
        (["eval", "knn"], r"--run is missing \(text\): Run folder .* or checkpoint file$"),
        (["eval", "segmentation", "--run", "x"], "--root: name the VOC-format folder"),
        (["eval", "--run", "x", "knn"], "unknown option --run; fastbyol eval takes a command first: one of knn,"),
        (["knn"], "unknown command 'knn'; did you mean 'eval knn'?"),
        (["train", "--help=1"], "--help takes no value"),
        (["train", "config=c.yaml"], "unexpected argument 'config=c.yaml'; did you mean --config=c.yaml?"),
        (
            ["eval", "fewshot", "--run", "x", "--shots", ",".join(["0"] * 300)],
            "--shots=.{,120}: must all be at least 1",
        ),
        (["train", "--version"], "unknown option --version; fastbyol --version shows the version"),
        (["train", "\N{EN DASH}seed", "3"], "unexpected argument '.seed'; did you mean --seed?"),
        (["train", "data.root", "x"], "unexpected argument 'data.root'; did you mean --data.root?"),
        (["train", "--optim.base_lr", "0,45"], "--optim.base_lr='0,45': expected a number; write 0.45"),
        (["train", "--data.classes=[[a]]"], r"--data.classes='\[\[a\]\]': expected names, such as cat,dog"),
        (["train", "--data.classes=[a,b"], r"--data.classes='\[a,b': expected names"),
        (["train", "--data.classes={a: 1}"], "--data.classes='{a: 1}': expected names"),
        (["train", "--data.train_split="], "--data.train_split='': must not be empty"),
        (["train", "--runs="], "--runs='': must not be empty"),
        (["eval", "knn", "--run="], "--run='': must not be empty"),
        (["eval", "knn", "--run", "x", "--out", ""], "--out='': must not be empty"),
        (["pack", "", "x"], "source='': must not be empty"),
        (["prepare", "photos", "--out="], "--out='': must not be empty"),
        (["plan", "--rates", "x" * 300], "--rates=.*: is too long: .* each name in it 255"),
        (["plan", "--rates", "x/" * 3000], "--rates=.{,90}: is too long"),
        (["plan", "--gpus=--"], "--gpus='--': expected an integer"),
        ([], "fastbyol takes a command first: one of train, eval"),
    ],
)
def test_invalid_command_line_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("fastbyol: error: ")
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:\n  bach_size: 3\n", "data.bach_size"),
        ("datta:\n  batch_size: 3\n", "datta"),
        ("optim:\n  epochs: three\n", "optim.epochs.*three"),
        ("model: [1, 2\n", "line 1, column 8: a bracket opened here is not closed, or a comma is missing"),
        ("model:\n  width: -1\n", "model.width=-1"),
        (
            "seed: 3\noptim:\n  epochs:\n",
            r"c.yaml, line 3: optim.epochs: has no value \(blank\); expected an integer",
        ),
        ("optim: {epochs: null}", "line 1: optim.epochs: has no value"),
        ("optim: {epoch: 3}", "line 1: optim.epoch: unknown key; did you mean optim.epochs?"),
        ("epochs: 3", "line 1: epochs: unknown key; did you mean optim.epochs?"),
        ("name: a\nseed: x", "line 2: seed='x': expected an integer"),
        ("optim: 3", "line 1: optim='3': expected a section with settings such as optim.name"),
        ("optim:", r"line 1: optim: has no value \(blank\)"),
        ("optim: [1]", "line 1: optim=a list: expected a section"),
        ("- 1", "c.yaml: expected settings, .* found a list"),
        ("hello", "c.yaml: expected settings, .* found 'hello'"),
        ("", "c.yaml: has no settings"),
        ("# nothing\n", "c.yaml: has no settings"),
        ("seed: 1\nname: a\nseed: 2", "line 3: seed is set twice, on line 1 too"),
        ("optim: {epochs: 1}\noptim.epochs: 2", "line 2: optim.epochs is set twice, on line 1 too"),
        (b"name: a\nseed: 1 # caf\xe9", "line 2: is not UTF-8 text"),
        (b"\x00\x01", "c.yaml: is not UTF-8 text; save the file as UTF-8"),
        ("seed: 1\nname: a\0b\n", r"line 2: the character U.0000 is not allowed in a config: remove it"),
        ("seed: 1\t# c\n", "line 1, column 8: a tab: use spaces"),
        ("  name: x\ndata: {}\n", "line 2, column 1: the lines above are indented more than this one"),
        ("seed: 1\nname\nruns: x\n", "line 2, column 1: expected KEY: VALUE, with a space after the colon"),
        ("name: > x\n", "line 1, column 7: quote text that begins with > or"),
        ("name: ? x\n", "line 1, column 7: quote text that begins with ."),
        ("data: - 3\n", "line 1, column 7: a list item, '- x', starts on its own line"),
        ("optim: !!python/object:os.system {epochs: 3}", "line 1: the tag '!!python/object:os.system' is not accepted"),
        ("seed: !!int 3", "line 1: the tag '!!int' is not accepted"),
        ("data: {classes: " + "[" * 5000, "nested too deeply"),
        ("data: {classes: [a, [b]]}", "line 1: data.classes=a list: expected names"),
        ("data:\n  classes: &a [*a]", "data.classes=a list: expected names"),
        ("data: {classes: {a: b}}", "data.classes=a mapping: expected names"),
        ("data: {root: [a, b]}", r"data.root=\['a', 'b'\]: expected text"),
        ("knn: &k {k: 3}\nprobe:\n  <<: [" + "*k, " * 9 + "*k]", "line 1: probe.k: unknown key; did you mean knn.k?"),
        ("optim: {base_lr: .inf}", "optim.base_lr=inf: must be finite"),
        ('data: {root: "\\ud800"}', "data.root=.*: has characters that are not valid Unicode"),
        ("name: a\n---\nname: b\n", "line 2, column 1: a second document begins .---.: keep one"),
        ("optim:\n\tepochs: 1\n", "line 2, column 1: a tab: use spaces"),
        (
            "optim:\n  epochs: 1\n base_lr: 2\n",
            "line 3, column 2: this does not fit the lines above: check indentation",
        ),
        ("name: a: b\n", "line 1, column 8: unexpected ':': quote text that contains ': '"),
        ("name: @x\n", "line 1, column 7: quote text that begins with this character"),
        ("name: *x\n", "the alias after . has no anchor .&. before it"),
        ('name: "x\n', "line 1, column 7: a quote opened here is not closed"),
        ("name: x\a\n", r"line 1: the character U.0007 is not allowed in a config: remove it"),
        ("name: x\n".encode("utf-16-le"), "is not UTF-8 text; save the file as UTF-8"),
        ("? ''\n: 1\n", "line 1: '': unknown key"),
        ("x" * 300_000, "is not a config: it has more than 256 KiB"),
    ],
)
def test_invalid_yaml_file_is_one_line_and_exit_code_2(capsys, tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    code, _, err = run(capsys, "train", "--config", str(path))
    assert code == 2
    assert err.count("\n") == 1
    assert "c.yaml" in err
    assert re.search(message, err)


def test_yaml_and_command_line_accept_the_same_spellings(tmp_path):
    words = {
        "optim.base_lr": ("1e-3", 1e-3),
        "optim.weight_decay": ("1_000.5", 1000.5),
        "optim.epochs": ("010", 10),
        "optim.warmup_epochs": ("0", 0.0),
        "data.batch_size": ("1e3", 1000),
        "data.classes": ("[no, 010, 'a,b']", ["no", "010", "a,b"]),
        "data.root": ("null", None),
        "probe.enabled": ("Yes", True),
        "log.trackers": ("wandb,mlflow", ["wandb", "mlflow"]),
        "name": ("2026-01-01", "2026-01-01"),
        "runs": ("12", "12"),
    }
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(f"{key}: {word}" for key, (word, _) in words.items()))
    from_line = train_config([f"--{key}={word}" for key, (word, _) in words.items()])
    assert train_config(["--config", str(path)]) == from_line
    for key, (_, value) in words.items():
        found = from_line
        for part in key.split("."):
            found = getattr(found, part)
        assert (found, type(found)) == (value, type(value))


def test_yaml_anchors_and_merge_keys(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "checkpoint: &every {every_epochs: 2}\nknn:\n  <<: *every\n  k: 7\n  every_epochs: &three 3\nseed: *three\n"
    )
    config = train_config(["--config", str(path)])
    assert (config.checkpoint.every_epochs, config.knn.every_epochs, config.knn.k, config.seed) == (2, 3, 7, 3)


def test_error_names_the_source_of_the_value(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim:\n  warmup_epochs: 200\n")
    _, _, err = run(capsys, "train", "--config", str(path))
    assert f"{path}, line 2: optim.warmup_epochs=200.0: must lie between 0 and optim.epochs=100" in err
    assert train_config(["--config", str(path), "--optim.epochs", "300"]).optim.warmup == 200
    _, _, err = run(capsys, "train", "--config", str(path), "--optim.warmup_epochs", "300")
    assert err.startswith("fastbyol: error: --optim.warmup_epochs=300.0: must lie")


def test_missing_config_suggests_a_similar_file(capsys, tmp_path):
    (tmp_path / "first.yaml").write_text("seed: 1")
    code, _, err = run(capsys, "train", "--config", str(tmp_path / "first.yml"))
    assert code == 2
    assert f"there is no such file; did you mean {tmp_path / 'first.yaml'}?" in err


COMMANDS = [
    words.split()
    for words in (
        "train",
        "preview",
        "profile",
        "bench",
        "plan",
        "eval knn",
        "prepare photos",
        "prepare imagenet",
        "pack",
        "export",
        "push",
        "report",
    )
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_option_prefixes_are_not_accepted(capsys, command):
    level = cli.COMMANDS
    for word in command:
        level = level.commands[word]
    options = [*options_of(level.options), *(options_of(Config) if level.takes_config else ())]
    names = {option.name for option in options if option.named}
    for name in names:
        if (beginning := name[:-1]) not in names and len(beginning) > 3:
            code, _, err = run(capsys, *command, beginning, "1")
            assert code == 2
            assert f"unknown option {beginning}; did you mean --" in err


@pytest.mark.parametrize(
    "command", [*COMMANDS, ["doctor"], ["prepare"], ["eval"], *(["eval", name] for name in EVALUATIONS)], ids=" ".join
)
def test_help_fits_on_one_screen(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "120")
    for words in ([*command, "--help"], [*command, "-h"], ["help", *command]):
        code, out, err = run(capsys, *words)
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: fastbyol {' '.join(command)} ")
        assert out.count("\n") <= 40
        assert "typing" not in out


def test_help_shows_common_settings_and_mentions_help_all(capsys):
    _, out, _ = run(capsys, "train", "--help")
    first = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert first[:3] == ["--config", "--data.root", "--name"]
    assert {"--optim.epochs", "--data.batch_size", "--resume", "--device", "--precision", "--step.mode"} <= set(first)
    assert out.endswith(f"--help-all shows all {len(list(leaves(Config)))} settings.\n")
    _, out, _ = run(capsys, "help")
    assert all(f"  {name} " in out for name in cli.COMMANDS.commands)
    assert "fastbyol train --data.root" in out


@pytest.mark.parametrize("columns", [60, 80, 120, 300])
@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help-all"], ["pack", "--help"], ["eval", "--help"]], ids=" ".join
)
def test_help_wraps_at_the_width_of_the_terminal(capsys, monkeypatch, words, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(capsys, *words)
    widths = [
        len(line) for line in out.splitlines() if " " in line.strip() and not line.startswith(("usage", "  fastbyol"))
    ]
    assert max(widths) <= min(columns, 120)
    if words[-1] == "--help-all":  # long enough to fill every line
        assert max(widths) > min(columns, 120) - 10


def test_help_and_input_errors_do_not_import_torch():
    code = """
import sys
from fastbyol.cli import main
main(["--help"])
main(["train", "--help-all"])
main(["train", "--epochs", "1"])
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def _allocates():
    torch.empty(2**50)


def _overflows():
    torch.empty(2**40, 2**40)


def _numpy():
    np.empty(2**50)


@pytest.mark.parametrize("work", [_allocates, _overflows, _numpy])
def test_out_of_memory_is_one_line(capsys, monkeypatch, work):
    monkeypatch.setattr("fastbyol.tools.doctor.diagnose", lambda *args: work())
    code, _, err = run(capsys, "doctor")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("fastbyol: error: out of memory or threads: ")
    assert "lower data.batch_size" in err


def test_model_larger_than_memory_is_one_line(capsys, photos, tmp_path):
    options = [
        "--model.backbone",
        "resnet18",
        "--model.width",
        "0.125",
        "--model.hidden_dim",
        "65536",
        "--model.projection_dim",
        str(2**20),
    ]
    options += [
        "--data.batch_size",
        "8",
        "--data.image_size_px",
        "32",
        "--runs",
        str(tmp_path),
        "--device",
        "cpu",
        "--optim.epochs",
        "1",
    ]
    code, _, err = run(capsys, "train", "--data.root", str(photos), *options)
    assert (code, err.count("\n")) == (1, 1)
    assert "out of memory or threads: " in err
    assert list(tmp_path.iterdir()) == []


def test_os_errors_are_one_line_and_bugs_raise(capsys, monkeypatch):
    def missing(*args):
        Path("/proc/nowhere").read_text()

    def wrong(*args):
        raise RuntimeError("a tensor of the wrong shape")

    monkeypatch.setattr("fastbyol.tools.doctor.diagnose", missing)
    assert run(capsys, "doctor") == (1, "", "fastbyol: error: '/proc/nowhere': No such file or directory\n")
    monkeypatch.setattr("fastbyol.tools.doctor.diagnose", wrong)
    with pytest.raises(RuntimeError, match="wrong shape"):
        main(["doctor"])


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data.root", "LONG"],
        ["train", "--data.root", "HERE", "--runs", "LONG", "--optim.epochs", "1", "--data.batch_size", "8"],
        ["preview", "--data.root", "HERE", "--out", "LONG"],
        ["bench", "--data.root", "HERE", "--out", "LONG/x.json"],
        ["profile", "--data.root", "HERE", "--out", "LONG"],
        ["plan", "--gpu", "h100", "--data.root", "LONG", "--model.backbone", "resnet18", "--data.image_size_px", "32"],
        ["plan", "--rates", "LONG"],
        ["eval", "knn", "--run", "LONG"],
        ["prepare", "photos", "--out", "LONG"],
        ["prepare", "fashion-mnist", "--out", "LONG"],
        ["prepare", "fashion-mnist", "--out", "x", "--source", "LONG"],
        ["prepare", "cifar10", "--out", "x", "--source", "LONG"],
        ["prepare", "imagenette", "--out", "x", "--source", "LONG"],
        ["prepare", "imagenet", "--out", "x", "--source", "HERE,LONG"],
        ["prepare", "imagenet", "--out", "x", "--source", "HERE", "--devkit", "LONG"],
        ["prepare", "imagenet", "--out", "x", "--source", "HERE", "--val-list", "LONG"],
        ["prepare", "imagenet", "--out", "x", "--source", "HERE", "--classes", "LONG"],
        ["pack", "LONG", "x.beton"],
        ["pack", "HERE/train", "LONG"],
        ["export", "LONG", "--format", "timm"],
        ["report", "--run", "LONG"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("long", ["x" * 300, "a\0b"], ids=["long", "NUL"])
def test_impossible_file_names_are_one_line(capsys, photos, tmp_path, monkeypatch, words, long):
    monkeypatch.chdir(tmp_path)
    small = (
        ["--device", "cpu", "--model.width", "0.125"] if words[0] in ("train", "preview", "bench", "profile") else []
    )
    words = [word.replace("LONG", long).replace("HERE", str(photos)) for word in [*words, *small]]
    code, _, err = run(capsys, *words)
    assert code in (1, 2)
    assert err.startswith("fastbyol: error: ")
    assert err.count("\n") == 1
    assert re.search("NUL" if "\0" in long else "too long|no folder|no such|cannot", err)
    assert list(tmp_path.iterdir()) == []


def test_command_line_overrides_config_file(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data:\n  root: /from-file\n  batch_size: 12\n")
    _, _, err = run(capsys, "train", "--config", str(path))
    assert "/from-file/train" in err
    _, _, err = run(capsys, "train", "--config", str(path), "--data.root", "/from-line")
    assert "/from-line/train" in err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_accepted(capsys, tmp_path, path):
    code, _, err = run(capsys, "train", "--config", str(path), "--data.root", "/nowhere", "--runs", str(tmp_path))
    assert (code, "there is no folder /nowhere/train" in err) == (2, True)


@pytest.mark.slow
def test_preview_draws_originals_and_both_views(capsys, photos, tmp_path):
    out = tmp_path / "preview.png"
    code, text, _ = run(capsys, "preview", "--data.root", str(photos), "--data.image_size_px", "48", "--out", str(out))
    assert code == 0
    assert "8 images" in text
    with Image.open(out) as image:
        assert image.width > 800
    code, _, err = run(capsys, "preview", "--data.root", str(photos), "--out", "/nowhere/p.png")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.slow
def test_prepare_train_eval_and_report(capsys, tmp_path):
    root, runs = tmp_path / "photos", tmp_path / "runs"
    assert run(capsys, "prepare", "photos", "--out", str(root), "--images", "72", "--size", "48")[0] == 0
    small = [
        "--data.batch_size",
        "24",
        "--data.image_size_px",
        "32",
        "--model.backbone",
        "resnet18",
        "--model.width",
        "0.125",
    ]
    small += ["--optim.epochs", "2", "--optim.warmup_epochs", "0", "--model.hidden_dim", "32", "--name", "r"]
    code, out, err = run(capsys, "train", "--data.root", str(root), "--runs", str(runs), *small)
    assert (code, err) == (0, "")
    assert f"report: {runs / 'r' / 'report.html'}" in out
    for protocol in ("knn", "linear"):
        code, out, _ = run(capsys, "eval", protocol, "--run", str(runs / "r"))
        assert code == 0
        # a loaded machine prints progress between these lines
        rows = re.findall(r"^(BYOL|untrained network|raw pixels) +top-1 +[\d.]+%", out, re.MULTILINE)
        assert rows == ["BYOL", "untrained network", "raw pixels"], out
    page = (runs / "r" / "report.html").read_text()
    for part in (
        "kNN",
        "Linear probe",
        "untrained network",
        "Map of the features",
        "Nearest neighbors",
        "Augmented views",
        "Settings",
        "torch",
    ):
        assert part in page
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 4
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            ink = np.mean(np.asarray(image.convert("L")) < 250)
            assert ink > 0.02, "a blank picture"
    assert "http://" not in page
    assert 'src="/' not in page


def test_report_without_data_set_has_no_pictures(capsys, photos, make_config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    folder = train(make_config(data={"root": str(copy)}, optim={"epochs": 1, "warmup_epochs": 0})).folder
    shutil.rmtree(copy)
    code, out, _ = run(capsys, "report", "--run", str(folder))
    assert code == 0
    assert "the report lacks images" in out
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == 1


@pytest.mark.slow
def test_pack_writes_one_file_and_reports_errors(photos, tmp_path, capsys):
    out = tmp_path / "x.beton"
    code, text, _ = run(capsys, "pack", str(photos / "train"), str(out), "--mode", "jpg", "--max-side", "50")
    assert code == 0
    assert f"{out}: 72 images (72 JPEG, 0 raw)" in text
    again = tmp_path / "again.beton"
    assert run(capsys, "pack", str(out), str(again), "--mode", "raw")[0] == 0
    for arguments, message in [
        ((str(photos), str(tmp_path / "y.beton")), "holds splits (train, val), not classes"),
        ((str(tmp_path / "none"), str(tmp_path / "y.beton")), "there is no folder"),
        ((str(photos / "train"), str(out)), "exists; it is not overwritten"),
        ((str(photos / "train"), str(tmp_path / "y.beton"), "--quality", "101"), "--quality 101: must lie in 1..100"),
        ((str(photos / "train"), str(tmp_path / "y.beton"), "--mode", "png"), "mode"),
    ]:
        code, _, error = run(capsys, "pack", *arguments)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "y.beton").exists()


@pytest.mark.parametrize("words", [["--shots", "1,2"], ["--shots=1,2"], ["--shots", "[1, 2]"]])
def test_list_spellings(capsys, words, monkeypatch):
    found = {}
    monkeypatch.setattr("fastbyol.evaluation.run.evaluate", lambda name, options, *rest: found.update({name: options}))
    assert run(capsys, "eval", "fewshot", "--run", "x", *words)[0] == 0
    assert found["fewshot"].shots == (1, 2)


@pytest.mark.parametrize("kind", [InputError, RunError, lambda text: LoaderTimeout(text, "stacks")])
def test_errors_escape_control_characters(kind):
    assert str(kind("data/a\nb\r\x1b[2J\udcff/\u00fc: unreadable")) == "data/a\\nb\\r\\x1b[2J\\udcff/\u00fc: unreadable"


def test_command_line_error_does_not_name_the_config_file(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("data: {batch_size: 8}\n")
    code, _, err = run(capsys, "train", "--config", str(tmp_path / "c.yaml"), "--data.batch_size=x")
    assert code == 2
    assert err.startswith("fastbyol: error: --data.batch_size='x': expected an integer")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "is a folder; name a file"),
        ("none/x", "cannot be written: there is no folder .*none"),
        ("file/x", "cannot be written: there is no folder .*file"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "bench", "preview", "export"])
def test_unwritable_output_is_reported_before_the_work(capsys, monkeypatch, photos, tmp_path, command, out, message):
    (tmp_path / "file").touch()
    out = str(tmp_path / out) + (".pth" if command == "export" and out != "." else "")
    (tmp_path / "x.pth").mkdir()
    if command == "export" and out == str(tmp_path):
        out = str(tmp_path / "x.pth")
    words = {
        "eval": ["eval", "knn", "--run", "r"],
        "bench": ["bench", "--data.root", str(photos)],
        "preview": ["preview", "--data.root", str(photos)],
        "export": ["export", "r", "--format", "timm"],
    }[command]
    monkeypatch.setattr(
        "fastbyol.evaluation.run.load_checkpoint_model", lambda run, *rest: (tmp_path / "c.pt", Config(), None, 3)
    )
    monkeypatch.setattr(
        "fastbyol.weights.export.load_checkpoint_model", lambda *args: pytest.fail("the work has started")
    )
    monkeypatch.setattr("fastbyol.tools.preview.draw_views", lambda config, folder: pytest.fail("the work has started"))
    monkeypatch.setattr("fastbyol.tools.bench._measure", lambda *args: pytest.fail("the work has started"))
    code, _, err = run(capsys, *words, "--out", out)
    assert code == 2
    assert re.search(f"error: --out .*: {message}", err)


def test_failed_output_is_exit_code_1(capsys, photos, tmp_path):
    code, _, err = run(capsys, "preview", "--data.root", str(photos), "--data.image_size_px=32", "--out", "/dev/full")
    assert (code, err) == (1, "fastbyol: error: --out /dev/full: cannot be written: No space left on device\n")


def test_invalid_numba_num_threads_is_one_line():
    for value in ("abc", "0", "", "9" * 5000):
        done = subprocess.run(
            [sys.executable, "-m", "fastbyol", "doctor"],
            env=os.environ | {"NUMBA_NUM_THREADS": value},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(
            f"fastbyol: error: NUMBA_NUM_THREADS='{value[:30]}.*' in the environment: expected an integer of at least 1\n",
            done.stderr,
        )


@pytest.fixture
def torchrun(monkeypatch):
    """start(local) sets torchrun's variables: second machine of two, with two ranks each."""

    def start(local):
        ranks = {
            "WORLD_SIZE": 4,
            "LOCAL_WORLD_SIZE": 2,
            "RANK": 2 + local,
            "LOCAL_RANK": local,
            "TORCHELASTIC_RUN_ID": "x",
        }
        for name, value in ranks.items():
            monkeypatch.setenv(name, str(value))

    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    start.waits = waits
    return start


@pytest.mark.parametrize(
    "words", [["trian"], ["train", "--epochs", "3"], ["eval", "knn", "--runn", "x"], ["pack", "a", "b"]]
)
def test_only_local_rank_0_reports_input_errors(capsys, torchrun, words):
    torchrun(0)
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n"), torchrun.waits) == (2, "", 1, [])
    torchrun(1)  # waits, since torchrun ends all ranks when one has ended
    assert run(capsys, *words) == (1, "", "")
    assert len(torchrun.waits) == 1


def test_only_local_rank_0_logs_warnings_of_the_command_line(capsys, torchrun, monkeypatch):
    monkeypatch.setattr("fastbyol.api.train", lambda config: RunResult(Path("x"), 3, 3, False, None))
    for local, warnings in [(0, 1), (1, 0)]:
        torchrun(local)
        code, out, err = run(capsys, "train", "--data.recipe=none")
        assert (code, out.count("warning: --data.recipe is now called data.augmentation"), err) == (0, warnings, "")


def test_single_process_commands_fail_under_torchrun(capsys, torchrun, monkeypatch):
    torchrun(0)
    _, _, err = run(capsys, "pack", "a", "b")
    assert err == "fastbyol: error: pack runs in one process, but torchrun started 4: start it without torchrun\n"
    monkeypatch.setattr("fastbyol.tools.bench.bench", lambda config, **options: None)
    monkeypatch.setattr("fastbyol.tools.profiling.profile", lambda config, **options: None)
    monkeypatch.setattr("fastbyol.tools.doctor.diagnose", lambda *args: 0)
    for command in ("bench", "profile", "doctor"):
        assert run(capsys, command) == (0, "", "")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "source=a" in run(capsys, "pack", "a", "b")[2]
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it without torchrun
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert "source=a" in run(capsys, "pack", "a", "b")[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_removes_partial_files_and_is_one_line(photos, tmp_path, number):
    code = f"""
import os, signal, sys
from fastbyol.cli import main
from fastbyol.data import pack
signal.signal({number}, signal.SIG_DFL)  # a parent such as nohup may have ignored it
encode, calls = pack._encode, []

def slowly(*args):
    calls.append(0)
    if len(calls) == 20:
        os.kill(os.getpid(), {number})
    return encode(*args)

pack._encode = slowly
sys.exit(main(["pack", {str(photos / "train")!r}, {str(tmp_path / "x.beton")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == f"fastbyol: error: ended by {signal.Signals(number).name}\n"
    assert list(tmp_path.iterdir()) == []


def test_signals_keep_their_default_action_under_torchrun(capsys, torchrun, monkeypatch):
    found = []
    monkeypatch.setattr(
        "fastbyol.tools.doctor.diagnose", lambda *args: found.append(signal.getsignal(signal.SIGTERM)) or 0
    )
    run(capsys, "doctor")
    torchrun(0)
    run(capsys, "doctor")
    assert found == [cli._raise_signaled, signal.SIG_DFL]


def test_signal_handlers_are_restored(capsys):
    before = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)]
    try:
        assert run(capsys, "--version")[0] == 0
        assert [signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM)] == [signal.SIG_IGN, before[1]]
    finally:
        signal.signal(signal.SIGHUP, before[0])


def test_only_local_rank_0_prints_help(capsys, torchrun):
    torchrun(0)
    assert run(capsys, "train", "--help")[1].startswith("usage: fastbyol train")
    torchrun(1)
    assert run(capsys, "train", "--help") == (0, "", "")


def test_words_after_two_dashes_are_positional(capsys):
    assert "source=--mode:" in run(capsys, "pack", "--", "--mode", "-b")[2]


def test_failed_report_is_a_warning_after_eval_and_exit_code_1_after_training(capsys, monkeypatch, tmp_path):
    def fails(*args, **options):
        raise RunError("report.html: cannot be written: it is full")

    monkeypatch.setattr("fastbyol.evaluation.run.evaluate", lambda *args: None)
    monkeypatch.setattr("fastbyol.tools.report.refresh_report", fails)  # after the result is saved
    code, out, err = run(capsys, "eval", "knn", "--run", "x")
    assert (code, out, err) == (0, "warning: report.html: cannot be written: it is full\n", "")

    def refuses(*args):
        raise InputError("report.html is a folder")

    monkeypatch.setattr("fastbyol.api.train", lambda config: RunResult(tmp_path, 3, 3, True, None))
    monkeypatch.setattr("fastbyol.tools.report.write_report", refuses)
    assert run(capsys, "train")[0] == 1


def test_foreign_files_are_not_overwritten(capsys, photos, tmp_path, make_config):
    folder = train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder
    before = (folder / "summary.json").read_bytes()
    code, _, err = run(capsys, "eval", "knn", "--run", str(folder), "--out", str(folder / "summary.json"))
    assert (code, (folder / "summary.json").read_bytes()) == (2, before)
    assert "exists and is not a result of `fastbyol eval`; name another file" in err
    config = tmp_path / "my.yaml"
    config.write_text("seed: 1\n")
    words = ["preview", "--config", str(config), "--data.root", str(photos), "--out", str(config)]
    code, _, err = run(capsys, *words)
    assert (code, config.read_text()) == (2, "seed: 1\n")
    assert "exists and is not a PNG file, so it is not overwritten" in err


def test_missing_working_directory_and_device_files_are_one_line(capsys, tmp_path, monkeypatch):
    code, _, err = run(capsys, "plan", "--rates", "/dev/zero")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = run(capsys, "eval", "knn", "--run", "/dev/zero")
    assert (code, err) == (2, "fastbyol: error: checkpoint /dev/zero is not a file\n")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = run(capsys, "preview", "--data.root", "base")
    assert (code, err) == (2, "fastbyol: error: the working directory is gone: cd to one that exists\n")
