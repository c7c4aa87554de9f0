"""Create a labeled corpus for dense transfer: textured shapes with segmentation masks and boxes.

    python benchmarks/shapes.py --out DIR [--images 400] [--seed 0] [--size 128]

Only the texture identifies a class: each class is one of the bundled photographs (brick, coins,
grass, ...), and an object is a crop of it inside a shape. Shape, size, rotation, position and color
are random and independent of the class: crops are converted to gray and tinted, so that the mean
colors of all classes have one distribution. The background is a crop of a photograph that is not a
class. Objects may occlude each other and extend over the border. train/ and val/ use disjoint bands
of the photographs, as in `prepare_photos`.

The folder holds the same labels in both formats:

    JPEGImages/NAME.jpg                      all images
    SegmentationClass/NAME.png               VOC: 0 background, 1 .. K classes, 255 void (edges)
    ImageSets/Segmentation/{train,val}.txt   VOC: names
    labels.txt                               names of the classes 1 .. K, one per line
    annotations/instances_{train,val}.json   COCO: box and polygons of the visible part

Shapes: S side of the image, D side of an object's square, K classes.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fastbyol.data.workers import map_in_order
from fastbyol.errors import FastbyolError, InputError
from fastbyol.evaluation.voc import LABELS_FILE, VOID
from fastbyol.tools import corpora

CLASSES = ["brick", "cell", "clock_motion", "coins", "grass", "gravel", "hubble_deep_field", "moon"]

OBJECTS = (1, 3)  # minimum and maximum per image
RADIUS = (0.26, 0.42)  # of an object, as a share of the side
VISIBLE_SHARE = 0.6  # minimum visible share of each object: inside the image and not occluded
_PLACEMENTS = 30  # tries to place an object before it is dropped
MEAN_LEVEL = (70, 180)  # of an object's mean color
WINDOW_SHARE = (0.9, 1.0)  # side of a crop, as a share of its band's width
_TINT = 0.25  # half-width of the random factor of each channel
_SUBPIXELS = 4  # per side: pixels at edges are mixed in steps of 1/16


@dataclass(frozen=True)
class Scene:
    """One image and its visible objects."""

    pixels: NDArray[np.uint8]  # (S, S, 3)
    classes: NDArray[np.uint8]  # (S, S): 0 background, 1 .. K, VOID
    objects: list[tuple[int, NDArray[np.bool_]]]  # class 1 .. K, (S, S) visible part


def prepare_shapes(out: Path, images: int = 400, seed: int = 0, size: int = 128) -> str:
    """Write the corpus.

    Args:
        out: the new folder.
        images: number of training images; there are a quarter as many for validation.
        seed: the same seed gives the same bytes (with the same versions of Pillow and
            libjpeg-turbo).
        size: side of the images in pixels.

    Returns:
        a one-line summary.

    Raises:
        InputError: `out` exists, a number is out of range, or a photograph is missing.
    """
    corpora.check_free(out)
    if images < 4:
        raise InputError(f"--images {images}: at least 4 are needed, one of them for validation")
    if seed < 0:
        raise InputError(f"--seed {seed}: must be 0 or more")
    if not 32 <= size <= 4096:
        raise InputError(f"--size {size}: must lie in 32..4096 pixels")
    photos = {path.stem: corpora.open_photo(path) for path in corpora.photo_paths()}
    missing = [name for name in CLASSES if name not in photos]
    if missing or len(photos) == len(CLASSES):
        raise InputError(
            f"scikit-image's photograph {missing[0] if missing else 'of a background'} is missing; reinstall it"
        )
    counts = {"train": images, "val": images // 4}
    names = {split: [f"{split}_{i:06d}" for i in range(count)] for split, count in counts.items()}
    tasks = [(split, i) for split, count in counts.items() for i in range(count)]
    annotations: dict[str, list[list[dict[str, Any]]]] = {split: [] for split in counts}
    with corpora.atomic_folder(out) as folder:
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "annotations"):
            (folder / name).mkdir(parents=True)

        def write(task: tuple[str, int]) -> tuple[str, list[dict[str, Any]]]:
            split, i = task
            scene = compose(photos, split, np.random.default_rng([seed, i, split == "val"]), size)
            data = simplejpeg.encode_jpeg(scene.pixels, quality=corpora.SMALL_QUALITY, colorsubsampling="420")
            (folder / "JPEGImages" / f"{names[split][i]}.jpg").write_bytes(data)
            mask = Image.fromarray(scene.classes).convert("P")
            mask.putpalette(voc_palette())
            mask.save(folder / "SegmentationClass" / f"{names[split][i]}.png")
            return split, [annotation(number, visible) for number, visible in scene.objects]

        for split, found in map_in_order(write, tasks):
            annotations[split].append(found)
        (folder / LABELS_FILE).write_text("".join(f"{name}\n" for name in CLASSES))
        for split, per_image in annotations.items():
            (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{n}\n" for n in names[split]))
            coco = _coco(names[split], per_image, size)
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    objects = sum(len(found) for split in annotations.values() for found in split)
    return (
        f"{counts['train']} training and {counts['val']} validation images of {size}x{size} px with {objects} objects of "
        f"{len(CLASSES)} classes in {out}"
    )


def compose(photos: dict[str, Image.Image], split: str, rng: np.random.Generator, size: int) -> Scene:
    """Draw one image: a background and one to three objects, later ones in front."""
    backgrounds = sorted(photos.keys() - set(CLASSES))
    canvas = _texture(photos[backgrounds[rng.integers(len(backgrounds))]], split, rng, size)
    owner = np.zeros((size, size), dtype=np.int64)  # number of the front object, 0 is the background
    mixed = np.zeros((size, size), dtype=bool)
    kinds: list[int] = []
    areas: list[int] = []  # pixels of each object if nothing occluded it
    for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
        number = int(rng.integers(len(CLASSES)))
        radius = size * rng.uniform(*RADIUS)
        outline = list(SHAPES.values())[rng.integers(len(SHAPES))]
        placement = _place(outline, radius, owner, areas, rng)
        if placement is None:
            continue
        (top, left), coverage, area = placement
        d = len(coverage)
        texture = _tinted(_texture(photos[CLASSES[number]], split, rng, d), rng)
        kinds.append(number + 1)
        areas.append(area)
        rows, columns = slice(max(top, 0), max(top + d, 0)), slice(max(left, 0), max(left + d, 0))
        inside = slice(max(-top, 0), size - top), slice(max(-left, 0), size - left)
        share = coverage[inside]
        canvas[rows, columns] += share[..., None] * (texture[inside] - canvas[rows, columns])
        owner[rows, columns][share >= 0.5] = len(kinds)
        mixed[rows, columns] = np.where(share == 1, False, mixed[rows, columns] | (share > 0))
    classes = np.array([0, *kinds], dtype=np.uint8)[owner]
    classes[mixed] = VOID
    objects = [(number, owner == k) for k, number in enumerate(kinds, start=1)]
    return Scene(np.clip(canvas.round(), 0, 255).astype(np.uint8), classes, objects)


def annotation(category: int, visible: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the COCO annotation of a mask (S, S), without ids. Box and area are in pixels."""
    rows, columns = (np.flatnonzero(visible.any(axis)) for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "category_id": category,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(visible.sum()),
        "iscrowd": 0,
        "segmentation": polygons(visible),
    }


def polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Return polygons [x0, y0, x1, y1, ...] whose union contains the mask's pixel centers only.

    COCO's polygons have no holes, so a part with a hole is cut in two through the hole.
    """
    from scipy import ndimage
    from skimage.measure import find_contours

    labels, count = ndimage.label(mask)
    found = []
    for k in range(1, count + 1):
        part = labels == k
        holes = ndimage.binary_fill_holes(part) & ~part
        if holes.any():
            cut = int(np.nonzero(holes)[1][0])
            left = part.copy()
            left[:, cut + 1 :] = False
            found += polygons(left) + polygons(part & ~left)
            continue
        (line,) = find_contours(np.pad(part, 1), 0.5, fully_connected="low")
        # Row and column of pixel centers in the padded mask -> x and y, whose pixel (0, 0) has its
        # center at (0.5, 0.5).
        found.append((line[:-1, ::-1] - 0.5).ravel().tolist())
    return found


def voc_palette() -> list[int]:
    """Return the colors of VOC's masks: red, green and blue of each of the 256 values.

    The bits of the value are dealt out to the channels, lowest bit first, highest channel bit
    first.
    """
    return [
        sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for k in range(256) for channel in range(3)
    ]


def _coco(names: list[str], per_image: list[list[dict[str, Any]]], size: int) -> dict[str, Any]:
    """Return the content of a COCO file; `per_image` holds the annotations of each of `names`."""
    flat = [{"image_id": i} | found for i, objects in enumerate(per_image, start=1) for found in objects]
    return {
        "info": {"description": "benchmarks/shapes.py of fastbyol"},
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "width": size, "height": size}
            for i, name in enumerate(names, start=1)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)],
        "annotations": [{"id": k} | found for k, found in enumerate(flat, start=1)],
    }


def _place(
    outline: list[NDArray[np.float64]],
    radius: float,
    owner: NDArray[np.int64],
    areas: list[int],
    rng: np.random.Generator,
) -> tuple[tuple[int, int], NDArray[np.float64], int] | None:
    """Place a shape so that enough of it and of all earlier objects is visible.

    Returns:
        corner (top, left), coverage (D, D) in [0, 1] and area in pixels; None if no try succeeded.
    """
    size = len(owner)
    for _ in range(_PLACEMENTS):
        coverage = _draw(outline, radius, rng)
        d = len(coverage)
        top, left = (int(v) for v in rng.integers(-d // 4, size - d + d // 4 + 1, size=2))
        solid = np.zeros((size + 2 * d, size + 2 * d), dtype=bool)
        solid[d + top : 2 * d + top, d + left : 2 * d + left] = coverage >= 0.5
        area, inside = int(solid.sum()), solid[d:-d, d:-d]
        visible = np.bincount(owner[~inside], minlength=len(areas) + 1)[1:]
        if inside.sum() >= VISIBLE_SHARE * area and (visible >= VISIBLE_SHARE * np.array(areas)).all():
            return (top, left), coverage, area
    return None


def _draw(outline: list[NDArray[np.float64]], radius: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a randomly rotated shape; return pixel coverage (D, D), D just above 2 * radius."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    d = int(np.ceil(2 * radius)) + 2
    image = Image.new("L", (d * _SUBPIXELS, d * _SUBPIXELS))
    pen = ImageDraw.Draw(image)
    for ring, fill in zip(outline, (1, 0), strict=False):
        points = (ring @ rotation * radius + d / 2) * _SUBPIXELS
        pen.polygon([(x, y) for x, y in points.tolist()], fill=fill)
    fine = np.asarray(image, dtype=np.float64).reshape(d, _SUBPIXELS, d, _SUBPIXELS)
    return fine.mean((1, 3))


def _texture(photo: Image.Image, split: str, rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Return a square (side, side, 3) in 0..255 of a band of the split, randomly exposed."""
    width, height = photo.size
    band = 2 * rng.integers(corpora.BANDS // 2) + (split == "val")
    start, stop = (round(max(photo.size) * edge / corpora.BANDS) for edge in (band, band + 1))
    # Crop first: interpolation would read beyond the band's edges.
    strip = photo.crop((start, 0, stop, height) if width >= height else (0, start, width, stop))
    window = rng.uniform(*WINDOW_SHARE) * min(strip.size)
    x, y = (rng.uniform(0, length - window) for length in strip.size)
    picture = strip.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + window, y + window))
    gain = 2 ** rng.uniform(-corpora.EXPOSURE_STOPS, corpora.EXPOSURE_STOPS)
    balance = rng.uniform(1 - corpora.WHITE_BALANCE, 1 + corpora.WHITE_BALANCE, size=3)
    return np.clip(np.asarray(picture) * gain * balance, 0, 255)


def _tinted(texture: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Convert the texture (D, D, 3) to gray and give it a random mean color."""
    gray = texture.mean(2, keepdims=True)
    color = rng.uniform(*MEAN_LEVEL) * rng.uniform(1 - _TINT, 1 + _TINT, size=3)
    return np.clip(gray / max(gray.mean(), 1) * color, 0, 255)


def _regular(points: int, radii: tuple[float, ...] = (1.0,)) -> NDArray[np.float64]:
    """Return corners (points, 2) at equal angles, cycling through the radii."""
    angles = 2 * np.pi * np.arange(points) / points
    lengths = np.resize(radii, points)
    return np.stack((lengths * np.cos(angles), lengths * np.sin(angles)), axis=1)


_CROSS = np.array(
    [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]
) / np.sqrt(10)
# Inside the unit circle: an outline and, for the ring, a hole.
SHAPES: dict[str, list[NDArray[np.float64]]] = {
    "disc": [_regular(64)],
    "triangle": [_regular(3)],
    "square": [_regular(4)],
    "star": [_regular(10, (1.0, 0.5))],
    "ring": [_regular(64), 0.45 * _regular(64)],
    "cross": [_CROSS],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--images", type=int, default=400, help="training images; validation gets a quarter of it")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives identical files")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    try:
        print(prepare_shapes(**vars(parser.parse_args())))
    except FastbyolError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
