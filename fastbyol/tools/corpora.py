"""Example corpora: crops of photographs that ship with dependencies, and Fashion-MNIST.

Both writers are deterministic and never overwrite. They build the corpus in a hidden folder next to
the target, which is renamed when it is complete, so an interrupt never leaves a partial corpus
under the final name.
"""

import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, RunError, error_reason, first_line
from fastbyol.runtime.files import make_folder

Progress = Callable[[int, int], None]  # (images written, images in all)

# Photographs that ship with scikit-image and scikit-learn, one class each. Drawings, test charts
# and the second image of the stereo pair are left out.
SKIMAGE_PHOTOS = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
]
SKLEARN_PHOTOS = ("china.jpg", "flower.jpg")

# Each photograph is cut into this many bands across its longer side; train/ uses the even ones,
# val/ the odd ones. Objects are usually in the middle: with only two bands, val/ would show what
# train/ never does.
BANDS = 4
DEFAULT_LONG_SIDE_PX = 500  # like ImageNet's
BYTES_PER_PIXEL = (80_000 / (500 * 375), 110_000 / (500 * 375))  # like ImageNet's
SMALL_QUALITY = 90
WINDOW_SHARE = (0.5, 1.0)  # side of a crop, as a share of the largest window that fits its band
# Each crop gets a random exposure, like pictures of one place at different hours: color alone must
# not identify a class.
EXPOSURE_STOPS = 0.5  # half-width
WHITE_BALANCE = 0.1  # half-width of each channel's gain


def prepare_photos(
    out: Path, images: int, seed: int, size: int | None = None, progress: Progress = lambda done, total: None
) -> str:
    """Write OUT/{train,val}/CLASS/*.jpg: crops of disjoint bands of each photograph.

    Args:
        out: the new folder.
        images: number of images in train/; val/ gets a quarter as many. Classes have equal shares.
        seed: the same seed gives the same bytes (with the same versions of Pillow and
            libjpeg-turbo).
        size: longer side in pixels (quality 90); None makes images like ImageNet's: about 500x375
            in 80-110 KB.
        progress: called after each image with the number done and the total.

    Returns:
        a one-line summary.

    Raises:
        InputError: `out` exists, or `images` or `size` is too small.
    """
    check_free(out)
    photos = [(path.stem, open_photo(path)) for path in photo_paths()]
    if images < 4 * len(photos):
        raise InputError(
            f"--images {images}: at least {4 * len(photos)} are needed, 4 for each of {len(photos)} classes"
        )
    if size is not None and size < 16:
        raise InputError(f"--size {size}: must be at least 16 pixels")
    counts = {"train": images, "val": images // 4}
    tasks = [(split, i) for split, count in counts.items() for i in range(count)]
    with atomic_folder(out) as folder:
        for split in counts:
            for name, _ in photos:
                (folder / split / name).mkdir(parents=True)

        def write(task: tuple[str, int]) -> int:
            split, i = task
            name, photo = photos[i % len(photos)]
            rng = np.random.default_rng([seed, i, split == "val"])
            data = _encode(_crop(photo, split, rng, size or DEFAULT_LONG_SIDE_PX), rng, size is None)
            (folder / split / name / f"{name}_{i:06d}.jpg").write_bytes(data)
            return len(data)

        sizes = []
        for written in map_in_order(write, tasks):
            sizes.append(written)
            progress(len(sizes), len(tasks))
    return (
        f"{counts['train']} training and {counts['val']} validation images of {len(photos)} classes in {out}, "
        f"{np.mean(sizes) / 1000:.1f} KB each"
    )


def prepare_fashion_mnist(
    out: Path,
    source: Path | None = None,
    images: int | None = None,
    val_images: int | None = None,
    progress: Progress = lambda done, total: None,
) -> str:
    """Write Fashion-MNIST as OUT/train/CLASS/*.png and OUT/val/CLASS/*.png (28x28 gray, lossless).

    Args:
        out: the new folder.
        source: folder of the four idx files, gzipped or not; None uses the files of Debian's
            package dataset-fashion-mnist if it is installed, else downloads them with torchvision.
        images, val_images: use only the first N images of each split.
        progress: called after each image with the number done and the total.

    Returns:
        a one-line summary.

    Raises:
        InputError: `out` exists, a file is missing or malformed, or the download failed.
    """
    check_free(out)
    with tempfile.TemporaryDirectory() as temporary:
        source = source or _fashion_mnist_source(Path(temporary))
        splits = {}
        for split, prefix, limit in (("train", "train", images), ("val", "t10k", val_images)):
            pixels = _read_idx(source, f"{prefix}-images-idx3-ubyte", dims=3)
            labels = _read_idx(source, f"{prefix}-labels-idx1-ubyte", dims=1)
            if len(pixels) != len(labels):
                raise InputError(f"{source}: {len(pixels)} {prefix} images but {len(labels)} labels")
            splits[split] = pixels[:limit], labels[:limit]
    total, done = sum(len(labels) for _, labels in splits.values()), 0
    with atomic_folder(out) as folder:
        for split, (pixels, labels) in splits.items():
            for label in np.unique(labels):
                (folder / split / FASHION_CLASSES[label]).mkdir(parents=True)

            def write(i: int, split: str = split, pixels: NDArray = pixels, labels: NDArray = labels) -> None:
                Image.fromarray(pixels[i]).save(folder / split / FASHION_CLASSES[labels[i]] / f"{i:05d}.png")

            for _ in map_in_order(write, range(len(labels))):
                done += 1
                progress(done, total)
    counts = ", ".join(f"{len(labels)} in {split}/" for split, (_, labels) in splits.items())
    return f"Fashion-MNIST in {out}: {counts}"


FASHION_CLASSES = [
    "tshirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle_boot",
]  # by label, 0..9
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def photo_paths() -> list[Path]:
    """Return the paths of the installed photographs, sorted by file name.

    Raises:
        InputError: there are fewer than two.
    """
    import skimage
    import sklearn

    paths = [Path(skimage.__file__).parent / "data" / name for name in SKIMAGE_PHOTOS]
    paths += [Path(sklearn.__file__).parent / "datasets" / "images" / name for name in SKLEARN_PHOTOS]
    present = sorted((p for p in paths if p.is_file()), key=lambda p: p.name)
    if len(present) < 2:
        raise InputError("no photographs found in scikit-image and scikit-learn; reinstall both packages")
    return present


def open_photo(path: Path) -> Image.Image:
    """Read a photograph as RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def _crop(photo: Image.Image, split: str, rng: np.random.Generator, long_side: int) -> NDArray[np.uint8]:
    """Return a random window (H, W, 3) of one of the split's bands.

    It has about `long_side` by 3/4 of it; a quarter are upright.
    """
    width, height = photo.size
    band = 2 * rng.integers(BANDS // 2) + (split == "val")
    start, stop = (round(max(photo.size) * edge / BANDS) for edge in (band, band + 1))
    left, top, right, bottom = (start, 0, stop, height) if width >= height else (0, start, width, stop)
    aspect = rng.uniform(1.2, 1.5)
    if rng.random() < 0.25:
        aspect = 1 / aspect
    share = rng.uniform(*WINDOW_SHARE)
    window_w = share * min(right - left, (bottom - top) * aspect)
    window_h = window_w / aspect
    x = rng.uniform(left, right - window_w)
    y = rng.uniform(top, bottom - window_h)
    long_px = round(long_side * rng.uniform(0.95, 1.05))
    out = (long_px, round(long_px / aspect)) if aspect >= 1 else (round(long_px * aspect), long_px)
    picture = photo.resize(out, Image.Resampling.BICUBIC, box=(x, y, x + window_w, y + window_h))
    gain = 2 ** rng.uniform(-EXPOSURE_STOPS, EXPOSURE_STOPS) * rng.uniform(1 - WHITE_BALANCE, 1 + WHITE_BALANCE, size=3)
    return np.clip(np.asarray(picture) * gain, 0, 255).astype(np.uint8)


def _encode(pixels: NDArray[np.uint8], rng: np.random.Generator, like_imagenet: bool) -> bytes:
    """Encode as JPEG, 4:2:0; if `like_imagenet`, with a file size close to a random target.

    Enlarged windows are smoother than photographs of that size, so `like_imagenet` also adds grain
    like a sensor's.
    """
    if not like_imagenet:
        return simplejpeg.encode_jpeg(pixels, quality=SMALL_QUALITY, colorsubsampling="420")
    grain = rng.normal(0, 3, size=(*pixels.shape[:2], 1))
    pixels = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    wanted = rng.uniform(*BYTES_PER_PIXEL) * pixels.shape[0] * pixels.shape[1]
    low, high = 40, 98
    best = b""
    while low <= high:
        quality = (low + high) // 2
        data = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420")
        if not best or abs(len(data) - wanted) < abs(len(best) - wanted):
            best = data
        low, high = (quality + 1, high) if len(data) < wanted else (low, quality - 1)
    return best


def _fashion_mnist_source(temporary: Path) -> Path:
    if _DEBIAN_FASHION_MNIST.is_dir():
        return _DEBIAN_FASHION_MNIST
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(temporary, download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"Fashion-MNIST could not be downloaded ({first_line(error)}): install Debian's package "
            "dataset-fashion-mnist, or name the folder of its four idx files with --source"
        ) from None
    return temporary / "FashionMNIST" / "raw"


def _read_idx(source: Path, name: str, dims: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes, gzipped or not.

    Format: 0, 0, type 8, number of dimensions, their sizes as big-endian u4.
    """
    path = source / name
    try:
        if not path.is_file():
            path = source / f"{name}.gz"
        if not path.is_file():
            raise InputError(f"--source {source}: contains neither {name} nor {name}.gz")
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: {first_line(error)}") from None
    header = 4 + 4 * dims
    if len(data) < header or data[:4] != bytes([0, 0, 8, dims]):
        raise InputError(f"{path}: not an idx file of bytes with {dims} dimensions")
    shape = tuple(np.frombuffer(data[4:header], dtype=">u4").astype(np.int64))
    if len(data) - header != np.prod(shape):
        raise InputError(f"{path}: {len(data) - header} bytes of data where {shape} needs {np.prod(shape)}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def check_free(out: Path) -> None:
    """Check that `out` can be created; called before anything is read or downloaded.

    Raises:
        InputError: `out` exists, or no folder can have this name.
    """
    try:
        os.lstat(out)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made: {error.strerror}") from None
    raise InputError(f"--out {out} exists; it is not overwritten: remove it or choose another folder")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Context manager: a hidden folder that becomes `out` on success and is removed on failure."""
    try:
        make_folder(out.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made: {error.strerror}") from None
    try:
        yield partial
        partial.chmod(0o755)
        os.rename(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"--out {out}: {error_reason(error)}; nothing was kept") from None
        raise
