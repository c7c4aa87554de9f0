"""Build loaders and compare their batches."""

import torch

from fastbyol.config import DataConfig
from fastbyol.data import build_loader, open_split

SIZE, BATCH = 24, 6


def make_loader(root, *, split="train", seed=0, dtype=torch.float32, **changes):
    options = {"batch_size": BATCH, "image_size_px": SIZE, "threads": 2, **changes}
    config = DataConfig(root=str(root), **options)
    return build_loader(config, open_split(root, split), seed=seed, device=torch.device("cpu"), dtype=dtype)


def collect(loader, start, stop):
    """Return copies of all batches, since the loader reuses their memory."""
    return [
        (b.views[0].clone(), b.views[1].clone(), b.labels.clone(), b.indices.clone())
        for b in loader.batches(start, stop)
    ]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )
