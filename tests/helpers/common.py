"""Constants and functions shared by many tests."""

import json
from pathlib import Path

import numpy as np
import simplejpeg

from fastbyol.data.decode import decode

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 1500  # timeout that only a hang exceeds, whatever the machine and its load
BATCH = 16
TRAIN_IMAGES = 72  # 4 batches of 16; each epoch drops the last 8 images


def jpeg(seed: int = 0, height: int = 40, width: int = 50) -> bytes:
    """Return a JPEG of smooth random colors."""
    coarse = np.random.default_rng(seed).integers(0, 255, size=(4, 5, 3), dtype=np.uint8)
    image = coarse.repeat(-(-height // 4), 0).repeat(-(-width // 5), 1)[:height, :width]
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95)


def losses(run: Path) -> dict[int, float]:
    """Return the logged losses by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def pixels_of(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    """Return the decoded pixels of `jpeg`, (H, W, 3) uint8."""
    return decode(jpeg(seed, height, width))
