"""Atomic writes, JSON files, and the lock of a run's folder."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastbyol.errors import InputError
from fastbyol.runtime import files
from fastbyol.runtime.files import (
    LOCK,
    FolderLock,
    atomic_write,
    check_output,
    json_text,
    make_folder,
    read_json,
    read_json_or,
    write_file,
)


@pytest.fixture
def no_warnings(log_lines):
    yield
    assert log_lines == []


def test_write_file_replaces_atomically(tmp_path):
    path = tmp_path / "x.json"
    write_file(path, "old")
    write_file(path, "new é \udce9")
    assert path.read_bytes() == "new é \\udce9".encode()  # bytes that are not UTF-8 are escaped
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "x.json"
    write_file(path, "old")
    with pytest.raises(type(error)) as caught, atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert isinstance(error, KeyboardInterrupt) or caught.value.filename == str(path)


def test_links_are_followed_and_devices_written_directly(tmp_path):
    target, link = tmp_path / "there", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_file(link, "new")
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    write_file(Path(os.devnull), "x")
    assert not Path(os.devnull).is_file()
    with pytest.raises(OSError, match="directory") as caught:
        write_file(tmp_path, "x")
    assert caught.value.filename == str(tmp_path)


def test_json_has_no_nan():
    assert json.loads(json_text({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (2,)}})) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": [2]},
    }


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b'{"a":\n 1', r"is damaged: not valid JSON \(line 2\)"),
        (b"\xff\xfe", "is damaged: not valid JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b"[" * 100_000, "is damaged: not valid JSON$"),
    ],
)
def test_damaged_json_raises_or_warns(tmp_path, content, fault):
    path = tmp_path / "x.json"
    assert read_json(path) == {}
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"x.json: {fault}"):
        read_json(path)
    warnings = []
    assert read_json_or(path, warnings.append) == {}
    assert len(warnings) == 1


def locker(folder):
    """Start a process that locks a folder, and return it once it has the lock."""
    code = f"""
import sys, time
from pathlib import Path
from fastbyol.runtime.files import FolderLock
with FolderLock(Path({str(folder)!r})):
    print("locked", flush=True)
    time.sleep(1000)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.usefixtures("no_warnings")
def test_lock_excludes_other_processes_and_ends_with_its_owner(tmp_path):
    folder = tmp_path / "runs" / "byol"
    process = locker(folder)
    try:
        owner = rf"another run writes into it \(process {process.pid} on "
        with pytest.raises(InputError, match=owner), FolderLock(folder):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with FolderLock(folder, wait_s=60):
            assert f"process {os.getpid()} on" in (folder / LOCK).read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.usefixtures("no_warnings")
def test_lock_waits_for_the_other_process(tmp_path, monkeypatch):
    first = FolderLock(tmp_path).__enter__()
    monkeypatch.setattr(time, "sleep", lambda s: first.__exit__(None, None, None))
    with FolderLock(tmp_path, wait_s=1000):
        pass


@pytest.mark.usefixtures("no_warnings")
def test_lock_file_that_is_not_a_regular_file_raises(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("my notes")
    folder = tmp_path / "run"
    folder.mkdir()
    for make in (lambda p: p.symlink_to(precious), lambda p: p.symlink_to("nowhere"), Path.mkdir, os.mkfifo):
        make(folder / LOCK)
        with pytest.raises(InputError, match=r"\.lock is not a regular file, but runs use it as a lock: remove it"):
            FolderLock(folder).__enter__()
        (folder / LOCK).rmdir() if (folder / LOCK).is_dir() else (folder / LOCK).unlink()
    assert precious.read_text() == "my notes"


@pytest.mark.usefixtures("no_warnings")
def test_unused_folder_is_removed(tmp_path):
    with FolderLock(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a").is_dir()
    assert not (tmp_path / "runs").exists()
    with FolderLock(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "x").write_text("")
    assert (tmp_path / "runs" / "a" / "x").exists()


def test_file_system_without_locks_warns(tmp_path, monkeypatch, log_lines):
    def refuse(handle, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with FolderLock(tmp_path / "a"):
        pass
    assert len(log_lines) == 1
    assert "its file system has no locks" in log_lines[0]


@pytest.mark.usefixtures("no_warnings")
def test_lock_of_an_impossible_folder_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: .* is not a folder; choose another"):
        FolderLock(tmp_path / "file" / "run").__enter__()


def test_make_folder_names_the_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        with pytest.raises(OSError, match=f"{name} is not a folder"):
            make_folder(tmp_path / name / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_check_output(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "new")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "new")
    for path in (tmp_path / "x", tmp_path / "link", Path("/dev/null"), Path("x")):
        check_output(path, "--out")
    with pytest.raises(InputError, match=r"^--out: cannot be written: there is no folder .*gone$"):
        check_output(tmp_path / "dangling", "--out")
    # A link's target is replaced, so the target's folder must be writable. A device must itself be
    # writable.
    writable = {str(tmp_path), "/dev/null"}
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) in writable)
    check_output(tmp_path / "x", "--out")
    check_output(Path("/dev/null"), "--out")
    for path in (tmp_path / "link", tmp_path / "there" / "x", Path("/dev/zero")):
        with pytest.raises(InputError, match=r"^--out: cannot be written: Permission denied$"):
            check_output(path, "--out")
