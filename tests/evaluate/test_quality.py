"""Quality without labels: RankMe, uniformity and alignment."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers.evaluations import features_of
from torch import nn

from fastbyol.api import train
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.quality import alignment, rank_me, uniformity
from fastbyol.runtime.distributed import World
from fastbyol.runtime.run_log import read_metrics

CPU = EvalContext(size=8, device=torch.device("cpu"), dtype=torch.float32, threads=1)


def features(x):
    return features_of(x, torch.full((len(x),), -1), 0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rank_me_is_the_entropy_of_the_singular_values():
    x = features(random(700, 12) * torch.linspace(0.1, 2, 12))
    singular = np.linalg.svd(x.rows(slice(None)).double().numpy(), compute_uv=False)
    share = singular / singular.sum() + 1e-7
    assert rank_me(x) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_rank_me_counts_equal_directions(rank):
    basis, _ = torch.linalg.qr(random(10, 10))
    x = torch.eye(rank).repeat(40, 1) @ basis[:rank]
    assert rank_me(features(x)) == pytest.approx(rank, rel=1e-3)
    few = torch.eye(rank, 2048)  # fewer images than values
    assert rank_me(features(few)) == pytest.approx(rank, rel=1e-5)


def test_uniformity_is_the_mean_over_pairs():
    x = features(random(50, 6))
    unit = nn.functional.normalize(x.rows(slice(None)).double(), dim=1)
    distances = torch.pdist(unit).square()
    assert uniformity(x) == pytest.approx((-2 * distances).exp().mean().log().item(), abs=1e-5)
    assert uniformity(features(torch.ones(50, 6))) == pytest.approx(0, abs=1e-5)
    assert uniformity(features(random(9000, 64))) == pytest.approx(-4, abs=0.15)  # far apart: |u - v|^2 is about 2
    assert uniformity(features(torch.ones(1, 6))) == pytest.approx(0, abs=1e-5)
    assert uniformity(features(torch.zeros(50, 6))) == pytest.approx(0, abs=1e-5)  # collapsed, after a ReLU
    assert uniformity(features(torch.eye(2, 6) * torch.tensor([[1.0], [0.0]]))) == pytest.approx(-2)


def test_alignment_is_the_distance_of_unit_features():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    view1, view2 = random(300, 3, 8, 8), random(300, 3, 8, 8, seed=1)
    u, v = (nn.functional.normalize(view.flatten(1), dim=1) for view in (view1, view2))
    assert alignment(network, (view1, view2), CPU) == pytest.approx((u - v).square().sum(1).mean().item(), rel=1e-5)
    assert alignment(network, (view1, 3 * view1), CPU) == pytest.approx(0, abs=1e-6)
    assert network.training  # restored; dropout was off


def test_ranks_add_up(monkeypatch):
    """Two ranks with half of the rows each have the values of one rank."""
    whole = features(random(600, 9) * torch.linspace(0.2, 1, 9))
    halves = [
        Features(whole.unit[rows], whole.length[rows], rows, [300], whole.all_labels, 0, {}, World(rank, 2))
        for rank, rows in enumerate((torch.arange(300), torch.arange(300, 600)))
    ]
    for measure in (rank_me, uniformity):
        sent = []
        for name in ("sum", "sum_"):
            monkeypatch.setattr(World, name, lambda self, x, sent=sent: sent.append(x.clone()) or x)
        measure(halves[0])
        from_first = iter(sent.copy())
        for name in ("sum", "sum_"):
            monkeypatch.setattr(World, name, lambda self, x, others=from_first: x + next(others))
        assert measure(halves[1]) == pytest.approx(expected(measure, whole), abs=1e-6)


def expected(measure, whole):
    """The value of one rank, whose sums are its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sum", "sum_"):
            patch.setattr(World, name, lambda self, x: x)
        return measure(whole)


def test_quality_survives_a_resume(make_config):
    """A run that continues without another evaluation still has the last one in its summary."""
    options = {"knn": {"every_epochs": 1}, "optim": {"epochs": 2, "warmup_epochs": 0}}
    folder = train(make_config(**options)).folder
    (folder / "summary.json").unlink()
    train(make_config(resume="auto", **options))
    last = [line for line in read_metrics(folder) if line["kind"] == "quality"][-1]
    assert json.loads((folder / "summary.json").read_text())["rank_me"] == last["rank_me"]


def test_run_without_labels_logs_quality_and_no_knn(make_config, photos, tmp_path):
    root = tmp_path / "flat"
    for k, file in enumerate(sorted((photos / "train").rglob("*.jpg"))):
        (root / "train").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "train" / f"{k:03d}.jpg")
    config = make_config(data={"root": str(root)}, optim={"epochs": 2, "warmup_epochs": 0}, knn={"every_epochs": 1})
    folder = train(config).folder
    lines = read_metrics(folder)
    found = [line for line in lines if line["kind"] == "quality"]
    assert [line["epoch"] for line in found] == pytest.approx([8 / 9, 2])  # 9 steps
    assert not any(line["kind"] == "knn" for line in lines)
    last, trained = found[-1], [line for line in lines if line["kind"] == "train"][-1]
    assert 1 < last["rank_me"] < 72
    assert 0 < last["alignment"] < 2
    assert -4 < last["uniformity"] < 0
    assert last["projection_std"] == pytest.approx(trained["projection_std"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rank_me"] == last["rank_me"] and math.isnan(summary["knn_last"] or math.nan)
