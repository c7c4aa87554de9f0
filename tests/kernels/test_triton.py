"""Triton: view kernels in the interpreter, and all kernels compiled without a GPU."""

from itertools import permutations

import kernel_resources as resources
import numpy as np
import pytest
import torch
from helpers.problems import crops_of, images, largest_error, parameter_row, reference

from fastbyol.data.views import sample
from fastbyol.kernels import augment_params, crop

LIMIT = 1 / 255


# --- augmentation ---


@pytest.mark.slow
@pytest.mark.parametrize("torchvision", [0, 1])
def test_augmentation_in_every_jitter_order(interpreted, torchvision):
    strengths = {"BRIGHTNESS": 1.2 if torchvision else 0.2, "CONTRAST": 1.3, "SATURATION": 1.2, "HUE": -0.08}
    rows = np.stack(
        [parameter_row(JITTER=1, ORDER=o, TORCHVISION=torchvision, **strengths) for o in permutations(range(4))]
    )
    crops = crops_of(len(rows), 33)
    actual = interpreted("augment").augment_views(crops, torch.from_numpy(rows), torch.float32)
    assert largest_error(actual, reference(crops, rows)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", ["byol", "torchvision"])
@pytest.mark.parametrize(("size", "count"), [(1, 4), (19, 6), (64, 8), (97, 4), (224, 2)])
def test_augmentation_of_sampled_views(interpreted, augmentation, size, count):
    """Both views of a batch in one call, with blur and solarize, at sizes that no tile divides."""
    params = sample(augmentation, 0, 0, np.arange(count), np.full((count, 2), 300))
    rows = params.pack().transpose(1, 0, 2).reshape(2 * count, -1)
    assert (rows[:, augment_params.SIGMA] > 0).any()
    crops = crops_of(2 * count, size) if size > 2 else torch.randint(256, (2 * count, 1, 1, 3), dtype=torch.uint8)
    actual = interpreted("augment").augment_views(crops, torch.from_numpy(rows.copy()), torch.float32)
    assert actual.shape == (2 * count, 3, size, size)
    assert size < 3 or actual.is_contiguous(memory_format=torch.channels_last)
    assert largest_error(actual, reference(crops, rows)) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(("size", "sigma"), [(40, 0.1), (100, 0.1), (100, 0.7), (100, 2.0), (512, 2.0), (512, 5.0)])
def test_blur_on_tiles(interpreted, size, sigma):
    """512 px has the widest window: 25 taps on each side."""
    rows, crops = parameter_row(SIGMA=sigma, SOLARIZE=1)[None], crops_of(1, size)
    actual = interpreted("augment").augment_views(crops, torch.from_numpy(rows), torch.float32)
    difference = (actual - reference(crops, rows)) * torch.tensor(augment_params.IMAGENET_STD)[:, None, None]
    # Solarize is continuous at 0.5: an error there is mirrored, not amplified.
    assert difference.abs().max() < LIMIT / 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_augmentation_is_rounded_float32(interpreted, dtype):
    rows = np.stack([parameter_row(JITTER=1, CONTRAST=1.2, SATURATION=0.9, HUE=0.05, SIGMA=s) for s in (0.0, 1.1)])
    crops, module = crops_of(2, 40), interpreted("augment")
    exact = module.augment_views(crops, torch.from_numpy(rows), torch.float32)
    actual = module.augment_views(crops, torch.from_numpy(rows), dtype)
    if dtype == torch.float16:
        assert torch.equal(actual, exact.to(dtype))
    else:  # the interpreter truncates, a GPU rounds (gpu/test_kernels.py): up to one unit in the last place
        assert ((actual.float() - exact).abs() <= 2**-7 * exact.abs()).all()


def test_augmentation_of_float_crops(interpreted):
    rows, crops = parameter_row(JITTER=1, CONTRAST=1.2, SATURATION=1)[None], crops_of(1, 33)
    module = interpreted("augment")
    whole = module.augment_views(crops, torch.from_numpy(rows), torch.float32)
    floats = module.augment_views(crops.float() / 255, torch.from_numpy(rows), torch.float32)
    assert (whole - floats).abs().max() < 1e-5


def test_augmentation_with_mismatched_arguments_raises(interpreted):
    module, row = interpreted("augment"), torch.zeros(2, augment_params.COLUMNS)
    with pytest.raises(ValueError, match="contiguous"):
        module.augment_views(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), row, torch.float32)
    with pytest.raises(ValueError, match="parameters"):
        module.augment_views(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), row, torch.float32)


# --- crops ---


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 16, 33, 96])
def test_crops_of_images_of_different_sizes(interpreted, monkeypatch, size):
    pictures = images()
    params = sample("byol", 3, 0, np.arange(len(pictures)), [p.shape[:2] for p in pictures])
    params.box[3, 0] = (374, 499, 1, 1)  # one pixel
    params.box[3, 1] = (0, 0, 375, 500)  # everything
    module = interpreted("crop")
    monkeypatch.setattr(module, "BLOCK", 4096)  # the interpreter takes a millisecond per block, whatever its size
    exact = module.crop_views(pictures, params.box, params.flip, size, torch.float32)
    whole = module.crop_views(pictures, params.box, params.flip, size)
    assert exact.shape == (2 * len(pictures), size, size, 3)
    assert whole.dtype == torch.uint8
    for v in range(2):
        for i, picture in enumerate(pictures):
            box = tuple(params.box[i, v].tolist())
            expected = crop.crop_reference(picture, box, flip=bool(params.flip[i, v]), size=size).permute(1, 2, 0)
            assert (exact[v * len(pictures) + i] - expected).abs().max() < 2e-5
            assert (whole[v * len(pictures) + i].float() - 255 * expected).abs().max() < 0.51


def test_crop_box_outside_the_image_raises(interpreted):
    boxes = np.zeros((1, 2, 4), dtype=np.int32)
    boxes[..., 2:] = 4
    boxes[0, 1] = (1, 0, 4, 4)
    with pytest.raises(ValueError, match="is not inside image 0"):
        interpreted("crop").crop_views(
            [torch.zeros(4, 4, 3, dtype=torch.uint8)], boxes, np.zeros((1, 2), dtype=bool), 8
        )
    with pytest.raises(ValueError, match="image 0 is not contiguous uint8"):
        interpreted("crop").crop_views([torch.zeros(4, 4, 3)], boxes, np.zeros((1, 2), dtype=bool), 8)


@pytest.mark.slow
def test_crop_and_augmentation_of_decoded_images(interpreted):
    """The pipeline of a loader that decodes on the GPU, against the references on rounded crops."""
    pictures, size = images()[2:4], 48
    params = sample("byol", 1, 0, np.arange(2), [p.shape[:2] for p in pictures])
    crops = interpreted("crop").crop_views(pictures, params.box, params.flip, size)
    rows = params.pack().transpose(1, 0, 2).reshape(4, -1).copy()
    actual = interpreted("augment").augment_views(crops, torch.from_numpy(rows), torch.float32)
    assert largest_error(actual, reference(crops, rows)) < LIMIT


# --- compiled without a GPU ---


def max_registers(build):
    """Per thread: at least 1024 or 512 threads share a multiprocessor's 65536 registers.

    BatchNorm's threads read two to five arrays at once, so fewer of them keep the memory busy. A
    convolution's loads go to shared memory ahead of time, so its threads need not wait for them.
    """
    if build.name.startswith("conv1x1"):
        return 200
    return 64 if build.streaming and not build.name.startswith("batch_norm") else 128


@pytest.mark.slow
@pytest.mark.parametrize("capability", resources.CAPABILITIES)
@pytest.mark.parametrize("build", resources.builds(), ids=lambda build: build.name)
def test_no_spills_and_wide_memory_accesses(build, capability):
    compiled = resources.compile_for(build, capability)
    assert compiled.spill_bytes == 0
    assert compiled.registers <= max_registers(build)
    if build.streaming:
        assert compiled.load_bits >= 128
        assert compiled.store_bits >= 128 or build.stores_sums_only


def test_unaligned_addresses_cause_narrow_accesses():
    """The test above can fail: the same kernel for unaligned addresses."""
    build = next(b for b in resources.builds() if b.name == "update float32")
    narrow = resources.Build(**(vars(build) | {"constants": build.constants | {"ALIGNED": False}}))
    assert resources.compile_for(narrow, 80).store_bits == 32


def test_every_kernel_is_in_the_report():
    kernels = {build.kernel for build in resources.builds()}
    modules = resources.augment, resources.batch_norm, resources.conv1x1, resources.crop, resources.lars_ema
    defined = {value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    assert defined == kernels


@pytest.mark.slow
def test_report_prints_one_row_per_kernel_and_target(capsys):
    assert resources.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(resources.builds()) * len(resources.CAPABILITIES) + 2
    assert "registers" in lines[0]
    assert lines[1].split()[2] == "sm_80"
