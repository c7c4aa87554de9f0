"""Test files written by FFCV."""

import subprocess
import sys

import numpy as np
from helpers.common import HANG_S, ROOT, pixels_of


class Samples:
    """Dataset of 30 images of different sizes, with fields of every FFCV type."""

    def __len__(self):
        return 30

    def __getitem__(self, i):
        note = {"name": f"image {i}", "tags": ["x"] * (i % 4)}
        text = np.frombuffer(b"abc"[: i % 3] + b"z", dtype=np.uint8)
        return (i / 7, pixels_of(i, 30 + i, 64 + 3 * i), note, i % 5, np.full((2, 3), i, np.float32), text, i * 1000)


def write_with_ffcv(path, mode):
    """Write in a separate process: FFCV's writer forks, which is unsafe with running threads."""
    code = "import sys; sys.path.append(sys.argv[1]); from helpers.ffcv_files import ffcv_writes; ffcv_writes(*sys.argv[2:])"
    subprocess.run([sys.executable, "-c", code, str(ROOT / "tests"), str(path), mode], check=True, timeout=HANG_S)


def ffcv_writes(path, mode):
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "score": FloatField(),
        "photo": RGBImageField(write_mode=mode, smart_threshold=20_000, jpeg_quality=95),
        "note": JSONField(),
        "label": IntField(),
        "array": NDArrayField(np.dtype(np.float32), (2, 3)),
        "text": BytesField(),
        "other": IntField(),
    }
    DatasetWriter(path, fields, num_workers=2).from_indexed_dataset(Samples(), chunksize=4)
