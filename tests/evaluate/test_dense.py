"""Segmentation and detection: copies of the backbone, feature maps, samples, folder formats,
training.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from fastbyol.build import build_backbone
from fastbyol.config import ModelConfig
from fastbyol.data import open_split
from fastbyol.data.decode import decode
from fastbyol.errors import InputError, RunError
from fastbyol.evaluation import dense, image_files
from fastbyol.evaluation.coco import CocoImage
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.detection import DETECTION, _sample, build_detector, evaluate_detector
from fastbyol.evaluation.features import calibrate_batchnorm
from fastbyol.evaluation.options import DetectionEval, SegmentationEval
from fastbyol.evaluation.segmentation import SEGMENTATION, _training_sample, build_segmenter, evaluate_segmenter
from fastbyol.evaluation.voc import VOC_CLASSES, VOID, read_mask
from fastbyol.layers import batch_norms, fuse_layers

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = EvalContext(size=32, device=torch.device("cpu"), dtype=torch.float32, threads=2)
COLORS = np.array([(40, 40, 40), (230, 40, 40), (40, 40, 230)], dtype=np.uint8)  # of background, class 1, class 2


def small_backbone(name="resnet18", width=0.125, size=32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fuse_layers(build_backbone(ModelConfig(backbone=name, width=width), size)[0])


def state_of(backbone):
    tensors = {name: value.clone() for name, value in backbone.state_dict().items()}
    return tensors, [module.training for module in backbone.modules()], [p.requires_grad for p in backbone.parameters()]


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(a[0][name], b[0][name]) for name in a[0]) and a[0].keys() == b[0].keys()


def write_folder(root: Path, *, train=8, val=4, height=64, width=64):
    """Write a folder in both formats.

    Every image has two rectangles, whose colors are their classes.
    """
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "annotations"):
        (root / name).mkdir(parents=True)
    (root / "labels.txt").write_text("red\nblue\n")
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for i in range(count):
            rng = np.random.default_rng([i, split == "val"])
            mask = np.zeros((height, width), dtype=np.uint8)
            for category, left in ((1, 0), (2, width // 2)):
                w, h = (int(v) for v in rng.integers(width // 4, width // 2 - 4, size=2))
                x, y = left + int(rng.integers(0, width // 2 - w)), int(rng.integers(0, height - h))
                mask[y : y + h, x : x + w] = category
                annotations.append({"image_id": i, "category_id": category, "bbox": [x, y, w, h], "iscrowd": 0})
            name = f"{split}{i}"
            Image.fromarray(COLORS[mask]).save(root / f"JPEGImages/{name}.jpg", quality=95, subsampling=0)
            Image.fromarray(mask).save(root / f"SegmentationClass/{name}.png")
            images.append({"id": i, "file_name": f"{name}.jpg", "width": width, "height": height})
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(f"{split}{i}" for i in range(count)))
        categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "folder")


def segmentation(root, **options):
    return SegmentationEval(run="x", root=str(root), **options)


def detection(root, **options):
    return DetectionEval(run="x", root=str(root), **options)


def open_voc(root):
    return SEGMENTATION.open(segmentation(root), None, CONTEXT)


def open_coco(root):
    return DETECTION.open(detection(root), None, CONTEXT)


def edit(root, split, change):
    """Apply a function to the content of a split's COCO file."""
    file = root / f"annotations/instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# --- training ---


def test_frozen_segmenter_learns_and_leaves_backbone_and_global_rng_unchanged(folder):
    backbone = small_backbone().train()
    before, random = state_of(backbone), torch.get_rng_state()
    data = open_voc(folder)
    rows = []
    for epochs, seed in ((1, 0), (25, 0), (25, 0), (25, 1)):
        options = segmentation(folder, image_size_px=64, epochs=epochs, batch_size=4, seed=seed)
        rows.append(SEGMENTATION.measure(backbone, data, options, CONTEXT))
        assert torch.equal(torch.get_rng_state(), random)
        random = torch.manual_seed(len(rows)).get_state()  # the state of the global generator does not matter
    assert rows[1]["miou"] > 0.6  # six backbones reach 0.77 to 0.81
    assert rows[1]["miou"] > rows[0]["miou"] + 0.2  # 0.25 to 0.36 after one epoch
    assert rows[1] == rows[2] != rows[3]
    assert same(state_of(backbone), before)


@pytest.mark.parametrize("finetune", [False, True])
def test_segmenter_trains_its_copy_of_the_backbone_only_when_fine_tuning(folder, finetune):
    backbone = small_backbone().eval()
    before = state_of(backbone)
    network = build_segmenter(backbone, 64, 2, finetune=finetune)
    own, head = network.maps.backbone, network.head
    assert network.training and head.training
    assert own.training is finetune
    first = state_of(own)[0], state_of(head)[0]
    data, options = open_voc(folder), segmentation(folder, epochs=1, batch_size=4)

    def loss_of(batch):
        return network(dense.normalize(torch.from_numpy(np.stack([image for image, _ in batch])))).square().mean()

    dense.fit(network, loss_of, lambda i, rng: _training_sample(data.train[i], 64, rng), 8, options, CONTEXT)
    unused = {"fc.weight", "fc.bias"}
    changed = [name for name, value in own.state_dict().items() if not torch.equal(value, first[0][name])]
    assert set(changed) == (first[0].keys() - unused if finetune else set())  # weights and running statistics
    assert all(not torch.equal(p, first[1][name]) for name, p in head.named_parameters())
    assert same(state_of(backbone), before)


@pytest.mark.slow
def test_detector_learns_and_leaves_the_backbone_unchanged(folder, monkeypatch):
    backbone = small_backbone().train()
    before = state_of(backbone)
    data = open_coco(folder)
    seen = []

    def spy(detector, *args, **options):
        seen.append({name: value.clone() for name, value in detector.backbone.maps.backbone.state_dict().items()})
        return evaluate_detector(detector, *args, **options)

    monkeypatch.setattr("fastbyol.evaluation.detection.evaluate_detector", spy)
    rows = []
    for changes in ({"epochs": 1}, {"epochs": 40}, {"epochs": 1, "trainable_stages": 1}):
        options = detection(folder, image_size_px=64, batch_size=4, lr=0.05, **changes)
        rows.append(DETECTION.measure(backbone, data, options, CONTEXT))
    assert rows[1]["map50"] > 0.7  # five backbones reach 1.0
    assert rows[1]["map50"] > rows[0]["map50"] + 0.3  # 0.01 to 0.38 after one epoch
    assert same(state_of(backbone), before)
    trained = [{name for name in own if not torch.equal(own[name], before[0][name])} for own in seen]
    weights = {name for name, _ in backbone.named_parameters() if name.startswith("layer4.")}
    assert trained == [set(), set(), weights]  # no running statistics


def test_diverged_segmentation_raises(folder):
    data = open_voc(folder)
    options = segmentation(folder, image_size_px=32, epochs=2, batch_size=4, lr=1e30, finetune=True)
    with pytest.raises(RunError, match=r"lr=1e\+30: the loss became NaN or infinite; choose a lower one"):
        SEGMENTATION.measure(small_backbone(), data, options, CONTEXT)


def test_calibrated_norms_keep_their_momentum(photos):
    backbone = small_backbone()
    for norm in batch_norms(backbone):
        norm.views = 2
    images = open_split(photos, "train")
    calibrate_batchnorm(backbone, images, CONTEXT)
    for network in (backbone, dense.frozen_copy(backbone, 64)):
        assert {(norm.momentum, norm.views) for norm in batch_norms(network)} == {(0.1, 1)}


def test_image_size_is_the_option_or_9_4_of_the_run():
    def size(option, run):
        return dense.resolve_image_size(option, EvalContext(**{**vars(CONTEXT), "size": run}))

    assert (size(0, 224), size(0, 48), size(0, 32), size(100, 224)) == (512, 128, 96, 100)


# --- backbones ---


@pytest.mark.parametrize(
    ("stages", "trained"),
    [(0, []), (1, ["layer4"]), (2, ["layer3", "layer4"]), (4, ["layer1", "layer2", "layer3", "layer4"])],
)
def test_trainable_stages_of_a_resnet(stages, trained):
    detector = build_detector(small_backbone(), 64, 2, dtype=torch.float32, trainable_stages=stages)
    own = detector.backbone.maps.backbone
    assert sorted({n.split(".")[0] for n, p in own.named_parameters() if p.requires_grad}) == trained
    assert all(p.requires_grad for p in detector.backbone.fpn.parameters())
    whole = build_detector(small_backbone(), 64, 2, dtype=torch.float32, trainable_stages=5)
    assert all(p.requires_grad for p in whole.backbone.maps.parameters())


def test_detector_for_resnet50_at_800_px_is_torchvision_s():
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    ours = build_detector(timm.create_model("resnet50", num_classes=0), 800, 90, dtype=torch.float32)
    sides = [round(s) for level in ours.rpn.anchor_generator.sizes for s in level]
    assert sides == [s for level in theirs.rpn.anchor_generator.sizes for s in level]
    assert ours.rpn.anchor_generator.aspect_ratios == theirs.rpn.anchor_generator.aspect_ratios
    for part in ("_pre_nms_top_n", "_post_nms_top_n"):
        assert getattr(ours.rpn, part) == getattr(theirs.rpn, part)
    assert (
        ours.roi_heads.fg_bg_sampler.batch_size_per_image == theirs.roi_heads.fg_bg_sampler.batch_size_per_image == 512
    )
    for name in ("featmap_names", "output_size", "sampling_ratio"):
        assert getattr(ours.roi_heads.box_roi_pool, name) == getattr(theirs.roi_heads.box_roi_pool, name)
    assert ours.backbone.levels == ["0", "1", "2", "3", "pool"]
    for name in ("rpn", "roi_heads"):
        shapes = [[p.shape for p in getattr(net, name).parameters()] for net in (ours, theirs)]
        assert shapes[0] == shapes[1]
    assert ours.transform.min_size == theirs.transform.min_size
    assert ours.transform.max_size == theirs.transform.max_size


def test_detector_for_small_images():
    detector = build_detector(small_backbone(), 128, 2, dtype=torch.float32)
    assert detector.roi_heads.box_roi_pool.sampling_ratio == 1
    assert detector.backbone.levels == ["0", "1", "2"]  # 32, 16 and 8 positions wide
    assert detector.rpn.anchor_generator.sizes == ((20.48,), (40.96,), (81.92,))
    levels = detector.backbone(torch.zeros(1, 3, 128, 128))
    assert [tuple(x.shape) for x in levels.values()] == [(1, 64, side, side) for side in (32, 16, 8)]


@pytest.mark.parametrize(
    ("name", "sides", "options"),
    [
        ("resnet18", [8, 4, 2], {}),
        ("vgg11_bn", [8, 4, 2], {"mlp_ratio": 0.01}),
        ("convnext_atto", [8, 4, 2], {}),
        ("vit_tiny_patch16_224", [4], {}),
    ],
)
def test_segmentation_head_takes_maps_of_strides_8_to_32(name, sides, options):
    backbone = timm.create_model(name, num_classes=0, **options).eval()
    network = build_segmenter(backbone, 64, 3, finetune=False)
    maps = network.maps(torch.zeros(2, 3, 64, 64))
    assert [x.shape[-1] for x in maps] == sides
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 4, 64, 64)
    blocks = [k for k, _ in enumerate(backbone.forward_intermediates(torch.zeros(1, 3, 224, 224))[1])]
    assert network.maps.indices[-1] == blocks[-1]  # the deepest


def test_unsuitable_backbones_raise():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    with pytest.raises(InputError, match=r"VisionTransformer has maps of 1 size\(s\), detection needs 3"):
        build_detector(vit, 64, 2, dtype=torch.float32)
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    with pytest.raises(InputError, match="image_size_px=224: SwinTransformer cannot take images of 256x224 pixels: "):
        build_detector(swin, 224, 2, dtype=torch.float32)
    vgg = timm.create_model("vgg11_bn", num_classes=0, mlp_ratio=0.01)
    with pytest.raises(InputError, match="image_size_px=16: VGG cannot take images of 16x16 pixels: .*too small"):
        build_segmenter(vgg, 16, 2, finetune=False)
    with pytest.raises(InputError, match="timm's Sequential does not expose its feature maps"):
        build_segmenter(nn.Sequential(nn.Conv2d(3, 3, 1)), 64, 2, finetune=False)


# --- samples ---


def test_training_sample_transforms_image_and_mask_together(tmp_path):
    data = open_voc(write_folder(tmp_path / "wide", height=48, width=80))
    padded = flipped = 0
    for seed in range(20):
        image, mask = _training_sample(data.train[0], 64, np.random.default_rng(seed))
        assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
        shown = np.abs(image[..., None, :].astype(int) - COLORS).sum(-1).argmin(-1)
        known = mask != VOID
        assert (shown == mask)[known].mean() > 0.93  # resizing mixes the colors at edges
        assert (image[~known] == (124, 116, 104)).all()
        padded += (~known).any()
        columns = [np.nonzero(mask == k)[1] for k in (1, 2)]
        flipped += all(map(len, columns)) and columns[0].mean() > columns[1].mean()
    assert padded == 20  # the shorter side is at most 48/80 * 1.4 * 64 < 64 pixels
    assert 0 < flipped < 20


def test_resized_mask_has_no_new_classes():
    mask = np.kron(np.array([[0, 7], [9, VOID]], dtype=np.uint8), np.ones((8, 8), dtype=np.uint8))
    assert set(np.unique(image_files.resize(mask, 23, 11, labels=True))) == {0, 7, 9, VOID}


def test_boxes_follow_resize_and_flip(tmp_path):
    pixels = np.zeros((50, 100, 3), dtype=np.uint8)
    pixels[10:30, 60:90] = 255
    file = tmp_path / "x.png"
    Image.fromarray(pixels).save(file)
    image = CocoImage(file, np.array([[60, 10, 90, 30]], np.float32), np.array([3]), np.array([False]))
    for size, flip in ((60, False), (60, True), (120, False), (120, True)):
        tensor, target = _sample(image, size, flip=flip)
        assert tensor.shape == (3, size * 5 // 6, size * 5 // 3)  # the longer side is limited to 1333/800
        rows, columns = torch.nonzero(tensor[0] > 0.5, as_tuple=True)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target["boxes"][0].tolist() == pytest.approx([float(v) for v in extent], abs=1)
        assert tensor.min() >= 0 and tensor.max() <= 1


def test_validation_resizes_logits_to_the_mask(tmp_path):
    """A network that reads the classes from the colors is right at any mask size."""

    class Reader(nn.Module):
        def forward(self, x):
            colors = dense.normalize(torch.from_numpy(COLORS)[None, None])[0, :, 0].T  # (3, 3)
            return -(x[:, None] - colors[None, :, :, None, None]).square().sum(2)

    for height, width in ((48, 80), (80, 48), (64, 64)):
        data = open_voc(write_folder(tmp_path / f"{height}", height=height, width=width))
        row = evaluate_segmenter(Reader(), data, 64, CONTEXT, batch_size=3)
        assert row["miou"] > 0.9


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_image_size_respects_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "x.jpg"
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(file, exif=exif)
    assert image_files.image_size(file) == ((20, 30) if orientation < 5 else (30, 20))


# --- VOC ---


def test_default_class_names_are_voc_s(folder):
    (folder / "labels.txt").unlink()
    data = open_voc(folder)
    assert data.classes == VOC_CLASSES
    assert (len(VOC_CLASSES), VOC_CLASSES[0], VOC_CLASSES[14], VOC_CLASSES[19]) == (
        20,
        "aeroplane",
        "person",
        "tvmonitor",
    )
    assert (len(data.train), len(data.val), len(data.classes)) == (8, 4, 20)
    images = SEGMENTATION.calibration_images(data)
    assert len(images) == 8
    assert decode(images.read(0)).shape == (64, 64, 3)


def test_folder_without_image_sets_raises(photos):
    with pytest.raises(InputError, match=r"root=.*: not a VOC-format folder: it has no ImageSets/Segmentation/"):
        open_voc(photos)


def test_invalid_voc_folders_raise_one_line(folder):
    def check_error(text):
        with pytest.raises(InputError, match=text) as caught:
            open_voc(folder)
        assert "\n" not in str(caught.value)

    mask, image, labels = folder / "SegmentationClass/val1.png", folder / "JPEGImages/val1.jpg", folder / "labels.txt"
    good = mask.read_bytes()
    Image.new("RGB", (64, 64)).save(mask)
    check_error("val1.png: its pixels are RGB, not class ids; save it as a palette or gray image")
    mask.write_bytes(b"text")
    check_error("val1.png: not an image file")
    mask.write_bytes(good[: len(good) // 2])
    check_error("val1.png: .*truncated")
    mask.write_bytes(good)
    for text in ("", "red\nred\n", "\n".join(str(i) for i in range(255))):
        labels.write_text(text)
        check_error(r"labels.txt: must name the classes 1 to K \(fewer than 255\), each once, one per line")
    labels.write_bytes(b"\xff\xfe\x00")
    check_error("labels.txt: not a text file in UTF-8")
    labels.write_text("red\nblue\n")
    whole = image.read_bytes()
    image.write_bytes(b"text")
    check_error("val1.jpg: not an image file")
    image.write_bytes(whole[: len(whole) // 2])  # decoding before the training finds it
    check_error("val1.jpg: .*; fix it or remove it from the lists")
    image.unlink()
    check_error("val.txt, line 2: 'val1': there is no .*JPEGImages/val1.jpg")
    image.write_bytes(whole)
    good = mask.read_bytes()
    mask.unlink()
    check_error("val.txt, line 2: 'val1': there is no .*SegmentationClass/val1.png")
    Image.new("L", (60, 64)).save(mask)
    check_error("val1.png: 60x64 pixels but its image has 64x64")
    Image.fromarray(np.full((64, 64), 3, np.uint8)).save(mask)
    check_error("val1.png: holds class 3 but there are 2 classes; name all of them in .*labels.txt, one per line")
    mask.write_bytes(good)
    open_voc(folder)
    with pytest.raises(InputError, match="root=/nowhere: no such folder"):
        open_voc("/nowhere")


def rewrite_masks(root, split, change):
    for file in (root / "SegmentationClass").glob(f"{split}*.png"):
        with Image.open(file) as mask:
            changed = change(np.array(mask))
        Image.fromarray(changed).save(file)


@pytest.mark.parametrize(
    ("splits", "change", "text"),
    [
        (
            ("train", "val"),
            lambda mask: np.where(mask > 0, 255, 0).astype(np.uint8),
            "SegmentationClass: the masks of train hold only 0 and 255: 255 is void, but at least two classes are needed: "
            "write 0 for the background, 1 to K for the classes, 255 for pixels to ignore",
        ),
        (
            ("val",),
            lambda mask: np.where(mask > 0, 255, 0).astype(np.uint8),
            "the masks of val hold only 0 and 255: 255 is",
        ),
        (("val",), np.zeros_like, "the masks of val hold only 0, but at least two classes are needed"),
        (("train",), lambda mask: mask * 0 + 1, "the masks of train hold only 1, but"),
        (("val",), lambda mask: mask * 0 + 255, "the masks of val hold only 255, which is void: there is nothing to"),
    ],
)
def test_masks_with_fewer_than_two_classes_raise(folder, splits, change, text):
    for split in splits:
        rewrite_masks(folder, split, change)
    with pytest.raises(InputError, match=text) as caught:
        open_voc(folder)
    assert "\n" not in str(caught.value)


def test_one_bit_masks_are_class_ids(folder, log_lines):
    for split in ("train", "val"):
        rewrite_masks(folder, split, lambda mask: mask > 0)
    with Image.open(folder / "SegmentationClass/val0.png") as mask:
        assert mask.mode == "1"
    data = open_voc(folder)
    assert set(np.unique(read_mask(data.val[0].mask))) == {0, 1}
    assert log_lines == [
        "warning: train has no pixel of blue (1 of 3)",
        "warning: val has no pixel of blue (1 of 3): the mean IoU counts these only where they are predicted, as 0",
    ]


def test_mean_iou(folder, log_lines):
    """Void pixels and classes in neither masks nor predictions are ignored.

    A class in predictions only has IoU 0.
    """
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [VOID, VOID, 1, 1], [0, 0, 0, 0]], dtype=np.uint8)
    answer = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [3, 3, 1, 1], [0, 0, 0, 4]], dtype=np.uint8)
    (folder / "labels.txt").write_text("".join(f"{k}\n" for k in range(1, 8)))
    rewrite_masks(folder, "val", lambda mask: np.kron(truth, np.ones((16, 16), np.uint8)))
    data = open_voc(folder)
    assert log_lines[-1].startswith(
        "warning: val has no pixel of 2, 3, 4, 5, 6 (+1 more) (6 of 8): the mean IoU counts"
    )

    class Answer(nn.Module):
        def forward(self, x):
            logits = torch.nn.functional.one_hot(torch.from_numpy(answer).long(), 8).permute(2, 0, 1)[None].float()
            return torch.nn.functional.interpolate(logits, 64, mode="nearest").expand(len(x), -1, -1, -1)

    row = evaluate_segmenter(Answer(), data, 64, CONTEXT, batch_size=3)
    # IoU: class 0: 6 / 8, class 1: 6 / 7, class 4: 0. The others are not predicted, or only on void
    # (3).
    assert row["miou"] == pytest.approx((6 / 8 + 6 / 7 + 0) / 3)
    assert row["pixel_accuracy"] == pytest.approx(12 / 14)


def test_all_void_masks_give_finite_metrics(folder):
    backbone, rows = small_backbone(), []
    for part in ("val", "val0"):
        options = segmentation(folder, image_size_px=32, epochs=1, batch_size=1)
        rows.append(SEGMENTATION.measure(backbone, open_voc(options.root), options, CONTEXT))
        rewrite_masks(folder, "train0", lambda mask: mask * 0 + VOID)
        if part == "val":
            rewrite_masks(folder, "val0", lambda mask: mask * 0 + VOID)
    assert all(0 <= value <= 1 for row in rows for value in row.values())


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffval0\nval1\nval2\nval3\n",
        "val0  \n\n  val1\t\nval2\n\n\nval3",
        "val0\r\nval1\r\nval2\r\nval3\r\n",
        "val0.jpg\nval1.JPG\nval2.jpg\nval3.jpg\n",
        "JPEGImages/val0.jpg\n./val1\nJPEGImages\\val2.jpg\nval3",
    ],
    ids=["byte order mark", "blanks", "Windows", "extensions", "paths"],
)
def test_list_spellings(folder, text):
    (folder / "ImageSets/Segmentation/val.txt").write_text(text, newline="")
    (folder / "labels.txt").write_bytes("\ufeffred \r\nblue\r\n".encode())
    data = open_voc(folder)
    assert [one.file.name for one in data.val] == [f"val{i}.jpg" for i in range(4)]
    assert [one.mask.name for one in data.val] == [f"val{i}.png" for i in range(4)]
    assert data.classes == ["red", "blue"]


def test_other_image_formats(folder):
    images = folder / "JPEGImages"
    (images / "val0.jpg").rename(images / "val0.JPG")
    (images / "val1.jpg").rename(images / "val1.jpeg")
    with Image.open(images / "val2.jpg") as image:
        image.save(images / "val2.png")
    (images / "val2.jpg").unlink()
    (folder / "SegmentationClass/val3.png").rename(folder / "SegmentationClass/val3.PNG")
    (images / "val3.txt").write_text("a note")
    data = open_voc(folder)
    assert [one.file.name for one in data.val] == ["val0.JPG", "val1.jpeg", "val2.png", "val3.jpg"]
    calibration = SEGMENTATION.calibration_images(data)
    assert [calibration.name(i) for i in range(8)] == [f"train{i}.jpg" for i in range(8)]
    # Two candidates, neither of them .jpg: the list must name one.
    with Image.open(images / "val1.jpeg") as image:
        image.save(images / "val1.png")
    with pytest.raises(
        InputError, match=r"val.txt, line 2: 'val1': .*val1 may be val1.jpeg or val1.png; give the name with"
    ):
        open_voc(folder)
    (folder / "ImageSets/Segmentation/val.txt").write_text("val0\nval1.png\nval3")
    assert open_voc(folder).val[1].file.name == "val1.png"


def test_image_names_with_dots_spaces_and_folders(folder):
    for old, new in (("val0", "2007.000032"), ("val1", "a b"), ("val2", "street/1")):
        for inside, extension in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            target = folder / inside / f"{new}.{extension}"
            target.parent.mkdir(exist_ok=True)
            (folder / inside / f"{old}.{extension}").rename(target)
    (folder / "ImageSets/Segmentation/val.txt").write_text("2007.000032\na b\nstreet/1.jpg")
    data = open_voc(folder)
    assert [str(one.mask.relative_to(folder / "SegmentationClass")) for one in data.val] == [
        "2007.000032.png",
        "a b.png",
        "street/1.png",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val0\nval0.jpg\n", "line 2: 'val0.jpg' duplicates line 1; remove one"),
        ("val0\nval1 val2\n", "line 2: 'val1 val2': there is no .*JPEGImages/val1 val2.jpg"),
        ("/nowhere/x.jpg\n", "line 1: '/nowhere/x.jpg': must be a file in .*JPEGImages"),
        ("val0\ntrain0\n", "train0 is in both train.txt and val.txt"),
        ("2007.0\n", "line 1: '2007.0': there is no .*2007.0.jpg"),
        ("\n \n", "val.txt: lists no images"),
    ],
)
def test_invalid_lists_raise_one_line(folder, text, message):
    (folder / "JPEGImages/2007.jpg").write_bytes((folder / "JPEGImages/val0.jpg").read_bytes())
    (folder / "ImageSets/Segmentation/val.txt").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        open_voc(folder)
    assert "\n" not in str(caught.value)


def test_batches_too_small_for_batchnorm_raise_before_training(folder):
    options = segmentation(folder, image_size_px=32, epochs=1, batch_size=1, finetune=True)
    data = open_voc(options.root)
    with pytest.raises(
        InputError, match=r"batch_size=1, 8 training image\(s\): at image_size_px=32 BatchNorm would see"
    ):
        SEGMENTATION.measure(small_backbone(), data, options, CONTEXT)


# --- COCO ---


def test_category_ids_with_gaps_in_any_order(folder):
    numbers = {1: 90, 2: 7}
    for split in ("train", "val"):

        def renumber(content):
            for category in content["categories"]:
                category["id"] = numbers[category["id"]]
            for found in content["annotations"]:
                found["category_id"] = numbers[found["category_id"]]

        edit(folder, split, renumber)
    data = open_coco(folder)
    assert data.classes == ["blue", "red"]
    assert data.val[0].labels.tolist() == [2, 1]
    assert (len(data.train), len(data.val), len(data.classes)) == (8, 4, 2)
    assert decode(DETECTION.calibration_images(data).read(0)).shape == (64, 64, 3)


def test_boxes_are_clipped_and_empty_boxes_and_images_dropped(folder):
    def change(content):
        own = [a for a in content["annotations"] if a["image_id"] == 0]
        own[0]["bbox"], own[1]["bbox"] = [-5, 10, 15, 100], [10, 10, 0, 5]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]

    edit(folder, "train", change)
    edit(folder, "val", change)
    data = open_coco(folder)
    assert data.train[0].boxes.tolist() == data.val[0].boxes.tolist() == [[0, 10, 10, 64]]
    assert (len(data.train), len(data.val)) == (
        7,
        4,
    )  # validation images without objects are kept: they can have false positives
    assert data.val[1].boxes.shape == (0, 4)


def test_crowds_are_excluded_from_training_and_metric(folder):
    def change(content):
        content["annotations"][1]["iscrowd"] = 1

    edit(folder, "train", change)
    edit(folder, "val", change)
    data = open_coco(folder)
    _, target = _sample(data.train[0], 64, flip=False, crowds=False)
    assert target["labels"].tolist() == [1]
    assert _sample(data.train[0], 64, flip=False)[1]["iscrowd"].tolist() == [0, 1]

    class Answers(nn.Module):
        def forward(self, images):
            found = []
            for image in data.val:
                keep = ~image.crowd
                boxes, labels = torch.from_numpy(image.boxes[keep]), torch.from_numpy(image.labels[keep])
                if not keep.all():  # more confident detections on the crowd
                    crowd = torch.from_numpy(image.boxes[~keep])
                    boxes, labels = torch.cat((boxes, crowd, crowd)), torch.cat((labels, torch.tensor([2, 2])))
                scores = torch.linspace(0.5, 1, len(labels))
                found.append({"boxes": boxes, "labels": labels, "scores": scores})
            return found

    assert evaluate_detector(Answers(), data, 64, CONTEXT, batch_size=4)["map"] == pytest.approx(1)


@pytest.mark.parametrize("subfolder", ["train2017", "train", "."])
def test_coco_2017_file_names_and_folders(folder, subfolder):
    for split in ("train", "val"):
        file = folder / f"annotations/instances_{split}.json"
        file.rename(file.with_name(f"instances_{split}2017.json"))
        target = folder / subfolder.replace("train", split)
        target.mkdir(exist_ok=True)
        for image in (folder / "JPEGImages").glob(f"{split}*.jpg"):
            image.rename(target / image.name)
    data = open_coco(folder)
    assert data.train[3].file.resolve() == (folder / subfolder / "train3.jpg").resolve()
    assert len(DETECTION.calibration_images(data)) == 8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.pop("categories"), "not a COCO file: there is no list 'categories'"),
        (lambda c: c.update(annotations={}), "not a COCO file: there is no list 'annotations'"),
        (lambda c: c["images"].append(c["images"][0]), "two images have the same id"),
        (lambda c: c["categories"].append({"id": 1, "name": "x"}), "two categories have the same id"),
        (lambda c: c["annotations"][3].update(image_id=99), r"annotations\[3\]: image_id=99 is not among the images"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3, -4]), r"annotations\[2\]: bbox=\[1, 2, 3, -4\] is not"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, "3", 4]), r"annotations\[2\]: bbox=.* is not \[x, y, width"),
        (lambda c: c["annotations"][2].update(bbox=[1, math.nan, 3, 4]), r"annotations\[2\]: bbox=.* is not"),
        (lambda c: c["annotations"][0].pop("bbox"), r"annotations\[0\]: 'bbox' is missing; expected a list of num"),
        (lambda c: c["annotations"][2].update(bbox=[1, 10**400, 3, 4]), r"annotations\[2\]: bbox=.* is not"),
        (lambda c: c["images"][2].update(id="12"), r"images\[2\]: 'id' is '12'; expected a whole number"),
        (lambda c: c["annotations"][0].update(category_id="1"), r"annotations\[0\]: 'category_id' is '1'; expected a"),
        (lambda c: c["annotations"][0].update(iscrowd="0"), r"annotations\[0\]: iscrowd='0' is neither 0 nor 1"),
        (
            lambda c: c["images"][0].update(width=65),
            "val0.jpg: width=65 and height=64, but the file has 64x64 pixels",
        ),
        (lambda c: c["images"][0].update(width="64"), "val0.jpg: width='64' and height=64, but the file has"),
        (
            lambda c: c["images"][1].update(file_name="./val0.jpg"),
            "images with ids 0 and 1 are the same file, .*val0.jpg; remove one",
        ),
        (lambda c: c["images"][1].update(file_name="http://x.org/a/val1.jpg"), "'http://x.org/a/val1.jpg' is a URL"),
        (
            lambda c: [a.update(bbox=[v / 64 for v in a["bbox"]]) for a in c["annotations"]],
            "no box is larger than 1 pixel; bbox must be .* in pixels, not relative to the image",
        ),
        (
            lambda c: c["images"][1].update(file_name="/nowhere/x.jpg"),
            "there is no image /nowhere/x.jpg; make file_name relative to ",
        ),
        (lambda c: c["images"][1].update(file_name=""), "image '' is not in .* or its JPEGImages/"),
        (lambda c: c["categories"].clear(), "has no categories"),
        (
            lambda c: c["images"][1].update(file_name="gone.jpg"),
            "image 'gone.jpg' is not in .* or its JPEGImages/, val/ or val2017/",
        ),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "val has no objects: "),
        (lambda c: c["annotations"].clear(), "val has no objects: "),
    ],
)
def test_invalid_coco_files_raise_one_line(folder, change, text):
    edit(folder, "val", change)
    with pytest.raises(InputError, match=text) as caught:
        open_coco(folder)
    assert "\n" not in str(caught.value)


def test_coco_file_that_is_no_object_and_missing_folder_raise(folder):
    (folder / "annotations/instances_train.json").write_text("[]")
    with pytest.raises(InputError, match="instances_train.json: not a COCO file: expected an object with images"):
        open_coco(folder)
    with pytest.raises(InputError, match="root=/nowhere: no such folder"):
        open_coco("/nowhere")


def respell(folder, how):
    """Move train3.jpg if needed; return its file_name in another spelling."""
    image = folder / "JPEGImages/train3.jpg"
    if how in ("sub-folder", "Windows"):
        (folder / "JPEGImages/a b").mkdir()
        image.rename(folder / "JPEGImages/a b/train3.jpg")
        return "a b/train3.jpg" if how == "sub-folder" else "a b\\train3.jpg"
    if how == "elsewhere":
        (folder.parent / "others").mkdir()
        image.rename(folder.parent / "others/train3.jpg")
        return "../../others/train3.jpg"
    return {
        "absolute": str(image.absolute()),
        "dot": "./train3.jpg",
        "from the folder": "JPEGImages/train3.jpg",
        "address": f"file://{str(image.absolute()).replace('train3', 'train%33')}",
    }[how]


@pytest.mark.parametrize("relative", [False, True], ids=["absolute root", "relative root"])
@pytest.mark.parametrize(
    "how", ["absolute", "dot", "from the folder", "sub-folder", "Windows", "elsewhere", "address"], ids=str
)
def test_file_name_spellings(folder, monkeypatch, how, relative):
    monkeypatch.chdir(folder.parent)
    name = respell(folder, how)
    edit(folder, "train", lambda c: c["images"][3].update(file_name=name))
    data = open_coco("folder" if relative else folder)
    files = DETECTION.calibration_images(data)
    monkeypatch.chdir("/") if not relative else None
    assert len(data.train) == len(files) == 8
    assert Path(files.location(3)).samefile(data.train[3].file)
    assert decode(files.read(3)).shape == decode(data.train[3].file.read_bytes()).shape
    assert [Path(files.location(i)).name for i in range(8)] == [f"train{i}.jpg" for i in range(8)]


def test_open_decodes_all_images_that_are_used(folder):
    file = folder / "JPEGImages/val2.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"val2.jpg: .*; fix it or remove it from the lists"):
        open_coco(folder)
    # Training images without objects are not used.
    file.write_bytes(whole)
    edit(folder, "train", lambda c: c["images"].append({"id": 99, "file_name": "gone.jpg"}))
    assert len(open_coco(folder).train) == 8


def test_missing_sizes_and_category_ids_from_0(folder):
    for split in ("train", "val"):

        def change(content):
            for image in content["images"]:
                image.pop("width")
                image["height"] = None
            for found in content["annotations"]:
                found["category_id"] -= 1
                found.pop("iscrowd")
            for category in content["categories"]:
                category["id"] -= 1

        edit(folder, split, change)
    data = open_coco(folder)
    assert data.classes == ["red", "blue"]
    assert data.val[0].labels.tolist() == [1, 2]


class Truth(nn.Module):
    """Return the true boxes of the validation images; with `stray`, also a false one of class 2 per
    image.
    """

    def __init__(self, data, stray=False):
        super().__init__()
        self.images, self.stray = iter(data.val), stray

    def forward(self, images):
        found = []
        for image in (next(self.images) for _ in images):
            boxes, labels = torch.from_numpy(image.boxes), torch.from_numpy(image.labels)
            if self.stray:
                boxes = torch.cat((boxes, torch.tensor([[0.0, 0, 9, 9]])))
                labels = torch.cat((labels, torch.tensor([2])))
            found.append({"boxes": boxes, "labels": labels, "scores": torch.linspace(0.9, 0.5, len(labels))})
        return found


@pytest.mark.parametrize("stray", [False, True])
def test_categories_absent_from_val_are_logged_and_ignored(folder, stray, log_lines):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1 and a["image_id"] != 2]

    edit(folder, "val", change)
    for split in ("train", "val"):
        edit(folder, split, lambda c: c["categories"].append({"id": 9, "name": "green"}))
    data = open_coco(folder)
    assert log_lines == [
        "warning: train has no box of green (1 of 3)",
        "warning: val has no box of blue, green (2 of 3): mAP is the mean over the others",
    ]
    row = evaluate_detector(Truth(data, stray), data, 64, CONTEXT, batch_size=3)
    assert row == pytest.approx({"map": 1, "map50": 1, "map75": 1})


def test_detector_without_detections_has_map_0(folder):
    class Nothing(nn.Module):
        def forward(self, images):
            none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
            return [none for _ in images]

    data = open_coco(folder)
    assert evaluate_detector(Nothing(), data, 64, CONTEXT, batch_size=3) == {"map": 0, "map50": 0, "map75": 0}


def test_images_in_both_splits_are_logged(folder, log_lines):
    edit(folder, "val", lambda c: c["images"][1].update(file_name="train2.jpg"))
    open_coco(folder)
    assert log_lines == [f"warning: 1 image(s) are in both train and val, for example {folder}/JPEGImages/train2.jpg"]


def test_diverged_detector_raises(folder):
    data = open_coco(folder)
    options = detection(folder, image_size_px=32, epochs=2, batch_size=4, lr=1e30)
    with pytest.raises(RunError, match=r"lr=1e\+30: the loss became NaN or infinite; choose a lower one"):
        DETECTION.measure(small_backbone(), data, options, CONTEXT)
