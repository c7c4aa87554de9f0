"""Shipped configs: header, model, and two CPU training steps of a scaled-down copy."""

import dataclasses
import re

import pytest
import torch
from helpers.common import ROOT

from fastbyol import cli
from fastbyol.build import build_model
from fastbyol.cli import train_config
from fastbyol.data import build_loader, find_images
from fastbyol.settings.command_line import parse_command_line
from fastbyol.step import TrainStep
from fastbyol.tools.configs import read_header
from fastbyol.tools.plan import plan
from fastbyol.tools.roofline import meta_model

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EXPECTED = {
    "demo",
    "fashion_mnist",
    "cifar10_r18",
    "in100_r18",
    "imagenette_r18",
    *(f"imagenet_r50_{epochs}ep" for epochs in (100, 300, 1000)),
    *(f"imagenet_{name}_1000ep" for name in ("r50x2", "r200x2")),
    *(f"imagenet_r50_300ep_{gpu}_8gpu" for gpu in ("a100", "h100")),
}
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")
each = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def header(path):
    """Return the fields of the comment at the top of the file."""
    found = read_header(path.read_text())
    return {"title": found.title} | found.fields


def test_all_configs_exist():
    assert {path.stem for path in CONFIGS} == EXPECTED


@each
def test_header_is_complete(path):
    found = header(path)
    assert set(found) == {"title", "command", "hardware", "hours", "accuracy", "differs"}
    assert f"--config {path.stem}" in found["command"].split(" --data.root")[0]
    assert re.search(r"paper|solo-learn|lightly|README|docs/results.md", found["accuracy"])


@each
def test_header_says_what_differs_from_the_authors(path):
    """The network, BatchNorm's batch and the precision of the exchange."""
    config, differs = train_config(["--config", str(path)]), header(path)["differs"]
    assert differs.startswith("from the authors' code")
    assert ("instead of byol_resnet18" in differs) == (config.model.backbone == "resnet18")
    assert ("docs/exactness.md" in differs) == (config.model.backbone != "resnet18")
    images = config.data.batch_size // config.step.micro_batches
    small_batch = f"BatchNorm over {images} images instead of {config.data.batch_size}" in differs
    assert small_batch == (config.step.micro_batches > 1)
    assert ("in bf16" in differs) == (config.distributed.gradient_dtype == "bf16")
    assert ("gamma of each block starts at 1" in differs) == (config.model.zero_init_last is False)
    assert ("stem of 64 channels" in differs) == (config.model.stem_channels == 64)


def test_imagenette_is_the_authors_recipe():
    """README of byol/: their 1000-epoch preset with the changes for Imagenette."""
    config = train_config(["--config", str(ROOT / "configs" / "imagenette_r18.yaml")])
    optim = config.optim
    assert (config.model.backbone, config.data.image_size_px, config.data.batch_size) == ("byol_resnet18", 128, 256)
    assert (optim.epochs, optim.base_lr, optim.weight_decay, optim.tau_base) == (1000, 2.0, 1e-6, 0.996)
    assert (config.model.hidden_dim, config.model.projection_dim, config.probe.enabled) == (4096, 256, True)


@pytest.mark.slow
@each
def test_hours_match_the_plan(path):
    hours = header(path)["hours"]
    if measured := re.search(r"benchmarks/results/\w+\.csv", hours):
        assert (ROOT / measured[0]).exists()
        return
    match = re.fullmatch(r"([\d.]+) \(estimate: fastbyol plan (.*)\)", hours)
    words = match[2].split()
    assert words[:2] == ["--config", path.stem]
    call = parse_command_line(["plan", "--config", str(path), *words[2:]], cli.COMMANDS)
    found = plan(call.config, **dataclasses.asdict(call.options))
    assert float(match[1]) == pytest.approx(found["hours"], abs=0.05 if found["hours"] < 100 else 0.5)
    assert found["limit"] != "memory"
    assert f"{found['gpus']} x {found['device'].split('-')[0].upper()}" in header(path)["hardware"]


@each
def test_model_can_be_built(path):
    config = train_config(["--config", str(path)])
    assert config.name.replace("-", "_") == path.stem
    model = meta_model(config)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert config.data.batch_size % (8 * config.step.micro_batches) == 0


@pytest.mark.slow
@each
def test_two_steps_of_a_small_copy(path, photos):
    """The copy has a smaller model, batch and images, and a CPU's backend and step mode."""
    config = train_config(["--config", str(path)])
    parts = config.step.micro_batches
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            root=str(photos),
            classes=[],
            batch_size=4 * parts,
            image_size_px=32,
            threads=1,
            backend="auto",
        ),
        model=dataclasses.replace(config.model, width=0.125 * config.model.width, hidden_dim=32, projection_dim=16),
        # full-batch learning rate from the first step on
        optim=dataclasses.replace(config.optim, warmup_epochs=0, base_lr=config.optim.base_lr * 64 / parts),
        step=dataclasses.replace(config.step, mode="eager"),
    )
    images = find_images(config.data, "train")
    model = build_model(config.model, 32, config.seed).to(memory_format=torch.channels_last)
    step = TrainStep(model, config, len(images) // config.data.batch_size, CPU)
    loader = build_loader(config.data, images, seed=config.seed, device=CPU, dtype=step.dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1}
    for k, batch in enumerate(loader.batches(0, 2)):
        output = step(k, batch)
        assert 0 <= float(output.loss) <= 8
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
