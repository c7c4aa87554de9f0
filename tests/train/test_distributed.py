"""Multiple ranks with gloo on the CPU: equivalence to one rank, and one message per failure."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from helpers.common import BATCH, losses
from helpers.stopping import stop_after
from helpers.torchrun import torchrun as start

from fastbyol.api import train
from fastbyol.build import build_model
from fastbyol.config import DistributedConfig, ProbeConfig
from fastbyol.data import build_loader, open_split
from fastbyol.errors import InputError
from fastbyol.parallel import data_parallel, sync_batch_norm
from fastbyol.runtime import checkpoint, distributed
from fastbyol.runtime.distributed import StopConsensus, World, world_from_environment


def torchrun(tmp_path, configs, *sabotage, ranks=2, restarts=0):
    """Train the configs one after another on `ranks` ranks; return the finished process."""
    path = tmp_path / "configs.json"
    path.write_text(json.dumps([config.to_dict() for config in configs]))
    return start("ranks.py", path, *sabotage, ranks=ranks, restarts=restarts)


def options(name, **changes):
    """Return config options of 20 float32 steps, with a low rate that does not amplify rounding."""
    sections = {
        "name": name,
        "precision": "fp32",
        "optim": {"epochs": 5, "warmup_epochs": 1, "base_lr": 0.02},
        "knn": {"every_epochs": 0},
        "checkpoint": {"every_epochs": 5},
    }
    for key, value in changes.items():
        sections[key] = sections[key] | value if isinstance(value, dict) and key in sections else value
    return sections


# Compiled and eager code round differently. With ReLUs, a value may fall on the other side of the
# kink, and the runs diverge, on one rank or two. This network has smooth activations.
SMOOTH = {"model": {"backbone": "test_efficientnet", "width": 1.0}}


def largest_gap(a, b):
    assert sorted(a) == sorted(b)
    return max(abs(a[step] - b[step]) for step in a)


@pytest.mark.slow
def test_two_ranks_match_one_rank(make_config, tmp_path):
    """Losses of 20 steps agree to 1e-5.

    With bf16 gradients or per-rank BatchNorm statistics, they are close but not equal.
    """
    own = {"distributed": DistributedConfig(sync_bn_ranks=1)}
    short = {"distributed": DistributedConfig(gradient_dtype="bf16")}
    two = [
        make_config(**options("two")),
        make_config(**options("own", **own)),
        make_config(**options("short", **short)),
        make_config(**options("compiled", step={"mode": "compile"}, **SMOOTH)),
        make_config(**options("parts", step={"micro_batches": 2})),
        # All ranks evaluate, and rank 0 saves the best checkpoint. The online classifier learns
        # from the images of all ranks.
        make_config(**options("watched", knn={"every_epochs": 2}, probe=ProbeConfig(enabled=True))),
    ]
    done = torchrun(tmp_path, two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks on cpu") == 6  # only one rank logs
    one = train(make_config(**options("one", probe=ProbeConfig(enabled=True))))
    runs = {config.name: losses(Path(config.runs) / config.name) for config in two}
    exact = losses(one.folder)
    assert len(exact) == 20
    assert largest_gap(runs["two"], exact) < 1e-5
    assert largest_gap(runs["compiled"], losses(train(make_config(**options("smooth", **SMOOTH))).folder)) < 1e-5
    assert largest_gap(runs["watched"], exact) < 1e-5
    watched = Path(two[0].runs) / "watched"
    lines, lines_of_one = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (watched, one.folder)
    )
    assert [line["kind"] for line in lines].count("knn") == 3  # after epochs 2, 4 and 5
    epochs, epochs_of_one = ([line for line in part if line["kind"] == "probe"] for part in (lines, lines_of_one))
    assert len(epochs) == 5
    for mine, other in zip(epochs, epochs_of_one, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert (mine["top1"], mine["top5"]) == (other["top1"], other["top5"])
    assert (watched / "checkpoints" / "best.pt").exists()
    parts = train(make_config(**options("parts of one", step={"micro_batches": 2})))
    assert largest_gap(runs["parts"], losses(parts.folder)) < 1e-5
    first_steps = [{step: run[step] for step in range(1, 7)} for run in (exact, runs["short"], runs["own"])]
    assert 2e-6 < largest_gap(first_steps[1], first_steps[0]) < 0.05
    assert 1e-3 < largest_gap(first_steps[2], first_steps[0]) < 0.5
    states = [
        checkpoint.load(Path(two[0].runs) / name / "checkpoints" / "step_00000020.pt")["model"]
        for name in ("one", "two")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.allclose(states[0][k], states[1][k], atol=1e-4) for k in states[0])


@pytest.mark.slow
def test_batch_norm_groups_match_micro_batches(make_config, tmp_path):
    """With statistics over ranks {0, 1} and {2, 3}, losses equal those of two micro-batches."""
    groups = make_config(**options("groups", distributed=DistributedConfig(sync_bn_ranks=2)))
    done = torchrun(tmp_path, [groups], ranks=4)
    assert done.returncode == 0, done.stderr
    halves = train(make_config(**options("halves", step={"micro_batches": 2})))
    whole = train(make_config(**options("whole")))
    found = losses(Path(groups.runs) / "groups")
    assert len(found) == 20
    assert largest_gap(found, losses(halves.folder)) < 1e-5
    assert largest_gap(found, losses(whole.folder)) > 1e-3


@pytest.mark.slow
def test_automatic_batch_size_on_two_ranks(make_config, tmp_path):
    """Two ranks find the same size as one rank: the largest power of two up to 72 images."""
    short = {"data": {"batch_size": "auto"}, "optim": {"epochs": 4, "warmup_epochs": 0, "base_lr": 0.02}}
    config = make_config(**options("auto", **short))
    done = torchrun(tmp_path, [config])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data.batch_size=auto: 64") == 1
    one = train(make_config(**options("one", **short)))
    assert largest_gap(losses(Path(config.runs) / "auto"), losses(one.folder)) < 1e-5


@pytest.mark.slow
def test_resume_with_another_number_of_ranks(make_config, tmp_path, monkeypatch):
    """SIGTERM on one of two ranks saves a checkpoint; one rank resumes it, then two ranks.

    The losses equal those of an uninterrupted run.
    """
    whole = train(make_config(**options("whole")))
    config = make_config(**options("moved"))
    first = torchrun(tmp_path, [config], "sigterm", 1, 5)
    assert first.returncode == 0, first.stderr
    folder = Path(config.runs) / "moved"
    saved = checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints")[-1])["step"]
    assert saved in (6, 7)  # the current step or the next one, when all ranks know of the signal
    assert f"stopped after step {saved} of 20" in first.stdout
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        second = train(dataclasses.replace(config, resume="auto"))
    assert second.step == saved + 4
    third = torchrun(tmp_path, [dataclasses.replace(config, resume="auto")])
    assert third.returncode == 0, third.stderr
    assert f"steps {saved + 4} to 20" in third.stdout
    assert largest_gap(losses(folder), losses(whole.folder)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "rank", "message"),
    [
        ("bad", 1, r"fastbyol: error: rank 1: too many bad images"),
        ("kill", 1, r"fastbyol: error: rank 0 lost contact with another rank"),
        ("kill", 0, r"fastbyol: error: rank 1 lost contact with another rank"),
    ],
)
def test_failure_of_one_rank_ends_all_with_one_message(make_config, tmp_path, what, rank, message):
    done = torchrun(tmp_path, [make_config(**options("failed"))], what, rank, 6)  # distributed.timeout_s is 1,800
    assert done.returncode != 0
    assert done.stderr.count("fastbyol: error") == 1, done.stderr
    assert message in done.stderr
    # The only traceback is torchrun's report.
    assert done.stderr.count("Traceback (most recent call last)") == done.stderr.count("ChildFailedError: ") == 1


@pytest.mark.slow
def test_torchrun_restarts_from_the_newest_checkpoint(make_config, tmp_path):
    config = make_config(**options("again", checkpoint={"every_epochs": 1}))
    done = torchrun(tmp_path, [config], "once", 1, 10, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "steps 8 to 20" in done.stdout
    whole = train(make_config(**options("whole")))
    assert largest_gap(losses(Path(config.runs) / "again"), losses(whole.folder)) < 1e-5


@pytest.mark.slow
def test_config_error_is_reported_once(make_config, tmp_path):
    config = make_config(**options("odd", data={"batch_size": 9}))
    done = torchrun(tmp_path, [config])
    assert done.returncode != 0
    assert done.stderr.count("fastbyol: error") == 1
    assert "data.batch_size=9 cannot be split into 2 ranks x step.micro_batches=1" in done.stderr


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 1), (4, 1), (2, 4)])
def test_shards_partition_the_batch(photos, make_config, ranks, parts):
    """The union of all ranks' micro-batches has the images and views of one rank's micro-batch."""
    folder = open_split(photos, "train")
    config = make_config().data

    def batches(shard):
        loader = build_loader(config, folder, seed=3, device=torch.device("cpu"), dtype=torch.float32, shard=shard)
        assert len(loader) == len(folder) // BATCH
        return [(b.indices.clone(), b.views[0].clone(), b.views[1].clone()) for b in loader.batches(2, 7)]

    whole = batches(None)
    ours = [batches(World(rank, ranks).shard(BATCH, parts)) for rank in range(ranks)]
    for k, batch in enumerate(whole):
        for i, tensor in enumerate(batch):
            for part, expected in enumerate(tensor.chunk(parts)):
                assert torch.equal(torch.cat([mine[k][i].chunk(parts)[part] for mine in ours]), expected)


def test_world_from_environment(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    assert world_from_environment() == World()
    monkeypatch.setenv("WORLD_SIZE", "1")  # some clusters set it, and RANK, without torchrun
    monkeypatch.setenv("RANK", "0")
    assert world_from_environment() == World()
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="WORLD_SIZE is set but .*torchrun"):
        world_from_environment()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert world_from_environment() == World(3, 4, 1, 2)


def test_batch_norm_groups_must_divide_the_ranks(make_config):
    model = build_model(make_config().model, 32, 0)
    with pytest.raises(InputError, match="distributed.sync_bn_ranks=3 does not divide the 4 ranks"):
        sync_batch_norm(model, DistributedConfig(sync_bn_ranks=3), World(0, 4))


def test_single_rank_stops_immediately():
    with StopConsensus(World()) as consensus:
        assert [consensus.agree(False), consensus.agree(True)] == [False, True]


@pytest.fixture
def group_of_one(monkeypatch, tmp_path):
    """A process group of this process alone."""
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"})
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_mean_over_ranks_traces_into_one_graph(group_of_one):
    """The collective is part of the compiled graph, forward and backward, without a graph break."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=record, fullgraph=True)
    def call(x):
        return distributed.mean_over_ranks(x * 2, group_of_one, 1).square().sum()

    x = torch.arange(3.0, requires_grad=True)
    call(x).backward()
    assert torch.equal(x.grad, 8 * x.detach())
    assert len(graphs) == 1


def test_ddp_times_only_its_first_iterations(group_of_one):
    """A capture may come at any later iteration, and must not contain the events of timings."""
    model = data_parallel(torch.nn.Linear(2, 2), DistributedConfig(), torch.device("cpu"), static_graph=True)
    for _ in range(101):
        model(torch.ones(1, 2)).sum().backward()
    assert model._get_ddp_logging_data()["iteration"] == 10  # the last one with timings
