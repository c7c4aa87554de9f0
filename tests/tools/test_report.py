"""What evaluations leave beside each other, damaged files, and names of any kind, in report.html and in figures."""

import io
import json
import os
import shutil
import warnings

import numpy as np
import pytest
from helpers.common import jpeg
from matplotlib.figure import Figure
from PIL import Image

from fastbyol.cli import main
from fastbyol.data import find_images
from fastbyol.errors import InputError
from fastbyol.evaluate.options import KnnEval
from fastbyol.evaluate.run import evaluate
from fastbyol.runtime.results import read_results
from fastbyol.tools import plots
from fastbyol.tools.pages import text
from fastbyol.tools.preview import draw_views
from fastbyol.tools.report import refresh_report, write_report
from fastbyol.train import train

SHORT = {"optim": {"epochs": 1, "warmup_epochs": 0}, "knn": {"every_epochs": 0}}


def fail(line):
    raise AssertionError(line)


def test_evaluations_stand_beside_each_other(make_config, photos, tmp_path, log_lines):
    folder = train(make_config(**SHORT)).folder
    elsewhere = tmp_path / "elsewhere"
    for split in ("train", "val"):
        for name in ("astronaut", "coffee"):
            (elsewhere / split).mkdir(parents=True, exist_ok=True)
            (elsewhere / split / name).symlink_to(photos / split / name)
    options = [{}, {"k": 5}, {"root": str(elsewhere)}, {}]  # the last is the first again
    for changes in options:
        evaluate("knn", KnnEval(run=str(folder), baselines=False, **changes))
    results = read_results(folder)
    assert not [line for line in log_lines if line.startswith("warning: ")]
    found = sorted((result["root"], result["settings"]["k"]) for _, result in results)
    assert found == sorted([(str(photos), 20), (str(photos), 5), (str(elsewhere), 20)])
    page = write_report(folder, print).read_text()
    for root in (photos, elsewhere):
        assert f"{root} (train, val), checkpoint step_00000004.pt" in page
    assert page.count("<h3>Weighted kNN on frozen features</h3>") == 3


DAMAGED = {
    "eval_knn.json": b"",
    "eval_cut.json": b'{"protocol": "knn", "rows"',
    "eval_list.json": b"[1]",
    "eval_other.json": b'{"rows": 3}',
    "summary.json": b'{"steps": "x"}',
    "environment.json": b"\xff",
    "metrics.jsonl": b'\n{"kind": "train", "step": 1\nnull\n{"kind": "train", "step": 1, "epoch": 1}\n{"kind": "x", "step": 1, "epoch": 1}\n',
    "eval_splits.json": b'{"protocol": "knn", "checkpoint": "c", "root": "r", "train_images": 1, "val_images": 1, "classes": 2, '
    b'"settings": {}, "rows": {}, "splits": 5}',
}


def test_a_damaged_result_is_written_anew_unless_it_was_named(make_config, log_lines):
    folder = train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder
    options = {"run": str(folder), "baselines": False}
    evaluate("knn", KnnEval(**options))
    (path,) = folder.glob("eval_knn_*.json")
    whole = path.read_text()
    for damaged in (whole[:50], "[]", "null", '{"protocol": "knn"}', ""):
        path.write_text(damaged)
        log_lines.clear()
        evaluate("knn", KnnEval(**options))
        assert json.loads(path.read_text())["rows"] == json.loads(whole)["rows"]
        assert any("damaged; it will be replaced" in line for line in log_lines) == bool(damaged)
        path.write_text(damaged or "[]")
        with pytest.raises(InputError, match=r"is not a result of `fastbyol eval`; name another file"):
            evaluate("knn", KnnEval(**options, out=str(path)))


def test_evaluations_of_best_checkpoints_of_other_steps_stand_beside_each_other(make_config, monkeypatch):
    folder = train(make_config(optim={"epochs": 2, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder
    best = folder / "checkpoints" / "best.pt"
    for step in (4, 8):
        best.unlink(missing_ok=True)
        best.hardlink_to(folder / "checkpoints" / f"step_{step:08d}.pt")
        evaluate("knn", KnnEval(run=str(best), baselines=False))
    assert len(list(folder.glob("eval_knn_*.json"))) == 2
    monkeypatch.setattr("fastbyol.tools.report._pictures", lambda *args: "")
    page = write_report(folder, fail).read_text()
    assert "checkpoint best.pt, step 4<" in page
    assert "checkpoint best.pt, step 8<" in page


def test_damaged_files_are_named_and_block_no_report(make_config, log_lines):
    folder = train(make_config(**SHORT)).folder
    for name, content in DAMAGED.items():
        (folder / name).write_bytes(content)
    log_lines.clear()
    lines = []
    page = write_report(folder, lines.append).read_text()
    lines += log_lines
    assert all(sum(name in line for line in lines) == 1 for name in DAMAGED), lines
    assert len(lines) == len(DAMAGED)
    assert "Settings" in page
    assert "What the features are worth" not in page
    assert (
        train(make_config(resume="auto", **SHORT)).finished_before is False
    )  # its summary was damaged: it is closed again
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4


NAMES = ["a$b_$", "$x^{", "<b>&amp;", "[red]x", ":smile:", "中文", "tab\there", "new\nline", "x" * 200]


def test_what_no_report_can_be_written_of_is_said_before_the_work(make_config, monkeypatch):
    folder = train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder
    with pytest.raises(InputError, match=rf"checkpoints: holds checkpoints; name the run's folder, {folder}$"):
        write_report(folder / "checkpoints", fail)
    (folder / "report.html").mkdir()
    monkeypatch.setattr("fastbyol.tools.report.load_checkpoint_model", lambda run: pytest.fail("it went to work"))
    with pytest.raises(InputError, match=r"report.html: is a folder; name a file"):
        write_report(folder, fail)


def test_every_name_is_drawn(folder_of, make_config):
    names = [os.fsencode(name) for name in NAMES] + [b"caf\xe9"]
    root = folder_of({"train/a/0.jpg": jpeg()})
    for k, name in enumerate(names):
        (root / "train" / os.fsdecode(name)).mkdir()
        (root / "train" / os.fsdecode(name) / os.fsdecode(name + b".jpg")).write_bytes(jpeg(k))
    config = make_config(data={"root": str(root)})
    with warnings.catch_warnings(action="error"):
        png = draw_views(config, find_images(config.data, "train"))
    with Image.open(io.BytesIO(png)) as image:
        assert image.width > 800


def test_a_dollar_is_drawn_as_one_and_a_missing_glyph_by_its_number(monkeypatch):
    def drawn(string):
        figure = Figure(figsize=(4, 0.5))
        figure.text(0, 0.3, string)
        with warnings.catch_warnings(action="error"):
            return np.asarray(Image.open(io.BytesIO(plots.to_png(figure))))

    assert not np.array_equal(drawn("a$b$"), drawn("ab"))
    assert np.array_equal(drawn("x \ufffe"), drawn("x \\ufffe"))  # no font has it
    assert plots.title("a" * 44) == "a" * 44
    assert plots.title("a" * 30 + "\n" + "b" * 30) == "a" * 22 + "..." + "b" * 19


@pytest.mark.parametrize(
    ("name", "shown"),
    [("<b>&", "&lt;b&gt;&amp;"), ("caf\udce9", "caf\\udce9"), ("a\nb", "a\\nb"), ("中", "中"), (3, "3")],
)
def test_a_name_as_html(name, shown):
    assert text(name) == shown


def test_pictures_come_from_where_the_data_has_been_moved(make_config, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbyol.tools.report._neighbors", lambda *args: "")
    monkeypatch.setattr("fastbyol.tools.report.draw_views", lambda config, folder: folder.read(0))
    root = tmp_path / "here"
    shutil.copytree(photos, root)
    short = {"optim": {"epochs": 1, "warmup_epochs": 0}, "knn": {"every_epochs": 0}}
    folder = train(make_config(data={"root": str(root)}, **short)).folder
    assert "The two views" in write_report(folder, fail).read_text()
    root.rename(tmp_path / "there")
    lines = []
    refresh_report(folder, lines.append, root=str(tmp_path / "there"))
    assert lines == [f"report: {folder / 'report.html'}"]
    assert "The two views" in (folder / "report.html").read_text()
    assert main(["report", "--run", str(folder), "--root", str(tmp_path / "there")]) == 0
    assert "The two views" in (folder / "report.html").read_text()
    (tmp_path / "there").rename(root)  # another data set's evaluation changes no pictures
    refresh_report(folder, fail_but_report, root="/nowhere")


def fail_but_report(line):
    assert line.startswith("report: ")


def test_a_root_that_is_not_there_costs_no_pictures(make_config, photos):
    short = {"optim": {"epochs": 1, "warmup_epochs": 0}, "knn": {"every_epochs": 0}}
    folder = train(make_config(**short)).folder
    with pytest.raises(InputError, match="--root /nowhere: there is no such data set"):
        write_report(folder, fail, root="/nowhere")
    assert not (folder / "report.html").exists()
