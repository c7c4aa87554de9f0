import math

import pytest
import timm
import torch
from torch import nn

from fastbyol.config import ModelConfig
from fastbyol.errors import InputError
from fastbyol.model import BYOL, build_model, mlp, projection_std, regression_loss

SMALL = {"backbone": "resnet18", "width": 0.125, "hidden_dim": 24, "projection_dim": 12}


@pytest.fixture
def model() -> BYOL:
    return build_model(ModelConfig(**SMALL), 32, seed=0)


def test_loss_on_a_case_computed_by_hand():
    # cos = 0.6 and 0.8: 2 - 1.2 = 0.8 and 2 - 1.6 = 0.4, mean 0.6; lengths do not matter.
    q = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    z = torch.tensor([[0.6, 0.8], [6.0, 8.0]])
    assert regression_loss(q, z).item() == pytest.approx(0.6)


def test_the_two_terms_are_summed_not_averaged():
    class Fixed(nn.Module):
        def __init__(self, *outputs):
            super().__init__()
            self.outputs = list(outputs)

        def forward(self, view):
            return self.outputs.pop(0)

    right, up, left = (torch.tensor([v, v]) for v in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]))
    # View 1 predicts `right` for a target `up` (2 - 0), view 2 predicts `left` for a target `right` (2 + 2).
    pair = BYOL(Fixed(right, left), Fixed(right, up), nn.Identity())
    view = torch.zeros(1)
    assert pair(view, view).loss.item() == pytest.approx(2 + 4)


def test_loss_is_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
    assert output.loss.dtype == torch.float32
    assert 0 < output.loss.item() < 8


def test_heads_are_the_paper_s():
    first, norm, relu, last = mlp(512, 4096, 256)
    assert (first.in_features, first.out_features, first.bias is not None) == (512, 4096, True)
    assert (norm.num_features, norm.momentum, norm.eps) == (4096, 0.1, 1e-5)
    assert isinstance(relu, nn.ReLU)
    assert (last.in_features, last.out_features, last.bias) == (4096, 256, None)


def test_every_batchnorm_has_the_paper_s_constants(model):
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {(m.momentum, m.eps) for m in norms} == {(0.1, 1e-5)}


def test_resnet50_has_the_published_number_of_parameters():
    with torch.device("meta"):
        resnet = timm.create_model("resnet50", num_classes=0)
        heads = [mlp(2048, 4096, 256), mlp(256, 4096, 256)]
    online = sum(p.numel() for m in (resnet, *heads) for p in m.parameters())
    assert online / 1e6 == pytest.approx(35.1, abs=0.1)


def test_gradients_reach_all_of_online_and_none_of_target(model):
    model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)).loss.backward()
    trained = [p for part in (model.online, model.predictor) for p in part.parameters()]
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())


def test_statistics_are_per_view_and_the_target_keeps_its_own(model):
    views = torch.randn(8, 3, 32, 32), 3 + torch.randn(8, 3, 32, 32)
    stem = model.target.backbone.bn1
    online_stem = model.online.backbone.bn1
    model(*views)
    # Two updates of momentum 0.1, one per view, from each view's own batch mean.
    means = [model.target.backbone.conv1(v).mean((0, 2, 3)) for v in views]
    expected = 0.9 * (0.1 * means[0]) + 0.1 * means[1]
    assert (stem.running_mean - expected).abs().max() < 1e-5
    assert (online_stem.running_mean - expected).abs().max() < 1e-5
    # Were both views normalised together, the second view's mean would not vanish after the norm.
    normalised = stem(model.target.backbone.conv1(views[1]))
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-5
    # Target statistics are not averaged from the online network's.
    online_stem.running_mean.add_(1)
    before = stem.running_mean.clone()
    assert [name for name, _ in model.named_buffers() if name.startswith("target.")]
    assert torch.equal(stem.running_mean, before)
    assert all(isinstance(t, nn.Parameter) for _, t in model.target_pairs())


def test_target_starts_as_a_copy_or_from_another_seed(model):
    assert all(torch.equal(o, t) for o, t in model.target_pairs())
    other = build_model(ModelConfig(**SMALL, target_init="reseed"), 32, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.online.parameters(), other.online.parameters(), strict=True))
    assert not torch.equal(other.online.backbone.conv1.weight, other.target.backbone.conv1.weight)


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(ModelConfig(**SMALL), 32, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again, other = build_model(ModelConfig(**SMALL), 32, seed=1), build_model(ModelConfig(**SMALL), 32, seed=2)
    assert torch.equal(first.online.backbone.conv1.weight, again.online.backbone.conv1.weight)
    assert not torch.equal(first.online.backbone.conv1.weight, other.online.backbone.conv1.weight)


def test_width_widens_all_four_groups_and_the_small_stem_keeps_the_resolution():
    model = build_model(ModelConfig(**(SMALL | {"width": 2, "stem": "small"})), 32, seed=0)
    backbone = model.online.backbone
    assert [getattr(backbone, f"layer{k}")[0].conv1.out_channels for k in (1, 2, 3, 4)] == [128, 256, 512, 1024]
    assert backbone.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 1024, 4, 4)


def test_projection_std_of_spread_and_collapsed_projections():
    spread = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert projection_std(spread).item() == pytest.approx(1 / math.sqrt(64), rel=0.02)
    assert projection_std(torch.ones(16, 64)).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet51"}, "did you mean .*resnet50"),
        ({"backbone": "vgg11", "width": 2}, "vgg11 has no width multiplier"),
        ({"backbone": "vgg11", "width": 1, "stem": "small"}, "model.stem=small is for plain ResNets"),
        ({"width": 0.01}, "whole number of channels"),
        ({"backbone": "vit_tiny_patch16_224", "width": 1}, "cannot take data.image_size_px=32"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_clear_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        build_model(ModelConfig(**(SMALL | changes)), 32, seed=0)
    assert "\n" not in str(caught.value)
