"""Images of Python programs: every form reaches the loader with the same pixels and labels."""

import io

import numpy as np
import pytest
import torch
from helpers.common import jpeg, pixels_of
from PIL import Image

from fastbyol.config import DataConfig
from fastbyol.data import build_loader, find_images
from fastbyol.data.decode import decode
from fastbyol.data.objects import as_images, stored_image
from fastbyol.errors import InputError

COUNT = 24
LABELS = [k % 3 for k in range(COUNT)]
NAMES = ["ant", "bee", "cat"]


class OwnImages:
    """The methods of ImageSet, and its optional attributes."""

    labels = tuple(NAMES[label] for label in LABELS)

    def __len__(self):
        return COUNT

    def read(self, index):
        return jpeg(index)

    def name(self, index):
        return f"own-{index}"


class OwnDataset(torch.utils.data.Dataset):
    targets = LABELS

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        pixels = pixels_of(index)
        image = {
            "PIL": lambda: Image.fromarray(pixels),
            "tensor": lambda: torch.from_numpy(pixels).permute(2, 0, 1),
            "array": lambda: pixels,
            "dict": lambda: {"image": pixels, "label": LABELS[index]},
        }[self.kind]()
        return image if self.kind == "dict" else (image, LABELS[index])


def paths(tmp_path):
    found = []
    for k in range(COUNT):
        path = tmp_path / f"{k}.jpg"
        path.write_bytes(jpeg(k))
        found.append(path if k % 2 else str(path))
    return found


def torchvision_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    for k, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        for i in range(k, COUNT, 3):
            (tmp_path / name / f"{i:02d}.jpg").write_bytes(jpeg(i))
    order = [int(path[-6:-4]) for path, _ in ImageFolder(tmp_path).samples]
    return torch.utils.data.Subset(ImageFolder(tmp_path), np.argsort(order).tolist())


def hugging_face(tmp_path):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=NAMES)})
    rows = {"picture": [{"bytes": jpeg(k), "path": None} for k in range(COUNT)], "kind": LABELS}
    return datasets.Dataset.from_dict(rows, features=features)


def as_pil(k):
    return Image.open(io.BytesIO(jpeg(k)))


SOURCES = {
    "bytes": lambda tmp_path: [(jpeg(k), LABELS[k]) for k in range(COUNT)],
    "names": lambda tmp_path: [(jpeg(k), NAMES[LABELS[k]]) for k in range(COUNT)],
    "paths": lambda tmp_path: list(zip(paths(tmp_path), LABELS, strict=True)),
    "pixels": lambda tmp_path: [(pixels_of(k), np.int64(LABELS[k])) for k in range(COUNT)],
    "PIL": lambda tmp_path: [(as_pil(k), torch.tensor(LABELS[k])) for k in range(COUNT)],
    "arrays": lambda tmp_path: (np.stack([pixels_of(k) for k in range(COUNT)]), np.array(LABELS)),
    "protocol": lambda tmp_path: OwnImages(),
    "torch, PIL": lambda tmp_path: OwnDataset("PIL"),
    "torch, tensor": lambda tmp_path: OwnDataset("tensor"),
    "torch, array": lambda tmp_path: OwnDataset("array"),
    "torch, dict": lambda tmp_path: OwnDataset("dict"),
    "torch, concatenated": lambda tmp_path: torch.utils.data.ConcatDataset(
        [
            torch.utils.data.Subset(OwnDataset("PIL"), range(10)),
            torch.utils.data.Subset(OwnDataset("array"), range(10, 24)),
        ]
    ),
    "torchvision": torchvision_folder,
    "Hugging Face": hugging_face,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_form_gives_the_same_batches(kind, tmp_path):
    images = as_images(SOURCES[kind](tmp_path))
    assert images.labels.tolist() == LABELS
    assert images.classes in (["0", "1", "2"], NAMES)
    for k in range(COUNT):
        assert np.array_equal(decode(images.read(k)), pixels_of(k))
    assert "images (" in images.location(3)
    for ours, theirs in zip(batches(images), batches(as_images(SOURCES["bytes"](tmp_path))), strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("kind", ["bytes", "protocol", "torch, PIL"])
def test_dali_reads_them(kind, tmp_path):
    images = as_images(SOURCES[kind](tmp_path))
    for ours, theirs in zip(batches(images, backend="dali"), batches(images), strict=True):
        assert torch.equal(ours[3], theirs[3]) and (ours[0] - theirs[0]).abs().max() < 0.1


def batches(images, **options):
    config = DataConfig(batch_size=8, image_size_px=32, threads=2, **options)
    loader = build_loader(config, images, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    return [(*(v.clone() for v in b.views), b.labels.clone(), b.indices.clone()) for b in loader.batches(0, 4)]


def test_files_of_torchvision_are_read_as_they_are(tmp_path):
    from torchvision.datasets import ImageFolder

    torchvision_folder(tmp_path)
    images = as_images(ImageFolder(tmp_path))
    assert images.classes == NAMES
    assert images.read(0) == jpeg(0)  # bytes, for DALI
    with_transform = as_images(ImageFolder(tmp_path, transform=lambda image: image.crop((0, 0, 20, 20))))
    assert with_transform.read(0).shape == (20, 20, 3)


def test_a_dataset_with_its_own_way_to_read_is_not_bypassed(tmp_path):
    from torchvision.datasets import ImageFolder

    class Cropped(ImageFolder):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image.crop((0, 0, 9, 8)), label

    class LooksAlike(OwnDataset):
        samples = [("a.jpg", label) for label in LABELS]  # noqa: RUF012

    torchvision_folder(tmp_path)
    assert as_images(Cropped(tmp_path)).read(0).shape == (8, 9, 3)
    assert np.array_equal(as_images(LooksAlike("array")).read(3), pixels_of(3))
    loaded = as_images(ImageFolder(tmp_path, loader=lambda path: Image.new("RGB", (5, 4))))
    assert loaded.read(0).shape == (4, 5, 3)


def test_data_without_labels():
    images = as_images([jpeg(k) for k in range(5)])
    assert (images.labels.tolist(), images.classes) == ([-1] * 5, [])
    partly = as_images([(jpeg(0), None), (jpeg(1), "x"), (jpeg(2), -1)])
    assert (partly.labels.tolist(), partly.classes) == ([-1, 0, -1], ["x"])

    class NoTargets(OwnDataset):
        targets = None

    found = as_images(NoTargets("PIL"))
    assert found.labels.tolist() == [-1] * COUNT
    assert "has no `targets`" in found.notes[0]


def test_selection_applies():
    images = find_images(DataConfig(classes=["1", "2"], images_per_class=2), "train", root=SOURCES["bytes"](None))
    assert images.labels.tolist().count(0) == images.labels.tolist().count(1) == 2
    assert images.classes == ["1", "2"]
    assert images.fingerprint().keys() == {"1", "2"}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (7, "give a path, a list"),
        ([], "it holds no images"),
        ({"train": [], "test": []}, r"it holds splits \(train, test\)"),
        ([1.5], "image 0: a float is no image"),
        ([np.zeros((4, 4, 3))], "image 0: pixels must be uint8, not float64; leave out transforms"),
        ([torch.zeros(3, 4, 4)], "image 0: pixels must be uint8, not float32"),
        ([np.zeros((4, 4, 2), np.uint8)], r"image 0: pixels must have the shape \(H, W, 3\)"),
        ([Image.new("I;16", (4, 4))], "image 0: a PIL image of mode I;16 has more than 8 bits"),
        (np.zeros((4, 4), np.uint8), r"images must have the shape \(N, H, W, 3\)"),
        ((np.zeros((4, 4, 4, 3), np.uint8), [1, 2]), "4 images but 2 labels"),
        ([(jpeg(0), -5)], "label -5 is not in"),
        ([(jpeg(0), float("nan"))], "label nan is neither a whole number nor a name"),
        ((np.zeros((2, 4, 4, 3), np.uint8), np.ones((2, 14))), "a label with 14 values is no class"),
        (["https://x/y.jpg"], "write URLs into a .csv file"),
    ],
)
def test_bad_sources_are_one_line(source, text):
    with pytest.raises(InputError, match=text) as caught:
        as_images(source)
    assert "\n" not in str(caught.value)


def test_an_exception_of_one_image_is_a_bad_image():
    class Faulty(OwnImages):
        def read(self, index):
            if index == 3:
                raise KeyError("gone\nforever")
            if index == 4:
                return None
            return jpeg(index)

    images = as_images(Faulty())
    with pytest.raises(OSError, match="KeyError: 'gone"):
        images.read(3)
    with pytest.raises(OSError, match="a NoneType is no image"):
        images.read(4)
    config = DataConfig(batch_size=8, image_size_px=32, threads=2, max_bad_fraction=0.1)
    loader = build_loader(config, images, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    assert sum(1 for _ in loader.batches(0, 3)) == 3
    assert set(loader.bad) == {3, 4}


def test_forms_of_pixels():
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for form in (
        gray,
        gray[..., None],
        np.dstack([gray] * 4),
        torch.from_numpy(gray)[None],
        np.dstack([gray] * 3)[:, ::1],
    ):
        found = stored_image(form)
        assert np.array_equal(found, np.dstack([gray] * 3)) and found.flags["C_CONTIGUOUS"] and found.flags["WRITEABLE"]
    turned = Image.fromarray(np.dstack([gray] * 3))
    turned.getexif()[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=turned.getexif())
    assert stored_image(Image.open(buffer)).shape == (4, 3, 3)
