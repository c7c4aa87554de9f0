"""fastbyol embed: features of any images in files."""

import csv
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.common import jpeg
from helpers.torchrun import torchrun
from pyarrow import parquet
from torch import nn

from fastbyol.api import train
from fastbyol.cli import main
from fastbyol.data import open_split
from fastbyol.data.folder import ImageFolder
from fastbyol.data.pack import pack
from fastbyol.errors import InputError, RunError
from fastbyol.evaluation import embed as embedding
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.embed import embed
from fastbyol.evaluation.features import extract_features
from fastbyol.evaluation.options import EmbedConfig
from fastbyol.runtime.distributed import World
from fastbyol.runtime.files import FolderLock
from fastbyol.weights.load import load_checkpoint_model

SHARD = 7
BAD = {4, 15}  # of 20 images: one in the first shard, one in the last


@pytest.fixture
def run(make_config):
    config = make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0}, precision="fp32")
    return train(config).folder


@pytest.fixture
def images(folder_of):
    """20 images of two classes, two of them damaged."""
    files = {f"{'ab'[i // 10]}/{i:02d}.jpg": b"no" if i in BAD else jpeg(i) for i in range(20)}
    return folder_of(files)


def options(run, images, out, **changes):
    return EmbedConfig(run=str(run), images=str(images), out=str(out), shard_images=SHARD, **changes)


def read(out):
    """Return the features of all shards, and the rows of their tables."""
    files = sorted(out.glob("features-*.npy"))
    tables = [(out / f"images-{file.stem[-5:]}.csv").read_text(encoding="utf-8") for file in files]
    rows = [row for text in tables for row in csv.DictReader(text.splitlines())]
    return np.concatenate([np.load(file) for file in files]), rows


def test_features_of_a_folder(run, images, tmp_path, log_lines):
    out = embed(options(run, images, tmp_path / "out"))
    features, rows = read(out)
    _, _, model, step = load_checkpoint_model(run)
    context = EvalContext(size=32, device=torch.device("cpu"), dtype=torch.float32, threads=1)
    expected = extract_features(model.online.backbone, open_split(images, "."), context, None)
    good = [i for i in range(20) if i not in BAD]
    assert features.dtype == np.float16 and features.shape == (18, model.num_features)
    assert np.abs(features - expected.rows(slice(None)).numpy()).max() < 2e-3 * np.abs(features).max()
    assert [(int(r["index"]), r["name"], r["class"]) for r in rows] == [
        (i, f"{'ab'[i // 10]}/{i:02d}.jpg", "ab"[i // 10]) for i in good
    ]
    assert [len(np.load(file)) for file in sorted(out.glob("*.npy"))] == [6, 7, 5]
    assert (out / "skipped-00000.csv").read_text().startswith("index,name,reason\n4,a/04.jpg,")
    assert not (out / "skipped-00001.csv").exists()
    assert (out / "skipped-00002.csv").read_text().startswith("index,name,reason\n15,b/15.jpg,")
    assert sum(line.startswith("warning: skipped ") for line in log_lines) == 2
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["step"], meta["count"], meta["shape"]) == (step, 20, [model.num_features])


def test_features_do_not_depend_on_storage_and_format(run, images, tmp_path):
    expected, rows = read(embed(options(run, images, tmp_path / "folder")))
    pack(open_split(images, "."), tmp_path / "images.beton", mode="jpg", skip_bad=True)
    packed, _ = read(embed(options(run, tmp_path / "images.beton", tmp_path / "packed")))
    out = embed(options(run, images, tmp_path / "parquet", format="parquet"))
    tables = [parquet.read_table(path) for path in sorted(out.glob("*.parquet"))]
    assert packed.shape == expected.shape
    # Batches of other sizes are rounded otherwise.
    assert np.abs(packed - expected).max() < 2e-3 * np.abs(expected).max()
    assert np.array_equal(np.concatenate([np.stack(t["features"].to_numpy()) for t in tables]), expected)
    columns = [{"index": str(i), "name": n, "class": c} for t in tables for i, n, c in zip(*t.columns[:3], strict=True)]
    assert [{k: str(v) for k, v in row.items()} for row in columns] == rows


def test_patches_average_to_the_pooled_features(run, images, tmp_path):
    pooled, rows = read(embed(options(run, images, tmp_path / "pooled")))
    patches, same = read(embed(options(run, images, tmp_path / "patches", features="patches")))
    assert patches.shape == (*pooled.shape, 1, 1) and same == rows
    assert np.abs(patches[..., 0, 0] - pooled).max() < 2e-3 * np.abs(pooled).max()


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224"])
def test_patches_are_the_grid_before_pooling(backbone):
    import timm

    network = timm.create_model(backbone, num_classes=0).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        patches, pooled = embedding.Patches(network)(x), network(x)
        if backbone == "resnet18":
            assert torch.allclose(patches.mean((2, 3)), pooled, atol=1e-5)
        else:
            tokens = network.forward_features(x)[:, 1:]  # after the final norm, without the class token
            assert torch.allclose(patches.flatten(2).mT, tokens, atol=1e-5)


def test_an_ended_command_continues(run, images, tmp_path, monkeypatch):
    expected, rows = read(embed(options(run, images, tmp_path / "whole")))
    out, write = tmp_path / "out", embedding._write_npy
    saved = []

    def end_at_the_third(path, features):
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(features)
        write(path, features)

    monkeypatch.setattr(embedding, "_write_npy", end_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed(options(run, images, out))
    monkeypatch.undo()
    assert sorted(path.name for path in out.glob("features-*")) == ["features-00000.npy", "features-00001.npy"]
    (out / ".a1b2c3d4.partial").write_bytes(b"left by SIGKILL")
    times = {path: path.stat().st_mtime_ns for path in out.glob("features-*")}
    shutil.move(images, tmp_path / "moved")  # the same run and images, found elsewhere
    shutil.copytree(run, tmp_path / "copy")
    embed(options(tmp_path / "copy", tmp_path / "moved", out))
    features, table = read(out)
    assert np.array_equal(features, expected) and table == rows
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert not list(out.glob(".*.partial"))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    embed(options(run, tmp_path / "moved", out))
    assert all(path.stat().st_mtime_ns == value for path, value in before.items())


def test_a_folder_of_other_features_is_left_alone(run, images, tmp_path, folder_of):
    out = embed(options(run, images, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.copytree(images, tmp_path / "changed")
    (tmp_path / "changed" / "a" / "00.jpg").write_bytes(jpeg(99))
    checkpoint = max((run / "checkpoints").glob("step_*.pt"))
    state = torch.load(checkpoint, weights_only=False)
    name = next(key for key in state["model"] if key.startswith("online.backbone") and key.endswith("weight"))
    state["model"][name] += 1
    torch.save(state, tmp_path / "other.pt")
    for changes, message in (
        ({"features": "patches"}, "features is pooled, not patches"),
        ({"format": "parquet"}, "format is npy, not parquet"),
        ({"images": str(tmp_path / "changed")}, "images is .*files, not .*changed"),
        ({"run": str(tmp_path / "other.pt")}, "checkpoint is .*step_.*, not .*other.pt"),
    ):
        with pytest.raises(InputError, match=f"out: holds other features: {message}; name another folder"):
            embed(EmbedConfig(**vars(options(run, images, out)) | changes))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="foreign: is neither empty nor written by this version of fastbyol embed"):
        embed(options(run, images, foreign))
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    (foreign / "thesis.tex").rename(foreign / ".film.partial")
    for content in ('{"format": "of another program"}', '{"content": {}}', "no JSON"):
        (foreign / "meta.json").write_text(content)
        with pytest.raises(InputError, match="foreign: is neither empty nor written by this version of fastbyol embed"):
            embed(options(run, images, foreign))
        assert sorted(path.name for path in foreign.iterdir()) == [".film.partial", "meta.json"]
    with FolderLock(out), pytest.raises(InputError, match="another run writes into it .* choose another --out"):
        embed(options(run, images, out))


def test_mistakes_are_one_line(run, images, tmp_path, monkeypatch, capsys):
    words = ["--run", str(run), "--images", str(images), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "has_module", lambda name: False)
        assert main(["embed", *words, "--format", "parquet"]) == 2
    assert capsys.readouterr().err == (
        "fastbyol: error: --format parquet: pyarrow is not installed: pip install pyarrow\n"
    )
    assert main(["embed", *words[:2], "--images", str(tmp_path / "none"), *words[4:]]) == 2
    assert "--images=" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing was written


def test_features_that_are_not_finite_raise(run, images, tmp_path, monkeypatch):
    class Large(nn.Module):
        def forward(self, x):
            return torch.stack([torch.full((len(x),), 7e4), torch.ones(len(x))], 1)

    outputs = embedding.network_outputs
    monkeypatch.setattr(embedding, "network_outputs", lambda network, *args, **kw: outputs(Large(), *args, **kw))
    monkeypatch.setattr(embedding, "output_shape", lambda *args: (2,))
    with pytest.raises(RunError, match=r"a/00.jpg: the features hold NaN, infinity or values too large for float16"):
        embed(options(run, images, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("features-*"))


def test_a_shard_of_unreadable_images_is_empty(run, folder_of, tmp_path):
    images = folder_of({f"{i}.jpg": b"no" if i < SHARD else jpeg(i) for i in range(9)})
    for form in ("npy", "parquet"):
        embed(options(run, images, tmp_path / form, format=form))
    features, rows = read(tmp_path / "npy")
    assert len(features) == 2 and [row["class"] for row in rows] == ["", ""]  # the images have no classes
    assert np.load(tmp_path / "npy" / "features-00000.npy").shape == (0, features.shape[1])
    assert parquet.read_table(tmp_path / "parquet" / "features-00000.parquet").num_rows == 0


def test_a_set_without_a_readable_image_raises(run, folder_of, tmp_path):
    images = folder_of({f"{i}.jpg": b"no" for i in range(9)})
    for _ in range(2):
        with pytest.raises(InputError, match="none of the 9 images can be read, for example .*0.jpg"):
            embed(options(run, images, tmp_path / "out"))


def test_files_that_are_lost_or_empty_are_written_again(run, images, tmp_path):
    expected, rows = read(embed(options(run, images, tmp_path / "out")))
    (tmp_path / "out" / "images-00000.csv").unlink()
    (tmp_path / "out" / "features-00001.npy").write_bytes(b"")
    (tmp_path / "out" / "features-00002.npy").unlink()
    features, table = read(embed(options(run, images, tmp_path / "out")))
    assert np.array_equal(features, expected) and table == rows


def test_progress_covers_all_shards(run, images, tmp_path, monkeypatch, log_lines):
    monkeypatch.setattr("fastbyol.evaluation.context.clock", itertools.count(0, 6).__next__)
    embed(options(run, images, tmp_path / "out"))
    assert [line for line in log_lines if "left" in line] == ["features: 14 of 20 images, 5 s left"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_shard_whose_files_cannot_be_read_is_not_written(run, images, tmp_path, monkeypatch, code):
    """A disk that comes back must not leave a hole."""
    expected, rows = read(embed(options(run, images, tmp_path / "whole")))
    read_image = ImageFolder.read

    def lost(self, index):
        if self.name(index).startswith("b/"):
            raise OSError(code, os.strerror(code), self.location(index))
        return read_image(self, index)

    content = embedding._content
    monkeypatch.setattr(
        embedding, "_content", lambda images: [content(images), monkeypatch.setattr(ImageFolder, "read", lost)][0]
    )
    with pytest.raises(RunError, match=f"b/10.jpg: {os.strerror(code)}; 4 of 7 files of this shard cannot be read"):
        embed(options(run, images, tmp_path / "out"))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").glob("features-*")] == ["features-00000.npy"]
    embed(options(run, images, tmp_path / "out"))
    found, table = read(tmp_path / "out")
    assert np.array_equal(found, expected) and table == rows


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_disk_that_fails_for_a_moment_leaves_no_hole(run, images, tmp_path, monkeypatch, failures):
    """Files that can be read later are read again, up to two times."""
    expected, rows = read(embed(options(run, images, tmp_path / "whole")))
    original, reads = ImageFolder.read, Counter()

    def failing(self, index):
        name = self.name(index)
        reads[name] += 1
        # The features and a check read an image in turn; the check succeeds.
        if name in {"a/01.jpg", "a/02.jpg"} and reads[name] in range(1, 2 * failures, 2):
            raise OSError(errno.EIO, "Input/output error")
        return original(self, index)

    content = embedding._content
    monkeypatch.setattr(
        embedding, "_content", lambda images: [content(images), monkeypatch.setattr(ImageFolder, "read", failing)][0]
    )
    if failures == 3:
        with pytest.raises(RunError, match=r"a/01.jpg: can be read only at times; 2 of 7 files of this shard cannot"):
            embed(options(run, images, tmp_path / "out"))
        return
    found, table = read(embed(options(run, images, tmp_path / "out")))
    assert table == rows and np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


def test_a_link_to_nothing_is_skipped(run, images, tmp_path):
    """Waiting does not bring it back."""
    for name in ("00", "01"):
        (images / "a" / f"{name}.jpg").unlink()
        (images / "a" / f"{name}.jpg").symlink_to(tmp_path / "gone")
    features, rows = read(embed(options(run, images, tmp_path / "out")))
    assert len(features) == 16 and rows[0]["name"] == "a/02.jpg"
    skipped = (tmp_path / "out" / "skipped-00000.csv").read_text()
    assert skipped.startswith("index,name,reason\n0,a/00.jpg,") and "No such file" in skipped


def test_repaired_files_continue_the_features(run, images, tmp_path, monkeypatch):
    """The samples that identify the images were partly unreadable at the first start."""
    original = ImageFolder.read

    def lost(self, index):
        if self.name(index).startswith("b/"):
            raise OSError(errno.EIO, "Input/output error")
        return original(self, index)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="start it again when they can"):
        patch.setattr(ImageFolder, "read", lost)
        embed(options(run, images, tmp_path / "out"))
    features, _ = read(embed(options(run, images, tmp_path / "out")))
    assert len(features) == 18


def test_a_full_disk_is_one_line(run, images, tmp_path):
    """No file may have more than 1500 bytes: those of meta.json and the table fit."""
    code = """
import resource, signal, sys
from fastbyol.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
sys.exit(main(sys.argv[1:]))
"""
    words = ["embed", "--run", str(run), "--images", str(images), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"fastbyol: error: --out {tmp_path / 'out'}: shard 0 cannot be written: File too large\n"
    assert not list((tmp_path / "out").glob("features-*")) and not list((tmp_path / "out").glob(".*.partial"))


def test_an_output_folder_that_cannot_be_written_is_one_line(run, images, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is not a folder; choose another --out"):
        embed(options(run, images, tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    ("count", "shape", "images"),
    [
        (10, (2048,), 256),
        (50_000, (2048,), 1024),
        (1_281_167, (2048,), 32_768),
        (10**7, (2048,), 65_536),
        (10**7, (2048, 7, 7), 2048),
        (10**7, (768, 64, 64), 256),
    ],
)
def test_shards_keep_to_a_size(count, shape, images):
    assert embedding._shard_images(count, shape) == images


@pytest.mark.parametrize("k", [0, 1])
def test_ranks_that_see_other_files_are_told(tmp_path, k):
    """The collective is played by the test."""
    meta = {"weights": "x", "checkpoint": "a", "content": {"names": "n", "samples": ["s", ""]}}
    # A sample that a rank could not read for a while counts as equal.
    other = (
        (meta | {"weights": "y"}, True) if k == 0 else (meta | {"content": {"names": "n", "samples": ["", "t"]}}, False)
    )

    class Two(World):
        def gather(self, value):
            return [value, other]

    (tmp_path / "meta.json").write_text("{}")
    message = ("the ranks found different checkpoints or images", "not all ranks see this folder")[k]
    with pytest.raises(InputError, match=message):
        embedding._check_ranks(tmp_path, meta, Two())


@pytest.mark.slow
def test_ranks_write_what_one_rank_writes(run, images, tmp_path):
    """Also if one of them was killed before."""
    expected, rows = read(embed(options(run, images, tmp_path / "one")))
    evaluations = tmp_path / "evaluations.json"
    evaluations.write_text(json.dumps([["embed", vars(options(run, images, tmp_path / "two"))]]))
    killed = torchrun("evaluations.py", evaluations, "kill", 1, ranks=2)
    assert killed.returncode
    assert not (tmp_path / "two" / "features-00001.npy").exists()
    for _ in range(2):  # at last there is nothing to do
        done = torchrun("evaluations.py", evaluations, ranks=2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1
        features, table = read(tmp_path / "two")
        assert np.array_equal(features, expected) and table == rows


@pytest.mark.slow
def test_an_error_on_one_rank_is_one_line(run, images, tmp_path):
    for i in range(14, 20):  # of the third shard
        (images / "b" / f"{i}.jpg").unlink()
        (images / "b" / f"{i}.jpg").symlink_to("/proc/self/mem")  # reading its first bytes is an I/O error
    evaluations = tmp_path / "evaluations.json"
    evaluations.write_text(json.dumps([["embed", vars(options(run, images, tmp_path / "two"))]]))
    done = torchrun("evaluations.py", evaluations, ranks=2)
    assert done.returncode
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastbyol: error: ")]
    assert len(lines) == 1 and "Input/output error; 6 of 6 files of this shard cannot be read" in lines[0], done.stderr
