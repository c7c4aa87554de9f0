"""Choice of the kernel of 1x1 convolutions. The GPU's part is in tests/gpu."""

import json

import pytest
import torch

from fastbyol import tuning
from fastbyol.build import build_model
from fastbyol.config import Config, ModelConfig
from fastbyol.errors import InputError
from fastbyol.layers import pointwise_convs
from fastbyol.runtime.distributed import World
from fastbyol.tools.tune import tune_config
from fastbyol.tuning import CUDNN, Shape, choose, find_shapes, is_close, tiles, tune

BF16, CPU = torch.bfloat16, torch.device("cpu")


def backbone(name="resnet50", **options):
    model = ModelConfig(backbone=name, width=0.125, hidden_dim=32, projection_dim=16, **options)
    return build_model(model, 64, 0).online.backbone


def test_shapes_of_a_resnet50():
    shapes = find_shapes(backbone(), 4, 64, BF16)
    assert len(shapes) == 2 * 16 + 4  # two per block, and four downsamplings
    assert shapes[0] == Shape(8, 2, 8, 8, 16, 16, 1, "bfloat16", False)  # conv1 of the first block
    assert shapes[1] == Shape(8, 2, 8, 32, 16, 16, 1, "bfloat16", True)  # its conv3
    assert next(s for s in shapes if s.stride == 2) == Shape(8, 2, 32, 64, 16, 16, 2, "bfloat16", False)
    assert sum(s.after_norm for s in shapes) == 16
    network = backbone()
    find_shapes(network, 4, 64, BF16)
    assert network.training
    assert all(conv._forward_pre_hooks == {} for conv, _ in pointwise_convs(network))


def test_only_convolutions_whose_result_goes_to_a_norm_alone():
    for name, strides in (("resnet18", [2, 2, 2]), ("byol_resnet18", [1, 2, 2, 2])):  # downsamplings
        assert [conv.stride[0] for conv, _ in pointwise_convs(backbone(name))] == strides
    assert list(pointwise_convs(backbone("resnet50d", stem="imagenet")))  # pools before its downsampling
    assert list(pointwise_convs(build_model(ModelConfig(backbone="test_byobnet"), 64, 0))) == []


def test_tiles_fit_small_convolutions():
    assert all(tile.inputs <= 64 and tile.channels <= 64 for tile in tiles(64, 64))
    assert tiles(3, 5) == list(dict.fromkeys(tiles(3, 5)))
    assert all((tile.inputs, tile.channels) == (16, 16) for tile in tiles(3, 5))


def shape(after_norm=False):
    return Shape(8, 2, 64, 256, 16, 16, 1, "bfloat16", after_norm)


def test_the_fastest_is_chosen():
    first, second, *_ = tiles(64, 256)
    names = [tuning._name(t) for t in (first, second)]
    times = {CUDNN: 1.0, names[0]: 0.9, names[1]: 0.8}
    assert choose(shape(), times) == (second, None)
    assert choose(shape(), times | {CUDNN: 0.7}) == (None, None)
    assert choose(shape(), times | {CUDNN: 0.81}) == (None, None)  # within the margin
    with_norm = times | {"norm": 0.5, f"norm {names[0]}": 1.2, f"norm {names[1]}": 1.4}
    assert choose(shape(True), with_norm) == (second, first)
    assert choose(shape(True), with_norm | {"norm": 0.41}) == (second, None)  # within the margin
    assert choose(shape(True), {CUDNN: 1.0, "norm": 0.5}) == (None, None)  # no tile fits this GPU


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Fake a GPU whose first tile is the fastest, and return the list of measured shapes."""
    asked = []

    def measure(shape, device):
        asked.append(shape)
        name = tuning._name(tiles(shape.inputs, shape.channels)[0])
        return {CUDNN: 1.0, name: 0.5} | ({"norm": 0.5, f"norm {name}": 0.7} if shape.after_norm else {})

    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "fake")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def test_choices_are_set_and_kept(measured, tmp_path):
    networks = [backbone(), backbone()]
    times = tune(networks, 4, 64, CPU, BF16, World())
    assert sorted(measured) == sorted(times)
    assert len(set(measured)) == len(measured)
    for network in networks:
        for conv, after_norm in pointwise_convs(network):
            tile = tiles(conv.in_channels, conv.out_channels)[0]
            assert (conv.tile, conv.norm_tile) == (tile, tile if after_norm else None)
    (file,) = (tmp_path / "fastbyol").iterdir()
    assert json.loads(file.read_text())["machine"]["gpu"] == "fake"
    before = len(measured)
    assert tune([backbone()], 4, 64, CPU, BF16, World()) == times
    assert len(measured) == before
    tune([backbone()], 8, 64, CPU, BF16, World())  # another batch size
    assert len(measured) == 2 * before
    assert tune([backbone()], 4, 64, CPU, BF16, World()) == times  # both are kept
    tune([backbone()], 4, 64, CPU, BF16, World(), again=True)
    assert len(measured) == 3 * before


@pytest.mark.parametrize("content", ["", "[]", '{"ms": {}}', '{"ms": 3}', '{"ms": {"KEY": {"cudnn": "x"}}}', "\x00"])
def test_damaged_cache_is_measured_again(measured, tmp_path, content):
    times = tune([backbone()], 4, 64, CPU, BF16, World())
    (file,) = (tmp_path / "fastbyol").iterdir()
    file.write_text(content.replace("KEY", str(next(iter(times)))))
    count = len(measured)
    assert tune([backbone()], 4, 64, CPU, BF16, World()) == times
    assert len(measured) == 2 * count


def test_cache_that_cannot_be_written_warns(measured, tmp_path, caplog):
    (tmp_path / "fastbyol").write_text("")
    tune([backbone()], 4, 64, CPU, BF16, World())
    assert "cannot be written" in caplog.text


def test_shape_that_does_not_fit_is_left_to_cudnn_and_measured_again(measured, monkeypatch, caplog):
    def no_memory(shape, device):
        measured.append(shape)
        raise torch.OutOfMemoryError

    network = backbone()
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "measure", no_memory)
        patched.setattr(torch.cuda, "empty_cache", lambda: None)
        times = tune([network], 4, 64, CPU, BF16, World())
    assert "not enough memory to measure; cuDNN is used" in caplog.text
    assert all(line.endswith("not measured, chosen cudnn") for line in tuning.lines(times))
    assert all((conv.tile, conv.norm_tile) == (None, None) for conv, _ in pointwise_convs(network))
    count = len(measured)
    tune([network], 4, 64, CPU, BF16, World())
    assert len(measured) == 2 * count
    assert all(conv.tile is not None for conv, _ in pointwise_convs(network))


def test_runs_that_measure_at_the_same_time_keep_both_results(measured, monkeypatch, tmp_path):
    one = tune([backbone()], 4, 64, CPU, BF16, World())
    (file,) = (tmp_path / "fastbyol").iterdir()
    content, read = file.read_text(), tuning._read
    file.unlink()

    def written_meanwhile(path):
        known = read(path)
        path.write_text(content)
        return known

    monkeypatch.setattr(tuning, "_read", written_meanwhile)
    other = tune([backbone()], 8, 64, CPU, BF16, World())
    assert json.loads(file.read_text())["ms"].keys() == {str(s) for s in (*one, *other)}


def test_another_machine_has_another_file(measured, monkeypatch, tmp_path):
    tune([backbone()], 4, 64, CPU, BF16, World())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    tune([backbone()], 4, 64, CPU, BF16, World())
    assert len(list((tmp_path / "fastbyol").iterdir())) == 2


def test_results_that_differ_are_not_close():
    y, stats = torch.randn(64, 8), torch.stack([torch.randn(2, 8), torch.zeros(2, 8), torch.rand(2, 8) + 0.5])
    good = y.to(BF16), stats
    assert is_close(good, good)
    assert is_close((good[0], torch.stack([stats[0] - 1, stats[1] + 1, stats[2]])), good)  # the same mean
    wrong = y.clone()
    wrong[5, 3] += 1
    assert not is_close((wrong.to(BF16), stats), good)
    assert not is_close((good[0], stats * 1.1), good)
    shifted = stats.clone()
    shifted[0, 0, 0] += 1
    assert not is_close((good[0], shifted), good)
    assert not is_close((torch.full_like(good[0], float("nan")), stats), good)


def test_lines_name_times_and_choices():
    name = tuning._name(tiles(64, 256)[0])
    times = {CUDNN: 1.0, name: 0.5, "norm": 0.25, f"norm {name}": 0.625}
    both, cudnn = tuning.lines({shape(True): times, shape(): {CUDNN: 1.0, name: 2.0}})
    assert both.endswith(
        f"cuDNN 1.000 ms, chosen {name} 0.500 ms; with the norm before it 0.750 ms, inside {name} 0.625 ms"
    )
    assert cudnn.endswith("cuDNN 1.000 ms, chosen cudnn 1.000 ms")


def test_tune_needs_a_gpu():
    with pytest.raises(InputError, match="tune needs a GPU"):
        tune_config(Config(device="cpu"))
