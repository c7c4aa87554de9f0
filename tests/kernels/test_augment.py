"""Augmentation: the reference against independent code, the numba kernel against the reference."""

import colorsys
from itertools import permutations

import numpy as np
import pytest
import torch
from helpers.problems import parameter_row, random_view
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from scipy import ndimage
from torchvision.transforms.v2 import functional as tv

from fastbyol.kernels import augment, augment_params
from fastbyol.kernels.cpu.augment import _finish_row
from fastbyol.kernels.cpu.intrinsics import LANES

STD = np.array(augment_params.IMAGENET_STD, dtype=np.float32)
MEAN = np.array(augment_params.IMAGENET_MEAN, dtype=np.float32)


def apply_kernel(view: torch.Tensor, row: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """Return the kernel's result (S, S, 3)."""
    size = view.shape[-1]
    out = np.zeros((size, size, 3), dtype=dtype)
    planes = augment.new_planes(size)
    planes[:] = view.numpy()
    augment.augment_into(planes, row, out, augment.AugmentScratch(size))
    return out


def largest_error(view: torch.Tensor, row: np.ndarray) -> float:
    """Return the largest difference of kernel and reference, in [0, 1] (before normalization)."""
    expected = augment.normalize_reference(augment.augment_reference(view, row)).permute(1, 2, 0).numpy()
    return float(np.abs((apply_kernel(view, row) - expected) * STD).max())


# --- the reference against independent code ---


def test_hsv_equals_colorsys():
    view = random_view(0, 12)
    hue, saturation, value = augment.rgb_to_hsv(view)
    expected = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in view.flatten(1).T.double().tolist()])
    assert np.abs(torch.stack([hue, saturation, value]).flatten(1).T.numpy() - expected).max() < 2e-6
    assert (augment.hsv_to_rgb(hue, saturation, value) - view).abs().max() < 1e-6


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_saturation_scales_s_of_hsv(factor):
    view = random_view(1, 12)
    actual = augment.saturation_reference(view, factor).flatten(1).T.numpy()
    for pixel, result in zip(view.flatten(1).T.double().tolist(), actual, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        assert result == pytest.approx(colorsys.hsv_to_rgb(h, min(s * factor, 1), v), abs=1e-6)


@pytest.mark.parametrize("shift", [-0.1, 0.07])
def test_hue_rotates_h_of_hsv(shift):
    view = random_view(2, 12)
    actual = augment.hue_reference(view, shift).flatten(1).T.numpy()
    for pixel, result in zip(view.flatten(1).T.double().tolist(), actual, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        assert result == pytest.approx(colorsys.hsv_to_rgb((h + shift) % 1, s, v), abs=3e-6)


def test_brightness_adds_and_contrast_preserves_channel_means():
    view = 0.4 + 0.2 * torch.rand(3, 8, 8)
    assert (augment.brightness_reference(view, 0.25) - (view + 0.25)).abs().max() < 1e-7
    assert augment.brightness_reference(view, 0.9).max() == 1
    stretched = augment.contrast_reference(view, 1.4)
    assert (stretched.mean((1, 2)) - view.mean((1, 2))).abs().max() < 1e-6
    assert (stretched.std((1, 2)) / view.std((1, 2)) - 1.4).abs().max() < 1e-5


def test_torchvision_jitter_equals_torchvision():
    view = random_view(3, 20)
    pairs = {
        "brightness": (augment.brightness_reference(view, 1.3, torchvision=True), tv.adjust_brightness(view, 1.3)),
        "contrast": (augment.contrast_reference(view, 0.7, torchvision=True), tv.adjust_contrast(view, 0.7)),
        "saturation": (augment.saturation_reference(view, 1.2, torchvision=True), tv.adjust_saturation(view, 1.2)),
        "hue": (augment.hue_reference(view, 0.08), tv.adjust_hue(view, 0.08)),
    }
    for name, (ours, theirs) in pairs.items():
        assert (ours - theirs).abs().max() < 2e-5, name


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (96, 9), (48, 5), (28, 3), (19, 1)])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_direct_float64_convolution(size, taps, sigma):
    view = random_view(4, size)
    d = np.arange(taps) - taps // 2
    line = np.exp(-(d**2) / (2 * sigma**2))
    kernel = np.outer(line, line) / np.outer(line, line).sum()
    expected = [ndimage.convolve(plane, kernel, mode="constant") for plane in view.double().numpy()]
    assert np.abs(augment.blur_reference(view, sigma).numpy() - np.array(expected)).max() < 2e-6


def test_solarize_inverts_bright_values():
    view = torch.tensor([0.0, 0.2, 0.49, 0.5, 0.8, 1.0]).expand(3, 1, 6)
    result = augment.augment_reference(view, parameter_row(SOLARIZE=1))
    assert result[0, 0].tolist() == pytest.approx([0.0, 0.2, 0.49, 0.5, 0.2, 0.0])


def test_gray_weights_are_the_authors():
    result = augment.augment_reference(torch.eye(3)[:, None], parameter_row(GRAY=1))
    assert result[:, 0].T.tolist() == [pytest.approx([weight] * 3) for weight in (0.2989, 0.587, 0.114)]


def test_normalization_uses_imagenet_statistics():
    result = augment.normalize_reference(torch.zeros(3, 1, 1)).flatten().tolist()
    assert result == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


# --- the kernel against the reference ---


@pytest.mark.parametrize("order", list(permutations(range(4))))
@pytest.mark.parametrize("torchvision", [0, 1])
def test_kernel_equals_reference_in_every_jitter_order(order, torchvision):
    strengths = {"BRIGHTNESS": 1.2 if torchvision else 0.2, "CONTRAST": 1.3, "SATURATION": 1.2, "HUE": -0.08}
    row = parameter_row(JITTER=1, ORDER=order, TORCHVISION=torchvision, **strengths)
    assert largest_error(random_view(5, 33), row) < 2e-5


@pytest.mark.parametrize("hue", [-0.5, -0.3, 0.17, 0.5])
def test_kernel_rotates_hue_by_up_to_half_a_turn(hue):
    """The recipes draw smaller shifts, but a custom augmentation may not."""
    row = parameter_row(JITTER=1, CONTRAST=1, SATURATION=1, HUE=hue)
    assert largest_error(random_view(7, 33), row) < 2e-5


@settings(deadline=None, max_examples=150)
@given(
    size=st.sampled_from([1, 2, 8, 19, 31, 32, 48, 97, 224]),
    seed=st.integers(0, 9),
    order=st.permutations(range(4)),
    flags=st.fixed_dictionaries({name: st.booleans() for name in ("JITTER", "GRAY", "SOLARIZE", "TORCHVISION")}),
    sigma=st.one_of(st.just(0.0), st.floats(0.1, 2.0)),
    brightness=st.floats(-0.4, 0.4),
    contrast=st.floats(0.6, 1.4),
    saturation=st.floats(0.8, 1.2),
    hue=st.floats(-0.1, 0.1),
)
def test_kernel_equals_reference_for_all_operations(
    size, seed, order, flags, sigma, brightness, contrast, saturation, hue
):
    row = parameter_row(
        ORDER=order,
        SIGMA=sigma,
        BRIGHTNESS=brightness + flags["TORCHVISION"],
        CONTRAST=contrast,
        SATURATION=saturation,
        HUE=hue,
        **flags,
    )
    view = random_view(seed, size) if size > 2 else torch.rand(3, size, size)
    # The kernel drops blur taps with a mass below 1e-4. The documented bound is 1/255.
    assert largest_error(view, row) < 3e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_output_is_rounded_float32_output(dtype):
    view = random_view(6, 31)
    row = parameter_row(JITTER=1, CONTRAST=1.2, SATURATION=0.9, HUE=0.05, SIGMA=1.1)
    bits = apply_kernel(view, row, augment.WRITTEN[dtype])
    rounded = torch.from_numpy(apply_kernel(view, row)).to(dtype)
    assert torch.equal(torch.from_numpy(bits.view(np.int16)), rounded.view(torch.int16))


@pytest.mark.parametrize(("size", "sigma"), [(224, 2.4), (224, 5.0), (512, 6.0), (97, 3.0), (33, 0.05)])
def test_blur_with_sigmas_outside_the_recipe(size, sigma):
    """Sigmas larger than BYOL's use the scalar blur; the smallest leave a single tap."""
    assert largest_error(random_view(8, size), parameter_row(SIGMA=sigma, SOLARIZE=1)) < 3e-4


def test_scratch_is_reusable_after_a_blur():
    """The zeros around the rows and behind the planes must remain zeros."""
    size, scratch, planes = 33, augment.AugmentScratch(33), augment.new_planes(33)
    view, row, results = random_view(9, size).numpy(), parameter_row(SIGMA=2.0), []
    for sigma in (2.0, 0.4, 0.0, 2.0):
        row[augment_params.SIGMA], out = sigma, np.zeros((size, size, 3), dtype=np.float32)
        planes[:] = view
        augment.augment_into(planes, row, out, scratch)
        results.append(out)
    assert np.array_equal(results[0], results[3])


def test_bfloat16_rounds_to_nearest_ties_to_even():
    @njit
    def store(source, taps, one, zero, out):
        _finish_row(0, source, 0, 3000, 6000, taps, False, one, zero, out, 0, 3000 // LANES)

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, size=(3, 3000), dtype=np.uint32)
    bits[:, :1000] = bits[:, :1000] & 0xFFFF0000 | 0x8000  # exactly halfway
    bits = bits & 0x007FFFFF | 0x3F000000  # in [0.5, 1): unchanged by the clip
    out = np.zeros(9000, dtype=np.uint16)
    one, zero = np.ones(3, dtype=np.float32), np.zeros(3, dtype=np.float32)
    store(bits.view(np.float32), one[:1], one, zero, out)
    expected = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    whole = 3000 // LANES * LANES
    assert np.array_equal(out.reshape(3000, 3)[:whole].T, expected[:, :whole])


def test_planes_are_aligned_to_a_cache_line():
    assert all(augment.new_planes(size).ctypes.data % 64 == 0 for size in (1, 31, 224))
