"""CUDA code paths without a GPU: fakes of torch's CUDA objects, and fake tensors."""

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.common import BATCH
from helpers.steps import SIZE, new_batch, new_step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastbyol import step as step_module
from fastbyol.config import DataConfig, OptimConfig
from fastbyol.cuda_graph import CapturedStep
from fastbyol.data import build_loader, open_split
from fastbyol.data.device import deliver
from fastbyol.data.pack import pack
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.features import extract_features
from fastbyol.kernels.batch_norm import batch_norm
from fastbyol.optim import build_optimizer

CUDA = torch.device("cuda")


class Stream:
    """Fake of torch.cuda.Stream."""

    made = 0

    def __init__(self, *_):
        Stream.made += 1

    def wait_stream(self, other):
        pass


@pytest.fixture
def captures(monkeypatch):
    """Fake CUDA graphs for a step on the CPU, and return a list of each capture's options.

    A replay does nothing.
    """
    asked, current = [], Stream()

    class Graph:
        def replay(self):
            pass

    @contextlib.contextmanager
    def graph(graph, **options):
        asked.append(options)
        yield

    Stream.made = 0
    monkeypatch.setattr(step_module, "choose_step_mode", lambda *_: ("cuda_graph", "a test"))
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    for name, value in {
        "Stream": Stream,
        "current_stream": lambda *_: current,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return asked


def test_capture_is_thread_local_and_warmup_shares_its_stream(captures):
    """DALI's threads call CUDA during a capture, and the allocator has one pool per stream."""
    step = new_step()
    for k in range(6):
        step(k, new_batch(k))
    assert [options["capture_error_mode"] for options in captures] == ["thread_local"]
    assert captures[0]["stream"] is step._graph._stream
    assert Stream.made == 1


def test_ddp_is_built_in_the_stream_of_the_capture_and_warms_up_longer(captures, monkeypatch):
    """As torch's notes on CUDA graphs demand. Gradients and statistics are part of the graph."""
    streams, seen = [], []

    @contextlib.contextmanager
    def stream(stream):
        streams.append(stream)
        yield
        streams.pop()

    def prepare(model, *_):
        seen.extend(streams)
        return model.forward

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(step_module, "prepare_forward", prepare)
    step = new_step()
    assert seen == [step._graph._stream]
    step._graph = CapturedStep(step.compute, CUDA, ranks=2)
    for k in range(12):
        assert captures == []
        step(k, new_batch(k))
    assert len(captures) == 1


def test_dropped_graph_is_recaptured_without_warmup(captures):
    step = new_step()
    for k in range(3):
        step(k, new_batch(k))
    for captured in (1, 2):
        step(3, new_batch(3))
        step(4, new_batch(4))
        assert len(captures) == captured
        step._graph.drop()
        assert step._graph._graph is step._graph._output is None
    step.close()
    with pytest.raises(TypeError):
        step(4, new_batch(4))


def test_profile_drops_the_graph_before_instrumented_steps(make_config):
    from helpers.trainings import training_of

    training, dropped = training_of(make_config()), []
    graph = training.step._graph = SimpleNamespace(drop=lambda: dropped.append(1))
    with training.step.instrumented():
        assert training.step._graph is None
        assert dropped == [1]
    assert training.step._graph is graph


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_is_capturable_on_a_gpu(monkeypatch, name):
    options = {}
    monkeypatch.setattr(
        torch.optim, {"adam": "Adam", "adamw": "AdamW"}[name], lambda groups, lr, **o: options.update(o)
    )
    for device, capturable in ((torch.device("cpu"), False), (CUDA, True)):
        with FakeTensorMode():
            lr = torch.zeros((), device=device)
        build_optimizer(OptimConfig(name=name), nn.Linear(2, 2), [], lr, lr)
        assert options["capturable"] is capturable


def test_optimizer_state_moves_to_the_device():
    """Fused Adam reads its step counter, a 0-dim tensor, from device memory."""
    step = new_step(optim={"name": "adamw"})
    step(0, new_batch(0))
    state = step.state_dict()
    step.device = torch.device("meta")
    step.load_state_dict(state)
    moved = [value for values in step.optimizer.state.values() for value in values.values()]
    assert {value.ndim for value in moved} == {0, 1, 2, 4}
    assert {value.device.type for value in moved} == {"meta"}


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.names.append(f.overloadpacket.__name__)
        return f(*args, **(kwargs or {}))


def test_eager_cuda_batch_norm_uses_our_kernels():
    """Eager steps and data.batch_size=auto depend on it: other operators move 6x the bytes."""
    with FakeTensorMode(), Operators() as operators:
        x = torch.empty(8, 4, 3, 3, dtype=torch.bfloat16, device=CUDA).to(memory_format=torch.channels_last)
        weight, bias = (torch.empty(4, device=CUDA, requires_grad=True) for _ in range(2))
        y, mean, var = batch_norm(x.requires_grad_(), None, weight, bias, views=2, eps=1e-5, relu=True)
    assert (y.dtype, mean.shape, var.shape) == (torch.bfloat16, (2, 4), (2, 4))
    assert [n for n in operators.names if n.startswith("batch_norm")] == ["batch_norm_statistics", "batch_norm_apply"]


class Slots:
    """Fake of DeviceSlots that keeps the tensors on the host."""

    def __init__(self, *_):
        self.sent = []

    def fill(self, step, tensors):
        self.sent.append(tensors)
        return tensors

    def release(self, step):
        pass


@pytest.mark.parametrize("dim", [0, 1])
def test_batch_is_copied_as_one_dense_block(dim):
    """Copies of views that are not dense would go through pageable memory and be synchronous."""
    shape = [3, 5, 5, 3]
    shape.insert(dim, 2)
    block, slots = torch.randn(shape), Slots()
    (batch,) = deliver(0, block, torch.arange(3), torch.arange(3), slots, dim=dim)
    assert slots.sent[0][0] is block
    for v in range(2):
        assert torch.equal(batch.views[v], block.select(dim, v).permute(0, 3, 1, 2))


@pytest.mark.slow
def test_ffcv_batches_are_dense_with_pinned_labels(photos, tmp_path, monkeypatch):
    from fastbyol.data import ffcv

    pack(open_split(photos, "train"), tmp_path / "train.beton", mode="raw")
    config = DataConfig(root=str(tmp_path), batch_size=BATCH, image_size_px=SIZE, threads=1, backend="ffcv")
    loader = build_loader(
        config, open_split(tmp_path, "train"), seed=0, device=torch.device("cpu"), dtype=torch.float16
    )
    pinned, made = [], []
    monkeypatch.setattr(loader, "device", CUDA)
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: pinned.append(tuple(t.shape)) or t)
    monkeypatch.setattr(ffcv, "DeviceSlots", lambda *_: made.append(Slots()) or made[0])
    batches = list(loader.batches(0, 2))
    for views, labels, indices in made[0].sent:
        assert (tuple(views.shape), views.dtype) == ((BATCH, 2, SIZE, SIZE, 3), torch.float16)
        assert all(t.is_contiguous() for t in (views, labels, indices))
    assert pinned.count((BATCH,)) == 2 * len(batches)


def test_dali_readers_pin_pixels_decoded_on_the_host(photos, tmp_path, monkeypatch):
    """The thread that launches the step only starts the copies; readers pin the memory."""
    pytest.importorskip("nvidia.dali")
    from fastbyol.data import dali

    pack(open_split(photos, "train"), tmp_path / "train.beton", mode="raw")
    config = DataConfig(root=str(tmp_path), batch_size=BATCH, image_size_px=SIZE, threads=1, backend="dali")
    loader = build_loader(
        config, open_split(tmp_path, "train"), seed=0, device=torch.device("cpu"), dtype=torch.float32
    )
    monkeypatch.setattr(loader, "device", CUDA)
    threads = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: threads.append(threading.get_ident()) or t)
    steps = loader._read_steps(0, 1)
    (prepared,) = steps
    steps.close()
    assert len(threads) >= BATCH
    assert threading.get_ident() not in threads
    threads.clear()
    monkeypatch.setattr(Tensor, "to", lambda t, device, non_blocking: (t, device, non_blocking))
    decoder = object.__new__(dali.Decoder)
    decoder._device = CUDA
    assert decoder._to_device(prepared[0].pixels)[1:] == (CUDA, True)
    assert not threads


def test_evaluation_crops_are_copied_from_a_pinned_ring(photos, monkeypatch):
    """Two batches, each copied as one block of the network's dtype, unreadable images included."""
    from fastbyol.data import crops

    images, sent, pinned = open_split(photos, "val"), [], []
    options = {"size": SIZE, "fraction": 0.875, "batch_size": 4, "threads": 2, "dtype": torch.float16}
    expected = [(x.clone(), indices) for x, indices in crops.center_crops(images, **options, bad={6: "damaged"})]
    empty = torch.empty

    class Copying(Slots):
        def fill(self, step, tensors):
            sent.append(tensors)
            return [tensor.clone() for tensor in tensors]

    monkeypatch.setattr(crops, "DeviceSlots", Copying)
    monkeypatch.setattr(
        torch, "empty", lambda *shape, pin_memory, dtype: pinned.append(pin_memory) or empty(*shape, dtype=dtype)
    )
    monkeypatch.setattr(Tensor, "to", lambda tensor, device: tensor)
    actual = list(crops.center_crops(images, **options, bad={6: "damaged"}, device=CUDA))
    assert pinned == [True, True]
    assert all(tuple(x.shape) == (4, SIZE, SIZE, 3) and x.dtype == torch.float16 for (x,) in sent)
    assert [x.data_ptr() for (x,) in sent[:2]] * 2 == [x.data_ptr() for (x,) in sent[:4]]
    for (x, indices), (y, others) in zip(actual, expected, strict=True):
        assert torch.equal(x, y) and indices.tolist() == others.tolist()


@pytest.mark.parametrize(("least", "passes"), [(1, 1), (19, 0)])
def test_evaluation_compiles_a_network_that_sees_many_images(photos, monkeypatch, least, passes):
    """Once: a smaller batch, at the end or with an unreadable image, runs eagerly."""
    torch._dynamo.reset()
    compiled, runs = [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return lambda *args: runs.append(0) or graph(*args)

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = open_split(photos, "val")
    read = type(images).read
    monkeypatch.setattr(type(images), "read", lambda self, index: b"words" if index == 2 else read(self, index))
    monkeypatch.setattr("fastbyol.evaluation.features.BATCH", 5)
    monkeypatch.setattr("fastbyol.evaluation.features.COMPILE_IMAGES", least)
    compile_network = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_network(*args, **options, backend=backend))
    options = {"size": SIZE, "device": torch.device("cpu"), "dtype": torch.float32, "threads": 1}
    eager = extract_features(network, images, EvalContext(**options), None)
    features = extract_features(network, images, EvalContext(**options, compiles=True), None)
    assert torch.equal(features.unit, eager.unit) and torch.equal(features.length, eager.length)
    assert len(compiled) == passes
    assert len(runs) == 2 * passes  # of the batches of 4, 5, 5 and 3 images
    assert network.training


def test_a_network_that_does_not_compile_is_evaluated_eagerly(photos, monkeypatch, log_lines):
    torch._dynamo.reset()

    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = open_split(photos, "val")
    options = {"size": SIZE, "device": torch.device("cpu"), "dtype": torch.float32, "threads": 1}
    expected = extract_features(network, images, EvalContext(**options), None)
    monkeypatch.setattr("fastbyol.evaluation.features.BATCH", 6)
    monkeypatch.setattr("fastbyol.evaluation.features.COMPILE_IMAGES", 1)
    compile_network = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_network(*args, **options, backend=backend))
    for _ in range(2):  # the second pass does not try again
        found = extract_features(network, images, EvalContext(**options, compiles=True), None)
    assert (found.unit - expected.unit).abs().max() < 1e-3
    (line,) = log_lines
    assert line.startswith("warning: the network does not compile here, so it runs eagerly: ")
    assert "no compiler" in line


def test_evaluation_does_not_compile(photos, monkeypatch):
    """Multi-rank training compiles the backbone's modules, but kNN runs them eagerly.

    Otherwise eval mode and the smaller last batch would each compile again.
    """
    torch._dynamo.reset()
    compiled = []

    class Part(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    backbone = Part(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.compile(backend=backend, fullgraph=True, dynamic=False)
    backbone(torch.randn(4, 3, SIZE, SIZE))
    assert len(compiled) == 1
    context = EvalContext(size=SIZE, device=torch.device("cpu"), dtype=torch.float32, threads=1)
    monkeypatch.setattr("fastbyol.evaluation.features.BATCH", 7)
    features = extract_features(backbone, open_split(photos, "val"), context, None)
    assert features.unit.shape == (18, 4)
    assert len(compiled) == 1


def test_fp16_step_takes_fp16_views():
    step = new_step(precision="fp16")
    assert step.dtype == torch.float16
    output = step(0, new_batch(0, dtype=step.dtype))
    assert np.isfinite(output.loss.item())
