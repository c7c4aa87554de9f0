"""All backends on all kinds of storage: same images, order and views, and no leaked threads or
files.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from functools import lru_cache

import numpy as np
import pytest
import torch
from helpers.common import HANG_S, jpeg, losses
from helpers.ffcv_files import write_with_ffcv
from helpers.loaders import collect, same

from fastbyol.api import train
from fastbyol.config import DataConfig
from fastbyol.data import build_loader, choose_backend, open_split, views
from fastbyol.data.decode import decode
from fastbyol.data.pack import pack
from fastbyol.errors import InputError, LoaderTimeout, RunError
from fastbyol.evaluation.options import KnnEval
from fastbyol.evaluation.run import evaluate

SIZE, BATCH = 40, 8
CPU = torch.device("cpu")
STORAGE = {"folder": "train", "jpg": "jpg.beton", "raw": "raw.beton"}
PAIRS = [(b, s) for b in ("native", "dali", "ffcv") for s in STORAGE if (b, s) != ("ffcv", "folder")]


@pytest.fixture(scope="session")
def stored(photos, tmp_path_factory):
    """The photographs as a folder and as two .beton files."""
    root = tmp_path_factory.mktemp("stored")
    (root / "train").symlink_to(photos / "train")
    for mode in ("jpg", "raw"):
        pack(open_split(photos, "train"), root / f"{mode}.beton", mode=mode)
    return root


def make(root, split, backend, *, dtype=torch.float32, shard=None, seed=5, **changes):
    options = {"batch_size": BATCH, "image_size_px": SIZE, "threads": 2, "backend": backend, **changes}
    config = DataConfig(root=str(root), train_split=split, **options)
    return build_loader(config, open_split(root, split), seed=seed, device=CPU, dtype=dtype, shard=shard)


@pytest.fixture(scope="session")
def loaders(stored):
    """One loader of each kind per session, since FFCV compiles for 20 s."""
    return lru_cache(lambda backend, storage: make(stored, STORAGE[storage], backend))


@pytest.fixture(autouse=True)
def nothing_is_left():
    def files():
        return {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}

    before = set(threading.enumerate()), files()
    yield
    left = [t for t in threading.enumerate() if t not in before[0] and not t.daemon]
    ours = [
        t.name for t in set(threading.enumerate()) - before[0] if "fastbyol" in t.name or "_Epoch" in type(t).__name__
    ]
    assert left == []
    assert ours == []
    assert not [f for f in files() - before[1] if f.endswith(".jpg")]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "storage"), PAIRS)
def test_all_backends_yield_the_reference_views(loaders, stored, backend, storage):
    loader = loaders(backend, storage)
    images = open_split(stored, "train")
    largest, total = 0.0, []
    for step, batch in enumerate(collect(loader, 0, len(loader))):
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        indices = views.epoch_order(5, 0, len(images))[positions]
        assert batch[3].tolist() == indices.tolist()
        assert batch[2].tolist() == images.labels[indices].tolist()
        pixels = [decode(images.read(int(i))) for i in indices]
        params = views.sample("byol", 5, 0, positions, [p.shape[:2] for p in pixels])
        expected = views.apply_reference([torch.from_numpy(p) for p in pixels], params, SIZE)
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        for view, reference in zip(batch[:2], expected, strict=True):
            assert view.shape == (BATCH, 3, SIZE, SIZE)
            assert view.is_contiguous(memory_format=torch.channels_last)
            difference = ((view - reference) * std).abs() * 255
            largest = max(largest, difference.max().item())
            total.append(difference.mean().item())
    assert largest < 3
    assert np.mean(total) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "storage"), PAIRS)
def test_epochs_early_break_and_restart(loaders, stored, backend, storage):
    loader = loaders(backend, storage)
    n = len(open_split(stored, "train"))
    assert len(loader) == n // BATCH
    whole = collect(loader, 0, 3 * len(loader))
    assert len(whole) == 3 * (n // BATCH)
    for epoch in range(3):
        seen = torch.cat([b[3] for b in whole[epoch * len(loader) : (epoch + 1) * len(loader)]]).tolist()
        assert seen == views.epoch_order(5, epoch, n)[: len(loader) * BATCH].tolist()
    for step, _ in enumerate(loader.batches(0, 10**6)):
        if step == 2:
            break
    del _
    assert same(whole[7:20], collect(loader, 7, 20))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dali", "ffcv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_views_and_shards_of_a_rank(loaders, stored, backend, dtype):
    shard = np.array([1, 3, 6])
    whole = collect(loaders(backend, "jpg"), 3, 12)
    part = collect(make(stored, "jpg.beton", backend, dtype=dtype, shard=shard), 3, 12)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[3][shard], b[3])
        assert torch.equal(a[2][shard], b[2])
        assert all(torch.equal(x[shard].to(dtype), y) for x, y in zip(a[:2], b[:2], strict=True))


def test_dali_batches_do_not_depend_on_threads_and_readahead(stored, loaders):
    expected = collect(loaders("dali", "folder"), 0, 20)
    for changes in (
        {"threads": 1, "readers": 1},
        {"readahead_images": 1},
        {"readahead_images": 7, "prefetch_batches": 1},
    ):
        assert same(expected, collect(make(stored, "train", "dali", **changes), 0, 20))


@pytest.fixture
def flawed(folder_of):
    """22 good images, a text file named .jpg, a truncated JPEG, one with damaged entropy data; a
    PNG, 1x1 and 20,000x10.
    """
    files = {f"train/a/{i:02d}.jpg": jpeg(i) for i in range(20)}
    files["train/a/05.jpg"] = b"these are words"
    files["train/a/11.jpg"] = jpeg(11)[:-300]
    damaged = bytearray(jpeg(14, 200, 200))
    damaged[-400:-200] = b"\xff\x00\x55\xaa" * 50
    files["train/a/14.jpg"] = bytes(damaged)
    files["train/a/30.jpg"] = jpeg(30, 1, 1)
    files["train/a/31.jpg"] = jpeg(31, 10, 20_000)
    return folder_of(files)


def test_dali_replaces_bad_images_like_the_native_backend(flawed):
    runs, bad = [], []
    for backend in ("native", "dali"):
        loader = make(flawed, "train", backend, max_bad_fraction=0.2)
        runs.append(collect(loader, 0, 2 * len(loader)))
        bad.append(loader.bad)
    assert bad[0] == bad[1]
    assert len(bad[0]) >= 2
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a[3], b[3])
        assert torch.equal(a[2], b[2])
        assert all((x - y).abs().max() < 3 / 255 / 0.224 for x, y in zip(a[:2], b[:2], strict=True))
    with pytest.raises(RunError, match=r"of 22 images cannot be read.*data.max_bad_fraction=0.05.*train/a/"):
        collect(make(flawed, "train", "dali", max_bad_fraction=0.05), 0, 9)


def test_a_batch_that_dali_rejects_is_decoded_by_the_host(photos, tmp_path, log_lines):
    """Two JPEGs have valid headers, but their scans refer to missing Huffman tables."""
    shutil.copytree(photos / "train", tmp_path / "train")
    images = open_split(tmp_path, "train")
    for i in (9, 50):
        data = bytearray(images.read(i))
        scan = data.index(b"\xff\xda")
        data[scan + 6] = data[scan + 8] = 0x33
        (tmp_path / "train" / images.name(i)).write_bytes(data)
    loader = make(tmp_path, "train", "dali", max_bad_fraction=0.1, readahead_images=32)
    actual = collect(loader, 0, 2 * len(loader))
    warning = "warning: DALI cannot decode an image; libjpeg-turbo decodes its batch instead: Failed to decode"
    assert any(line.startswith(warning) for line in log_lines)
    native = make(tmp_path, "train", "native", max_bad_fraction=0.1)
    expected = collect(native, 0, 2 * len(native))
    assert loader.bad == native.bad
    assert sorted(loader.bad) == [9, 50]
    for a, b in zip(expected, actual, strict=True):
        assert torch.equal(a[3], b[3])
        assert torch.equal(a[2], b[2])
        assert all((x - y).abs().max() < 3 / 255 / 0.224 for x, y in zip(a[:2], b[:2], strict=True))


@pytest.mark.slow
def test_all_backends_agree_on_a_file_written_by_ffcv(tmp_path):
    """The file has JPEG and raw images and fields of every type."""
    write_with_ffcv(tmp_path / "theirs.beton", "proportion")
    runs = [collect(make(tmp_path, "theirs", backend), 0, 6) for backend in ("native", "dali", "ffcv")]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a[3], b[3])
            assert torch.equal(a[2], b[2])
            assert all((x - y).abs().max() < 3 / 255 / 0.224 for x, y in zip(a[:2], b[:2], strict=True))


@pytest.mark.slow
def test_ffcv_replaces_bad_images(stored, tmp_path, loaders):
    """FFCV ignores the error that libjpeg-turbo returns for a damaged JPEG."""
    data = bytearray((stored / "jpg.beton").read_bytes())
    found = open_split(stored, "jpg.beton")
    start, size = int(found.starts[9]), int(found.sizes[9])
    data[start : start + size] = bytes(size)
    (tmp_path / "hurt.beton").write_bytes(data)
    whole = collect(loaders("ffcv", "jpg"), 0, 9)
    loader = make(tmp_path, "hurt.beton", "ffcv", max_bad_fraction=0.1)
    actual = collect(loader, 0, 9)
    assert list(loader.bad) == [9]
    native = collect(make(tmp_path, "hurt.beton", "native", max_bad_fraction=0.1), 0, 9)
    for a, b, c in zip(whole, actual, native, strict=True):
        assert b[3].tolist() == [10 if i == 9 else i for i in a[3].tolist()] == c[3].tolist()
        assert all((x - y).abs().max() < 3 / 255 / 0.224 for x, y in zip(b[:2], c[:2], strict=True))


@pytest.mark.dali
def test_a_hanging_disk_raises_loader_timeout(stored, monkeypatch):
    never = threading.Event()

    def hang(images, index):
        never.wait(60)
        return b""

    for backend, storage in (("dali", "train"), ("native", "raw.beton")):
        loader = make(stored, storage, backend, timeout_s=2)  # enough for a reader to start on a busy machine
        with monkeypatch.context() as patch:
            patch.setattr(type(loader.images), "read", hang)
            with pytest.raises(LoaderTimeout, match=r"no batch for 2 s \(data.timeout_s\)") as caught:
                next(loader.batches(0, 3))
            assert "in hang" in caught.value.stacks
        never.set()
        time.sleep(0.3)
        never.clear()


def test_a_hanging_ffcv_thread_raises_loader_timeout(loaders, monkeypatch):
    loader, never = loaders("ffcv", "raw"), threading.Event()
    monkeypatch.setattr(loader, "timeout_s", 0.5)
    monkeypatch.setattr(loader, "sampler", lambda step: never.wait(60))
    with pytest.raises(LoaderTimeout, match=r"no batch for 0.5 s"):
        collect(loader, 0, 3)
    never.set()
    deadline = time.monotonic() + HANG_S
    while any(type(t).__name__ == "_Epoch" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("readahead", [1, 5, 200])
def test_dali_input_on_a_gpu(stored, monkeypatch, readahead):
    """The reading half of the GPU path, which needs no GPU: steps in order, early end, hanging
    disk.
    """
    loader = make(stored, "train", "dali", readahead_images=readahead)
    steps = list(loader._read_steps(5, 12))
    assert [[p.index for p in step] for step in steps] == [loader.indices(k).tolist() for k in range(5, 12)]
    assert all(p.pixels is None and decode(p.encoded.tobytes()).shape[:2] == p.size for step in steps for p in step)
    part = loader._read_steps(0, 10**6)
    next(part)
    part.close()
    never, loader.timeout_s = threading.Event(), 0.5
    monkeypatch.setattr(type(loader.images), "read", lambda self, index: never.wait(60) and b"")
    with pytest.raises(LoaderTimeout, match="no batch for 0.5 s"):
        next(loader._read_steps(0, 3))
    never.set()
    time.sleep(0.2)


@pytest.mark.slow
def test_ffcv_preserves_torch_threads(stored):
    """In a fresh process, since FFCV also sets the number of threads when it is imported."""
    code = f"""
import torch
torch.set_num_threads(2)
from fastbyol.config import DataConfig
from fastbyol.data import build_loader, find_images
config = DataConfig(root={str(stored)!r}, train_split="raw.beton", backend="ffcv", threads=1, batch_size=8, image_size_px=32)
loader = build_loader(config, find_images(config, "train"), seed=0, device=torch.device("cpu"), dtype=torch.float32)
next(batches := loader.batches(0, 2))
batches.close()
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]


def test_an_exception_in_ffcvs_thread_reaches_the_consumer(loaders, monkeypatch):
    loader = loaders("ffcv", "raw")

    def explode(step):
        raise ZeroDivisionError("in FFCV's thread")

    monkeypatch.setattr(loader, "sampler", explode)
    with pytest.raises(ZeroDivisionError, match="in FFCV's thread"):
        collect(loader, 0, 3)


@pytest.mark.slow
@pytest.mark.dali
@pytest.mark.ffcv
def test_training_and_evaluation_do_not_depend_on_backend_and_storage(photos, stored, make_config, tmp_path):
    """Compares losses of two epochs and the kNN accuracy of one run, from a folder and from .beton
    files.
    """
    options = {"knn": {"every_epochs": 2}, "optim": {"epochs": 2, "warmup_epochs": 0, "base_lr": 0.5}}
    root = tmp_path / "packed"
    root.mkdir()
    for split in ("train", "val"):
        pack(open_split(photos, split), root / f"{split}.beton", mode="jpg")
    runs = {}
    for name, root_of_run, backend in (("folder", photos, "native"), ("dali", photos, "dali"), ("ffcv", root, "ffcv")):
        data = {"root": str(root_of_run), "batch_size": 16, "image_size_px": 32, "threads": 2, "backend": backend}
        config = make_config(name=name, data=data, **options)
        runs[name] = train(config).folder
    for name in ("dali", "ffcv"):
        ours, expected = losses(runs[name]), losses(runs["folder"])
        assert len(ours) == 9  # floor(2 * 72 / 16)
        assert max(abs(ours[k] - expected[k]) for k in expected) < 0.02  # the decoders' rounding; none here as yet
    results = [
        evaluate("knn", KnnEval(run=str(runs["folder"]), root=str(data_root), baselines=False))
        for data_root in (photos, root)
    ]
    assert results[0]["rows"] == results[1]["rows"]


@pytest.mark.dali
def test_choose_backend(stored, monkeypatch):
    from fastbyol.data import backends

    folder, packed = open_split(stored, "train"), open_split(stored, "jpg.beton")
    assert choose_backend(DataConfig(), folder, CPU) == ("native", "the device is the CPU")
    assert choose_backend(DataConfig(), folder, torch.device("cuda")) == ("dali", "the GPU decodes")
    assert choose_backend(DataConfig(backend="ffcv"), packed, CPU)[0] == "ffcv"
    with pytest.raises(InputError, match=r"data.backend=ffcv reads .beton files only, .*train is none: fastbyol pack"):
        choose_backend(DataConfig(backend="ffcv"), folder, CPU)
    monkeypatch.setattr(backends, "has_module", lambda name: False)
    name, why = choose_backend(DataConfig(), folder, torch.device("cuda"))
    assert name == "native"
    assert "pip install nvidia-dali-cuda" in why
    with pytest.raises(InputError, match="data.backend=dali: DALI is not installed: pip install nvidia-dali-cuda"):
        choose_backend(DataConfig(backend="dali"), folder, CPU)
    with pytest.raises(InputError, match="data.backend=ffcv: FFCV is not installed: apt-get install"):
        choose_backend(DataConfig(backend="ffcv"), packed, CPU)


def test_too_many_threads_for_ffcv_raise_input_error(stored):
    with pytest.raises(InputError, match=r"data.threads=500: FFCV's loader can use at most \d+ threads here"):
        make(stored, "jpg.beton", "ffcv", threads=500)
