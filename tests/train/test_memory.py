"""Memory breakdown of a step, and automatic batch size."""

import gc
import json

import pytest
import torch
from torch import nn

from fastbyol import batch_size
from fastbyol.api import train
from fastbyol.batch_size import batch_bytes, find_batch_size
from fastbyol.build import build_model
from fastbyol.config import ModelConfig
from fastbyol.errors import InputError
from fastbyol.optim import build_optimizer
from fastbyol.runtime import memory
from fastbyol.runtime.distributed import World
from fastbyol.runtime.memory import SavedTensorBytes, measure_memory

CPU = torch.device("cpu")
GIB = 2**30


def test_saved_bytes_match_a_hand_count():
    network = nn.Sequential(nn.Linear(100, 50), nn.Sigmoid(), nn.Linear(50, 10))
    x = torch.randn(8, 100)
    with SavedTensorBytes(network) as saved:
        network(x).sum().backward()
    # The input and the output of the sigmoid, which the sigmoid and the second layer share. Weights
    # do not count.
    assert saved.total == 4 * (8 * 100 + 8 * 50)


def test_saved_bytes_are_zero_without_gradients():
    network = nn.Linear(4, 4)
    saved = SavedTensorBytes(network)
    with saved, torch.no_grad():
        network(torch.randn(2, 4))
    network(torch.randn(2, 4))
    assert saved.total == 0


@pytest.mark.parametrize(("name", "states"), [("lars", 1), ("sgd", 1), ("adamw", 2)])
def test_memory_breakdown_of_a_step(make_config, name, states):
    config = make_config(optim={"name": name, "base_lr": 0.01})
    model = build_model(config.model, 32, 0)
    lr, tau = torch.zeros(()), torch.ones(())
    optimizer = build_optimizer(config.optim, model, model.target_pairs(), lr, tau)
    with SavedTensorBytes(model) as saved:
        model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)).loss.backward()
    optimizer.step()
    parts = measure_memory(model, optimizer, batch_bytes(config, 4, CPU, torch.float32), CPU, saved)
    online = sum(p.numel() for m in (model.online, model.predictor) for p in m.parameters())
    target = sum(p.numel() for p in model.target.parameters())
    norms = [m for m in model.modules() if hasattr(m, "running_mean")]
    buffers = sum(8 * m.num_features + 8 for m in norms)
    assert parts.gradients == 4 * online
    assert parts.weights + parts.target == 4 * (online + target) + buffers
    step_counters = 4 * len(list(optimizer.state))  # Adam's are tensors
    assert parts.momentum - 4 * states * online in (0, step_counters)
    assert parts.batch == 4 * 2 * 4 * 3 * 32 * 32 * 4  # 4 slots, 2 views, 4 images
    assert parts.total == sum(
        getattr(parts, f) for f in ("weights", "target", "momentum", "gradients", "activations", "batch")
    )
    text = str(parts)
    assert all(word in text for word in ("weights", "target", "momentum", "activations", "batch", "MiB"))


@pytest.mark.slow
def test_run_reports_its_memory_breakdown(make_config, capsys):
    result = train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0}))
    parts = json.loads((result.folder / "summary.json").read_text())["memory_bytes"]
    assert "peak memory of a step, MiB" in capsys.readouterr().out
    assert min(parts.values()) > 0
    assert parts["activations"] > parts["batch"] / 4  # more than the pixels of one batch


@pytest.mark.slow
def test_predicted_bytes_match_a_large_step(make_config):
    """The extrapolation from 4 and 8 images matches a step of 64."""
    config = make_config(data={"batch_size": "auto"})
    model = build_model(config.model, 32, 0).to(memory_format=torch.channels_last)
    low, high, large = (batch_size._trial(model, config, n, CPU) for n in (4, 8, 64))
    assert low + (high - low) / 4 * 60 == pytest.approx(large, rel=0.01)


def found(config, world=None):
    """Return the batch size that fits, for a new model."""
    return find_batch_size(config, CPU, world or World(), build_model(config.model, config.data.image_size_px, 0))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
def test_automatic_batch_size_is_the_largest_power_of_two_that_fits(make_config, monkeypatch, parts):
    config = make_config(data={"batch_size": "auto"}, step={"micro_batches": parts})
    sizes = []
    for free in (0.2 * GIB, 0.4 * GIB, 0.8 * GIB):
        monkeypatch.setattr(batch_size, "free_bytes", lambda device, free=free: int(free))
        sizes.append(found(config))
    assert all(size & (size - 1) == 0 for size in sizes)
    assert sizes[0] < sizes[1] < sizes[2] <= 8 * sizes[0]
    model = build_model(config.model, 32, 0).to(memory_format=torch.channels_last)
    kept = batch_size._trial(model, config, sizes[0] // parts, CPU)
    whole = kept + batch_bytes(config, sizes[0], CPU, torch.bfloat16)
    assert whole < 0.2 * GIB  # fits
    assert 2 * whole + batch_size.fixed_bytes(model, config) > 0.85 * 0.2 * GIB * 0.8  # twice as much is near the limit


def test_automatic_batch_size_fails_if_nothing_fits(make_config, monkeypatch):
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"data.batch_size=auto: 2 images need about .* GiB, 0.0 GiB are free"):
        found(make_config(data={"batch_size": "auto"}))


def test_ranks_of_one_machine_share_its_memory(make_config, monkeypatch):
    config = make_config(data={"batch_size": "auto"})
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: GIB // 2)
    alone = found(config)
    assert found(config, World(0, 8, local_size=4)) == alone // 4


def test_automatic_batch_size_scales_the_rate_and_survives_a_resume(make_config, monkeypatch, capsys):
    """72 images allow a batch of 64. A resume keeps this size, whatever memory is free."""
    options = {"optim": {"epochs": 2, "warmup_epochs": 0, "base_lr": 2.0}, "knn": {"every_epochs": 0}}
    first = train(make_config(data={"batch_size": "auto"}, **options))
    output = capsys.readouterr().out
    assert "data.batch_size=auto: 64; the peak learning rate is 0.5 (optim.base_lr * 64 / 256)" in output
    assert first.total_steps == 2
    lines = [json.loads(line) for line in (first.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] == pytest.approx(2.0 * 64 / 256)
    assert json.loads((first.folder / "config.json").read_text())["data"]["batch_size"] == 64
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 1000)
    options["optim"]["epochs"] = 3
    again = train(make_config(data={"batch_size": "auto"}, resume="auto", **options))
    assert (again.step, again.total_steps) == (3, 3)


def test_free_memory_is_plausible():
    assert 2**24 < memory.free_bytes(CPU) < 2**50


def test_cached_files_of_a_container_count_as_free(tmp_path):
    """The kernel counts them as used, but drops them when memory is needed."""
    assert memory.cgroup_free_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.cgroup_free_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 400\nactive_file 150\nshmem 50\n")
    assert memory.cgroup_free_bytes(tmp_path) == 650


def test_fixed_bytes_of_resnet50(make_config):
    """ResNet-50 has three float32 copies of 35.1 M weights and a target of 33 M."""
    with torch.device("meta"):
        model = build_model(ModelConfig(), 224, 0)
    config = make_config(optim={"name": "lars"})
    assert batch_size.fixed_bytes(model, config) / 1e6 == pytest.approx(4 * (3 * 35.1 + 33.0), rel=0.01)


def test_failed_trial_releases_its_memory(make_config, monkeypatch):
    """Leftover tensors would make smaller trials fail too (seen on a GPU, ending at 2 images)."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def activations():
        gc.collect()
        return sum(type(o) is torch.Tensor and o.numel() > 10_000 for o in gc.get_objects())

    config = make_config(precision="fp32")
    model = build_model(config.model, 32, 0)
    before = activations()
    monkeypatch.setattr("fastbyol.model.byol_loss", full)
    assert not batch_size._fits(model, config, 64, torch.device("cpu"))
    assert activations() == before
