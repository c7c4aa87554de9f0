import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from fastbyol.config import EvalConfig
from fastbyol.data import open_split
from fastbyol.errors import InputError
from fastbyol.evaluate import BYOL_ROW, PIXELS_ROW, UNTRAINED_ROW, evaluate
from fastbyol.evaluate.features import Features, calibrate_batchnorm, extract
from fastbyol.evaluate.knn import knn_accuracy, knn_scores
from fastbyol.evaluate.linear import linear_accuracy, train_probes
from fastbyol.train import train

CPU = {"device": torch.device("cpu"), "dtype": torch.float32, "threads": 2}


def blobs(n, classes, features, spread, seed=0):
    """Overlapping Gaussian classes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, features))
    labels = rng.integers(0, classes, n)
    x = centres[labels] + spread * rng.normal(size=(n, features))
    return Features(torch.tensor(x, dtype=torch.float32), torch.tensor(labels), classes, {})


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_equals_scikit_learn_s_weighted_knn(k):
    train_set, val = blobs(300, 7, 16, 1.5), blobs(200, 7, 16, 1.5, seed=1)
    temperature = 0.07
    # scikit-learn gives cosine distances d = 1 - s; weights exp(s / T) up to a common factor.
    sklearn = KNeighborsClassifier(min(k, 300), metric="cosine", weights=lambda d: np.exp(-d / temperature))
    sklearn.fit(train_set.x.double().numpy(), train_set.labels.numpy())
    scores = knn_scores(train_set.x, train_set.labels, val.x, k=k, temperature=temperature, classes=7)
    share = scores / scores.sum(1, keepdim=True)
    assert np.abs(share.numpy() - sklearn.predict_proba(val.x.double().numpy())).max() < 1e-4
    expected = sklearn.score(val.x.double().numpy(), val.labels.numpy())
    assert knn_accuracy(train_set, val, k=k, temperature=temperature)["top1"] == pytest.approx(expected)


def test_linear_probe_equals_logistic_regression_within_half_a_point():
    train_set, val = blobs(4000, 5, 12, 1.6), blobs(4000, 5, 12, 1.6, seed=1)
    accuracy = linear_accuracy(train_set, val, base_lrs=(0.01, 0.1), epochs=40)
    sklearn = LogisticRegression(C=1e4, max_iter=1000).fit(train_set.x.numpy(), train_set.labels.numpy())
    assert accuracy["top1"] == pytest.approx(sklearn.score(val.x.numpy(), val.labels.numpy()), abs=0.005)
    assert 0.5 < accuracy["top1"] < 0.95  # neither trivial nor hopeless


def test_batched_probes_equal_torch_s_sgd_one_by_one():
    data = blobs(96, 3, 5, 1.0)
    rates = (0.05, 0.4)
    weight, bias = train_probes(data.x, data.labels, 3, base_lrs=rates, epochs=3, batch_size=32, seed=4)
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
                nn.functional.cross_entropy(layer(data.x[rows]), data.labels[rows]).backward()
                optimizer.step()
                schedule.step()
        assert (weight[i] - layer.weight).abs().max() < 1e-5
        assert (bias[i] - layer.bias).abs().max() < 1e-5


def test_the_learning_rate_is_picked_on_held_out_training_images():
    train_set, val = blobs(1000, 4, 8, 1.0), blobs(500, 4, 8, 1.0, seed=1)
    result = linear_accuracy(train_set, val, base_lrs=(1e-9, 0.1), epochs=20)
    assert result["base_lr"] == 0.1
    # Val labels play no part in the choice: shuffled ones change the accuracy alone.
    shuffled = Features(val.x, val.labels.roll(1), 4, {})
    other = linear_accuracy(train_set, shuffled, base_lrs=(1e-9, 0.1), epochs=20)
    assert (other["base_lr"], other["held_out_top1"]) == (result["base_lr"], result["held_out_top1"])
    assert other["top1"] < 0.5 < result["top1"]


def test_non_finite_features_are_refused():
    data = blobs(50, 3, 4, 1.0)
    data.x[3, 2] = float("nan")
    with pytest.raises(InputError, match="diverged"):
        knn_accuracy(data, data, k=5, temperature=0.07)
    with pytest.raises(InputError, match="diverged"):
        linear_accuracy(data, data, base_lrs=(0.1,))


def test_extraction_uses_eval_mode_and_restores_train_mode(photos):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = network[1].running_mean.clone()
    features = extract(network, open_split(photos, "val"), size=32, **CPU)
    assert features.x.shape == (18, 4)
    assert torch.equal(network[1].running_mean, before)
    assert network.training


def test_calibrated_batchnorm_has_the_data_s_statistics(photos):
    folder = open_split(photos, "train")
    network = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    calibrate_batchnorm(network, folder, size=32, device=torch.device("cpu"), threads=2)
    pixels = extract(None, folder, size=32, **CPU).x.view(72, 3, 32, 32)
    assert (network[0].running_mean - pixels.mean((0, 2, 3))).abs().max() < 1e-3


def test_raw_pixels_of_large_images_are_averaged_down(photos):
    assert extract(None, open_split(photos, "val"), size=96, **CPU).x.shape == (18, 3 * 64 * 64)


@pytest.fixture
def run(make_config):
    return train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_every_protocol_reports_byol_untrained_and_pixels(run, protocol):
    lines = []
    result = evaluate(protocol, EvalConfig(run=str(run), epochs=3), lines.append)
    assert list(result["rows"]) == [BYOL_ROW, UNTRAINED_ROW, PIXELS_ROW]
    assert json.loads((run / f"eval_{protocol}.json").read_text()) == result
    assert (result["train_images"], result["val_images"], result["classes"]) == (72, 18, 18)
    assert all(0 <= row["top1"] <= row["top5"] <= 1 for row in result["rows"].values())
    assert len(lines) == 3


def test_evaluation_without_labels_or_with_other_classes(run, folder_of, photos):
    one = folder_of({"train/a/1.jpg": b"", "val/a/1.jpg": b""})
    with pytest.raises(InputError, match=r"train has 1 class\(es\): a classifier needs at least 2"):
        evaluate("knn", EvalConfig(run=str(run), root=str(one)), print)
    other = folder_of({"train/b/1.jpg": b"", "val/c/1.jpg": b""})
    with pytest.raises(InputError, match="different classes, for example 'b'"):
        evaluate("knn", EvalConfig(run=str(run), root=str(other)), print)
    with pytest.raises(InputError, match="there is no folder .*nowhere/train"):
        evaluate("knn", EvalConfig(run=str(run), root="/nowhere"), print)
    with pytest.raises(InputError, match=r"out=/nowhere/x.json: cannot be written"):
        evaluate("knn", EvalConfig(run=str(run), out="/nowhere/x.json", baselines=False), print)
