"""Dense transfer through the command's door: both protocols on `prepare shapes`, their metrics and their errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastbyol.config import DetectionEval, SegmentationEval
from fastbyol.data.shapes import VOID, prepare_shapes
from fastbyol.errors import InputError
from fastbyol.evaluate import BYOL_ROW, UNTRAINED_ROW, evaluate
from fastbyol.evaluate.detection import DETECTION, evaluate_detector
from fastbyol.evaluate.protocol import Frame
from fastbyol.evaluate.segmentation import SEGMENTATION, evaluate_segmenter
from fastbyol.train import train

FRAME = Frame(size=32, device=torch.device("cpu"), dtype=torch.float32, threads=2, say=lambda text: None)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """24 training and 6 validation images of 64 px; not to be changed."""
    root = tmp_path_factory.mktemp("dense") / "shapes"
    prepare_shapes(root, images=24, seed=3, size=64)
    return root


@pytest.fixture
def copied(shapes, tmp_path):
    """One that may be changed."""
    return shutil.copytree(shapes, tmp_path / "shapes")


@pytest.fixture
def run(make_config):
    return train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})).folder


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_corpus_depends_on_its_seed_alone_and_is_not_overwritten(shapes, tmp_path):
    prepare_shapes(tmp_path / "again", images=24, seed=3, size=64)
    assert files(tmp_path / "again") == files(shapes)
    prepare_shapes(tmp_path / "other", images=24, seed=4, size=64)
    assert files(tmp_path / "other") != files(shapes)
    with pytest.raises(InputError, match="again exists; it is not overwritten"):
        prepare_shapes(tmp_path / "again", images=24)


def test_masks_and_boxes_say_the_same(shapes):
    """An object's box reaches from its first to its last pixel; every class of a mask has an object and the other way round."""
    for split, count in (("train", 24), ("val", 6)):
        content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
        names = (shapes / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        assert len(names) == len(content["images"]) == count
        for image in content["images"]:
            mask = np.array(Image.open(shapes / "SegmentationClass" / image["file_name"].replace(".jpg", ".png")))
            objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            assert {a["category_id"] for a in objects} == set(np.unique(mask)) - {0, VOID}
            for a in objects:
                x, y, w, h = a["bbox"]
                inside = mask[int(y) : round(y + h), int(x) : round(x + w)]
                assert a["area"] <= w * h
                assert (inside == a["category_id"]).any()
            only = [a for a in objects if [o["category_id"] for o in objects].count(a["category_id"]) == 1]
            for a in only:  # the void edge lies within the box
                rows, columns = np.nonzero(mask == a["category_id"])
                x, y, w, h = a["bbox"]
                assert x <= columns.min() <= columns.max() < x + w
                assert y <= rows.min() <= rows.max() < y + h


class Answers(nn.Module):
    """Gives prepared answers, one call after the other."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images):
        return next(self.answers)


def test_iou_counts_all_pixels_but_void(shapes):
    folder = SEGMENTATION.open(SegmentationEval(run="", root=str(shapes)), None)
    masks = [torch.from_numpy(folder.mask(name)).long() for name in folder.val]

    def logits(mask, wrong=0):
        guess = torch.where(mask == VOID, 7, mask)  # what is said of void pixels does not matter
        guess.view(-1)[torch.nonzero(mask.view(-1) == 0)[:wrong, 0]] = 5
        return nn.functional.one_hot(guess, 9).permute(2, 0, 1)[None].float()

    perfect = evaluate_segmenter(Answers([logits(m) for m in masks]), folder, 64, FRAME, batch_size=1)
    assert perfect == {"miou": pytest.approx(1), "pixel_accuracy": pytest.approx(1)}
    found = evaluate_segmenter(Answers([logits(m, 50) for m in masks]), folder, 64, FRAME, batch_size=1)
    every = torch.cat([m.view(-1) for m in masks])
    every = every[every != VOID]
    assert found["pixel_accuracy"] == pytest.approx(1 - 50 * len(masks) / len(every))
    counts = torch.bincount(every, minlength=9).double()
    wrong = 50 * len(masks)
    ious = [1.0 if counts[k] else 0.0 for k in range(9)]
    ious[0], ious[5] = 1 - wrong / counts[0].item(), (counts[5] / (counts[5] + wrong)).item()
    present = [iou for k, iou in enumerate(ious) if counts[k] or k == 5]
    assert found["miou"] == pytest.approx(np.mean(present), abs=1e-6)


def test_map_of_perfect_and_of_empty_answers(shapes):
    folder = DETECTION.open(DetectionEval(run="", root=str(shapes)), None)
    perfect = [
        [
            {
                "boxes": torch.from_numpy(i.boxes),
                "labels": torch.from_numpy(i.labels),
                "scores": torch.ones(len(i.labels)),
            }
        ]
        for i in folder.val
    ]
    nothing = [
        [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}]
        for _ in folder.val
    ]
    assert evaluate_detector(Answers(perfect), folder, 64, FRAME, batch_size=1)["map"] == pytest.approx(1)
    assert evaluate_detector(Answers(nothing), folder, 64, FRAME, batch_size=1)["map"] == 0
    moved = [[{**one[0], "boxes": one[0]["boxes"] + 30}] for one in perfect]
    assert evaluate_detector(Answers(moved), folder, 64, FRAME, batch_size=1)["map"] < 0.5


@pytest.mark.parametrize("finetune", [False, True])
def test_segmentation_learns_and_leaves_the_backbone_as_it_was(run, shapes, finetune):
    options = SegmentationEval(
        run=str(run), root=str(shapes), image_size_px=64, epochs=8, batch_size=8, finetune=finetune
    )
    result = evaluate("segmentation", options, print)
    assert list(result["rows"]) == [BYOL_ROW, UNTRAINED_ROW]
    row = result["rows"][BYOL_ROW]
    assert row["pixel_accuracy"] > 0.4
    assert result["train_images"] == 24
    again = evaluate("segmentation", SegmentationEval(**{**vars(options), "baselines": False}), print)
    assert again["rows"][BYOL_ROW] == row


def test_detection_runs_and_repeats(run, shapes):
    options = DetectionEval(run=str(run), root=str(shapes), image_size_px=64, epochs=1, batch_size=6, baselines=False)
    rows = [evaluate("detection", options, print)["rows"][BYOL_ROW] for _ in range(2)]
    assert list(rows[0]) == ["map", "map50", "map75"]
    assert rows[0] == rows[1]
    assert all(0 <= value <= 1 for value in rows[0].values())


def test_root_must_be_named():
    for options in (SegmentationEval, DetectionEval):
        with pytest.raises(ValueError, match=r"root=None: name the (VOC|COCO)-format folder"):
            options(run="x")


def test_what_is_wrong_with_a_voc_folder_is_one_line(copied):
    options = SegmentationEval(run="", root=str(copied))
    lists = copied / "ImageSets" / "Segmentation"
    name = (lists / "val.txt").read_text().split()[0]
    mask = copied / "SegmentationClass" / f"{name}.png"
    good = mask.read_bytes()

    def refused(text):
        with pytest.raises(InputError, match=text) as caught:
            SEGMENTATION.open(options, None)
        assert "\n" not in str(caught.value)

    Image.fromarray(np.full((64, 64), 12, dtype=np.uint8)).save(mask)
    refused(rf"{name}.png: holds class 12 but there are 8 classes")
    Image.fromarray(np.zeros((64, 60), dtype=np.uint8)).save(mask)
    refused(rf"{name}.png: 60x64 pixels but its image has 64x64")
    mask.unlink()
    refused(rf"{name}.png: No such file")
    mask.write_bytes(good)
    (lists / "val.txt").write_text("")
    refused(r"val.txt: names no images")
    (lists / "val.txt").write_text("train_000000\n")
    refused(r"train_000000 is in train.txt and in val.txt")
    (lists / "val.txt").unlink()
    refused(r"val.txt: No such file")


def test_what_is_wrong_with_a_coco_folder_is_one_line(copied):
    options = DetectionEval(run="", root=str(copied))
    file = copied / "annotations" / "instances_val.json"
    good = json.loads(file.read_text())

    def refused(text, **changes):
        file.write_text(json.dumps({**json.loads(json.dumps(good)), **changes}))
        with pytest.raises(InputError, match=text) as caught:
            DETECTION.open(options, None)
        assert "\n" not in str(caught.value)

    refused(
        r"instances_val.json: annotations\[0\]: category_id=99 is not among the categories",
        annotations=[{**good["annotations"][0], "category_id": 99}],
    )
    refused(
        r"annotations\[0\]: bbox=\[1, 2\] is not \[x, y, width, height\]",
        annotations=[{**good["annotations"][0], "bbox": [1, 2]}],
    )
    refused(r"there are no objects in val", annotations=[])
    refused(r"holds no images", images=[], annotations=[])
    refused(r"'file_name' is missing", images=[{"id": 1}])
    refused(
        r"image gone.jpg is neither in JPEGImages/",
        images=[{**good["images"][0], "file_name": "gone.jpg"}],
        annotations=[],
    )
    refused(
        r"is said to have 65x64 pixels, the file has 64x64",
        images=[{**good["images"][0], "width": 65}, *good["images"][1:]],
    )
    refused(r"train and val have different categories", categories=good["categories"] + [{"id": 77, "name": "x"}])
    file.write_text("{")
    with pytest.raises(InputError, match=r"instances_val.json: not JSON"):
        DETECTION.open(options, None)
    file.unlink()
    with pytest.raises(InputError, match=r"there is neither annotations/instances_val.json"):
        DETECTION.open(options, None)
