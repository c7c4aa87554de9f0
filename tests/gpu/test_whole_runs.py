"""GPU runs end to end: training, evaluation, export, automatic batch size and profiling."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torchvision
from helpers.common import losses
from helpers.on_device import (
    DEVICE,
    SIZE,
    Network,
    memory_limit,
    needs_cuda,
    new_batch,
    release_memory,
    write_corpus,
)

from fastbyol import batch_size
from fastbyol.api import train
from fastbyol.build import build_model
from fastbyol.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    KnnConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    StepConfig,
)
from fastbyol.data import open_split
from fastbyol.errors import RunError
from fastbyol.evaluation import features as extraction
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.embed import embed
from fastbyol.evaluation.options import EmbedConfig, KnnEval, LinearEval
from fastbyol.evaluation.run import BYOL_ROW, evaluate
from fastbyol.layers import set_num_views
from fastbyol.runtime.distributed import World
from fastbyol.spans import BACKWARD, COPY, ONLINE, TARGET, WAIT
from fastbyol.tools.clock import REST
from fastbyol.tools.instruments import EXCHANGE
from fastbyol.tools.profiling import profile
from fastbyol.weights.export import export
from fastbyol.weights.load import load_checkpoint_model, open_backbone

pytestmark = pytest.mark.gpu

GIB = 2**30
VAL_IMAGES = 48  # of 6 classes


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Replace conftest.py's photographs, which need an optional package, by a synthetic corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Return the result of a two-epoch float32 run of a ResNet-18, which torchvision can load."""
    config = Config(
        name="run",
        runs=str(tmp_path_factory.mktemp("runs")),
        device=DEVICE.type,
        precision="fp32",
        data=DataConfig(root=str(photos), batch_size=16, image_size_px=SIZE, threads=2, backend="native"),
        model=ModelConfig(backbone="resnet18", hidden_dim=64, projection_dim=32),
        optim=OptimConfig(epochs=2, warmup_epochs=0, base_lr=1.0),
        step=StepConfig(mode="eager"),
        log=LogConfig(log_every_steps=1, trackers=[]),
        checkpoint=CheckpointConfig(keep_last=1),
        knn=KnnConfig(every_epochs=1),
    )
    return train(config)


# --- train, evaluate, export ---


def test_run_logs_and_evaluates(trained):
    assert (trained.step, trained.total_steps, trained.stopped_by) == (9, 9, None)
    found = losses(trained.folder)
    assert sorted(found) == list(range(1, 10))
    assert all(0 < loss < 8 for loss in found.values())
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert summary["knn_best"] > 0.5  # six classes of waves with different directions and colors
    parts = summary["memory_bytes"]
    assert min(parts[name] for name in ("weights", "target", "momentum", "gradients", "batch")) > 0


@pytest.mark.parametrize(("name", "kind", "options"), [("knn", KnnEval, {}), ("linear", LinearEval, {"epochs": 20})])
def test_evaluation_matches_the_cpu(trained, tmp_path, name, kind, options):
    """Both devices use the same float32 features; up to 2 of 48 predictions may differ."""
    accuracy = {}
    for device in {DEVICE.type, "cpu"}:
        options = options | {
            "device": device,
            "baselines": False,
            "threads": 2,
            "out": str(tmp_path / f"{device}.json"),
        }
        accuracy[device] = evaluate(name, kind(run=str(trained.folder), **options))["rows"][BYOL_ROW]["top1"]
    assert accuracy[DEVICE.type] > 0.5
    assert abs(accuracy[DEVICE.type] - accuracy["cpu"]) <= 2 / VAL_IMAGES + 1e-6


def test_features_match_those_of_the_cpu(trained, photos, tmp_path, monkeypatch):
    """From a compiled network, with a short last batch, and from `fastbyol embed`.

    Convolutions in TF32 change a unit vector by about 1e-3.
    """
    monkeypatch.setattr(extraction, "COMPILE_IMAGES", 1)
    monkeypatch.setattr(extraction, "BATCH", 20)  # of 48 images
    found = {}
    for device, compiles in ((torch.device("cpu"), False), (DEVICE, False), (DEVICE, True)):
        backbone = set_num_views(load_checkpoint_model(trained.folder).model.online.backbone, 1)
        context = EvalContext(size=SIZE, device=device, dtype=torch.float32, threads=2, compiles=compiles)
        backbone = backbone.to(device, memory_format=torch.channels_last)
        features = extraction.extract_features(backbone, open_split(photos, "val"), context, None)
        found[device.type, compiles] = features.unit.float().cpu()
    expected = found.pop(("cpu", False), None)
    for key, unit in found.items():
        assert (unit - expected).abs().max() < 1e-2, key
    options = {"run": str(trained.folder), "images": str(photos / "val"), "device": DEVICE.type, "threads": 2}
    out = embed(EmbedConfig(**options, out=str(tmp_path / "out"), shard_images=20))
    written = torch.from_numpy(np.concatenate([np.load(path) for path in sorted(out.glob("*.npy"))])).float()
    assert (torch.nn.functional.normalize(written) - expected).abs().max() < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "torchvision"])
def test_exported_backbone_reproduces_the_features(trained, tmp_path, form):
    """GPU and CPU features agree to 1e-3 of the largest: cuDNN's Winograd kernels round more."""
    out = tmp_path / {"safetensors": "b.safetensors", "torchvision": "b.pth"}[form]
    export(trained.folder, form, out)
    backbone = open_backbone(out) if form == "safetensors" else torchvision.models.resnet18()
    if form == "torchvision":
        backbone.fc = torch.nn.Identity()
        backbone.load_state_dict(torch.load(out, weights_only=True))
    images = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    model = load_checkpoint_model(trained.folder).model
    expected = set_num_views(model.online.backbone, 1).eval()(images)
    for device in {DEVICE, torch.device("cpu")}:
        actual = backbone.eval().to(device)(images.to(device)).cpu()
        assert (actual - expected).abs().max() < 1e-3 * expected.abs().max(), device


# --- memory ---


def peak_step_bytes(config, images):
    """Return the peak memory of a step with `images` images, including the network."""
    release_memory()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    options = {"width": config.model.width}
    step = Network(config.model.backbone, **options).step("eager", "bf16", batch=images)
    step(0, new_batch(0, step.dtype, images))
    torch.cuda.synchronize(DEVICE)
    return torch.cuda.max_memory_allocated(DEVICE) - before


@needs_cuda
def test_automatic_batch_size_fits_and_four_times_it_does_not(make_config):
    """The batch uses at least a quarter of 1 GiB; workspaces and fragmentation take a part."""
    config = make_config(
        precision="bf16",
        data={"batch_size": "auto", "image_size_px": SIZE},
        model={"hidden_dim": 64, "projection_dim": 32},
        step={"mode": "eager"},
    )
    with memory_limit(GIB):
        size = batch_size.find_batch_size(
            config, DEVICE, World(), build_model(config.model, config.data.image_size_px, 0)
        )
        assert size >= 4
        assert size & (size - 1) == 0
        assert GIB / 4 < peak_step_bytes(config, size) < GIB
        with pytest.raises(torch.OutOfMemoryError):
            peak_step_bytes(config, 4 * size)


@needs_cuda
def test_automatic_batch_size_is_limited_by_the_dataset(make_config, capsys):
    config = make_config(
        data={"batch_size": "auto"},
        optim={"epochs": 2, "warmup_epochs": 0, "base_lr": 2.0},
        step={"mode": "eager"},
        knn={"every_epochs": 0},
    )
    with memory_limit(GIB // 2):
        result = train(config)
    assert (
        "data.batch_size=auto: 64; the peak learning rate is 0.5 (optim.base_lr * 64 / 256)" in capsys.readouterr().out
    )
    assert (result.step, result.total_steps) == (2, 2)


@needs_cuda
def test_out_of_memory_error_is_one_line_with_remedies(make_config):
    """64 images of 160 px need more than 1 GiB, but the weights fit."""
    config = make_config(
        data={"batch_size": 64, "image_size_px": 160},
        model={"width": 1.0},
        step={"mode": "eager"},
        knn={"every_epochs": 0},
    )
    with memory_limit(3 * GIB // 8), pytest.raises(RunError) as caught:
        train(config)
    text = str(caught.value)
    assert text.startswith("out of GPU memory: ")
    assert "\n" not in text
    for remedy in ("data.batch_size (auto finds the largest)", "step.micro_batches", "step.activation_checkpointing"):
        assert remedy in text
    assert text.endswith("lower data.image_size_px; there is no checkpoint yet")


# --- profile ---


@contextmanager
def small_peaks(monkeypatch):
    """Measure the machine's peaks on small problems, since this test does not check them."""
    with monkeypatch.context() as patch:
        patch.setattr("fastbyol.tools.roofline._PEAK_SIDES", {"cpu": (128,), "cuda": (1024,)})
        patch.setattr("fastbyol.tools.roofline._PEAK_BYTES", {"cpu": 2**16, "cuda": 2**24})
        yield


def test_profile_parts_add_up_to_the_step(make_config, monkeypatch, tmp_path):
    """The parts cover the whole stream, so their sum is the step time, and spans cost little."""
    config = make_config(data={"backend": "native", "image_size_px": SIZE}, step={"mode": "eager"})
    with small_peaks(monkeypatch):
        result = profile(config, steps=20 if DEVICE.type == "cuda" else 3, out=tmp_path)
    ratio = result["parts_over_step"]
    assert 0.7 < ratio["p50"] < 1.3
    by = {row["part"]: row["mean_ms"] for row in result["parts"]}
    assert sum(by.values()) == pytest.approx(result["marked_step_ms"]["mean_ms"])
    worked = [WAIT, TARGET, ONLINE, BACKWARD, "LARS + target", REST] + ([COPY] if DEVICE.type == "cuda" else [])
    assert all(by[part] > 0 for part in worked)
    assert by[EXCHANGE] == 0
    # Once per step the native loader waits for its pinned memory; the step itself never waits.
    assert result["host_syncs_per_step"] == (1 if DEVICE.type == "cuda" else 0)
    assert (tmp_path / "profile.html").exists()
