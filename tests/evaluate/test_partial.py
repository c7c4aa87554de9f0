"""Evaluations that are killed go on where they were."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.common import jpeg
from shapes import prepare_shapes
from torch import nn

from fastbyol.api import train
from fastbyol.config import Config
from fastbyol.data import open_split
from fastbyol.data.folder import ImageFolder
from fastbyol.errors import InputError, RunError
from fastbyol.evaluation import features as extraction
from fastbyol.evaluation import finetune as finetuning
from fastbyol.evaluation import run as evaluation
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.finetune import finetune
from fastbyol.evaluation.options import EVALUATIONS, KnnEval
from fastbyol.evaluation.partial import PartialResult
from fastbyol.evaluation.run import BYOL_ROW, TASKS, UNTRAINED_ROW, evaluate
from fastbyol.runtime.distributed import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(make_config):
    return train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder


class Killed(BaseException):
    pass


def killed_after(monkeypatch, epochs):
    """Kill the evaluation when it has saved this number of epochs."""
    original, count = PartialResult.save, iter(range(1, 1000))

    def save(self, name, state):
        original(self, name, state)
        if "epoch" in state and next(count) == epochs:
            raise Killed

    monkeypatch.setattr(PartialResult, "save", save)


def epochs_of(monkeypatch):
    """Return the growing list of epochs that a classifier is trained on."""
    original, seen = extraction.random_crops, []

    def recorded(*args, epoch, **options):
        seen.append(epoch)
        return original(*args, epoch=epoch, **options)

    monkeypatch.setattr(extraction, "random_crops", recorded)
    return seen


def saved_states(monkeypatch):
    """Return the growing list of (epoch, all values) of the states that are saved."""
    original, seen = PartialResult.save, []

    def save(self, name, state):
        original(self, name, state)
        if "epoch" in state:
            seen.append((name, state["epoch"], torch.cat([x.double().flatten() for x in tensors(state)]).tolist()))

    monkeypatch.setattr(PartialResult, "save", save)
    return seen


def tensors(state):
    if isinstance(state, dict):
        return [x for key in sorted(state, key=str) for x in tensors(state[key])]
    return [state.clone()] if isinstance(state, torch.Tensor) else []


LONG = {
    "linear": {"features": "augmented", "epochs": 4, "batch_size": 24},
    "finetune": {"epochs": 4, "batch_size": 24, "base_lrs": (0.01, 0.1)},
}


@pytest.mark.parametrize(
    ("task", "after", "repeated"),
    [
        ("linear", 1, [1, 2, 3]),
        ("linear", 3, [3]),
        ("linear", 6, [2, 3]),  # in the second row
        ("finetune", 3, [3, *range(4), *range(4)]),
        ("finetune", 6, [2, 3, *range(4)]),  # with the second learning rate
        ("finetune", 11, [3]),  # with the selected one
    ],
)
def test_killed_evaluation_goes_on_after_its_last_epoch(run, monkeypatch, damaged_train, task, after, repeated):
    options = EVALUATIONS[task](run=str(run), root=str(damaged_train), **LONG[task])
    with monkeypatch.context() as patch:
        expected_states = saved_states(patch)
        expected = evaluate(task, options)
    (file,) = run.glob(f"eval_{task}_*")
    file.unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, after)
        evaluate(task, options)
    (partial,) = run.glob(f"eval_{task}_*")
    assert partial.name == f"{file.name}.partial"
    seen, states = epochs_of(monkeypatch), saved_states(monkeypatch)
    again = evaluate(task, options)
    assert seen[: len(repeated)] == repeated
    assert states == expected_states[-len(states) :]  # weights and momentum, bit by bit
    assert again["rows"] == expected["rows"]
    assert again["bad_images"] == expected["bad_images"] and len(again["bad_images"]) == 1
    assert list(run.glob(f"eval_{task}_*")) == [file]  # the partial result is gone


@pytest.fixture
def damaged_train(photos, tmp_path):
    """The corpus with an unreadable training image."""
    for split in ("train", "val"):
        for file in (photos / split).rglob("*.jpg"):
            link = tmp_path / "damaged" / file.relative_to(photos)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    bad = next((tmp_path / "damaged/train").rglob("*.jpg"))
    bad.unlink()
    bad.write_bytes(b"no")
    return tmp_path / "damaged"


def test_finished_rows_are_not_measured_again(run, monkeypatch, log_lines):
    monkeypatch.setattr(type(TASKS["knn"]), "identity", lambda self, data: [])  # would read images
    options = KnnEval(run=str(run))
    expected = evaluate("knn", options)
    (file,) = run.glob("eval_knn_*")
    file.unlink()
    measure = type(TASKS["knn"]).measure
    rows = iter([None, Killed()])

    def once(*args):
        if (error := next(rows)) is not None:
            raise error
        return measure(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(TASKS["knn"]), "measure", once)
        evaluate("knn", options)
    read = []
    original = ImageFolder.read
    monkeypatch.setattr(ImageFolder, "read", lambda self, index: read.append(index) or original(self, index))
    log_lines.clear()
    result = evaluate("knn", options)
    assert result["rows"] == expected["rows"]
    assert result["feature_images_per_s"].keys() == expected["feature_images_per_s"].keys()
    assert len(read) == 72 + 2 * (72 + 18)  # calibration, and two rows of three
    assert log_lines[0].startswith(BYOL_ROW) and log_lines[0].endswith("(finished before)")
    assert log_lines[1].startswith(UNTRAINED_ROW) and "before" not in log_lines[1]


def killed_in_last_row(monkeypatch, task, options):
    """Run an evaluation whose last row, the raw pixels, kills it."""
    measure = type(TASKS[task]).measure

    def measured(self, backbone, *args):
        if isinstance(backbone, extraction.RawPixels):
            raise Killed
        return measure(self, backbone, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(TASKS[task]), "measure", measured)
        evaluate(task, options)


def test_network_of_a_finished_row_is_not_built_again(run, monkeypatch):
    options = KnnEval(run=str(run))
    killed_in_last_row(monkeypatch, "knn", options)
    monkeypatch.setattr(evaluation, "build_model", None)
    rows = evaluate("knn", options)["rows"]
    assert list(rows) == [BYOL_ROW, UNTRAINED_ROW, "raw pixels"]


@pytest.mark.parametrize("change", ["repaired", "replaced", "none"])
def test_rows_of_other_images_are_not_used(run, monkeypatch, damaged_train, change, log_lines):
    """All rows of a result must come from the same images."""
    monkeypatch.setattr("fastbyol.data.images._HASHED_IMAGES", 1000)
    options = KnnEval(run=str(run), root=str(damaged_train))
    killed_in_last_row(monkeypatch, "knn", options)
    files = sorted((damaged_train / "train").rglob("*.jpg"))
    (bad,) = (file for file in files if not file.is_symlink())
    good = next(file for file in files if file.is_symlink())
    if change != "none":
        content = good.read_bytes() if change == "repaired" else b"other"
        bad.write_bytes(content)
    log_lines.clear()
    result = evaluate("knn", options)
    assert sum(line.endswith("(finished before)") for line in log_lines) == (2 if change == "none" else 0)
    assert len(result["bad_images"]) == (change != "repaired")


def test_skipped_images_that_can_be_read_again_start_the_evaluation_over(tmp_path, log_lines):
    image = tmp_path / "x.jpg"
    partial = PartialResult(tmp_path / "x.partial", "key")
    partial.bad[str(image)] = "Input/output error"
    partial.finish_row("a", {"top1": 0.5}, 100.0)
    again = PartialResult(tmp_path / "x.partial", "key")
    again.open()
    assert (again.rows, again.rates) == ({"a": {"top1": 0.5}}, {"a": 100.0})
    image.write_bytes(jpeg(0))
    again = PartialResult(tmp_path / "x.partial", "key")
    again.open()
    assert (again.rows, again.rates, again.bad) == ({}, {}, {})
    assert "x.jpg was skipped before and can be read now: the evaluation starts" in log_lines[-1]


def test_partial_result_lies_beside_the_target_of_a_link(run, monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "out.json").symlink_to(tmp_path / "results" / "knn.json")
    killed_in_last_row(monkeypatch, "knn", KnnEval(run=str(run), out=str(tmp_path / "out.json")))
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["knn.json.partial"]


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_annotated_images_have_an_identity(task, tmp_path):
    prepare_shapes(tmp_path / "shapes", images=8, size=64)
    context = EvalContext(size=32, device=torch.device("cpu"), dtype=torch.float32, threads=1)

    def identity():
        options = EVALUATIONS[task](run="x", root=str(tmp_path / "shapes"))
        return TASKS[task].identity(TASKS[task].open(options, Config(), context))

    first = identity()
    assert identity() == first
    image = next((tmp_path / "shapes" / "JPEGImages").iterdir())
    image.write_bytes(image.read_bytes() + b"\0")
    assert identity() != first


def test_damaged_or_foreign_files_are_not_used(run, log_lines):
    options = KnnEval(run=str(run), baselines=False)
    expected = evaluate("knn", options)["rows"]
    (file,) = run.glob("eval_knn_*")
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(b"no")
    log_lines.clear()
    assert evaluate("knn", options)["rows"] == expected
    assert (
        log_lines[0] == f"warning: {partial} is damaged or not a checkpoint; the evaluation starts from the beginning"
    )
    torch.save({"key": "another", "rows": {BYOL_ROW: {"top1": 2.0}}, "bad": {}, "stages": {}}, partial)
    assert evaluate("knn", options)["rows"] == expected
    assert json.loads(file.read_text())["rows"] == expected
    assert not partial.exists()


def test_partial_result_without_a_place_is_an_error(tmp_path):
    partial = PartialResult(tmp_path / "gone" / "x.partial", "key")
    partial.open()
    with pytest.raises(RunError, match=r"^partial result .*x.partial could not be written: No such file"):
        partial.finish_row("a", {})


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (("key", ["BYOL"], {}), "files .*x.partial: results must lie on a shared disk$"),
        (("key", [], {"probe": 3}), "files .*x.partial: results must lie on a shared disk$"),
        (("another", [], {}), "checkpoints or data: use a shared disk, and name a checkpoint file if "),
    ],
)
def test_ranks_that_evaluate_different_things_are_an_error(tmp_path, monkeypatch, other, text):
    partial = PartialResult(tmp_path / "x.partial", "key", World(0, 2))
    monkeypatch.setattr(World, "gather", lambda self, value: [value, other])
    with pytest.raises(InputError, match=f"^the ranks found different {text}"):
        partial.open()


def test_rows_of_another_run_are_not_used(run, make_config, monkeypatch, tmp_path):
    """Two runs with checkpoints of equal name and step write to the same --out."""
    options = {"optim": {"epochs": 1, "warmup_epochs": 0}, "knn": {"every_epochs": 0}, "seed": 1}
    other = train(make_config(name="other", **options)).folder
    out, measured = tmp_path / "out.json", []
    measure = type(TASKS["knn"]).measure
    monkeypatch.setattr(type(TASKS["knn"]), "measure", lambda *args: measured.append(1) or measure(*args))
    monkeypatch.setattr(PartialResult, "remove", lambda self: None)  # as if it had been killed
    for folder, rows in ((run, 3), (run, 0), (other, 3)):
        measured.clear()
        evaluate("knn", KnnEval(run=str(folder), out=str(out)))
        assert len(measured) == rows
        out.unlink()


def test_without_a_file_nothing_is_kept(photos):
    """Trainings with the same context do not continue one another."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    context = EvalContext(size=32, device=torch.device("cpu"), dtype=torch.float32, threads=1)
    options = {"epochs": 1, "batch_size": 24}
    first, second = (
        finetune(backbone, open_split(photos, "train"), context, base_lr=lr, **options)[1].weight for lr in (0.1, 0.9)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("error", ["Diverged", "RunError"])
def test_only_divergence_lets_other_rates_go_on(run, monkeypatch, error):
    """Not a full disk or a signal, which ranks would meet at different times."""
    original = finetuning.finetune

    def failing(*args, base_lr, **options):
        if base_lr == 0.01:
            raise getattr(finetuning, error)("x")
        return original(*args, base_lr=base_lr, **options)

    monkeypatch.setattr(finetuning, "finetune", failing)
    options = EVALUATIONS["finetune"](run=str(run), baselines=False, **LONG["finetune"] | {"epochs": 1})
    if error == "Diverged":
        assert evaluate("finetune", options)["rows"][BYOL_ROW]["base_lr"] == 0.1
    else:
        with pytest.raises(RunError, match="^x$"):
            evaluate("finetune", options)


@pytest.mark.parametrize("where", ["before the row", "after the row"])
def test_saved_network_of_a_killed_evaluation(run, monkeypatch, tmp_path, where):
    """Its file is kept, and never replaced by the untrained network's."""
    file = tmp_path / "tuned.safetensors"
    options = EVALUATIONS["finetune"](run=str(run), epochs=1, batch_size=24, save=str(file))
    finish = PartialResult.finish_row

    def killed(self, title, row, rate):
        if where == "after the row":
            finish(self, title, row, rate)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PartialResult, "finish_row", killed)
        evaluate("finetune", options)
    content = file.read_bytes()
    if where == "after the row":
        file.rename(tmp_path / "moved")
    evaluate("finetune", options)
    assert not file.exists() if where == "after the row" else file.read_bytes() == content


def test_result_that_is_no_file_keeps_no_partial_result(run, tmp_path):
    options = replace(KnnEval(run=str(run), baselines=False), out="/dev/null")
    assert evaluate("knn", options)["rows"]
