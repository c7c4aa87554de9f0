"""Augmentation of a batch of crops: fastbyol, other libraries, and a plain copy.

    make bench-kernels      # in the peers' environment, on the CPU and on a GPU if there is one

All contenders get the same uint8 crops, on their device, and the same number of first and second
views; the peers sample their own parameters per image, from the same distributions. On the CPU the
peers use torch's threads, and fastbyol as many Python threads, like the native loader. --views
sets the number of views (default 32, on a GPU 512), since contenders that process single views are
slow. Bytes are the minimum: crops read twice (the contrast mean, then the pixels), views written
in bfloat16.

    fastbyol         kernels/triton/augment.py on a GPU, kernels/cpu/augment.py on the CPU
    reference        the plain torch formulas, per view
    torchvision v2   ColorJitter, RandomGrayscale, GaussianBlur, RandomSolarize, Normalize, per view
    kornia           batched augmentations with parameters per image
    copy             torch copies as many bytes
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import measure
from torch import Tensor

from fastbyol.data.views import sample
from fastbyol.kernels import augment, augment_params

SIZE = 224
VIEWS = {"cpu": 32, "cuda": 512}
BLUR, SOLARIZE = (1.0, 0.1), (0.0, 0.2)


def inputs(device: str, n: int) -> tuple[Tensor, np.ndarray]:
    """Return (N, S, S, 3) uint8 crops and (N, COLUMNS) parameters; all first views come first."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (n, 3, 14, 14), generator=rng, dtype=torch.uint8).float()
    smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 255).byte()
    params = sample("byol", 0, 0, np.arange(n // 2), np.full((n // 2, 2), 300))
    rows = params.pack().transpose(1, 0, 2).reshape(n, augment_params.COLUMNS).copy()
    return smooth.permute(0, 2, 3, 1).contiguous().to(device), rows


def fastbyol(device: str, n: int) -> Callable[[], object]:
    crops, rows = inputs(device, n)
    if device == "cuda":
        from fastbyol.kernels.triton.augment import augment_views

        parameters = torch.from_numpy(rows).to(device)
        return lambda: augment_views(crops, parameters, torch.bfloat16)
    return _on_cpu(crops, rows)


def _on_cpu(crops: Tensor, rows: np.ndarray) -> Callable[[], object]:
    n, threads = len(rows), torch.get_num_threads()
    planes = crops.permute(0, 3, 1, 2).contiguous().numpy()  # the layout of crop_into's output
    out = np.empty((n, SIZE, SIZE, 3), dtype=np.uint16)
    pool = ThreadPoolExecutor(threads)

    def work(first: int) -> None:
        scratch, view = augment.AugmentScratch(SIZE), augment.new_planes(SIZE)
        for k in range(first, n, threads):
            np.multiply(planes[k], np.float32(1 / 255), out=view)
            augment.augment_into(view, rows[k], out[k], scratch)

    return lambda: list(pool.map(work, range(threads)))


def reference(device: str, n: int) -> Callable[[], object]:
    crops, rows = inputs(device, n)

    def run() -> Tensor:
        views = [
            augment.augment_reference(c.permute(2, 0, 1).float() / 255, r) for c, r in zip(crops, rows, strict=True)
        ]
        return augment.normalize_reference(torch.stack(views)).bfloat16()

    return run


def torchvision(device: str, n: int) -> Callable[[], object]:
    from torchvision.transforms import v2

    crops = inputs(device, n)[0].permute(0, 3, 1, 2)
    chains = [
        v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(23, sigma=(0.1, 2.0))], p=BLUR[v]),
                v2.RandomSolarize(128, p=SOLARIZE[v]),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(augment_params.IMAGENET_MEAN, augment_params.IMAGENET_STD),
                v2.ToDtype(torch.bfloat16),
            ]
        )
        for v in range(2)
    ]
    half = len(crops) // 2
    return lambda: torch.stack([chains[k >= half](crop) for k, crop in enumerate(crops)])


def kornia(device: str, n: int) -> Callable[[], object]:
    k = pytest.importorskip("kornia.augmentation", reason="kornia is not installed: run make bench-setup")
    crops = inputs(device, n)[0].permute(0, 3, 1, 2)
    chains = [
        k.AugmentationSequential(
            k.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            k.RandomGrayscale(p=0.2),
            k.RandomGaussianBlur((23, 23), (0.1, 2.0), p=BLUR[v]),
            k.RandomSolarize(0.0, 0.0, p=SOLARIZE[v]),
            k.Normalize(torch.tensor(augment_params.IMAGENET_MEAN), torch.tensor(augment_params.IMAGENET_STD)),
        )
        for v in range(2)
    ]
    half = len(crops) // 2

    @torch.no_grad()
    def run() -> list[Tensor]:
        parts = crops[:half], crops[half:]
        return [chain(part.float() / 255).bfloat16() for chain, part in zip(chains, parts, strict=True)]

    return run


def bytes_moved(n: int) -> int:
    return n * SIZE * SIZE * (3 + 3 + 6)


def copy(device: str, n: int) -> Callable[[], object]:
    values = torch.ones(bytes_moved(n) // 8, device=device)
    other = torch.empty_like(values)
    return lambda: other.copy_(values)


CONTENDERS = {
    "fastbyol": fastbyol,
    "reference": reference,
    "torchvision v2": torchvision,
    "kornia": kornia,
    "copy": copy,
}


@cache
def prepared(contender: str, device: str, n: int) -> Callable[[], object]:
    return CONTENDERS[contender](device, n)


@pytest.fixture
def views(request: pytest.FixtureRequest, device: str) -> int:
    """Number of views, first and second views together."""
    return request.config.getoption("views") or VIEWS[device]


@pytest.mark.parametrize("contender", CONTENDERS)
def test_augment(benchmark: BenchmarkFixture, device: str, contender: str, turn: int, views: int) -> None:
    run = prepared(contender, device, views)
    name = f"{views} views, {SIZE} px"
    measure(benchmark, run, device=device, turn=turn, set_name=name, contender=contender, moved=bytes_moved(views))
