"""Cache folders of libraries, on machines whose home folder is missing or read-only.

numba, Triton, Inductor, matplotlib and the model hubs keep caches in the user's home, and most of
them raise if they cannot.
"""

import getpass
import os
import tempfile
from pathlib import Path

_VARIABLES = {"NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}

note: str | None = None
"""Message that says where caches are kept instead; None if nothing had to change."""

error: str | None = None
"""Message that no folder can be written, so compiled code cannot run; None if one can."""


def prepare() -> None:
    """Set environment variables for a writable cache folder, before the libraries are imported."""
    global note, error
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no passwd entry, but Inductor names its folder after the user
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    cache = os.environ.get("XDG_CACHE_HOME") or (home and home / ".cache")
    blocked = None if cache is None else _read_only_folder(Path(cache), home)
    if cache is not None and blocked is None:
        settings = os.environ.get("XDG_CONFIG_HOME") or (home and home / ".config")
        if settings is None or not _can_write(Path(settings)):  # matplotlib looks there first, and warns
            os.environ.setdefault("MPLCONFIGDIR", str(Path(cache) / "matplotlib"))
        return
    folder = _fallback()
    if folder is None:
        tried = f"neither {blocked or 'a home'} nor a temporary one"
        error = f"no folder for caches can be written, {tried}: set TMPDIR to a writable folder"
        return
    os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ["TRITON_HOME"] = str(folder)
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))
    for variable in _VARIABLES & os.environ.keys():  # may name the read-only folder
        os.environ[variable] = str(folder / variable.lower())
    if home is None:
        os.environ["HOME"] = str(folder)
    missing = f"{blocked} cannot be written" if blocked else "there is no home folder"
    note = f"{missing}: caches are kept in {folder}"


def own_folder() -> Path | None:
    """Return the folder of this package's own caches; None if there is no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbyol"
    except RuntimeError:
        return None


def _read_only_folder(cache: Path, home: Path | None) -> Path | None:
    """Return the first cache folder that is not writable, e.g. after a run with sudo."""
    numba = Path(os.environ.get("NUMBA_CACHE_DIR") or cache / "numba")  # with one sub-folder per source folder
    folders = [cache, cache / "fastbyol", numba, *numba.glob("*/")]
    if triton := os.environ.get("TRITON_CACHE_DIR") or os.environ.get("TRITON_HOME") or home:
        folders.append(Path(triton) if "TRITON_CACHE_DIR" in os.environ else Path(triton, ".triton", "cache"))
    if inductor := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        folders.append(Path(inductor))
    return next((folder for folder in folders if not _can_write(folder)), None)


def _can_write(folder: Path) -> bool:
    """Return True if files can be created in a folder, which may not exist yet."""
    # os.path, since Path.exists raises for a folder that cannot be searched
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))  # noqa: PTH110
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _fallback() -> Path | None:
    """Return a folder that only this user can write, since it will hold machine code to run."""
    for parent in (Path(p) for p in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm") if p):
        folder = parent / f"fastbyol-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
            if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
                return Path(tempfile.mkdtemp(prefix="fastbyol-", dir=parent))
            if _can_write(folder):
                return folder
        except OSError:  # try the next one
            continue
    return None
