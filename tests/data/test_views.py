from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbyol.data import views
from fastbyol.data.views import AUGMENTATIONS, epoch_order, sample

N = 24_000


@pytest.fixture(scope="module")
def drawn() -> views.ViewParams:
    return sample("byol", seed=7, epoch=3, positions=np.arange(N), sizes=np.tile([375, 500], (N, 1)))


# Known answers of Philox4x32-10 from the generator's authors: counter, key -> output.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = views._philox(key[0] | key[1] << 32, counter[0], counter[1], counter[2], counter[3])
    assert [int(word) for word in words] == expected


def test_views_are_a_function_of_seed_epoch_and_position(drawn):
    some = np.array([5, 23_000, 17])
    sizes = np.tile([375, 500], (3, 1))
    again = sample("byol", 7, 3, some, sizes)
    assert np.array_equal(again.pack(), drawn[some].pack())
    for seed, epoch in ((8, 3), (7, 4)):
        assert not np.array_equal(sample("byol", seed, epoch, some, sizes).pack(), again.pack())


def test_the_two_views_differ(drawn):
    packed = drawn.pack()
    assert not (packed[:, 0] == packed[:, 1]).all(1).any()


def test_rates_of_blur_and_solarize_per_view(drawn):
    tolerance = 4 * np.sqrt(0.25 / N)
    assert drawn.blur.mean(0) == pytest.approx([1.0, 0.1], abs=tolerance)
    assert drawn.solarize.mean(0) == pytest.approx([0.0, 0.2], abs=tolerance)
    assert drawn.blur[:, 0].all()
    assert not drawn.solarize[:, 0].any()


def test_rates_of_the_other_operations(drawn):
    tolerance = 4 * np.sqrt(0.25 / N)
    for name, rate in (("flip", 0.5), ("jitter", 0.8), ("gray", 0.2)):
        assert getattr(drawn, name).mean(0) == pytest.approx([rate, rate], abs=tolerance), name


def test_ranges_and_means_of_the_strengths(drawn):
    ranges = {
        "brightness": (-0.4, 0.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
        "sigma": (0.1, 2.0),
    }
    for name, (low, high) in ranges.items():
        values = getattr(drawn, name)
        assert low <= values.min() < low + 0.01 * (high - low), name
        assert high - 0.01 * (high - low) < values.max() <= high, name
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.01 * (high - low)), name


def test_jitter_order_is_uniform_over_its_24_permutations(drawn):
    counts = Counter(map(tuple, drawn.order.reshape(-1, 4).tolist()))
    assert len(counts) == 24
    expected = 2 * N / 24
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 49.7  # 23 degrees of freedom, p = 0.001


def test_crops_have_the_area_and_aspect_of_the_paper(drawn):
    height, width = (drawn.box[..., k].astype(float) for k in (2, 3))
    inside = (height < 375) & (width < 500)  # neither side was clamped
    aspect = (width / height)[inside]
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    area = (height * width)[inside] / (375 * 500)
    assert area.min() == pytest.approx(0.08, abs=0.001)
    # Areas are uniform: below 0.5 hardly any crop is clamped at this image size.
    assert np.mean(height * width < 0.25 * 375 * 500) == pytest.approx((0.25 - 0.08) / 0.92, abs=0.01)


def test_offsets_are_uniform_and_reach_both_ends(drawn):
    slack = 500 - drawn.box[..., 3]
    left = drawn.box[..., 1]
    assert (left[slack == 1] == 0).any()
    assert (left[slack == 1] == 1).any()
    assert np.mean(left[slack > 50] / slack[slack > 50]) == pytest.approx(0.5, abs=0.01)


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    augmentation=st.sampled_from(sorted(AUGMENTATIONS)),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_box_lies_inside_its_image(size, augmentation, seed):
    box = sample(augmentation, seed, 0, np.arange(50), np.tile(size, (50, 1))).box
    top, left, height, width = np.moveaxis(box, -1, 0)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()


def test_torchvision_crops_redraw_instead_of_clamping():
    n = 4000
    box = sample("torchvision", 0, 0, np.arange(n), np.tile([100, 400], (n, 1))).box
    height, width = box[..., 2].astype(float), box[..., 3]
    assert (width / height).max() <= 4 / 3 + 0.02  # a clamped box would be wider: 100 x up to 231
    byol = sample("byol", 0, 0, np.arange(n), np.tile([100, 400], (n, 1))).box
    assert (byol[..., 3] / byol[..., 2]).max() > 1.9


def test_epoch_order_is_a_permutation_that_changes_with_epoch_and_seed():
    orders = [epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(orders[0], epoch_order(0, 0, 1000))
    for other in orders[1:]:
        assert np.mean(orders[0] == other) < 0.01


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (256, 256, (16, 16, 224, 224)),
        (375, 500, (24, 86, 328, 328)),  # side 328.1 down; (375 - 328) / 2 = 23.5 up
        (500, 375, (86, 24, 328, 328)),
        (333, 500, (21, 105, 291, 291)),  # side 291.4
        (7, 9, (1, 2, 6, 6)),  # offsets 0.5 and 1.5 up
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_center_box_is_the_authors_evaluation_crop(height, width, box):
    """byol/utils/dataset.py, _decode_and_center_crop: side int(224 / 256 * min(h, w)), offsets
    (h - side + 1) // 2.
    """
    assert views.center_box(height, width, 0.875) == box
