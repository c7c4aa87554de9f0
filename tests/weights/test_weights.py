"""Loading of weights: every supported source, and a one-line error for every other one."""

import dataclasses
import functools
import json
import os
import pickle
import random
import re
import struct
from pathlib import Path

import huggingface_hub.errors
import pytest
import timm
import torch
import torchvision
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file
from timm.models import VGG, _builder
from torchvision.models import convnext, vgg

from fastbyol.build import build_backbone, build_model
from fastbyol.config import Config, DataConfig, ModelConfig
from fastbyol.errors import InputError
from fastbyol.layers import fuse_layers
from fastbyol.runtime import checkpoint
from fastbyol.weights.files import check_new, save_backbone
from fastbyol.weights.load import load_backbone, open_backbone
from fastbyol.weights.names import torchvision_naming

SMALL = ModelConfig(backbone="resnet18", width=0.125, hidden_dim=8, projection_dim=4)


pytestmark = pytest.mark.usefixtures("one_thread")


def built(config=SMALL, seed=0, size=32):
    torch.manual_seed(seed)
    return build_backbone(config, size)[0].eval()


@functools.cache
def other_network():
    """Return a shared network that no test modifies."""
    return built(seed=5)


def randomized(network, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1, generator=generator).div_(max(1, tensor[:1].numel()))
        else:
            tensor.fill_(3)
    return network.eval()


@pytest.fixture(scope="module")
def donor():
    """A backbone of which no value equals a new network's."""
    return randomized(built())


@pytest.fixture(scope="module")
def run(tmp_path_factory, donor):
    """A run's folder whose online backbone is the donor."""
    model = build_model(SMALL, 32, seed=0)
    model.online.backbone.load_state_dict(donor.state_dict())
    config = Config(data=DataConfig(image_size_px=32), model=SMALL).to_dict()
    state = {
        "step": 7,
        "config": config,
        "images": 9,
        "model": model.state_dict(),
        "optimizer": {},
        "rng": {},
        "knn": {},
    }
    folder = tmp_path_factory.mktemp("runs") / "r"
    checkpoint.save(folder / "checkpoints", state, keep_last=1, best=False)
    return folder


@pytest.fixture
def ours(tmp_path, donor):
    """The donor, saved by `save_backbone`."""
    path = tmp_path / "donor.safetensors"
    save_backbone(path, donor, SMALL, 32, key="save")
    return path


def assert_loaded(network, donor):
    plain = donor.state_dict()
    assert list(network.state_dict()) == list(plain)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, plain[name]), name


def assert_rejected(spec, message, backbone=None, name="resnet18", **options):
    """Assert that loading raises a one-line InputError and leaves the backbone unchanged."""
    backbone = other_network() if backbone is None else backbone
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(str(spec), backbone, name, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
    return str(caught.value)


def test_run_or_checkpoint_loads_online_backbone(run, donor):
    file = run / "checkpoints" / "step_00000007.pt"
    for spec in (run, file):
        network = built(seed=5)
        line = load_backbone(str(spec), network, "resnet18", config=SMALL)
        assert line == f"init={spec}: loaded 120 tensors from the online backbone of checkpoint {file}"
        assert_loaded(network, donor)


def test_damaged_newest_checkpoint_is_reported(run, donor, tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    good = (run / "checkpoints" / "step_00000007.pt").read_bytes()
    (folder / "step_00000007.pt").write_bytes(good)
    (folder / "step_00000008.pt").write_bytes(good[:-100])
    line = load_backbone(str(folder), built(seed=5), "resnet18")
    assert re.search(r"loaded 120 tensors .*step_00000007.pt; checkpoint .*step_00000008.pt is damaged", line)
    assert_rejected(folder / "step_00000008.pt", "step_00000008.pt.*damaged")


def test_saved_file_loads_into_fused_and_new_backbone(ours, donor):
    network = fuse_layers(built(seed=5))
    assert load_backbone(str(ours), network, "resnet18", config=SMALL) == f"init={ours}: loaded 120 tensors from {ours}"
    assert_loaded(network, donor)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(open_backbone(ours)(x), donor(x))
    assert not open_backbone(ours).training


def test_channels_last_group_norm_backbone_round_trip(tmp_path):
    config = dataclasses.replace(SMALL, norm="group", norm_groups=4, weight_standardization=True, stem="small")
    backbone = randomized(built(config))
    path = tmp_path / "x.safetensors"
    save_backbone(path, fuse_layers(backbone).to(memory_format=torch.channels_last), config, 32, key="save")
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        assert torch.allclose(open_backbone(path)(x), backbone(x), rtol=1e-5, atol=1e-6)
    network = built(config, seed=5)
    load_backbone(str(path), network, "resnet18", config=config)
    assert_loaded(network, backbone)


def test_save_checks_path(ours, donor, tmp_path):
    with pytest.raises(InputError, match=r"save .*donor.safetensors: already exists; remove it"):
        save_backbone(ours, donor, SMALL, 32, key="save")
    with pytest.raises(
        InputError, match=r"save /nowhere/x.safetensors: cannot be written: there is no folder /nowhere"
    ):
        check_new(Path("/nowhere/x.safetensors"), "save")  # checked before hours of fine-tuning
    with pytest.raises(InputError, match=r"save .*x.pth: the name must end in .safetensors"):
        save_backbone(tmp_path / "x.pth", donor, SMALL, 32, key="save")
    assert [p.name for p in tmp_path.iterdir()] == ["donor.safetensors"]


def with_classifier(donor):
    head = {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
    return donor.state_dict() | head


@pytest.mark.parametrize(
    ("around", "origin"),
    [
        (lambda tensors: tensors, "PATH"),
        (lambda tensors: {"state_dict": tensors, "arch": "resnet18", "epoch": 3}, "'state_dict' of PATH"),
        (lambda tensors: {"model": {f"module.{n}": t for n, t in tensors.items()}}, "'model' of PATH"),
        (lambda tensors: {f"module._orig_mod.{n}": t for n, t in tensors.items()}, "PATH"),
    ],
    ids=["plain", "timm's trainer", "torchvision's trainer", "compiled"],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_loads_without_classifier(donor, tmp_path, around, origin, legacy):
    path, network = tmp_path / "x.pth", built(seed=5)
    torch.save(around(with_classifier(donor)), path, _use_new_zipfile_serialization=not legacy)
    line = load_backbone(str(path), network, "resnet18", config=SMALL)
    assert line == (
        f"init={path}: loaded 120 tensors from {origin.replace('PATH', str(path))}; skipped: fc.weight, fc.bias"
    )
    assert_loaded(network, donor)


def test_half_precision_file_without_batchnorm_counters(donor, tmp_path):
    path, network = tmp_path / "x.safetensors", built(seed=5)
    tensors = {n: t.half() for n, t in donor.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(tensors, path)
    network.bn1.num_batches_tracked.fill_(9)
    line = load_backbone(str(path), network, "resnet18")
    assert line == f"init={path}: loaded 100 tensors from {path}; 20 x num_batches_tracked set to 0"
    for name, tensor in network.state_dict().items():
        wanted = torch.tensor(0) if name.endswith("tracked") else donor.state_dict()[name].half().to(tensor.dtype)
        assert torch.equal(tensor, wanted), name


def torchvision_pair(name):
    """Return a small timm backbone and the same torchvision network without classifier,
    uninitialized.
    """
    with torch.device("meta"):
        if name == "vgg11":
            ours = VGG([8, "M", 16, "M"], norm_layer=torch.nn.BatchNorm2d, num_classes=0)
            theirs = vgg.VGG(vgg.make_layers([8, "M", 16, "M"], batch_norm=True), num_classes=5)
            theirs.classifier[0] = torch.nn.Linear(16 * 49, 4096)
            classifier = theirs.classifier[6]
        elif name == "vit_tiny_patch16_224":
            ours = timm.create_model(name, num_classes=0)
            theirs = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768, num_classes=5)
            classifier = theirs.heads.head
        elif name == "convnext_tiny":
            ours = timm.models.ConvNeXt(depths=(1, 2, 1, 2), dims=(8, 16, 24, 32), num_classes=0)
            sizes = ((8, 16, 1), (16, 24, 2), (24, 32, 1), (32, None, 2))
            theirs = convnext.ConvNeXt([convnext.CNBlockConfig(*stage) for stage in sizes], num_classes=5)
            classifier = theirs.classifier[2]
        else:
            ours = timm.create_model(name, num_classes=0)
            theirs = getattr(torchvision.models, name)(num_classes=5)
            classifier = theirs.fc
    classifier.forward = lambda x: x
    return ours.to_empty(device="cpu"), theirs.to_empty(device="cpu")


@pytest.mark.parametrize(
    ("name", "size"), [("vgg11", 32), ("vit_tiny_patch16_224", 224), ("convnext_tiny", 64), ("resnet18", 64)]
)
def test_torchvision_weights_give_torchvision_features(tmp_path, name, size):
    network, theirs = torchvision_pair(name)
    randomized(network.eval(), seed=8)
    randomized(theirs.eval())
    path = tmp_path / "x.pth"
    torch.save(theirs.state_dict(), path)
    line = load_backbone(str(path), network, name)
    naming = torchvision_naming(network)
    classifier = "fc" if naming is None else naming.classifier
    assert line.endswith(f"; skipped: {classifier}.weight, {classifier}.bias")
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        wanted = theirs(x)
        assert wanted.std() > 0
        torch.testing.assert_close(network(x), wanted, rtol=1e-5, atol=1e-5)
    expected = theirs.state_dict()
    back = network.state_dict() if naming is None else naming.to_torchvision(network.state_dict(), expected)
    assert all(torch.equal(back[n], t) for n, t in expected.items() if classifier not in n)


@pytest.fixture
def hub(monkeypatch):
    """Replace timm's download by a function of the repository's name."""

    def serve(answer):
        monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda repo, *args, **options: answer(repo))

    return serve


def test_timm_weights(hub, tmp_path):
    full = randomized(timm.create_model("resnet18"))
    torch.save(full.state_dict(), tmp_path / "resnet18.pth")
    asked = []

    def answer(repo):
        asked.append(repo)
        return torch.load(tmp_path / "resnet18.pth", weights_only=True)

    hub(answer)
    plain = ModelConfig(backbone="resnet18")
    network = built(plain, seed=5)
    line = load_backbone("timm:resnet18", network, "resnet18", config=plain)
    assert line == "init=timm:resnet18: loaded 120 tensors from timm's resnet18.a1_in1k; skipped: fc.weight, fc.bias"
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, full.state_dict()[name]), name
    load_backbone("timm:resnet18.tv_in1k", network, "resnet18.a1_in1k")
    assert asked == ["timm/resnet18.a1_in1k", "timm/resnet18.tv_in1k"]
    assert_rejected(
        "timm:resnet18", "conv1.weight has shape 64x3x7x7, expected 8x3x7x7; set model.backbone, model.width"
    )
    small = dataclasses.replace(plain, stem="small")
    assert_rejected(
        "timm:resnet18",
        "conv1.weight has shape 64x3x7x7, expected 64x3x3x3; set model.backbone, model.width",
        built(small),
    )


@pytest.mark.parametrize(
    "failure",
    [
        OSError("[Errno -2] Name or service not known\nmore"),
        huggingface_hub.errors.LocalEntryNotFoundError("cannot find the files\nCheck your connection"),
        huggingface_hub.errors.OfflineModeIsEnabled("offline"),
        huggingface_hub.errors.HTTPError("timed out"),
        RuntimeError("bad file"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_errors_are_one_line(hub, failure):
    def answer(repo):
        raise failure

    hub(answer)
    before = hub_logging.get_verbosity()
    text = assert_rejected("timm:resnet18", "init=timm:resnet18: cannot load the weights: ")
    assert hub_logging.get_verbosity() == before != hub_logging.ERROR
    assert text.endswith(str(failure).splitlines()[0])


def test_unknown_timm_weights():
    assert_rejected("timm:resnet19", "no such timm model; `timm.list_pretrained")
    assert_rejected("timm:resnet50.a1_in1k", "not the weights of resnet18; set model.backbone=resnet50$")
    assert_rejected("timm:resnet200", "No pretrained weights exist for resnet200", built(), "resnet200")
    assert_rejected("timm:resnet18.nonsense", "cannot load the weights: .*nonsense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet34"}, "contains resnet18, not resnet34; set model.backbone=resnet18"),
        ({"width": 0.25}, "trained with model.width=0.125, not 0.25; set model.width=0.125"),
        ({"stem": "small"}, "model.stem=imagenet, not small; set model.stem=imagenet"),
        ({"norm": "group", "norm_groups": 4}, "model.norm=batch, not group"),
        ({"weight_standardization": True}, "model.weight_standardization=False, not True"),
    ],
)
@pytest.mark.parametrize("source", ["file", "run"])
def test_other_settings_are_rejected_with_remedy(ours, run, change, message, source):
    config = dataclasses.replace(SMALL, **change)
    assert_rejected(ours if source == "file" else run, message, built(config), config.backbone, config=config)
    if "weight_standardization" not in change:  # changes no shape
        hint = (
            "set model.backbone=resnet18" if "backbone" in change else "set model.backbone=resnet18 model.width=0.125"
        )
        assert_rejected(ours, hint, built(config), config.backbone)


def test_norm_groups_matter_only_for_group_norm(ours, donor, tmp_path):
    load_backbone(str(ours), built(), "resnet18", config=dataclasses.replace(SMALL, norm_groups=4, hidden_dim=99))
    four = dataclasses.replace(SMALL, norm="group", norm_groups=4)
    path = tmp_path / "g.safetensors"
    save_backbone(path, built(four), four, 32, key="save")
    two = dataclasses.replace(four, norm_groups=2)
    assert_rejected(path, "model.norm_groups=4, not 2; set model.norm_groups=4", built(two), config=two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer1.0.bn1.bias"), "layer1.0.bn1.bias is missing; set model.backbone"),
        (lambda t: t.update({"layer1.0.conv3.weight": torch.zeros(1)}), "unexpected tensor layer1.0.conv3.weight"),
        (lambda t: t.update({"head.weight": torch.zeros(1)}), "unexpected tensor head.weight"),
        (
            lambda t: t.update({"conv1.weight": torch.zeros(8, 3, 3, 3)}),
            "conv1.weight has shape 8x3x3x3, expected 8x3x7x7",
        ),
        (
            lambda t: t.update({"bn1.bias": torch.zeros(8, dtype=torch.int8)}),
            "bn1.bias has dtype torch.int8, expected torch.float32",
        ),
        (lambda t: t["bn1.bias"].fill_(torch.nan), "bn1.bias contains non-finite values"),
        (
            lambda t: t.update({"bn1.bias": torch.full((8,), 1e300, dtype=torch.float64)}),  # infinity in float32
            "bn1.bias contains non-finite values",
        ),
        (
            lambda t: t.update({"bn1.bias": torch.full((8,), torch.nan).to(torch.float8_e4m3fn)}),
            "bn1.bias contains non-finite values",
        ),
    ],
)
def test_mismatch_names_the_tensor(donor, tmp_path, change, message):
    tensors = {name: tensor.clone() for name, tensor in donor.state_dict().items()}
    change(tensors)
    torch.save(tensors, tmp_path / "x.pth")
    assert_rejected(tmp_path / "x.pth", re.escape(message))


def test_other_architecture_is_named_if_known(donor, tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    torch.save(vit, tmp_path / "x.pth")
    assert_rejected(tmp_path / "x.pth", "conv1.weight is missing")
    torch.save({"state_dict": vit, "arch": "vit_tiny_patch16_224"}, tmp_path / "x.pth")
    assert_rejected(
        tmp_path / "x.pth", "contains vit_tiny_patch16_224, not resnet18; set model.backbone=vit_tiny_patch16_224"
    )


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_unreadable_files(tmp_path, donor):
    assert_rejected(tmp_path / "nowhere", r"nowhere: no such file or folder; for timm's weights give timm:NAME")
    assert_rejected(tmp_path, "no usable checkpoint in")
    (tmp_path / "x.onnx").write_bytes(b"x")
    assert_rejected(tmp_path / "x.onnx", "cannot load .onnx files; export the run with --format safetensors")
    for content in (b"", b"hello", b"\x80\x02garbage", b"PK\x03\x04" + bytes(50)):
        for suffix, message in ((".pth", "damaged, not written by torch.save"), (".safetensors", "damaged or not a")):
            (tmp_path / f"x{suffix}").write_bytes(content)
            assert_rejected(tmp_path / f"x{suffix}", message)
    for content in ([1, 2], {}, {"a": 1}, {"state_dict": {"a": [1]}}):
        torch.save(content, tmp_path / "x.pth")
        assert_rejected(tmp_path / "x.pth", "contains no state dict")
    state = donor.state_dict()
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write(state | {"x": Bomb(tmp_path / "it-went-off")}, tmp_path / "x.pth")
        assert_rejected(
            tmp_path / "x.pth", "or contains objects other than tensors and plain values, which are not loaded"
        )
    assert not (tmp_path / "it-went-off").exists()


def test_running_out_of_memory_is_not_reported_as_damage(donor, tmp_path, monkeypatch):
    torch.save(donor.state_dict(), tmp_path / "x.pth")
    for error, expected in ((MemoryError(), MemoryError), (BufferError(), InputError)):

        def load(*args, error=error, **options):
            raise error

        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(expected):
            load_backbone(str(tmp_path / "x.pth"), other_network(), "resnet18")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_state_dict_is_detected(donor, tmp_path, legacy):
    path, network = tmp_path / "x.pth", built(seed=5)
    torch.save(donor.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    rng = random.Random(0)
    for length in [*range(0, 2000, 97), len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:length])
        assert_rejected(path, "damaged", network)


def test_corrupted_state_dict_is_detected_or_harmless(donor, tmp_path):
    path, network = tmp_path / "x.pth", built(seed=5)
    torch.save(donor.state_dict(), path)
    whole = path.read_bytes()
    rng = random.Random(2)
    detected = 0
    for position in (rng.randrange(len(whole)) for _ in range(60)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            load_backbone(str(path), network, "resnet18")
            assert_loaded(network, donor)
        except InputError:
            detected += 1
    assert detected > 40  # most of the file is tensor data


def test_corrupted_saved_file_is_detected_or_harmless(ours, donor):
    whole, network = ours.read_bytes(), built(seed=5)
    rng = random.Random(1)
    for length in [0, 7, 8, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        ours.write_bytes(whole[:length])
        assert_rejected(ours, "damaged", network)
    detected = 0
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for position in [
        *(rng.randrange(header) for _ in range(40)),
        *(rng.randrange(header, len(whole)) for _ in range(40)),
    ]:
        ours.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            load_backbone(str(ours), network, "resnet18")
            assert_loaded(network, donor)
        except InputError as error:
            assert "\n" not in str(error)
            assert str(ours) in str(error)
            detected += 1
    assert detected > 60


def rewritten(path, **changes):
    """Change the metadata of a saved file."""
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    metadata = json.loads(whole[8 : 8 + length])["__metadata__"] | changes
    save_file(load_file(path), path, metadata={key: value for key, value in metadata.items() if value is not None})


def test_unsupported_format_version_or_settings(ours):
    config = json.dumps(dataclasses.asdict(SMALL) | {"color": "red"})
    for changes, message in (
        ({"fastbyol_format": "2"}, "file format 2 is not supported; this version reads format 1"),
        ({"model_config": config}, "this version does not support its settings: .*color"),
        ({"model_config": "{"}, "damaged: its settings cannot be parsed"),
        ({"model_config": None}, "damaged: its settings cannot be parsed"),
        ({"model_config": "[]"}, "this version does not support its settings"),
        ({"crc32": "0" * 8}, "damaged: checksum mismatch"),
    ):
        kept = ours.read_bytes()
        rewritten(ours, **changes)
        assert_rejected(ours, message)
        with pytest.raises(InputError, match=message):
            open_backbone(ours)
        ours.write_bytes(kept)
    rewritten(ours)
    load_backbone(str(ours), built(), "resnet18")
    rewritten(ours, fastbyol_format=None)
    with pytest.raises(InputError, match="not written by fastbyol, so its architecture is unknown"):
        open_backbone(ours)


def test_error_names_the_option(tmp_path):
    with pytest.raises(InputError, match="^backbone=/nowhere: no such file"):
        load_backbone("/nowhere", built(), "resnet18", key="backbone")
