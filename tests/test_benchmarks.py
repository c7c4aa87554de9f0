"""The benchmarks measure what they say: every contender trains, and the estimate of the exchange counts every tensor."""

import dataclasses
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torchvision

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import against
import bench_step
import exchange
import readme_tables
import results_csv

from fastbyol import plan

TINY = bench_step.Work.parse("R18 32 px, batch 4")
CPU = torch.device("cpu")
CONTENDERS = [
    "fastbyol",
    "lightly",
    "byol-pytorch",
    "stable-pretraining",
    "plain torch channels-last bf16",
    "supervised",
]


@pytest.mark.parametrize("contender", CONTENDERS)
def test_two_steps_of_a_contender_train_it(contender: str):
    if not bench_step.is_installed(contender):
        pytest.skip(f"{contender} is not installed here: make bench-setup")
    with bench_step.own_turn(CPU):
        step = bench_step.prepare(contender, TINY, CPU)
        before = {name: p.detach().clone() for name, p in step.module.named_parameters() if p.ndim > 1}
        losses = [float(step()) for _ in range(2)]
    assert all(map(math.isfinite, losses))
    assert losses[0] != losses[1]
    now = dict(step.module.named_parameters())
    still = [name for name, weight in before.items() if torch.equal(now[name], weight)]
    assert [
        name for name in still if not name.endswith("net.fc.weight")
    ] == []  # byol-pytorch carries an unused classifier


def test_an_own_turn_leaves_no_switch_behind():
    def switches() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = switches()
    with bench_step.own_turn(CPU):
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = not before[0], not before[1]
        torch.set_float32_matmul_precision("highest" if before[2] else "high")
    assert switches() == before


def test_a_set_is_named_as_it_is_printed():
    work = bench_step.Work.parse("R50 224 px, batch 256")
    assert (work.backbone, work.size, work.batch) == ("resnet50", 224, 256)
    assert str(work) == "R50 224 px, batch 256"
    with pytest.raises(bench_step.argparse.ArgumentTypeError, match="R50 224"):
        bench_step.Work.parse("resnet50")


def test_bound_is_three_eighths_of_the_supervised_rate_of_the_same_round():
    rows = [
        {"set": "s", "round": k, "contender": name, "images_per_s": rate}
        for k, name, rate in ((0, "fastbyol", "300"), (0, "supervised", "1000"), (1, "fastbyol", "300"))
    ]
    shares = [row["share_of_bound"] for row in bench_step.with_bound(rows)]
    assert shares == ["0.800", "", ""]


@pytest.fixture(scope="module")
def r50() -> exchange.Counts:
    return exchange.counts_of("resnet50", 224)


def test_exchange_counts_of_r50(r50: exchange.Counts):
    with torch.device("meta"):
        backbone = sum(p.numel() for p in torchvision.models.resnet50().parameters()) - (2048 + 1) * 1000
    projector = (2048 + 1) * 4096 + 2 * 4096 + 4096 * 256
    predictor = (256 + 1) * 4096 + 2 * 4096 + 4096 * 256
    assert r50.gradient_values == backbone + projector + predictor
    # 64 in the stem; blocks of w, w and 4 w channels, and 4 w in a group's shortcut; 4096 in either head
    backbone_channels = 64 + sum(blocks * 6 * w + 4 * w for blocks, w in ((3, 64), (4, 128), (6, 256), (3, 512)))
    backbone_layers = 1 + 3 * (3 + 4 + 6 + 3) + 4
    assert (r50.online_channels, r50.target_channels) == (backbone_channels + 2 * 4096, backbone_channels + 4096)
    assert r50.collectives == 2 * (backbone_layers + 2) + (backbone_layers + 1)
    assert r50.syncbn_bytes == 2 * 2 * ((8 + 8 + 4) * (backbone_channels + 4096) + (8 + 4) * 4096)


def test_exchange_times_of_two_gpus():
    counts = exchange.Counts(gradient_values=10**6, online_channels=500, target_channels=250, collectives=10)
    link = plan.Link("wire", 2.0, "")
    gpu = dataclasses.replace(plan.GPUS["h100"], node=link, cluster=link)
    row = exchange.estimate(
        counts, gpu, gpus=2, batch=8, images_per_s=2000, gradient_dtype="float32", latency_us=(100, 0)
    )
    assert row["gradient_bytes_sent"] == 4 * 10**6  # 2 (n - 1) / n is 1
    assert float(row["gradient_link_ms"]) == 2.0
    assert (float(row["step_ms"]), float(row["backward_ms"])) == (2.0, 1.0)
    assert float(row["gradient_share_hidden"]) == 0.5
    assert row["syncbn_bytes"] == 4 * (8 * (500 + 250) + 4 * 500)
    assert float(row["syncbn_latency_ms"]) == 1.0
    assert float(row["exposed_ms"]) == pytest.approx(1.0 + 1.0 + 0.016, abs=0.005)  # two decimals


def test_one_gpu_sends_nothing(r50: exchange.Counts):
    row = exchange.estimate(r50, plan.GPUS["a100-80"], gpus=1, batch=64, images_per_s=926, gradient_dtype="float32")
    assert row["gradient_bytes_sent"] == row["syncbn_bytes_sent"] == row["syncbn_collectives"] == 0
    assert float(row["exposed_ms"]) == 0


def write_step(folder: Path, times: dict[tuple[str, int], float]) -> None:
    machine = {"cpu": "a CPU", "gpu": "none", "torch": "2", "fastbyol": "0.1 abc", "share_of_bound": ""}
    rows = [
        {"set": "s", "round": k, "contender": name, "ms": ms, "images_per_s": 1e4 / ms} | machine
        for (name, k), ms in times.items()
    ]
    results_csv.write(folder / "step_cpu.csv", rows)


def test_step_table_compares_within_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_step(tmp_path, {("fastbyol", 0): 10, ("other", 0): 20, ("fastbyol", 1): 20, ("other", 1): 60})
    monkeypatch.setattr(results_csv, "FOLDER", tmp_path)
    lines = readme_tables.step().splitlines()
    assert "| fastbyol | 15.0 (10.0-20.0) | 750 |  |" in lines
    assert "| other | 40.0 (20.0-60.0) | 333 | 2.50 (2.00-3.00) |" in lines
    assert lines[-1].startswith("a CPU; torch 2; commit abc; 2 rounds in turn")


def test_others_are_shown_beside_the_same_round_of_ours(tmp_path: Path):
    write_step(tmp_path, {("fastbyol", 0): 10, ("lightly", 0): 20, ("fastbyol", 1): 20, ("lightly", 1): 60})
    found = against.comparisons(tmp_path)
    assert against.table(found).splitlines()[2] == "| step, s | 750 images/s | 2.50 (2.00-3.00) |"
    bars = [e for e in ElementTree.fromstring(against.picture(found)).iter() if e.tag.endswith("rect")][1:]
    assert float(bars[0].get("width")) == 2.5 * float(bars[1].get("width"))
    assert against.comparisons(tmp_path, "cuda") == []
