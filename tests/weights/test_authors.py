"""Checkpoints of BYOL's authors: features, commands, and files that must not be loaded."""

import json
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.authors_files import FlatMapping, checkpoint, features, haiku_network, write
from torch import nn

from fastbyol import cli
from fastbyol.backbones import pad_same
from fastbyol.build import build_model
from fastbyol.config import Config, ModelConfig
from fastbyol.errors import InputError
from fastbyol.layers import set_num_views
from fastbyol.weights import authors, load
from fastbyol.weights.load import load_backbone, load_checkpoint_model, open_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = {"hidden_dim": 24, "projection_dim": 12}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of the authors' ResNet-18: path, online network, target network."""
    online, target = haiku_network("res_net18", seed=1), haiku_network("res_net18", seed=2)
    path = write(tmp_path_factory.mktemp("authors") / "pretrain.pkl", checkpoint(online, target))
    return path, online, target


def images(size, count=3):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=rng).to(memory_format=torch.channels_last)


def features_of(encoder, x):
    with torch.no_grad():
        return set_num_views(encoder, 1).eval()(x)


@pytest.mark.parametrize(
    ("name", "width", "like_dill", "protocol"),
    [("res_net18", 1, True, 2), ("res_net18", 2, False, 4), ("res_net50", 1, True, 2), ("res_net50", 1, False, 5)],
)
def test_features_equal_the_authors(tmp_path, name, width, like_dill, protocol):
    online = haiku_network(name, width)
    content = checkpoint(online, haiku_network(name, width, seed=1), mapping=dict if protocol == 5 else FlatMapping)
    path = write(tmp_path / "x.pkl", content, like_dill=like_dill, protocol=protocol)
    loaded = load_checkpoint_model(path)
    expected = "byol_resnet18" if name == "res_net18" else "resnet50"
    assert loaded.config.model == ModelConfig(backbone=expected, width=width, padding="same", **HEADS)
    assert loaded.step == 312784
    for size in (32, 47):
        x = images(size)
        exact = features(*online, x)
        assert (features_of(loaded.model.online.backbone, x) - exact).abs().max() < 2e-5
    assert loaded.model.online.backbone.bn1.num_batches_tracked == 7


def test_heads_and_target_are_loaded(small):
    path, online, target = small
    model = load_checkpoint_model(path).model.eval()
    for params, state, head, name in (
        (*online, model.online.projector, "projector"),
        (*online, model.predictor, "predictor"),
        (*target, model.target.projector, "projector"),
    ):
        set_num_views(head, 1)
        linear, norm, last = params[f"{name}/linear"], params[f"{name}/batch_norm"], params[f"{name}/linear_1"]
        mean, var = (state[f"{name}/batch_norm/~/{kind}_ema"]["average"] for kind in ("mean", "var"))
        x = np.random.default_rng(0).standard_normal((4, len(linear["w"]))).astype(np.float32)
        y = (x @ linear["w"] + linear["b"] - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["offset"]
        with torch.no_grad():
            assert np.abs(head(torch.from_numpy(x)).numpy() - np.maximum(y, 0) @ last["w"]).max() < 1e-5
    x = images(32)
    assert (features_of(model.target.backbone, x) - features(*target, x)).abs().max() < 2e-5


def test_init_of_a_fused_network(small):
    path, online, _ = small
    config = ModelConfig(backbone="byol_resnet18", padding="same")
    model = build_model(config, 32, 0)
    text = load_backbone(str(path), model.online.backbone, config.backbone, config=config)
    assert "after 312784 steps" in text
    assert "CC BY-NC 4.0" in text
    x = images(32)
    assert (features_of(model.online.backbone, x) - features(*online, x)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet50"}, "contains byol_resnet18, not resnet50; set model.backbone=byol_resnet18"),
        ({"backbone": "byol_resnet18", "width": 0.5}, "trained with model.width=1.0, not 0.5; set model.width=1.0"),
        ({"backbone": "byol_resnet18"}, "trained with model.padding=same, not symmetric; set model.padding=same"),
    ],
)
def test_other_networks_are_refused(small, settings, message):
    path, *_ = small
    config = ModelConfig(**settings, hidden_dim=8, projection_dim=4)
    with pytest.raises(InputError, match=re.escape(message)):
        load_backbone(str(path), build_model(config, 32, 0).online.backbone, config.backbone, config=config)


def test_a_network_with_other_padding_is_refused(small):
    """The tensors alone would fit."""
    path, online, _ = small
    backbone = timm.create_model("resnet18", num_classes=0)
    backbone.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64))
    with pytest.raises(InputError, match="trained with model.padding=same: build the backbone with that setting"):
        load_backbone(str(path), backbone, "byol_resnet18")
    pad_same(backbone)
    load_backbone(str(path), backbone, "byol_resnet18")
    x = images(32)
    with torch.no_grad():
        assert (backbone.eval()(x) - features(*online, x)).abs().max() < 2e-5


def test_train_sets_the_padding(small, photos, tmp_path, capfd):
    path, *_ = small
    words = ["train", "--init", str(path), "--data.root", str(photos), "--model.backbone", "byol_resnet18"]
    words += ["--runs", str(tmp_path), "--data.image_size_px", "32", "--data.batch_size", "36", "--optim.epochs", "1"]
    words += ["--model.hidden_dim", "8", "--model.projection_dim", "4", "--knn.every_epochs", "0", "--device", "cpu"]
    assert cli.main(words) == 0
    config = Config.from_dict(json.loads((tmp_path / "byol" / "config.json").read_text()))
    assert config.model.padding == "same"
    assert f"init={path}: model.padding=same, as in the authors' code" in capfd.readouterr().out
    assert (
        cli.main(
            ["export", str(tmp_path / "byol"), "--format", "safetensors", "--out", str(tmp_path / "x.safetensors")]
        )
        == 0
    )
    card = (tmp_path / "x.md").read_text()
    assert f"| initial weights | {path} |" in card
    assert "began with weights of BYOL's authors; those that they released are under CC BY-NC 4.0" in card


def test_eval_and_export_take_the_file(small, photos, tmp_path, capfd):
    path, online, _ = small
    copy = tmp_path / "pretrain.pkl"
    copy.write_bytes(path.read_bytes())
    words = ["eval", "knn", "--run", str(copy), "--root", str(photos), "--baselines", "false", "--device", "cpu"]
    assert cli.main(words) == 0
    (result,) = tmp_path.glob("eval_knn_*.json")
    assert json.loads(result.read_text())["step"] == 312784
    for name in ("torchvision", "detectron2"):
        assert cli.main(["export", str(copy), "--format", name]) == 2
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert "padding=same" in line
    for name, suffix in (("timm", "pth"), ("safetensors", "safetensors")):
        out = tmp_path / f"{name}.{suffix}"
        assert cli.main(["export", str(copy), "--format", name, "--out", str(out)]) == 0
        card = out.with_suffix(".md").read_text()
        assert "by its authors, converted by fastbyol" in card
        assert "CC BY-NC 4.0" in card
        assert "optim" not in card
        code = re.findall(r"```python\n(.*?)```", card.split("## Preprocessing")[0], re.DOTALL)
        x = images(48)
        for block in code:
            names: dict = {}
            exec(block, names)
            with torch.no_grad():
                assert (names["backbone"](x) - features(*online, x)).abs().max() < 2e-5
    x = images(32)
    with torch.no_grad():
        assert (open_backbone(tmp_path / "safetensors.safetensors")(x) - features(*online, x)).abs().max() < 2e-5


def test_onnx_holds_the_padding(small, tmp_path):
    pytest.importorskip("onnxscript")
    assert cli.main(["export", str(small[0]), "--format", "onnx", "--out", str(tmp_path / "x.onnx")]) == 0


# --- files that are refused ---


class Bomb:
    """Creates a file when it is unpickled as usual."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def bombs(target):
    yield Bomb(os.system, f"touch {target}"), "posix.system"
    yield Bomb(exec, f"open({str(target)!r}, 'w')"), "builtins.exec"
    yield {"experiment_state": Bomb(open, str(target), "w")}, r"(io|_io).open"
    yield {"experiment_state": Bomb(Path.touch, target)}, r"pathlib\.[\w.]+|builtins.getattr"


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("command", ["train", "eval", "export"])
def test_nothing_is_executed(tmp_path, capfd, index, protocol, command):
    target, path = tmp_path / "executed", tmp_path / "bomb.pkl"
    content, name = list(bombs(target))[index]
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    words = {
        "train": ["train", "--init", str(path), "--runs", str(tmp_path), "--data.root", str(tmp_path)],
        "eval": ["eval", "knn", "--run", str(path), "--root", str(tmp_path)],
        "export": ["export", str(path), "--format", "timm"],
    }[command]
    if command == "train":
        with pytest.raises(InputError) as caught:
            load_backbone(str(path), build_model(ModelConfig(**SMALL), 32, 0).online.backbone, "resnet18")
        lines = [str(caught.value)]
    else:
        assert cli.main(words) == 2
        lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(
        rf"it contains ({name}|__builtin__.\w+|copy_?reg\.\w+), which is not loaded because it could", lines[0]
    )
    assert not target.exists()


SMALL = {"backbone": "resnet18", "width": 0.125, "hidden_dim": 8, "projection_dim": 4}


def error_of(path):
    with pytest.raises(InputError) as caught:
        authors.read_authors(path, f"init={path}")
    message = str(caught.value)
    assert message.startswith(f"init={path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999999])
def test_truncated_files(small, tmp_path, share):
    content = small[0].read_bytes()
    path = tmp_path / "x.pkl"
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged, truncated or not a pickle of plain values; download it again" in error_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"stem.conv1.weight": np.zeros(3)}}, "it has no 'experiment_state'"),
        ([1, 2], "it has no 'experiment_state'"),
        ({"experiment_state": 3}, "its 'experiment_state' is not a _ByolExperimentState"),
        ({"experiment_state": ({}, {}, {}, {}, {}), "step": 1}, "it has no ResNet"),
        (
            {"experiment_state": ({"mlp/linear": {"w": np.zeros((2, 2))}}, {}, {}, {})},
            "its module 'mlp/linear' is unknown",
        ),
        (
            {"experiment_state": ({"net/~/initial_conv": {"w": "text"}}, {}, {}, {})},
            "its 'net/~/initial_conv/w' is no array",
        ),
        ({"experiment_state": ({}, {}, {"x": {"average": np.zeros(2)}}, {})}, "its state 'x' is unknown"),
        ({"experiment_state": ({3: {"w": np.zeros(2)}}, {}, {}, {})}, "its modules and parameters have no names"),
        ({"experiment_state": ({}, {}, {}, {}), "step": np.array(np.nan)}, "'step' is no integer"),
        ({"experiment_state": ({}, {}, {}, {}), "step": "three"}, "its 'step' is no integer"),
        (
            {"experiment_state": ({}, {}, {"x/initial_batchnorm/~/mean_ema": {"counter": np.zeros(3, int)}}, {})},
            "'x/initial_batchnorm/~/mean_ema/counter' is no integer",
        ),
        ({"experiment_state": np.array([None])}, "it contains an array of type 'O8', which is not supported"),
    ],
)
def test_foreign_pickles(tmp_path, content, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content))
    assert message in error_of(path)


def test_foreign_classes_are_named(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"experiment_state": torch.nn.Linear(2, 2)}))
    assert "it contains torch.nn.modules.linear.Linear, which is not loaded" in error_of(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params, state: params.pop("res_net18/~/initial_conv"), "it has no ResNet"),
        (lambda params, state: state.clear(), "bn1.running_mean is missing"),
        (
            lambda params, state: params["res_net18/~/initial_batchnorm"].update(scale=np.ones(3, np.float32)),
            "bn1.weight has shape 3, expected 64",
        ),
        (
            lambda params, state: params.update({"x/~/initial_conv": params["res_net18/~/initial_conv"]}),
            "its parameter 'x/~/initial_conv/w' occurs twice",
        ),
        (
            lambda params, state: params["res_net18/~/initial_conv"]["w"].fill(np.nan),
            "conv1.weight contains non-finite values",
        ),
        (
            lambda *trees: [tree.pop(name) for tree in trees for name in list(tree) if "group_3/~/block_1" in name],
            "its network has 2, 2, 2, 1 blocks per stage",
        ),
    ],
)
def test_incomplete_networks(tmp_path, change, message):
    online = haiku_network("res_net18")
    change(*online)
    path = write(tmp_path / "x.pkl", checkpoint(online, haiku_network("res_net18")))
    with pytest.raises(InputError, match=re.escape(message)):
        load_checkpoint_model(path)


def test_memory_and_time_are_bounded_by_the_file(tmp_path):
    """Counts, memo indices and nested keys that would take gigabytes or years."""
    path = tmp_path / "x.pkl"
    nested = b"K\x00" + b"2\x86" * 60  # DUP, TUPLE2: 2^60 leaves
    start, end = b"\x80\x04}X\x10\x00\x00\x00experiment_state", b"sX\x04\x00\x00\x00stepK\x01s."
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"\x94"
    for code in (
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # BYTEARRAY8
        b"\x80\x05\x8e" + struct.pack("<Q", 1 << 62) + b".",  # BINBYTES8
        b"\x80\x02K\x00r" + struct.pack("<I", 0xFFFFFFFF) + b".",  # LONG_BINPUT
        b"\x80\x02}" + nested + b"K\x00s.",  # a key
        b"\x80\x04\x8f(" + nested + b"\x90.",  # a set
        b"\x80\x04cnumpy\ndtype\n" + nested + b"\x85R.",  # a value that a message would show
        b"\x80\x04c_codecs\nencode\nX\x01\x00\x00\x00a" + nested + b"\x86R.",
        b"\x80\x04]" + text + (b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86Ra" * 5000) + b".",  # 5 GB
        start + b"(chaiku\nX\n)R\x94h\x00bh\x00h\x00h\x00t" + end,  # a stand-in that contains itself
    ):
        path.write_bytes(code)
        error_of(path)


@pytest.mark.parametrize(
    "change",
    [
        {"net/~/initial_conv": {"w": np.zeros((0, 7, 3, 16384), np.float32)}},  # of width 256
        {"net/~/initial_conv": {"w": np.zeros((1, 1, 1, 16384), np.int8)}},
        {"projector/linear_1": {"scale": np.zeros(1 << 20, np.int8)}},
    ],
)
def test_small_files_do_not_build_large_networks(tmp_path, monkeypatch, change):
    params = {
        "net/~/initial_conv": {"w": np.zeros((7, 7, 3, 64), np.float32)},
        **{
            f"net/~/block_group_{g}/~/block_{b}/~/conv_0": {"w": np.zeros((1, 1, 1, 1))}
            for g in range(4)
            for b in (0, 1)
        },
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"experiment_state": (params | change, {}, {}, {}), "step": 1}))
    real = load.build_model

    def build_on_meta(*args):
        assert torch.get_default_device().type == "meta"
        return real(*args)

    monkeypatch.setattr(load, "build_model", build_on_meta)
    with pytest.raises(InputError):
        load_checkpoint_model(path)


def test_an_array_counts_as_often_as_it_is_named(tmp_path):
    array = np.zeros((7, 7, 3, 64), np.float32)
    params = {f"net/~/block_group_0/~/block_{k}/~/conv_0": {"w": array} for k in range(400)}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"experiment_state": (params, {}, {}, {})}))
    assert "its arrays are larger than the file" in error_of(path)


@pytest.mark.parametrize(
    ("params", "state", "message"),
    [
        ({"block_group_" + "9" * 5000 + "/block_0/conv_0": {"w": 0}}, {}, "is unknown"),
        ({10**5000: {"w": 0}}, {}, "damaged, truncated or not a pickle of plain values|a key of type int"),
        ({"x" * 10**6: {"w": 0}}, {}, "its module 'x+...' is unknown"),
        ({}, {"initial_batchnorm/~/mean_ema": {"counter": 2**70}}, "counter' is no integer|is out of range"),
        ({}, {"initial_batchnorm/~/mean_ema": {"counter": np.array(2**63, np.uint64)}}, "counter' is out of range"),
    ],
)
def test_messages_are_short(tmp_path, params, state, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"experiment_state": (params, {}, state, {}), "step": 1}))
    text = error_of(path)
    assert re.search(message, text)
    assert len(text) < 500


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.pkl")
    assert "not a file" in error_of(tmp_path / "x.pkl")


def test_heads_of_different_sizes_are_left_out(tmp_path, log_lines):
    online = haiku_network("res_net18")
    params = online[0] | {"predictor/linear": {"w": np.zeros((12, 99), np.float32), "b": np.zeros(99, np.float32)}}
    path = write(tmp_path / "x.pkl", checkpoint((params, online[1]), online))
    x = images(32)
    assert (features_of(load_checkpoint_model(path).model.online.backbone, x) - features(*online, x)).abs().max() < 2e-5
    assert any("of different sizes; they are left out" in line for line in log_lines)


@pytest.mark.parametrize("module", ["__main__", "byol_experiment", "deepmind_research.byol.byol_experiment"])
def test_state_classes_of_other_modules(tmp_path, log_lines, module):
    """The classes are known by name in any module; unknown heads are left out."""
    online = haiku_network("res_net18")
    params = {path.replace("projector/linear", "projector/~/other"): values for path, values in online[0].items()}
    content = checkpoint((params, online[1]), online)
    path = write(tmp_path / "x.pkl", content, like_dill=False, module=module)
    x = images(32)
    assert (features_of(load_checkpoint_model(path).model.online.backbone, x) - features(*online, x)).abs().max() < 2e-5
    assert any("they are left out" in line for line in log_lines)


def test_init_of_another_kind_of_network(small, tmp_path):
    words = ["train", "--init", str(small[0]), "--data.root", str(tmp_path), "--model.backbone", "vit_tiny_patch16_224"]
    assert cli.main(words) == 2


def test_reading_leaves_nothing_behind(small, tmp_path):
    """A second reader is not affected by what the first file set."""
    before = (
        dict(authors._BUILT),
        {name: vars(kind).copy() for name, kind in vars(authors).items() if isinstance(kind, type)},
    )
    authors.read_authors(small[0], "x")
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02cdill._dill\n_create_array\n}X\x01\x00\x00\x00aK\x01sb.")  # BUILD on a function
    with pytest.raises(InputError, match="a state of type function"):
        authors.read_authors(path, "x")
    assert dict(authors._BUILT) == before[0]
    assert {name: vars(kind).copy() for name, kind in vars(authors).items() if isinstance(kind, type)} == before[1]
