"""CPU cores that this process may use, and how busy other processes keep them."""

import math
import os
import time
from pathlib import Path

import torch

from fastbyol.runtime.logging import logger

_MIN_SECONDS = 0.3  # to measure load: /proc/stat has a resolution of 10 ms
_TOLERATED = 0.5  # cores used by others without a warning


def available() -> int:
    """Return the number of cores by CPU affinity and the CPU quota of control groups."""
    cores = len(os.sched_getaffinity(0))
    quota = _quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def respect_quota() -> None:
    """Limit torch's threads to the available cores, unless OMP_NUM_THREADS is set.

    OpenMP respects the affinity but not the quota, and its threads wait for each other.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > available():
        torch.set_num_threads(available())


def warn_if_shared(threads: int) -> None:
    """Warn if other processes have kept cores busy, with settings that fit the rest.

    Threads that wait for each other slow down disproportionately if one of them has no core.

    Args:
        threads: the loader's threads.
    """
    seconds, others = _others()
    total, mine = len(os.sched_getaffinity(0)), available()
    left = total - others
    fit = min(mine, max(1, round(left)))
    settings = []
    if torch.get_num_threads() > fit:
        settings.append(f"OMP_NUM_THREADS={fit} in the environment")
    if threads > fit:
        settings.append(f"--data.threads {fit}")
    if seconds < _MIN_SECONDS or left > mine - _TOLERATED or not settings:
        return
    logger.warning(
        f"other processes keep {others:.1f} of {total} CPU cores busy: training may be many times slower; "
        f"{' and '.join(settings)} would fit what is left"
    )


def _quota(groups: Path, root: Path) -> float | None:
    """Return the smallest CPU quota, in cores, of this process's control group and its parents.

    Args:
        groups: /proc/self/cgroup, whose lines are "ID:CONTROLLERS:PATH"; version 2 has no
            controllers.
        root: /sys/fs/cgroup.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return None
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            base, read = root, _quota_v2
        elif "cpu" in controllers.split(","):
            base, read = root / "cpu", _quota_v1
        else:
            continue
        group = base / path.lstrip("/")
        # In a container the path may be the host's, and only its parents exist.
        for folder in (group, *group.parents):
            found.append(read(folder))
            if folder == base:
                break
    return min((quota for quota in found if quota is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError):
        return None


def _usage() -> tuple[float, float, float]:
    """Return (clock, busy seconds of the cores, CPU seconds of this process and its children)."""
    own = os.times()
    busy = 0.0
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        lines = []
    cores = {f"cpu{k}" for k in os.sched_getaffinity(0)}
    for name, *fields in (line.split() for line in lines):
        if name in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            busy += (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system


_AT_START = _usage()


def _others() -> tuple[float, float]:
    """Return (seconds since this process started, mean number of cores that others kept busy)."""
    seconds, busy, own = (now - then for now, then in zip(_usage(), _AT_START, strict=True))
    return seconds, max(0.0, busy - own) / max(seconds, 1e-9)
