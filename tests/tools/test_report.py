"""report.html and its figures: evaluations, damaged files, arbitrary names, moved data sets."""

import importlib.resources
import io
import json
import os
import re
import shutil
import sys
import tomllib
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.common import ROOT, jpeg
from jinja2 import UndefinedError
from matplotlib.figure import Figure
from PIL import Image

from fastbyol.api import train
from fastbyol.build import build_model
from fastbyol.cli import main
from fastbyol.data import find_images, open_split
from fastbyol.errors import InputError
from fastbyol.evaluation.options import KnnEval
from fastbyol.evaluation.run import evaluate
from fastbyol.runtime.results import read_results
from fastbyol.tools import plots, report_figures
from fastbyol.tools.pages import TEMPLATES
from fastbyol.tools.preview import draw_views
from fastbyol.tools.report import refresh_report, write_report

SHORT = {"optim": {"epochs": 1, "warmup_epochs": 0}, "knn": {"every_epochs": 0}}


def fail(line):
    raise AssertionError(line)


@pytest.fixture
def no_neighbors(monkeypatch):
    for name in ("draw_map", "draw_neighbors"):
        monkeypatch.setattr(f"fastbyol.tools.report.{name}", lambda *args: None)


# --- pages ---


def test_templates_are_found_through_the_package():
    templates = importlib.resources.files("fastbyol.tools") / "templates"
    names = {file.name for file in templates.iterdir()}
    assert names >= {"base.html.j2", "macros.html.j2", "report.html.j2", "profile.html.j2"}
    assert set(TEMPLATES.list_templates()) == names
    for name in names:
        TEMPLATES.get_template(name)  # compiles


def test_templates_are_part_of_the_installation():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fastbyol").rglob("__init__.py")}
    folders |= {"fastbyol" / path.parent.relative_to(ROOT) for path in (ROOT / "kernels").rglob("__init__.py")}
    assert set(setuptools["packages"]) == {".".join(folder.parts) for folder in folders}
    assert setuptools["package-data"]["fastbyol.tools"] == ["templates/*.html.j2"]
    assert list((ROOT / "fastbyol" / "tools").glob("templates/*.html.j2"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [("<b>&", "&lt;b&gt;&amp;"), ("caf\udce9", "caf\\udce9"), ("a\nb", "a\\nb"), ("中", "中"), (3, "3")],
)
def test_every_value_of_a_template_is_escaped(name, shown):
    macro = "{% macro bold(x) %}<b>{{ x }}</b>{% endmacro %}"
    assert TEMPLATES.from_string("{{ name }}").render(name=name) == shown
    assert TEMPLATES.from_string(macro + "{{ bold(name) }}").render(name=name) == f"<b>{shown}</b>"


def test_a_missing_value_of_a_template_raises():
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        TEMPLATES.from_string("{{ name }}").render()


def test_pages_load_nothing_from_elsewhere(make_config, no_neighbors):
    page = write_report(train(make_config(**SHORT)).folder).read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]*)""", page)
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "<script" not in page
    assert "@import" not in page


# --- the report ---


def test_the_report_shows_data_set_settings_and_environment(make_config, photos, no_neighbors):
    config = make_config(**SHORT)
    page = write_report(train(config).folder).read_text()
    assert "<h1>run</h1>" in page
    assert f"BYOL pre-training of resnet18 on <code>{photos}</code>" in page
    assert "checkpoint step_00000004.pt" in page.lower()
    for label, value in (("Steps", "4"), ("Skipped images", "0")):
        assert f'<div class="label">{label}</div>\n<div class="value">{value}</div>' in page
    for label in ("Time", "Speed", "Waiting for data", "Last loss"):
        assert f'<div class="label">{label}</div>' in page
    assert "<th>base_lr</th><td>2.0</td>" in page
    assert "<th>trackers</th><td>[]</td>" in page
    assert "<th>torch</th><td>" in page
    for section, values in config.to_dict().items():
        for name in values if isinstance(values, dict) else [section]:
            assert f"<th>{name}</th>" in page


def test_skipped_images_are_listed(make_config, no_neighbors):
    folder = train(make_config(**SHORT)).folder
    summary = json.loads((folder / "summary.json").read_text())
    summary["bad_images"] = {f"train/<{k}>.jpg": "truncated\n" for k in range(60)}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = write_report(folder).read_text()
    assert page.count("<li>") == 50  # the first ones
    assert "<li>train/&lt;0&gt;.jpg: truncated\\n</li>" in page
    assert '<div class="value">60</div>' in page


def test_every_evaluation_has_a_table(make_config, photos, tmp_path, log_lines):
    folder = train(make_config(data={"root": str(photos)}, **SHORT)).folder
    elsewhere = tmp_path / "elsewhere"
    for split in ("train", "val"):
        for name in ("astronaut", "coffee"):
            (elsewhere / split).mkdir(parents=True, exist_ok=True)
            (elsewhere / split / name).symlink_to(photos / split / name)
    options = [{}, {"k": 5}, {"root": str(elsewhere)}, {}]  # the last one replaces the first
    for changes in options:
        evaluate("knn", KnnEval(run=str(folder), baselines=False, **changes))
    results = read_results(folder)
    assert not [line for line in log_lines if line.startswith("warning: ")]
    found = sorted((result["root"], result["settings"]["k"]) for _, result in results)
    assert found == sorted([(str(photos), 20), (str(photos), 5), (str(elsewhere), 20)])
    page = write_report(folder).read_text()
    for root in (photos, elsewhere):
        assert f"{root} (train, val), checkpoint step_00000004.pt" in page
    assert page.count("<h3>Weighted kNN on frozen features</h3>") == 3
    for _, result in results:
        assert f'<td class="number">{result["rows"]["BYOL"]["top1"]:.1%}</td>' in page


def test_evaluations_of_best_checkpoints_of_different_steps_are_kept(make_config, monkeypatch):
    folder = train(make_config(optim={"epochs": 2, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder
    best = folder / "checkpoints" / "best.pt"
    for step in (4, 8):
        best.unlink(missing_ok=True)
        best.hardlink_to(folder / "checkpoints" / f"step_{step:08d}.pt")
        evaluate("knn", KnnEval(run=str(best), baselines=False))
    assert len(list(folder.glob("eval_knn_*.json"))) == 2
    monkeypatch.setattr("fastbyol.tools.report._images", lambda *args: {"views": None, "map": None, "neighbors": None})
    page = write_report(folder).read_text()
    assert "checkpoint best.pt, step 4<" in page
    assert "checkpoint best.pt, step 8<" in page


DAMAGED = {
    "eval_knn.json": b"",
    "eval_cut.json": b'{"protocol": "knn", "rows"',
    "eval_list.json": b"[1]",
    "eval_other.json": b'{"rows": 3}',
    "summary.json": b'{"steps": "x"}',
    "environment.json": b"\xff",
    "metrics.jsonl": b'\n{"kind": "train", "step": 1\nnull\n{"kind": "train", "step": 1, "epoch": 1}\n'
    b'{"kind": "x", "step": 1, "epoch": 1}\n',
    "eval_splits.json": b'{"protocol": "knn", "checkpoint": "c", "root": "r", "train_images": 1, "val_images": 1, '
    b'"classes": 2, "settings": {}, "rows": {}, "splits": 5}',
}


def test_damaged_files_are_logged_and_left_out(make_config, log_lines):
    folder = train(make_config(**SHORT)).folder
    for name, content in DAMAGED.items():
        (folder / name).write_bytes(content)
    log_lines.clear()
    page = write_report(folder).read_text()
    assert all(sum(name in line for line in log_lines) == 1 for name in DAMAGED), log_lines
    assert len(log_lines) == len(DAMAGED)
    assert all(line.startswith("warning: ") for line in log_lines)
    assert "<h2>Settings</h2>" in page
    for heading in ("Evaluations", "Environment", "Training curves"):
        assert f"<h2>{heading}</h2>" not in page
    assert "Skipped images" not in page
    # The damaged summary makes the run unfinished: it is completed again.
    assert train(make_config(resume="auto", **SHORT)).already_finished is False
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4


def test_a_damaged_result_is_replaced_unless_the_user_named_it(make_config, log_lines):
    folder = train(make_config(**SHORT)).folder
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


def test_bad_paths_raise_before_any_work(make_config, monkeypatch, tmp_path):
    folder = train(make_config(**SHORT)).folder
    with pytest.raises(InputError, match=rf"is a folder of checkpoints; name the run's folder, {folder}$"):
        write_report(folder / "checkpoints")
    with pytest.raises(InputError, match="--run .*nowhere: folder not found"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="--root /nowhere: data set not found"):
        write_report(folder, root="/nowhere")
    assert not (folder / "report.html").exists()
    (folder / "report.html").mkdir()
    monkeypatch.setattr("fastbyol.tools.report.load_checkpoint_model", lambda *args: fail("loaded the checkpoint"))
    with pytest.raises(InputError, match=r"report.html: is a folder; name a file"):
        write_report(folder)


def test_a_moved_data_set_is_found_by_its_new_root(make_config, photos, tmp_path, monkeypatch, no_neighbors, log_lines):
    monkeypatch.setattr("fastbyol.tools.report.draw_views", lambda config, images: images.read(0))
    heading = "<h2>Augmented views</h2>"
    root, moved = tmp_path / "here", tmp_path / "there"
    shutil.copytree(photos, root)
    folder = train(make_config(data={"root": str(root)}, **SHORT)).folder
    report = folder / "report.html"
    log_lines.clear()
    assert heading in write_report(folder).read_text()
    assert log_lines == []
    root.rename(moved)
    refresh_report(folder, root=str(moved))
    assert log_lines == [f"report: {report}"]
    assert heading in report.read_text()
    assert main(["report", "--run", str(folder), "--root", str(moved)]) == 0
    assert heading in report.read_text()
    moved.rename(root)
    log_lines.clear()
    refresh_report(folder, root="/nowhere")  # ignored: the run's own data set exists
    assert log_lines == [f"report: {report}"]


# --- figures ---


@pytest.fixture
def draw(make_config, monkeypatch):
    """Return a function that draws the map of an image set; it returns the figure's axes."""
    config = make_config()
    model = build_model(config.model, config.data.image_size_px, 0)
    monkeypatch.setattr(report_figures, "to_png", lambda figure: figure)

    def drawn(root, split="."):
        figure = report_figures.draw_map(config, model, open_split(root, split))
        return figure and [axis for axis in figure.axes if axis.collections]

    drawn.features = lambda root: report_figures._extract(config, model, open_split(root, ".")).unit.float()
    return drawn


@pytest.fixture
def no_umap(monkeypatch):
    monkeypatch.setattr(report_figures.environment, "installed", lambda name: None)


def points(axis):
    """Return the points of each label of the legend."""
    return {collection.get_label(): np.asarray(collection.get_offsets()) for collection in axis.collections}


@pytest.fixture
def six_classes(folder_of):
    return folder_of({f"{k}/{i}.jpg": jpeg(9 * k + i) for k in range(6) for i in range(9)})


def test_the_map_shows_principal_components_by_class(draw, six_classes, no_umap):
    (axis,) = draw(six_classes)
    images = open_split(six_classes, ".")
    x = draw.features(six_classes)
    u, s, _ = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    expected, share = (u[:, :2] * s[:2]).numpy(), float(s[:2].square().sum() / s.square().sum())
    assert axis.get_title("left") == f"PCA: {share:.0%} of the variance"
    assert list(points(axis)) == images.classes
    for label, name in enumerate(images.classes):
        assert np.allclose(np.abs(points(axis)[name]), np.abs(expected[images.labels == label]), atol=1e-4)


def test_the_map_colors_the_largest_classes(draw, folder_of, no_umap):
    files = {f"{k:02d}/{i}.jpg": jpeg(20 * k + i) for k in range(12) for i in range(1 if k in (3, 7) else 2)}
    (axis,) = draw(folder_of(files | {"05/9.jpg": b"no"}))
    counts = {label: len(xy) for label, xy in points(axis).items()}
    assert counts == {"other classes": 2} | {f"{k:02d}": 2 for k in range(12) if k not in (3, 7)}


def test_the_map_of_images_without_classes(draw, folder_of, no_umap):
    (axis,) = draw(folder_of({f"{i}.jpg": jpeg(i) for i in range(4)}))
    assert {label: len(xy) for label, xy in points(axis).items()} == {"other classes": 4}
    assert not axis.figure.legends


def test_two_images_have_no_map(draw, folder_of, no_umap):
    assert draw(folder_of({f"{i}.jpg": jpeg(i) for i in range(2)})) is None


def test_the_map_shows_umap_where_it_is_installed(draw, six_classes, photos, monkeypatch):
    asked = []

    class UMAP:
        def __init__(self, **options):
            asked.append(options)

        def fit_transform(self, x):
            assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-3)
            return np.stack([np.arange(len(x)), np.zeros(len(x))], 1)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    monkeypatch.setattr(report_figures.environment, "installed", lambda name: "0.5" if name == "umap-learn" else None)
    _, axis = draw(six_classes)
    assert axis.get_title("left") == "UMAP"
    assert asked == [{"metric": "cosine", "random_state": 0}]
    labels = open_split(six_classes, ".").labels
    for label, xy in enumerate(points(axis).values()):
        assert xy[:, 0].tolist() == np.flatnonzero(labels == label).tolist()
    assert len(draw(photos, "val")) == 1  # too few images


def test_a_umap_that_fails_leaves_the_principal_components(draw, six_classes, monkeypatch, log_lines):
    def fail(**options):
        raise TypeError("numba")

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=fail))
    monkeypatch.setattr(report_figures.environment, "installed", lambda name: "0.5")
    (axis,) = draw(six_classes)
    assert axis.get_title("left").startswith("PCA")
    assert log_lines == ["warning: the report lacks UMAP: TypeError: numba"]


def test_the_map_of_a_collapsed_network(draw, six_classes, monkeypatch, no_umap):
    extract = report_figures._extract

    def collapsed(*args):
        features = extract(*args)
        features.unit[:] = features.unit[:1].clone()
        return features

    monkeypatch.setattr(report_figures, "_extract", collapsed)
    with warnings.catch_warnings(action="error"):
        (axis,) = draw(six_classes)
    assert axis.get_title("left") == "PCA: 0% of the variance"


def test_a_class_whose_name_begins_with_an_underscore_is_in_the_legend(draw, folder_of, no_umap):
    (axis,) = draw(folder_of({f"{name}/{i}.jpg": jpeg(i) for name in ("_b_", "c") for i in range(3)}))
    assert [text.get_text() for text in axis.figure.legends[0].get_texts()] == [" _b_", "c"]


def test_a_run_without_validation_images_has_a_map(make_config, photos, tmp_path, log_lines):
    shutil.copytree(photos / "train", tmp_path / "data" / "train")
    folder = train(make_config(data={"root": str(tmp_path / "data")}, **SHORT)).folder
    log_lines.clear()
    page = write_report(folder).read_text()
    assert "<h2>Map of the features</h2>" in page
    assert "<h2>Nearest neighbors</h2>" not in page
    (line,) = log_lines
    assert line.startswith("warning: the report lacks nearest neighbors: ")


NAMES = ["a$b_$", "$x^{", "<b>&amp;", "[red]x", ":smile:", "中文", "tab\there", "new\nline", "x" * 200]


def test_any_file_name_can_be_drawn(folder_of, make_config):
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


def test_dollars_are_literal_and_missing_glyphs_are_escaped():
    def drawn(string):
        figure = Figure(figsize=(4, 0.5))
        figure.text(0, 0.3, string)
        with warnings.catch_warnings(action="error"):
            return np.asarray(Image.open(io.BytesIO(plots.to_png(figure))))

    assert not np.array_equal(drawn("a$b$"), drawn("ab"))
    assert np.array_equal(drawn("x \ufffe"), drawn("x \\ufffe"))  # no font has this character


def test_long_image_titles_are_elided():
    assert plots.image_title("a" * 44) == "a" * 44
    assert plots.image_title("a" * 30 + "\n" + "b" * 30) == "a" * 22 + "..." + "b" * 19
