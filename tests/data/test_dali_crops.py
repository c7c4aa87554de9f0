"""The crops of evaluations on a GPU, with DALI's CPU decoder and Triton's interpreter."""

import gc
import itertools
import threading
import weakref

import numpy as np
import pytest
import torch
from helpers.common import jpeg

from fastbyol.data import open_split
from fastbyol.data.crops import center_crops, random_crops
from fastbyol.data.pack import pack

pytestmark = [pytest.mark.dali, pytest.mark.slow]
SIZE = 24
BAD = {5, 11, 14}
OPTIONS = {"size": SIZE, "threads": 2, "batch_size": 7}


@pytest.fixture
def flawed(folder_of):
    """19 readable images; a text file; a truncated JPEG; one that only DALI's decoder finds bad."""
    files = {f"train/a/{i:02d}.jpg": jpeg(i, 40 + i, 60) for i in range(20)}
    files["train/a/05.jpg"] = b"these are words"
    files["train/a/11.jpg"] = jpeg(11)[:-300]
    damaged = bytearray(jpeg(14))
    scan = damaged.index(b"\xff\xda")
    damaged[scan + 6] = damaged[scan + 8] = 0x33  # Huffman tables that do not exist
    files["train/a/14.jpg"] = bytes(damaged)
    files["train/a/30.jpg"] = jpeg(30, 1, 1)
    files["train/a/31.jpg"] = jpeg(31, 10, 2_000)
    return folder_of(files)


@pytest.fixture(autouse=True)
def on_cpu(interpreted, monkeypatch):
    """Let DALI deliver tensors on the CPU, where the interpreted kernels read them."""
    from fastbyol.data import dali_crops

    monkeypatch.setattr(interpreted("crop"), "BLOCK", 1024)

    class Decoder(dali_crops.Decoder):
        def batches(self):
            for prepared, images in super().batches():
                yield prepared, [torch.from_numpy(np.ascontiguousarray(image)) for image in images]

    monkeypatch.setattr(dali_crops, "Decoder", Decoder)


def assert_same(crops, images):
    """Compare what `crops` yields with DALI and without: images used, bad images, pixels."""
    found = []
    for decoder in ("native", "dali"):
        bad = {}
        batches = [(x.clone(), indices) for x, indices in crops(images, bad=bad, decoder=decoder)]
        found.append((batches, bad))
    (expected, bad), (actual, bad_of_dali) = found
    assert bad_of_dali == bad
    assert [i.tolist() for _, i in actual] == [i.tolist() for _, i in expected]
    for (x, _), (y, _) in zip(actual, expected, strict=True):
        assert x.shape == y.shape and x.is_contiguous(memory_format=torch.channels_last)
        # Crops are rounded to uint8 on a GPU: half a level of 255, divided by the std.
        torch.testing.assert_close(x, y, rtol=0, atol=0.51 / 255 / 0.224)
    return expected, bad


@pytest.mark.parametrize("pixels", [1 << 26, 5000])
def test_center_crops(flawed, log_lines, monkeypatch, pixels):
    """In one part per batch, and in parts of two images."""
    from fastbyol.data import dali_crops

    monkeypatch.setattr(dali_crops, "_PIXELS", pixels)
    images = open_split(flawed, "train")
    batches, bad = assert_same(lambda *a, **k: center_crops(*a, fraction=0.875, **k, **OPTIONS), images)
    assert set(bad) == BAD
    assert [len(i) for _, i in batches] == [6, 6, 6, 1]
    assert any("DALI cannot decode an image" in line for line in log_lines)


def test_random_crops_use_the_next_readable_image(flawed):
    images = open_split(flawed, "train")
    batches, bad = assert_same(lambda *a, **k: random_crops(*a, seed=3, epoch=2, **k, **OPTIONS), images)
    assert set(bad) == BAD
    assert [len(i) for _, i in batches] == [7, 7, 7]


def test_raw_pixels_are_not_decoded(photos, tmp_path):
    pack(open_split(photos, "val"), tmp_path / "val.beton", mode="raw")
    images = open_split(tmp_path, "val")
    assert_same(lambda *a, **k: center_crops(*a, fraction=0.875, **k, **OPTIONS), images)


def test_a_set_without_a_readable_image(folder_of):
    images = open_split(folder_of({f"train/{i}.jpg": b"words" for i in range(9)}), "train")
    for crops in (
        lambda *a, **k: center_crops(*a, fraction=0.875, **k, **OPTIONS),
        lambda *a, **k: random_crops(*a, seed=0, epoch=0, **k, **OPTIONS),
    ):
        batches, bad = assert_same(crops, images)
        assert not any(len(i) for _, i in batches) and len(bad) == 9


@pytest.mark.parametrize("batches", [1, 100])
def test_nothing_is_left_of_a_pass(flawed, monkeypatch, batches):
    """Neither threads nor the pipeline, which the garbage collector alone would find late."""
    from fastbyol.data import dali

    pipelines, build = [], dali.Decoder._build

    def recorded(self):
        pipelines.append(weakref.ref(pipe := build(self)))
        return pipe

    monkeypatch.setattr(dali.Decoder, "_build", recorded)
    gc.collect()
    gc.disable()
    try:
        crops = center_crops(open_split(flawed, "train"), fraction=0.875, bad={}, decoder="dali", **OPTIONS)
        assert len(list(itertools.islice(crops, batches))) == min(batches, 4)
        crops.close()
        assert pipelines
        assert [pipe() for pipe in pipelines] == [None] * len(pipelines)
        assert not [t for t in threading.enumerate() if t.name.startswith("fastbyol-eval")]
    finally:
        gc.enable()


def test_a_decoder_that_cannot_be_built_leaves_no_readers(flawed, monkeypatch):
    from fastbyol.data import dali_crops

    def fail(*args, **options):
        raise RuntimeError("no decoder")

    monkeypatch.setattr(dali_crops, "Decoder", fail)
    with pytest.raises(RuntimeError, match="no decoder"):
        next(center_crops(open_split(flawed, "train"), fraction=0.875, bad={}, decoder="dali", **OPTIONS))
    assert not [t for t in threading.enumerate() if t.name.startswith("fastbyol-eval")]
