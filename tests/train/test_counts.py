"""Ceilings for the cost of a step and of the loader, as counts that do not depend on machine noise.

Each number is a ceiling with its reason. A change that raises one must justify it; a change that
needs less lowers it.
"""

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.common import BATCH, TRAIN_IMAGES
from helpers.trainings import training_of
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

import fastbyol
import fastbyol.kernels
from fastbyol.config import Config, DataConfig
from fastbyol.data import rendering
from fastbyol.kernels.cpu.lars_ema import LarsEma
from fastbyol.tools.instruments import Loop
from fastbyol.tools.roofline import count_step

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
OURS = tuple(str(Path(module.__file__).parent) for module in (fastbyol, fastbyol.kernels))


@pytest.fixture
def loop(make_config):
    """Yield the loop of a float32 ResNet-18, a precision that every CPU supports."""
    loop = Loop(training_of(make_config(precision="fp32")))
    yield loop
    loop.close()


class Calls(TorchDispatchMode):
    """Count operators, except views and allocations of uninitialized memory."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._overloadpacket.__name__
        if not op.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.names[name] += 1
        return op(*args, **(kwargs or {}))


def test_operators_and_allocations_of_a_step(loop):
    batch = loop.cached_batch()
    for _ in range(3):
        loop.step(batch)
    with Calls() as calls:
        loop.step(batch)
    names = calls.names
    # 21 convolutions per network (20 of a ResNet-18 and the shortcut from 64 to 8 channels), each
    # called once for both views.
    assert names["convolution"] + names["mkldnn_convolution"] <= 42
    assert names["convolution_backward"] + names["mkldnn_convolution_backward"] <= 21
    # BatchNorm, max-pool, LARS and the target update are custom kernels. Of torch's 500 calls, 315
    # update BatchNorm's running statistics (7 for each of the 45 norms of both networks), 63 are
    # convolutions, and 4 copy the input of the strided convolution of 8 channels. The rest is
    # heads, loss and bookkeeping.
    assert sum(names.values()) <= 500, names.most_common()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop.step(batch)
    events = profiler.profiler.kineto_results.events()
    allocations = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    # One result per operator, and BatchNorm's output and statistics. Gradients are allocated again
    # at each step, since they are set to None. 3 are of the strided convolution of 8 channels. With
    # AVX2, oneDNN reorders 14 more weights than with AVX-512.
    assert len(allocations) <= 866
    assert names["_local_scalar_dense"] == 0  # no value is read by the host


def test_bytes_of_a_step():
    """ResNet-50 at 224 px in bfloat16: 978 MB per image, and 36 bytes per parameter to update.

    An image includes both views.
    """
    config = Config(data=DataConfig(batch_size=64, image_size_px=224))
    work = count_step(config, 64, torch.bfloat16)
    update = work.pop("update").bytes
    assert update <= 4 * (9 * 33_000_000) + 4 * 7 * 2_200_000
    assert sum(w.bytes for w in work.values()) / 64 <= 978e6


def test_update_is_one_call(loop, monkeypatch):
    """One call with two kernel passes updates all tensors of both networks."""
    calls = []
    update = LarsEma.__call__
    monkeypatch.setattr(
        LarsEma, "__call__", lambda self, *args, **more: calls.append(len(args[0])) or update(self, *args, **more)
    )
    loop.step(loop.cached_batch())
    assert len(calls) == 1
    assert calls[0] == sum(p.requires_grad for p in loop.training.model.parameters())


@pytest.mark.slow
def test_compiled_step_is_one_graph(make_config):
    training = training_of(make_config())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    forward = torch.compile(training.model.forward, backend=note, dynamic=False)
    for _ in range(3):
        forward(*(torch.randn(BATCH, 3, 32, 32) for _ in range(2)))
    assert len(graphs) == 1  # covers both networks and the loss, compiled once
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


def test_image_is_read_and_decoded_once_for_both_views(make_config, monkeypatch):
    training = training_of(make_config())
    read, decoded = [], []
    fetch, decode = training.loader.fetch, rendering.decode
    monkeypatch.setattr(training.loader, "fetch", lambda index: read.append(index) or fetch(index))
    monkeypatch.setattr(rendering, "decode", lambda *args: decoded.append(1) or decode(*args))
    steps = TRAIN_IMAGES // BATCH
    delivered = [index for batch in training.loader.batches(0, steps) for index in batch.indices.tolist()]
    assert sorted(read) == sorted(delivered)
    assert len(decoded) == len(delivered) == steps * BATCH


def test_python_calls_per_image_in_the_loader(make_config):
    """Counts fastbyol's Python calls per image in the loader's threads, which share the GIL.

    Calls inside `threading` are not counted: how often a thread waits depends on the machine.
    """
    config = make_config(data={"threads": 1, "readers": 1})
    training = training_of(config)
    for _ in training.loader.batches(0, 1):  # one-time initialization
        pass
    calls = Counter()

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            calls[frame.f_code.co_qualname] += 1

    threading.setprofile(count)
    try:
        steps = TRAIN_IMAGES // BATCH
        for _ in training.loader.batches(0, steps):
            pass
    finally:
        threading.setprofile(None)
    per_image = sum(calls.values()) / (steps * BATCH)
    assert calls["Worker.__call__"] == steps * BATCH
    assert per_image <= 37.1, [(name, n / steps / BATCH) for name, n in calls.most_common(40)]
