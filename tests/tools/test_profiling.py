"""`fastbyol profile` and `fastbyol bench`: measurements, and zero overhead when off."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.common import BATCH, HANG_S, ROOT
from helpers.trainings import training_of
from torch.profiler import ProfilerActivity

from fastbyol import cli, spans
from fastbyol.optim import Update
from fastbyol.spans import AUGMENT, BACKWARD, COPY, ONLINE, TARGET, WAIT
from fastbyol.tools import bench, profiling, references
from fastbyol.tools.clock import REST, Clock
from fastbyol.tools.instruments import EXCHANGE, Instruments, Loop
from fastbyol.tools.profiling import profile

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
PARTS = [WAIT, COPY, AUGMENT, TARGET, ONLINE, BACKWARD, EXCHANGE, "LARS + target", REST]


@pytest.fixture
def small_peaks(monkeypatch):
    monkeypatch.setattr("fastbyol.tools.roofline._PEAK_SIDES", {"cpu": (128,)})
    monkeypatch.setattr("fastbyol.tools.roofline._PEAK_BYTES", {"cpu": 2**16})


@pytest.fixture
def new_loop():
    """Return a factory of loops that are closed after the test."""
    loops = []

    def make(config):
        loops.append(Loop(training_of(config)))
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()


# --- the clock ---


def test_part_lasts_until_the_next_begins(monkeypatch):
    times = iter([0, 2, 5, 11, 20, 21, 30])
    monkeypatch.setattr("time.perf_counter_ns", lambda: 1_000_000 * next(times))
    clock = Clock(CPU)
    for part in (WAIT, REST, BACKWARD, REST, WAIT, REST):
        clock.mark(part)
    clock.close()
    assert clock.steps() == [{WAIT: 2, REST: 3 + 9, BACKWARD: 6}, {WAIT: 1, REST: 9}]


def test_spans_cover_every_part_in_order(make_config, new_loop):
    loop = new_loop(make_config())
    instruments = Instruments(loop.training)
    clock = instruments.clock()
    with instruments.recording(clock):
        loop()
    seen = [part for part, _ in clock._marks]
    assert [part for part in seen if part != REST] == [WAIT, TARGET, ONLINE, BACKWARD, "LARS + target"]
    assert seen[-1] == REST


def test_spans_of_micro_batches_and_other_optimizers(make_config, new_loop):
    loop = new_loop(make_config(step={"micro_batches": 2}, optim={"name": "adam", "base_lr": 1e-3}))
    instruments = Instruments(loop.training)
    clock = instruments.clock()
    with instruments.recording(clock):
        loop()
    seen = [part for part, _ in clock._marks if part != REST]
    assert seen == [WAIT, *[TARGET, ONLINE, BACKWARD] * 2, "optimizer + target"]
    assert instruments.update == "optimizer + target"


# --- zero overhead when off ---


def operators_of(call):
    """Return the number of calls of each torch operator and the bytes of each allocation."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    calls = {e.key: e.count for e in profiler.key_averages() if e.key not in PARTS and e.key != "[memory]"}
    events = profiler.profiler.kineto_results.events()
    return calls, sorted(e.nbytes() for e in events if e.name() == "[memory]")


@pytest.mark.parametrize("options", [{}, {"step": {"micro_batches": 2}}, {"model": {"target": "online"}}])
def test_instrumentation_does_not_change_the_step(make_config, new_loop, options):
    loop = new_loop(make_config(**options))
    batch = loop.cached_batch()
    for _ in range(2):
        loop.step(batch)
    before = operators_of(lambda: loop.step(batch))
    instruments = Instruments(loop.training)
    clock = instruments.clock()
    with instruments.recording(clock):
        clock.mark(WAIT)
        during = operators_of(lambda: loop.step(batch))
    after = operators_of(lambda: loop.step(batch))
    assert len(before[0]) > 20
    assert before == during == after
    assert spans._recorder is None


# --- profile ---


def test_profile_writes_page_figures_and_trace(make_config, tmp_path, small_peaks, log_lines):
    result = profile(make_config(precision="fp32"), steps=7, out=tmp_path / "p")
    assert json.loads((tmp_path / "p" / "profile.json").read_text()) == result
    assert [row["part"] for row in result["parts"]] == PARTS
    assert sum(row["mean_ms"] for row in result["parts"]) == pytest.approx(result["marked_step_ms"]["mean_ms"])
    assert sum(row["share"] for row in result["parts"]) == pytest.approx(1)
    by = {row["part"]: row for row in result["parts"]}
    assert all(by[part]["mean_ms"] > 0 for part in (WAIT, TARGET, ONLINE, BACKWARD, "LARS + target", REST))
    assert by[COPY]["mean_ms"] == by[AUGMENT]["mean_ms"] == by[EXCHANGE]["mean_ms"] == 0
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p95_ms"] for row in result["parts"])
    assert result["host_syncs_per_step"] == 0
    assert result["graph_breaks"] is result["recompilations"] is None  # an eager step has no graphs
    assert "host syncs a step: 0; not compiled" in log_lines
    threads = result["loader_threads"]
    assert all(threads[name] > 0 for name in ("read", "decode", "crop", "augment", "rest"))
    roof = result["roofline"]
    assert roof["mfu"] == pytest.approx(
        roof["flops"] / (result["step_ms"]["p50"] / 1e3) / roof["peak_flops_per_s"], rel=1e-6
    )
    assert roof["parts"][BACKWARD]["measured_ms"] == by[BACKWARD]["mean_ms"]
    # A step frees everything that its operators allocate, except what the next step needs.
    memory = result["memory"]
    assert max(memory["bytes"]) > 10 * abs(memory["bytes"][-1])
    trace = gzip.decompress((tmp_path / "p" / "trace.json.gz").read_bytes()).decode()
    names = {event.get("name") for event in json.loads(trace)["traceEvents"]}
    assert {WAIT, TARGET, ONLINE, BACKWARD, "LARS + target", REST} <= names
    page = (tmp_path / "p" / "profile.html").read_text()
    assert "aten::convolution_backward" in page and "online forward" in page and "data:image/png" in page
    assert any("the parts add up to" in line for line in log_lines)


def test_operators_are_assigned_to_their_part(make_config, tmp_path, small_peaks):
    """Uses float32, whose convolutions are oneDNN's on every CPU."""
    result = profile(make_config(precision="fp32"), steps=1, out=tmp_path / "p")
    by = {part: {row["name"]: row["calls"] for row in rows} for part, rows in result["operators"].items()}
    convolutions = 20  # in a ResNet-18, with three downsamplings
    assert by[TARGET]["aten::mkldnn_convolution"] == by[ONLINE]["aten::mkldnn_convolution"] == convolutions
    assert by[BACKWARD]["aten::convolution_backward"] == convolutions
    assert "aten::mkldnn_convolution" not in by[BACKWARD]
    assert "Optimizer.step#LARS.step" in by["LARS + target"]


def test_host_syncs_are_counted(make_config, tmp_path, small_peaks, monkeypatch):
    update = Update.__call__
    monkeypatch.setattr(Update, "__call__", lambda self: (self._tau.item(), update(self))[1])
    result = profile(make_config(), steps=1, out=tmp_path / "p")
    assert result["host_syncs_per_step"] == 1


@pytest.mark.slow
def test_compiled_step_is_profiled_as_two_graphs(make_config, tmp_path, small_peaks, monkeypatch):
    """Nothing is recompiled after the warmup; the compiler backend does not matter."""
    compiled = []
    real = torch.compile

    def compile_quickly(call, **options):
        compiled.append(call.__name__)
        return real(call, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    result = profile(make_config(step={"mode": "compile"}), steps=2, out=tmp_path / "p")
    by = {row["part"]: row["mean_ms"] for row in result["parts"]}
    assert compiled == ["forward", "target_projections", "online_loss"]
    assert min(by[TARGET], by[ONLINE], by[BACKWARD]) > 0
    assert (result["graph_breaks"], result["recompilations"]) == (0, 0)


def test_recompilations_are_counted():
    torch._dynamo.reset()
    call = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    call(torch.zeros(2))
    before = profiling._compilations()
    call(torch.zeros(2))
    assert profiling._compiler("compile", before)["recompilations"] == 0
    for size in (3, 4, 5):
        call(torch.zeros(2, size))
    assert profiling._compiler("compile", before)["recompilations"] == 3


def test_graph_breaks_are_counted():
    torch._dynamo.reset()
    before = profiling._compiler("compile", 0)["graph_breaks"]

    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    torch.compile(broken, backend="eager")(torch.zeros(2))
    assert profiling._compiler("compile", 0)["graph_breaks"] == before + 1


@pytest.mark.slow
def test_profile_and_bench_on_two_ranks(photos, tmp_path):
    """Exchange that does not overlap with backward is a separate part; one rank writes and logs."""
    words = [
        "--data.root",
        str(photos),
        "--data.batch_size",
        "16",
        "--data.image_size_px",
        "32",
        "--model.width",
        "0.125",
    ]
    words += ["--model.backbone", "resnet18", "--model.hidden_dim", "32", "--data.threads", "1"]

    commands = [
        ["profile", *words, "--steps", "2", "--out", str(tmp_path / "p")],
        ["bench", *words, "--steps", "2", "--rounds", "1", "--out", str(tmp_path / "b.json")],
        ["bench", *words, "--out", "/nowhere/b.json"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, str(ROOT / "tests/helpers/commands.py"), str(tmp_path / "commands.json")],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        codes = json.loads((tmp_path / f"{rank}.json").read_text())
        assert codes[:2] == [0, 0]
        assert codes[2] > 0
    assert done.stdout.count("wrote ") == 1
    by = {row["part"]: row["mean_ms"] for row in json.loads((tmp_path / "p" / "profile.json").read_text())["parts"]}
    assert min(by[EXCHANGE], by[BACKWARD]) > 0
    assert done.stdout.count("limit: ") == 1
    assert "2 x cpu" in json.loads((tmp_path / "b.json").read_text())["what"]
    assert done.stderr.count("there is no folder /nowhere") == 1


# --- bench ---


@pytest.mark.slow
def test_bench_measures_every_part_in_every_round(make_config, tmp_path, log_lines):
    out = tmp_path / "bench.json"
    result = bench.bench(make_config(), rounds=2, steps=3, out=out)
    assert json.loads(out.read_text()) == result
    rates = result["images_per_s"]
    assert {name: len(values) for name, values in rates.items()} == dict.fromkeys(
        ("loader", "step", "supervised", "whole", "plain"), 2
    )
    assert all(rate > 0 for values in rates.values() for rate in values)
    for k in range(2):
        assert result["step_over_bound"][k] == pytest.approx(rates["step"][k] / (3 / 8 * rates["supervised"][k]))
        assert result["step_over_plain"][k] == pytest.approx(rates["step"][k] / rates["plain"][k])
        assert result["whole_over_step"][k] == pytest.approx(rates["whole"][k] / rates["step"][k])
    assert result["limit"] == "cores"
    assert any("training" in line for line in log_lines)
    assert log_lines[-1] == f"limit: cores; {result['advice']}"


def test_rates_are_images_per_second(make_config, monkeypatch):
    """With a fake clock of 1 s per call; the supervised step counts both views as images."""
    monkeypatch.setattr(Loop, "timed", lambda self, calls, call=None: calls * 1.0)
    found = bench._measure(training_of(make_config()), rounds=1, steps=5)
    assert found.pop("supervised") == [2 * BATCH]
    assert found == {name: [BATCH] for name in ("loader", "step", "whole", "plain")}


def test_plain_byol_that_does_not_fit_is_left_out(make_config, monkeypatch, log_lines):
    def no_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "plain_step", lambda *args, **options: no_memory)
    training = training_of(make_config())
    measured = bench._measure(training, rounds=1, steps=1)
    assert "plain" not in measured
    assert any("plain PyTorch is not measured" in line for line in log_lines)
    result = {"images_per_s": measured, "limit": "cores", "advice": ""} | bench._ratios(measured)
    assert not any("plain" in line for line in bench.lines(result))


def test_supervised_step_learns(make_config):
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32)
    model = bench._supervised(training_of(make_config()))
    step = references.supervised_step(model, BATCH, CPU, torch.float32, "eager")
    losses = [float(step(images)) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.5  # six seeds fall from 7.0 to 1.7-2.2


def test_bound_uses_no_fastbyol_layers(make_config):
    """With fastbyol's BatchNorm, the bound would change with fastbyol's kernels."""
    for model in (bench._supervised(training_of(make_config())), bench._plain(training_of(make_config())).online):
        ours = [name for name, module in model.named_modules() if type(module).__module__.startswith("fastbyol")]
        assert ours == []
        assert type(model[0].bn1) is torch.nn.BatchNorm2d


def test_plain_byol_computes_the_loss_of_ours(make_config):
    """The same weights give the same loss, although one has a pass per view (to 2e-6, 8 seeds)."""
    config = make_config()
    training = training_of(config)
    plain, ours = bench._plain(training), training.model
    ours.online.backbone.load_state_dict(plain.online[0].state_dict())
    ours.online.projector.load_state_dict(plain.online[1].state_dict())
    ours.predictor.load_state_dict(plain.predictor.state_dict())
    ours.target.load_state_dict(ours.online.state_dict())
    views = [torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    assert float(plain(*views).detach()) == pytest.approx(float(ours(*views).loss.detach()), abs=1e-4)


def test_plain_step_learns_and_moves_the_target(make_config):
    torch.manual_seed(0)
    model = bench._plain(training_of(make_config()))
    step = references.plain_step(model, CPU, torch.float32, compiled=False)
    views = torch.randn(2, BATCH, 3, 32, 32).unbind()
    target = [p.clone() for p in model.target.parameters()]
    losses = [float(step(*views)) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5  # eight seeds fall from 3.3-4.7 to 1.0-1.8
    assert any(not torch.equal(p, q) for p, q in zip(model.target.parameters(), target, strict=True))


def rates(loader, step, whole, supervised=1000.0):
    measured = {"loader": [loader], "step": [step], "supervised": [supervised], "whole": [whole]}
    return {"images_per_s": measured} | bench._ratios(measured)


@pytest.mark.parametrize(
    ("given", "device", "limit"),
    [((300, 200, 190), "cuda", "step"), ((150, 200, 140), "cuda", "loader"), ((150, 200, 100), "cpu", "cores")],
)
def test_limit(given, device, limit):
    assert bench.limit(rates(*given), torch.device(device)) == limit


def advice_of(make_config, given, device="cuda", mode="compile", **options):
    training = training_of(make_config(**options))
    # The advice depends only on device and step mode.
    training.device = torch.device(device)
    training.step = SimpleNamespace(mode=mode)
    result = rates(*given)
    result["limit"] = bench.limit(result, training.device)
    return bench.advice(result, training)


def test_advice_names_the_setting_that_helps(make_config):
    native = {"data": {"backend": "native", "threads": 2}}
    slow = advice_of(make_config, (100, 350, 100), **native)
    assert "needs about 7 loader threads" in slow and "data.backend=dali" in slow
    assert "dct_scaling" in advice_of(make_config, (150, 200, 100), device="cpu", mode="eager")
    packed = {"data": {"dct_scaling": True}}
    assert "fastbyol pack" in advice_of(make_config, (150, 200, 100), device="cpu", mode="eager", **packed)
    assert "lower data.threads" in advice_of(make_config, (400, 350, 300), **native)
    assert "precision=fp32" in advice_of(make_config, (900, 200, 199), precision="fp32", **native)
    assert "step.mode=compile" in advice_of(make_config, (900, 200, 199), mode="eager", **native)
    assert "cuda_graph" in advice_of(make_config, (900, 200, 199), **native)
    assert "no setting" in advice_of(make_config, (900, 370, 369), **native)
    assert "the step is 98% of the time" in advice_of(make_config, (9000, 200, 196), device="cpu", mode="eager")


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "--steps", "0"], "--steps 0: must be at least 1"),
        (["bench", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (
            ["bench", "--out", "/nowhere/b.json"],
            "--out /nowhere/b.json: cannot be written: there is no folder /nowhere",
        ),
        (["profile", "--out", "/dev/null/p"], "--out /dev/null/p: cannot be written"),
        (["bench", "--data.batch_size", "100"], "72 images"),
    ],
)
def test_user_errors_are_one_line(photos, capsys, arguments, message):
    code = cli.main([*arguments[:1], "--data.root", str(photos), *arguments[1:]])
    errors = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.slow
def test_profile_and_bench_commands(photos, tmp_path, capsys, small_peaks):
    words = [
        "--data.root",
        str(photos),
        "--data.batch_size",
        "8",
        "--data.image_size_px",
        "32",
        "--model.width",
        "0.125",
    ]
    words += ["--model.backbone", "resnet18", "--model.hidden_dim", "32", "--data.threads", "1"]
    assert cli.main(["profile", *words, "--steps", "2", "--out", str(tmp_path / "p")]) == 0
    assert cli.main(["bench", *words, "--steps", "1", "--rounds", "1", "--out", str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "backward" in out and "3/8 of supervised" in out
    assert (Path(tmp_path) / "b.json").exists()
