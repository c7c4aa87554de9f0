"""Crop and resize: the reference against float64, the numba kernel against the reference."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from fastbyol.kernels.cpu import crop as cpu_crop
from fastbyol.kernels.crop import CropScratch, crop_into, crop_reference

# The kernel's x weights have 14 fractional bits: half a bit of error for each of four taps. The
# documented bound is 1/255.
KERNEL_TOLERANCE = 2e-4


def keys_cubic(x: float) -> float:
    """Keys' kernel with a = -0.5, from its definition."""
    x, a = abs(x), -0.5
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def resize_float64(patch: np.ndarray, size: int) -> np.ndarray:
    """Direct sum over all source pixels, with weights normalized over those inside the image."""

    def matrix(length: int) -> np.ndarray:
        centers = (np.arange(size) + 0.5) * length / size - 0.5
        weights = np.array([[keys_cubic(c - k) for k in range(length)] for c in centers])
        return weights / weights.sum(1, keepdims=True)

    rows, columns = matrix(patch.shape[0]), matrix(patch.shape[1])
    return np.clip(np.einsum("ih,hwc,jw->cij", rows, patch / 255, columns), 0, 1)


def random_image(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("box", [(3, 5, 40, 31), (0, 0, 60, 50), (10, 10, 7, 9), (59, 49, 1, 1), (0, 20, 60, 2)])
@pytest.mark.parametrize("flip", [False, True])
def test_reference_equals_direct_float64_sum(box, flip):
    image = random_image(0, 60, 50)
    top, left, height, width = box
    expected = resize_float64(image[top : top + height, left : left + width], 24)
    expected = expected[:, :, ::-1] if flip else expected
    actual = crop_reference(torch.from_numpy(image), box, flip=flip, size=24)
    assert np.abs(actual.numpy() - expected).max() < 2e-6


def test_resize_to_the_same_size_is_the_identity():
    image = random_image(1, 16, 16)
    view = crop_reference(torch.from_numpy(image), (0, 0, 16, 16), flip=False, size=16)
    assert torch.equal((view * 255).round().byte(), torch.from_numpy(image).permute(2, 0, 1))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_kernel_equals_reference(data):
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    size = data.draw(st.sampled_from([1, 8, 31, 32, 33, 97, 224]))
    crop_height, crop_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    box = (
        data.draw(st.integers(0, height - crop_height)),
        data.draw(st.integers(0, width - crop_width)),
        crop_height,
        crop_width,
    )
    flip = data.draw(st.booleans())
    image = random_image(data.draw(st.integers(0, 99)), height, width)
    out = np.full((3, size, size), np.nan, dtype=np.float32)
    crop_into(image, box, flip, out, CropScratch(size))
    expected = crop_reference(torch.from_numpy(image), box, flip=flip, size=size)
    assert np.abs(out - expected.numpy()).max() < KERNEL_TOLERANCE


def test_scratch_is_reusable_for_any_image_size():
    scratch = CropScratch(32)
    for height, width in ((10, 20_000), (30, 40), (20_000, 10)):
        image = random_image(2, height, width)
        out = np.empty((3, 32, 32), dtype=np.float32)
        crop_into(image, (0, 0, height, width), False, out, scratch)
        expected = crop_reference(torch.from_numpy(image), (0, 0, height, width), flip=False, size=32)
        assert np.abs(out - expected.numpy()).max() < KERNEL_TOLERANCE


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, -1, 5, 5), (6, 0, 5, 5), (0, 6, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0)])
def test_box_outside_the_image_raises(box):
    with pytest.raises(ValueError, match="is not inside an image"):
        crop_into(random_image(0, 10, 10), box, False, np.empty((3, 4, 4), dtype=np.float32), CropScratch(4))


@settings(deadline=None, max_examples=50)
@given(value=st.integers(0, 255), width=st.integers(1, 300), size=st.integers(1, 64))
def test_flat_image_stays_flat(value, width, size):
    out = np.empty((3, size, size), dtype=np.float32)
    crop_into(np.full((7, width, 3), value, dtype=np.uint8), (0, 0, 7, width), False, out, CropScratch(size))
    assert np.abs(out * 255 - value).max() < 1e-4


def test_multiply_add_without_avx2(monkeypatch):
    """The generic code for other processors computes the same pixels."""
    image = random_image(3, 50, 70)
    views = []
    for has_avx2 in (True, False):
        monkeypatch.setattr(cpu_crop, "_HAS_AVX2", has_avx2 and cpu_crop._HAS_AVX2)
        resize = cpu_crop.intrinsic(cpu_crop._resize_pair._defn)
        source = cpu_crop.crop_kernel.py_func
        function = types.FunctionType(source.__code__, source.__globals__ | {"_resize_pair": resize})
        kernel = njit(error_model="numpy")(function)
        out, s = np.empty((3, 33, 33), dtype=np.float32), CropScratch(33)
        arrays = s.first, s.weight, s.start, s.fixed, s.row_for(70), s.resized, s.offsets, s.factors, s.edge
        kernel(image, 0, 0, 50, 70, False, *arrays, out)
        views.append(out)
    assert np.abs(views[0] - views[1]).max() < 1e-6
