"""report.html and its figures: evaluations, damaged files, arbitrary names, moved data sets."""

import html
import importlib.resources
import io
import json
import math
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
from fastbyol.tools.report import data_set_name, refresh_report, write_report
from fastbyol.tools.verdict import judge, measured

SHORT = {"optim": {"epochs": 1, "warmup_epochs": 0}, "knn": {"every_epochs": 0}}


def fail(line):
    raise AssertionError(line)


def fail_to_open():
    raise InputError("no images")


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
    assert "BYOL pre-training of resnet18 on\n<strong>photos</strong>" in page
    assert f"<code>{photos}</code> &middot; Checkpoint step_00000004.pt" in page
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
    monkeypatch.setattr("fastbyol.tools.report.find_images", lambda *args, **options: fail_to_open())
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


# --- without labels ---


def flat(photos, root, count=72):
    """Copy images of all classes into one folder ROOT/train."""
    (root / "train").mkdir(parents=True)
    for k, file in enumerate(sorted((photos / "train").rglob("*.jpg"))[:count]):
        shutil.copy(file, root / "train" / f"{k:03d}.jpg")
    return root


@pytest.mark.parametrize(
    "layout", ["flat", "flat with val", "classes without val", "other classes in val", "one class"]
)
def test_neighbors_need_no_labels(make_config, photos, tmp_path, log_lines, monkeypatch, layout):
    root = tmp_path / "data"
    if layout.startswith("flat"):
        flat(photos, root)
        if layout == "flat with val":
            shutil.copytree(root / "train", root / "val")
    elif layout == "one class":
        flat(photos, root)
        (root / "train").rename(root / "cats")
        (root / "train").mkdir()
        (root / "cats").rename(root / "train" / "cats")
    else:
        shutil.copytree(photos / "train", root / "train")
        if layout == "other classes in val":
            shutil.copytree(photos / "val" / "coffee", root / "val" / "tea")
    folder = train(make_config(data={"root": str(root)}, **SHORT)).folder
    figures = []
    original = report_figures.to_png
    monkeypatch.setattr(report_figures, "to_png", lambda figure: figures.append(figure) or original(figure))
    log_lines.clear()
    page = write_report(folder).read_text()
    assert log_lines == []
    assert "Left: a training image." in page
    assert "one of up to 2000 training images" in page
    assert "a validation image" not in page
    grid = figures[-1]
    titles = [axis.get_title() for axis in grid.axes]
    assert titles[::6] == ["query"] * 8
    assert all(re.fullmatch(r"0\.\d\d|1\.00", title) for k, title in enumerate(titles) if k % 6)
    assert not any(axis.patches for axis in grid.axes)  # no frames


@pytest.fixture
def neighbors(make_config, monkeypatch):
    """Return a function that draws neighbors; it returns titles and pixels by row and column."""
    config = make_config()
    model = build_model(config.model, config.data.image_size_px, 0)
    monkeypatch.setattr(report_figures, "to_png", lambda figure: figure)

    def drawn(train, val=None, *, config=config):
        figure = report_figures.draw_neighbors(config, model, train, val)
        if figure is None:
            return None
        cells = [(axis.get_title(), axis.images[0].get_array() if axis.images else None) for axis in figure.axes]
        return [cells[start : start + 6] for start in range(0, len(cells), 6)]

    return drawn


def test_an_image_is_no_neighbor_of_itself(neighbors, folder_of, make_config):
    images = open_split(folder_of({f"{i:02d}.jpg": jpeg(i) for i in range(20)}), ".")
    rows = neighbors(images)
    own = [report_figures._center_crop(images, int(i), 32) for i in np.linspace(0, 19, 8).astype(int)]
    assert len(rows) == 8
    for row, query in zip(rows, own, strict=True):
        assert np.array_equal(row[0][1], query)
        assert len([pixels for _, pixels in row if pixels is not None]) == 6
        assert not any(np.array_equal(pixels, query) for _, pixels in row[1:])
        similarities = [float(title) for title, _ in row[1:]]
        assert similarities == sorted(similarities, reverse=True)
    few = make_config(knn={"max_bank_images": 3})
    assert [[pixels is not None for _, pixels in row] for row in neighbors(images, config=few)] == [
        [True, True, True, False, False, False]
    ] * 3


def test_copies_of_an_image_are_neighbors(neighbors, folder_of):
    images = open_split(folder_of({f"{i}.jpg": jpeg(0) for i in range(9)}), ".")
    rows = neighbors(images)
    assert [len([pixels for _, pixels in row if pixels is not None]) for row in rows] == [6] * 8
    assert {title for row in rows for title, _ in row[1:]} == {"1.00"}


def test_neighbors_leave_out_unreadable_images(neighbors, folder_of, log_lines):
    files = {f"{i}.jpg": b"no" if i in (0, 3) else jpeg(i) for i in range(6)}
    images = open_split(folder_of(files), ".")
    rows = neighbors(images)
    assert sum("the report's neighbors lack" in line for line in log_lines) == len(log_lines) == 2
    own = [report_figures._center_crop(images, i, 32) for i in (1, 2, 4, 5)]
    assert all(np.array_equal(row[0][1], query) for row, query in zip(rows, own, strict=True))
    assert [len([pixels for _, pixels in row if pixels is not None]) for row in rows] == [4] * 4


def test_one_image_has_no_neighbors(neighbors, folder_of):
    assert neighbors(open_split(folder_of({"0.jpg": jpeg(0)}), ".")) is None


def test_neighbors_of_validation_images_show_classes(neighbors, photos):
    rows = neighbors(open_split(photos, "train"), open_split(photos, "val"))
    classes = open_split(photos, "val").classes
    assert len(rows) == 8
    for row in rows:
        assert row[0][0] in classes
        assert all(title.rpartition(" ")[0] in classes for title, _ in row[1:])


# --- data set ---


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("/data/imagenet", "imagenet"),
        ("/data/imagenet/", "imagenet"),
        ("/data/imagenet/train", "imagenet"),
        ("/data/imagenet/train.beton", "imagenet"),
        ("/data/cats.beton", "cats"),
        ("/train", "/train"),
        ("/", "/"),
        (None, None),
    ],
)
def test_name_of_a_data_set(root, name):
    assert data_set_name(root) == name


def without_root(folder, name="step_00000004.pt"):
    """Remove data.root from a run, as if it had been started on images from Python."""
    path = folder / "checkpoints" / name
    state = torch.load(path, weights_only=True)
    state["config"]["data"]["root"] = None
    torch.save(state, path)
    config = json.loads((folder / "config.json").read_text())
    config["data"]["root"] = None
    (folder / "config.json").write_text(json.dumps(config))


def test_a_run_without_root_has_a_report(make_config, photos, log_lines, no_neighbors):
    folder = train(make_config(**SHORT)).folder
    without_root(folder)
    log_lines.clear()
    page = write_report(folder).read_text()
    assert "BYOL pre-training of resnet18 on\nimages from Python (the config has no data.root)" in page
    assert '<p class="note">Checkpoint step_00000004.pt' in page
    (line,) = log_lines
    assert line.startswith(
        "warning: the report lacks images (augmented views, map of the features, nearest neighbors): data.root is not set"
    )
    assert line.endswith("; --root PATH takes images from another place")
    assert f"Note: {line.removeprefix('warning: ')}" in html.unescape(page)
    assert "<h2>Training curves</h2>" in page
    log_lines.clear()
    refresh_report(folder, root=str(photos))  # after an evaluation
    assert log_lines == [f"report: {folder / 'report.html'}"]
    assert "<h2>Augmented views</h2>" in (folder / "report.html").read_text()


def test_a_run_whose_data_set_is_gone_has_a_report(make_config, photos, tmp_path, log_lines):
    root = tmp_path / "gone"
    shutil.copytree(photos, root)
    folder = train(make_config(data={"root": str(root)}, **SHORT)).folder
    shutil.rmtree(root)
    log_lines.clear()
    page = write_report(folder).read_text()
    (line,) = log_lines
    assert line.startswith(
        "warning: the report lacks images (augmented views, map of the features, nearest neighbors): "
    )
    assert str(root) in line
    assert "<strong>gone</strong>" in page
    for heading in ("Augmented views", "Map of the features", "Nearest neighbors"):
        assert f"<h2>{heading}</h2>" not in page


def test_what_fails_is_left_out_and_named(make_config, monkeypatch, log_lines):
    def fails(*args):
        raise InputError("no image can be read")

    folder = train(make_config(**SHORT)).folder
    monkeypatch.setattr("fastbyol.tools.report.draw_map", fails)
    log_lines.clear()
    page = write_report(folder, root=None).read_text()
    assert "<h2>Augmented views</h2>" in page
    (line,) = log_lines
    assert line.startswith(
        "warning: the report lacks images (map of the features, nearest neighbors): no image can be read"
    )


# --- the verdict ---


def metrics(*, std=0.2, ranks=(30.0, 40.0), epochs=4, loss=1.5, knn=None):
    """Return lines of a run with 4 steps per epoch; a std of 0.25 is uniform in 16 dimensions."""
    lines = []
    for step in range(1, 4 * epochs + 1):
        place = {"step": step, "epoch": step / 4}
        lines.append({"kind": "train", **place, "loss": loss, "projection_std": std})
    for k, rank in enumerate(ranks):
        place = {"step": 4 * (k + 1), "epoch": k + 1.0}
        lines.append({"kind": "quality", **place, "rank_me": rank, "alignment": 0.5, "uniformity": -1.0})
    if knn is not None:
        lines.append({"kind": "knn", "step": 16, "epoch": 4.0, "top1": knn, "top5": 1.0})
    return lines


def verdict(config, *, classes=None, features=64, **values):
    found = measured(metrics(**values), config, features=features)
    return judge(found, config, classes=classes)


def test_a_run_without_signs_of_collapse_is_good(make_config):
    assert verdict(make_config()) == (
        "good",
        "no sign of collapse; the std of the projections is 80% of a uniform spread, and the effective rank went from "
        "30.0 to 40.0 of at most 64.",
    )
    assert verdict(make_config(), knn=0.4, classes=10).text.endswith(
        "of at most 64, and the online kNN reaches 40.0% (chance: 10.0%)."
    )
    assert verdict(make_config(), knn=0.4).text.endswith("and the online kNN reaches 40.0%.")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"std": 0.0249}, "the std of the projections is 10.0% of a uniform spread, below log.collapse_threshold=0.1"),
        ({"std": 0.0}, "the std of the projections is 0.0% of a uniform spread"),
        ({"std": 0.0, "ranks": ()}, "the std of the projections is 0.0% of a uniform spread"),
        ({"ranks": (1.5, 1.99)}, "the effective rank is 1.99: the features of all images point in one direction"),
        ({"ranks": (1.0,)}, "the effective rank is 1.00: the features"),
        ({"ranks": (6.5, 3.19)}, "the effective rank fell from 6.5 to 3.2 of at most 64"),
        ({"ranks": (3.5, 20.0, 3.0)}, "the effective rank fell from 20.0 to 3.0 of at most 64"),
        ({"std": 0.01, "ranks": (20.0, 1.0)}, r"the std .* of a uniform .*; the effective rank is 1.00: "),
    ],
)
def test_collapsed_runs(make_config, values, reason):
    outcome, text = verdict(make_config(), **values)
    assert outcome == "collapsed"
    assert re.match(reason, text)
    assert text.endswith(".")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"epochs": 0, "ranks": ()}, "the run has no training metrics"),
        ({"epochs": 1, "std": 0.0}, "the run ended during the warm-up of 2 epochs"),
        ({"std": 0.1249}, "the std of the projections is 50% of a uniform spread, below 50%"),
        ({"std": math.nan}, "the std of the projections was not measured"),
        ({"ranks": ()}, "the effective rank was not measured"),
        ({"ranks": (30.0, math.nan)}, "the effective rank was not measured"),
        ({"ranks": (30.0,)}, "the effective rank was measured once, so its trend is unknown"),
        ({"ranks": (3.0, 3.19)}, "the effective rank is 3.2 of at most 64, below 5%"),
        ({"ranks": (40.0, 31.9)}, "the effective rank fell from 40.0 to 31.9"),
        ({"ranks": (40.0, 3.2)}, "the effective rank fell from 40.0 to 3.2"),
        ({"ranks": (20.0, 40.0, 30.0)}, "the effective rank fell from 40.0 to 30.0"),
        ({"loss": 4.0}, "the loss is 4.00: predictions that know nothing of their targets have 4"),
        ({"loss": math.nan}, "the loss was not measured"),
        ({"knn": 0.199, "classes": 10}, "the online kNN reaches 19.9%, below 20.0% (chance: 10.0%)"),
        ({"knn": 0.74, "classes": 2}, "the online kNN reaches 74.0%, below 75.0% (chance: 50.0%)"),
        (
            {"std": 0.1, "loss": 4.5},
            "the std of the projections is 40% of a uniform spread, below 50%; the loss is 4.50: ",
        ),
    ],
)
def test_unclear_runs(make_config, values, reason):
    outcome, text = verdict(make_config(optim={"warmup_epochs": 2, "epochs": 8}), **values)
    assert outcome == "unclear"
    assert text.startswith(reason)
    assert text.endswith(".")


@pytest.mark.parametrize(
    "values",
    [
        {"std": 0.125},
        {"ranks": (4.0, 3.2)},
        {"ranks": (3.3, 3.2, 3.2)},
        {"ranks": (40.0, 32.0)},
        {"loss": 3.999},
        {"knn": 0.2, "classes": 10},
        {"knn": 0.75, "classes": 2},
        {"knn": 0.01},
        {"epochs": 2},
    ],
)
def test_the_limits_of_good_runs(make_config, values):
    assert verdict(make_config(optim={"warmup_epochs": 2, "epochs": 8}), **values).outcome == "good"


def test_the_verdict_knows_the_loss_and_the_threshold_of_the_run(make_config):
    for model in ({"loss": "mse"}, {"contrastive_weight": 1.0}):
        assert verdict(make_config(model=model), loss=20.0).outcome == "good"
    strict, off = make_config(log={"collapse_threshold": 0.9}), make_config(log={"collapse_threshold": 0.0})
    assert verdict(strict).outcome == "collapsed"
    assert verdict(off, std=0.0).outcome == "unclear"


def test_the_highest_rank_is_that_of_the_features_or_of_the_images(make_config):
    config = make_config()  # 4 steps of 16 images per epoch
    assert measured(metrics(), config, features=512).rank_limit == 64
    assert measured(metrics(), config, features=32).rank_limit == 32
    assert measured(metrics(), make_config(knn={"max_bank_images": 20}), features=512).rank_limit == 20
    assert measured(metrics(), make_config(data={"batch_size": "auto"}), features=512).rank_limit == 512
    assert measured([], config, features=512).rank_limit == 512


def test_one_odd_line_does_not_decide(make_config):
    lines = metrics()
    lines[15]["projection_std"] = 0.001  # the last one of the last epoch
    assert measured(lines, make_config(), features=64).std == 0.2
    for line in lines[:12]:  # earlier epochs
        line["projection_std"] = 0.001
    assert measured(lines, make_config(), features=64).std == 0.2


def test_the_report_begins_with_the_verdict_and_explains_what_it_is_made_of(make_config, no_neighbors):
    config = make_config(optim={"epochs": 2, "warmup_epochs": 0}, knn={"every_epochs": 1})
    folder = train(config).folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "quality"][-1]
    page = html.unescape(write_report(folder).read_text())
    model = build_model(config.model, config.data.image_size_px, 0)
    expected = judge(measured(lines, config, features=model.num_features), config, classes=18)
    assert (
        f'<p class="verdict {expected.outcome}"><strong>{expected.outcome.capitalize()}:</strong> {expected.text}</p>'
        in page
    )
    assert page.index(expected.text) < page.index('<div class="cards">')
    part = page.partition("<h2>Quality without labels</h2>")[2].partition("</section>")[0]
    for name, value in (
        ("Effective rank (RankMe)", f"{last['rank_me']:.1f} of at most 64"),
        ("Alignment", f"{last['alignment']:.3f}"),
        ("Uniformity", f"{last['uniformity']:.3f}"),
    ):
        assert re.search(rf"<th>{re.escape(name)}</th><td class=\"value\">{re.escape(value)}", part), name
    assert (
        "It is 0 if all images have the same one, which is a collapse, and 0.2500 if they are spread uniformly." in part
    )
    assert "The run warns below 0.0250." in part


def test_a_run_without_metrics_has_a_verdict(make_config, no_neighbors):
    folder = train(make_config(**SHORT)).folder
    (folder / "metrics.jsonl").unlink()
    page = write_report(folder).read_text()
    assert "<strong>Unclear:</strong> the run has no training metrics.</p>" in page
    assert "<h2>Quality without labels</h2>" not in page


# --- names ---


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
