"""The Hugging Face Hub without network: pushes to a fake hub, downloads from the hub's cache."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import constants

from fastbyol.build import build_backbone, build_model
from fastbyol.cli import main
from fastbyol.config import Config, DataConfig, ModelConfig
from fastbyol.errors import InputError, RunError
from fastbyol.runtime import checkpoint
from fastbyol.weights.hub import parse_hub
from fastbyol.weights.load import load_backbone
from fastbyol.weights.push import push

REPO = "some-user/my.model"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make_run(tmp_path):
    """Factory of a run's folder with one untrained checkpoint, and its online backbone."""

    def make(size=32, **model):
        config = Config(
            name="r",
            data=DataConfig(root="/data/photos", image_size_px=size),
            model=ModelConfig(**{"backbone": "resnet18", "hidden_dim": 8, "projection_dim": 4} | model),
        )
        network = build_model(config.model, size, seed=0)
        generator = torch.Generator().manual_seed(1)
        for tensor in network.state_dict().values():  # such as BatchNorm's statistics
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
        state = {"step": 7, "config": config.to_dict(), "images": 9, "model": network.state_dict()}
        folder = tmp_path / "runs" / "r"
        state |= {"optimizer": {}, "rng": {}, "knn": {}}
        checkpoint.save(folder / "checkpoints", state, keep_last=1, best=False)
        backbone, _ = build_backbone(config.model, size)
        backbone.load_state_dict(network.online.backbone.state_dict())
        return folder, backbone.eval()

    return make


@torch.no_grad()
def features(network, size=32):
    return network(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of the hub, which is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch, cache):
    """A hub whose uploads are in the cache at once, as revision main and v1."""
    commit = "a" * 40
    repo = cache / f"models--{REPO.replace('/', '--')}"

    class Api:
        def create_repo(self, name, *, exist_ok):
            assert exist_ok
            (repo / "refs").mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=name)

        def file_exists(self, name, file):
            return (repo / "snapshots" / commit / file).exists()

        def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
            shutil.copytree(
                folder_path,
                repo / "snapshots" / commit,
                ignore=shutil.ignore_patterns(*(ignore_patterns or ())),
                dirs_exist_ok=True,
            )
            for name in ("main", "v1"):
                (repo / "refs" / name).write_text(commit)
            Api.message = commit_message

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    Api.snapshot = repo / "snapshots" / commit
    return Api


@pytest.mark.parametrize(
    ("size", "model"),
    [
        (32, {}),
        (32, {"width": 0.5, "stem_channels": 64}),
        (32, {"backbone": "resnet18.a1_in1k"}),
        (224, {"backbone": "vit_tiny_patch16_224"}),
    ],
)
def test_timm_loads_the_dry_run(make_run, tmp_path, size, model, capsys):
    run, backbone = make_run(size, **model)
    out = tmp_path / "out"
    assert main(["push", str(run), f"hf://{REPO}", "--dry-run", str(out)]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    network = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert torch.equal(features(network, size), features(backbone, size))
    data = timm.data.resolve_model_data_config(network)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, size, size), 0.875, "bicubic")
    assert data["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]  # nothing temporary is left


def test_model_card_is_readable_for_the_hub(make_run, tmp_path):
    run, _ = make_run()
    push(run, f"hf://{REPO}", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["library_name"], header["pipeline_tag"]) == ("timm", "image-feature-extraction")
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in card
    assert f"fastbyol train --init hf://{REPO}" in card


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"backbone": "byol_resnet18"}, "byol_resnet18"),
        ({"stem": "small"}, "resnet18 with model.stem=small"),
        ({"width": 0.5}, "resnet18 with model.width=0.5"),
        ({"padding": "same"}, "resnet18 with model.padding=same"),
        ({"norm": "group", "hidden_dim": 16}, "resnet18 with model.norm=group"),
    ],
)
def test_networks_that_timm_cannot_build_are_refused(make_run, tmp_path, model, named):
    run, _ = make_run(**model)
    with pytest.raises(InputError, match=f"^hf://{REPO}: timm.create_model cannot build {named}; `fastbyol export"):
        push(run, f"hf://{REPO}", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_pushed_backbone_loads_by_name(make_run, hub, log_lines):
    run, backbone = make_run()
    assert push(run, f"hf://{REPO}", None) == f"uploaded resnet18 to hf://{REPO}"
    assert hub.message == "resnet18, step_00000007"
    network = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    assert torch.equal(features(network), features(backbone))
    for spec in (f"hf://{REPO}", f"hf://{REPO}@v1", f"hf://{REPO}@v1/model.safetensors", str(hub.snapshot)):
        ours, _ = build_backbone(ModelConfig(backbone="resnet18"), 32)
        text = load_backbone(spec, ours, "resnet18", config=ModelConfig(backbone="resnet18"))
        assert torch.equal(features(ours.eval()), features(backbone))
        assert text.startswith(f"init={spec}: loaded 120 tensors from {spec}")
    (hub.snapshot.parents[1] / "refs" / "main").unlink()  # v1 is still there
    load_backbone(f"hf://{REPO}@v1", ours, "resnet18")
    with pytest.raises(InputError, match="the file is not in its cache$"):
        load_backbone(f"hf://{REPO}", ours, "resnet18")
    # The settings are stored in the file.
    ours, _ = build_backbone(ModelConfig(backbone="resnet34"), 32)
    with pytest.raises(InputError, match=f"^init=hf://{REPO}@v1: contains resnet18, not resnet34; set model.backbone="):
        load_backbone(f"hf://{REPO}@v1", ours, "resnet34")
    (hub.snapshot / "README.md").write_text("by hand")
    push(run, f"hf://{REPO}", None)
    assert (hub.snapshot / "README.md").read_text() == "by hand"
    assert f"hf://{REPO} has a README.md: it is kept" in log_lines


def test_training_starts_from_the_hub(make_run, make_config, hub, log_lines):
    from fastbyol.api import train

    run, _ = make_run()
    push(run, f"hf://{REPO}", None)
    model = {"backbone": "resnet18", "width": 1, "hidden_dim": 8, "projection_dim": 4}
    train(make_config(init=f"hf://{REPO}", model=model, optim={"epochs": 1}, knn={"every_epochs": 0}))
    assert any(line.startswith(f"init=hf://{REPO}: loaded 120 tensors from hf://{REPO}") for line in log_lines)


def test_push_needs_a_token(make_run, monkeypatch, tmp_path, capsys):
    run, _ = make_run()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(run), f"hf://{REPO}"]) == 2
    text = f"fastbyol: error: hf://{REPO}: there is no Hugging Face token: set HF_TOKEN, or run `hf auth login`\n"
    assert capsys.readouterr().err == text


def test_failed_upload_is_one_line(make_run, hub, monkeypatch):
    def fails(self, **options):
        raise ConnectionError(101, "Network is unreachable")

    run, _ = make_run()
    monkeypatch.setattr(hub, "upload_folder", fails)
    with pytest.raises(RunError, match=f"^hf://{REPO}: the upload failed: .*Network is unreachable$"):
        push(run, f"hf://{REPO}", None)


def test_dry_run_needs_a_new_folder(make_run, tmp_path):
    run, _ = make_run()
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="^--dry-run .*out: already exists; remove it or choose another folder$"):
        push(run, f"hf://{REPO}", tmp_path / "out")
    with pytest.raises(InputError, match="^--dry-run .*: cannot be written: there is no folder"):
        push(run, f"hf://{REPO}", tmp_path / "none" / "out")


@pytest.mark.parametrize("spec", ["hf://", "hf://user", "hf://user/", "hf://user/a@", "hf://u/a@b@c", "hf://u/a//b"])
def test_other_forms_are_rejected(spec):
    with pytest.raises(InputError, match="^x: expected hf://USER/NAME, or hf://USER/NAME@REVISION/FILE$"):
        parse_hub(spec, "x")


def test_names_are_split_into_parts():
    assert parse_hub("hf://u/a.b@v1.0/x/y.pth", "x") == ("u/a.b", "v1.0", "x/y.pth")
    assert parse_hub("hf://u/a", "x") == ("u/a", None, None)


def error(kind):
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    return kind("404 Client Error", response=response)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (None, "the hub cannot be reached, and the file is not in its cache"),
        ("RepositoryNotFoundError", "there is no such repository, or it is private: set HF_TOKEN"),
        ("RevisionNotFoundError", "the repository has no revision v1"),
        ("RemoteEntryNotFoundError", "the repository has no x.safetensors"),
        ("HfHubHTTPError", "cannot be downloaded: 404 Client Error"),
    ],
)
def test_failed_download_is_one_line(cache, monkeypatch, raised, message):
    def fails(*args, **options):
        raise error(getattr(huggingface_hub.errors, raised))

    if raised:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    backbone, _ = build_backbone(ModelConfig(backbone="resnet18"), 32)
    spec = f"hf://{REPO}@v1/x.safetensors"
    with pytest.raises(InputError, match=f"^init={spec}: {message}$"):
        load_backbone(spec, backbone, "resnet18")


def test_config_has_the_architecture(make_run, tmp_path):
    run, _ = make_run(width=0.5, stem_channels=64)
    push(run, f"hf://{REPO}", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("resnet18", 0, 256)
    assert config["model_args"]["channels"] == [32, 64, 128, 256]
    assert not {"url", "hf_hub_id", "tag"} & config["pretrained_cfg"].keys()
