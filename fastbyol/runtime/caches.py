"""Where libraries keep what they compile and download, on machines where the home folder cannot be written or does not exist.

numba, Triton, Inductor, matplotlib and the hubs keep their caches in the user's home; most raise where they cannot.
"""

import getpass
import os
import tempfile
from pathlib import Path

_VARIABLES = {"NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}

note: str | None = None
"""One line that says where caches are kept instead; None where nothing had to be changed."""

fault: str | None = None
"""One line that says that there is no such folder: what is compiled cannot run then."""


def prepare() -> None:
    """Points what needs a home at a folder that can be written; to be called before any of those libraries is imported."""
    global note, fault
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no entry for this user: Inductor names its folder after the user
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    cache = os.environ.get("XDG_CACHE_HOME") or (home and home / ".cache")
    blocked = None if cache is None else _blocked(Path(cache), home)
    if cache is not None and blocked is None:
        settings = os.environ.get("XDG_CONFIG_HOME") or (home and home / ".config")
        if settings is None or not _can_write(Path(settings)):  # where matplotlib looks first, and warns
            os.environ.setdefault("MPLCONFIGDIR", str(Path(cache) / "matplotlib"))
        return
    folder = _fallback()
    if folder is None:
        fault = f"no folder for caches can be written, neither {blocked or 'a home'} nor a temporary one: set TMPDIR to one that can"
        return
    os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ["TRITON_HOME"] = str(folder)
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))
    for variable in _VARIABLES & os.environ.keys():  # what they name may be what cannot be written
        os.environ[variable] = str(folder / variable.lower())
    if home is None:
        os.environ["HOME"] = str(folder)
    missing = f"{blocked} cannot be written" if blocked else "there is no home folder"
    note = f"{missing}: caches are kept in {folder}"


def _blocked(cache: Path, home: Path | None) -> Path | None:
    """The first of the folders that libraries keep caches in which cannot be written, such as one that sudo has left."""
    numba = Path(os.environ.get("NUMBA_CACHE_DIR") or cache / "numba")  # with a folder for each folder of source files
    places = [cache, cache / "fastbyol", numba, *numba.glob("*/")]
    if triton := os.environ.get("TRITON_CACHE_DIR") or os.environ.get("TRITON_HOME") or home:
        places.append(Path(triton) if "TRITON_CACHE_DIR" in os.environ else Path(triton, ".triton", "cache"))
    if inductor := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        places.append(Path(inductor))
    return next((place for place in places if not _can_write(place)), None)


def _can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which may still have to be made."""
    # os.path: of a folder that cannot be searched Path.exists raises.
    place = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))  # noqa: PTH110
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _fallback() -> Path | None:
    """A folder of this user alone: what lies in it is machine code that will be run."""
    for place in (Path(p) for p in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm") if p):
        folder = place / f"fastbyol-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            facts = folder.lstat()
            if folder.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
                return Path(tempfile.mkdtemp(prefix="fastbyol-", dir=place))
            if _can_write(folder):
                return folder
        except OSError:  # the next place may do
            continue
    return None
