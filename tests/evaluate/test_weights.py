"""Weights that a backbone starts from: every kind of file that is read, and one line for every one that is not."""

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
from fastbyol.weights.load import SAME_NAMES, TORCHVISION, check_new, load_backbone, open_backbone, save_backbone

SMALL = ModelConfig(backbone="resnet18", width=0.125, hidden_dim=8, projection_dim=4)


pytestmark = pytest.mark.usefixtures("one_thread")


def built(config=SMALL, seed=0, size=32):
    torch.manual_seed(seed)
    return build_backbone(config, size)[0].eval()


@functools.cache
def other_network():
    """One that no test changes."""
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
    """A backbone with values of which none is a fresh network's."""
    return randomized(built())


@pytest.fixture(scope="module")
def run(tmp_path_factory, donor):
    """A run's folder with the donor as its online backbone."""
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
    """The donor in a file of ours."""
    path = tmp_path / "donor.safetensors"
    save_backbone(path, donor, SMALL, 32, key="save")
    return path


def assert_loaded(network, donor):
    plain = donor.state_dict()
    assert list(network.state_dict()) == list(plain)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, plain[name]), name


def refused(spec, message, backbone=None, name="resnet18", **options):
    """Nothing is loaded, and the error is one line that begins with the option."""
    backbone = other_network() if backbone is None else backbone
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(str(spec), backbone, name, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
    return str(caught.value)


def test_a_run_and_its_checkpoint_give_the_online_backbone(run, donor):
    file = run / "checkpoints" / "step_00000007.pt"
    for spec in (run, file):
        network = built(seed=5)
        line = load_backbone(str(spec), network, "resnet18", config=SMALL)
        assert line == f"init={spec}: 126 tensors from the online backbone of checkpoint {file}"
        assert_loaded(network, donor)


def test_a_damaged_newest_checkpoint_is_mentioned(run, donor, tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    good = (run / "checkpoints" / "step_00000007.pt").read_bytes()
    (folder / "step_00000007.pt").write_bytes(good)
    (folder / "step_00000008.pt").write_bytes(good[:-100])
    line = load_backbone(str(folder), built(seed=5), "resnet18")
    assert re.search(r"126 tensors .*step_00000007.pt; checkpoint .*step_00000008.pt is damaged", line)
    refused(folder / "step_00000008.pt", "step_00000008.pt.*damaged")


def test_our_file_goes_into_a_converted_backbone_and_a_fresh_one(ours, donor):
    network = fuse_layers(built(seed=5))
    assert load_backbone(str(ours), network, "resnet18", config=SMALL) == f"init={ours}: 126 tensors from {ours}"
    assert_loaded(network, donor)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(open_backbone(ours)(x), donor(x))
    assert not open_backbone(ours).training


def test_our_file_of_a_channels_last_backbone_of_another_norm(tmp_path):
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


def test_our_file_is_not_overwritten_and_has_its_suffix(ours, donor, tmp_path):
    with pytest.raises(InputError, match=r"save .*donor.safetensors exists; it is not overwritten"):
        save_backbone(ours, donor, SMALL, 32, key="save")
    with pytest.raises(
        InputError, match=r"save /nowhere/x.safetensors: cannot be written: there is no folder /nowhere"
    ):
        check_new(Path("/nowhere/x.safetensors"), "save")  # before hours of fine-tuning
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
def test_a_state_dict_loses_its_classifier(donor, tmp_path, around, origin, legacy):
    path, network = tmp_path / "x.pth", built(seed=5)
    torch.save(around(with_classifier(donor)), path, _use_new_zipfile_serialization=not legacy)
    line = load_backbone(str(path), network, "resnet18", config=SMALL)
    assert line == (f"init={path}: 126 tensors from {origin.replace('PATH', str(path))}; left out: fc.weight, fc.bias")
    assert_loaded(network, donor)


def test_a_plain_safetensors_file_in_half_precision_without_counters(donor, tmp_path):
    path, network = tmp_path / "x.safetensors", built(seed=5)
    tensors = {n: t.half() for n, t in donor.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(tensors, path)
    network.bn1.num_batches_tracked.fill_(9)
    line = load_backbone(str(path), network, "resnet18")
    assert line == f"init={path}: 105 tensors from {path}; left out: 21 x num_batches_tracked, now 0"
    for name, tensor in network.state_dict().items():
        wanted = torch.tensor(0) if name.endswith("tracked") else donor.state_dict()[name].half().to(tensor.dtype)
        assert torch.equal(tensor, wanted), name


def torchvision_pair(name):
    """A small backbone of timm's and a network of torchvision's with a classifier that does nothing; both without values."""
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
def test_torchvision_s_weights_give_torchvision_s_features(tmp_path, name, size):
    network, theirs = torchvision_pair(name)
    randomized(network.eval(), seed=8)
    randomized(theirs.eval())
    path = tmp_path / "x.pth"
    torch.save(theirs.state_dict(), path)
    line = load_backbone(str(path), network, name)
    naming = next((n for kind, n in TORCHVISION.items() if isinstance(network, kind)), SAME_NAMES)
    assert line.endswith(f"; left out: {naming.classifier}.weight, {naming.classifier}.bias")
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        wanted = theirs(x)
        assert wanted.std() > 0
        torch.testing.assert_close(network(x), wanted, rtol=1e-5, atol=1e-5)
    back = naming.to_other(network.state_dict())
    assert all(torch.equal(back[n], t) for n, t in theirs.state_dict().items() if naming.classifier not in n)


@pytest.fixture
def hub(monkeypatch):
    """Puts a function in the place of timm's download; it gets the repository's name."""

    def serve(answer):
        monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda repo, *args, **options: answer(repo))

    return serve


def test_timm_s_weights(hub, tmp_path):
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
    assert line == "init=timm:resnet18: 120 tensors from timm's resnet18.a1_in1k; left out: fc.weight, fc.bias"
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, full.state_dict()[name]), name
    load_backbone("timm:resnet18.tv_in1k", network, "resnet18.a1_in1k")
    assert asked == ["timm/resnet18.a1_in1k", "timm/resnet18.tv_in1k"]
    refused("timm:resnet18", "layer1.0.conv1.weight is 64x64x3x3, not 8x64x3x3; set model.backbone, model.width")
    small = dataclasses.replace(plain, stem="small")
    refused("timm:resnet18", "conv1.weight is 64x3x7x7, not 64x3x3x3; set model.backbone, model.width", built(small))


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
def test_a_hub_that_fails_is_one_line(hub, failure):
    def answer(repo):
        raise failure

    hub(answer)
    before = hub_logging.get_verbosity()
    text = refused("timm:resnet18", "init=timm:resnet18: no weights: ")
    assert hub_logging.get_verbosity() == before != hub_logging.ERROR
    assert text.endswith(str(failure).splitlines()[0])


def test_names_that_timm_cannot_serve():
    refused("timm:resnet19", "timm has no such model; `timm.list_pretrained")
    refused("timm:resnet50.a1_in1k", "not resnet18; set model.backbone=resnet50$")
    refused("timm:resnet200", "No pretrained weights exist for resnet200", built(), "resnet200")
    refused("timm:resnet18.nonsense", "no weights: .*nonsense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet34"}, "holds resnet18, not resnet34; set model.backbone=resnet18"),
        ({"width": 0.25}, "holds a backbone of model.width=0.125, not 0.25; set model.width=0.125"),
        ({"stem": "small"}, "model.stem=imagenet, not small; set model.stem=imagenet"),
        ({"norm": "group", "norm_groups": 4}, "model.norm=batch, not group"),
        ({"weight_standardization": True}, "model.weight_standardization=False, not True"),
    ],
)
@pytest.mark.parametrize("source", ["file", "run"])
def test_another_backbone_is_refused_with_what_to_set(ours, run, change, message, source):
    config = dataclasses.replace(SMALL, **change)
    refused(ours if source == "file" else run, message, built(config), config.backbone, config=config)
    if "weight_standardization" not in change:  # which changes no shape: only the settings say it
        hint = (
            "set model.backbone=resnet18"
            if "backbone" in change
            else "made with model.backbone=resnet18 model.width=0.125"
        )
        refused(ours, hint, built(config), config.backbone)


def test_groups_count_where_there_are_groups(ours, donor, tmp_path):
    load_backbone(str(ours), built(), "resnet18", config=dataclasses.replace(SMALL, norm_groups=4, hidden_dim=99))
    four = dataclasses.replace(SMALL, norm="group", norm_groups=4)
    path = tmp_path / "g.safetensors"
    save_backbone(path, built(four), four, 32, key="save")
    two = dataclasses.replace(four, norm_groups=2)
    refused(path, "model.norm_groups=4, not 2; set model.norm_groups=4", built(two), config=two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer1.0.bn1.bias"), "layer1.0.bn1.bias is missing; set model.backbone"),
        (lambda t: t.update({"layer1.0.conv3.weight": torch.zeros(1)}), "it has no layer1.0.conv3.weight"),
        (lambda t: t.update({"head.weight": torch.zeros(1)}), "it has no head.weight"),
        (lambda t: t.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), "conv1.weight is 64x3x3x3, not 64x3x7x7"),
        (
            lambda t: t.update({"bn1.bias": torch.zeros(64, dtype=torch.int8)}),
            "bn1.bias is of torch.int8, not torch.float32",
        ),
        (lambda t: t["bn1.bias"].fill_(torch.nan), "bn1.bias holds values that are not finite"),
        (
            lambda t: t.update({"bn1.bias": torch.full((64,), 1e300, dtype=torch.float64)}),  # infinity in float32
            "bn1.bias holds values that are not finite",
        ),
        (
            lambda t: t.update({"bn1.bias": torch.full((64,), torch.nan).to(torch.float8_e4m3fn)}),
            "bn1.bias holds values that are not finite",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_names_the_tensor(donor, tmp_path, change, message):
    tensors = {name: tensor.clone() for name, tensor in donor.state_dict().items()}
    change(tensors)
    torch.save(tensors, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", re.escape(message))


def test_another_family_s_file_and_a_trainer_s_that_says_which(donor, tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    torch.save(vit, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "conv1.weight is missing")
    torch.save({"state_dict": vit, "arch": "vit_tiny_patch16_224"}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "holds vit_tiny_patch16_224, not resnet18; set model.backbone=vit_tiny_patch16_224")


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_unreadable_files(tmp_path, donor):
    refused(tmp_path / "nowhere", r"nowhere: there is no such file or folder; timm's weights are named timm:NAME")
    refused(tmp_path, "no usable checkpoint in")
    for suffix in (".pkl", ".onnx"):
        (tmp_path / f"x{suffix}").write_bytes(b"x")
        refused(tmp_path / f"x{suffix}", f"{suffix} files are not read; export the run with --format safetensors")
    for content in (b"", b"hello", b"\x80\x02garbage", b"PK\x03\x04" + bytes(50)):
        for suffix, message in ((".pth", "damaged, not written by torch.save"), (".safetensors", "damaged or not a")):
            (tmp_path / f"x{suffix}").write_bytes(content)
            refused(tmp_path / f"x{suffix}", message)
    for content in ([1, 2], {}, {"a": 1}, {"state_dict": {"a": [1]}}):
        torch.save(content, tmp_path / "x.pth")
        refused(tmp_path / "x.pth", "holds no state dict")
    state = donor.state_dict()
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write(state | {"x": Bomb(tmp_path / "it-went-off")}, tmp_path / "x.pth")
        refused(tmp_path / "x.pth", "or holding more than tensors and plain values, which is refused")
    assert not (tmp_path / "it-went-off").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_every_cut_of_a_state_dict_is_noticed(donor, tmp_path, legacy):
    path, network = tmp_path / "x.pth", built(seed=5)
    torch.save(donor.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    rng = random.Random(0)
    for length in [*range(0, 2000, 97), len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:length])
        refused(path, "damaged", network)


def test_a_changed_byte_of_a_state_dict_is_noticed_or_harmless(donor, tmp_path):
    path, network = tmp_path / "x.pth", built(seed=5)
    torch.save(donor.state_dict(), path)
    whole = path.read_bytes()
    rng = random.Random(2)
    noticed = 0
    for place in (rng.randrange(len(whole)) for _ in range(60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            load_backbone(str(path), network, "resnet18")
            assert_loaded(network, donor)
        except InputError:
            noticed += 1
    assert noticed > 40  # most of the file is tensor data


def test_damage_to_our_file_is_noticed_or_harmless(ours, donor):
    whole, network = ours.read_bytes(), built(seed=5)
    rng = random.Random(1)
    for length in [0, 7, 8, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        ours.write_bytes(whole[:length])
        refused(ours, "damaged", network)
    noticed = 0
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in [*(rng.randrange(header) for _ in range(40)), *(rng.randrange(header, len(whole)) for _ in range(40))]:
        ours.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            load_backbone(str(ours), network, "resnet18")
            assert_loaded(network, donor)
        except InputError as error:
            assert "\n" not in str(error)
            assert str(ours) in str(error)
            noticed += 1
    assert noticed > 60


def rewritten(path, **changes):
    """Our file with other metadata."""
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    facts = json.loads(whole[8 : 8 + length])["__metadata__"] | changes
    save_file(load_file(path), path, metadata={key: value for key, value in facts.items() if value is not None})


def test_our_file_of_another_format_or_with_settings_that_are_not_known(ours):
    config = json.dumps(dataclasses.asdict(SMALL) | {"color": "red"})
    for changes, message in (
        ({"fastbyol_format": "2"}, "has format 2, this version reads format 1"),
        ({"model_config": config}, "this version does not know its settings: .*color"),
        ({"model_config": "{"}, "damaged: its settings cannot be read"),
        ({"model_config": None}, "damaged: its settings cannot be read"),
        ({"model_config": "[]"}, "this version does not know its settings"),
        ({"crc32": "0" * 8}, "damaged: its tensors fail their checksum"),
    ):
        kept = ours.read_bytes()
        rewritten(ours, **changes)
        refused(ours, message)
        with pytest.raises(InputError, match=message):
            open_backbone(ours)
        ours.write_bytes(kept)
    rewritten(ours)
    load_backbone(str(ours), built(), "resnet18")
    rewritten(ours, fastbyol_format=None)
    with pytest.raises(InputError, match="not one of fastbyol's files"):
        open_backbone(ours)


def test_the_option_s_name_is_the_caller_s(tmp_path):
    with pytest.raises(InputError, match="^backbone=/nowhere: there is no such"):
        load_backbone("/nowhere", built(), "resnet18", key="backbone")
