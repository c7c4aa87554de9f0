"""`fastbyol compare`: what the page says of runs of any state, and what it refuses."""

import html
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastbyol import __version__
from fastbyol.cli import main
from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.runtime.run_files import read_summary
from fastbyol.settings.base import flatten, nest
from fastbyol.tools import compare, curves, plots
from fastbyol.tools.compare import write_comparison

RESULT = {
    "protocol": "knn",
    "checkpoint": "checkpoints/step_00000008.pt",
    "step": 8,
    "root": "/data/photos",
    "splits": ["train", "val"],
    "train_images": 32,
    "val_images": 18,
    "classes": 18,
    "settings": {"k": 20, "temperature": 0.07},
}
MACHINE = {"fastbyol": "0.1.0", "cpu": "A, 2 cores", "gpu": "none", "torch": "2.11"}


def lines(top1=0.4, loss=1.5, epochs=2):
    """Return the lines of metrics.jsonl of a run with 4 steps per epoch."""
    found = []
    for epoch in range(1, epochs + 1):
        place = {"step": 4 * epoch, "epoch": float(epoch)}
        train = {"loss": loss, "lr": 0.1, "tau": 0.99, "projection_std": 0.1, "images_per_s": 200.0, "wait_share": 0.25}
        quality = {"rank_me": 20.0 + epoch, "alignment": 0.5, "uniformity": -1.0, "projection_std": 0.1}
        found.append({"kind": "train", **place, **train})
        found.append({"kind": "quality", **place, **quality})
        found.append({"kind": "knn", **place, "top1": top1 + 0.01 * epoch, "top5": 0.9})
    return found


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes the files of a run of 8 steps; None leaves a file out."""

    def make(name, settings=None, *, folder=None, metrics=None, summary=None, environment=None, results=()):
        path = tmp_path / "runs" / (folder or name)
        path.mkdir(parents=True)
        values = flatten(Config().to_dict()) | {"name": name, "model.projection_dim": 64} | (settings or {})
        (path / "config.json").write_text(json.dumps(nest(values)))
        figures = {"steps": 8, "total_steps": 8, "seconds": 61.0, "images_per_s": 210.0, "wait_share": 0.2}
        figures |= {"loss": 1.5, "knn_last": 0.42, "knn_best": 0.43, "bad_images": {}}
        written = lines() if metrics is None else metrics
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
        if summary is not False:
            (path / "summary.json").write_text(json.dumps(figures | (summary or {})))
        (path / "environment.json").write_text(json.dumps(MACHINE | (environment or {})))
        for k, result in enumerate(results):
            (path / f"eval_{k}.json").write_text(json.dumps(RESULT | result))
        return path

    return make


@pytest.fixture
def page_of(tmp_path):
    """Return a function that compares runs and returns the page without its pictures."""

    def page(*runs):
        text = write_comparison(list(runs), tmp_path / "compare.html").read_text()
        return re.sub(r"data:image/png;base64,[^\"]*", "PNG", text)

    return page


@pytest.fixture
def figures(monkeypatch):
    """Return a list of the figures that are drawn."""
    found = []
    original = curves.to_png
    monkeypatch.setattr(curves, "to_png", lambda figure: found.append(figure) or original(figure))
    return found


def section(page, title):
    """Return the part of the page below a heading."""
    return page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]


def table(part):
    """Return the rows of the first table of a part of the page, as texts."""
    body = part.partition("</table>")[0]
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    ]
    return [[html.unescape(re.sub(r"<.*?>", "", cell)).strip() for cell in row] for row in rows]


def axes(figure) -> dict[str, Axes]:
    return {axis.get_title("left"): axis for axis in figure.axes if axis.get_visible()}


# --- settings ---


def test_only_settings_that_differ_are_listed(make_run, page_of):
    a = make_run("a", {"optim.base_lr": 0.3})
    b = make_run("b", {"optim.base_lr": 0.45, "seed": 1})
    assert table(section(page_of(a, b), "Settings that differ")) == [
        ["", "a", "b"],
        ["seed", "0", "1"],
        ["optim.base_lr", "0.3", "0.45"],
    ]


def test_equal_settings(make_run, page_of):
    part = section(page_of(make_run("a"), make_run("b")), "Settings that differ")
    assert "All settings are equal." in part
    assert "<table>" not in part


def old_config(path, change):
    values = json.loads((path / "config.json").read_text())
    change(values)
    (path / "config.json").write_text(json.dumps(values))


def test_an_older_version_is_compared_by_current_names_and_by_what_its_defaults_mean(make_run, page_of, log_lines):
    a = make_run("a", {"optim.warmup_epochs": None, "optim.epochs": 8, "model.width": 2.0, "model.stem_channels": 0})
    b = make_run("b", {"optim.warmup_epochs": 4.0, "optim.epochs": 8, "model.width": 2.0})

    def older(values):
        values["data"]["recipe"] = values["data"].pop("augmentation")
        del values["model"]["stem_channels"]  # 64 at any width
        del values["knn"]  # it had none of these settings
        values["optim"]["epochs"] = 8.0

    old_config(b, older)
    rows = table(section(page_of(a, b), "Settings that differ"))
    assert rows[1:] == [["model.stem_channels", "128", "64"]]
    assert log_lines == []


def test_settings_and_values_of_another_version(make_run, page_of, log_lines):
    a = make_run("a", {"optim.warmup_epochs": 10.0})
    b = make_run("b", {"step.future": [1, 2], "later.x": "<b>", "optim.name": "muon", "seed": None, "log": 3})
    part = section(page_of(a, b), "Settings that differ")
    assert table(part)[1:] == [
        ["seed", "0", "null"],
        ["optim.name", "lars", "muon"],
        ["step.future", "\N{EN DASH}", "[1, 2]"],
        ["log", "\N{EN DASH}", "3"],
        ["later.x", "\N{EN DASH}", "<b>"],
    ]
    assert f"b has settings or values that fastbyol {__version__} does not know: " in part
    assert "seed, optim.name, step.future, log, later.x." in part
    assert "<td>&lt;b&gt;</td>" in part
    assert log_lines == []


def test_figures_that_do_not_compare_are_named(make_run, page_of):
    a = make_run("a")
    b = make_run("b", {"model.loss": "mse", "model.width": 2.0}, environment={"cpu": "B, 8 cores"})
    part = section(page_of(a, b), "Results")
    assert "The losses do not compare directly: model.loss differs." in part
    assert "The effective ranks do not compare directly: model.width differs." in part
    assert "Speeds do not compare directly: the machines differ." in part
    assert "kNN accuracies do not" not in part
    assert "do not compare" not in page_of(a, make_run("c", {"seed": 2}))


# --- results ---


def test_results_of_finished_runs(make_run, page_of):
    a = make_run("a")
    b = make_run(
        "b", summary={"images_per_s": 300.0, "knn_last": 0.5, "loss": None, "rank_me": None}, metrics=lines(epochs=1)
    )
    part = section(page_of(a, b), "Results")
    head, first, second = table(part)
    assert head[:7] == ["run", "steps", "time", "images/s", "waiting for data", "last loss", "kNN, last"]
    assert head[7:] == ["kNN, best", "RankMe", "projection std, relative"]
    assert first == ["a", "8", "61 s", "210", "20.0%", "1.500", "42.0%", "43.0%", "22.0", "80%"]
    assert second == ["b", "8", "61 s", "300", "20.0%", "1.500", "50.0%", "43.0%", "21.0", "80%"]
    assert re.findall(r'<td class="number best">(.*?)</td>', part) == ["300", "50.0%"]


def test_runs_that_go_on_show_their_metrics(make_run, page_of):
    a = make_run("a", summary=False)
    b = make_run("b", summary={"steps": 4})
    c = make_run("c", summary=False, metrics=[])
    d = make_run("d", summary={"steps": 4, "total_steps": 4})  # of an earlier attempt
    e = make_run("e", summary={"steps": 5, "total_steps": 8}, metrics=lines(epochs=1))
    part = section(page_of(a, b, c, d, e), "Results")
    rows = {row[0]: row[1:] for row in table(part)}
    assert rows["a"] == rows["b"] == rows["d"]
    assert rows["a"] == ["8", "\N{EN DASH}", "200", "25.0%", "1.500", "42.0%", "42.0%", "22.0", "80%"]
    assert rows["c"] == ["\N{EN DASH}"] * 9
    assert rows["e"][:2] == ["5", "61 s"]
    for name in "abd":
        assert f"{name}: running, or killed after step 8 (epoch 2)." in part
    assert "c: no metrics yet." in part
    assert "e: stopped at step 5 of 8." in part


def test_runs_without_any_metrics_have_no_curves(make_run, page_of):
    runs = [make_run(name, summary=False, metrics=[]) for name in "ab"]
    page = page_of(*runs)
    assert "<h2>Training curves</h2>" not in page
    assert table(section(page, "Results")) == [["run"], ["a"], ["b"]]


def test_damaged_files_are_logged_and_left_out(make_run, page_of, log_lines):
    a = make_run("a", results=[{"rows": {"BYOL": {"top1": 0.5}}}])
    b = make_run("b")
    (b / "summary.json").write_text('{"steps": "x"}')
    (b / "environment.json").write_text("[")
    (b / "eval_x.json").write_text("{")
    broken = [
        {"kind": "train", "step": 12, "epoch": 3.0, "loss": math.nan},
        {"kind": "train", **lines()[0], "loss": math.inf},
    ]
    with (b / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in broken) + '{"kind": "tra')
    page = page_of(a, b)
    files = ("summary.json", "environment.json", "eval_x.json", "metrics.jsonl")
    assert all(sum(f"/b/{name}" in line for line in log_lines) == 1 for name in files), log_lines
    assert len(log_lines) == len(files)
    assert all(line.startswith("warning: ") for line in log_lines)
    rows = {row[0]: row[1:] for row in table(section(page, "Results"))}
    assert rows["b"] == ["8", "\N{EN DASH}", "200", "25.0%", "1.500", "42.0%", "42.0%", "22.0", "80%"]
    assert "nan" not in page.lower()


@pytest.mark.parametrize(
    "change",
    [{"steps": "x"}, {"total_steps": None}, {"loss": "x"}, {"seconds": None}, {"bad_images": []}, {"rank_me": []}],
)
def test_a_summary_with_a_wrong_value_is_none(make_run, log_lines, change):
    run = make_run("a")
    assert read_summary(run)["steps"] == 8
    values = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(values | change))
    assert read_summary(run) is None
    assert log_lines == [f"warning: {run / 'summary.json'}: is not the summary of a run; it is left out"]


# --- curves ---


def test_every_run_has_one_color_in_all_figures_and_the_legend(make_run, page_of, figures):
    runs = [make_run(f"r{k}", metrics=lines(top1=0.02 * k)) for k in range(12)]
    page = page_of(*runs)
    (figure,) = figures
    styles = [(style["color"], style["linestyle"]) for style in map(plots.line_style, range(12))]
    assert len({color for color, _ in styles}) == 12
    assert list(axes(figure)) == [curve.heading for curve in compare._CURVES]
    css = [f"border-top-color:{color};border-top-style:{line}" for color, line in styles]
    for axis in axes(figure).values():
        drawn = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != ":"]
        assert [line.get_color() for line in drawn] == [color for color, _ in styles]
        assert [line.get_linestyle() for line in drawn] == 10 * ["-"] + 2 * ["--"]
        assert list(drawn[0].get_xdata()) == [1.0, 2.0]
    assert list(axes(figure)["Online kNN top-1 (%)"].lines[3].get_ydata()) == pytest.approx([7, 8])
    legend = page.partition('<div class="legend">')[2].partition("</div>")[0]
    assert re.findall(r'style="([^"]*)"></i>(\w+)</span>', legend) == [(style, f"r{k}") for k, style in enumerate(css)]


def test_std_of_projections_is_relative_to_a_uniform_spread(make_run, page_of, figures):
    a = make_run("a", {"model.projection_dim": 64})
    b = make_run("b", {"model.projection_dim": 256, "log.collapse_threshold": 0.2})
    page_of(a, b)
    (axis,) = [axis for title, axis in axes(figures[0]).items() if title.startswith("Std")]
    assert [list(line.get_ydata()) for line in axis.lines] == [
        pytest.approx([80, 80]),
        pytest.approx([160, 160]),
        [100, 100],
    ]
    page_of(make_run("e", {"log.collapse_threshold": [1]}), make_run("f", {"log.collapse_threshold": [1]}))
    c = make_run("c", {"model.projection_dim": "many"})  # of another version
    d = make_run("d")
    page = page_of(c, d)
    assert [row[-1] for row in table(section(page, "Results"))] == ["projection std, relative", "\N{EN DASH}", "80%"]
    (axis,) = [axis for title, axis in axes(figures[2]).items() if title.startswith("Std")]
    assert [list(line.get_ydata()) for line in axis.lines][-2:] == [[100, 100], [10, 10]]


# --- evaluations ---


def test_evaluations_have_a_table_per_protocol_and_settings(make_run, page_of):
    untrained = {"untrained network": {"top1": 0.3, "top5": 0.6}, "raw pixels": {"top1": 0.2, "top5": 0.5}}
    row = {"top1": 0.5, "top5": 0.9}
    linear = {"protocol": "linear", "settings": {"epochs": 80}, "rows": {"BYOL": {"top1": 0.7, "base_lr": 0.1}}}
    a = make_run("a", results=[{"rows": {"BYOL": row} | untrained}, linear])
    b = make_run(
        "b",
        results=[{"rows": {"BYOL": row | {"top1": 0.6}} | untrained}, {"settings": {"k": 5}, "rows": {"BYOL": row}}],
    )
    c = make_run("c", results=[{"root": "/moved", "rows": {"BYOL": row | {"top1": 0.6}}}])
    part = section(page_of(a, b, c), "Evaluations")
    panels = part.split('<div class="panel">')[1:]
    titles = [re.search("<h3>(.*?)</h3>", panel)[1] for panel in panels]
    assert titles == [
        "Weighted kNN on frozen features",
        "Weighted kNN on frozen features",
        "Linear probe on frozen features",
    ]
    step = "step_00000008.pt, step 8"
    assert table(panels[0]) == [
        ["features", "top1", "top5", ""],
        [f"a {step}, /data/photos", "50.0%", "90.0%", ""],
        [f"b {step}, /data/photos", "60.0%", "90.0%", ""],
        [f"c {step}, /moved", "60.0%", "90.0%", ""],
        ["untrained network", "30.0%", "60.0%", ""],
        ["raw pixels", "20.0%", "50.0%", ""],
    ]
    assert "/data/photos and /moved (train, val)" in panels[0]
    assert len(re.findall('<tr class="best">', panels[0])) == 2
    assert table(panels[1]) == [["features", "top1", "top5", ""], [f"b {step}", "50.0%", "90.0%", ""]]
    assert "18 classes; k 5" in panels[1]
    assert table(panels[2]) == [["features", "top1", ""], [f"a {step}", "70.0%", ""]]


def test_baselines_that_differ_have_a_row_per_value(make_run, page_of):
    def results(value):
        return [{"rows": {"BYOL": {"top1": 0.5}, "untrained network": {"top1": value}, "raw pixels": {"top1": 0.1}}}]

    runs = [make_run(name, results=results(value)) for name, value in (("a", 0.3), ("b", 0.4), ("c", 0.3))]
    rows = table(section(page_of(*runs), "Evaluations"))[4:]
    assert rows == [
        ["untrained network a, c", "30.0%", ""],
        ["untrained network b", "40.0%", ""],
        ["raw pixels", "10.0%", ""],
    ]


def test_unknown_protocols_are_shown(make_run, page_of):
    result = {"protocol": "<new>", "rows": {"BYOL": {"score": 0.5, "text": "x", "flag": True}, "other": {}}}
    part = section(page_of(make_run("a", results=[result]), make_run("b")), "Evaluations")
    assert "<h3>&lt;new&gt;</h3>" in part
    assert [row[1:] for row in table(part)] == [["score", ""], ["50.0%", ""], ["", ""]]


# --- environments ---


def test_environments_that_differ(make_run, page_of):
    a = make_run("a")
    b = make_run("b", environment={"torch": "2.12", "triton": "3.7"})
    c = make_run("c")
    (c / "environment.json").unlink()
    assert table(section(page_of(a, b, c), "Environment")) == [
        ["", "a", "b"],
        ["torch", "2.11", "2.12"],
        ["triton", "\N{EN DASH}", "3.7"],
    ]
    assert "The runs had the same machine and versions." in page_of(a, c)
    (a / "environment.json").unlink()
    assert "No run has recorded its machine and versions." in page_of(a, c)


# --- names and paths ---


def test_runs_of_equal_names_are_told_apart_by_their_folders(make_run, page_of):
    a, b, c = make_run("same", folder="a"), make_run("same", folder="b"), make_run("other")
    rows = table(section(page_of(a, b, c), "Results"))
    assert [row[0] for row in rows] == ["run", str(a), str(b), "other"]


def test_names_are_escaped(make_run, page_of):
    hostile = "<script>alert(1)</script>&\"'"
    a = make_run(
        hostile,
        folder="a",
        results=[{"root": "<i>", "checkpoint": "/x/<u>", "rows": {"BYOL": {"<b>": 0.1}, "<s>": {}}}],
    )
    b = make_run("a\u202eb\n", folder="<img src=x>", environment={"<em>": "<q>"})
    page = page_of(a, b)
    for tag in ("<script", "<i>a", "<u>", "<b>", "<s>", "<img src=x", "<em>", "<q>"):
        assert tag not in page, tag
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&#34;&#39;" in page
    assert "a\\u202eb\\n" in page


def test_a_run_named_twice_counts_once(make_run, page_of, tmp_path, log_lines):
    a, b = make_run("a"), make_run("b")
    (tmp_path / "link").symlink_to(a)
    page = page_of(a, b, tmp_path / "link")
    assert log_lines == [f"warning: {tmp_path / 'link'}: is named twice; the second time is ignored"]
    assert [row[0] for row in table(section(page, "Results"))] == ["run", "a", "b"]


def test_what_is_no_comparison_is_one_line(make_run, tmp_path, capsys):
    a, b = make_run("a"), make_run("b")
    (a / "checkpoints").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("keep")
    out = tmp_path / "compare.html"
    (broken := make_run("broken")).joinpath("config.json").write_text("{")
    twice = make_run("twice", {"data.recipe": "byol"})
    for words, message in (
        ([], "runs is missing (paths)"),
        ([a], "name at least two runs to compare"),
        ([a, a], "name at least two runs to compare"),
        ([a, tmp_path / "nowhere"], "/nowhere: folder not found"),
        ([a, tmp_path / "file"], "/file: is not a folder"),
        ([a, tmp_path / "empty"], "/empty: holds no run: it has no config.json"),
        ([b, a / "checkpoints"], f"is a folder of checkpoints; name the run's folder, {a}"),
        ([a, broken], "/config.json: is damaged: not valid JSON"),
        ([a, twice], "/config.json: data.augmentation is set twice, as data.recipe too: keep one"),
        ([a, b, "--out", tmp_path / "file"], "exists and is not an HTML page, so it is not overwritten"),
        ([a, b, "--out", tmp_path / "empty"], "is a folder; name a file"),
        ([a, ""], "runs='': must not be empty"),
    ):
        capsys.readouterr()
        default_out = [] if "--out" in words else ["--out", out]
        assert main(["compare", *map(str, words), *map(str, default_out)]) == 2
        found = capsys.readouterr()
        assert found.out == (f"warning: {a}: is named twice; the second time is ignored\n" if words == [a, a] else "")
        assert found.err.startswith("fastbyol: error: ")
        assert found.err.count("\n") == 1
        assert message in found.err
    assert not out.exists()
    assert (tmp_path / "file").read_text() == "keep"


def test_runs_and_options_of_the_command_line_mix(make_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b, c = make_run("a"), make_run("b", folder="b,c"), make_run("c", folder="-c")
    assert main(["compare", str(a), "--out", "x.html", str(b), "--", os.path.relpath(c)]) == 0
    assert capsys.readouterr().out == "x.html\n"
    page = Path("x.html").read_text()
    assert "<h1>Comparison of 3 runs</h1>" in page
    assert main(["compare", str(a), str(b)]) == 0
    assert "<h1>Comparison of 2 runs</h1>" in Path("compare.html").read_text()
    assert main(["compare", str(a), str(c)]) == 0  # an earlier page is replaced
    assert main(["compare", "--help"]) == 0
    assert "fastbyol compare RUNS ... [--option value ...]" in " ".join(capsys.readouterr().out.split())


def test_a_page_that_cannot_be_written_leaves_the_earlier_one(make_run, page_of, monkeypatch, tmp_path):
    runs = [make_run("a"), make_run("b")]
    before = page_of(*runs)
    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: (_ for _ in ()).throw(InputError("no")))
    with pytest.raises(InputError):
        page_of(*runs)
    after = (tmp_path / "compare.html").read_text()
    assert re.sub(r"data:image/png;base64,[^\"]*", "PNG", after) == before


def test_a_comparison_loads_neither_torch_nor_checkpoints(make_run, tmp_path):
    runs = [make_run("a"), make_run("b")]
    for run in runs:
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "step_00000008.pt").write_text("damaged")
    words = ["compare", *map(str, runs), "--out", str(tmp_path / "c.html")]
    code = f"import sys\nfrom fastbyol.cli import main\nassert main({words!r}) == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
