import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fastbyol.backbones import create_backbone
from fastbyol.build import build_model
from fastbyol.config import ModelConfig
from fastbyol.errors import InputError
from fastbyol.layers import FusedBasicBlock, FusedBottleneck, batch_norms, fuse_layers
from fastbyol.loss import regression_loss
from fastbyol.model import BYOL, Encoder, mlp, projection_std

SMALL = {"backbone": "resnet18", "width": 0.125, "hidden_dim": 24, "projection_dim": 12}


@pytest.fixture
def model() -> BYOL:
    return build_model(ModelConfig(**SMALL), 32, seed=0)


def test_loss_matches_a_hand_computation():
    # The cosines are 0.6 and 0.8, the losses 2 - 1.2 = 0.8 and 2 - 1.6 = 0.4, their mean 0.6. Norms
    # of the vectors do not matter.
    q = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    z = torch.tensor([[0.6, 0.8], [6.0, 8.0]])
    assert regression_loss(q, z).item() == pytest.approx(0.6)


def test_loss_sums_both_terms():
    class Fixed(nn.Module):
        def __init__(self, *outputs):
            super().__init__()
            self.outputs = torch.cat(outputs)

        def forward(self, views):
            return self.outputs

    right, up, left = (torch.tensor([v, v]) for v in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]))
    # View 1 predicts `right`, the target is `up` (2 - 0). View 2 predicts `left`, the target is
    # `right` (2 + 2).
    online, target = (Encoder(Fixed(*views), nn.Identity()) for views in ((right, left), (right, up)))
    pair = BYOL(online, target, nn.Identity())
    view = torch.zeros(1)
    assert pair(view, view).loss.item() == pytest.approx(2 + 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "padding"),
    [
        *((name, "symmetric") for name in ("resnet18", "resnet26", "test_resnet", "test_byobnet", "vgg11_bn")),
        ("byol_resnet18", "same"),
        ("resnet26", "same"),
    ],
)
def test_joint_forward_matches_one_pass_per_view(backbone, padding):
    """Loss, gradients and running statistics equal those of plain torch modules, view by view."""
    width = 0.125 if "resnet" in backbone and backbone != "test_resnet" else 1
    config = ModelConfig(**(SMALL | {"backbone": backbone, "width": width, "padding": padding}))
    pair = build_model(config, 32, seed=0).double()
    for p in pair.online.parameters():  # zero weights would hide the last norm of each block
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype), alpha=0.05)
    features = pair.online.projector[0].in_features
    plain = [
        Encoder(create_backbone(config), mlp(features, 24, 12)).double().requires_grad_(grad) for grad in (True, False)
    ]
    predictor = mlp(12, 24, 12).double()
    for mine, other in zip(plain, (pair.online, pair.target), strict=True):
        mine.load_state_dict(other.state_dict())
    predictor.load_state_dict(pair.predictor.state_dict())
    rng = torch.Generator().manual_seed(2)
    views = [k + torch.randn(6, 3, 32, 32, generator=rng, dtype=torch.float64) for k in (0, 3)]
    output = pair(*views)
    output.loss.backward()
    q1, q2 = (predictor(plain[0](v)) for v in views)
    t1, t2 = (plain[1](v) for v in views)
    loss = regression_loss(q1, t2) + regression_loss(q2, t1)
    loss.backward()
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-6)  # the loss is float32
    for (name, p), q in zip(pair.online.named_parameters(), plain[0].parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * q.grad.abs().max() + 1e-6, name
    for mine, other in zip(plain, (pair.online, pair.target), strict=True):
        for (name, a), b in zip(mine.named_buffers(), other.buffers(), strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9), name


def test_loss_is_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
    assert output.loss.dtype == torch.float32
    assert 0 < output.loss.item() < 8


def test_heads_match_the_paper():
    first, norm, relu, last = mlp(512, 4096, 256)
    assert (first.in_features, first.out_features, first.bias is not None) == (512, 4096, True)
    assert (norm.num_features, norm.momentum, norm.eps) == (4096, 0.1, 1e-5)
    assert isinstance(relu, nn.ReLU)
    assert [type(m).__name__ for m in fuse_layers(mlp(8, 8, 8))] == ["Linear", "BatchNorm", "Identity", "Linear"]
    assert (last.in_features, last.out_features, last.bias) == (4096, 256, None)


def test_batch_norm_constants_match_the_paper(model):
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {(m.momentum, m.eps, m.views) for m in norms} == {(0.1, 1e-5, 2)}
    assert batch_norms(model) == norms


@pytest.mark.parametrize(
    ("backbone", "kind", "relus"), [("resnet18", FusedBasicBlock, 18), ("resnet50", FusedBottleneck, 50)]
)
def test_resnet_blocks_fuse_norm_residual_and_relu(backbone, kind, relus):
    online = build_model(ModelConfig(**(SMALL | {"backbone": backbone})), 32, seed=0).online
    blocks = [block for k in (1, 2, 3, 4) for block in getattr(online.backbone, f"layer{k}")]
    assert {type(block) for block in blocks} == {kind}
    fused = [norm for norm in batch_norms(online) if norm.relu]
    assert len(fused) == relus  # the stem, two or three per block, the projector


def test_unsupported_norms_are_rejected():
    with pytest.raises(InputError, match="GhostNorm, whose statistics cannot be kept per view"):
        fuse_layers(nn.Sequential(type("GhostNorm", (nn.BatchNorm2d,), {})(4)))
    with pytest.raises(InputError, match="only norms with weight, bias and running statistics"):
        fuse_layers(nn.Sequential(nn.BatchNorm2d(4, affine=False)))


def test_resnet50_parameter_count():
    with torch.device("meta"):
        resnet = timm.create_model("resnet50", num_classes=0)
        heads = [mlp(2048, 4096, 256), mlp(256, 4096, 256)]
    online = sum(p.numel() for m in (resnet, *heads) for p in m.parameters())
    assert online / 1e6 == pytest.approx(35.1, abs=0.1)


def test_gradients_reach_online_but_not_target(model):
    model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)).loss.backward()
    trained = [p for part in (model.online, model.predictor) for p in part.parameters()]
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())


def test_statistics_are_per_view_and_per_network(model):
    views = torch.randn(8, 3, 32, 32), 3 + torch.randn(8, 3, 32, 32)
    stem = model.target.backbone.bn1
    online_stem = model.online.backbone.bn1
    model(*views)
    # Two updates with momentum 0.1, one per view, each from the batch mean of that view.
    means = [model.target.backbone.conv1(v).mean((0, 2, 3)) for v in views]
    expected = 0.9 * (0.1 * means[0]) + 0.1 * means[1]
    assert (stem.running_mean - expected).abs().max() < 1e-5
    assert (online_stem.running_mean - expected).abs().max() < 1e-5
    # The target's statistics are not a moving average of the online network's.
    online_stem.running_mean.add_(1)
    before = stem.running_mean.clone()
    assert [name for name, _ in model.named_buffers() if name.startswith("target.")]
    assert torch.equal(stem.running_mean, before)
    assert all(isinstance(t, nn.Parameter) for _, t in model.target_pairs())


def test_target_is_a_copy_or_has_another_seed(model):
    assert all(torch.equal(o, t) for o, t in model.target_pairs())
    other = build_model(ModelConfig(**SMALL, target_init="reseed"), 32, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.online.parameters(), other.online.parameters(), strict=True))
    assert not torch.equal(other.online.backbone.conv1.weight, other.target.backbone.conv1.weight)


def test_weights_depend_only_on_the_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(ModelConfig(**SMALL), 32, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again, other = build_model(ModelConfig(**SMALL), 32, seed=1), build_model(ModelConfig(**SMALL), 32, seed=2)
    assert torch.equal(first.online.backbone.conv1.weight, again.online.backbone.conv1.weight)
    assert not torch.equal(first.online.backbone.conv1.weight, other.online.backbone.conv1.weight)


def test_width_and_small_stem():
    model = build_model(ModelConfig(**(SMALL | {"width": 2, "stem": "small"})), 32, seed=0)
    backbone = model.online.backbone
    assert [getattr(backbone, f"layer{k}")[0].conv1.out_channels for k in (1, 2, 3, 4)] == [128, 256, 512, 1024]
    assert backbone.conv1.weight.shape == (128, 3, 3, 3)
    assert backbone.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 1024, 4, 4)


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({"backbone": "resnet50", "width": 2}, 93_907_072),
        ({"backbone": "resnet200", "width": 2}, 250_128_512),
        ({"backbone": "byol_resnet18"}, 11_180_736),
        ({"backbone": "byol_resnet34"}, 21_288_896),
        ({"backbone": "resnet18"}, 11_176_512),
        ({"backbone": "resnet50", "width": 2, "stem_channels": 64}, 93_856_576),
    ],
)
def test_backbones_have_the_authors_parameter_counts(settings, parameters):
    """Counts of byol/utils/networks.py on Haiku; the last two are timm's and an older version's."""
    with torch.device("meta"):
        backbone = create_backbone(ModelConfig(**settings))
    assert sum(p.numel() for p in backbone.parameters()) == parameters


@pytest.mark.parametrize("name", ["skresnet18", "resnetblur18", "resnet18d", "seresnet18"])
def test_width_of_other_resnets(name):
    """Only a plain ResNet's stem is widened."""
    backbone = create_backbone(ModelConfig(backbone=name, width=0.5)).eval()
    assert backbone.bn1.num_features == (32 if name == "seresnet18" else 64)
    assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 256)


def test_width_widens_the_stem():
    with torch.device("meta"):
        backbone = create_backbone(ModelConfig(width=2))
    assert backbone.conv1.weight.shape == (128, 3, 7, 7)
    assert backbone.bn1.num_features == backbone.feature_info[0]["num_chs"] == 128
    assert backbone.layer1[0].conv1.in_channels == backbone.layer1[0].downsample[0].in_channels == 128
    assert create_backbone(ModelConfig(backbone="resnet18", width=0.125)).layer1[0].downsample is None


@pytest.mark.parametrize(
    ("settings", "gamma"),
    [
        ({"backbone": "resnet26"}, 0),
        ({"backbone": "resnet26", "zero_init_last": False}, 1),
        ({"backbone": "resnet18", "zero_init_last": True}, 0),
        ({"backbone": "byol_resnet18"}, 1),
        ({"backbone": "byol_resnet18", "zero_init_last": True}, 0),
    ],
)
def test_gamma_of_the_last_norm_of_each_block(settings, gamma):
    backbone = create_backbone(ModelConfig(width=0.125, **settings))
    for name, norm in backbone.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            last = "bn2" if "18" in settings["backbone"] else "bn3"
            assert (norm.weight == (gamma if name.endswith(last) else 1)).all(), name


@pytest.mark.parametrize("size", [32, 33, 35, 46, 48])
def test_same_padding_is_tensorflow_s(size):
    """The stages' outputs equal those of explicitly padded convolutions: for even sides, one pixel
    less before than after.
    """
    backbone = create_backbone(ModelConfig(**(SMALL | {"backbone": "resnet26", "padding": "same"}))).double().eval()
    fused = fuse_layers(create_backbone(ModelConfig(**(SMALL | {"backbone": "resnet26", "padding": "same"}))))
    fused.double().eval().load_state_dict(backbone.state_dict())

    def pad(x, kernel, value=0.0):
        high = (kernel - 1) // 2
        low = high - 1 + x.shape[2] % 2
        return F.pad(x, (low, high, low, high), value=value)

    def block(module, x):
        stride = module.conv2.stride[0]
        y = module.bn1(F.conv2d(x, module.conv1.weight)).relu()
        y = pad(y, 3) if stride == 2 else F.pad(y, (1, 1, 1, 1))
        y = module.bn2(F.conv2d(y, module.conv2.weight, stride=stride)).relu()
        y = module.bn3(F.conv2d(y, module.conv3.weight))
        return (y + (x if module.downsample is None else module.downsample(x))).relu()

    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = backbone.bn1(F.conv2d(pad(images, 7), backbone.conv1.weight, stride=2)).relu()
    x = F.max_pool2d(pad(x, 3, -torch.inf), 3, 2)
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for module in stage:
            x = block(module, x)
    with torch.no_grad():
        for network in (backbone, fused):
            assert (network.forward_features(images) - x).abs().max() < 1e-12
        symmetric = create_backbone(ModelConfig(**(SMALL | {"backbone": "resnet26"}))).double().eval()
        symmetric.load_state_dict(backbone.state_dict())
        assert (symmetric(images) - x.mean((2, 3))).abs().max() > 1e-3 or size in (33, 35)


def test_same_padding_has_no_graph_break():
    model = build_model(ModelConfig(**(SMALL | {"padding": "same"})), 32, seed=0)
    views = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert compiled(*views).loss.item() == pytest.approx(model(*views).loss.item(), abs=1e-4)


def test_projection_std():
    spread = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert projection_std(spread).item() == pytest.approx(1 / math.sqrt(64), rel=0.02)
    assert projection_std(torch.ones(16, 64)).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet51"}, "did you mean .*resnet50"),
        ({"backbone": "vgg11", "width": 2}, "vgg11 has no width multiplier"),
        ({"backbone": "vgg11", "width": 1, "stem": "small"}, "model.stem=small needs a plain ResNet"),
        (
            {"backbone": "vgg11", "width": 1, "padding": "same"},
            "padding=same needs a plain ResNet; set model.padding=sym",
        ),
        ({"backbone": "vgg11", "width": 1, "zero_init_last": False}, "zero_init_last=false needs a plain ResNet; set"),
        (
            {"backbone": "vgg11", "width": 1, "stem_channels": 32},
            "stem_channels=32 needs a plain ResNet; set model.stem",
        ),
        ({"backbone": "byol_resnet19"}, "did you mean byol_resnet18"),
        ({"backbone": "resnetblur18", "width": 1, "padding": "same"}, "padding=same needs a plain ResNet"),
        ({"width": 0.01}, "whole number of channels"),
        ({"backbone": "vit_tiny_patch16_224", "width": 1}, "does not accept data.image_size_px=32"),
    ],
)
def test_model_errors_are_one_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        build_model(ModelConfig(**(SMALL | changes)), 32, seed=0)
    assert "\n" not in str(caught.value)
