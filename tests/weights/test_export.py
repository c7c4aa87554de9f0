"""Export: other libraries compute the same features from a file as the checkpoint's backbone."""

import copy
import os
import pickle
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import timm
import torch
import torch.nn.functional as F
import torchvision
import yaml
from helpers.common import ROOT
from PIL import Image
from safetensors.torch import load_file
from timm.models import VisionTransformer

from fastbyol.api import train
from fastbyol.build import build_backbone, build_model
from fastbyol.cli import main
from fastbyol.config import Config, DataConfig, ModelConfig
from fastbyol.data import find_images
from fastbyol.data.crops import CENTER_FRACTION, center_crops
from fastbyol.errors import InputError, RunError
from fastbyol.runtime import checkpoint, environment
from fastbyol.weights import export
from fastbyol.weights.formats import FORMATS, Source, torchvision_network
from fastbyol.weights.load import load_backbone, open_backbone
from fastbyol.weights.names import torchvision_naming

HEADS = {"hidden_dim": 8, "projection_dim": 4}


pytestmark = pytest.mark.usefixtures("one_thread")


def randomize(network):
    """Make every tensor affect the output, such as ConvNeXt's layer scales, which start at 1e-6."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_var", "gamma")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point() and tensor.dim() <= 1:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def configured(size, model):
    return Config(
        name="r", data=DataConfig(root="/data/photos", image_size_px=size), model=ModelConfig(**HEADS | model)
    )


@pytest.fixture
def make_run(tmp_path):
    """Factory of a run's folder with one untrained checkpoint, and its online backbone."""

    def make(size=32, **model):
        config = configured(size, model)
        network = build_model(config.model, size, seed=0)
        randomize(network)
        state = {"step": 7, "config": config.to_dict(), "images": 9, "model": network.state_dict()}
        folder = tmp_path / "runs" / "r"
        checkpoint.save(
            folder / "checkpoints", state | {"optimizer": {}, "rng": {}, "knn": {}}, keep_last=1, best=False
        )
        backbone, _ = build_backbone(config.model, size)
        backbone.load_state_dict(network.online.backbone.state_dict())
        return folder, backbone.eval()

    return make


@pytest.fixture
def written(tmp_path, log_lines):
    """Factory that exports a new backbone and returns the backbone, the file and its card."""

    def make(form, size=32, suffix=None, network=None, **model):
        config = configured(size, model)
        backbone, count = (network, 0) if network is not None else build_backbone(config.model, size)
        randomize(backbone)
        source = Source(
            checkpoint=tmp_path / "r" / "checkpoints" / "s.pt", config=config, backbone=backbone.eval(), features=count
        )
        path = tmp_path / f"x{suffix or FORMATS[form].suffixes[0]}"
        log_lines.clear()
        card = export.write(source, form, path)
        assert log_lines == []
        return backbone, path, card

    return make


def images(size=32, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def features(network, size=32):
    return network(images(size))


def code_of(card, language="python"):
    """Return the code blocks in the section "Load" of a model card."""
    return re.findall(rf"```{language}\n(.*?)```", load_section(card), re.DOTALL)


def run_code(code, **names):
    exec(code, names)
    return names


def load_section(card):
    return card.read_text().split("## Load")[1].split("## Preprocessing")[0]


@pytest.mark.parametrize(
    ("model", "size", "suffix"),
    [
        ({"backbone": "resnet18", "width": 0.25}, 32, ".pth"),
        ({"backbone": "resnet18", "width": 0.25, "stem_channels": 64}, 32, ".safetensors"),
        ({"backbone": "resnet18", "width": 0.25, "stem": "small"}, 32, ".pth"),
        ({"backbone": "resnet18", "width": 0.25, "stem": "small"}, 32, ".safetensors"),
        ({"backbone": "resnet50", "width": 0.25}, 32, ".safetensors"),
        ({"backbone": "resnet50", "width": 0.25, "padding": "same"}, 32, ".pth"),
        ({"backbone": "byol_resnet18"}, 32, ".pth"),
        ({"backbone": "resnet18d", "width": 0.25}, 32, ".pth"),
        ({"backbone": "byol_resnet18", "width": 0.25, "stem": "small", "padding": "same"}, 32, ".safetensors"),
        ({"backbone": "vit_tiny_patch16_224"}, 224, ".safetensors"),
        ({"backbone": "convnext_atto"}, 32, ".safetensors"),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values()) if isinstance(value, dict) else None,
)
def test_timm_loads_file_with_code_from_card(written, model, size, suffix):
    backbone, _, card = written("timm", size, suffix, **model)
    (code,) = code_of(card)
    assert "fastbyol" not in code
    is_timm = model.get("stem_channels") == 64 or model["backbone"] in (
        "vit_tiny_patch16_224",
        "convnext_atto",
        "resnet18d",
    )
    assert ("checkpoint_path=" in code) == is_timm  # otherwise the code changes timm's network
    assert torch.equal(features(run_code(code)["backbone"], size), features(backbone, size))


@pytest.mark.parametrize(
    ("name", "exact"), [("resnet18", True), ("resnet50", True), ("convnext_tiny", False)], ids=lambda v: str(v)
)
def test_torchvision_loads_file_with_code_from_card(written, name, exact):
    backbone, path, card = written("torchvision", 64, backbone=name)
    (code,) = code_of(card)
    assert f"torchvision.models.{name}()" in code
    theirs, ours = features(run_code(code)["backbone"], 64), features(backbone, 64)
    if exact:
        assert torch.equal(theirs, ours)
    else:
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    fresh, _ = build_backbone(ModelConfig(backbone=name), 64)
    load_backbone(str(path), fresh, name)
    assert_same(fresh.state_dict(), backbone.state_dict())


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def meta_networks(name, size):
    """timm's backbone and torchvision's network of the same architecture, without values."""
    theirs_name, arguments = torchvision_network(name, size)
    with torch.device("meta"):
        ours = timm.create_model(name, num_classes=0)
        return ours, torchvision.models.get_model(theirs_name, **arguments)


def test_torchvision_vit_computes_same_features():
    ours, theirs = meta_networks("vit_base_patch16_224", 224)
    ours = ours.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in ours.state_dict().values():
        tensor.normal_(0, tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1, generator=generator)
    naming = torchvision_naming(ours)
    tensors = naming.to_torchvision(ours.state_dict(), theirs.state_dict())
    theirs.heads = torch.nn.Identity()
    theirs.load_state_dict(tensors, assign=True)
    theirs.eval()
    wanted = features(ours, 224)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(features(theirs, 224), wanted, rtol=1e-5, atol=1e-5)
    assert_same(naming.to_timm(tensors, ours.state_dict()), ours.state_dict())


@pytest.mark.slow
def test_all_torchvision_networks_have_matching_names_and_shapes():
    names = [name for name in timm.list_models() if torchvision_network(name, 224)]
    assert {"resnext50_32x4d", "wide_resnet50_2", "convnext_large", "vit_large_patch32_384"} < set(names)
    for name in names:
        if "_384" in name:  # the same names, other position embeddings
            continue
        ours, theirs = meta_networks(name, 224)
        ours, theirs, naming = ours.state_dict(), theirs.state_dict(), torchvision_naming(ours)
        classifier = "fc" if naming is None else naming.classifier
        wanted = {key: t.shape for key, t in theirs.items() if not key.startswith(classifier + ".")}
        assert len(wanted) == len(theirs) - 2
        renamed = ours if naming is None else naming.to_torchvision(ours, theirs)
        assert {key: tensor.shape for key, tensor in renamed.items()} == wanted, name


def test_torchvision_vit_gets_image_size():
    assert torchvision_network("vit_base_patch16_384", 384) == ("vit_b_16", {"image_size": 384})
    assert torchvision_network("vit_base_patch16_224", 100) is None  # not a multiple of the patch size
    assert torchvision_network("vit_tiny_patch16_224", 224) is None


@pytest.mark.parametrize(
    "model",
    [
        {"backbone": "resnet18", "width": 0.25, "stem": "small"},
        {"backbone": "resnet18", "width": 0.25, "norm": "group", "norm_groups": 4, "weight_standardization": True},
    ],
    ids=["plain", "variant"],
)
def test_safetensors_file_is_self_contained(written, model):
    backbone, path, card = written("safetensors", 48, **model)
    ours, *by_timm = code_of(card)
    assert torch.equal(features(run_code(ours)["backbone"], 48), features(backbone, 48))
    assert len(by_timm) == ("norm" not in model)
    for code in by_timm:
        assert torch.equal(features(run_code(code)["backbone"], 48), features(backbone, 48))
    assert f"fastbyol train --init {path}" in card.read_text()
    assert_same(open_backbone(path).state_dict(), backbone.state_dict())


def detectron2_names(blocks, convolutions, first_shortcut):
    """Return {detectron2's name: timm's name} of a ResNet, independent of the code under test."""
    pairs = {}

    def conv(theirs, ours, norm):
        pairs[f"{theirs}.weight"] = f"{ours}.weight"
        for part in ("weight", "bias", "running_mean", "running_var"):
            pairs[f"{theirs}.norm.{part}"] = f"{norm}.{part}"

    conv("stem.conv1", "conv1", "bn1")
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            theirs, ours = f"res{stage + 1}.{block}", f"layer{stage}.{block}"
            for k in range(1, convolutions + 1):
                conv(f"{theirs}.conv{k}", f"{ours}.conv{k}", f"{ours}.bn{k}")
            if block == 0 and (stage > 1 or first_shortcut):
                conv(f"{theirs}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1")
    return pairs


def detectron2_forward(weights, x, strides):
    """Reference of detectron2's ResNet (STRIDE_IN_1X1: False) and global average pooling."""

    def conv(name, x, stride=1):
        kernel = weights[f"{name}.weight"]
        y = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, weight, bias = (
            weights[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(y, mean, var, weight, bias)

    x = F.max_pool2d(conv("stem.conv1", x, 2).relu(), 3, 2, 1)
    for stage, stride in strides.items():
        block = 0
        while f"{stage}.{block}.conv1.weight" in weights:
            name, step = f"{stage}.{block}", stride if block == 0 else 1
            shortcut = conv(f"{name}.shortcut", x, step) if f"{name}.shortcut.weight" in weights else x
            if f"{name}.conv3.weight" in weights:
                x = conv(f"{name}.conv3", conv(f"{name}.conv2", conv(f"{name}.conv1", x).relu(), step).relu())
            else:
                x = conv(f"{name}.conv2", conv(f"{name}.conv1", x, step).relu())
            x, block = (x + shortcut).relu(), block + 1
    return x.mean((2, 3))


@pytest.mark.parametrize(
    ("model", "layout", "settings"),
    [
        ({"backbone": "resnet18"}, ((2, 2, 2, 2), 2, False), {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}),
        (
            {"backbone": "resnet50", "width": 0.5},
            ((3, 4, 6, 3), 3, True),
            {"DEPTH": 50, "RES2_OUT_CHANNELS": 128, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 32},
        ),
        (
            {"backbone": "resnext50_32x4d"},
            ((3, 4, 6, 3), 3, True),
            {"DEPTH": 50, "RES2_OUT_CHANNELS": 256, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4},
        ),
    ],
    ids=lambda v: v.get("backbone") if isinstance(v, dict) else None,
)
def test_detectron2_file_has_its_names_and_config(written, model, layout, settings):
    backbone, path, card = written("detectron2", 64, **model)
    with path.open("rb") as file:
        content = pickle.load(file)
    assert content["matching_heuristics"] is True
    assert content["__author__"].startswith("fastbyol")
    names, plain = detectron2_names(*layout), backbone.state_dict()
    assert set(content["model"]) == set(names)
    for theirs, ours in names.items():
        array = content["model"][theirs]
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        assert np.array_equal(array, plain[ours].numpy()), theirs
    weights = {name: torch.from_numpy(array) for name, array in content["model"].items()}
    if model["backbone"] != "resnext50_32x4d":  # without groups
        theirs = detectron2_forward(weights, images(64), {"res2": 1, "res3": 2, "res4": 2, "res5": 2})
        torch.testing.assert_close(theirs, features(backbone, 64), rtol=1e-5, atol=1e-5)
    (text,) = code_of(card, "yaml")
    values = yaml.safe_load(text)
    resnets = values["MODEL"]["RESNETS"]
    assert {key: resnets[key] for key in settings} == settings
    assert (resnets["STRIDE_IN_1X1"], resnets["STEM_OUT_CHANNELS"]) == (False, 64 * model.get("width", 1))
    assert values["MODEL"]["PIXEL_MEAN"] == pytest.approx([123.675, 116.28, 103.53])
    assert values["MODEL"]["PIXEL_STD"] == pytest.approx([58.395, 57.12, 57.375])
    assert values["INPUT"]["FORMAT"] == "RGB"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size"),
    [
        ({"backbone": "resnet18", "width": 0.25}, 32),
        ({"backbone": "resnet18", "width": 0.125, "norm": "layer", "weight_standardization": True}, 32),
        (
            {
                "network": VisionTransformer(
                    img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0
                )
            },
            32,
        ),
    ],
    ids=["resnet18", "variant", "vit"],
)
def test_onnx_features_match_for_any_batch_size(written, model, size):
    onnx = pytest.importorskip("onnx")
    backbone, path, card = written("onnx", size, **model)
    assert onnx.load(path).opset_import[0].version >= 17
    (code,) = code_of(card)
    for count in (1, 3, 5):
        x = images(size, count)
        with torch.no_grad():
            wanted = backbone(x)
        names = run_code(code)
        got = torch.from_numpy(names["session"].run(None, {"images": x.numpy()})[0])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_wrong_onnx_file_is_removed(written, monkeypatch, tmp_path):
    pytest.importorskip("onnx")
    export_network = torch.onnx.export

    def wrong(network, *args, **options):
        network = copy.deepcopy(network)
        network.bn1.bias.data += 1
        return export_network(network, *args, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(RunError, match="onnxruntime's features differ from PyTorch's by"):
        written("onnx", backbone="resnet18", width=0.125)
    assert list(tmp_path.iterdir()) == []


def test_missing_onnx_packages_are_named(written, monkeypatch):
    monkeypatch.setattr(environment, "has_module", lambda name: name == "onnx")
    with pytest.raises(
        InputError, match=r"needs onnxscript and onnxruntime: pip install 'onnxscript>=[\d.]+' 'onnxruntime>=[\d.]+'$"
    ):
        written("onnx", backbone="resnet18", width=0.125)


def test_install_commands_match_pyproject():
    """fastbyol is in no registry, so no command may install an extra of it."""
    root = ROOT
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert environment.onnx_command(environment.ONNX_PACKAGES) == "pip install " + " ".join(
        f"'{requirement}'" for requirement in extras["onnx"]
    )
    texts = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("fastbyol/**/*.py"), *root.glob("benchmarks/*.py")]
    for path in texts:
        assert not re.search(r"install [^\n]*fastbyol\[", path.read_text()), path


ODD_NAMES = ["a run", 'it\'s "so" & $HOME `id`', "-größe 模型 back\\slash|pipe ```"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("form", ["timm", "torchvision", "safetensors", "detectron2"])
def test_card_code_runs_with_unusual_paths(tmp_path, monkeypatch, capsys, log_lines, form, name):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    backbone, card = exported(form, folder, name, relative=True)
    assert log_lines == []
    text = card.read_text(encoding="utf-8")
    monkeypatch.chdir("/")
    for code in fences(text, "python"):
        names = run_code(code)
        if "backbone" in names:
            assert torch.equal(names["features"], backbone(torch.zeros(1, 3, 32, 32)))
            assert capsys.readouterr().out == f"{names['features'].shape}\n"
    for code in fences(text, "yaml"):
        with open(yaml.safe_load(code)["MODEL"]["WEIGHTS"], "rb") as file:
            assert "stem.conv1.weight" in pickle.load(file)["model"]
    for code in fences(text, "sh"):
        assert shlex.split(code)[-1] == str(folder / f"{name}.safetensors")
    assert len(fences(text, "python")) == {"safetensors": 3, "detectron2": 1}.get(
        form, 2
    )  # one of them is the preprocessing


def test_non_utf8_path_raises_input_error(written, make_config, tmp_path):
    run = train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder
    backbone, path, _ = written("safetensors")
    folder = tmp_path / "ex\udce9"
    folder.mkdir()
    with pytest.raises(InputError, match=r"--out .*the path is not valid UTF-8, which other libraries cannot open"):
        export.export(run, "timm", folder / "x.pth")
    (folder / "x.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="the path is not valid UTF-8, which safetensors cannot open; rename it"):
        load_backbone(str(folder / "x.safetensors"), backbone, "resnet18")


def exported(form, folder, name, relative=False):
    """Export a small backbone as NAME.SUFFIX; returns the backbone and the card."""
    small = {} if form in ("torchvision", "detectron2") else {"width": 0.125}
    config = configured(32, {"backbone": "resnet18"} | small)
    config.name = name
    backbone, count = build_backbone(config.model, 32)
    randomize(backbone)
    source = Source(
        checkpoint=folder / "s.pt", config=config, backbone=backbone.eval().requires_grad_(False), features=count
    )
    out = Path(f"{name}{FORMATS[form].suffixes[0]}")
    return backbone, folder / export.write(source, form, out if relative else folder / out)


def fences(text, language):
    return [code for _, code in re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)]


def test_non_utf8_run_name(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    backbone, card = exported("torchvision", tmp_path, name)
    code, _ = fences(card.read_text(encoding="utf-8"), "python")
    assert torch.equal(run_code(code)["features"], backbone(torch.zeros(1, 3, 32, 32)))


@pytest.mark.slow
def test_card_code_runs_in_fresh_process(tmp_path):
    pytest.importorskip("onnx")
    for form in FORMATS:
        folder = tmp_path / f"{form}'s $1"
        folder.mkdir()
        _, card = exported(form, folder, "a run")
        code = "\n".join(fences(card.read_text(), "python"))
        done = subprocess.run(
            [sys.executable, "-W", "error::SyntaxWarning", "-c", code],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        shapes = (
            []
            if form == "detectron2"
            else ["(1, 64)"]
            if form == "onnx"
            else [f"torch.Size([1, {512 if form == 'torchvision' else 64}])"]
        )
        assert done.stdout.splitlines() == shapes * (2 if form == "safetensors" else 1)


@pytest.mark.parametrize(
    ("form", "model", "message"),
    [
        (
            "torchvision",
            {"width": 0.5},
            "torchvision has no resnet18 with model.width=0.5; use --format timm, safe",
        ),
        ("torchvision", {"stem": "small"}, "no resnet18 with model.stem=small"),
        (
            "torchvision",
            {"backbone": "resnet26"},
            "no torchvision network computes the same as resnet26 at 32 px; use --format timm or safetensors",
        ),
        ("torchvision", {"backbone": "resnet50d"}, "no torchvision network computes the same as resnet50d"),
        ("torchvision", {"backbone": "convnext_atto"}, "no torchvision network computes the same as convnext_atto"),
        ("torchvision", {"backbone": "vgg11"}, "no torchvision network computes the same as vgg11"),
        ("torchvision", {"norm": "group"}, "model.norm=group; use --format safetensors or onnx"),
        ("timm", {"norm": "layer"}, "timm has no resnet18 with model.norm=layer; use --format safetensors or onnx"),
        ("timm", {"weight_standardization": True}, "model.weight_standardization=True; use"),
        ("detectron2", {"weight_standardization": True}, "model.weight_standardization=True; use"),
        ("detectron2", {"stem": "small"}, "detectron2 has no resnet18 with model.stem=small"),
        ("torchvision", {"padding": "same"}, "no resnet18 with model.padding=same; use --format timm, safe"),
        ("torchvision", {"stem_channels": 32}, "no resnet18 with model.stem_channels=32; use --format timm, safe"),
        ("torchvision", {"backbone": "byol_resnet18"}, "no torchvision network computes the same as byol_resnet18"),
        ("detectron2", {"padding": "same"}, "detectron2 has no resnet18 with model.padding=same; use --format timm"),
        ("detectron2", {"backbone": "byol_resnet18"}, "detectron2 has no byol_resnet18; use --format timm or safe"),
        ("detectron2", {"width": 2.0}, "detectron2 has no resnet18 with model.width=2"),
        ("detectron2", {"backbone": "resnet50d"}, "detectron2 has no resnet50d"),
        ("detectron2", {"backbone": "convnext_atto"}, "detectron2 has no convnext_atto"),
    ],
)
def test_unsupported_network_raises_one_line_error(tmp_path, form, model, message):
    config = configured(32, {"backbone": "resnet18"} | model)
    source = Source(checkpoint=tmp_path / "s.pt", config=config, backbone=torch.nn.Identity(), features=1)
    with pytest.raises(InputError, match=f"--format {form}: .*{re.escape(message)}") as caught:
        export.write(source, form, tmp_path / f"x{FORMATS[form].suffixes[0]}")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_failed_export_leaves_no_files(make_run, tmp_path, monkeypatch, log_lines):
    folder, _ = make_run(backbone="resnet18", width=0.125)
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    with pytest.raises(InputError, match=r"--out .*x.safetensors: already exists; remove it"):
        export.export(folder, "timm", out)
    assert out.read_text() == "mine"
    out.rename(tmp_path / "x.md")
    with pytest.raises(InputError, match=r"the model card .*x.md: already exists"):
        export.export(folder, "timm", out)
    (tmp_path / "x.md").unlink()
    with pytest.raises(InputError, match=r"nowhere/x.pth: for --format safetensors the name must end in .safetensors$"):
        export.export(folder, "safetensors", tmp_path / "nowhere" / "x.pth")
    with pytest.raises(InputError, match=r"^--out .*x.pth: cannot be written: there is no folder .*nowhere$"):
        export.export(folder, "timm", tmp_path / "nowhere" / "x.pth")

    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"--out .*x.safetensors: cannot be written: No space left on device"):
        export.export(folder, "timm", out)
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert log_lines == []


@pytest.mark.slow
def test_export_command(make_run, capsys, monkeypatch):
    folder, backbone = make_run(backbone="resnet18", width=0.125)
    write, seen = export.write, []
    monkeypatch.setattr(export, "write", lambda source, *args: seen.append(source) or write(source, *args))
    assert main(["export", str(folder), "--format", "timm"]) == 0
    assert torch.equal(features(seen[0].backbone), features(backbone))  # the online network, in eval mode
    assert seen[0].features == features(backbone).shape[1]
    path = folder.parent / "r-resnet18-step_00000007-timm.safetensors"
    assert capsys.readouterr().out == (
        f"wrote {path} (resnet18 for timm, {path.stat().st_size / 1e6:.1f} MB) and {path.with_suffix('.md')}\n"
    )
    assert_same(load_file(path), backbone.state_dict())
    assert path.stat().st_mode & 0o777 == 0o644
    assert main(["export", str(folder), "--format", "timm"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"--out: the model card {path.with_suffix('.md')}: already exists" in err
    # Next to a checkpoint file outside a run; next to a run that is the working directory.
    alone = folder / "copy.pt"
    (folder / "checkpoints" / "step_00000007.pt").rename(alone)
    assert main(["export", str(alone), "--format", "timm"]) == 0
    assert (folder / "r-resnet18-copy-timm.safetensors").exists()
    path.unlink()
    path.with_suffix(".md").unlink()
    alone.rename(folder / "checkpoints" / "step_00000007.pt")
    monkeypatch.chdir(folder)
    assert main(["export", ".", "--format", "timm"]) == 0
    assert path.exists()
    capsys.readouterr()
    for arguments, message in (
        (["x", "--format", "caffe"], "caffe"),
        ([str(folder)], "format"),
        (["/nowhere", "--format", "timm"], "cannot be read"),
    ):
        assert main(["export", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert message in err


def test_card_contains_settings_results_and_environment(make_run, log_lines):
    folder, _ = make_run(backbone="resnet18", width=0.125)
    (folder / "environment.json").write_text('{"fastbyol": "0.1.0 abc1234", "gpu": "H100"}')
    (folder / "eval_knn.json").write_text(
        '{"protocol": "knn", "checkpoint": "runs/r/checkpoints/step_00000005.pt", "root": "/data/photos",'
        ' "train_images": 72, "val_images": 18, "classes": 18, "settings": {},'
        ' "rows": {"BYOL": {"top1": 0.63444, "top5": 0.9}, "raw pixels": {"top1": 0.25, "note": "few"}}}'
    )
    export.export(folder, "timm", folder / "x.pth")
    text = (folder / "x.md").read_text()
    assert "knn of runs/r/checkpoints/step_00000005.pt on /data/photos:" in text
    assert "| features | top1 | top5 |\n|---|---|---|\n| BYOL | 0.6344 | 0.9 |\n| raw pixels | 0.25 |  |" in text
    for part in (
        "| gpu | H100 |",
        "| model.width | 0.125 |",
        "/data/photos, split train",
        '"image_size_px": 32',
        "## License",
    ):
        assert part in text
    (folder / "eval_linear.json").write_text('{"rows": 3}')
    assert log_lines == []
    export.export(folder, "safetensors", folder / "y.safetensors")
    (line,) = log_lines
    assert re.match(r"warning: .*eval_linear.json: not a result of `fastbyol eval`", line)
    assert "knn of" in (folder / "y.md").read_text()


@pytest.mark.parametrize("name", ["<b>x", "a*b*", "`x`", "[x](y)", "a|b", "a\\*b", "<!-- x"])
def test_names_are_escaped_in_markdown(name):
    escaped = export._escape(name)
    assert re.search(r"(?<!\\)(\\\\)*[`*<\[|]", escaped) is None
    assert re.sub(r"\\(.)", r"\1", escaped) == name


def test_card_preprocessing_matches_evaluation(written, folder_of):
    """Mean difference below 1/255: our bicubic kernel and Pillow's round differently."""
    y, x = np.mgrid[:160, :200]
    pixels = np.stack([127 + 100 * np.sin(x / 15), 127 + 100 * np.cos(y / 12), x + y / 4], -1).astype(np.uint8)
    content = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95)
    root = folder_of({"train/a/x.jpg": content, "train/b/y.jpg": content})
    _, _, card = written("timm", 48, backbone="resnet18", width=0.125)
    code = re.search(r"## Preprocessing.*?```python\n(.*?)```", card.read_text(), re.DOTALL)[1]
    theirs = run_code(code)["preprocess"](Image.fromarray(simplejpeg.decode_jpeg(content)))
    split = find_images(DataConfig(root=str(root)), "train")
    (batch,) = center_crops(split, size=48, fraction=CENTER_FRACTION, batch_size=2, threads=1, bad={})
    assert theirs.shape == batch[0][0].shape
    assert (theirs - batch[0][0]).abs().mean() * 0.225 < 1 / 255
