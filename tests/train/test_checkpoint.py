import errno
import os
import pickle
import random
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.common import HANG_S

from fastbyol.errors import InputError, RunError
from fastbyol.runtime import checkpoint


def state(step: int, **changes):
    weights = torch.arange(50_000, dtype=torch.float32) + step
    return {
        "step": step,
        "config": {"name": "x"},
        "images": 3,
        "model": {"w": weights},
        "optimizer": {},
        "rng": {},
        "knn": {},
    } | changes


def save(folder, step, **options):
    return checkpoint.save(folder, state(step), **({"keep_last": 3, "best": False} | options))


def test_round_trip_with_plain_torch_load(tmp_path):
    path = save(tmp_path, 7)
    assert path.name == "step_00000007.pt"
    loaded = checkpoint.load(path)
    plain = torch.load(path, weights_only=True)
    for values in (loaded, plain):
        assert values["step"] == 7
        assert torch.equal(values["model"]["w"], state(7)["model"]["w"])
    assert loaded["format"] == checkpoint.FORMAT


def test_last_and_best_checkpoints_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, best=step == 2)
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["step_00000005.pt", "step_00000006.pt", "step_00000007.pt"]
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 2
    assert len(list(tmp_path.iterdir())) == 4


def test_truncated_checkpoints_are_rejected(tmp_path):
    path = save(tmp_path, 1)
    whole = path.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 10, len(whole) // 2, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="damaged") as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_changed_byte_is_detected_or_harmless(tmp_path):
    path = save(tmp_path, 1)
    whole = path.read_bytes()
    rng = random.Random(1)
    detected = 0
    for _ in range(60):
        index = rng.randrange(len(whole))
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 0x10]) + whole[index + 1 :])
        try:
            assert torch.equal(checkpoint.load(path)["model"]["w"], state(1)["model"]["w"])
        except InputError:
            detected += 1
    assert detected > 50  # most of the file is tensor data


def test_latest_valid_skips_a_damaged_checkpoint(tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    newest.write_bytes(newest.read_bytes()[:-100])
    warnings = []
    path, values = checkpoint.latest_valid(tmp_path, warnings.append)
    assert values["step"] == 1
    assert path.name == "step_00000001.pt"
    assert len(warnings) == 1
    assert str(newest) in warnings[0]


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickle_with_code_is_rejected_without_running_it(tmp_path, writer):
    path = tmp_path / "step_00000001.pt"
    writer(state(1) | {"model": Bomb(tmp_path / "it-went-off")}, path)
    with pytest.raises(InputError, match="refused: it holds code|not a checkpoint"):
        checkpoint.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001.pt"]


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {**state(1), "format": 99}, {**state(1), "step": "1"}])
def test_foreign_files_are_rejected(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="not one of fastbyol's|has format 99"):
        checkpoint.load(tmp_path / "x.pt")


def test_missing_files_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.pt cannot be read: No such file"):
        checkpoint.resolve(tmp_path / "nowhere.pt", print)
    with pytest.raises(InputError, match="no usable checkpoint in"):
        checkpoint.resolve(tmp_path, print)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*last good checkpoint is .*step_00000001.pt"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001.pt"]


@pytest.mark.slow
def test_failed_write_is_one_line_and_leaves_no_file(tmp_path):
    """Let a write inside torch's writer fail with a file size limit of 64 KB."""
    code = f"""
        import resource, pathlib, torch
        from fastbyol.runtime import checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        values = dict(step=1, config={{}}, images=1, model={{"w": torch.zeros(10**6)}}, optimizer={{}}, rng={{}}, knn={{}})
        try:
            checkpoint.save(pathlib.Path({str(tmp_path)!r}), values, keep_last=1, best=False)
        except checkpoint.RunError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=HANG_S
    )
    assert result.stdout.count("\n") == 1
    assert "could not be written" in result.stdout
    assert "there is no older checkpoint" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_sigkill_during_a_save_keeps_the_previous_checkpoint(tmp_path):
    """The process kills itself inside torch.save, after part of the file is on disk."""
    save(tmp_path, 1)
    code = f"""
        import os, pathlib, signal, torch
        from fastbyol.runtime import checkpoint

        class Dying:
            def __init__(self, file):
                self.file, self.written = file, 0
            def write(self, data):
                self.written += self.file.write(data)
                if self.written > 100_000:
                    self.file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                return len(data)
            def flush(self):
                self.file.flush()

        torch_save = torch.save
        checkpoint.torch.save = lambda value, file: torch_save(value, Dying(file))
        values = dict(step=2, config={{}}, images=1, model={{"w": torch.zeros(10**6)}}, optimizer={{}}, rng={{}}, knn={{}})
        checkpoint.save(pathlib.Path({str(tmp_path)!r}), values, keep_last=3, best=False)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=HANG_S)
    assert result.returncode == -9
    leftovers = [p for p in tmp_path.iterdir() if p.suffix == ".partial"]
    assert len(leftovers) == 1
    assert leftovers[0].stat().st_size > 100_000
    assert checkpoint.latest_valid(tmp_path, pytest.fail)[1]["step"] == 1
    save(tmp_path, 2)  # removes the partial file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001.pt", "step_00000002.pt"]
