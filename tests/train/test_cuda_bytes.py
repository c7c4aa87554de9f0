"""Memory traffic of the compiled CUDA step, counted without a GPU: the script and a ceiling."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import bench_step
import cuda_bytes
import pytest
import results_csv
import torch
from cuda_bytes import Counts, Kernel

from fastbyol.errors import InputError, RunError

WORK = bench_step.Work("resnet18", 96, 64)
LIMIT = 0.78
"""fastbyol's bytes relative to plain compiled BYOL: 0.74 with torch 2.14 and 2.11, and 0.75 with
cuDNN's 1x1 convolutions. The count is deterministic."""


@pytest.fixture(scope="module")
def stub() -> None:
    """Skip unless the count can run: it needs gcc, torch with CUDA, and no GPU."""
    try:
        cuda_bytes.check_machine()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def counts(stub: None) -> dict[str, Counts]:
    """Return the counts of all contenders, which take three minutes."""
    return {name: cuda_bytes.count(name, WORK.backbone, WORK.size, WORK.batch) for name in cuda_bytes.CONTENDERS}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_step_moves_fewer_bytes_than_plain_byol(counts: dict[str, Counts]):
    assert cuda_bytes.ratio(list(counts.values())) <= LIMIT
    assert counts["fastbyol cudnn"].of()[1] / counts["plain"].of()[1] <= LIMIT


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resnet50_at_batch_256(stub: None):
    """Plain compiled BYOL moves 253.8 GB with torch 2.14, so this is 0.78 of it."""
    counted = cuda_bytes.count("fastbyol", "resnet50", 224, 256)
    launches, moved = counted.of()
    assert moved <= 198e9
    assert counted.kept_bytes <= 20 * 2**30
    assert launches <= 600


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_library_calls_match_the_network(counts: dict[str, Counts]):
    """A pass has 20 convolutions and 2 matrix products per head.

    fastbyol has one pass for both views, plain BYOL one pass per view. fastbyol's three
    downsamplings of each network are Triton kernels.
    """
    forward, backward = 2 * 20 + 3 * 2, 20 + 2 * 2 * 2
    for name, passes, own in (("fastbyol", 1, 2 * 3), ("plain", 2, 0)):
        assert counts[name].of("forward", "library")[0] == passes * forward - own
        assert counts[name].of("backward", "library")[0] == passes * backward


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stem_bytes(counts: dict[str, Counts]):
    """Online and target: read both views and the filters, write 64 channels of half the size."""
    stem = 2 * (2 * 64 * 3 * 96**2 + 64 * 3 * 7**2 + 2 * 64 * 64 * 48**2)
    kernels = [k for k in counts["fastbyol"].kernels if (k.phase, k.kind) == ("forward", "library")]
    assert sorted(k.bytes for k in kernels)[-2:] == [stem, stem]


# --- parts ---

MB = 10**6
KERNELS = [
    Kernel("forward", "triton", 300 * MB, "add relu"),
    Kernel("forward", "triton", 300 * MB, "add relu"),
    Kernel("forward", "library", 100 * MB, "convolution"),
    Kernel("backward", "triton", 500 * MB, "mul sum"),
    Kernel("backward", "library", 80 * MB, "convolution_backward"),
]
FASTBYOL = Counts("fastbyol", WORK, KERNELS, 640 * MB)
PLAIN = Counts("plain", WORK, [dataclasses.replace(k, bytes=2 * k.bytes) for k in KERNELS], 700 * MB)


def test_sums():
    assert FASTBYOL.of() == (5, 1280 * MB)
    assert FASTBYOL.of("forward") == (3, 700 * MB)
    assert FASTBYOL.of(kind="library") == (2, 180 * MB)
    assert FASTBYOL.of("backward", "triton") == (1, 500 * MB)
    assert FASTBYOL.mb_per_image == 20


def words(text: str) -> list[str]:
    """Return the lines with single spaces between columns."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_table():
    assert words(cuda_bytes.table([FASTBYOL, PLAIN])) == [
        "GB (launches) Triton forward Triton backward library total MB per image GB saved",
        "fastbyol 0.60 (2) 0.50 (1) 0.18 (2) 1.28 (5) 20.0 0.64",
        "plain 1.20 (2) 1.00 (1) 0.36 (2) 2.56 (5) 40.0 0.70",
        "fastbyol / plain: 0.500",
    ]


def test_single_contender_has_no_ratio():
    assert cuda_bytes.ratio([FASTBYOL]) is None
    assert "/" not in cuda_bytes.table([PLAIN])


def test_heaviest_kernels_are_listed_once():
    assert words(cuda_bytes.heaviest(FASTBYOL, 2)) == [
        "1 x 0.500 GB backward triton mul sum",
        "2 x 0.300 GB forward triton add relu",
    ]


def test_counts_json_round_trip():
    assert cuda_bytes.from_json(cuda_bytes.to_json(FASTBYOL)) == FASTBYOL


def test_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = {"fastbyol": FASTBYOL, "fastbyol cudnn": dataclasses.replace(FASTBYOL, contender="fastbyol cudnn")}
    monkeypatch.setattr(cuda_bytes, "count", lambda name, *args: found.get(name, PLAIN))
    monkeypatch.setattr(sys, "argv", ["cuda_bytes.py", "--out", str(tmp_path / "out.csv")])
    cuda_bytes.main()
    rows = results_csv.read("out", tmp_path)
    assert [(r["contender"], r["set"], r["bytes"]) for r in rows] == [
        ("fastbyol", "R18 96 px, batch 64", "1280000000"),
        ("fastbyol cudnn", "R18 96 px, batch 64", "1280000000"),
        ("plain", "R18 96 px, batch 64", "2560000000"),
    ]
    assert (rows[0]["triton_forward_launches"], rows[0]["library_backward_bytes"]) == ("2", "80000000")
    assert rows[0]["torch"] == torch.__version__.partition("+")[0]
    assert rows[0]["fastbyol"]
    with open(tmp_path / "out.csv", newline="") as file:
        assert "gpu" not in next(csv.reader(file))  # no GPU is involved


# --- machines without support ---


def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Return exit code and stderr of a main() that must not start a process."""

    def started(*args, **kwargs):
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr(sys, "argv", ["cuda_bytes.py"])
    with pytest.raises(SystemExit) as stopped:
        cuda_bytes.main()
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("sign", ["driver", "device"])
def test_machine_with_cuda_is_rejected(sign: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(cuda_bytes, "_has_driver", lambda: sign == "driver")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sign == "device")
    code, text = run_main(monkeypatch, capsys)
    assert code == 2
    assert text.count("\n") == 1
    assert "CUDA driver" in text


def test_missing_gcc_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(cuda_bytes, "_has_driver", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda_bytes.shutil, "which", lambda name: None)
    code, text = run_main(monkeypatch, capsys)
    assert (code, text.count("\n")) == (2, 1)
    assert text.startswith("cuda_bytes.py: gcc is missing")


@pytest.mark.slow
def test_driver_library_is_detected(stub: None, tmp_path: Path):
    """Run the check in a process that can load the library."""
    (tmp_path / "empty.c").write_text("")
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["gcc", "-shared", "-o", library, str(tmp_path / "empty.c")], check=True)
    command = [sys.executable, cuda_bytes.__file__, "--backbone", "resnet18", "--size", "32"]
    done = subprocess.run(command, env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_failing_contender_raises_run_error(stub: None, capfd: pytest.CaptureFixture):
    with pytest.raises(RunError, match="plain could not be counted"):
        cuda_bytes.count("plain", "no-such-network", 32, 2)
    assert "no-such-network" in capfd.readouterr().err


def test_stub_compile_error_is_one_line(stub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken.c").write_text("int f( {")
    monkeypatch.setattr(cuda_bytes, "STUB", tmp_path / "broken.c")
    with pytest.raises(InputError, match=r"gcc cannot compile broken\.c"):
        cuda_bytes.count("plain", "resnet18", 32, 2)
