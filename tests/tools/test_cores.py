"""Available cores by affinity and quota, and the warning if other processes keep them busy."""

import os

import pytest
import torch

from fastbyol.data.workers import resolve_threads
from fastbyol.runtime import cores


def tree(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "groups", tmp_path / "fs"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"groups": "0::/\n", "fs/cpu.max": "max 100000\n"}, None),
        ({"groups": "0::/\n", "fs/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "groups": "0::/a/b\n",
                "fs/a/b/cpu.max": "max 100000",
                "fs/a/cpu.max": "300000 100000",
                "fs/cpu.max": "max 1",
            },
            3.0,
        ),
        ({"groups": "0::/docker/x\n", "fs/cpu.max": "50000 100000"}, 0.5),  # the host's path, in a container
        (
            {
                "groups": "3:cpuset:/\n2:cpu,cpuacct:/x\n1:name=systemd:/\n",
                "fs/cpu/x/cpu.cfs_quota_us": "200000",
                "fs/cpu/x/cpu.cfs_period_us": "100000",
                "fs/cpu/cpu.cfs_quota_us": "-1",
                "fs/cpu/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        ({"groups": "1:cpu:/\n", "fs/cpu/cpu.cfs_quota_us": "-1", "fs/cpu/cpu.cfs_period_us": "100000"}, None),
        ({"groups": "nonsense\n0::/\n", "fs/cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_quota_of_control_groups(tmp_path, files, quota):
    assert cores._quota(*tree(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (2.5, 3), (0.2, 1), (64.0, 8)])
def test_threads_respect_affinity_and_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "_quota", lambda groups, root: quota)
    assert cores.available() == expected
    assert (resolve_threads(0), resolve_threads(5)) == (expected, 5)


@pytest.mark.parametrize(("told", "expected"), [(None, 1), ("2", 2)])
def test_torch_threads_respect_the_quota(monkeypatch, told, expected):
    threads = torch.get_num_threads()
    monkeypatch.setattr(cores, "available", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    try:
        torch.set_num_threads(2)
        cores.respect_quota()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("others", "quota", "torchs", "loaders", "fit"),
    [
        (0.2, None, 4, 4, None),
        (1.4, None, 4, 4, 3),
        (4.0, None, 4, 4, 1),
        (9.0, None, 4, 4, 1),
        (3.0, None, 1, 1, None),  # already fits
        (3.0, None, 1, 4, 1),
        (2.0, 2, 2, 2, None),  # the quota is free
        (3.0, 2, 2, 2, 1),
    ],
)
def test_busy_cores_give_one_warning_with_settings(monkeypatch, log_lines, others, quota, torchs, loaders, fit):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(cores, "_quota", lambda groups, root: quota)
    monkeypatch.setattr(cores, "_others", lambda: (5.0, others))
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    cores.warn_if_shared(loaders)
    if fit is None:
        assert log_lines == []
    else:
        assert len(log_lines) == 1
        assert f"{others:.1f} of 4 CPU cores busy" in log_lines[0]
        # only settings that do not fit yet
        assert (f"OMP_NUM_THREADS={fit} in the environment" in log_lines[0]) == (torchs > fit)
        assert (f"--data.threads {fit}" in log_lines[0]) == (loaders > fit)
        assert log_lines[0].endswith(" what is left")


OTHERS = cores._others


def test_load_of_others_excludes_this_process(monkeypatch):
    monkeypatch.setattr(cores, "_AT_START", (100.0, 1000.0, 50.0))
    monkeypatch.setattr(cores, "_usage", lambda: (110.0, 1017.0, 55.0))
    assert OTHERS() == (10.0, pytest.approx(1.2))


def test_usage_of_this_machine():
    clock, busy, own = cores._usage()
    assert clock > 0
    assert busy > 0
    assert own > 0
