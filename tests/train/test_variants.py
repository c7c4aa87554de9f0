"""Variants of BYOL: losses, norms, feature noise, masks, SimSiam, heads and online classifier."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.common import losses
from torch import nn

from fastbyol.api import train
from fastbyol.build import build_model
from fastbyol.config import Config, DataConfig, ModelConfig, ProbeConfig
from fastbyol.data.views import center_box, sample
from fastbyol.errors import InputError, RunError
from fastbyol.layers import batch_norms
from fastbyol.loss import regression_loss
from fastbyol.runtime import checkpoint
from fastbyol.step import TrainStep
from fastbyol.variants import contrastive_term, euclidean_loss, hinge_loss, mse_loss, noisy_views, pair_loss
from fastbyol.weights.files import save_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"backbone": "resnet18", "width": 0.125, "hidden_dim": 32, "projection_dim": 16}
VARIANTS = {
    "layer": {"norm": "layer"},
    "group": {"norm": "group", "norm_groups": 4},
    "group + weight standardization": {"norm": "group", "norm_groups": 4, "weight_standardization": True},
    "euclidean": {"loss": "euclidean"},
    "mse": {"loss": "mse"},
    "hinge": {"loss": "hinge"},
    "feature noise": {"feature_noise": 0.5},
    "simsiam": {"target": "online"},
    "half contrastive": {"contrastive_weight": 0.5},
    "infonce": {"contrastive_weight": 1.0},
    "mask": {"mask_ratio": 0.3, "mask_patch_px": 8},
    "linear heads": {"heads": "linear"},
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_losses_match_a_hand_computation():
    q, z = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 1.0]])
    assert regression_loss(q, z).item() == pytest.approx((2 + 0) / 2)
    assert euclidean_loss(q, z).item() == pytest.approx((5 + 1) / 2)
    assert mse_loss(q, z).item() == pytest.approx((9 + 16 + 0 + 1) / 4)
    assert hinge_loss(q, z, 0.4).item() == pytest.approx((math.sqrt(2) - 0.4 + 0) / 2)
    assert hinge_loss(q, z, 1.5).item() == 0


def test_distance_gradients_are_finite_for_equal_vectors():
    q = torch.ones(3, 4, requires_grad=True)
    (euclidean_loss(q, torch.ones(3, 4)) + hinge_loss(q, torch.ones(3, 4), 0.0)).backward()
    assert torch.isfinite(q.grad).all()


def test_contrastive_term_with_weight_one_equals_infonce():
    """The loss is 2 + 2 a InfoNCE with temperature a.

    The positive is the other view of the image; negatives are both views of all other images.
    """
    q, other, same, a = normal(5, 7), normal(5, 7, seed=1), normal(5, 7, seed=2), 0.3
    q, other, same = (F.normalize(x, dim=1) for x in (q, other, same))
    expected = 0.0
    for i in range(5):
        candidates = [other[j] for j in range(5)] + [same[j] for j in range(5) if j != i]
        logits = torch.stack([q[i] @ c for c in candidates]) / a
        expected += F.cross_entropy(logits[None], torch.tensor([i])).item() / 5
    mine = regression_loss(q, other) + contrastive_term(q, other, same, a)
    assert mine.item() == pytest.approx(2 + 2 * a * expected, abs=1e-5)


def test_losses_are_symmetric_with_the_right_negatives():
    q1, q2, t1, t2 = (normal(6, 8, seed=k) for k in range(4))
    for name, term in (("euclidean", euclidean_loss), ("mse", mse_loss)):
        config = ModelConfig(loss=name)
        assert pair_loss(q1, q2, t1, t2, config).item() == pytest.approx((term(q1, t2) + term(q2, t1)).item())
    hinge = ModelConfig(loss="hinge", hinge_margin=0.7)
    expected = hinge_loss(q1, t2, 0.7) + hinge_loss(q2, t1, 0.7)
    assert pair_loss(q1, q2, t1, t2, hinge).item() == pytest.approx(expected.item())
    beta = ModelConfig(contrastive_weight=0.25, contrastive_temperature=0.5)
    terms = [contrastive_term(q1, t2, t1, 0.5), contrastive_term(q2, t1, t2, 0.5)]
    expected = regression_loss(q1, t2) + regression_loss(q2, t1) + 0.25 * sum(terms)
    assert pair_loss(q1, q2, t1, t2, beta).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(("norm", "groups"), [("layer", 1), ("group", 4)])
def test_other_norms_replace_every_batch_norm(norm, groups):
    model = build_model(ModelConfig(**SMALL, norm=norm, norm_groups=4), 32, seed=0)
    assert not batch_norms(model)
    norms = [m for m in model.online.modules() if isinstance(m, nn.GroupNorm)]
    plain = build_model(ModelConfig(**SMALL), 32, seed=0)
    assert [m.num_channels for m in norms] == [m.num_features for m in batch_norms(plain.online)]
    assert {m.num_groups for m in norms} == {groups}
    # The features of an image do not depend on the rest of the batch.
    images = normal(4, 3, 32, 32)
    together, alone = model.online(images), model.online(images[:1])
    assert (together[:1] - alone).abs().max() < 1e-5
    assert (plain.online(images)[:1] - plain.online(images.roll(1, 0) * 2)[1:2]).abs().max() > 1e-3


def test_head_layer_norm_matches_torch():
    head = build_model(ModelConfig(**SMALL, norm="layer"), 32, seed=0).predictor
    x = head[0](normal(5, 16))
    assert (head[1](x) - F.layer_norm(x, (32,))).abs().max() < 1e-6


def test_groups_must_divide_the_channels():
    with pytest.raises(InputError, match=r"model.norm_groups=3 does not divide the 8 channels of backbone.bn1"):
        build_model(ModelConfig(**SMALL, norm="group", norm_groups=3), 32, seed=0)


def test_norms_keep_their_fused_activation():
    config = ModelConfig(backbone="test_efficientnet", norm="group", norm_groups=8, hidden_dim=32, projection_dim=16)
    model = build_model(config, 32, seed=0)
    acts = [m.act for m in model.online.backbone.modules() if isinstance(m, nn.GroupNorm) and hasattr(m, "act")]
    assert any(isinstance(act, nn.SiLU) for act in acts)
    assert torch.isfinite(model(normal(4, 3, 32, 32), normal(4, 3, 32, 32, seed=1)).loss)


def test_weight_standardization_ignores_scale_and_shift():
    model = build_model(ModelConfig(**SMALL, norm="group", norm_groups=4, weight_standardization=True), 32, seed=0)
    conv = model.online.backbone.layer1[0].conv2
    x = normal(2, 8, 9, 9)
    before = conv(x)
    weight = conv.weight.detach().clone()
    filters = weight.flatten(1)
    plain = ((filters - filters.mean(1, keepdim=True)) / filters.std(1, correction=0, keepdim=True)).view_as(weight)
    assert (before - F.conv2d(x, plain, padding=1)).abs().max() < 1e-3
    with torch.no_grad():
        conv.weight.mul_(3).add_(0.5)
    assert (conv(x) - before).abs().max() < 1e-3
    linear = model.online.projector[0]
    y = normal(4, 64)
    rows = linear.weight.detach()
    plain = (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True)
    assert (linear(y) - F.linear(y, plain, linear.bias)).abs().max() < 1e-2


def test_feature_noise_creates_the_second_view():
    x, noise = 5 + 3 * normal(64, 10), normal(64, 10, seed=1)
    one, two = noisy_views(x, noise, 0.25).chunk(2)
    assert one.mean(0).abs().max() < 1e-5
    assert (one.std(0, correction=0) - 1).abs().max() < 1e-3
    assert (two - one - 0.25 * noise).abs().max() < 1e-6


def test_feature_noise_runs_the_backbone_once_per_image():
    model = build_model(ModelConfig(**SMALL, feature_noise=0.5), 32, seed=0)
    seen = []
    for branch in (model.online, model.target):
        branch.backbone.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    torch.manual_seed(0)
    image = normal(6, 3, 32, 32)
    model(image, image).loss.backward()
    assert seen == [6, 6]
    assert model.online.backbone.conv1.weight.grad.abs().max() > 0
    assert {norm.views for norm in batch_norms(model.online.backbone)} == {1}
    assert {norm.views for norm in batch_norms(model.online.projector)} == {2}


def test_views_without_augmentation_are_center_crops():
    sizes = [(60, 80), (80, 60), (50, 50)]
    boxes = sample("none", 0, 0, range(3), sizes).box
    for (height, width), box in zip(sizes, boxes, strict=True):
        assert box.tolist() == [list(center_box(height, width, 1.0))] * 2
    params = sample("none", 0, 0, range(200), [(64, 48)] * 200)
    for name in ("flip", "jitter", "gray", "blur", "solarize"):
        assert not getattr(params, name).any(), name


def test_masks_hide_patches_from_the_online_network_only():
    model = build_model(ModelConfig(**SMALL, mask_ratio=0.4, mask_patch_px=8), 40, seed=0)
    seen = {}
    for name in ("online", "target"):
        backbone = getattr(model, name).backbone
        backbone.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
    torch.manual_seed(0)
    views = 1 + normal(64, 3, 40, 40).abs(), 1 + normal(64, 3, 40, 40, seed=1).abs()
    model(*views)
    assert torch.equal(seen["target"], torch.cat(views))
    hidden = (seen["online"] == 0).all(1)  # (128, 40, 40)
    assert torch.equal(torch.where(hidden[:, None], torch.cat(views), seen["online"]), torch.cat(views))
    patches = hidden.view(128, 5, 8, 5, 8).float().mean((2, 4))
    assert set(patches.unique().tolist()) == {0.0, 1.0}
    assert patches.mean().item() == pytest.approx(0.4, abs=0.03)
    assert not torch.equal(hidden[0], hidden[64])  # each view has its own mask


def test_mask_patch_may_exceed_the_image_border():
    model = build_model(ModelConfig(**SMALL, mask_ratio=0.4, mask_patch_px=7), 32, seed=0)
    assert torch.isfinite(model(normal(4, 3, 32, 32), normal(4, 3, 32, 32, seed=1)).loss)


def test_target_online_predicts_its_own_projections():
    model = build_model(ModelConfig(**SMALL, target="online"), 32, seed=0)
    assert not any(name.startswith("target") for name in model.state_dict())
    assert model.target_pairs() == []
    views = normal(6, 3, 32, 32), normal(6, 3, 32, 32, seed=1)
    z1, z2 = model.online(torch.cat(views)).chunk(2)
    q1, q2 = model.predictor(torch.cat((z1, z2))).chunk(2)
    expected = regression_loss(q1, z2.detach()) + regression_loss(q2, z1.detach())
    output = model(*views)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    mine = torch.autograd.grad(output.loss, model.online.projector[0].weight)[0]
    stopped = torch.autograd.grad(expected, model.online.projector[0].weight)[0]
    assert (mine - stopped).abs().max() < 1e-4 * stopped.abs().max() + 1e-6


def test_linear_heads_have_one_layer():
    model = build_model(ModelConfig(**SMALL, heads="linear"), 32, seed=0)
    for head, inputs in ((model.online.projector, 64), (model.predictor, 16)):
        assert [(type(m), m.in_features, m.out_features) for m in head] == [(nn.Linear, inputs, 16)]


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trains(make_config, photos, name):
    """In 36 steps, losses are finite, and the mean of the last eight is below that of the first
    four: 0.58 to 0.98 of it over six seeds of eight variants.
    """
    changes = VARIANTS[name] | {"stem_channels": 64}
    data = {"root": str(photos)} | ({"augmentation": "none"} if "feature_noise" in changes else {})
    optim = {"epochs": 8, "warmup_epochs": 0, "base_lr": 0.5}
    if changes.get("loss") in ("euclidean", "mse"):
        optim["base_lr"] = 0.1
    if changes.get("contrastive_weight"):  # the loss starts near its minimum for this small batch
        optim["base_lr"] = 4.0
    config = make_config(model=changes, data=data, optim=optim, knn={"every_epochs": 8})
    result = train(config)
    found = np.array(list(losses(result.folder).values()))
    assert len(found) == 36  # 8 * 72 / 16
    assert np.isfinite(found).all()
    assert found[-8:].mean() < found[:4].mean(), found


@pytest.mark.parametrize("changes", [{"mask_ratio": 0.3, "mask_patch_px": 8}, {"feature_noise": 0.5}])
def test_masks_and_noise_resume_exactly(make_config, changes):
    augmentation = {"augmentation": "none"} if "feature_noise" in changes else {}
    config = make_config(model=changes, data=augmentation, knn={"every_epochs": 0}, checkpoint={"keep_last": 99})
    whole = train(config).folder
    again = replace(config, name="again", resume=str(whole / "checkpoints" / "step_00000008.pt"))
    other = losses(train(again).folder)
    assert other == {step: value for step, value in losses(whole).items() if step > 8}


def test_masks_differ_between_ranks_and_steps(make_config):
    from fastbyol.runtime.distributed import World

    config = make_config(model={"mask_ratio": 0.3})
    model = build_model(config.model, 32, 0)
    step = TrainStep(model, config, 4, torch.device("cpu"))
    batch = type("B", (), {"views": (normal(16, 3, 32, 32), normal(16, 3, 32, 32, seed=1))})
    draws = []
    for rank, number in ((0, 0), (0, 1), (1, 0), (0, 0)):
        step.world = World(rank=rank)
        step(number, batch)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"mask_ratio": 0.3}, {"target": "online"}, {"contrastive_weight": 0.5}])
def test_variants_compile_into_one_graph(make_config, changes):
    """Traces without a graph break; the backend does not matter here."""
    model = build_model(ModelConfig(**SMALL, **changes), 32, seed=0)
    views = normal(4, 3, 32, 32), normal(4, 3, 32, 32, seed=1)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.manual_seed(0)
    expected = model(*views).loss
    torch.manual_seed(0)
    assert compiled(*views).loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
def test_online_classifier_learns_and_logs_in_the_article_format(make_config, capfd):
    config = make_config(
        probe=ProbeConfig(enabled=True, lr=0.02),
        model={"heads": "linear", "loss": "mse"},
        optim={"name": "adam", "base_lr": 8e-4, "schedule": "constant", "epochs": 6, "warmup_epochs": 0},
        knn={"every_epochs": 0},
    )
    folder = train(config).folder
    pattern = r"Train Epoch: (\d+)/6  Loss (\d+\.\d{4})  Top5 Accuracy (\d+\.\d\d)%  Top1 Accuracy (\d+\.\d\d)%"
    lines = re.findall(pattern, capfd.readouterr().out)
    assert [int(line[0]) for line in lines] == [1, 2, 3, 4, 5, 6]
    first, last = ([float(value) for value in line[1:]] for line in (lines[0], lines[-1]))
    mean = np.mean(list(losses(folder).values())[-4:])
    assert last[0] == pytest.approx(mean, abs=1e-4)
    assert last[1] > last[2] > 0
    assert last[2] > first[2] + 5  # of 18 classes


@pytest.mark.slow
def test_online_classifier_does_not_affect_the_run_and_resumes_exactly(make_config):
    config = make_config(knn={"every_epochs": 0}, probe=ProbeConfig(enabled=True), checkpoint={"keep_last": 99})
    with_probe = train(config).folder
    without = train(replace(config, name="without", probe=ProbeConfig())).folder
    assert losses(with_probe) == losses(without)
    again = replace(config, name="again", resume=str(with_probe / "checkpoints" / "step_00000008.pt"))
    resumed = train(again).folder

    def probe_lines(folder):
        return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"probe"' in line]

    assert probe_lines(resumed) == probe_lines(with_probe)[2:]


def test_micro_batch_features_keep_the_batch_order(make_config):
    config = make_config(model={"norm": "layer"}, step={"micro_batches": 2}, precision="fp32")
    model = build_model(config.model, 32, 0)
    model.return_features = True
    step = TrainStep(model, config, 4, torch.device("cpu"))
    views = normal(16, 3, 32, 32), normal(16, 3, 32, 32, seed=1)
    with torch.no_grad():
        expected = model.online.backbone(views[0])
    output = step(0, type("B", (), {"views": views}))
    assert (output.features - expected).abs().max() < 1e-5
    assert not output.features.requires_grad


def test_online_classifier_needs_labels(make_config, photos, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for k, path in enumerate(sorted(photos.glob("train/*/*.jpg"))):
        (flat / f"{k}.jpg").write_bytes(path.read_bytes())
    config = make_config(data={"root": str(flat), "train_split": "."}, probe=ProbeConfig(enabled=True))
    with pytest.raises(InputError, match=r"probe.enabled=true: .*flat has fewer than 2 classes; set it to false"):
        train(config)


def test_invalid_combinations_are_rejected():
    with pytest.raises(
        ValueError, match=r"model.feature_noise=0.5: replaces image augmentation: set data.augmentation=none"
    ):
        Config(model=ModelConfig(feature_noise=0.5))
    assert Config(model=ModelConfig(feature_noise=0.5), data=DataConfig(augmentation="none"))
    with pytest.raises(ValueError, match=r"model.contrastive_weight=1: requires model.loss=byol"):
        ModelConfig(contrastive_weight=1, loss="mse")
    with pytest.raises(ValueError, match=r"model.mask_ratio=1: must lie in \[0, 1\)"):
        ModelConfig(mask_ratio=1)


def test_init_loads_weights_into_both_networks(make_config, tmp_path, capfd):
    config = make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})
    model = build_model(config.model, 32, seed=77)
    file = tmp_path / "start.safetensors"
    save_backbone(file, model.online.backbone, config.model, 32, key="out")
    still = make_config(
        name="still",
        init=str(file),
        optim={"epochs": 1, "warmup_epochs": 1, "base_lr": 1e-12, "tau_base": 1.0},
        knn={"every_epochs": 0},
    )
    state = checkpoint.load(train(still).folder / "checkpoints" / "step_00000004.pt")["model"]
    for branch in ("online", "target"):
        for name, p in model.online.backbone.named_parameters():
            assert (state[f"{branch}.backbone.{name}"] - p).abs().max() < 1e-6, name
    assert f"init={file}: " in capfd.readouterr().out
    wrong = make_config(name="wrong", init=str(file), model={"backbone": "resnet26"})
    with pytest.raises(InputError, match=r"init=.*resnet18.*resnet26"):
        train(wrong)


ARTICLE = {"name": "adam", "base_lr": 8e-4, "schedule": "constant", "warmup_epochs": 0, "weight_decay": 0.0}


@pytest.mark.slow
def test_article_mode_learns_from_initial_weights(make_config, photos, tmp_path):
    """The article starts from supervised weights; this test starts from random ones in a file."""
    config = make_config(
        model={"heads": "linear", "loss": "mse", "stem_channels": 64},
        data={"root": str(photos), "batch_size": 24},
        optim=ARTICLE | {"epochs": 12, "base_lr": 8e-3},
        probe=ProbeConfig(enabled=True),
        knn={"every_epochs": 0},
        init=str(tmp_path / "start.safetensors"),
    )
    model = build_model(config.model, 32, seed=5)
    save_backbone(tmp_path / "start.safetensors", model.online.backbone, config.model, 32, key="out")
    found = np.array(list(losses(train(config).folder).values())).reshape(12, 3).mean(1)
    assert np.isfinite(found).all()
    assert found[-1] < 0.9 * found[0]  # 0.49 to 0.73 over five seeds


@pytest.mark.slow
def test_vgg_learns_in_article_mode(make_config):
    changes = {"backbone": "vgg11", "width": 1.0, "heads": "linear", "loss": "mse"}
    config = make_config(model=changes, data={"batch_size": 4}, optim=ARTICLE | {"epochs": 2})
    model = build_model(config.model, 32, seed=0)
    step = TrainStep(model, config, 4, torch.device("cpu"))
    batch = type("B", (), {"views": (normal(4, 3, 32, 32), normal(4, 3, 32, 32, seed=1))})
    found = [step(k, batch).loss.item() for k in range(4)]
    # Both networks start equal, and the first step separates them. By the fourth step, the loss
    # falls to 0.11-0.31 of the second (six seeds).
    assert found[-1] < 0.6 * found[1]


def test_online_classifier_starts_from_scratch_without_saved_state(make_config, capfd):
    config = make_config(knn={"every_epochs": 0}, checkpoint={"keep_last": 99})
    found = train(config).folder / "checkpoints" / "step_00000008.pt"
    train(replace(config, name="again", resume=str(found), probe=ProbeConfig(enabled=True)))
    assert f"checkpoint {found} has no state of 'probe': it starts from scratch" in capfd.readouterr().out


def test_divergence_is_reported_before_the_online_classifier(make_config, capfd):
    config = make_config(
        probe=ProbeConfig(enabled=True),
        model={"loss": "mse"},
        optim={"name": "sgd", "base_lr": 1e12, "warmup_epochs": 0, "epochs": 2},
        knn={"every_epochs": 0},
        log={"log_every_steps": 1000},
    )
    with pytest.raises(RunError, match="the loss became NaN or infinite"):
        train(config)
    assert "Train Epoch" not in capfd.readouterr().out
