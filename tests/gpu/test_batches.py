"""GPU batches equal CPU batches, even while the GPU runs queued work."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers.on_device import DEVICE, needs_cuda, no_synchronization, release_memory, stall, write_corpus

from fastbyol.config import DataConfig
from fastbyol.data import build_loader, open_split
from fastbyol.data.crops import center_crops, random_crops
from fastbyol.data.pack import pack
from fastbyol.kernels.augment_params import IMAGENET_STD
from fastbyol.runtime.environment import FFCV_COMMAND, dali_install_command, has_module

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
BATCH, SIZE = 16, 64
EPOCH = 72 // BATCH  # 4 batches; the last 8 images are dropped


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return the root of a corpus: an image folder and two .beton files."""
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    for mode in ("jpg", "raw"):
        pack(open_split(root, "train"), root / f"{mode}.beton", mode=mode)
    return root


def make(root, split, backend, device, dtype, **changes):
    options = {"batch_size": BATCH, "image_size_px": SIZE, "threads": 2, "backend": backend, **changes}
    config = DataConfig(root=str(root), train_split=split, **options)
    return build_loader(config, open_split(root, split), seed=5, device=device, dtype=dtype)


def collect(loader, start, stop, watched=no_synchronization):
    """Return views, labels and indices of all batches on the CPU.

    Each batch is copied after queued GPU work that is slower than the loader.
    """
    kept = []
    with watched():
        for batch in loader.batches(start, stop):
            stall()
            kept.append([tensor.clone() for tensor in (*batch.views, batch.labels, batch.indices)])
    return [[tensor.cpu() for tensor in batch] for batch in kept]


def assert_same_images_and_close_views(actual, expected):
    """Views may differ by the rounding of the decoders, 3/255 before normalization."""
    assert len(actual) == len(expected)
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine[3], other[3])
        assert torch.equal(mine[2], other[2])
        for view, reference in zip(mine[:2], other[:2], strict=True):
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert ((view.float() - reference.float()) * std).abs().max() < 3 / 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefetch", [1, 3])
def test_native_batches_are_bit_exact(stored, dtype, prefetch):
    """Three epochs from mid-epoch use each of the two GPU slots six times."""
    start, stop = 3, 3 + 3 * EPOCH
    expected = collect(make(stored, "train", "native", CPU, dtype), start, stop)
    actual = collect(make(stored, "train", "native", DEVICE, dtype, prefetch_batches=prefetch), start, stop)
    for mine, other in zip(actual, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        assert all(view.dtype == dtype and view.is_contiguous(memory_format=torch.channels_last) for view in mine[:2])


@needs_cuda
def test_batches_never_reuse_memory_of_queued_work(stored):
    """The allocator reuses freed memory immediately, too early for a copy on another stream."""
    expected = collect(make(stored, "train", "native", CPU, torch.float32), 0, 2)
    loader = make(stored, "train", "native", DEVICE, torch.float32)
    release_memory()
    values = 2 * BATCH * SIZE * SIZE * 3  # of both views
    for _ in range(2):  # the first pass allocates pinned memory, which may synchronize
        written = [torch.empty(values, device=DEVICE) for _ in range(2)]
        for _ in range(10):
            stall()
        while written:
            written.pop().fill_(7.0)
        batches = loader.batches(0, 2)
        actual = [[t.clone() for t in (*batch.views, batch.labels, batch.indices)] for batch in batches]
        for mine, other in zip(actual, expected, strict=True):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, other, strict=True))


def test_early_break_and_restart(stored):
    loader = make(stored, "train", "native", DEVICE, torch.float32)
    first = collect(loader, 0, 2)
    for step, _ in enumerate(loader.batches(0, 10**6)):
        if step == 2:
            break
    again = collect(loader, 0, 2)
    assert all(torch.equal(a, b) for p, q in zip(first, again, strict=True) for a, b in zip(p, q, strict=True))


@pytest.mark.skipif(not has_module("nvidia.dali"), reason=f"DALI is not installed: {dali_install_command()}")
@pytest.mark.parametrize("split", ["train", "jpg.beton", "raw.beton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dali_views_match_the_native_backend(stored, split, dtype):
    stop = 2 * EPOCH + 1
    expected = collect(make(stored, split, "native", CPU, dtype), 0, stop)
    assert_same_images_and_close_views(collect(make(stored, split, "dali", DEVICE, dtype), 0, stop), expected)


@pytest.mark.parametrize("decoder", ["native", "dali"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation_crops_match_those_of_the_cpu(stored, decoder, dtype):
    if decoder == "dali" and (DEVICE.type != "cuda" or not has_module("nvidia.dali")):
        pytest.skip(f"needs a GPU and DALI: {dali_install_command()}")
    images = open_split(stored, "train")
    options = {"size": SIZE, "batch_size": BATCH, "threads": 2, "bad": {}, "dtype": dtype}
    for crops in (partial(center_crops, fraction=0.875), partial(random_crops, seed=3, epoch=1)):
        expected = [(x.clone(), indices) for x, indices in crops(images, **options)]
        actual = []
        for x, indices in crops(images, **options, device=DEVICE, decoder=decoder):
            stall()
            actual.append((x.clone(), indices))
        assert len(actual) == len(expected)
        for (x, indices), (y, others) in zip(actual, expected, strict=True):
            assert indices.tolist() == others.tolist()
            if decoder == "native":
                assert torch.equal(x.cpu(), y)
            else:
                close = (x.cpu().float() - y.float()).abs() <= 3 / 255 / min(IMAGENET_STD) + y.float().abs() * 2**-7
                assert close.float().mean() > 0.999


@pytest.mark.skipif(not has_module("ffcv"), reason=f"FFCV is not installed: {FFCV_COMMAND}")
@pytest.mark.parametrize(("split", "dtype"), [("jpg.beton", torch.float32), ("raw.beton", torch.bfloat16)], ids=str)
def test_ffcv_views_match_the_native_backend(stored, split, dtype):
    stop = 2 * EPOCH + 1
    expected = collect(make(stored, split, "native", CPU, dtype), 0, stop)
    loader = make(stored, split, "ffcv", DEVICE, dtype)
    # FFCV synchronizes internally.
    assert_same_images_and_close_views(collect(loader, 0, stop, watched=nullcontext), expected)
