"""Estimates against hand counts, against published rates they must give back, and against what a step keeps in memory here."""

import dataclasses
import json

import pytest
import torch

from fastbyol import cli
from fastbyol.build import build_model
from fastbyol.config import Config, DataConfig, ModelConfig, OptimConfig, StepConfig
from fastbyol.errors import InputError
from fastbyol.runtime.memory import SavedTensorBytes
from fastbyol.tools.plan import GPUS, Rates, plan, published_efficiency
from fastbyol.tools.roofline import count_step, saved_tensor_bytes

SMALL = {"backbone": "resnet18", "width": 0.125, "hidden_dim": 32, "projection_dim": 16}


def checkpoint_config(batch=64, size=32, model=None, **sections):
    sections = {"data": DataConfig(batch_size=batch, image_size_px=size)} | sections
    return Config(model=ModelConfig(**(SMALL if model is None else model)), **sections)


def planned(config, **options):
    said = []
    options = {"gpus": 1, "gpu": "h100", "say": said.append} | options
    return plan(config, **options), said


@pytest.fixture
def rates(tmp_path):
    """A machine of 1 GFLOP/s and 1 GB/s of which a step reaches half, with 3 ms of loading an image at 32 px, on two cores."""

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
def test_a_resnet50_gets_three_eighths_of_the_published_rate(gpu):
    """The efficiency comes from that rate, and BYOL's step is eight units of work to three."""
    found, _ = planned(checkpoint_config(256, 224, {}), gpu=gpu)
    supervised = GPUS[gpu].supervised_images_per_s
    assert found["images_per_s"] == pytest.approx(3 / 8 * supervised, rel=0.02)
    assert 0.3 < published_efficiency(GPUS[gpu]) < 1


def test_a_gpu_has_an_equal_part_of_the_batch():
    one, _ = planned(checkpoint_config(64))
    four, _ = planned(checkpoint_config(256), gpus=4)
    assert four["images_per_gpu"] == one["images_per_gpu"] == 64
    assert four["parts_ms"] == one["parts_ms"]
    assert four["step_ms"] == pytest.approx(one["step_ms"] + four["exchange"]["exposed_ms"])
    assert four["images_per_s"] == pytest.approx(256e3 / four["step_ms"])


def test_gradients_are_hidden_as_far_as_the_backward_pass_lasts():
    big, small = (planned(checkpoint_config(batch, 224, {}), gpus=64, gpu="a100-80")[0] for batch in (64 * 128, 64 * 2))
    sent = big["exchange"]
    weights = sum(p.numel() for p in build_model(ModelConfig(), 224, 0).parameters() if p.requires_grad)
    assert sent["gradient_bytes_sent"] == round(2 * 63 / 64 * 4 * weights)
    assert sent["gradient_ms"] == pytest.approx(1e3 * sent["gradient_bytes_sent"] / 25e9)
    assert sent["exposed_ms"] == pytest.approx(sent["syncbn_ms"] + sent["latency_ms"])
    waits = small["exchange"]["gradient_ms"] - small["parts_ms"]["backward"]
    assert waits > 0
    assert small["exchange"]["exposed_ms"] == pytest.approx(waits + small["exchange"]["syncbn_ms"] + sent["latency_ms"])
    assert small["limit"] == "exchange"
    half = dataclasses.replace(checkpoint_config(64 * 128, 224, {}))
    half.distributed.gradient_dtype = "bf16"
    assert (
        planned(half, gpus=64, gpu="a100-80")[0]["exchange"]["gradient_bytes_sent"] * 2 == sent["gradient_bytes_sent"]
    )


@pytest.mark.slow
def test_statistics_travel_among_those_who_share_them_once_a_micro_batch():
    def sent(ranks=0, parts=1, gpus=64):
        config = checkpoint_config(64 * 64, 64, {}, step=StepConfig(micro_batches=parts))
        config.distributed.sync_bn_ranks = ranks
        return planned(config, gpus=gpus)[0]["exchange"]

    whole, alone, node, twice = sent(), sent(1), sent(8), sent(parts=2)
    assert (alone["syncbn_bytes_sent"], alone["syncbn_ms"], alone["latency_ms"]) == (0, 0, 0)
    assert alone["gradient_bytes_sent"] == whole["gradient_bytes_sent"] == twice["gradient_bytes_sent"]
    assert node["syncbn_bytes_sent"] * (63 / 64) == pytest.approx(whole["syncbn_bytes_sent"] * (7 / 8))
    assert node["latency_ms"] == pytest.approx(whole["latency_ms"] * 20 / 50)  # within a node
    for key in ("syncbn_bytes_sent", "syncbn_ms", "latency_ms"):
        assert twice[key] == pytest.approx(2 * whole[key])


def test_an_image_folder_that_cannot_be_used_is_no_imagenet(tmp_path):
    """Nothing stands in for what the user has named: only a root that is not here does."""
    with pytest.raises(InputError, match="no folder"):
        planned(checkpoint_config(data=DataConfig(root=str(tmp_path), batch_size=64, image_size_px=32)))


def test_time_is_images_over_the_rate():
    found, said = planned(checkpoint_config(64, optim=OptimConfig(epochs=10)), images=1000)
    assert found["hours"] == pytest.approx(10 * (1000 // 64) * 64 / found["images_per_s"] / 3600)
    assert said[0].startswith("estimate: resnet18")
    assert any("1,000 images (--images)" in line for line in said)


def test_images_are_counted_where_they_are(photos):
    here = checkpoint_config(8, data=DataConfig(root=str(photos), batch_size=8, image_size_px=32))
    assert planned(here)[0]["images"] == 72
    assert planned(checkpoint_config(8))[0]["images"] == 1_281_167


def test_too_few_cores_make_the_loader_the_limit():
    free, _ = planned(checkpoint_config(256, 224, {}))
    assert free["limit"] in ("arithmetic", "memory bandwidth")
    tight, said = planned(checkpoint_config(256, 224, {}), cores=2)
    assert tight["limit"] == "loader"
    assert tight["images_per_s"] == pytest.approx(2e3 / tight["loader_ms_per_image"])
    assert tight["cores_per_gpu"] == pytest.approx(2)
    assert any("more of them, or DALI" in line for line in said)


def test_a_batch_that_does_not_fit_is_said():
    found, _ = planned(checkpoint_config(4096, 224, {}))
    assert found["limit"] == "memory"
    parts = checkpoint_config(4096, 224, {}, step=StepConfig(micro_batches=16))
    assert planned(parts)[0]["limit"] != "memory"


def test_slow_precisions_take_longer():
    times = {p: planned(checkpoint_config(64, 224, {}, precision=p))[0]["step_ms"] for p in ("bf16", "tf32", "fp32")}
    assert times["bf16"] < times["tf32"] < times["fp32"]


def test_rates_of_a_machine_are_taken_from_its_file(rates):
    config = checkpoint_config(16, 64)
    found, said = planned(config, gpu=None, rates=rates())
    read = Rates.read(rates())
    step_ms = 1e3 * sum(w.roofline_s(read.peaks) for w in count_step(config, 16, torch.float32).values()) / 0.5
    assert found["step_ms"] == pytest.approx(step_ms)
    loader_ms = 1.0 + 4 * (0.5 + 0.5) + 1.0  # views four times as large
    assert found["loader_ms_per_image"] == pytest.approx(loader_ms)
    assert found["images_per_s"] == pytest.approx(1e3 / (step_ms / 16 + loader_ms / 2))
    assert found["limit"] == "cores"
    assert any("measured by `fastbyol bench`" in line for line in said)


@pytest.mark.parametrize("stages", [0, 2])
def test_activations_are_those_that_a_step_keeps(stages):
    """Against the storage that autograd keeps in a real step: what is left is BatchNorm's tables and the loss."""
    from fastbyol.layers import activation_checkpointing

    config = checkpoint_config(32, 64, {"backbone": "resnet50", "width": 0.25, "hidden_dim": 64, "projection_dim": 16})
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
        ([], "say either --gpu, for published rates, or --rates FILE"),
        (["--gpu", "h100", "--rates", "x.json"], "say either --gpu"),
        (["--gpu", "tpu"], "--gpu tpu: not known, one of a100-40, a100-80, h100"),
        (["--gpu", "h10"], "did you mean h100?"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpu", "h100", "--gpus", "3"], "data.batch_size=256 cannot be split into 3 x"),
        (["--gpu", "h100", "--batch-size", "auto"], "data.batch_size=auto is found on the machine"),
        (
            ["--rates", "/nowhere.json"],
            "--rates /nowhere.json: holds no rates of `fastbyol bench --out`: there is no such file",
        ),
        (["--rates", "/"], "/: is not a file"),
        (["--rates", "/etc/hostname"], "/etc/hostname: is damaged: not valid JSON"),
        (["--gpu", "h100", "--cores", "-1"], "--cores -1: must be at least 0"),
    ],
)
def test_a_users_mistake_is_one_line(capsys, arguments, message):
    code = cli.main(["plan", *arguments])
    errors = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peaks": None}, "'peaks' is missing or no section"),
        ({"peaks": {"flops_per_s": 1e9}}, "bytes_per_s: has no value"),
        ({"peaks": {"flops_per_s": 0, "bytes_per_s": 1e9}}, "flops_per_s=0: must be at least 1"),
        ({"efficiency": 0}, "efficiency=0: must be above 0"),
        ({"efficiency": "half"}, "efficiency='half': expected a number"),
        ({"loader_ms": [1]}, "'loader_ms' is missing or no section"),
        ({"loader_ms": {"decode": float("nan")}}, "decode=nan: must be finite"),
        ({"dtype": "load"}, "dtype='load': expected one of float32"),
        ({"cores": None}, "cores: has no value"),
    ],
)
def test_rates_of_the_wrong_shape_are_named(capsys, rates, changes, message):
    assert cli.main(["plan", "--rates", str(rates(**changes))]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{}", '{"rates": 3}', "[" * 100_000])
def test_rates_that_are_none(capsys, tmp_path, text):
    path = tmp_path / "rates.json"
    path.write_text(text)
    assert cli.main(["plan", "--rates", str(path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and f"--rates {path}: holds no rates of `fastbyol bench --out`" in errors[0]


@pytest.mark.slow
def test_from_the_command_line(capsys):
    assert cli.main(["plan", "--gpu", "a100-80", "--gpus", "8", "--data.batch_size", "4096"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("estimate")
    for word in ("images/s", "days", "CPU cores", "GiB", "NVLink 3", "limit:", "data sheet", "published for PyTorch"):
        assert word in out
