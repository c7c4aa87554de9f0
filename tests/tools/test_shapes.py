"""The corpus of textured shapes: masks, boxes, polygons, and what distinguishes its classes."""

import itertools
import json

import numpy as np
import pytest
import shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco_mask
from shapes import CLASSES, SHAPES, VISIBLE_SHARE, annotation, compose, polygons, prepare_shapes

from fastbyol.errors import InputError
from fastbyol.evaluation.voc import VOID
from fastbyol.tools import corpora

# pycocotools 2.0 implements __array__ without NumPy 2's argument `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")


@pytest.fixture(scope="module")
def photos():
    return {path.stem: corpora.open_photo(path) for path in corpora.photo_paths()}


@pytest.fixture(scope="module")
def scenes(photos):
    return [compose(photos, "train", np.random.default_rng([0, i]), 64) for i in range(60)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus") / "shapes"
    prepare_shapes(root, images=12, seed=5, size=48)
    return root


def rasterized(parts, height, width):
    """Rasterize polygons with COCO's API."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, height, width))).astype(bool)


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))).filter(np.any))
def test_polygons_cover_exactly_the_mask(mask):
    assert np.array_equal(rasterized(polygons(mask), *mask.shape), mask)


def test_annotation_has_the_extent_and_area_of_the_mask():
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:9, 5:16] = True
    mask[5, 7] = False
    found = annotation(4, mask)
    assert found["bbox"] == [5, 3, 11, 6]
    assert found["area"] == 65
    assert (found["category_id"], found["iscrowd"]) == (4, 0)


def test_both_formats_hold_the_same_pixels(corpus):
    """Up to void pixels, polygons and VOC masks agree, and pixels outside of all polygons are
    background.
    """
    for split, count in (("train", 12), ("val", 3)):
        coco = json.loads((corpus / f"annotations/instances_{split}.json").read_text())
        names = (corpus / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        assert [image["file_name"] for image in coco["images"]] == [f"{name}.jpg" for name in names]
        assert len(names) == count
        for image, name in zip(coco["images"], names, strict=True):
            with Image.open(corpus / f"JPEGImages/{name}.jpg") as picture:
                assert picture.size == (48, 48) == (image["width"], image["height"])
            with Image.open(corpus / f"SegmentationClass/{name}.png") as picture:
                assert picture.mode == "P"
                mask = np.array(picture)
            drawn = np.zeros((48, 48), dtype=np.uint8)
            for found in [a for a in coco["annotations"] if a["image_id"] == image["id"]]:
                part = rasterized(found["segmentation"], 48, 48)
                assert not drawn[part].any()  # what is hidden belongs to the object in front
                drawn[part] = found["category_id"]
                rows, columns = np.nonzero(part)
                x, y, width, height = found["bbox"]
                assert (x, y) == (columns.min(), rows.min())
                assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
                assert found["area"] == part.sum()
            assert np.array_equal(mask[mask != VOID], drawn[mask != VOID])
    assert [c["name"] for c in coco["categories"]] == CLASSES == (corpus / "labels.txt").read_text().split()
    assert [c["id"] for c in coco["categories"]] == list(range(1, len(CLASSES) + 1))


def test_masks_have_the_voc_palette(corpus):
    with Image.open(next((corpus / "SegmentationClass").iterdir())) as picture:
        palette = np.reshape(picture.getpalette(), (-1, 3)).tolist()
    assert palette[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[VOID] == [224, 224, 192]


def test_void_pixels_are_at_edges(scenes):
    """A void pixel has another owner within two pixels, or an edge just outside the image; it is a
    thin line.
    """
    for scene in scenes:
        void = scene.classes == VOID
        assert 0 < void.mean() < 0.15
        void[[0, 1, -2, -1]] = void[:, [0, 1, -2, -1]] = False
        if len(scene.objects) == 1:  # those at least half covered are the object's
            assert 0.35 < scene.objects[0][1][void].mean() < 0.65
        owner = np.zeros((64, 64), dtype=int)
        for k, (_, visible) in enumerate(scene.objects, start=1):
            owner[visible] = k
        padded = np.pad(owner, 2, mode="edge")
        around = np.stack([padded[y : y + 64, x : x + 64] for y in range(5) for x in range(5)])
        assert (around != owner).any(0)[void].all()


def test_objects_overlap_and_all_remain_visible(scenes):
    counts = [len(scene.objects) for scene in scenes]
    assert min(counts) >= 1
    assert set(counts) == {1, 2, 3}
    # The smallest shape alone has so many pixels: a triangle of the smallest radius.
    smallest = 0.9 * VISIBLE_SHARE * (3 * np.sqrt(3) / 4) * (0.26 * 64) ** 2
    assert min(visible.sum() for scene in scenes for _, visible in scene.objects) >= smallest
    touching = 0
    for scene in scenes:
        for a, (_, first) in enumerate(scene.objects):
            grown = np.pad(first, 1)
            near = grown[2:, 1:-1] | grown[:-2, 1:-1] | grown[1:-1, 2:] | grown[1:-1, :-2]
            touching += any((near & other).any() for _, other in scene.objects[a + 1 :])
    assert touching >= 5


def test_color_and_brightness_do_not_identify_the_class(photos):
    """Mean colors vary less between classes than within them."""
    colors = {k: [] for k in range(1, len(CLASSES) + 1)}
    for i in range(150):
        scene = compose(photos, "train", np.random.default_rng([1, i]), 48)
        for number, visible in scene.objects:
            colors[number].append(scene.pixels[visible & (scene.classes == number)].mean(0))
    between = np.std([np.mean(found, axis=0) for found in colors.values()], axis=0)
    within = np.mean([np.std(found, axis=0) for found in colors.values()], axis=0)
    assert min(len(found) for found in colors.values()) >= 15
    assert (between < 0.5 * within).all()


def test_areas_of_the_shapes():
    areas = {}
    for name, outline in SHAPES.items():
        for ring in outline:
            assert np.linalg.norm(ring, axis=1).max() <= 1 + 1e-9
        x, y = outline[0].T
        areas[name] = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert areas["disc"] == pytest.approx(np.pi, rel=0.01)
    assert areas["square"] == pytest.approx(2)
    assert areas["triangle"] == pytest.approx(3 * np.sqrt(3) / 4)
    assert areas["cross"] == pytest.approx(20 / 10)
    assert len(SHAPES["ring"]) == 2


def test_train_and_val_are_cut_from_disjoint_bands(photos):
    """In photographs whose train bands are black and val bands white, brightness tells a pixel's
    origin.
    """
    pixels = np.zeros((400, 800, 3), dtype=np.uint8)
    pixels[:, 200:400] = pixels[:, 600:] = 255
    for upright in (False, True):
        marked = dict.fromkeys(photos, Image.fromarray(pixels.swapaxes(0, 1) if upright else pixels))
        for i in range(20):
            rng = [2, i]
            train, val = (compose(marked, split, np.random.default_rng(rng), 32) for split in ("train", "val"))
            assert not train.pixels.any()  # an object is as bright as it was drawn, but black stays black
            background = val.pixels[val.classes == 0].astype(int)
            assert (background == background[0]).all()  # exposed, and nothing of the black bands in it
            assert background[0].min() > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 3}, "--images 3: at least 4 are needed"),
        ({"seed": -1}, "--seed -1: must be 0 or more"),
        ({"size": 31}, "--size 31: must lie in 32..4096 pixels"),
        ({"size": 5000}, "--size 5000: must lie in 32..4096 pixels"),
    ],
)
def test_invalid_numbers(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        prepare_shapes(tmp_path / "s", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_photograph_is_named(tmp_path, monkeypatch):
    paths = [path for path in corpora.photo_paths() if path.stem != "gravel"]
    monkeypatch.setattr(corpora, "photo_paths", lambda: paths)
    with pytest.raises(InputError, match="photograph gravel is missing; reinstall it"):
        prepare_shapes(tmp_path / "s")


def test_an_error_leaves_no_files(tmp_path, monkeypatch):
    numbers = itertools.count()

    def stop(category, visible):
        if next(numbers) == 5:
            raise RuntimeError("halfway")
        return annotation(category, visible)

    monkeypatch.setattr(shapes, "annotation", stop)
    with pytest.raises(RuntimeError, match="halfway"):
        shapes.prepare_shapes(tmp_path / "s", images=20, size=32)
    assert list(tmp_path.iterdir()) == []


def test_script(tmp_path, monkeypatch, capsys):
    out = tmp_path / "s"
    monkeypatch.setattr("sys.argv", ["shapes.py", "--out", str(out), "--images", "4", "--size", "32"])
    shapes.main()
    assert capsys.readouterr().out.startswith("4 training and 1 validation images of 32x32 px with ")
    with pytest.raises(SystemExit, match=f"^error: --out {out} exists; it is not overwritten"):
        shapes.main()
