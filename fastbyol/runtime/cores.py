"""How many CPU cores this process may use, and how busy others keep them."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

_SHORTEST_S = 0.3  # of which load is measured: /proc/stat counts in steps of 10 ms
_FREE = 0.5  # cores that others may use before it is worth a warning


def available() -> int:
    """Cores that this process may use: those of its affinity, within the CPU quota of its control groups."""
    cores = len(os.sched_getaffinity(0))
    quota = _quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def respect_quota() -> None:
    """Gives torch no more threads than there are cores: OpenMP knows the affinity, not the quota, and its threads wait for each other.

    OMP_NUM_THREADS has the last word.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > available():
        torch.set_num_threads(available())


def warn_if_shared(threads: int, warn: Callable[[str], None]) -> None:
    """One line where other processes have kept cores busy since this one began, with the settings that fit what is left.

    Threads that wait for each other are slow out of proportion where one of them has no core.

    Args:
        threads: of the loader.
    """
    seconds, others = _others()
    mine = available()
    left = len(os.sched_getaffinity(0)) - others
    fit = min(mine, max(1, round(left)))
    settings = []
    if torch.get_num_threads() > fit:
        settings.append(f"OMP_NUM_THREADS={fit} in the environment")
    if threads > fit:
        settings.append(f"--data.threads {fit}")
    if seconds < _SHORTEST_S or left > mine - _FREE or not settings:
        return
    warn(
        f"other processes keep {others:.1f} of {len(os.sched_getaffinity(0))} CPU cores busy: training may be several times slower; "
        f"{' and '.join(settings)} would fit what is left"
    )


def _quota(groups: Path, root: Path) -> float | None:
    """Cores by the tightest quota of this process's control group and those above it, of version 2 or 1; None without one."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return None
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            base, read = root, _quota_2
        elif "cpu" in controllers.split(","):
            base, read = root / "cpu", _quota_1
        else:
            continue
        place = base / path.lstrip("/")
        # Within a container the path is the host's: what is not there is looked for in the folders above.
        for folder in (place, *place.parents):
            found.append(read(folder))
            if folder == base:
                break
    return min((quota for quota in found if quota is not None), default=None)


def _quota_2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError):
        return None


def _usage() -> tuple[float, float, float]:
    """Clock, busy seconds of this process's cores, busy seconds of this process itself and its children."""
    own = os.times()
    busy = 0.0
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        lines = []
    cores = {f"cpu{k}" for k in os.sched_getaffinity(0)}
    for name, *fields in (line.split() for line in lines):
        if name in cores:
            user, nice, system, _idle, _waiting, irq, soft_irq, stolen = map(int, fields[:8])
            busy += (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system


_BEGAN = _usage()


def _others() -> tuple[float, float]:
    """Seconds since this process began, and the cores that others have kept busy in the mean over that time."""
    seconds, busy, own = (now - then for now, then in zip(_usage(), _BEGAN, strict=True))
    return seconds, max(0.0, busy - own) / max(seconds, 1e-9)
