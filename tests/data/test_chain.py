"""The CPU path from decoded image to normalized batch, and the loader's options."""

import os
import threading
import time

import numpy as np
import pytest
import simplejpeg
import torch
from helpers.common import HANG_S, jpeg
from helpers.loaders import collect, make_loader, same
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbyol.data import open_split, rendering, views
from fastbyol.data.decode import decode, decode_reduced, jpeg_size
from fastbyol.data.folder import ImageFolder
from fastbyol.data.rendering import Renderer
from fastbyol.kernels import augment_params
from fastbyol.kernels.augment_params import IMAGENET_STD

STD = np.array(IMAGENET_STD, dtype=np.float32)


def smooth_image(seed: int, height: int, width: int) -> np.ndarray:
    """Edges, gradients, noise and saturated colors."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = 128 + 127 * np.sin(np.stack([x / 7 + y / 11, x / 23, (x * y) ** 0.5 / 9], axis=-1) + rng.uniform(0, 6, 3))
    image += rng.normal(0, 20, (height, width, 1)) * (rng.random() < 0.5)
    image[: height // 3] = rng.integers(0, 256, 3)
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    size=st.one_of(st.sampled_from([32, 33, 96, 127, 224, 384, 512]), st.integers(32, 130)),
    augmentation=st.sampled_from(["byol", "torchvision"]),
    seed=st.integers(0, 10_000),
)
def test_views_are_within_1_255_of_the_reference(height, width, size, augmentation, seed):
    """Float32, before normalization; includes odd sizes, images smaller than the crop, and
    one-pixel crops.
    """
    image = smooth_image(seed, height, width)
    params = views.sample(augmentation, seed, 0, [seed], [image.shape[:2]])
    expected = views.apply_reference([torch.from_numpy(image)], params, size)
    renderer = Renderer(size)
    for v, p in enumerate(params.pack()[0]):
        out = np.empty((size, size, 3), dtype=np.float32)
        renderer.crop(image, params.box[0, v].tolist(), bool(p[augment_params.FLIP]))
        renderer.augment(p, out)
        error = np.abs(out - expected[v, 0].permute(1, 2, 0).numpy()) * STD
        assert error.max() < 1 / 255


def test_dct_scaling_changes_views_little(folder_of):
    """If both crops keep the output's resolution, images are decoded smaller, and the views differ
    slightly.
    """
    files = {
        f"train/{i:02d}.jpg": simplejpeg.encode_jpeg(smooth_image(i, 400, 520), quality=92, colorsubsampling="420")
        for i in range(24)
    }
    root = folder_of(files)
    plain = collect(make_loader(root), 0, 4)
    scaled = collect(make_loader(root, dct_scaling=True), 0, 4)
    assert all(torch.equal(a[3], b[3]) for a, b in zip(plain, scaled, strict=True))
    difference = torch.cat([(a[v] - b[v]).abs().flatten(1) for a, b in zip(plain, scaled, strict=True) for v in (0, 1)])
    difference = difference.mean(1) * STD.mean() * 255  # per view, in 255ths
    assert (difference > 0.05).float().mean() > 0.5  # most views changed
    assert difference.median() < 8  # the reduced source aliases less than a resize of the full image
    assert same(scaled, collect(make_loader(root, dct_scaling=True, threads=4), 0, 4))


def test_dct_scaling_keeps_the_output_resolution(folder_of, monkeypatch):
    root = folder_of({f"train/{i:02d}.jpg": jpeg(i, 100, 130) for i in range(12)})
    seen = []

    def watched(data, size, factor, buffer):
        image = decode_reduced(data, size, factor, buffer)
        seen.append((size, factor, image.shape))
        return image

    shapes = []
    crop_view = Renderer.crop
    monkeypatch.setattr(rendering, "decode_reduced", watched)
    monkeypatch.setattr(Renderer, "crop", lambda self, *args: shapes.append(args[1]) or crop_view(self, *args))
    collect(make_loader(root, dct_scaling=True), 0, 8)
    assert {factor for _, factor, _ in seen} >= {1, 2}
    for (height, width), factor, shape in seen:
        assert shape == (-(-height // factor), -(-width // factor), 3)
    reduced = [box for box in shapes if box[2] < 24 or box[3] < 24]
    full_size = [factor for _, factor, _ in seen if factor == 1]
    assert len(reduced) <= 2 * len(full_size)  # only crops below 24 px in the full image


def test_decode_reduced_falls_back_to_full_decode():
    data = jpeg(1, 64, 80)
    assert jpeg_size(data) == (64, 80)
    assert decode_reduced(data, (64, 80), 2).shape == (32, 40, 3)
    assert decode_reduced(data + b"\0" * 50, (64, 80), 2).shape == (32, 40, 3)
    assert jpeg_size(b"words") is None
    assert jpeg_size(data[:40]) is None
    assert np.array_equal(decode_reduced(data, (64, 80), 1), decode(data))


# --- reading ahead ---


def test_readers_hide_a_slow_disk(photos, monkeypatch):
    """Eight readers read concurrently: no read returns before all eight have started one."""
    read, all_eight = ImageFolder.read, threading.Barrier(8)
    monkeypatch.setattr(ImageFolder, "read", lambda self, index: (all_eight.wait(HANG_S), read(self, index))[1])
    assert (
        len(collect(make_loader(photos, readers=8, threads=1, readahead_images=8 * 6), 0, 8)) == 8
    )  # of 6 images each


def test_readahead_is_bounded(photos, monkeypatch):
    read, count = ImageFolder.read, []
    monkeypatch.setattr(ImageFolder, "read", lambda self, index: count.append(1) or read(self, index))
    loader = make_loader(photos, prefetch_batches=1, readahead_images=20, readers=3)
    batches = loader.batches(0, 100)
    next(batches)
    time.sleep(0.5)
    assert len(count) <= 2 * 6 + 20 + 3  # two batches decoded, 20 files ahead, one in progress per reader
    batches.close()


def test_an_exception_in_a_reader_reaches_the_consumer(photos, monkeypatch):
    def explode(self, index):
        raise MemoryError("no memory for a file")

    monkeypatch.setattr(ImageFolder, "read", explode)
    with pytest.raises(MemoryError, match="no memory for a file"):
        collect(make_loader(photos), 0, 5)


def test_no_open_files_are_leaked(photos):
    shared, before = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        batches = make_loader(photos, threads=4).batches(0, 1000)
        next(batches)
        batches.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert set(os.listdir("/dev/shm")) == shared


def test_loader_follows_the_epoch_order(photos):
    folder = open_split(photos, "train")
    loader = make_loader(photos)
    indices = torch.cat([b[3] for b in collect(loader, len(loader), 2 * len(loader))]).tolist()
    assert indices == views.epoch_order(0, 1, len(folder)).tolist()
