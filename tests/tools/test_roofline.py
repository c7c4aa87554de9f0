"""Counted work of a step, compared with published figures and hand counts."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fastbyol.build import build_model
from fastbyol.config import Config, DataConfig, ModelConfig, OptimConfig, StepConfig
from fastbyol.layers import BatchNorm, MaxPool
from fastbyol.spans import BACKWARD, ONLINE, TARGET, UPDATE
from fastbyol.tools import roofline
from fastbyol.tools.roofline import Peaks, Work, count_step, update_bytes

CPU = torch.device("cpu")
SMALL = ModelConfig(backbone="resnet18", width=0.125, hidden_dim=32, projection_dim=16)


def counted(batch=4, size=32, model=SMALL, dtype=torch.bfloat16, **step):
    config = Config(data=DataConfig(batch_size=batch, image_size_px=size), model=model, step=StepConfig(**step))
    return count_step(config, batch, dtype)


def test_resnet50_flops_match_torchvision():
    """torchvision states 4.09 G multiply-adds per image, 2048 x 1000 of them in the classifier."""
    heads = 2048 * 4096 + 4096 * 256 + 256 * 4096 + 4096 * 256
    work = counted(2, 224, ModelConfig())
    backbone = work[ONLINE].flops / 2 / 2 / 2 - heads  # 2 FLOPs per multiply-add, 2 images with 2 views
    assert backbone + 2048 * 1000 == pytest.approx(4.09e9, rel=2e-3)
    assert work[ONLINE].flops - work[TARGET].flops == 2 * 4 * (256 * 4096 + 4096 * 256)  # the predictor
    # Backward costs two forward passes, without the gradient of the images.
    assert work[BACKWARD].flops == 2 * work[ONLINE].flops - 2 * 4 * 112 * 112 * 64 * 3 * 49
    assert 7.9 < roofline.units(work) < 8


def test_matmul_matches_a_hand_count():
    """(8, 32) x (32, 16): both operands and the result count once."""
    work = Work()
    with roofline._Counter(work, roofline._Note()):
        x = torch.empty(8, 32, device="meta", dtype=torch.bfloat16)
        x @ torch.empty(32, 16, device="meta", dtype=torch.bfloat16)
    assert work.operators == [(2 * 8 * 32 * 16, 2 * (8 * 32 + 32 * 16 + 8 * 16))]


@pytest.mark.parametrize(
    ("residual", "relu", "forward", "backward"), [(False, True, 3, 5), (True, True, 4, 7), (True, False, 4, 5)]
)
def test_batch_norm_counts_the_passes_of_its_kernels(residual, relu, forward, backward):
    """Passes from kernels/batch_norm.py.

    Forward: moments 1, apply 2 (3 with a residual). Backward: sums 2 (4 with residual and ReLU),
    gradient 3.
    """
    norm = BatchNorm(8, device="meta").train()
    norm.relu, norm.views = relu, 2
    x = torch.empty(4, 8, 6, 6, device="meta", dtype=torch.bfloat16, requires_grad=True)
    other = torch.empty_like(x, requires_grad=True) if residual else None
    forward_work, backward_work = Work(), Work()
    note = roofline._count_by_formula(norm)
    with roofline._Counter(forward_work, note):
        y = norm(x, other)
    with roofline._Counter(backward_work, note):
        y.backward(torch.empty_like(y))
    values = 2 * x.numel()
    assert (0, forward * values) in forward_work.operators
    assert (0, backward * values) in backward_work.operators
    assert x.grad.shape == x.shape


def test_max_pool_counts_the_passes_of_its_kernels():
    """Passes from kernels/max_pool.py.

    Forward reads x, and writes y and a one-byte index per output. Backward reads both and writes
    dx.
    """
    x = torch.empty(2, 8, 7, 6, device="meta", dtype=torch.bfloat16, requires_grad=True)
    forward_work, backward_work = Work(), Work()
    pool = MaxPool(3, 2, 1)
    note = roofline._count_by_formula(pool)
    with roofline._Counter(forward_work, note):
        y = pool(x)
    with roofline._Counter(backward_work, note):
        y.backward(torch.empty_like(y))
    assert y.shape == (2, 8, 4, 3)
    pooled = 2 * 8 * 4 * 3
    assert [size for _, size in forward_work.operators] == [2 * x.numel() + 3 * pooled]
    assert (0, 2 * x.numel() + 3 * pooled) in backward_work.operators
    assert x.grad.shape == x.shape


def test_half_precision_halves_bytes_but_not_flops():
    wide, narrow = (counted(64, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert [w.flops for w in wide.values()] == [w.flops for w in narrow.values()]
    assert narrow[ONLINE].bytes == pytest.approx(wide[ONLINE].bytes / 2, rel=0.05)  # weights are cast


def test_work_of_micro_batches_and_activation_checkpointing():
    whole, parts, again = counted(8), counted(8, micro_batches=2), counted(8, activation_checkpointing=4)
    assert [w.flops for w in parts.values()] == [w.flops for w in whole.values()]
    stem, heads = 2 * 16 * 16 * 16 * 8 * 3 * 49, 2 * 16 * (64 * 32 + 32 * 16 + 2 * 16 * 32)
    more = again[BACKWARD].flops - whole[BACKWARD].flops
    assert more == whole[ONLINE].flops - stem - heads


def test_target_online_has_no_target_work():
    work = counted(model=ModelConfig(**{**vars(SMALL), "target": "online"}))
    assert work[TARGET].flops == 0
    assert roofline.units(work) < 6


@pytest.mark.parametrize(("name", "values", "target"), [("lars", 28, 8), ("sgd", 20, 12), ("adam", 28, 12)])
def test_update_bytes(name, values, target):
    """LARS moves 36 bytes per parameter with a target, 28 without (kernels/lars_ema.py)."""
    model = build_model(SMALL, 32, 0)
    moved = sum(p.numel() for p in model.online.parameters())
    alone = sum(p.numel() for p in model.predictor.parameters())
    assert update_bytes(name, model) == (values + target) * moved + values * alone
    config = Config(data=DataConfig(batch_size=4, image_size_px=32), model=SMALL, optim=OptimConfig(name=name))
    assert count_step(config, 4, torch.bfloat16)[UPDATE].bytes == update_bytes(name, model)


def test_roofline_takes_the_maximum_per_operator():
    work = Work([(1000, 10), (10, 1000)])
    assert work.roofline_s(Peaks(100, 100)) == 10 + 10
    assert work.roofline_s(Peaks(1000, 100)) == 1 + 10


def test_peaks_are_work_per_time(monkeypatch):
    seconds = iter([0.01, 0.02, 0.5, 2.0])  # products of side 8, 16 and 32, then the copy
    monkeypatch.setattr(roofline, "_PEAK_SIDES", {"cpu": (8, 16, 32, 2**40)})  # the last exceeds the memory
    monkeypatch.setattr(roofline, "_PEAK_BYTES", {"cpu": 4096})
    monkeypatch.setattr(roofline, "_fastest", lambda call, device: (call(), next(seconds))[1])
    assert roofline.measure_peaks(CPU, torch.float32) == Peaks(2 * 16**3 / 0.02, 2 * 4096 / 2.0)


def test_vit_flops_match_timm():
    model = ModelConfig(backbone="vit_tiny_patch16_224", hidden_dim=32, projection_dim=16)
    work = counted(2, 224, model)
    # 1.3 G multiply-adds per image. timm's results table has 1.26, without the attention products.
    assert work[ONLINE].flops / 4 / 2 == pytest.approx(1.26e9, rel=0.06)


def test_counting_leaves_the_layers_unchanged():
    """Counting replaces the function of the norm only temporarily."""
    norm = BatchNorm(4).train()
    counted()
    x = torch.randn(6, 4, requires_grad=True)
    assert torch.allclose(norm(x), nn.functional.batch_norm(x, None, None, training=True), atol=1e-5)


def test_counting_saved_bytes_leaks_no_tensors():
    def tensors():
        gc.collect()
        return [o for o in gc.get_objects() if type(o) is torch.Tensor]

    config = Config(data=DataConfig(batch_size=4, image_size_px=32), model=SMALL)
    roofline.saved_tensor_bytes(config, 4, torch.bfloat16)  # fill caches of the first use
    before = WeakIdKeyDictionary(dict.fromkeys(tensors()))
    roofline.saved_tensor_bytes(config, 4, torch.bfloat16)
    assert [t for t in tensors() if t not in before] == []
