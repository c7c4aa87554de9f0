import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastbyol
from fastbyol import environment
from fastbyol.cli import main
from fastbyol.errors import HungLoader, InputError, RunError
from fastbyol.train import train

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def run(capsys, *arguments):
    """Exit code, stdout, stderr."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:  # argparse's --help and --version
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fastbyol {fastbyol.__version__}\n", "")


def test_help_shows_type_unit_and_default_of_every_field(capsys):
    code, out, _ = run(capsys, "train", "--help")
    text = " ".join(out.split())
    assert code == 0
    assert "--data.image_size_px IMAGE_SIZE_PX Side of both views in pixels. (type: int, default: 224)" in text
    assert "--optim.base_lr BASE_LR Learning rate per 256 images" in text
    assert "--optim.name {lars,sgd,adamw,adam}" in text
    undocumented = re.findall(r"(--(?:data|model|optim|log|checkpoint|knn|probe|step)\.\w+) \S+ \(type", text)
    assert undocumented == []


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
        (["train", "--device", "cuda", "--data.root", "x"], "device=cuda but torch sees no GPU|there is no folder"),
        (["eval", "knn", "--run", "/nowhere"], "checkpoint /nowhere cannot be read"),
        (["eval", "knn", "--run", "x", "--k", "0"], "k=0: must be at least 1"),
        (["eval", "knn"], "run"),
        (["eval", "fewshot", "--run", "x", "--shots", "1,x"], "shots.*x"),
        (["eval", "fewshot", "--run", "x", "--shots", "0"], r"shots=\(0,\): must all be at least 1"),
        (["eval", "finetune", "--run", "x", "--fraction", "0"], r"fraction=0.0: must lie in \(0, 1\]"),
        (["eval", "linear", "--run", "x", "--base_lrs=0.1,-1"], r"base_lrs=\(0.1, -1.0\): must be above 0"),
        (["train", "--model.norm", "instance"], "model.norm.*instance"),
        (
            ["train", "--data.root", "x", "--model.feature_noise", "1"],
            "model.feature_noise=1.0: .*set data.recipe=none",
        ),
        (["prepare", "photos"], "out"),
        (["prepare", "photos", "--out", "/tmp"], "--out /tmp exists"),
        (["preview", "--data.root", "/nowhere"], "there is no folder /nowhere/train"),
        (["report", "--run", "/nowhere"], "there is no such folder"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "subcommand"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(capsys, arguments, message):
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
        ("model: [1, 2\n", "config"),
        ("model:\n  width: -1\n", "model.width=-1"),
    ],
)
def test_a_mistake_in_a_yaml_file_too(capsys, tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    code, _, err = run(capsys, "train", "--config", str(path))
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(message, err)


def test_the_command_line_overrides_the_file(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data:\n  root: /from-file\n  batch_size: 12\n")
    _, _, err = run(capsys, "train", "--config", str(path))
    assert "/from-file/train" in err
    _, _, err = run(capsys, "train", "--config", str(path), "--data.root", "/from-line")
    assert "/from-line/train" in err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_accepted(capsys, path):
    code, _, err = run(capsys, "train", "--config", str(path), "--data.root", "/nowhere")
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
def test_prepare_train_evaluate_and_report_from_the_command_line(capsys, tmp_path):
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
        assert re.search(r"BYOL +top-1 .*\nuntrained network +top-1 .*\nraw pixels +top-1", out)
    page = (runs / "r" / "report.html").read_text()
    for part in (
        "kNN",
        "Linear probe",
        "untrained network",
        "Nearest neighbours",
        "The two views",
        "Settings",
        "torch",
    ):
        assert part in page
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 3
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            ink = np.mean(np.asarray(image.convert("L")) < 250)
            assert ink > 0.02, "a blank picture"
    assert "http://" not in page
    assert 'src="/' not in page


def test_a_report_without_its_data_set_says_what_it_lacks(capsys, photos, make_config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    folder = train(make_config(data={"root": str(copy)}, optim={"epochs": 1, "warmup_epochs": 0})).folder
    shutil.rmtree(copy)
    code, out, _ = run(capsys, "report", "--run", str(folder))
    assert code == 0
    assert "the report lacks pictures" in out
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == 1


@pytest.mark.slow
@pytest.mark.dali
@pytest.mark.ffcv
def test_doctor_says_what_works(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert re.search(r"ok +images", out)
    assert re.search(r"ok +CPU kernels", out)
    assert re.search(r"(ok|--) +GPU", out)
    assert re.search(r"ok +DALI +\S+, decodes on the CPU, a gray JPEG within [0-3]/255", out)
    assert re.search(r"ok +FFCV +\S+, its loader can be used", out)
    assert re.search(r"(ok|--) +driver", out)
    assert re.search(r"ok +Triton", out)
    assert re.search(r"-- +apex.*PyPI's apex is another project.*pip install", out)
    assert "FAIL" not in out


def test_doctor_names_the_command_for_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(environment, "has_module", lambda name: False)
    monkeypatch.setattr(environment, "installed", lambda name: "0.1" if name == "nvidia-dali" else None)
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert re.search(r"-- +DALI +0.1 is the stub of that name, not DALI: pip install nvidia-dali-cuda\d+", out)
    assert re.search(r"-- +FFCV +not installed .*: apt-get install libopencv-dev", out)
    assert re.search(r"-- +Triton +not installed: pip install torch", out)


@pytest.mark.slow
def test_pack_writes_one_file_and_says_what_cannot_be(photos, tmp_path, capsys):
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
def test_lists_are_written_with_commas(capsys, words, monkeypatch):
    found = {}
    monkeypatch.setattr("fastbyol.evaluate.evaluate", lambda name, options, say: found.update({name: options}))
    assert run(capsys, "eval", "fewshot", "--run", "x", *words)[0] == 0
    assert found["fewshot"].shots == (1, 2)


@pytest.mark.parametrize("kind", [InputError, RunError, lambda text: HungLoader(text, "stacks")])
def test_an_error_is_one_line_whatever_the_names_in_it(kind):
    assert str(kind("data/a\nb\r\x1b[2J\udcff/\u00fc: unreadable")) == "data/a\\nb\\r\\x1b[2J\\udcff/\u00fc: unreadable"
