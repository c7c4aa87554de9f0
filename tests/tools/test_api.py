"""The public API, and code named by configs and checkpoints."""

import dataclasses
import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.common import jpeg, losses
from torch import nn

import fastbyol
from fastbyol import plugins
from fastbyol.cli import main
from fastbyol.config import Config, DataConfig, KnnConfig, ModelConfig, OptimConfig
from fastbyol.errors import InputError

IMAGES = [(jpeg(k // 4), k % 2) for k in range(48)]  # few images, many labels each: kNN has neighbors


class Net(nn.Module):
    """A backbone of no library."""

    def __init__(self, width=8):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1)
        )

    def forward(self, x):
        return F.relu(self.features(x)).mean((2, 3))


@pytest.fixture
def clean(monkeypatch):
    """Registries as of a new process."""
    for name in ("_backbones", "_image_sets"):
        monkeypatch.setattr(plugins, name, {})
    monkeypatch.setattr(plugins, "_modules", set())


@pytest.fixture
def config(tmp_path):
    return Config(
        name="r",
        runs=str(tmp_path / "runs"),
        device="cpu",
        data=DataConfig(batch_size=16, image_size_px=32, threads=2),
        model=ModelConfig(backbone="resnet18", width=0.125, stem="small", hidden_dim=16, projection_dim=8),
        optim=OptimConfig(epochs=2, warmup_epochs=1),
        knn=KnnConfig(every_epochs=1, k=3),
    )


def plain(config):
    return dataclasses.replace(config, model=ModelConfig(hidden_dim=16, projection_dim=8))


def test_public_names():
    assert set(fastbyol.__all__) <= set(dir(fastbyol))
    for name in fastbyol.__all__:
        assert getattr(fastbyol, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastbyol.nothing  # noqa: B018
    with pytest.raises(ImportError):
        exec("from fastbyol import nothing")


def test_import_is_light():
    code = "import sys, fastbyol; assert 'torch' not in sys.modules; fastbyol.LARS; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_on_own_images_and_backbone_then_evaluate_embed_and_load(config, tmp_path):
    """One object each, in every function that takes them."""
    torch.manual_seed(0)
    net, config = Net(), plain(config)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = fastbyol.train(config, images=IMAGES, val_images=IMAGES[:20], backbone=net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert result.step == 6
    rows = fastbyol.evaluate("knn", result.folder, images=IMAGES, val_images=IMAGES[:20], backbone=Net(), k=3)["rows"]
    assert list(rows) == ["BYOL", "untrained network", "raw pixels"]
    assert rows["raw pixels"]["top1"] > 0
    backbone = fastbyol.load_backbone(result.folder, backbone=Net)
    assert not backbone.training
    x = torch.rand(3, 3, 32, 32)
    assert backbone(x).shape == (3, 16)
    assert not torch.equal(backbone.features[0].weight, net.features[0].weight)
    folder = fastbyol.embed(result.folder, IMAGES, tmp_path / "features", backbone=Net)
    assert np.load(folder / "features-00000.npy").shape == (48, 16)
    for call in (
        lambda: fastbyol.load_backbone(result.folder),
        lambda: fastbyol.evaluate("knn", result.folder, images=IMAGES, val_images=IMAGES),
        lambda: fastbyol.embed(result.folder, IMAGES, tmp_path / "other"),
    ):
        with pytest.raises(
            InputError, match="model.backbone=object:Net: the run's backbone was a Python object; give it"
        ):
            call()


def test_a_module_a_function_and_a_name_train_alike(config, tmp_path):
    """A module is copied, so its weights are those of the run; a function draws from the run's
    seed.
    """
    config = plain(config)
    for name, backbone in (("function", Net), ("again", lambda: Net(8))):
        fastbyol.train(dataclasses.replace(config, name=name), images=IMAGES, backbone=backbone)
    assert losses(tmp_path / "runs" / "function") == losses(tmp_path / "runs" / "again")
    result = fastbyol.train(dataclasses.replace(config, name="name"), images=IMAGES, backbone="mobilenetv3_small_050")
    assert result.step == 6


def test_images_of_a_path(config, tmp_path):
    for k, (data, label) in enumerate(IMAGES):
        for split in ("train", "val"):
            (tmp_path / "set" / split / f"c{label}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / split / f"c{label}" / f"{k:02d}.jpg").write_bytes(data)
    result = fastbyol.train(config, images=tmp_path / "set")
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["knn_last"] is not None
    again = dataclasses.replace(config, name="again")
    other = fastbyol.train(again, images=str(tmp_path / "set" / "train"), val_images=tmp_path / "set" / "val")
    assert json.loads((other.folder / "summary.json").read_text())["knn_last"] == summary["knn_last"]
    assert losses(other.folder) == losses(result.folder)


def test_resume_with_own_images(config):
    result = fastbyol.train(config, images=IMAGES)
    config.resume, config.optim = "auto", dataclasses.replace(config.optim, epochs=3)
    assert fastbyol.train(config, images=IMAGES).step == result.step + 3
    config.optim = dataclasses.replace(config.optim, epochs=4)
    with pytest.raises(InputError, match="was made on other images"):
        fastbyol.train(config, images=[(data, 1 - label) for data, label in IMAGES])


def test_build_loader():
    loader = fastbyol.build_loader(IMAGES, batch_size=16, image_size_px=32, threads=2)
    assert len(loader) == 3
    epochs = [[batch.indices.tolist() for batch in loader] for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [3, 3]
    assert epochs[0] != epochs[1]
    assert sorted(itertools.chain(*epochs[1])) == list(range(48))
    direct = [batch.indices.tolist() for batch in loader.batches(0, 6)]
    assert direct == epochs[0] + epochs[1]
    for batch in loader:
        assert batch.views[0].shape == (16, 3, 32, 32)
        break
    with pytest.raises(ValueError, match=r"data\.batch: unknown key; did you mean data\.batch_size"):
        fastbyol.build_loader(IMAGES, batch=16)
    with pytest.raises(InputError, match="batch_size=auto"):
        fastbyol.build_loader(IMAGES, batch_size="auto")


def test_own_loop_of_the_parts():
    """BYOL, LARS and the loader without a run; both views keep their own statistics."""
    model = fastbyol.BYOL.from_backbone(Net(), 16, hidden_dim=32, projection_dim=8)
    tau = torch.tensor(0.9)
    optimizer = fastbyol.LARS(
        fastbyol.parameter_groups(model, 1e-6), lr=0.1, target_pairs=model.target_pairs(), tau=tau
    )
    loader = fastbyol.build_loader(IMAGES, batch_size=16, image_size_px=32, threads=2)
    for batch in loader:

        def closure(views=batch.views):
            optimizer.zero_grad()
            loss = model(*views).loss
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert 0 <= loss.item() <= 8
    online, target = model.target_pairs()[0]
    assert not torch.equal(online, target)


@pytest.mark.parametrize(
    ("backbone", "text"),
    [
        (nn.Flatten(2), r"returns \(1, 3, 1024\) for one image; it must return features \(1, F\)"),
        (nn.Sequential(nn.Linear(3, 4)), "does not accept data.image_size_px=32"),
        (lambda: 7, "returned a int, not a torch.nn.Module"),
        (lambda: 1 / 0, "its function raised ZeroDivisionError: division by zero"),
        (3, "a int is no torch.nn.Module, function or name"),
        ("resnet81", "timm has no such model"),
    ],
)
def test_bad_backbones_are_one_line(backbone, text, config):
    with pytest.raises(InputError, match=text) as caught:
        fastbyol.train(plain(config), images=IMAGES, backbone=backbone)
    assert "\n" not in str(caught.value)


def write_module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(text))


MODULE = """
    from os import system
    import torch, fastbyol
    from torch import nn

    def factory(width=4):
        return nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    fastbyol.register_backbone("tiny-net")(factory)

    @fastbyol.register_image_set("gray")
    def gray(location, split):
        import numpy as np
        if split not in ("train", "val", "."):
            return None
        rng = np.random.default_rng(0)
        return [(rng.integers(0, 255, (int(location), 40, 3), dtype=np.uint8), k % 2) for k in range(32)]
"""


@pytest.fixture
def command(tmp_path, monkeypatch, clean):
    """Run a command in a folder with my_module.py; return its exit code."""
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path, "my_module", MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    settings = "--device cpu --data.batch_size 16 --data.image_size_px 32 --data.threads 2 --model.hidden_dim 16"
    settings += " --model.projection_dim 8 --optim.epochs 1 --optim.warmup_epochs 0.5 --log.log_every_steps 1"

    def run(*words):
        return main(["train", *settings.split(), *words[1:]] if words[0] == "train" else list(words))

    yield run
    sys.modules.pop("my_module", None)


def test_import_on_the_command_line(command, capsys, tmp_path):
    """train, resume, eval, embed, export and report use the module only if it is named."""
    backbone = ("--model.backbone", "my_module:factory", "--model.backbone_args", "{width: 6}")
    assert command("train", "--data.root", "gray://40", *backbone) == 2
    refusal = (
        "model.backbone=my_module:factory: runs code of the module my_module; if you trust it, add --import my_module"
    )
    assert "gray:// is not a known storage" in capsys.readouterr().err
    assert command("train", "--import", "my_module", "--data.root", "gray://40", *backbone) == 0
    capsys.readouterr()
    for module in list(plugins._modules):
        plugins._modules.discard(module)
    (tmp_path / "x").mkdir()
    for k, (data, _) in enumerate(IMAGES):
        (tmp_path / "x" / f"{k:02d}.jpg").write_bytes(data)
    commands = [
        ("eval", "knn", "--run", "runs/byol", "--k", "3", "--device", "cpu"),
        ("embed", "--run", "runs/byol", "--images", "x", "--out", "f", "--device", "cpu"),
        ("export", "runs/byol", "--format", "safetensors", "--out", "w.safetensors"),
        ("report", "--run", "runs/byol"),
        ("train", "--data.root", "gray://40", *backbone, "--resume", "auto", "--optim.epochs", "2"),
    ]
    for words in commands:
        assert command(*words) == 2, words
        assert refusal in capsys.readouterr().err, words
    for words in commands:
        assert command(*words, "--import", "my_module") == 0, (words, capsys.readouterr().err)
        capsys.readouterr()
    for words, text in (
        (("export", "runs/byol", "--format", "timm", "--out", "x.pth"), "is not a network of timm"),
        (("push", "runs/byol", "hf://a/b", "--dry-run", "folder"), "my_module:factory"),
    ):
        assert command(*words, "--import", "my_module") == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1
    network = fastbyol.load_backbone("w.safetensors")
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 6)


def test_registered_names(command, capsys):
    assert command("train", "--import=my_module", "--data.root", "gray://40", "--model.backbone", "tiny-net") == 0
    assert (
        command("train", "--import=my_module", "--data.root", "gray://40", "--data.train_split", "x", "--name", "x")
        == 2
    )
    assert "data.root=gray://40: has no split x" in capsys.readouterr().err


def test_a_strangers_checkpoint_runs_no_code(command, capsys, tmp_path):
    """Whatever its config names: modules of Python, of packages, and arguments that load files."""
    assert (
        command("train", "--import", "my_module", "--data.root", "gray://40", "--model.backbone", "my_module:factory")
        == 0
    )
    (path,) = (tmp_path / "runs" / "byol" / "checkpoints").glob("step_*.pt")
    state = torch.load(path, weights_only=True)
    for backbone, args, text in (
        ("os:system", {"command": "touch bad"}, "runs code of the module os; if you trust it"),
        ("my_module:nothing", {}, "the module my_module defines no function or class nothing"),
        ("my_module:fastbyol.import_module", {"name": "bad"}, "timm has no such model"),
        ("my_module:torch", {}, "the module my_module defines no function or class torch"),
        ("my_module:nn", {}, "the module my_module defines no function or class nn"),
        ("my_module:system", {"command": "touch bad"}, "the module my_module defines no function or class system"),
        ("resnet18", {"checkpoint_path": "evil.pth"}, "model.backbone_args.checkpoint_path: is not accepted"),
        ("resnet18", {"pretrained": True}, "model.backbone_args.pretrained: is not accepted"),
        ("local-dir:evil", {}, "timm has no such model"),
        ("hf-hub:evil/evil", {}, "timm has no such model"),
    ):
        state["config"]["model"] |= {"backbone": backbone, "backbone_args": args}
        torch.save(state, tmp_path / "x.pt")
        assert command("eval", "knn", "--run", "x.pt", "--device", "cpu") == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--import", "no_such"], "--import no_such: there is no module no_such in "),
        (["--import", "my_module.py"], "expected the name of a module, such as my_module; write my_module"),
        (["--import", "broken"], "--import broken: NameError: name 'x' is not defined ("),
        (["--import", "wants"], "--import wants: ModuleNotFoundError: No module named 'not_here'"),
        (["--import"], "--import: needs a value: the name of a module"),
        (["--model.backbone_args", "{width: {a: 1}}"], "model.backbone_args"),
        (["--model.backbone_args", "7"], "model.backbone_args='7': expected names and values, such as {img_size: 64}"),
        (["--model.backbone_args", "{x: 1}"], "model.backbone_args={'x': 1}: resnet50: "),
        (
            ["--model.backbone_args", "{num_classes: 3}"],
            "model.backbone_args.num_classes: is not accepted: fastbyol sets it",
        ),
    ],
)
def test_bad_modules_and_arguments_are_one_line(words, text, command, capsys, tmp_path, monkeypatch):
    write_module(tmp_path, "broken", "x")
    write_module(tmp_path, "wants", "import not_here")
    (tmp_path / "d").mkdir()
    for k in range(16):
        (tmp_path / "d" / f"{k}.jpg").write_bytes(jpeg(k))
    assert command("train", "--data.root", "d", *words) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_values_of_arguments(tmp_path):
    """Numbers are numbers, in lists too; quoted words are text. The command line reads the same."""
    from fastbyol.cli import train_config

    text = "{a: 1, b: 1e-3, c: [1, 2.5, x], d: '64', e: true, f: null, g: yes-no}"
    expected = {"a": 1, "b": 1e-3, "c": [1, 2.5, "x"], "d": "64", "e": True, "f": None, "g": "yes-no"}
    (tmp_path / "c.yaml").write_text(f"model:\n  backbone_args: {text}\n")
    for words in (["--config", str(tmp_path / "c.yaml")], ["--model.backbone_args", text]):
        assert train_config(words).model.backbone_args == expected
    with pytest.raises(InputError, match="model.backbone_args=a mapping with 'a' twice"):
        train_config(["--model.backbone_args", "{a: 1, a: 2}"])


def test_results_of_different_images_do_not_replace_each_other(config):
    result = fastbyol.train(config, images=IMAGES)
    for images in (IMAGES, IMAGES[:40], IMAGES):
        fastbyol.evaluate("knn", result.folder, images=images, val_images=images[:8], k=3, baselines=False)
    assert len(list(result.folder.glob("eval_knn_*.json"))) == 2


def test_arguments_reach_timm_and_are_compared_on_resume(command, capsys, tmp_path):
    vit = ["--model.backbone", "vit_tiny_patch16_224"]
    root = ["train", "--import", "my_module", "--data.root", "gray://40", *vit]
    assert command(*root) == 2
    assert "does not accept data.image_size_px=32" in capsys.readouterr().err
    assert command(*root, "--model.backbone_args", "{img_size: 32, depth: 1}") == 0
    assert fastbyol.load_backbone("runs/byol")(torch.zeros(1, 3, 32, 32)).shape == (1, 192)
    other = ["--model.backbone_args", "{img_size: 32, depth: 2}", "--resume", "auto", "--optim.epochs", "2"]
    assert command(*root, *other) == 2
    assert "was made with model.backbone_args={" in capsys.readouterr().err


def test_entry_points(monkeypatch, clean, config, tmp_path):
    """An installed package provides a backbone and an image set by their names."""
    write_module(
        tmp_path,
        "my_package",
        MODULE.replace('fastbyol.register_backbone("tiny-net")(factory)', "").replace(
            '@fastbyol.register_image_set("gray")', ""
        ),
    )
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    points = "[fastbyol.backbones]\ninstalled = my_package:factory\nbroken = my_package:none\n"
    (info / "entry_points.txt").write_text(points + "[fastbyol.image_sets]\ninstalled = my_package:gray\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = plain(config)
    found = dataclasses.replace(
        found,
        data=dataclasses.replace(found.data, root="installed://40"),
        model=dataclasses.replace(found.model, backbone="installed", backbone_args={"width": 5}),
    )
    result = fastbyol.train(found)
    assert fastbyol.load_backbone(result.folder)(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(InputError, match="the entry point my_package:none cannot be loaded: AttributeError"):
        model = dataclasses.replace(found.model, backbone="broken")
        fastbyol.train(dataclasses.replace(found, name="broken", model=model))
    sys.modules.pop("my_package", None)


def test_names_cannot_be_taken_twice(clean):
    plugins.register_backbone("x")(Net)
    plugins.register_backbone("x")(Net)
    with pytest.raises(ValueError, match="'x' is already registered"):
        plugins.register_backbone("x")(nn.Identity)
    with pytest.raises(ValueError, match="'my_set' is no scheme of a URL"):
        plugins.register_image_set("my_set")
