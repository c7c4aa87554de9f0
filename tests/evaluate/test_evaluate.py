import base64
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from helpers.common import jpeg
from helpers.evaluations import features_of
from helpers.stopping import stop_after
from rich.console import Console
from shapes import prepare_shapes
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

from fastbyol.api import train
from fastbyol.callbacks import Callback
from fastbyol.config import Config
from fastbyol.data import open_split
from fastbyol.data.crops import center_crops, random_crops
from fastbyol.data.folder import ImageFolder
from fastbyol.data.pack import pack
from fastbyol.data.views import apply_reference, epoch_order, sample
from fastbyol.errors import InputError, RunError
from fastbyol.evaluation import context as contexts
from fastbyol.evaluation import features as extraction
from fastbyol.evaluation import online
from fastbyol.evaluation.context import EvalContext, missing_images_warning
from fastbyol.evaluation.features import RawPixels, Splits, calibrate_batchnorm, extract_features
from fastbyol.evaluation.fewshot import episode_accuracies, nearest_mean_scores
from fastbyol.evaluation.finetune import finetune
from fastbyol.evaluation.knn import knn_accuracy, nearest, votes
from fastbyol.evaluation.linear import (
    CACHED_BASE_LRS,
    Probes,
    Standardization,
    _held_out_mask,
    augmented_accuracy,
    fit_linear,
    linear_accuracy,
    probe_batch_size,
    train_probes,
)
from fastbyol.evaluation.online import OnlineKnn
from fastbyol.evaluation.options import EVALUATIONS, FewshotEval, FinetuneEval, KnnEval, RobustnessEval
from fastbyol.evaluation.robustness import CORRUPTIONS, SEVERITIES, corrupt
from fastbyol.evaluation.run import BYOL_ROW, PIXELS_ROW, TASKS, UNTRAINED_ROW, eval_context, evaluate
from fastbyol.kernels.augment_params import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.runtime.results import TASK_ORDER, read_results
from fastbyol.runtime.run_log import read_metrics
from fastbyol.tools.report import write_report
from fastbyol.tools.report_figures import draw_neighbors
from fastbyol.weights.load import load_checkpoint_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = {"device": torch.device("cpu"), "dtype": torch.float32, "threads": 2}


def cpu_context(size=32):
    return EvalContext(size=size, **CPU)


def blobs(n, classes, features, spread, seed=0):
    """Features of overlapping Gaussian classes."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, features))
    labels = rng.integers(0, classes, n)
    x = centers[labels] + spread * rng.normal(size=(n, features))
    return features_of(torch.tensor(x, dtype=torch.float32), torch.tensor(labels), classes)


def values(features):
    """All features (M, F) in float32, on one rank."""
    return features.rows(slice(None))


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_matches_scikit_learn(k):
    train_set, val = blobs(300, 7, 16, 1.5), blobs(200, 7, 16, 1.5, seed=1)
    temperature = 0.07
    # scikit-learn passes distances d = 2 - s, so exp(-d / T) is exp(s / T) up to a constant
    # factor.
    options = {"metric": "precomputed", "weights": lambda d: np.exp(-d / temperature)}
    sklearn = KNeighborsClassifier(min(k, 300), **options)
    bank, queries = train_set.unit.double(), val.unit.double()
    sklearn.fit(2 - bank @ bank.T, train_set.labels.numpy())
    similarity, position = nearest(train_set, val, k)
    scores = votes(similarity, train_set.labels[position], temperature=temperature, classes=7)
    share = scores / scores.sum(1, keepdim=True)
    distances = 2 - queries @ bank.T  # a rounded vector may be longer than 1, a distance not negative
    assert np.abs(share.numpy() - sklearn.predict_proba(distances)).max() < 1e-4
    expected = sklearn.score(distances, val.labels.numpy())
    assert knn_accuracy(train_set, val, k=k, temperature=temperature)["top1"] == pytest.approx(expected)
    # Storage in 16 bits moves a similarity by 1e-4, a share by a few times that / T.
    exact = KNeighborsClassifier(min(k, 300), metric="cosine", weights=options["weights"])
    exact.fit(values(train_set), train_set.labels)
    assert np.abs(share.numpy() - exact.predict_proba(values(val))).max() < 3e-3


def test_linear_probe_matches_logistic_regression():
    train_set, val = blobs(4000, 5, 12, 1.6), blobs(4000, 5, 12, 1.6, seed=1)
    accuracy = linear_accuracy(train_set, val, base_lrs=(0.01, 0.1), epochs=40)
    sklearn = LogisticRegression(C=1e4, max_iter=1000).fit(values(train_set).numpy(), train_set.labels.numpy())
    assert accuracy["top1"] == pytest.approx(sklearn.score(values(val).numpy(), val.labels.numpy()), abs=0.005)
    assert 0.5 < accuracy["top1"] < 0.95  # neither trivial nor at chance


@pytest.mark.slow
def test_linear_probe_matches_logistic_regression_on_900_digits():
    """Both select their regularization on the same held-out digits.

    Four splits average out the resolution of 0.1 %.
    """
    digits = load_digits()
    gaps = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(digits.target))
        train_set, val = (
            features_of(torch.tensor(digits.data[rows], dtype=torch.float32), torch.tensor(digits.target[rows]), 10)
            for rows in (order[:900], order[900:])
        )
        scaler = StandardScaler().fit(values(train_set))
        x, x_val = (scaler.transform(values(features)) for features in (train_set, val))
        held, y = _held_out_mask(900, 0).numpy(), train_set.labels.numpy()
        regularizations = {
            c: log_loss(y[held], LogisticRegression(C=c, max_iter=2000).fit(x[~held], y[~held]).predict_proba(x[held]))
            for c in (0.1, 0.3, 1, 3, 10)
        }
        best = LogisticRegression(C=min(regularizations, key=regularizations.get), max_iter=2000).fit(x, y)
        gaps.append(linear_accuracy(train_set, val, base_lrs=CACHED_BASE_LRS)["top1"] - best.score(x_val, val.labels))
    assert abs(np.mean(gaps)) < 0.005
    assert np.abs(gaps).max() < 0.01


@pytest.mark.parametrize(
    ("images", "batch", "held_out"),
    [(72, 256, 7), (50_000, 256, 5_000), (100_000, 256, 10_000), (100_090, 1024, 10_009), (1_281_167, 1024, 10_009)],
)
def test_linear_protocol_is_the_paper_s_on_large_data_sets(images, batch, held_out):
    assert probe_batch_size("auto", images) == batch
    assert probe_batch_size(300, images) == 300
    assert int(_held_out_mask(images, 0).sum()) == held_out


def test_batched_probes_match_torch_sgd():
    data = blobs(96, 3, 5, 1.0)
    rates = (0.05, 0.4)
    x = values(data)
    same = Standardization(torch.zeros(5), torch.ones(5))
    probes = train_probes(data, same, torch.arange(96), base_lrs=rates, epochs=3, batch_size=32, seed=4)
    for i, rate in enumerate(rates):
        layer = nn.Linear(5, 3)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), rate * 32 / 256, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            for rows in torch.randperm(96, generator=generator).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(x[rows]), data.labels[rows]).backward()
                optimizer.step()
                schedule.step()
        assert (probes.weight[i] - layer.weight).abs().max() < 1e-5
        assert (probes.bias[i] - layer.bias).abs().max() < 1e-5


def test_learning_rate_is_selected_on_held_out_training_images():
    train_set, val = blobs(1000, 4, 8, 1.0), blobs(500, 4, 8, 1.0, seed=1)
    result = linear_accuracy(train_set, val, base_lrs=(1e-9, 0.1), epochs=20)
    assert result["base_lr"] == 0.1
    # Shuffled validation labels change the accuracy but not the selection.
    shuffled = features_of(values(val), val.labels.roll(1), 4)
    other = linear_accuracy(train_set, shuffled, base_lrs=(1e-9, 0.1), epochs=20)
    assert (other["base_lr"], other["held_out_top1"]) == (result["base_lr"], result["held_out_top1"])
    assert other["top1"] < 0.5 < result["top1"]


def test_non_finite_features_raise():
    data = blobs(50, 3, 4, 1.0)
    x = values(data)
    x[3, 2] = float("nan")
    data = features_of(x, data.labels, 3)
    with pytest.raises(InputError, match="diverged"):
        knn_accuracy(data, data, k=5, temperature=0.07)
    with pytest.raises(InputError, match="diverged"):
        linear_accuracy(data, data, base_lrs=(0.1,))


def test_extract_uses_eval_mode_and_restores_train_mode(photos):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = network[1].running_mean.clone()
    features = extract_features(network, open_split(photos, "val"), EvalContext(size=32, **CPU), None)
    assert features.unit.shape == (18, 4)
    assert torch.equal(network[1].running_mean, before)
    assert network.training


def test_calibrated_batchnorm_has_the_statistics_of_the_data(photos):
    folder = open_split(photos, "train")
    network = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    calibrate_batchnorm(network, folder, cpu_context())
    pixels = values(extract_features(RawPixels(64), folder, EvalContext(size=32, **CPU), None)).view(72, 3, 32, 32)
    assert (network[0].running_mean - pixels.mean((0, 2, 3))).abs().max() < 1e-3
    assert network[0].momentum == 0.1  # restored for further training


def test_raw_pixels_are_pooled_to_64_px(photos):
    features = extract_features(RawPixels(64), open_split(photos, "val"), EvalContext(size=96, **CPU), None)
    assert features.unit.shape == (18, 3 * 64 * 64)


@pytest.fixture
def run(make_config):
    return train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_result_has_rows_for_byol_untrained_and_pixels(run, task, log_lines):
    few = {"epochs": 3} if task == "linear" else {}
    result = evaluate(task, EVALUATIONS[task](run=str(run), **few))
    assert list(result["rows"]) == [BYOL_ROW, UNTRAINED_ROW, PIXELS_ROW]
    (written,) = run.glob(f"eval_{task}_*.json")
    assert json.loads(written.read_text()) == result
    assert (result["train_images"], result["val_images"], result["classes"]) == (72, 18, 18)
    assert all(0 <= row["top1"] <= row["top5"] <= 1 for row in result["rows"].values())
    assert len(log_lines) == 4
    assert log_lines[-1] == f"wrote {written}"


# --- unreadable images ---


@pytest.fixture
def damaged(photos, tmp_path):
    """A corpus with three unreadable files (their paths are returned): one in val/ and one in
    train/ truncated, one in train/ empty.
    """
    root = tmp_path / "damaged"
    shutil.copytree(photos, root)
    broken = [sorted((root / split).rglob("*.jpg"))[k] for split, k in (("val", 0), ("train", 1), ("train", 40))]
    for file in broken[:2]:
        file.write_bytes(file.read_bytes()[:300])
    broken[2].write_bytes(b"")
    return root, [str(file) for file in broken]


def skipped(lines):
    """Return the files that log lines report as skipped."""
    return [line.split("skipped ")[1].split(": ")[0] for line in lines if line.startswith("warning: skipped ")]


FEW = {"linear": {"epochs": 2}, "finetune": {"epochs": 2, "batch_size": 24}, "robustness": {"epochs": 2}}
FEW |= {"fewshot": {"ways": 3, "shots": (1, 2), "queries": 1, "episodes": 10}}


@pytest.mark.parametrize(
    ("task", "more"),
    [
        *((name, {}) for name in ("knn", "linear", "finetune", "fewshot", "robustness")),
        ("linear", {"features": "augmented", "batch_size": 24}),
        ("finetune", {"base_lrs": (0.01, 0.1)}),
    ],
)
def test_unreadable_images_are_logged_once(run, damaged, task, more, log_lines):
    root, files = damaged
    log_lines.clear()
    options = EVALUATIONS[task](run=str(run), root=str(root), **FEW.get(task, {}) | more)
    result = evaluate(task, options)
    assert sorted(skipped(log_lines)) == sorted(files)
    assert sorted(result["bad_images"]) == sorted(files)
    assert json.loads(next(run.glob(f"eval_{task}_*.json")).read_text(), parse_constant=pytest.fail) == result
    (text,) = {line for line in log_lines if line.startswith("warning: 1 of 18")}
    name = Path(files[0]).parent.name
    assert text == (
        f"warning: 1 of 18 images of {root}/val cannot be read: results cover the other 17, without any image of {name}"
    )


def test_calibration_logs_unreadable_images_and_needs_two_readable_ones(damaged, folder_of, log_lines):
    root, files = damaged
    context = cpu_context()
    calibrate_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), open_split(root, "train"), context)
    assert sorted(skipped(log_lines)) == sorted(files[1:])
    alone = folder_of({"train/a/0.jpg": jpeg(0), "train/b/1.jpg": b"no"})
    with pytest.raises(
        InputError,
        match=r"train: only 1 image\(s\) can be read, but the BatchNorm statistics of the untrained network need 2",
    ):
        calibrate_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), open_split(alone, "train"), context)


def test_split_without_readable_images_raises(run, folder_of):
    root = folder_of({f"{split}/{c}/x.jpg": b"no" for split in ("train", "val") for c in "ab"})
    for task, options in (("knn", {}), ("finetune", {"epochs": 1}), ("linear", {"features": "augmented"})):
        with pytest.raises(
            InputError, match=r"^.*files/train: none of the 2 images can be read, for example .*train/a/x.jpg: not an"
        ):
            evaluate(task, EVALUATIONS[task](run=str(run), root=str(root), **options))


def test_fewshot_draws_only_classes_with_readable_images(damaged, run):
    root, _ = damaged
    options = FewshotEval(run=str(run), root=str(root), ways=18, shots=(1,), queries=1)
    with pytest.raises(
        InputError, match=r"ways=18: only 17 of 18 classes have readable images: 1 training and 1 valid"
    ):
        evaluate("fewshot", options)


def test_warning_above_one_percent_unreadable_or_for_an_empty_class(folder_of):
    images = ImageFolder(Path("/d"), [f"{i}.jpg" for i in range(400)], np.arange(400) // 100, ["a", "b", "c", "d"])
    assert missing_images_warning(images, {1: "x", 2: "x", 3: "x", 4: "x"}) is None
    assert (
        missing_images_warning(images, range(5)) == "5 of 400 images of /d cannot be read: results cover the other 395"
    )
    gone = missing_images_warning(images.subset(np.array([0, 1, 2, 150, 250, 350])), [3, 5])
    assert gone == "2 of 6 images of /d cannot be read: results cover the other 4, without any image of b, d"


def test_online_knn_logs_unreadable_images_once_and_ignores_them(damaged, make_config, capsys):
    root, files = damaged
    config = make_config(
        data={"root": str(root), "batch_size": 16, "image_size_px": 32, "threads": 2, "max_bad_fraction": 0.1},
        optim={"epochs": 2, "warmup_epochs": 0},
        knn={"every_epochs": 1},
    )
    lines = capsys_lines(capsys, lambda: train(config))
    assert sorted(skipped(lines)) == sorted(files)
    assert sum("online kNN: 1 of 18 images of" in line for line in lines) == 1
    assert all(
        0 <= line["top1"] <= 1 for line in read_metrics(Path(config.runs) / config.name) if line["kind"] == "knn"
    )


def test_spread_images_keep_their_paths(photos):
    images = open_split(photos, "train")
    for limit in (1, 7, 71, 72, 500):
        part, indices = images.subsample(limit), images.subsample_indices(limit)
        assert [part.location(i) for i in range(len(part))] == [images.location(int(i)) for i in indices]


def capsys_lines(capsys, work):
    capsys.readouterr()
    work()
    return capsys.readouterr().out.splitlines()


def test_unreadable_validation_split_disables_online_knn_but_not_the_run(photos, make_config, tmp_path, capsys):
    root = tmp_path / "half"
    shutil.copytree(photos, root)
    for file in (root / "val").rglob("*.jpg"):
        file.write_bytes(b"no")
    config = make_config(
        data={"root": str(root), "batch_size": 16, "image_size_px": 32, "threads": 2},
        optim={"epochs": 2, "warmup_epochs": 0},
        knn={"every_epochs": 1},
    )
    results = []
    lines = capsys_lines(capsys, lambda: results.append(train(config)))
    assert (results[0].step, results[0].stopped_by) == (9, None)
    (line,) = (line for line in lines if "no online kNN from here on" in line)
    assert "half/val: none of the 18 images can be read, for example" in line
    assert not any("nan" in line for line in lines)
    kinds = Counter(line["kind"] for line in read_metrics(results[0].folder))
    assert (kinds["quality"], kinds["knn"]) == (2, 0)


def test_online_knn_keeps_no_batch_during_a_step(make_config):
    """With DALI every batch is a tensor of its own: two would take memory at a step's peak."""
    kept = []

    class Watch(Callback):
        def on_step(self, run, batch, output):
            (knn,) = (callback for callback in run.callbacks if isinstance(callback, OnlineKnn))
            kept.append(knn._last_step is not None)

        def on_epoch_end(self, run, done):
            (knn,) = (callback for callback in run.callbacks if isinstance(callback, OnlineKnn))
            kept.append(knn._last_step is not None)
            return False

    optim = {"epochs": 2, "warmup_epochs": 0}
    for every in (1, 0):
        kept.clear()
        train(make_config(optim=optim, knn={"every_epochs": every}, name=f"every{every}"), [Watch()])
        assert kept == 2 * ([False] * 3 + [every == 1, False])  # 4 steps and the end of an epoch, twice


def test_report_logs_images_missing_from_neighbors(run, damaged, log_lines):
    root, files = damaged
    config = Config.from_dict(json.loads((run / "config.json").read_text()))
    model = load_checkpoint_model(run).model
    draw_neighbors(config, model, open_split(root, "train"), open_split(root, "val"))
    assert [line.split(": ")[1] for line in log_lines] == [
        f"the report's neighbors lack {file}" for file in (*files[1:], files[0])
    ]


# --- progress ---


class Clock:
    """A clock that advances only by `passes`."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(contexts, "clock", lambda: self.now)

    def passes(self, items, seconds):
        """Yield the items; each advances the clock."""
        for item in items:
            self.now += seconds
            yield item


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(monkeypatch, log_lines):
    clock = Clock(monkeypatch)
    batches = list(range(-(-50_000 // 256)))
    assert list(cpu_context().track("features", clock.passes(batches, 2.5), 50_000, each=256)) == batches
    assert log_lines[:2] == [
        "features: 1,024 of 50,000 images, 8 min left",
        "features: 2,048 of 50,000 images, 8 min left",
    ]
    assert log_lines[-1] == "features: 49,152 of 50,000 images, 8 s left"
    assert len(log_lines) == 48  # 196 batches, four per ten seconds, no line for the last


def test_progress_units_and_durations(monkeypatch, log_lines):
    clock = Clock(monkeypatch)
    list(cpu_context().track("linear probe", clock.passes(range(9), 1), 9, unit="epochs"))
    assert log_lines == []  # done within ten seconds
    list(cpu_context().track("linear probe", clock.passes(range(3), 9), 3, unit="epochs"))
    assert log_lines == ["linear probe: 2 of 3 epochs, 9 s left"]
    list(cpu_context().track("training", clock.passes(range(3), 40_000), 3, unit="steps"))
    assert log_lines[1:] == ["training: 1 of 3 steps, 22.2 h left", "training: 2 of 3 steps, 11.1 h left"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, log_lines):
    clock = Clock(monkeypatch)
    screen = io.StringIO()
    monkeypatch.setattr(contexts, "Console", lambda: Console(file=screen, force_terminal=True, width=80))
    list(cpu_context().track("features", clock.passes(range(4), 30), 1000, each=256))
    assert log_lines == []
    assert "features" in screen.getvalue()


def test_feature_extraction_logs_progress(run, photos, monkeypatch, log_lines):
    clock = Clock(monkeypatch)
    original = extraction.center_crops
    monkeypatch.setattr(extraction, "BATCH", 20)
    monkeypatch.setattr(
        extraction, "center_crops", lambda *args, **options: clock.passes(original(*args, **options), 11)
    )
    log_lines.clear()
    evaluate("knn", KnnEval(run=str(run), baselines=False))
    assert log_lines[:3] == [
        f"features: {done} of 72 images, {left} s left" for done, left in ((20, 29), (40, 18), (60, 7))
    ]
    assert log_lines[3].startswith(BYOL_ROW)


# --- error messages ---


@pytest.mark.parametrize(
    ("task", "options", "text"),
    [
        ("finetune", {"batch_size": 1}, "batch_size=1: the backbone's BatchNorm needs at least 2 images per step"),
        ("fewshot", {"ways": 19, "shots": (1,), "queries": 1}, "ways=19: .*photos has 18 classes; lower ways"),
        (
            "fewshot",
            {"shots": (500,), "queries": 1},
            "ways=5: only 0 of 18 classes of .*photos have 500 training and 1",
        ),
    ],
)
def test_unsuitable_options_raise(run, task, options, text):
    with pytest.raises(InputError, match=f"^{text}"):
        evaluate(task, EVALUATIONS[task](run=str(run), **options))


@pytest.mark.parametrize(
    ("task", "options", "text"),
    [
        (
            "finetune",
            {"base_lrs": (1e30,)},
            r"base_lrs=1e\+30: the network became NaN or infinite during fine-tuning; ch",
        ),
        (
            "finetune",
            {"base_lrs": (1e29, 1e30)},
            r"base_lrs=\[1e\+29, 1e\+30\]: the network became NaN or infinite with",
        ),
    ],
)
def test_diverged_finetuning_names_the_rates(run, task, options, text):
    with pytest.raises(RunError, match=f"^{text}"):
        evaluate(task, EVALUATIONS[task](run=str(run), epochs=3, batch_size=24, **options))


def test_diverged_classifier_names_the_rate():
    x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
    train = features_of(x, torch.arange(4096) % 2, 2)
    with pytest.raises(RunError, match=r"base_lrs=3e\+38: the classifier became NaN or infinite; choose lower ones"):
        fit_linear(train, base_lrs=(3e38,), epochs=3, batch_size=256)


def test_diverged_rate_is_skipped(run, log_lines):
    options = FinetuneEval(run=str(run), epochs=3, batch_size=24, base_lrs=(1e30, 0.01), baselines=False)
    log_lines.clear()
    assert evaluate("finetune", options)["rows"][BYOL_ROW]["base_lr"] == 0.01
    assert log_lines[0].startswith("warning: base_lrs=1e+30: the network became NaN or infinite during fine-tuning")


def test_backbone_without_batchnorm_allows_batch_size_1(photos):
    backbone = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    images = open_split(photos, "train").subset(np.arange(3))
    network = finetune(backbone, images, cpu_context(), base_lr=1.0, epochs=1, batch_size=1)
    assert not torch.equal(network[0][0].weight, backbone[0].weight)


def test_too_few_labels_for_a_held_out_part(run, folder_of):
    root = folder_of({f"{split}/{c}/x.jpg": jpeg(k) for split in ("train", "val") for k, c in enumerate("ab")})
    options = FinetuneEval(run=str(run), root=str(root), base_lrs=(0.1, 1.0), epochs=1)
    with pytest.raises(
        InputError, match=r"train: 2 labeled images are too few to hold some out .*; raise fraction or give one rate"
    ):
        evaluate("finetune", options)
    for task in ("knn", "linear", "finetune"):  # two images are enough otherwise
        more = {} if task == "knn" else {"epochs": 1}
        rows = evaluate(task, EVALUATIONS[task](run=str(run), root=str(root), **more))["rows"]
        assert all(0 <= row["top1"] <= row["top5"] == 1 for row in rows.values())


@pytest.mark.parametrize("temperature", [1e-300, 1e-4, 1e300])
def test_knn_scores_at_extreme_temperatures(temperature):
    """A low temperature leaves only the nearest neighbor's vote, a high one weights all votes
    equally.
    """
    bank, labels = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([2, 1, 1, 0])
    query = features_of(torch.tensor([[0.9, 0.3]]), torch.tensor([2]), 3)
    similarity, position = nearest(features_of(bank, labels, 3), query, 3)
    scores = votes(similarity, labels[position], temperature=temperature, classes=3)
    assert torch.isfinite(scores).all()
    assert scores.argmax().item() == (1 if temperature > 1 else 2)


def test_options_tasks_and_results_agree_on_names_and_order():
    assert list(EVALUATIONS) == list(TASKS) == list(TASK_ORDER)


def test_missing_or_mismatched_data_raises(run, folder_of, photos):
    one = folder_of({"train/a/1.jpg": b"", "val/a/1.jpg": b""})
    with pytest.raises(InputError, match=r"train has 1 class\(es\): a classifier needs at least 2"):
        evaluate("knn", KnnEval(run=str(run), root=str(one)))
    other = folder_of({"train/b/1.jpg": b"", "val/c/1.jpg": b""})
    with pytest.raises(
        InputError,
        match=r"different classes: 1 of 2 in \S+train are not in \S+val: b; 1 of 2 in \S+val are not in \S+train: c",
    ):
        evaluate("knn", KnnEval(run=str(run), root=str(other)))
    with pytest.raises(InputError, match="root: data set /nowhere does not exist"):
        evaluate("knn", KnnEval(run=str(run), root="/nowhere"))
    with pytest.raises(InputError, match=r"--out /nowhere/x.json: cannot be written"):
        evaluate("knn", KnnEval(run=str(run), out="/nowhere/x.json", baselines=False))


def test_empty_validation_split_raises(run, photos, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train").symlink_to(photos / "train")
    (tmp_path / "half" / "val" / "astronaut").mkdir(parents=True)
    with pytest.raises(InputError, match="half/val"):
        evaluate("knn", KnnEval(run=str(run), root=str(tmp_path / "half")))


def test_random_crops_match_the_reference_in_epoch_order(photos):
    images = open_split(photos, "train")
    crops = random_crops(images, size=24, seed=3, epoch=2, batch_size=20, threads=2, bad={})
    batches = [(x.clone(), indices) for x, indices in crops]  # valid until the next
    assert [len(x) for x, _ in batches] == [20, 20, 20]  # no partial batch
    order = epoch_order(3, 2, 72)
    assert np.array_equal(np.concatenate([indices for _, indices in batches]), order[:60])
    decoded = [
        torch.from_numpy(np.array(simplejpeg.decode_jpeg(images.read(int(i)), fastdct=False, fastupsample=False)))
        for i in order[:20]
    ]
    params = sample("crop_flip", 3, 2, range(20), [image.shape[:2] for image in decoded])
    assert (batches[0][0] - apply_reference(decoded, params, 24)[0]).abs().max() < 1e-3
    assert params.flip.any()
    assert not params.jitter.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_crops_in_16_bits_are_the_rounded_ones(photos, dtype):
    options = {"size": 24, "fraction": 0.875, "batch_size": 50, "threads": 2, "bad": {}}
    images = open_split(photos, "train")
    exact, short = ([x.clone() for x, _ in center_crops(images, dtype=d, **options)] for d in (torch.float32, dtype))
    assert [len(x) for x in short] == [50, 22]
    assert all(x.dtype == dtype and torch.equal(x, y.to(dtype)) for x, y in zip(short, exact, strict=True))


def test_random_crops_substitute_unreadable_images(folder_of):
    root = folder_of(
        {"train/a/0.jpg": jpeg(0), "train/a/1.jpg": b"no", "train/b/2.jpg": jpeg(2), "train/b/3.jpg": jpeg(3)}
    )
    images, options = open_split(root, "train"), {"size": 16, "seed": 0, "epoch": 0, "threads": 2}
    bad = {}
    ((crops, indices),) = random_crops(images, batch_size=4, bad=bad, **options)
    assert len(crops) == 4 and list(bad) == [1]
    order = epoch_order(0, 0, 4)
    assert indices.tolist() == [2 if k == 1 else k for k in order]
    halves = [next(random_crops(images, batch_size=4, shard=np.arange(2) + r, bad={}, **options)) for r in (0, 2)]
    assert np.array_equal(np.concatenate([part for _, part in halves]), indices)
    assert torch.equal(torch.cat([part for part, _ in halves]), crops)


def test_probes_ignore_images_of_weight_zero():
    data = blobs(64, 3, 5, 1.0)
    two = Probes((0.1, 0.1), 3, 5, torch.device("cpu"))
    keep = torch.arange(64) % 4 != 0
    used, x = torch.stack((torch.ones(64), keep.float()), 1), values(data)
    one = Probes((0.1,), 3, 5, torch.device("cpu"))
    for k in range(5):
        two.step(x, data.labels, batch_size=64, progress=k / 5, used=used)
        one.step(x[keep], data.labels[keep], batch_size=64, progress=k / 5, used=torch.ones(48, 1))
    assert (two.weight[1] - one.weight[0]).abs().max() < 1e-6
    assert (two.weight[0] - one.weight[0]).abs().max() > 1e-4


def test_augmented_probe_sees_new_crops_every_epoch_and_learns(photos):
    splits = Splits(open_split(photos, "train"), open_split(photos, "val"))
    network = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    seen = []
    network.train().register_forward_hook(
        lambda m, args, out: seen.append(args[0].clone()) if m.training is False else seen.append(None)
    )
    options = {"base_lrs": (1e-6, 8.0), "epochs": 40, "batch_size": 36}
    result = augmented_accuracy(network, splits, cpu_context(), **options)
    assert len(seen[0]) == 1  # feature_dim
    training = seen[1 : 1 + 40 * 2]
    assert all(x is not None and len(x) == 36 for x in training)  # eval mode, no partial batch
    assert not any(torch.equal(training[0], x) for x in training[1:])
    assert network.training
    assert result["base_lr"] == 8.0
    assert result["held_out_top1"] > 1.5 / 14  # chance is 1/18; six networks reach 4/14 to 6/14
    assert result["top1"] > 2.5 / 18  # 5/18 to 8/18


def test_finetuning_leaves_the_checkpoint_unchanged_and_learns(run, photos, tmp_path):
    """Half of the evaluated images are the training images: top-1 is 0.29 to 0.40 over five seeds
    and two instruction sets.
    """
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(photos / "train")
    labels = open_split(photos, "train").labels
    options = {
        "run": str(run),
        "root": str(tmp_path),
        "epochs": 25,
        "batch_size": 24,
        "base_lrs": (1.0,),
        "fraction": 0.5,
    }
    result = evaluate("finetune", FinetuneEval(**options))
    assert list(result["rows"]) == [BYOL_ROW, UNTRAINED_ROW]
    assert result["train_images"] == len(labels) // 2
    assert result["rows"][BYOL_ROW]["top1"] > 3 / 18
    again = evaluate("finetune", FinetuneEval(**options, baselines=False))
    assert again["rows"][BYOL_ROW] == result["rows"][BYOL_ROW]


def test_finetuning_changes_all_of_the_copy_and_none_of_the_original(photos):
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    network = finetune(backbone, open_split(photos, "train"), cpu_context(), base_lr=1.0, epochs=2, batch_size=24)
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in before.items())
    assert not any(torch.equal(value, network[0].state_dict()[name]) for name, value in before.items())
    assert network[1].out_features == 18


def test_finetuning_rate_is_selected_on_held_out_labels(run, monkeypatch):
    trained, tested = [], []
    accuracies = {0.1: 0.25, 1.0: 0.5, 3.0: 0.375}

    def train_on(backbone, images, context, *, base_lr, **options):
        trained.append((base_lr, {images.location(k) for k in range(len(images))}))
        return base_lr

    def accuracy(base_lr, split, context):
        tested.append({split.location(k) for k in range(len(split))})
        return {"top1": accuracies[base_lr], "top5": 1.0}

    monkeypatch.setattr("fastbyol.evaluation.finetune.finetune", train_on)
    monkeypatch.setattr("fastbyol.evaluation.finetune._accuracy", accuracy)
    options = FinetuneEval(run=str(run), base_lrs=tuple(accuracies), baselines=False)
    row = evaluate("finetune", options)["rows"][BYOL_ROW]
    assert row == {"top1": 0.5, "top5": 1.0, "base_lr": 1.0, "held_out_top1": 0.5}
    *rates, (final, labeled) = trained
    *held, validation = tested
    assert [rate for rate, _ in rates] == list(accuracies) and final == 1.0
    assert len(labeled) == 72 and len(validation) == 18
    for (_, fit), test in zip(rates, held, strict=True):
        assert len(test) == 14 and not fit & test and fit | test == labeled


def test_fraction_that_empties_a_class_raises(run):
    with pytest.raises(
        InputError, match=r"^fraction=0.01 leaves none of the 4 images of astronaut: raise it to at least 0.12"
    ):
        evaluate("finetune", FinetuneEval(run=str(run), fraction=0.01))


def test_nearest_mean_scores():
    support = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 4.0], [0.0, 6.0]]])
    scores = nearest_mean_scores(support, torch.tensor([[1.0, 1.0], [1.0, 4.0]]))
    assert torch.allclose(scores, -torch.tensor([[1.0, 17**0.5], [4.0, 2**0.5]]))


def test_episode_accuracies():
    """Separated classes give 1, shuffled labels 1 / ways, more shots help, and the draws are
    deterministic.
    """
    train_set, val = blobs(400, 8, 16, 0.1), blobs(400, 8, 16, 0.1, seed=1)
    options = FewshotEval(run="run", ways=5, queries=10, episodes=60)
    assert episode_accuracies(train_set, val, options, shots=3).min() == 1.0
    rng = np.random.default_rng(0)
    shuffled = features_of(values(val), val.labels[torch.from_numpy(rng.permutation(400))], 8)
    assert episode_accuracies(train_set, shuffled, options, shots=3).mean() == pytest.approx(0.2, abs=0.02)
    noisy = blobs(400, 8, 16, 3.0), blobs(400, 8, 16, 3.0, seed=1)
    few, many = (episode_accuracies(*noisy, options, shots=k).mean() for k in (1, 20))
    assert few + 0.1 < many
    first, second = (episode_accuracies(*noisy, options, shots=3) for _ in range(2))
    assert np.array_equal(first, second)


def test_fewshot_row_has_mean_and_interval(run):
    result = evaluate("fewshot", FewshotEval(run=str(run), shots=(1, 3), queries=1, episodes=40, ways=4))
    row = result["rows"][BYOL_ROW]
    assert list(row) == ["top1_1shot", "ci95_1shot", "top1_3shot", "ci95_3shot"]
    assert 0 < row["ci95_1shot"] < 0.2
    with pytest.raises(
        InputError, match=r"ways=5: only 0 of 18 classes of .*photos have 1 training and 15 validation images"
    ):
        evaluate("fewshot", FewshotEval(run=str(run)))


def test_corruptions(photos):
    crops, indices = next(
        iter(random_crops(open_split(photos, "train"), size=64, seed=0, epoch=0, batch_size=16, threads=2, bad={}))
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    images = crops * std + mean

    def pixels(name, severity, seed=0, rows=slice(None)):
        return corrupt(crops[rows], indices[rows], name, severity, seed) * std + mean

    for name in CORRUPTIONS:
        distance = [(pixels(name, k) - images).square().mean().item() for k in range(SEVERITIES)]
        assert distance == sorted(distance), name
        assert 1e-9 < distance[0] < distance[-1] < 0.2, name
        assert pixels(name, 4).min() > -1e-5
        assert pixels(name, 4).max() < 1 + 1e-5
    gray = torch.full_like(crops, 0.0)  # the mean color, so that nothing is clipped
    noise = corrupt(gray, indices, "gaussian_noise", 0, 0) * std
    assert noise.std().item() == pytest.approx(0.08, rel=0.02)
    # An image's noise depends on the seed, not on its batch.
    assert torch.equal(pixels("gaussian_noise", 2, rows=slice(3, 5)), pixels("gaussian_noise", 2)[3:5])
    assert not torch.equal(pixels("gaussian_noise", 2, seed=1), pixels("gaussian_noise", 2))
    spread = pixels("contrast", 0).std((2, 3)) / images.std((2, 3))
    assert spread.mean().item() == pytest.approx(0.4, abs=0.01)
    point = torch.zeros(1, 3, 65, 65)
    point[..., 32, 32] = 1
    blurred = corrupt((point - mean) / std, np.zeros(1), "gaussian_blur", 4, 0) * std + mean
    variance = (blurred[0, 0].sum(0) * (torch.arange(65) - 32.0).square()).sum() / blurred[0, 0].sum()
    assert variance.sqrt().item() == pytest.approx(6 * 65 / 224, rel=0.05)


@pytest.mark.slow
def test_robustness_has_a_curve_per_corruption_and_a_figure(run):
    result = evaluate("robustness", RobustnessEval(run=str(run), epochs=3))
    row = result["rows"][BYOL_ROW]
    assert list(row["curves"]) == list(CORRUPTIONS)
    assert all(len(values) == SEVERITIES for curve in row["curves"].values() for values in curve.values())
    assert row["knn_top1_clean"] == evaluate("knn", KnnEval(run=str(run), baselines=False))["rows"][BYOL_ROW]["top1"]
    expected = np.mean([curve["linear_top5"] for curve in row["curves"].values()])
    assert row["linear_top5_corrupted"] == pytest.approx(expected)
    picture = next(run.glob("eval_robustness_*.png")).read_bytes()
    assert picture.startswith(b"\x89PNG")
    page = write_report(run).read_text()
    assert base64.b64encode(picture).decode() in page
    assert "Robustness to corruptions" in page


def test_finetuned_backbone_is_saved_once_and_loads_with_init(run, make_config, tmp_path):
    file = tmp_path / "tuned.safetensors"
    options = FinetuneEval(run=str(run), epochs=1, batch_size=24, save=str(file))
    evaluate("finetune", options)
    with pytest.raises(InputError, match=r"^save .*tuned.safetensors: already exists"):
        evaluate("finetune", options)
    config = make_config(name="from", init=str(file), optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})
    started = train(config).folder
    assert (started / "checkpoints").is_dir()
    with pytest.raises(InputError, match=r"^save x.pt: the name must end in .safetensors"):
        evaluate("finetune", FinetuneEval(run=str(run), save="x.pt"))


def test_beton_files_and_folders_give_equal_results(run, photos, tmp_path):
    for split in ("train", "val"):
        pack(open_split(photos, split), tmp_path / f"{split}.beton", mode="jpg")
    for task, few in (("knn", {}), ("finetune", {"epochs": 2, "batch_size": 24})):
        options = EVALUATIONS[task](run=str(run), baselines=False, **few)
        rows = [evaluate(task, replace(options, root=root))["rows"] for root in (None, str(tmp_path))]
        assert rows[0] == rows[1], task


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metrics"), [("segmentation", ["miou", "pixel_accuracy"]), ("detection", ["map", "map50", "map75"])]
)
def test_dense_tasks(run, tmp_path, task, metrics):
    prepare_shapes(tmp_path / "shapes", images=12, seed=3, size=64)
    options = EVALUATIONS[task](run=str(run), root=str(tmp_path / "shapes"), image_size_px=64, epochs=1, batch_size=6)
    result = evaluate(task, options)
    assert list(result["rows"]) == [BYOL_ROW, UNTRAINED_ROW]
    assert all(list(row) == metrics for row in result["rows"].values())
    assert (result["train_images"], result["val_images"], result["classes"]) == (12, 3, 8)
    again = evaluate(task, replace(options, baselines=False))
    assert again["rows"][BYOL_ROW] == result["rows"][BYOL_ROW]
    assert TASKS[task].title in write_report(run).read_text()


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_dense_tasks_require_root(task):
    with pytest.raises(ValueError, match=r"^root: name the (VOC|COCO)-format folder"):
        EVALUATIONS[task](run="x")


def test_robustness_decodes_once_for_all_severities(run, photos, monkeypatch):
    original, read = ImageFolder.read, []
    monkeypatch.setattr(
        ImageFolder, "read", lambda self, index: read.append(self.location(index)) or original(self, index)
    )
    monkeypatch.setattr(ImageFolder, "content_hashes", lambda self: [])
    evaluate("robustness", RobustnessEval(run=str(run), epochs=1, baselines=False))
    counts = Counter(read)
    assert {counts[name] for name in counts if "/val/" in name} == {1 + len(CORRUPTIONS)}
    assert {counts[name] for name in counts if "/train/" in name} == {1}


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_float32_precision_is_that_of_the_run(precision, tf32):
    """By default torch lets cuDNN use TF32."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = not tf32
        eval_context(Config(precision=precision), KnnEval(run="r"))
        assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


# --- results ---


def test_results_are_ordered_by_task_data_and_checkpoint(tmp_path, log_lines):
    result = {"train_images": 1, "val_images": 1, "classes": 2, "settings": {}, "rows": {}}
    keys = [("new", "a", "a"), ("detection", "a", "a"), ("knn", "b", "a"), ("knn", "a", "b"), ("knn", "a", "a")]
    for k, (task, root, checkpoint) in enumerate(keys):
        values = {"protocol": task, "root": root, "checkpoint": checkpoint}
        (tmp_path / f"eval_{k}.json").write_text(json.dumps(result | values))
    (tmp_path / "eval_5.json").write_text('{"protocol": "knn"}')
    found = [(values["protocol"], values["root"], values["checkpoint"]) for _, values in read_results(tmp_path)]
    assert found == [
        ("knn", "a", "a"),
        ("knn", "a", "b"),
        ("knn", "b", "a"),
        ("detection", "a", "a"),
        ("new", "a", "a"),
    ]
    assert log_lines == [f"warning: {tmp_path}/eval_5.json: not a result of `fastbyol eval`; skipped"]


def test_rows_as_text():
    accuracy = {"top1": 0.642, "top5": 0.91}
    assert TASKS["knn"].format_row(accuracy) == "top-1  64.2%  top-5  91.0%"
    linear = accuracy | {"base_lr": 0.1, "held_out_top1": 0.5}
    assert TASKS["linear"].format_row(linear) == "top-1  64.2%  top-5  91.0%  (base lr 0.1)"
    assert TASKS["detection"].format_row({"map": 0.3, "map50": 1.0}) == "mAP  30.0%  map50 100.0%"


# --- online kNN: its share of the time ---


class Elapsed(Callback):
    """A clock for the online kNN that advances by 25 s per step and by 10 s per evaluation."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(online, "clock", lambda: self.now)
        measure = OnlineKnn._measure

        def measured(callback, run, *last_step):
            self.now += 10
            return measure(callback, run, *last_step)

        monkeypatch.setattr(OnlineKnn, "_measure", measured)

    def on_step(self, run, batch, output):
        self.now += 25


def knn_lines(run):
    return [line for line in read_metrics(run) if line["kind"] == "knn"]


def test_automatic_interval_of_online_knn_keeps_to_two_percent(make_config, monkeypatch):
    """Epochs take 100 s, evaluations 10 s: one after the first and the last epoch, 2 % in all."""
    options = {"knn": {"every_epochs": "auto"}, "checkpoint": {"every_epochs": 20}}
    config = make_config(optim={"epochs": 40, "warmup_epochs": 0}, **options)
    folder = train(config, [Elapsed(monkeypatch)]).folder
    lines = knn_lines(folder)
    assert [line["epoch"] for line in lines] == [1, 15, 20, 25, 30, 35, 40]
    assert all(line["seconds"] == 10 for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["knn_seconds"] == 70
    assert summary["knn_time_share"] == pytest.approx(70 / 4070)
    assert lines[-1]["time_share"] == summary["knn_time_share"] <= 0.02


def test_cost_of_online_knn_is_counted_over_a_resume(make_config, monkeypatch):
    options = {"knn": {"every_epochs": "auto"}, "checkpoint": {"every_epochs": 1}}
    config = make_config(optim={"epochs": 20, "warmup_epochs": 0}, **options)
    stop_after(monkeypatch, 4 * 12)
    assert train(config, [Elapsed(monkeypatch)]).step == 4 * 12
    folder = train(replace(config, resume="auto"), [Elapsed(monkeypatch)]).folder
    assert [line["epoch"] for line in knn_lines(folder)] == [1, 15, 20]  # not again after the restart
