"""Time data loading, two BYOL views per JPEG file: fastbyol, other libraries, decoding only.

    make bench-loader                                      # in the environment with all peers
    python benchmarks/bench_loader.py --sizes 224 --rounds 1 --only fastbyol lightly
    python benchmarks/bench_loader.py --set backends       # all formats and backends
    python benchmarks/bench_loader.py --set image_sets     # a folder, tar shards and Parquet
    python benchmarks/bench_loader.py --set loader_cuda    # on a GPU

Each measurement runs in its own process, which separates CPU time and peak memory (workers
included). Rounds are interleaved (A B C A B C ...), so that drift of the machine affects all
contenders equally. All use all cores, read the same files from the page cache and discard the
batches. The first batches (start of workers, compilation, prefetching) are not timed.

Contenders (--set loader and backends):
    decode only      libjpeg-turbo in threads: the upper bound (1 thread: scaling of the machine)
    fastbyol         data/native.py, float32 batches (also bfloat16, and one thread)
    ... .beton jpg   the same from a .beton file with JPEGs; raw: with pixels, of 1,000 of the
                     images
    ... tar, parquet the same JPEGs in ten tar shards, and in ten Parquet files with row groups of
                     100 images, uncompressed and with snappy (--set image_sets)
    ... dali, ffcv   the DALI backend on the folder, and the FFCV backend on a .beton file
    lightly          BYOLTransform in a DataLoader, one worker process per core
    torchvision v2   tensor transforms after torchvision.io's decoder, in the same DataLoader
    DALI CPU         the same operations with DALI's operators, in threads
    FFCV             less work: one view with crop and flip only (RandomResizedCropRGBImageDecoder)

With --set loader_cuda the batches are on a GPU: copied by a side stream (native), or decoded there
(DALI), for several shares of JPEGs that the hardware decoder takes.

Writes benchmarks/results/SET.csv after every measurement. The exit code is 1 if a contender failed.
The corpus is generated if missing, in data/photos-500px or the folder that FASTBYOL_CORPUS names.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import results_csv
import torch
from runner import Runner, run_json

from fastbyol.runtime import environment

ROOT = Path(__file__).resolve().parent.parent
CORPUS = Path(os.environ.get("FASTBYOL_CORPUS", ROOT / "data" / "photos-500px"))
CORES = len(os.sched_getaffinity(0))
BATCH = 32
WARM_UP_BATCHES = 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fastbyol(
    size: int, split: str = "train", dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> Iterator[int]:
    from fastbyol.config import DataConfig
    from fastbyol.data import build_loader, open_split
    from fastbyol.kernels.cpu import jit_cache

    jit_cache.compile_cpu_kernels()
    config = DataConfig(root=str(CORPUS), image_size_px=size, **{"batch_size": BATCH} | options)
    images = open_split(CORPUS, split)
    loader = build_loader(config, images, seed=0, device=torch.device(device), dtype=dtype)
    for _ in loader.batches(0, 10**9):
        if device == "cuda":
            torch.cuda.synchronize()  # count complete batches
        yield config.batch_size


def decode_only(size: int, threads: int = CORES) -> Iterator[int]:
    from threading import Thread

    from fastbyol.data import open_split
    from fastbyol.data.decode import DecodeBuffer, decode

    folder = open_split(CORPUS, "train")
    done = [0] * threads

    def run(worker: int) -> None:
        buffer = DecodeBuffer()
        for index in range(worker, 10**9, threads):
            decode(folder.read(index % len(folder)), buffer)
            done[worker] += 1

    for worker in range(threads):
        Thread(target=run, args=(worker,), daemon=True).start()
    seen = 0
    while True:
        time.sleep(0.05)
        total = sum(done)
        yield total - seen
        seen = total


def _data_loader(dataset: torch.utils.data.Dataset) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=CORES, drop_last=True)
    while True:
        for _ in loader:
            yield BATCH


def lightly_images(size: int) -> torch.utils.data.Dataset:
    """Build the corpus with lightly's views; items are ([view1, view2], class)."""
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from torchvision.datasets import ImageFolder

    transform = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
    return ImageFolder(str(CORPUS / "train"), transform)


def lightly(size: int) -> Iterator[int]:
    return _data_loader(lightly_images(size))


def torchvision_v2(size: int) -> Iterator[int]:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    def view(blur_p: float, solarize_p: float) -> v2.Compose:
        radius = int(size / 10 / 2)
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    size, interpolation=v2.InterpolationMode.BICUBIC
                ),  # antialiased, which is the fast path
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),  # jitter and blur are faster on floats
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(2 * radius + 1, (0.1, 2.0))], blur_p),
                v2.RandomSolarize(0.5, solarize_p),
                v2.Normalize(MEAN, STD),
            ]
        )

    views = view(1.0, 0.0), view(0.1, 0.2)

    def load(path: str) -> tuple[torch.Tensor, torch.Tensor]:
        image = decode_jpeg(read_file(path), mode=ImageReadMode.RGB)
        return views[0](image), views[1](image)

    return _data_loader(ImageFolder(str(CORPUS / "train"), loader=load))


def dali(size: int) -> Iterator[int]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=CORES, device_id=None, prefetch_queue_depth=2)
    def pipeline():
        files, _ = fn.readers.file(file_root=str(CORPUS / "train"), random_shuffle=True, name="files")
        images = fn.decoders.image(files, output_type=types.RGB)

        def coin(p: float):
            return fn.random.coin_flip(probability=p, dtype=types.BOOL)

        def view(blur_p: float, solarize_p: float):
            x = fn.random_resized_crop(
                images, size=[size, size], random_area=[0.08, 1.0], interp_type=types.INTERP_CUBIC, antialias=False
            )
            jitter = coin(0.8)
            gray = coin(0.2)

            def drawn(half: float, center: float):
                value = fn.random.uniform(range=[center - half, center + half])
                return jitter * value + (1.0 - jitter) * center

            x = fn.brightness_contrast(x, brightness=drawn(0.4, 1.0), contrast=drawn(0.4, 1.0))
            x = fn.hsv(x, hue=36.0 * drawn(1.0, 0.0), saturation=(1.0 - gray) * drawn(0.2, 1.0))
            sigma = fn.random.uniform(range=[0.1, 2.0])
            blur = coin(blur_p)
            window = 2 * int(size / 10 / 2) + 1
            x = fn.gaussian_blur(x, sigma=blur * sigma + (1.0 - blur) * 0.01, window_size=window)
            solarize = coin(solarize_p) * (x >= 128)
            x = solarize * (255 - x) + (True ^ solarize) * x
            return fn.crop_mirror_normalize(
                fn.cast(x, dtype=types.UINT8),
                dtype=types.FLOAT,
                output_layout="HWC",
                mean=[255 * m for m in MEAN],
                std=[255 * s for s in STD],
                mirror=fn.random.coin_flip(),
            )

        return view(1.0, 0.0), view(0.1, 0.2)

    pipe = pipeline()
    pipe.build()
    while True:
        pipe.run()
        yield BATCH


def ffcv(size: int) -> Iterator[int]:
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
    from PIL import Image

    from fastbyol.data import open_split

    folder = open_split(CORPUS, "train")

    class Images:
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int):
            with Image.open(folder.root / folder.paths[index]) as image:
                return image.convert("RGB"), int(folder.labels[index])

    with tempfile.TemporaryDirectory() as temporary:
        beton = f"{temporary}/x.beton"
        DatasetWriter(
            beton, {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}, num_workers=CORES
        ).from_indexed_dataset(Images())
        operations = [
            RandomResizedCropRGBImageDecoder((size, size), scale=(0.08, 1.0)),
            RandomHorizontalFlip(),
            NormalizeImage(255 * np.array(MEAN), 255 * np.array(STD), np.float32),
            ToTensor(),
            ToTorchImage(),
        ]
        loader = Loader(
            beton,
            batch_size=BATCH,
            num_workers=CORES,
            order=OrderOption.QUASI_RANDOM,
            os_cache=True,
            drop_last=True,
            pipelines={"image": operations, "label": [IntDecoder(), ToTensor()]},
        )
        while True:
            for _ in loader:
                yield BATCH


CONTENDERS: dict[str, Callable[[int], Iterator[int]]] = {
    "decode only": decode_only,
    "decode only 1 thread": lambda size: decode_only(size, 1),
    "fastbyol": fastbyol,
    "fastbyol bf16": lambda size: fastbyol(size, dtype=torch.bfloat16),
    "fastbyol 1 thread": lambda size: fastbyol(size, threads=1),
    "fastbyol dct_scaling": lambda size: fastbyol(size, dct_scaling=True),
    "lightly": lightly,
    "torchvision v2": torchvision_v2,
    "DALI CPU": dali,
    "FFCV (1 view, crop + flip)": ffcv,
}


BACKENDS: dict[str, Callable[[int], Iterator[int]]] = {
    "decode only": decode_only,
    "fastbyol": fastbyol,
    "fastbyol .beton jpg": lambda size: fastbyol(size, "jpg.beton"),
    "fastbyol .beton raw": lambda size: fastbyol(size, "raw.beton"),
    "fastbyol dali": lambda size: fastbyol(size, backend="dali"),
    "fastbyol ffcv .beton jpg": lambda size: fastbyol(size, "jpg.beton", backend="ffcv"),
    "fastbyol ffcv .beton raw": lambda size: fastbyol(size, "raw.beton", backend="ffcv"),
    "FFCV (1 view, crop + flip)": ffcv,
}
IMAGE_SETS: dict[str, Callable[[int], Iterator[int]]] = {
    "fastbyol": fastbyol,
    "fastbyol tar": lambda size: fastbyol(size, "shards/*.tar"),
    "fastbyol parquet": lambda size: fastbyol(size, "none/*.parquet"),
    "fastbyol parquet snappy": lambda size: fastbyol(size, "snappy/*.parquet"),
}
ON_GPU = {"device": "cuda", "dtype": torch.bfloat16, "batch_size": 256}
GPU_CONTENDERS: dict[str, Callable[[int], Iterator[int]]] = {
    "fastbyol native": lambda size: fastbyol(size, backend="native", **ON_GPU),
    "fastbyol native .beton raw": lambda size: fastbyol(size, "raw.beton", backend="native", **ON_GPU),
    "fastbyol dali .beton raw": lambda size: fastbyol(size, "raw.beton", backend="dali", **ON_GPU),
} | {
    f"fastbyol dali, hw_decoder_load {load}": lambda size, load=load: fastbyol(
        size, backend="dali", hw_decoder_load=load, **ON_GPU
    )
    for load in (0.0, 0.5, 0.65, 0.75, 0.9, 1.0)
}
SETS = {"loader": CONTENDERS, "backends": BACKENDS, "image_sets": IMAGE_SETS, "loader_cuda": GPU_CONTENDERS}
ALL = CONTENDERS | BACKENDS | IMAGE_SETS | GPU_CONTENDERS


def measure(name: str, size: int, seconds: float) -> None:
    """Measure one contender in this process and print one line of JSON."""
    torch.set_num_threads(1 if name in ("lightly", "torchvision v2") else CORES)
    batches = ALL[name](size)
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    images, began, cpu = 0, time.perf_counter(), _cpu_seconds()
    while (elapsed := time.perf_counter() - began) < seconds:
        images += next(batches)
    used = _cpu_seconds() - cpu
    print(json.dumps({"images": images, "seconds": elapsed, "cpu_seconds": used, "peak_mb": _peak_mb()}), flush=True)
    os._exit(0)  # do not wait for workers and threads


def _processes() -> list[int]:
    """Return this process and its descendants."""
    found = [os.getpid()]
    for pid in found:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        found += [int(child) for child in children.read_text().split()] if children.exists() else []
    return found


def _cpu_seconds() -> float:
    ticks = 0
    for pid in _processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ticks / os.sysconf("SC_CLK_TCK") + ended.ru_utime + ended.ru_stime


def _peak_mb() -> float:
    peaks = (Path(f"/proc/{pid}/status").read_text() for pid in _processes())
    return sum(int(text.split("VmHWM:")[1].split()[0]) for text in peaks if "VmHWM:" in text) / 1024


def prepare_corpus() -> None:
    """Generate the JPEG files if they are missing."""
    if not CORPUS.exists():
        command = ["prepare", "photos", "--out", str(CORPUS), "--images", "5000"]
        subprocess.run([sys.executable, "-m", "fastbyol", *command], check=True)


def prepare_betons() -> None:
    """Pack the images into two .beton files. Raw pixels take six times the bytes, so only 1,000."""
    from fastbyol.data import open_split
    from fastbyol.data.pack import pack

    images = open_split(CORPUS, "train")
    for mode, part in (("jpg", images), ("raw", images.subsample(1000))):
        if not (CORPUS / f"{mode}.beton").exists():
            print(pack(part, CORPUS / f"{mode}.beton", mode=mode))


def prepare_shards() -> None:
    """Write the same JPEGs into tar shards and Parquet files, as webdataset and `datasets` do."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fastbyol.data import open_split

    images = open_split(CORPUS, "train")
    for part in range(10):
        chosen = range(part * len(images) // 10, (part + 1) * len(images) // 10)
        path = CORPUS / "shards" / f"{part:04d}.tar"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with tarfile.open(path, "w") as archive:
                for k in chosen:
                    for name, data in ((f"{k:06d}.jpg", images.read(k)), (f"{k:06d}.cls", b"%d" % images.labels[k])):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
        for codec in ("none", "snappy"):
            path = CORPUS / codec / f"{part:04d}.parquet"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                rows = pa.array([{"bytes": images.read(k), "path": images.name(k)} for k in chosen], type=struct)
                table = pa.table({"image": rows, "label": images.labels[list(chosen)]})
                pq.write_table(table, path, compression=codec, row_group_size=100, use_dictionary=codec != "none")


def print_summary(rows: list[dict]) -> None:
    """Print medians and ranges."""
    for size in dict.fromkeys(row["size_px"] for row in rows):
        print(f"{size} px")
        for name in dict.fromkeys(row["contender"] for row in rows):
            own = [float(r["images_per_s"]) for r in rows if (r["size_px"], r["contender"]) == (size, name)]
            if own:
                print(f"  {name:<34} {statistics.median(own):7.0f} images/s  ({min(own):.0f} to {max(own):.0f})")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--set", choices=list(SETS), default="loader", help="contenders; also the name of the result file"
    )
    options.add_argument("--sizes", type=int, nargs="+", help="pixels (default: 224 128 96, on a GPU 224)")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=6, help="duration of a measurement")
    options.add_argument("--only", nargs="+", choices=list(ALL))
    options.add_argument("--out", type=Path)
    options.add_argument("--measure", choices=list(ALL), help=argparse.SUPPRESS)
    return options


def installed(names: list[str]) -> list[str]:
    """Return the contenders whose package is installed. Print the others."""
    for module, title, command in (
        ("nvidia.dali", "DALI", environment.dali_install_command()),
        ("ffcv", "FFCV", environment.FFCV_COMMAND),
        ("lightly", "lightly", "make bench-setup"),
    ):
        needing = [name for name in names if title.lower() in name.lower()]
        if needing and not environment.has_module(module):
            print(f"{', '.join(needing)}: skipped because {title} is not installed: {command}")
            names = [name for name in names if name not in needing]
    return names


def machine() -> dict[str, str]:
    """Return the columns that describe machine, versions and commit."""
    facts = environment.describe()
    names = (
        "fastbyol",
        "cpu",
        "gpu",
        "python",
        "torch",
        "torchvision",
        "numba",
        "simplejpeg",
        "nvidia-dali-cuda130",
        "ffcv",
    )
    return {name: facts.get(name, "") for name in names} | {"lightly": environment.installed("lightly") or ""}


def main() -> int:
    args = parser().parse_args()
    if args.set == "loader_cuda" and not torch.cuda.is_available():
        parser().exit(2, "error: --set loader_cuda: torch sees no CUDA device here\n")
    sizes = args.sizes or ([224] if args.set == "loader_cuda" else [224, 128, 96])
    if args.measure:
        measure(args.measure, sizes[0], args.seconds)
    names = installed(args.only or list(SETS[args.set]))
    prepare_corpus()
    if args.set == "image_sets":
        prepare_shards()
    else:
        prepare_betons()
    facts = machine()
    out = args.out or results_csv.FOLDER / f"{args.set}.csv"
    runner = Runner(out, lambda rows: [row | facts for row in rows])

    def row_of(name: str, size: int, round_: int) -> dict[str, Any]:
        command = [sys.executable, __file__, "--measure", name, "--sizes", str(size), "--seconds", str(args.seconds)]
        result = run_json(command)
        row = {"round": round_, "size_px": size, "contender": name, "cores": CORES}
        row |= {"images": result["images"], "images_per_s": f"{result['images'] / result['seconds']:.1f}"}
        row |= {"cpu_s_per_1000": f"{1000 * result['cpu_seconds'] / result['images']:.3f}"}
        return row | {"peak_mb": f"{result['peak_mb']:.0f}"}

    for round_ in range(args.rounds):
        for size in sizes:
            for name in names:
                row = runner.measure((size, name), f"{size} px: {name}", partial(row_of, name, size, round_))
                if row is not None:
                    rate = float(row["images_per_s"])
                    print(f"round {round_}  {size} px  {name:<34} {rate:7.0f} images/s", flush=True)
    print_summary(runner.rows)
    return runner.finish()


if __name__ == "__main__":
    sys.exit(main())
