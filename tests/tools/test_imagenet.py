"""`fastbyol prepare imagenet`, and the list of ImageNet-100."""

import hashlib
import io
import shutil
import tarfile

import numpy as np
import pytest
import scipy.io
from helpers.archives import assert_command, assert_one_line, changed, jpeg, special, tar, tree, without, write_tree

from fastbyol.config import DataConfig
from fastbyol.data import find_images, open_split
from fastbyol.data.subset import read_class_list
from fastbyol.errors import InputError
from fastbyol.tools import image_sets, imagenet
from fastbyol.tools.imagenet import prepare_imagenet

WNIDS = ["n01440764", "n01443537", "n02869837", "n04522168"]
CLASS_OF_VAL = [WNIDS[k] for k in (2, 0, 3, 1, 1, 2, 0, 3)]  # of the images 1 to 8
IDS = {"n02869837": 1, "n01440764": 2, "n04522168": 3, "n01443537": 4}  # ILSVRC2012_ID, an order of its own


@pytest.fixture
def small_imagenet(monkeypatch):
    monkeypatch.setattr(imagenet, "imagenet_wnids", lambda: WNIDS)
    monkeypatch.setattr(imagenet, "TRAIN_IMAGES", 12)
    monkeypatch.setattr(imagenet, "VAL_IMAGES", 8)


def train_images(wnid):
    return {f"{wnid}_{k}.JPEG": jpeg(20 * WNIDS.index(wnid) + k) for k in (7, 12, 10026)}


def val_images():
    return {f"ILSVRC2012_val_{k:08d}.JPEG": jpeg(k + 100) for k in range(1, 9)}


def devkit(ids=IDS, truth=None):
    """Return the kit's files. meta.mat holds a column of structs, also of WordNet's inner nodes."""
    kinds = [(n, object) for n in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    synsets = np.zeros((len(ids) + 1, 1), dtype=[*kinds, ("wordnet_height", object), ("num_train_images", object)])
    rows = [(float(k), wnid, "w", "g", 0.0, np.zeros((1, 0)), 0.0, 3.0) for wnid, k in ids.items()]
    rows.append((float(len(ids) + 1), "n00001740", "entity", "g", 2.0, np.array([[1.0, 2.0]]), 19.0, 0.0))
    for k, row in enumerate(rows):
        synsets[k, 0] = row
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets}, do_compression=True)
    truth = truth or "".join(f"{IDS[wnid]}\n" for wnid in CLASS_OF_VAL)
    root = "ILSVRC2012_devkit_t12"
    return {
        f"{root}/readme.txt": b"",
        f"{root}/data/meta.mat": buffer.getvalue(),
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def official(folder):
    """Write the three official files."""
    folder.mkdir()
    classes = {f"{wnid}.tar": tar(train_images(wnid)) for wnid in WNIDS}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(val_images()))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(devkit(), "w:gz"))
    return folder


def expected_imagenet(splits=("train", "val"), wnids=WNIDS):
    found = {}
    if "train" in splits:
        found |= {f"train/{wnid}/{name}": data for wnid in wnids for name, data in train_images(wnid).items()}
    if "val" in splits:
        named = zip(CLASS_OF_VAL, val_images().items(), strict=True)
        found |= {f"val/{wnid}/{name}": data for wnid, (name, data) in named if wnid in wnids}
    return found


def test_imagenet_from_the_official_files(tmp_path, small_imagenet, caplog):
    source, calls = official(tmp_path / "source"), []
    text = prepare_imagenet(tmp_path / "out", [source], progress=lambda *numbers: calls.append(numbers))
    assert text == f"ImageNet, 4 classes, in {tmp_path / 'out'}: 12 in train/, 8 in val/"
    assert tree(tmp_path / "out") == expected_imagenet()
    assert calls == [(k, 20) for k in range(1, 21)]
    assert caplog.text == ""


def test_imagenet_archives_may_be_anywhere(tmp_path, small_imagenet):
    """Also the kit, as the folder of its unpacked files."""
    source = official(tmp_path / "source")
    write_tree(tmp_path / "kit", devkit())
    (source / "ILSVRC2012_img_val.tar").rename(tmp_path / "v.tar")
    archives = [source / "ILSVRC2012_img_train.tar", tmp_path / "v.tar"]
    prepare_imagenet(tmp_path / "out", archives, devkit=tmp_path / "kit")
    assert tree(tmp_path / "out") == expected_imagenet()


@pytest.mark.parametrize("compression", ["", ":gz"])
def test_imagenet_train_alone(tmp_path, small_imagenet, compression):
    classes = {f"{wnid}.tar": tar(train_images(wnid)) for wnid in WNIDS}
    (tmp_path / "t.tar").write_bytes(tar(classes, f"w{compression}"))
    assert prepare_imagenet(tmp_path / "out", [tmp_path / "t.tar"]).endswith("12 in train/, no val/")
    assert tree(tmp_path / "out") == expected_imagenet(["train"])


def test_imagenet_from_unpacked_folders(tmp_path, small_imagenet):
    """train/ as class folders and val/ flat, as Kaggle has them, with other files around."""
    members = {f"Data/train/{wnid}/{name}": data for wnid in WNIDS for name, data in train_images(wnid).items()}
    members |= {f"Data/val/{name}": data for name, data in val_images().items()}
    members |= {"Data/test/ILSVRC2012_test_00000001.JPEG": b"", "Annotations/val/ILSVRC2012_val_00000001.xml": b""}
    source = write_tree(tmp_path / "source", {**members, **devkit()})
    before = tree(source)
    assert prepare_imagenet(tmp_path / "out", [source]).endswith("12 in train/, 8 in val/ (20 hard-linked)")
    assert tree(tmp_path / "out") == expected_imagenet()
    assert tree(source) == before
    again = prepare_imagenet(tmp_path / "again", [tmp_path / "out"])  # val/ in class folders needs no labels
    assert again.endswith("12 in train/, 8 in val/ (20 hard-linked)")
    assert tree(tmp_path / "again") == expected_imagenet()


def test_imagenet_from_a_folder_of_class_archives(tmp_path, small_imagenet):
    write_tree(tmp_path / "source/train", {f"{wnid}.tar": tar(train_images(wnid)) for wnid in WNIDS})
    prepare_imagenet(tmp_path / "out", [tmp_path / "source"])
    assert tree(tmp_path / "out") == expected_imagenet(["train"])


LISTS = {
    "wnid": lambda k, name, wnid: f"{name} {wnid}",
    "index": lambda k, name, wnid: f"{name} {WNIDS.index(wnid)}",
    "tabs": lambda k, name, wnid: f"val/{wnid}/{name}\t{wnid}",
    "commas": lambda k, name, wnid: f"{name}, {WNIDS.index(wnid)}",
    "kaggle": lambda k, name, wnid: f"{name[:-5]},{wnid} 85 1 499 272 {wnid} 131 0 499 254 ",
    "quoted": lambda k, name, wnid: f'"{name}","{wnid}"',
}


@pytest.mark.parametrize("form", LISTS)
def test_imagenet_labels_from_a_list(tmp_path, small_imagenet, form):
    source = official(tmp_path / "source")
    (source / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"not needed")
    lines = ["ImageId,PredictionString"] if form == "kaggle" else ["# by hand", ""]
    lines += [LISTS[form](k, name, wnid) for k, (name, wnid) in enumerate(zip(val_images(), CLASS_OF_VAL, strict=True))]
    (tmp_path / "val.txt").write_text("\r\n".join(lines))
    prepare_imagenet(tmp_path / "out", [source], val_list=tmp_path / "val.txt")
    assert tree(tmp_path / "out") == expected_imagenet()


def test_imagenet_classes(tmp_path, small_imagenet, caplog):
    """Only those are read: the archives of others may be damaged."""
    source = official(tmp_path / "source")
    classes = {f"{wnid}.tar": tar(train_images(wnid)) if wnid in WNIDS[1:3] else b"damaged" for wnid in WNIDS}
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    (tmp_path / "two.txt").write_text(f"# mine\n{WNIDS[2]}\n\n{WNIDS[1]}\n")
    text = prepare_imagenet(tmp_path / "out", [source], classes=str(tmp_path / "two.txt"))
    assert text.startswith("ImageNet, 2 classes")
    assert tree(tmp_path / "out") == expected_imagenet(wnids=WNIDS[1:3])
    assert caplog.text == ""


def test_imagenet100_is_the_published_list():
    names = list(read_class_list("imagenet100").values())
    assert len(set(names)) == 100
    assert set(names) < set(imagenet.imagenet_wnids())
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    assert digest == "d61d354b64beb3ce2c2c9cf04a874298362dc9fcd589e15ee34c5e4592145746"


def test_imagenet100(tmp_path):
    wnids = read_class_list("imagenet100").values()
    other = "n01440764"
    assert other not in wnids
    members = {f"train/{wnid}/{wnid}_1.JPEG": jpeg(k) for k, wnid in enumerate([*wnids, other])}
    source = write_tree(tmp_path / "source", members)
    assert "100 classes" in prepare_imagenet(tmp_path / "out", [source], classes="imagenet100")
    assert open_split(tmp_path / "out", "train").classes == sorted(wnids)
    config = DataConfig(root=str(source), classes=["imagenet100"])
    assert find_images(config, "train").classes == sorted(wnids)


def test_imagenet_wnids_are_the_sorted_1000():
    wnids = imagenet.imagenet_wnids()
    assert (len(wnids), wnids == sorted(wnids), wnids[0], wnids[-1]) == (1000, True, "n01440764", "n15075141")
    assert set(image_sets.IMAGENETTE_COUNTS) < set(wnids)


def test_other_numbers_of_imagenet_are_a_warning(tmp_path, small_imagenet, caplog):
    members = expected_imagenet()
    members = without(members, f"{WNIDS[1]}_7.JPEG", "val_00000003")
    source = write_tree(tmp_path / "source", members)
    prepare_imagenet(tmp_path / "plain", [source])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"--source {source}: {n} instead of {m}" for n, m in (("11 train images", 12), ("7 val images", 8))
    ]
    caplog.clear()
    kit = write_tree(tmp_path / "kit", devkit())
    shutil.rmtree(source / "val")
    prepare_imagenet(tmp_path / "counted", [source], devkit=kit)
    assert [record.getMessage() for record in caplog.records] == [
        f"--source {source}: train/{WNIDS[1]} has 2 images instead of 3"
    ]


def bad_list(text):
    return lambda folder: {"val_list": write_tree(folder, {"l.txt": text.encode()}) / "l.txt"}


def bad_kit(members):
    return lambda folder: {"devkit": write_tree(folder / "kit", members())}


def bad_classes(text):
    return lambda folder: {"classes": str(write_tree(folder, {"c.txt": text.encode()}) / "c.txt")}


def replace_train(change):
    def replace(folder):
        path = folder / "source" / "ILSVRC2012_img_train.tar"
        path.write_bytes(change({f"{wnid}.tar": tar(train_images(wnid)) for wnid in WNIDS}))
        return {}

    return replace


def replace_val(change):
    def replace(folder):
        (folder / "source" / "ILSVRC2012_img_val.tar").write_bytes(change(val_images()))
        return {}

    return replace


def remove_kit(folder):
    (folder / "source" / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    return {}


def add_unpacked(folder):
    write_tree(folder / "source", {f"train/{WNIDS[0]}/{WNIDS[0]}_7.JPEG": b"x"})
    return {}


def wrong_folder(folder):
    write_tree(folder / "flat", {f"{WNIDS[0]}/ILSVRC2012_val_00000001.JPEG": b"x"})
    kit = folder / "source" / "ILSVRC2012_devkit_t12.tar.gz"
    return {"source": [folder / "flat"], "devkit": kit}


GOOD = [f"{name} {wnid}" for name, wnid in zip(val_images(), CLASS_OF_VAL, strict=True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_kit, "val_00000001.JPEG: validation images need their classes: add --devkit"),
        (
            bad_list("\n".join([*GOOD[:3], "x.jpg n01440764", *GOOD[3:], "a", "ILSVRC2012_val_00000001.JPEG 4"])),
            "l.txt: lines 4, 10, 11: expected a name",
        ),
        (bad_list("\n".join([*GOOD, "ILSVRC2012_val_00000001.JPEG n00000000"])), "line 9: expected a name like"),
        (
            bad_list("\n".join([*GOOD, f"ILSVRC2012_val_00000001.JPEG {WNIDS[0]}"])),
            "line 9: .*is listed before, with class n02869837",
        ),
        (bad_list("\n".join(GOOD[:-1])), "val_00000008.JPEG: has no class in --val-list"),
        (
            bad_list("\n".join([*GOOD, f"ILSVRC2012_val_00000009.JPEG {WNIDS[0]}"])),
            "1 of 9 validation images are missing: ILSVRC2012_val_00000009",
        ),
        (bad_list("# none\n"), "lists no images"),
        (bad_list("a\0b"), "l.txt: not a text file"),
        (lambda folder: {"val_list": folder / "no.txt"}, "--val-list .*no.txt: No such file"),
        (lambda folder: {"devkit": folder / "no"}, "--devkit .*no: No such file"),
        (lambda folder: {"devkit": folder, "val_list": folder}, "give only one of them"),
        (bad_kit(lambda: without(devkit(), "meta")), "there is no meta.mat in it"),
        (bad_kit(lambda: without(devkit(), "truth")), "there is no ILSVRC2012_validation_ground_truth.txt in it"),
        (bad_kit(lambda: changed(devkit(), "meta", lambda data: data[:300])), "meta.mat cannot be read: "),
        (bad_kit(lambda: changed(devkit(), "meta", lambda data: b"?" * 500)), "meta.mat cannot be read: "),
        (bad_kit(lambda: devkit(ids={"n01440764": 1})), "meta.mat lists 1 classes, which are not ImageNet's 4"),
        (
            bad_kit(lambda: devkit(truth="1\n2\nx\n5\n1\n1\n1\n1\n")),
            "ground_truth.txt: lines 3, 4: expected a number from 1 to 4",
        ),
        (bad_kit(lambda: devkit(truth="1\n2\n")), "ground_truth.txt has 2 lines instead of 8: truncated"),
        (bad_classes("n01440764\nn00000000\n\ncat"), "--classes .*c.txt: lines 2, 4: expected one wnid of ImageNet"),
        (bad_classes("n01440764\nn01440764"), "names a class twice"),
        (bad_classes("#\n"), "names no class"),
        (lambda folder: {"classes": "imagenet10"}, "--classes imagenet10: No such file"),
        (replace_train(lambda classes: tar(classes)[:5000]), "train.tar.*truncated or damaged"),
        (
            replace_train(lambda classes: tar({**classes, f"{WNIDS[2]}.tar": tar(train_images(WNIDS[2]))[:1500]})),
            f"{WNIDS[2]}.tar: .*truncated or damaged",
        ),
        (
            replace_train(lambda classes: tar(without(classes, WNIDS[1]))),
            f"no images of train/{WNIDS[1]}; --classes FILE prepares only",
        ),
        (
            replace_train(lambda classes: tar({**classes, "n00000000.tar": tar({})})),
            "n00000000.tar: n00000000 is no class of ImageNet-1k",
        ),
        (
            replace_train(lambda classes: tar({**classes, "n01440764.tar": tar({"n00000000_1.JPEG": b""})})),
            "n00000000 is no class",
        ),
        (
            replace_train(
                lambda classes: tar(
                    {**classes, "n01440764.tar": tar({"": special("n01440764_1.JPEG", tarfile.SYMTYPE, "/etc/passwd")})}
                )
            ),
            "n01440764.tar: .*is a link",
        ),
        (
            replace_train(lambda classes: tar({**classes, "x/n01440764.tar": classes["n01440764.tar"]})),
            "the source has train/n01440764/.*twice",
        ),
        (replace_val(lambda images: tar(images)[:-10240]), "val.tar.*truncated or damaged"),
        (
            replace_val(lambda images: tar(without(images, "03", "05"))),
            "2 of 8 validation images are missing: ILSVRC2012_val_00000003.JPEG, ILSVRC2012_val_00000005.JPEG$",
        ),
        (add_unpacked, "train images are in an archive .* and in a folder .*: name only one"),
        (wrong_folder, "is in the folder of n01440764, but its class is n02869837 by --devkit"),
        (lambda folder: {"source": [write_tree(folder / "e", {"a.txt": b""})]}, "holds no images of ImageNet"),
        (lambda folder: {"source": []}, "--source: must not be empty"),
        (lambda folder: {"source": [folder / "no"]}, "--source .*no: No such file"),
    ],
)
def test_unusable_imagenet_is_one_line(tmp_path, small_imagenet, change, message):
    official(tmp_path / "source")
    arguments = {"source": [tmp_path / "source"], **change(tmp_path)}
    assert_one_line(tmp_path, lambda out: prepare_imagenet(out, **arguments), message)


def test_missing_labels_are_noticed_before_anything_is_written(tmp_path, small_imagenet):
    official(tmp_path / "source")
    remove_kit(tmp_path)
    with pytest.raises(InputError, match="validation images need their classes"):
        prepare_imagenet(
            tmp_path / "out", [tmp_path / "source"], progress=lambda *_: pytest.fail("images were written")
        )


def test_the_command_prepares_and_never_overwrites(tmp_path, small_imagenet, capsys):
    source = official(tmp_path / "imagenet")
    (tmp_path / "val.txt").write_text("\n".join(GOOD))
    archives = f"{source}/ILSVRC2012_img_train.tar,{source}/ILSVRC2012_img_val.tar"
    words = ["--source", archives, "--val-list", str(tmp_path / "val.txt")]
    assert_command(tmp_path, capsys, "imagenet", words, "12 in train/, 8 in val/")
