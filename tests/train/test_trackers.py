"""Trackers: which run of a service they continue, how they fail, and what each service stores."""

import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from helpers.common import losses
from helpers.stopping import stop_after
from helpers.torchrun import torchrun

from fastbyol.api import train
from fastbyol.callbacks import Callback
from fastbyol.errors import InputError
from fastbyol.loop import train_loop
from fastbyol.runtime import checkpoint
from fastbyol.runtime.distributed import World
from fastbyol.trackers.base import Tracker
from fastbyol.trackers.mlflow import MLflow
from fastbyol.trackers.trackio import Trackio
from fastbyol.trackers.wandb import Wandb

SHORT = {"optim": {"epochs": 2, "warmup_epochs": 0, "base_lr": 2.0}}  # 8 steps, a checkpoint after 4


class Service(Tracker):
    """A tracker whose service is a dict: id -> [(kind, step)], and how the run ended."""

    name, label = "service", "Service"
    runs: dict[str, list]
    fails_in = ""

    def start(self, run, known):
        self.maybe_fail("start")
        self.lines = self.runs.setdefault(known or f"id{len(self.runs)}", [])
        return known or f"id{len(self.runs) - 1}"

    def log(self, run, kind, step, values):
        self.maybe_fail("log")
        self.lines.append((kind, step))

    def finish(self, summary, status):
        self.maybe_fail("finish")
        self.lines.append((status, summary.get("steps")))

    def maybe_fail(self, where):
        if self.fails_in == where:
            raise ConnectionError(101, "Network is unreachable")


@pytest.fixture
def service(monkeypatch):
    """Return a class of trackers with an empty service."""
    return type("Service", (Service,), {"runs": {}})


class Crash(Callback):
    """Raises in a step, as a killed run would end without its later checkpoint."""

    def __init__(self, at):
        self.at = at

    def on_metrics(self, run, kind, step, values):
        if step == self.at:
            raise RuntimeError("crash")


def crash(config, tracker, at):
    with pytest.raises(RuntimeError, match="^crash$"):
        train_loop(config, [tracker, Crash(at)])


def lines(first, last):
    return [("train", step) for step in range(first, last + 1)]


def test_resumed_run_continues_the_same_run_without_repeating_lines(make_config, service):
    config = make_config(resume="auto", **SHORT)
    crash(config, service(), 7)
    crash(config, service(), 6)  # its log has steps 5 and 6 only, the service has 7
    assert service.runs == {"id0": [*lines(1, 7), ("failed", None), ("failed", None)]}
    train_loop(config, [service()])
    assert service.runs == {"id0": [*lines(1, 7), ("failed", None), ("failed", None), ("train", 8), ("finished", 8)]}


def test_run_without_a_checkpoint_continues_its_tracker_run_only_if_it_is_resumed(make_config, service, monkeypatch):
    crash(make_config(resume="auto", **SHORT), service(), 2)
    crash(make_config(resume="auto", **SHORT), service(), 3)  # a job that was put into the queue again
    assert service.runs == {"id0": [*lines(1, 2), ("failed", None), ("train", 3), ("failed", None)]}
    crash(make_config(**SHORT), service(), 2)  # started again by hand
    assert list(service.runs) == ["id0", "id1"]
    monkeypatch.setattr("fastbyol.loop.world_from_environment", lambda: World(restarts=1))
    crash(make_config(**SHORT), service(), 3)
    assert service.runs["id1"] == [*lines(1, 2), ("failed", None), ("train", 3), ("failed", None)]


def test_branch_of_a_run_is_a_new_run_but_a_moved_run_is_not(make_config, service, tmp_path):
    folder = train_loop(make_config(**SHORT), [service()]).folder
    early = str(folder / "checkpoints" / "step_00000004.pt")
    assert torch.load(early, weights_only=True)["service"] == {"run": "run", "id": "id0"}
    train_loop(make_config(resume=early, name="branch", **SHORT), [service()])
    train_loop(make_config(resume=early, runs=str(tmp_path / "other disk"), **SHORT), [service()])
    assert service.runs["id1"] == [*lines(5, 8), ("finished", 8)]
    # Here the log of the first attempt is missing: its later lines are sent again.
    assert service.runs["id0"] == [*lines(1, 8), ("finished", 8), *lines(5, 8), ("finished", 8)]
    assert len(service.runs) == 2


def test_new_run_does_not_begin_if_a_tracker_cannot_start(make_config, service):
    tracker = service()
    tracker.fails_in = "start"
    text = "Service cannot start: Network is unreachable; fix this, or remove the tracker from log.trackers"
    with pytest.raises(InputError, match=f"^{text}$"):
        train_loop(make_config(resume="auto", **SHORT), [tracker])
    folder = Path(make_config().runs) / "run"
    assert losses(folder) == {}
    assert text in (folder / "train.log").read_text()


def test_resumed_run_continues_without_a_tracker_that_cannot_start(make_config, service, log_lines):
    config = make_config(resume="auto", **SHORT)
    crash(config, service(), 6)
    tracker = service()
    tracker.fails_in = "start"
    result = train_loop(config, [tracker])
    assert result.step == 8
    assert [line for line in log_lines if "Service" in line] == [
        "warning: Service cannot start: Network is unreachable; the run continues without it"
    ]
    assert service.runs == {"id0": [*lines(1, 6), ("failed", None)]}
    # The next attempt continues the same run of the service.
    longer = {"optim": SHORT["optim"] | {"epochs": 3}}
    train_loop(make_config(resume="auto", **longer), [service()])
    assert service.runs["id0"][-5:] == [*lines(9, 12), ("finished", 12)]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("log", "Service has failed: Network is unreachable; the run continues without it"),
        ("finish", "Service has failed at the end of the run: Network is unreachable"),
    ],
)
def test_failing_tracker_does_not_end_the_run(make_config, service, log_lines, where, message):
    tracker = service()
    tracker.fails_in = where
    result = train_loop(make_config(**SHORT), [tracker])
    assert [line for line in log_lines if "Service" in line] == [f"warning: {message}"]
    assert len(losses(result.folder)) == json.loads((result.folder / "summary.json").read_text())["steps"] == 8
    assert service.runs == {"id0": [] if where == "log" else lines(1, 8)}


def test_signal_ends_the_tracker_run_as_stopped(make_config, service, monkeypatch):
    stop_after(monkeypatch, 2)
    train_loop(make_config(**SHORT), [service()])
    assert service.runs == {"id0": [*lines(1, 2), ("stopped", 2)]}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
@pytest.mark.parametrize("folder", [False, True])
def test_missing_package_is_named_before_the_run_begins(make_config, monkeypatch, tmp_path, name, folder):
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here")])
    monkeypatch.delitem(sys.modules, name, raising=False)
    if folder:  # W&B writes to ./wandb, which Python could import
        (tmp_path / "here" / name).mkdir(parents=True)
    config = make_config(log={"trackers": [name]}, **SHORT)
    with pytest.raises(InputError, match=f"^log.trackers={name}: {name} is not installed: pip install {name}$"):
        train(config)
    assert not Path(config.runs).exists()


# The services


def wandb_records(path):
    """Yield the records of a .wandb file: a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := -at % 2**15) and left < 7:
            at += left  # a header does not cross blocks
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


class WandbStore:
    tracker = Wandb

    def __init__(self, monkeypatch, tmp_path):
        pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")

    def runs(self, folder):
        """Return the runs: name, settings, {step: [losses]}, summary and exit codes."""
        found = {}
        for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
            for record in wandb_records(path):
                kind = record.WhichOneof("record_type")
                if kind == "run":
                    config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                    run = found.setdefault(record.run.run_id, [record.run.display_name, config, {}, {}, []])
                    assert record.run.project == "fastbyol"
                elif kind == "history":
                    row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                    run[2].setdefault(row["_step"], []).append(row["train/loss"])
                elif kind == "summary":
                    run[3] |= {"/".join(i.nested_key) or i.key: i.value_json for i in record.summary.update}
                elif kind == "exit":
                    run[4].append(record.exit.exit_code)
        return [
            (name, c["optim"]["epochs"], s, json.loads(e["loss"]), codes) for name, c, s, e, codes in found.values()
        ]

    ended = ([1, 0],)


class MLflowStore:
    tracker = MLflow

    def __init__(self, monkeypatch, tmp_path):
        mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
        self.client = mlflow.MlflowClient

    def runs(self, folder):
        client, found = self.client(), []
        for run in client.search_runs([client.get_experiment_by_name("fastbyol").experiment_id]):
            steps = {}
            for metric in client.get_metric_history(run.info.run_id, "train/loss"):
                steps.setdefault(metric.step, []).append(metric.value)
            epochs = int(run.data.params["optim.epochs"])
            found.append((run.info.run_name, epochs, steps, run.data.metrics["summary/loss"], run.info.status))
        return found

    ended = ("FINISHED",)


class TrackioStore:
    tracker = Trackio

    def __init__(self, monkeypatch, tmp_path):
        reason = "trackio is not among the development tools: it needs Pillow below 13"
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        trackio = pytest.importorskip("trackio", reason=reason)
        for module in list(sys.modules.values()):  # they read the variable when they are imported
            if getattr(module, "__name__", "").startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
                monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
        self.trackio = trackio

    def runs(self, folder):
        from trackio.sqlite_storage import SQLiteStorage

        found = []
        for run in self.trackio.Api().runs("fastbyol"):
            steps, summary = {}, None
            for row in SQLiteStorage.get_logs("fastbyol", run.name, run_id=run.id):
                if "train/loss" in row:
                    steps.setdefault(row["step"], []).append(row["train/loss"])
                summary = row.get("summary/loss", summary)
            found.append((run.name.rpartition("-")[0], run.config["optim"]["epochs"], steps, summary, None))
        return found

    ended = (None,)


@pytest.mark.parametrize("store_of", [WandbStore, MLflowStore, TrackioStore])
def test_service_has_each_step_of_a_resumed_run_once(make_config, monkeypatch, tmp_path, store_of, log_lines):
    store = store_of(monkeypatch, tmp_path)
    name = store.tracker.name
    config = make_config(resume="auto", log={"trackers": [name]}, knn={"every_epochs": 0}, **SHORT)
    with pytest.raises(RuntimeError, match="^crash$"):
        train(config, [Crash(7)])
    folder = Path(config.runs) / "run"
    state = checkpoint.load(folder / "checkpoints" / "step_00000004.pt")
    assert state[name]["id"] == json.loads((folder / "trackers.json").read_text())[name]["id"]
    train(config)
    logged = {step: [pytest.approx(loss)] for step, loss in losses(folder).items()}
    assert list(logged) == list(range(1, 9))
    assert store.runs(folder) == [("run", 2, logged, logged[8][0], *store.ended)]
    assert not [line for line in log_lines if line.startswith("warning")]


def test_lost_mlflow_server_gives_one_warning(make_config, monkeypatch, tmp_path, log_lines):
    MLflowStore(monkeypatch, tmp_path)
    tracker = MLflow()

    def lost(*args, **kwargs):
        raise ConnectionError(101, "Network is unreachable")

    class Cut(Callback):
        def on_step(self, run, batch, output):
            tracker._client.log_batch = lost

        def on_metrics(self, run, kind, step, values):
            if tracker._pending:
                tracker._pending[-1].exception()  # wait for the thread

    result = train_loop(make_config(**SHORT), [tracker, Cut()])
    assert result.step == 8
    warnings = [line for line in log_lines if line.startswith("warning")]
    assert warnings == ["warning: MLflow has failed: Network is unreachable; the run continues without it"]


@pytest.mark.slow
def test_two_ranks_share_one_tracker_run(make_config, monkeypatch, tmp_path):
    store = WandbStore(monkeypatch, tmp_path)
    config = make_config(log={"trackers": ["wandb", "tensorboard"]}, knn={"every_epochs": 0}, **SHORT)
    (tmp_path / "configs.json").write_text(json.dumps([config.to_dict()]))
    done = torchrun("ranks.py", tmp_path / "configs.json", ranks=2)
    assert done.returncode == 0, done.stderr
    folder = Path(config.runs) / "run"
    assert len(list((folder / "tensorboard").iterdir())) == 1
    ((name, _, steps, _, ended),) = store.runs(folder)
    assert (name, ended) == ("run", [0])
    assert steps == {step: [pytest.approx(loss)] for step, loss in losses(folder).items()}
