"""Paths of the user: ~, data sets that move, and roots that are a split."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.common import jpeg

from fastbyol.api import train
from fastbyol.cli import COMMANDS, main
from fastbyol.config import Config, DataConfig
from fastbyol.data import find_images, open_split
from fastbyol.data.folder import index_folder
from fastbyol.data.pack import pack
from fastbyol.errors import InputError
from fastbyol.evaluation.features import check_splits, open_splits
from fastbyol.evaluation.options import EVALUATIONS, FinetuneEval, KnnEval
from fastbyol.evaluation.run import evaluate
from fastbyol.settings.command_line import parse_command_line
from fastbyol.settings.types import expand_path
from fastbyol.tools.preview import write_preview


def new_config(root, **data):
    return Config(data=DataConfig(root=str(root), **data))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder and a different working directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


# --- ~ ---


def test_home_is_expanded_in_all_paths_of_a_config(home):
    config = Config(
        runs="~/runs",
        init="~/w.safetensors",
        resume="~/c.pt",
        data=DataConfig(root="~/d", file_list="~/l", train_split="~/t", val_split="~/v"),
    )
    data = config.data
    found = (config.runs, config.init, config.resume, data.root, data.file_list, data.train_split, data.val_split)
    assert found == tuple(f"{home}/{name}" for name in ("runs", "w.safetensors", "c.pt", "d", "l", "t", "v"))
    assert Config.from_dict(config.to_dict()) == config
    options = FinetuneEval(run="~/r", root="~/d", train_split="~/t", val_split="~/v", out="~/o", save="~/s")
    found = (options.run, options.root, options.train_split, options.val_split, options.out, options.save)
    assert found == tuple(f"{home}/{name}" for name in ("r", "d", "t", "v", "o", "s"))


def test_values_that_are_not_paths_are_unchanged(home):
    config = Config(init="timm:resnet18", resume="auto", data=DataConfig(root="./~x"))
    assert (config.runs, config.init, config.resume) == ("runs", "timm:resnet18", "auto")
    assert config.data.root == f"{home.parent}/work/~x"
    assert expand_path("./~x", "key") == "./~x"
    assert expand_path("a/~", "key") == "a/~"
    assert expand_path("$HOME", "key") == "$HOME"
    assert expand_path("~root", "key") == str(Path("~root").expanduser())
    options = parse_command_line(["pack", "~/a", "./~b"], COMMANDS).options
    assert (options.source, options.out) == (str(Path.home() / "a"), Path("./~b"))


@pytest.mark.parametrize("path", ["~nobody-of-this-name", "~nobody-of-this-name/x"])
def test_an_unknown_home_creates_no_folder(path):
    for key, make in (("data.root", lambda: DataConfig(root=path)), ("runs", lambda: Config(runs=path))):
        with pytest.raises(ValueError, match=f"^{key}='{path}': this home folder is not known"):
            make()


def test_an_empty_root_is_not_the_working_directory():
    with pytest.raises(ValueError, match=r"^data.root='': must not be empty"):
        DataConfig(root="")


# --- roots that move ---


def test_roots_do_not_depend_on_the_working_directory(folder_of, tmp_path, monkeypatch):
    root = folder_of({f"{split}/{c}/1.jpg": b"" for split in ("train", "val") for c in "ab"})
    (root / "list").write_text("a/1.jpg")
    monkeypatch.chdir(root.parent)
    config = new_config("files/../files", file_list="files/list")
    monkeypatch.chdir("/")
    stored = Config.from_dict(config.to_dict())
    assert find_images(stored.data, "train").paths == ["a/1.jpg"]
    assert stored.data.root == f"{root.parent}/files/../files"  # '..' may follow a link
    assert len(open_splits(KnnEval(run="x"), stored).train) == 2


def test_roots_of_old_checkpoints_are_relative_to_the_working_directory(folder_of, monkeypatch):
    root = folder_of({f"{split}/{c}/1.jpg": b"" for split in ("train", "val") for c in "ab"})
    values = new_config(root).to_dict()
    values["data"]["root"] = "files"
    monkeypatch.chdir(root.parent)
    assert len(open_splits(KnnEval(run="x"), Config.from_dict(values)).train) == 2


def test_a_relative_root_without_working_directory_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ValueError, match=r"data.root='x': the working directory is gone"):
        DataConfig(root="x")
    assert DataConfig(root="/x").root == "/x"


def test_evaluation_with_another_root_and_splits(folder_of, tmp_path):
    root = folder_of({f"{split}/{c}/1.jpg": b"" for split in ("train", "val") for c in "ab"})
    config = new_config(root)
    shutil.copytree(root / "val", root / "holdout")
    shutil.move(root, tmp_path / "moved")
    with pytest.raises(InputError, match=f"^root: data set {root} does not exist; name it with --root$"):
        open_splits(KnnEval(run="x"), config)
    with pytest.raises(InputError, match="^root: data set /nowhere does not exist$"):
        open_splits(KnnEval(run="x", root="/nowhere"), config)
    moved = str(tmp_path / "moved")
    splits = open_splits(KnnEval(run="x", train_split=f"{moved}/val", val_split=f"{moved}/train"), config)
    assert [split.root.name for split in splits] == ["val", "train"]
    with pytest.raises(InputError, match="; name it with --root$"):
        open_splits(KnnEval(run="x", train_split=f"{moved}/val"), config)
    splits = open_splits(KnnEval(run="x", root=moved, val_split="holdout"), config)
    assert [split.root.name for split in splits] == ["train", "holdout"]
    splits = open_splits(KnnEval(run="x", train_split=f"{moved}/val", val_split=f"{moved}/train", root=moved), config)
    assert [split.root.name for split in splits] == ["val", "train"]
    with pytest.raises(
        InputError,
        match=r"there is no folder .*hold or file .*hold.beton; there is train, val; val_split=PATH names another",
    ):
        open_splits(KnnEval(run="x", root=moved, val_split="hold"), config)


@pytest.mark.parametrize("protocol", ["segmentation", "detection"])
def test_formats_with_fixed_splits_reject_split_options(protocol):
    with pytest.raises(ValueError, match=r"val_split='x': must not be set: the (VOC|COCO) format defines the splits"):
        EVALUATIONS[protocol](run="x", root="/x", val_split="x")


# --- a root that is the training split ---


@pytest.mark.parametrize("names", [("1.jpg", "2.jpg"), ("a/1.jpg", "b/2.jpg"), ("a/x/1.jpg", "b/2.jpg")])
def test_a_root_without_splits_is_the_training_split(folder_of, names):
    root = folder_of(dict.fromkeys([*names, "readme.txt"], b""))
    data = DataConfig(root=str(root))
    images = find_images(data, "train")
    assert images.paths == list(names)
    assert images.notes == (
        f"data.root={root} is the training split itself, since it has no train/",
        f"{root}: left out: 1 .txt",
    )
    with pytest.raises(InputError, match=f"there is no folder {root}/val or file {root}/val.beton"):
        find_images(data, "val")
    assert find_images(DataConfig(root=str(root), train_split="."), "train").notes == images.notes[1:]


def test_a_root_may_be_a_file(folder_of, tmp_path):
    root = folder_of({f"train/{c}/{i}.jpg": jpeg(i) for c in "ab" for i in range(2)})
    for name in ("x.beton", "y.beton"):
        pack(index_folder(root / "train"), tmp_path / name, mode="jpg")
    file = tmp_path / "x.beton"
    for split in ("train", "."):
        found = find_images(DataConfig(root=str(file), train_split=split), "train")
        assert (found.root, len(found)) == (file, 4)
        assert found.notes == ((f"data.root={file} is the training split itself",) if split == "train" else ())
    with pytest.raises(InputError, match=r"x.beton is one file, the training split; data.val_split names another"):
        find_images(DataConfig(root=str(file)), "val")
    with pytest.raises(
        InputError, match=r"x.beton: this file is one split, and there is no .*other next to it; data.train_split=. is"
    ):
        find_images(DataConfig(root=str(file), train_split="other"), "train")
    for val in (str(tmp_path / "y.beton"), "y.beton", "y"):  # an absolute path, or a name next to the file
        splits = open_splits(KnnEval(run="x", root=str(file), val_split=val), new_config(root))
        assert [split.root.name for split in splits] == ["x.beton", "y.beton"]
        assert find_images(DataConfig(root=str(file), val_split=val), "val").root.name == "y.beton"
    with pytest.raises(InputError, match=r"^root=.*x.beton is one file, the training split; val_split names another"):
        open_splits(KnnEval(run="x", root=str(file)), new_config(root))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Train/a/1.jpg"], "did you mean data.train_split=Train?"),
        (["training/a/1.jpg", "x/1.jpg"], "did you mean data.train_split=training?"),
        (["train2017/1.jpg", "val2017/1.jpg"], "did you mean data.train_split=train2017?"),
        (["train_packed.beton"], "did you mean data.train_split=train_packed.beton?"),
        (["val/a/1.jpg", "a/1.jpg"], "there is val; data.train_split=. takes all of "),
        (["imagenet.beton", "a/1.jpg"], "there is imagenet.beton"),
        (
            ["cifar/train/a/1.jpg", "cifar/val/a/1.jpg"],
            "cifar/train/a/1.jpg lies in a split: name the folder that holds",
        ),
        (["1.jpg", "a/2.jpg"], "mixes images (1.jpg) and class folders (a)"),
        (["a/1.txt"], "no images in "),
        (["a/1.txt"], "(it has no folder train/ and no file train.beton)"),
    ],
)
def test_ambiguous_roots_are_rejected(folder_of, names, message):
    root = folder_of(dict.fromkeys(names, b""))
    with pytest.raises(InputError) as caught:
        find_images(DataConfig(root=str(root)), "train")
    assert message in str(caught.value)
    assert "data.root=" in str(caught.value)


def test_a_validation_split_inside_the_root_is_not_a_class(folder_of, tmp_path):
    root = folder_of({"a/1.jpg": b"", "b/1.jpg": b"", "holdout/a/1.jpg": b"", "holdout/b/1.jpg": b""})
    for val in ("holdout", str(root / "holdout")):
        with pytest.raises(InputError, match="there is no folder .*/train or file"):
            find_images(DataConfig(root=str(root), val_split=val), "train")
    shutil.move(root / "holdout", tmp_path / "holdout")
    for val in ("../holdout", str(tmp_path / "holdout")):
        data = DataConfig(root=str(root), val_split=val)
        assert find_images(data, "train").classes == find_images(data, "val").classes == ["a", "b"]


@pytest.mark.parametrize("path", ["x.zip", "x.zip/train"])
def test_an_impossible_root_is_one_line(tmp_path, path):
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"data.root=.*(unpack it|there is no folder)"):
        find_images(DataConfig(root=str(tmp_path / path)), "train")
    with pytest.raises(InputError, match=r"source=.*(unpack it|there is no folder)"):
        open_split(tmp_path / path, ".", key="source")


# --- notes about skipped files ---


def test_every_command_reports_skipped_files_once(photos, make_config, tmp_path, capsys, one_thread, log_lines):
    root = tmp_path / "data"
    shutil.copytree(photos, root)
    (root / "train/moon/deep").mkdir()
    (root / "train/moon/deep/1.heic").touch()
    (root / "val/README").touch()
    notes = [f"{root}/train: left out: 1 .heic", f"{root}/val: left out: 1 without extension"]
    config = make_config(data={"root": str(root)}, optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 1})
    folder = train(config).folder
    out = capsys.readouterr().out
    assert [out.count(f"warning: {note}\n") for note in notes] == [1, 1]
    assert json.loads((folder / "config.json").read_text())["data"]["root"] == str(root)
    log_lines.clear()
    evaluate("knn", KnnEval(run=str(folder), baselines=False))
    assert log_lines[:2] == [f"warning: {note}" for note in notes]
    log_lines.clear()
    write_preview(config, tmp_path / "p.png")
    assert log_lines == [f"warning: {notes[0]}"]
    capsys.readouterr()
    assert main(["pack", str(root / "train"), str(tmp_path / "x.beton"), "--mode", "jpg"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"warning: {notes[0]}"


# --- classes of two splits ---


def test_check_splits_reports_both_sides(folder_of):
    root = folder_of({f"train/{c}/1.jpg": b"" for c in "abcdefgh"} | {f"val/{c}/1.jpg": b"" for c in ("a", "x")})
    (root / "val/b").mkdir()
    with pytest.raises(InputError) as caught:
        check_splits(open_split(root, "train"), open_split(root, "val"))
    assert str(caught.value) == (
        f"{root}/train and {root}/val have different classes: 7 of 8 in {root}/train are not in {root}/val: "
        f"b, c, d, e, f (+2 more), where folder b has no images; 1 of 2 in {root}/val are not in {root}/train: x"
    )


def test_flat_splits_and_numbers_for_names(folder_of, tmp_path):
    root = folder_of({f"train/{c}/1.jpg": jpeg(0) for c in ("0", "1", "10", "2")} | {"val/1.jpg": b""})
    train = open_split(root, "train")
    with pytest.raises(InputError, match=r"4 of 4 in .*train are not in .*val, which has no classes"):
        check_splits(train, open_split(root, "val"))
    with pytest.raises(InputError, match=r"val has 0 class\(es\): a classifier needs at least 2"):
        check_splits(open_split(root, "val"), train)
    numbered = dataclasses.replace(train, classes=["0", "1", "2", "10"])  # as in a file without names
    with pytest.raises(InputError, match="the order of their classes differs"):
        check_splits(train, numbered)


def test_names_in_a_packed_file_are_numbered_as_in_a_folder(folder_of, tmp_path):
    """Also if another system or an older version wrote them in another order."""
    root = folder_of({f"train/{c}/{i}.jpg": jpeg(i) for c in ("a", "e\u0301", "z") for i in range(2)})
    folder = open_split(root, "train")
    assert folder.classes == ["a", "z", "\u00e9"]
    pack(folder, tmp_path / "x.beton", mode="jpg")
    old = folder.with_labels(np.array([0, 0, 1, 1, 2, 2]), ["a", "e\u0301", "z"])
    pack(old, tmp_path / "y.beton", mode="jpg")
    for name in ("x.beton", "y.beton"):
        packed = open_split(tmp_path, name)
        assert packed.classes == folder.classes
        assert packed.labels.tolist() == folder.labels.tolist() == [0, 0, 2, 2, 1, 1]


def test_a_packed_files_fingerprint(folder_of, tmp_path):
    root = folder_of({f"train/{c}/{i}.jpg": jpeg(i) for c in "ab" for i in range(2)})
    pack(open_split(root, "train"), tmp_path / "x.beton", mode="jpg")
    first = open_split(tmp_path, "x.beton").fingerprint()
    assert {name: count for name, (count, _) in first.items()} == {"a": 2, "b": 2}
    shutil.move(tmp_path / "x.beton", tmp_path / "y.beton")
    assert open_split(tmp_path, "y.beton").fingerprint() == first
    (root / "train/b/1.jpg").write_bytes(jpeg(7))  # as large in pixels, not in bytes
    pack(open_split(root, "train"), tmp_path / "z.beton", mode="jpg")
    changed = open_split(tmp_path, "z.beton").fingerprint()
    assert changed["a"] == first["a"]
    assert changed["b"] != first["b"]
