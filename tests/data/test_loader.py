"""The native loader's contract."""

import threading
import time

import numpy as np
import pytest
import torch
from helpers.common import HANG_S, jpeg
from helpers.loaders import BATCH, SIZE, collect, make_loader, same

from fastbyol.data import native, open_split, rendering, views
from fastbyol.data.crops import center_crops
from fastbyol.data.decode import decode
from fastbyol.errors import InputError, RunError
from fastbyol.kernels import augment, crop


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("fastbyol-loader")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert loader_threads() == []


def test_an_epoch_has_no_duplicates(photos):
    loader = make_loader(photos, batch_size=16)
    assert len(loader) == 72 // 16
    for epoch in range(3):
        batches = collect(loader, epoch * len(loader), (epoch + 1) * len(loader))
        indices = torch.cat([b[3] for b in batches]).tolist()
        assert len(batches) == 4
        assert len(set(indices)) == 64
        assert indices == views.epoch_order(0, epoch, 72)[:64].tolist()


def test_views_match_the_reference_and_the_contract(photos):
    folder = open_split(photos, "train")
    loader = make_loader(photos, seed=5)
    batch = collect(loader, 13, 14)[0]  # epoch 1, batch 1
    indices = batch[3].tolist()
    images = [decode(folder.read(i)) for i in indices]
    params = views.sample("byol", 5, 1, np.arange(BATCH, 2 * BATCH), [image.shape[:2] for image in images])
    expected = views.apply_reference([torch.from_numpy(image) for image in images], params, SIZE)
    assert batch[2].tolist() == folder.labels[indices].tolist()
    for actual, reference in zip(batch[:2], expected, strict=True):
        assert actual.shape == (BATCH, 3, SIZE, SIZE)
        assert (actual - reference).abs().max() < 1 / 255 / 0.229
    for view in next(iter(loader.batches(0, 1))).views:
        assert view.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_batches_are_rounded_float32_batches(photos, dtype):
    for a, b in zip(collect(make_loader(photos), 0, 2), collect(make_loader(photos, dtype=dtype), 0, 2), strict=True):
        assert b[0].dtype == dtype
        assert torch.equal(a[0].to(dtype), b[0])
        assert torch.equal(a[1].to(dtype), b[1])


def test_batches_do_not_depend_on_threads(photos):
    one = collect(make_loader(photos, threads=1), 0, 30)
    assert same(one, collect(make_loader(photos, threads=4), 0, 30))
    assert same(one, collect(make_loader(photos, threads=3, prefetch_batches=1), 0, 30))


@pytest.mark.parametrize("start", [1, 11, 12, 17, 24])
def test_restart_is_bit_exact(photos, start):
    whole = collect(make_loader(photos), 0, 26)
    assert same(whole[start:], collect(make_loader(photos), start, 26))


def test_seed_changes_order_and_views(photos):
    assert not same(collect(make_loader(photos), 0, 1), collect(make_loader(photos, seed=1), 0, 1))


def test_one_decode_per_image(photos, monkeypatch):
    calls = []
    monkeypatch.setattr(rendering, "decode", lambda *args: calls.append(1) or decode(*args))
    collect(make_loader(photos), 0, 5)
    assert len(calls) == 5 * BATCH


def test_early_break_stops_all_threads_and_the_loader_restarts(photos):
    loader = make_loader(photos)
    for step, _ in enumerate(loader.batches(0, 1000)):
        if step == 2:
            break
    del _
    assert loader_threads() == []
    assert len(collect(loader, 0, 12)) == 12


def test_backpressure(photos, monkeypatch):
    calls = []
    monkeypatch.setattr(rendering, "decode", lambda *args: calls.append(1) or decode(*args))
    batches = make_loader(photos, prefetch_batches=2).batches(0, 1000)
    next(batches)
    deadline = time.monotonic() + HANG_S
    while len(calls) < 3 * BATCH and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(calls) == 3 * BATCH  # the consumer's batch and two ahead, however long it takes
    batches.close()


def test_wait_s_measures_waiting(photos, monkeypatch):
    """From the request for a batch to its arrival, without the consumer's time; measured with a
    fake clock.
    """
    loader, clock = make_loader(photos, threads=1), iter([0.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(native.time, "perf_counter", lambda: next(clock))
    collect(loader, 0, 2)
    assert loader.wait_s == 3 + 4


def test_an_exception_in_a_worker_reaches_the_consumer(photos, monkeypatch):
    def explode(*args):
        raise ZeroDivisionError("in a worker")

    monkeypatch.setattr(rendering.augment, "augment_into", explode)
    with pytest.raises(ZeroDivisionError, match="in a worker"):
        collect(make_loader(photos), 0, 5)


def test_fewer_images_than_a_batch(photos):
    with pytest.raises(InputError, match=r"data.batch_size=100 but .*train has 72 images.*at most 72"):
        make_loader(photos, batch_size=100)


# --- bad images ---


@pytest.fixture
def flawed(folder_of):
    """18 plain images, two bad ones (text named .jpg, a truncated JPEG) and two of extreme sizes
    (1x1, 20,000x10).
    """
    files = {f"train/a/{i:02d}.jpg": jpeg(i) for i in range(20)}
    files["train/a/05.jpg"] = b"these are words"
    files["train/a/11.jpg"] = jpeg(11)[:-300]
    files["train/a/30.jpg"] = jpeg(30, 1, 1)
    files["train/a/31.jpg"] = jpeg(31, 10, 20_000)
    return folder_of(files)


def test_bad_images_are_reported_and_replaced_by_their_neighbors(flawed):
    loader = make_loader(flawed, max_bad_fraction=0.2)
    batches = collect(loader, 0, 2 * len(loader))
    orders = [views.epoch_order(0, epoch, 22)[: len(loader) * BATCH] for epoch in (0, 1)]
    expected = [{5: 6, 11: 12}.get(i, i) for i in np.concatenate(orders).tolist()]
    assert torch.cat([b[3] for b in batches]).tolist() == expected
    reasons = {loader.images.name(i): reason for i, reason in loader.bad.items()}
    assert sorted(reasons) == ["a/05.jpg", "a/11.jpg"]
    assert reasons["a/05.jpg"] == "not an image file"
    assert "truncated" in reasons["a/11.jpg"]
    assert all(torch.isfinite(view).all() for b in batches for view in b[:2])


def test_substitutes_do_not_depend_on_threads(flawed):
    runs = [collect(make_loader(flawed, max_bad_fraction=0.2, threads=n), 0, 9) for n in (1, 4)]
    assert same(*runs)


def test_too_many_bad_images_stop_the_run(flawed):
    with pytest.raises(RunError, match=r"2 of 22 images cannot be read.*data.max_bad_fraction=0.05.*train/a/"):
        collect(make_loader(flawed, max_bad_fraction=0.05), 0, 9)


def test_unreadable_files_count_as_bad(folder_of):
    root = folder_of({f"train/{i}.jpg": jpeg(i) for i in range(12)})
    (root / "train/3.jpg").unlink()
    (root / "train/3.jpg").symlink_to(root / "nowhere")
    (root / "train/7.jpg").unlink()
    (root / "train/7.jpg").mkdir()  # a folder, which is no image
    loader = make_loader(root, batch_size=11, max_bad_fraction=0.2)
    delivered = {loader.images.name(i) for b in collect(loader, 0, 3) for i in b[3].tolist()}
    assert "3.jpg" not in delivered
    assert [loader.images.name(i) for i in loader.bad] == ["3.jpg"]
    assert "No such file" in next(iter(loader.bad.values()))


def test_no_readable_image_raises_run_error(folder_of):
    root = folder_of({f"train/{i}.jpg": b"words" for i in range(8)})
    with pytest.raises(RunError, match="8 of 8 images cannot be read"):
        collect(make_loader(root, max_bad_fraction=0.9), 0, 1)


# --- evaluation crops ---


def test_center_crops_yield_all_good_images_in_order(flawed):
    folder = open_split(flawed, "train")
    bad = {}
    images, indices = zip(
        *center_crops(folder, size=SIZE, fraction=0.875, batch_size=7, threads=2, bad=bad), strict=True
    )
    assert np.concatenate(indices).tolist() == [i for i in range(22) if i not in (5, 11)]
    assert set(bad) == {5, 11}
    assert sum(map(len, images)) == 20
    image = decode(folder.read(0))
    box = views.center_box(*image.shape[:2], 0.875)
    expected = crop.crop_reference(torch.from_numpy(image), box, flip=False, size=SIZE)
    assert (images[0][0] - augment.normalize_reference(expected)).abs().max() < 1e-3
