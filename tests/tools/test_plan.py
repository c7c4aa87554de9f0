"""Estimates agree with hand counts, with published rates, and with the memory of a real step."""

import json

import pytest
import torch

from fastbyol import cli
from fastbyol.build import build_model
from fastbyol.config import Config, DataConfig, ModelConfig, OptimConfig, StepConfig
from fastbyol.errors import InputError
from fastbyol.runtime.memory import SavedTensorBytes
from fastbyol.tools.hardware import GPUS, Rates, published_efficiency
from fastbyol.tools.plan import plan
from fastbyol.tools.roofline import count_step, saved_tensor_bytes

SMALL = {"backbone": "resnet18", "width": 0.125, "hidden_dim": 32, "projection_dim": 16}


def run_config(batch=64, size=32, model=None, **sections):
    sections = {"data": DataConfig(batch_size=batch, image_size_px=size)} | sections
    return Config(model=ModelConfig(**(SMALL if model is None else model)), **sections)


def estimate(config, **options):
    return plan(config, **({"gpus": 1, "gpu": "h100"} | options))


@pytest.fixture
def rates(tmp_path):
    """Write the rates of two cores: 1 GFLOP/s, 1 GB/s, 50% efficiency, 3 ms per loaded image."""

    def write(**changes):
        values = {
            "peaks": {"flops_per_s": 1e9, "bytes_per_s": 1e9},
            "efficiency": 0.5,
            "loader_ms": {"decode": 1.0, "crop": 0.5, "augment": 0.5, "rest": 1.0},
            "image_size_px": 32,
            "cores": 2,
            "device": "cpu",
            "dtype": "float32",
        } | changes
        path = tmp_path / "bench.json"
        path.write_text(json.dumps({"rates": values}))
        return path

    return write


@pytest.mark.parametrize("gpu", GPUS)
def test_byol_resnet50_reaches_three_eighths_of_the_supervised_rate(gpu):
    """The efficiency comes from that rate; BYOL costs 8 forward passes of a view, supervised 3."""
    found = estimate(run_config(256, 224, {}), gpu=gpu)
    supervised = GPUS[gpu].supervised_images_per_s
    assert found["images_per_s"] == pytest.approx(3 / 8 * supervised, rel=0.02)
    assert 0.3 < published_efficiency(GPUS[gpu]) < 1


def test_gpus_share_the_batch_equally():
    one = estimate(run_config(64))
    four = estimate(run_config(256), gpus=4)
    assert four["images_per_gpu"] == one["images_per_gpu"] == 64
    assert four["parts_ms"] == one["parts_ms"]
    assert four["step_ms"] == pytest.approx(one["step_ms"] + four["exchange"]["exposed_ms"])
    assert four["images_per_s"] == pytest.approx(256e3 / four["step_ms"])


def test_the_backward_pass_hides_the_gradient_exchange():
    big, small = (estimate(run_config(batch, 224, {}), gpus=64, gpu="a100-80") for batch in (64 * 128, 64 * 2))
    sent = big["exchange"]
    weights = sum(p.numel() for p in build_model(ModelConfig(), 224, 0).parameters() if p.requires_grad)
    assert sent["gradient_bytes_sent"] == round(2 * 63 / 64 * 4 * weights)
    assert sent["gradient_ms"] == pytest.approx(1e3 * sent["gradient_bytes_sent"] / 25e9)
    assert sent["exposed_ms"] == pytest.approx(sent["syncbn_ms"] + sent["latency_ms"])
    waits = small["exchange"]["gradient_ms"] - small["parts_ms"]["backward"]
    assert waits > 0
    assert small["exchange"]["exposed_ms"] == pytest.approx(waits + small["exchange"]["syncbn_ms"] + sent["latency_ms"])
    assert small["limit"] == "exchange"
    half = run_config(64 * 128, 224, {})
    half.distributed.gradient_dtype = "bf16"
    half_sent = estimate(half, gpus=64, gpu="a100-80")["exchange"]["gradient_bytes_sent"]
    assert half_sent * 2 == sent["gradient_bytes_sent"]


@pytest.mark.slow
def test_syncbn_bytes_depend_on_ranks_and_micro_batches():
    def sent(ranks=0, parts=1, gpus=64):
        config = run_config(64 * 64, 64, {}, step=StepConfig(micro_batches=parts))
        config.distributed.sync_bn_ranks = ranks
        return estimate(config, gpus=gpus)["exchange"]

    whole, alone, node, twice = sent(), sent(1), sent(8), sent(parts=2)
    assert (alone["syncbn_bytes_sent"], alone["syncbn_ms"], alone["latency_ms"]) == (0, 0, 0)
    assert alone["gradient_bytes_sent"] == whole["gradient_bytes_sent"] == twice["gradient_bytes_sent"]
    assert node["syncbn_bytes_sent"] * (63 / 64) == pytest.approx(whole["syncbn_bytes_sent"] * (7 / 8))
    assert node["latency_ms"] == pytest.approx(whole["latency_ms"] * 20 / 50)  # within a node
    for key in ("syncbn_bytes_sent", "syncbn_ms", "latency_ms"):
        assert twice[key] == pytest.approx(2 * whole[key])


def test_an_unusable_data_root_raises(tmp_path):
    """ImageNet's size is assumed only if the root does not exist."""
    with pytest.raises(InputError, match="no folder"):
        estimate(run_config(data=DataConfig(root=str(tmp_path), batch_size=64, image_size_px=32)))


def test_duration_is_images_over_throughput(log_lines):
    found = estimate(run_config(64, optim=OptimConfig(epochs=10)), images=1000)
    assert found["hours"] == pytest.approx(10 * 1000 // 64 * 64 / found["images_per_s"] / 3600)
    assert log_lines[0].startswith("estimate: resnet18")
    assert any("1,000 images (--images)" in line for line in log_lines)


def test_images_are_counted_in_the_data_root(photos):
    here = run_config(8, data=DataConfig(root=str(photos), batch_size=8, image_size_px=32))
    assert estimate(here)["images"] == 72
    assert estimate(run_config(8))["images"] == 1_281_167


def test_too_few_cores_make_the_loader_the_limit(log_lines):
    free = estimate(run_config(256, 224, {}))
    assert free["limit"] in ("arithmetic", "memory bandwidth")
    tight = estimate(run_config(256, 224, {}), cores=2)
    assert tight["limit"] == "loader"
    assert tight["images_per_s"] == pytest.approx(2e3 / tight["loader_ms_per_image"])
    assert tight["cores_per_gpu"] == pytest.approx(2)
    assert "  limit: CPU cores that load images: use more cores, or DALI" in log_lines


def test_a_batch_that_does_not_fit_makes_memory_the_limit():
    found = estimate(run_config(4096, 224, {}))
    assert found["limit"] == "memory"
    parts = run_config(4096, 224, {}, step=StepConfig(micro_batches=16))
    assert estimate(parts)["limit"] != "memory"


def test_higher_precision_takes_longer():
    times = {p: estimate(run_config(64, 224, {}, precision=p))["step_ms"] for p in ("bf16", "tf32", "fp32")}
    assert times["bf16"] < times["tf32"] < times["fp32"]


def test_measured_rates_replace_published_ones(rates, log_lines):
    config = run_config(16, 64)
    found = estimate(config, gpu=None, rates=rates())
    read = Rates.read(rates())
    step_ms = 1e3 * sum(w.roofline_s(read.peaks) for w in count_step(config, 16, torch.float32).values()) / 0.5
    assert found["step_ms"] == pytest.approx(step_ms)
    loader_ms = 1.0 + 4 * (0.5 + 0.5) + 1.0  # views of four times the area
    assert found["loader_ms_per_image"] == pytest.approx(loader_ms)
    assert found["images_per_s"] == pytest.approx(1e3 / (step_ms / 16 + loader_ms / 2))
    assert found["limit"] == "cores"
    assert sum("measured by `fastbyol bench`" in line for line in log_lines) == 2  # efficiency, loader


@pytest.mark.parametrize("stages", [0, 2])
def test_activations_match_the_saved_tensors_of_a_real_step(stages):
    """The difference is BatchNorm's statistics and the loss."""
    from fastbyol.layers import activation_checkpointing

    config = run_config(32, 64, {"backbone": "resnet50", "width": 0.25, "hidden_dim": 64, "projection_dim": 16})
    config.step.activation_checkpointing = stages
    model = build_model(config.model, 64, 0).to(memory_format=torch.channels_last)
    activation_checkpointing(model.online.backbone, stages)
    views = [torch.randn(32, 3, 64, 64).to(memory_format=torch.channels_last) for _ in range(2)]
    with SavedTensorBytes(model) as saved:
        model(*views)
    assert saved_tensor_bytes(config, 32, torch.float32) == pytest.approx(saved.total, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --gpu (published rates) or --rates FILE"),
        (["--gpu", "h100", "--rates", "x.json"], "expected either --gpu"),
        (["--gpu", "tpu"], "--gpu tpu: unknown GPU, expected one of a100-40, a100-80, h100"),
        (["--gpu", "h10"], "did you mean h100?"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpu", "h100", "--gpus", "3"], "data.batch_size=256: must be divisible by 3 GPUs x step.micro_batches=1"),
        (["--gpu", "h100", "--batch-size", "auto"], "data.batch_size=auto: can only be resolved on the machine"),
        (
            ["--rates", "/nowhere.json"],
            "--rates /nowhere.json: holds no rates of `fastbyol bench --out`: file not found",
        ),
        (["--rates", "/"], "/: is not a file"),
        (["--rates", "/etc/hostname"], "/etc/hostname: is damaged: not valid JSON"),
        (["--gpu", "h100", "--cores", "-1"], "--cores -1: must be at least 0"),
        (["--rates", "x.json", "--gpus", "2"], "--gpus 2: must be 1 with --rates"),
    ],
)
def test_invalid_arguments_are_one_line(capsys, arguments, message):
    code = cli.main(["plan", *arguments])
    errors = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peaks": None}, "section 'peaks' is missing or not an object"),
        ({"peaks": {"flops_per_s": 1e9}}, "bytes_per_s: has no value"),
        ({"peaks": {"flops_per_s": 0, "bytes_per_s": 1e9}}, "flops_per_s=0: must be at least 1"),
        ({"efficiency": 0}, "efficiency=0: must be above 0"),
        ({"efficiency": "half"}, "efficiency='half': expected a number"),
        ({"loader_ms": [1]}, "section 'loader_ms' is missing or not an object"),
        ({"loader_ms": {"decode": float("nan")}}, "decode=nan: must be finite"),
        ({"dtype": "load"}, "dtype='load': expected one of float32"),
        ({"cores": None}, "cores: has no value"),
    ],
)
def test_invalid_rates_are_named(capsys, rates, changes, message):
    assert cli.main(["plan", "--rates", str(rates(**changes))]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{}", '{"rates": 3}', "[" * 100_000])
def test_a_file_without_rates_is_one_line(capsys, tmp_path, text):
    path = tmp_path / "rates.json"
    path.write_text(text)
    assert cli.main(["plan", "--rates", str(path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and f"--rates {path}: holds no rates of `fastbyol bench --out`" in errors[0]


@pytest.mark.slow
def test_plan_runs_from_the_command_line(capsys):
    assert cli.main(["plan", "--gpu", "a100-80", "--gpus", "8", "--data.batch_size", "4096"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("estimate")
    for word in ("images/s", "days", "CPU cores", "GiB", "NVLink 3", "limit:", "data sheet", "published for PyTorch"):
        assert word in out
