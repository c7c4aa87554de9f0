"""Benchmarks: contenders train, failures are handled, tables and estimates are correct."""

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import against
import bench_lars_ema
import bench_step
import exchange
import pytest
import readme_tables
import results_csv
import runner
import timing
import torch
import torchvision
import variants

from fastbyol.tools import references
from fastbyol.tools.hardware import GPUS, Link

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
def test_contender_trains_in_two_steps(contender: str):
    if not bench_step.is_installed(contender):
        pytest.skip(f"{contender} is not installed: make bench-setup")
    with bench_step.isolated(CPU):
        step = bench_step.prepare(contender, TINY, CPU)
        before = {name: p.detach().clone() for name, p in step.module.named_parameters() if p.ndim > 1}
        losses = [float(step()) for _ in range(2)]
    assert all(map(math.isfinite, losses))
    assert losses[0] != losses[1]
    now = dict(step.module.named_parameters())
    unchanged = [name for name, weight in before.items() if torch.equal(now[name], weight)]
    # byol-pytorch contains an unused classifier.
    assert [name for name in unchanged if not name.endswith("net.fc.weight")] == []


def test_isolated_restores_torch_switches():
    def switches() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = switches()
    with bench_step.isolated(CPU):
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = not before[0], not before[1]
        torch.set_float32_matmul_precision("highest" if before[2] else "high")
    assert switches() == before


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a contender that changes a switch and raises."""

    def build(work: bench_step.Work, device: torch.device) -> bench_step.Trainer:
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        raise ValueError("no such layer\nand more")

    monkeypatch.setitem(bench_step.CONTENDERS, "broken", build)
    return "broken"


def test_failure_is_one_line_and_restores_switches(broken: str):
    before = torch.backends.cudnn.benchmark
    with pytest.raises(runner.Skipped) as caught:
        bench_step.measure(broken, TINY, CPU, 0)
    assert (caught.value.reason, caught.value.failed) == ("ValueError: no such layer", True)
    assert torch.backends.cudnn.benchmark == before


def test_out_of_gpu_memory_is_not_a_failure(broken: str, monkeypatch: pytest.MonkeyPatch):
    def build(work: bench_step.Work, device: torch.device) -> bench_step.Trainer:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(bench_step.CONTENDERS, broken, build)
    with pytest.raises(runner.Skipped) as caught:
        bench_step.measure(broken, TINY, CPU, 0)
    assert not caught.value.failed


def test_failed_contender_is_skipped_and_sets_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Rows are written after every measurement."""
    out, seen = tmp_path / "new" / "step.csv", []

    def measure(name: str, work: bench_step.Work, device: torch.device, round_: int) -> dict[str, object]:
        seen.append((name, round_, len(results_csv.read("step", out.parent)) if out.exists() else 0))
        if name == "plain torch":
            raise runner.Skipped("it broke")
        return {"set": str(work), "round": round_, "contender": name, "ms": "10.0", "images_per_s": "400"}

    monkeypatch.setattr(bench_step, "in_own_process", measure)
    words = ["--device", "cpu", "--sets", str(TINY), "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--only", "fastbyol", "plain torch", "plain torch compiled"])
    assert bench_step.main() == 1
    assert seen == [
        ("fastbyol", 0, 0),
        ("plain torch", 0, 1),
        ("plain torch compiled", 0, 1),
        ("fastbyol", 1, 2),
        ("plain torch compiled", 1, 3),
    ]
    assert [row["contender"] for row in results_csv.read("step", out.parent)] == 2 * [
        "fastbyol",
        "plain torch compiled",
    ]
    output = capsys.readouterr().out
    assert "R18 32 px, batch 4: plain torch failed: it broke\n" in output
    assert output.endswith("failed: R18 32 px, batch 4: plain torch\n")


@pytest.mark.parametrize(("name", "code"), [("fastbyol", 0), ("plain torch", 1)])
def test_exit_code_of_runner(tmp_path: Path, name: str, code: int):
    def measure() -> dict[str, object]:
        if name == "plain torch":
            raise runner.Skipped("too large", failed=False)
        return {"contender": name}

    run = runner.Runner(tmp_path / "x.csv", lambda rows: rows)
    run.measure(name, name, measure)
    assert run.finish() == code  # 1 if nothing was measured


def test_compiled_baseline_runs_by_default_only_on_gpu():
    assert "plain torch compiled" in bench_step.defaults(torch.device("cuda"), modes=False)
    assert "plain torch compiled" in bench_step.defaults(CPU, modes=True)
    assert "plain torch compiled" not in bench_step.defaults(CPU, modes=False)


@pytest.mark.parametrize("contender", ["plain torch channels-last bf16", "plain torch compiled"])
def test_fast_baselines_are_tuned(contender: str, monkeypatch: pytest.MonkeyPatch):
    """Fused SGD, cuDNN's autotuner, channels-last bfloat16; the loss is compiled too."""
    options, compiled = [], []
    sgd, module = torch.optim.SGD, references.PlainBYOL

    def new_sgd(parameters: object, **given: object) -> torch.optim.SGD:
        options.append(given)
        return sgd(parameters, **given)

    monkeypatch.setattr(torch.optim, "SGD", new_sgd)
    monkeypatch.setattr(torch, "compile", lambda model, **given: compiled.append(type(model)) or model)
    with bench_step.isolated(CPU):
        trainer = bench_step.CONTENDERS[contender](TINY, CPU)
        assert torch.backends.cudnn.benchmark
    assert options == [{"lr": 0.03, "momentum": 0.9, "fused": True}]
    assert (trainer.dtype, trainer.memory_format) == (torch.bfloat16, torch.channels_last)
    assert compiled == ([module] if contender.endswith("compiled") else [])


@pytest.mark.parametrize(
    ("seconds", "device", "calls"),
    [(1e-5, "cuda", 20), (0.02, "cuda", 10), (0.15, "cuda", 1), (30.0, "cuda", 1), (1e-5, "cpu", 1), (30.0, "cpu", 1)],
)
def test_measurement_takes_at_most_200_ms(seconds: float, device: str, calls: int):
    assert timing.calls_per_measurement(seconds, device) == calls


def test_workload_name_round_trip():
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
    # Channels: 64 in the stem; w, w and 4 w in a block; 4 w in a stage's shortcut; 4096 in a head.
    backbone_channels = 64 + sum(blocks * 6 * w + 4 * w for blocks, w in ((3, 64), (4, 128), (6, 256), (3, 512)))
    backbone_layers = 1 + 3 * (3 + 4 + 6 + 3) + 4
    assert (r50.online_channels, r50.target_channels) == (backbone_channels + 2 * 4096, backbone_channels + 4096)
    assert r50.collectives == 2 * (backbone_layers + 2) + (backbone_layers + 1)
    assert r50.syncbn_bytes == 2 * 2 * ((8 + 8 + 4) * (backbone_channels + 4096) + (8 + 4) * 4096)


def test_exchange_times_of_two_gpus():
    counts = exchange.Counts(gradient_values=10**6, online_channels=500, target_channels=250, collectives=10)
    link = Link("wire", 2.0, "")
    gpu = dataclasses.replace(GPUS["h100"], node=link, cluster=link)
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
    row = exchange.estimate(r50, GPUS["a100-80"], gpus=1, batch=64, images_per_s=926, gradient_dtype="float32")
    assert row["gradient_bytes_sent"] == row["syncbn_bytes_sent"] == row["syncbn_collectives"] == 0
    assert float(row["exposed_ms"]) == 0


def write_step(folder: Path, times: dict[tuple[str, int], float], device: str = "cpu") -> None:
    machine = {"cpu": "a CPU", "gpu": "a card", "torch": "2", "fastbyol": "0.1 abc", "share_of_bound": ""}
    rows = [
        {"set": "s", "round": k, "contender": name, "ms": ms, "images_per_s": 1e4 / ms} | machine
        for (name, k), ms in times.items()
    ]
    results_csv.write(folder / f"step_{device}.csv", rows)


def test_step_table_compares_within_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_step(tmp_path, {("fastbyol", 0): 10, ("other", 0): 20, ("fastbyol", 1): 20, ("other", 1): 60})
    monkeypatch.setattr(results_csv, "FOLDER", tmp_path)
    lines = readme_tables.step().splitlines()
    assert "| fastbyol | 15.0 (10.0-20.0) | 750 | |" in lines
    assert "| other | 40.0 (20.0-60.0) | 333 | 2.50 (2.00-3.00) |" in lines
    assert lines[-1].startswith("a CPU; torch 2; commit abc; 2 interleaved rounds")


def test_against_compares_within_a_round(tmp_path: Path):
    write_step(tmp_path, {("fastbyol", 0): 10, ("lightly", 0): 20, ("fastbyol", 1): 20, ("lightly", 1): 60})
    found = against.comparisons(tmp_path)
    assert against.table(found).splitlines()[2] == "| step, s | 750 images/s | 2.50 (2.00-3.00) |"
    bars = [e for e in ElementTree.fromstring(against.picture(found)).iter() if e.tag.endswith("rect")][1:]
    assert float(bars[0].get("width")) == 2.5 * float(bars[1].get("width"))
    assert against.comparisons(tmp_path, "cuda") == []


def test_table_names_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results_csv, "FOLDER", tmp_path)
    for device, machine in (("cpu", "a CPU"), ("cuda", "a card")):
        write_step(tmp_path, {("fastbyol", 0): 10, ("plain torch compiled", 0): 20}, device)
        note = readme_tables.step(device).splitlines()[-1]
        assert note.startswith(f"{machine}; torch 2; commit abc; 1 round")
        table = against.table(against.comparisons(tmp_path, device))
        assert f"step_{device}.csv ({machine}; torch 2;" in table
        assert "| plain torch compiled |" in table
    row = {"cpu": "a CPU", "gpu": "a card"}
    assert results_csv.machine("train_cuda", row) == results_csv.machine("loader_cuda", row) == "a card; a CPU"


def test_writing_results_leaves_no_temporary_file(tmp_path: Path):
    for _ in range(2):
        results_csv.write(tmp_path / "a.csv", [{"x": 1}], quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    results_csv.write(Path("/dev/null"), [{"x": 1}])
    assert Path("/dev/null").is_char_device()


def test_markdown_table_pads_short_lines():
    text = results_csv.markdown_table(["", "a", "b"], [["**x**"], ["y", "", "1"]], "note")
    assert text == "| | a | b |\n|---|---|---|\n| **x** | | |\n| y | | 1 |\n\nnote\n"


def test_variant_rows_match_result_file():
    rows = results_csv.read("variants")
    assert list(dict.fromkeys(row["variant"] for row in rows)) == variants.default_rows()


def test_apex_without_multi_tensor_apply_is_not_nvidias(monkeypatch, tmp_path):
    """PyPI's apex is another project."""
    (tmp_path / "apex").mkdir()
    for file in ("apex/__init__.py", "amp_C.py"):
        (tmp_path / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "apex", None)  # so that the fake is removed again
    monkeypatch.delitem(sys.modules, "apex")
    lr = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(pytest.skip.Exception, match="apex on PyPI is another project"):
        bench_lars_ema.apex(None, lr, None)
