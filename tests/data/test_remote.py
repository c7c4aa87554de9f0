"""Remote storage: ranges, retries, the disk cache, and runs on them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.common import HANG_S, ROOT, losses
from helpers.image_sets import CLASSES, contents, write_folder, write_parquet, write_shards, write_tar
from helpers.range_server import serve

from fastbyol.api import train
from fastbyol.config import Config, DataConfig, KnnConfig, ModelConfig, OptimConfig
from fastbyol.data import build_loader, cache, find_images, remote
from fastbyol.data.cache import BLOCK, DiskCache
from fastbyol.data.remote import CacheOptions, open_remote
from fastbyol.errors import InputError, StorageError

IMAGES = contents(48)
FAULTS = (500, 503, 429, "stall", "truncate", "short", "hang up")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache; short waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_remotes", {})
    monkeypatch.setattr(cache, "_budgets", {})
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    with serve(tmp_path / "www") as running:
        yield running


def shard_config(server, **options):
    write_shards(f"{server.folder}/train-%04d.tar", IMAGES, 3)
    root = f"{server.url}/train-{{0000..0002}}.tar"
    return DataConfig(root=root, batch_size=16, image_size_px=32, threads=2, **options)


def test_tar_shards_over_http_and_their_cache(server):
    config = shard_config(server)
    images = find_images(config, "train")
    assert images.is_remote
    assert [images.read(k) for k in range(48)] == [data for _, data, _ in IMAGES]
    assert images.labels.tolist() == [CLASSES.index(label) for *_, label in IMAGES]
    before = server.gets()
    assert [images.read(k) for k in range(48)] == [data for _, data, _ in IMAGES]
    assert server.gets() == before  # indexing has filled the cache
    remote._remotes.clear()
    again = find_images(config, "train")
    assert again.read(40) == IMAGES[40][1]
    assert server.gets() == before + 3  # whether the server sends ranges


def test_without_a_cache_an_image_costs_one_request(server):
    images = find_images(shard_config(server, cache_gb=0), "train")
    before = server.gets()
    assert images.read(7) == IMAGES[7][1]
    assert server.gets() == before + 1
    start, size = images.positions[7, :2].tolist()
    assert server.requests[-1][2] == f"bytes={start}-{start + size - 1}"


def test_a_changed_file_is_read_again(server):
    config = shard_config(server)
    find_images(config, "train")
    write_shards(f"{server.folder}/train-%04d.tar", IMAGES[::-1], 3)
    for path in server.folder.glob("*.tar"):
        os.utime(path, (1, 1))  # a disk's clock may be coarse
    remote._remotes.clear()
    assert find_images(config, "train").read(0) == IMAGES[-1][1]


def test_parquet_and_lists_over_http(server):
    write_parquet(server.folder / "a" / "train.parquet", IMAGES, compression="snappy")
    write_folder(server.folder / "files", IMAGES)
    lines = [f"files/{label}/{name}.jpg,{label}" for name, _, label in IMAGES]
    lines[3] = f"{server.url}/{lines[3]}"
    (server.folder / "train.csv").write_text("\n".join(lines))
    (server.folder / "here.csv").write_text(
        "\n".join(line if "//" in line else f"{server.url}/{line}" for line in lines)
    )
    roots = (f"{server.url}/a/train.parquet", f"{server.url}/train.csv", str(server.folder / "here.csv"))
    for root in roots:
        images = find_images(DataConfig(root=root), "train")
        assert images.is_remote
        for _ in range(2):
            assert [images.read(k) for k in range(48)] == [data for _, data, _ in IMAGES]
            before = server.gets()
        assert images.classes == list(CLASSES)
        assert [images.read(k) for k in range(0, 48, 9)] == [data for _, data, _ in IMAGES[::9]]
        assert server.gets() == before
    (server.folder / "files" / "ant" / "0001.jpg").unlink()
    remote._remotes.clear()
    images = find_images(DataConfig(root=f"{server.url}/train.csv", cache_gb=0), "train")
    with pytest.raises(FileNotFoundError):  # a bad image, as on a disk
        images.read(1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_retries(fault, server, monkeypatch):
    images = find_images(shard_config(server, cache_gb=0), "train")
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.3 if fault == "stall" else 60.0)
    first = server.gets()

    def until_the_last(path, count):
        if count >= first + remote.ATTEMPTS - 2:
            remote.TIMEOUT_S = 60.0  # the last attempt is answered, however slow the machine is
        return fault if count < first + remote.ATTEMPTS - 1 else None

    server.fault = until_the_last
    assert images.read(7) == IMAGES[7][1]
    assert server.gets() >= first + remote.ATTEMPTS  # the client may repeat one that was hung up on


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_stays_ill_is_one_line(fault, server, monkeypatch):
    images = find_images(shard_config(server, cache_gb=0), "train")
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.3 if fault == "stall" else 60.0)
    server.fault = lambda path, count: fault
    before = server.gets()
    with pytest.raises(StorageError) as caught:
        images.read(7)
    text = str(caught.value)
    reason = {"stall": "no answer within the time limit", "short": "bytes arrived"}.get(fault, f"HTTP status {fault}")
    assert text.startswith(f"{server.url}/train-0000.tar: {remote.ATTEMPTS} attempts failed, the last one: ")
    assert "\n" not in text and (reason in text or not isinstance(fault, int))
    assert server.gets() - before >= remote.ATTEMPTS


def test_denied_and_missing_files_are_not_repeated(server):
    images = find_images(shard_config(server, cache_gb=0), "train")
    for fault, error, text in (
        (403, StorageError, r"access denied \(HTTP status 403\): the server wants other credentials"),
        (404, FileNotFoundError, "no such file"),
    ):
        server.fault = lambda path, count, fault=fault: fault
        before = server.gets()
        with pytest.raises(error, match=text):
            images.read(7)
        assert server.gets() == before + 1


def test_bad_urls_are_one_line(server, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    (server.folder / "x.beton").write_bytes(b"x")
    for root, text in (
        (f"{server.url}/train-{{0..3}}.tar", r"train-0\.tar: no such file"),
        (f"{server.url}/none.csv", r"none\.csv: no such file"),
        (f"{server.url}/x.beton", r"\.beton files are read from a disk only"),
        (f"{server.url}/folder", r"no images in .*; name the files, as in train-\{0000"),
        ("nothing://x/y.tar", "nothing:// is not a known storage"),
        ("http://127.0.0.1:9/x.tar", "2 attempts failed"),
    ):
        with pytest.raises((InputError, StorageError), match=text) as caught:
            find_images(DataConfig(root=root), "train")
        assert "\n" not in str(caught.value)


def test_a_split_elsewhere(server, tmp_path):
    """A validation split on a disk beside a remote training split, and the reverse."""
    config = shard_config(server)
    write_folder(tmp_path / "val", IMAGES[:9])
    here = DataConfig(**{**vars(config), "val_split": str(tmp_path / "val")})
    assert find_images(here, "val").read(0) == IMAGES[0][1]
    there = DataConfig(root=str(tmp_path), train_split="val", val_split=config.root)
    assert find_images(there, "train").read(0) == find_images(there, "val").read(0) == IMAGES[0][1]
    beside = DataConfig(**{**vars(config), "val_split": "train-0001.tar"})
    assert find_images(beside, "val").read(0) == IMAGES[16][1]


def test_a_changed_list_is_read_again(server):
    for count in (3, 5):
        (server.folder / "train.csv").write_text("".join(f"{k}.jpg,{k % 2}\n" for k in range(count)))
        remote._remotes.clear()
        assert len(find_images(DataConfig(root=f"{server.url}/train.csv"), "train")) == count


def test_a_server_without_ranges_is_one_line(server):
    config = shard_config(server)
    server.fault = lambda path, count: "no ranges"
    with pytest.raises(InputError, match="the server does not send ranges"):
        find_images(config, "train")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match="reading s3:// needs a package: pip install s3fs"):
        open_remote("s3://bucket/x")


class TestCache:
    def test_ranges_of_whole_blocks(self, tmp_path):
        data = np.random.default_rng(0).bytes(10 * BLOCK + 77)
        ranges = DiskCache("s3://b/x", 1 << 30, folder=tmp_path).open_ranges("x", len(data))
        assert ranges.get(0, 5) is None
        assert ranges.aligned(BLOCK + 5, BLOCK) == (BLOCK, 2 * BLOCK)
        assert ranges.aligned(10 * BLOCK + 5, 10) == (10 * BLOCK, 77)
        ranges.put(BLOCK, data[BLOCK : 3 * BLOCK])
        ranges.put(10 * BLOCK, data[10 * BLOCK :])
        assert ranges.get(BLOCK + 5, BLOCK) == data[BLOCK + 5 : 2 * BLOCK + 5]
        assert ranges.get(10 * BLOCK + 70, 7) == data[-7:]
        assert ranges.get(3 * BLOCK - 1, 2) is None
        other = DiskCache("s3://b/x", 1 << 30, folder=tmp_path).open_ranges("x", len(data))
        assert other.get(BLOCK, 2 * BLOCK) == data[BLOCK : 3 * BLOCK]  # another process

    def test_a_file_that_another_process_has_replaced_is_not_read(self, tmp_path):
        """It made room, and the file was made again: the blocks that were there are not."""
        store = DiskCache("s3://b/x", 1 << 30, folder=tmp_path)
        old = store.open_ranges("x", 3 * BLOCK)
        old.put(0, b"x" * BLOCK)
        held = open(old._data, "rb")  # so that its inode is not used again
        shutil.rmtree(store.folder)
        new = DiskCache("s3://b/x", 1 << 30, folder=tmp_path).open_ranges("x", 3 * BLOCK)
        new.put(2 * BLOCK, b"y" * BLOCK)
        assert old.get(0, BLOCK) is None
        old.put(BLOCK, b"z" * BLOCK)
        assert new.get(BLOCK, BLOCK) is None
        assert new.get(2 * BLOCK, BLOCK) == b"y" * BLOCK
        held.close()

    def test_it_keeps_to_its_limit(self, tmp_path):
        limit = 60 * BLOCK
        for _ in range(3):  # starts of a program
            store = DiskCache("s3://b/x", limit, folder=tmp_path)
            ranges = store.open_ranges("big", 1000 * BLOCK)
            for k in range(0, 1000, 2):
                ranges.put(k * BLOCK, b"x" * BLOCK)
            for k in range(50):
                store.put(f"small {k}", b"y" * 10)
            assert cache._size(tmp_path) <= limit + 5 * BLOCK  # the maps, and folders
        assert ranges.get(0, BLOCK) == b"x" * BLOCK  # what was first stays

    def test_other_data_sets_make_room(self, tmp_path):
        limit = 40 * BLOCK
        for k, url in enumerate(("s3://a", "s3://b")):
            store = DiskCache(url, limit, folder=tmp_path)
            for n in range(15):
                store.put(f"{n}", b"x" * BLOCK)
            os.utime(store.folder, (k, k))
            if k == 0:
                in_use = store
            store._in_use.close()  # as if its process had ended
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "text").write_bytes(b"x" * 100 * BLOCK)
        foreign = tmp_path / "fastbyol-remote" / "mine-0123456789ab"
        foreign.mkdir()
        (foreign / "text").write_bytes(b"x" * 100 * BLOCK)
        new = DiskCache("s3://c", limit, folder=tmp_path)
        assert in_use.folder is not None
        assert sorted(path.name[0] for path in new.folder.parent.iterdir()) == ["b", "c", "m"]
        assert (tmp_path / "thesis" / "text").exists() and (foreign / "text").exists()  # never what is not its own
        new.put("1", b"z")
        assert new.get("1") == b"z"

    def test_a_data_set_in_use_stays(self, tmp_path):
        first = DiskCache("s3://a", 40 * BLOCK, folder=tmp_path)
        for n in range(30):
            first.put(f"{n}", b"x" * BLOCK)
        second = DiskCache("s3://b", 40 * BLOCK, folder=tmp_path)
        assert first.get("3") == b"x" * BLOCK
        for n in range(30):
            second.put(f"{n}", b"x" * BLOCK)
        assert cache._size(tmp_path) <= 45 * BLOCK  # both together

    def test_a_full_disk_ends_its_growth(self, tmp_path, monkeypatch, capsys):
        store = DiskCache("s3://b/x", 1 << 30, folder=tmp_path)
        usage = type("Usage", (), {"total": 1 << 40, "free": 1 << 30})
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
        store.put("1", b"z")
        assert store.get("1") is None
        assert "stops growing: the disk is nearly full" in capsys.readouterr().out

    def test_a_disk_error_is_one_warning(self, tmp_path, monkeypatch, capsys):
        store = DiskCache("s3://b/x", 1 << 30, folder=tmp_path)
        ranges = store.open_ranges("x", 100 * BLOCK)
        with monkeypatch.context() as patched:
            patched.setattr(cache.os, "pwrite", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
            ranges.put(0, b"x" * BLOCK)
            ranges.put(BLOCK, b"x" * BLOCK)
        assert ranges.get(0, BLOCK) is None
        assert capsys.readouterr().out.count("not cached any more") == 1

    def test_off(self, tmp_path):
        store = DiskCache("s3://b/x", 0, folder=tmp_path / "none")
        store.put("1", b"z")
        assert (store.get("1"), store.open_ranges("x", 5), list(tmp_path.iterdir())) == (None, None, [])

    def test_a_folder_that_cannot_be_made_is_one_warning(self, tmp_path, capsys):
        (tmp_path / "file").write_bytes(b"")
        store = DiskCache("s3://b/x", 1 << 30, folder=tmp_path / "file")
        assert store.open_ranges("x", 5) is None and store.get("1") is None
        store.put("1", b"z")
        assert capsys.readouterr().out.count("not cached any more") == 1


def run_config(root, tmp_path, name, **data):
    return Config(
        name=name,
        runs=str(tmp_path / "runs"),
        device="cpu",
        precision="fp32",
        data=DataConfig(root=root, batch_size=16, image_size_px=32, threads=2, **data),
        model=ModelConfig(backbone="resnet18", width=0.125, stem="small", hidden_dim=16, projection_dim=8),
        optim=OptimConfig(epochs=4, warmup_epochs=1),
        knn=KnnConfig(every_epochs=0),
        log={"log_every_steps": 1, "trackers": []},
    )


@pytest.mark.slow
def test_killed_in_a_remote_epoch_and_resumed_is_exact(server, tmp_path):
    """Killed at random steps, with a server that fails at times: the losses of an uncut run on the
    same files of a disk.
    """
    data = shard_config(server)
    local = str(server.folder / "train-{0000..0002}.tar")
    train(run_config(local, tmp_path, "local"))
    server.fault = lambda path, count: (500, "truncate", "hang up")[count % 3] if count % 5 == 4 else None
    config = run_config(data.root, tmp_path, "remote", cache_gb=0)
    config.resume = "auto"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "killed.py"), str(tmp_path / "config.json"), "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "runs" / "remote") == losses(tmp_path / "runs" / "local")
    assert server.gets() > 48 * 4


def test_a_run_on_a_dead_server_ends_with_one_line(server, tmp_path, monkeypatch):
    """It does not skip the images, which would change the result; the last checkpoint is named."""
    data = shard_config(server)
    config = run_config(data.root, tmp_path, "remote", cache_gb=0)
    limit = 48 * 2 + 9
    server.fault = lambda path, count: 503 if count > limit else None
    with pytest.raises(StorageError, match=r"5 attempts failed, the last one: HTTP status 503.*checkpoint") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    server.fault = lambda path, count: None
    config.resume = "auto"
    assert train(config).step == 12
    train(run_config(str(server.folder / "train-{0000..0002}.tar"), tmp_path, "local"))
    assert losses(tmp_path / "runs" / "remote") == losses(tmp_path / "runs" / "local")


@pytest.fixture(scope="module")
def s3():
    """A local S3 server, as a subprocess would be: moto's."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(s3, monkeypatch):
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    client = boto3.client("s3")
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="images")

    def upload(folder: Path) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), "images", f"{folder.name}/{path.relative_to(folder)}")
        return f"s3://images/{folder.name}"

    return upload


@pytest.mark.parametrize("layout", ["shards", "beside", "hub", "folder", "flat", "list"])
def test_s3(layout, bucket, tmp_path):
    folder = tmp_path / layout
    folder.mkdir()
    if layout in ("shards", "beside"):
        write_shards(f"{folder}/train{'/' if layout == 'shards' else '-'}%d.tar", IMAGES, 2)
    elif layout == "hub":
        write_parquet(folder / "data" / "train-00000-of-00001.parquet", IMAGES)
    elif layout == "list":
        write_folder(folder / "files", IMAGES)
        (folder / "train.csv").write_text("\n".join(f"files/{c}/{n}.jpg,{c}" for n, _, c in IMAGES))
    else:
        write_folder(folder / "train" if layout == "folder" else folder, IMAGES)
    images = find_images(DataConfig(root=bucket(folder)), "train")
    assert [images.read(k) for k in range(48)] == [data for _, data, _ in IMAGES]
    assert images.labels.tolist() == [CLASSES.index(label) for *_, label in IMAGES]


def test_s3_wildcards_and_missing_credentials(bucket, tmp_path, monkeypatch):
    (tmp_path / "wild").mkdir()
    write_shards(f"{tmp_path}/wild/t-%d.tar", IMAGES, 2)
    root = bucket(tmp_path / "wild")
    assert len(find_images(DataConfig(root=f"{root}/t-*.tar"), "train")) == 48
    remote._remotes.clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises((StorageError, InputError), match="access denied .*: set AWS_ACCESS_KEY_ID") as caught:
        find_images(DataConfig(root=f"{root}/t-0.tar"), "train")
    assert "\n" not in str(caught.value)


def test_a_storage_without_asynchronous_requests():
    """As hf:// is: fsspec's file system in memory."""
    import fsspec

    with fsspec.open("memory://set/train-0.tar", "wb") as file:
        write_tar(file, [(f"{name}.jpg", data) for name, data, _ in IMAGES])
    images = find_images(DataConfig(root="memory://set"), "train")
    assert [images.read(k) for k in range(48)] == [data for _, data, _ in IMAGES]
    with pytest.raises(InputError, match=r"memory://other: no such|no images in memory://other"):
        find_images(DataConfig(root="memory://other"), "train")


def test_readers_follow_the_storage(server):
    import torch

    config = shard_config(server)
    for root, readers in ((config.root, 32), (str(server.folder / "train-{0000..0002}.tar"), 4)):
        own = DataConfig(**{**vars(config), "root": root})
        loader = build_loader(own, find_images(own, "train"), seed=0, device=torch.device("cpu"), dtype=torch.float32)
        assert loader.readers == readers


def test_cache_options_come_from_the_config(server, tmp_path):
    find_images(shard_config(server, cache_dir=str(tmp_path / "here"), cache_gb=1), "train").read(0)
    assert list((tmp_path / "here").glob("fastbyol-remote/*/*/*.data"))
    assert {options for _, options in remote._remotes} == {CacheOptions(str(tmp_path / "here"), 10**9)}
