"""The command line: sub-commands and their options, and what a process says and returns when one ends.

options.py reads the words; a command's options are a dataclass, and where it takes a config, those of config.py too.

Errors that a user can mend are one line on stderr: exit code 2 where the input is unusable, 1 where a run had to stop.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import ClassVar, Literal

from rich.console import Console
from rich.progress import Progress

from fastbyol import __version__
from fastbyol.config import EVALUATIONS, Config
from fastbyol.errors import (
    FastbyolError,
    InputError,
    PeerFailure,
    RunError,
    error_reason,
    first_line,
    is_out_of_memory,
    printable,
)
from fastbyol.runtime import caches
from fastbyol.runtime.console import safe_stdio, say
from fastbyol.runtime.logging import console_logging
from fastbyol.settings.base import expand_path, format_value, require
from fastbyol.settings.options import HELP, VERSION, Call, Command, Group, HelpAsked, Options, read

_NUMBA_THREADS = re.compile(r"\s*\+?0*[1-9][0-9]{0,5}\s*")
_WAIT_FOR_TORCHRUN_S = 10
_LOWER = "lower data.batch_size, data.image_size_px, data.threads, the model's width or what else is set high"


@dataclass(kw_only=True)
class PhotosOptions(Options):
    """Cuts of the photographs inside scikit-image and scikit-learn, one class each."""

    MOST: ClassVar[dict[str, float]] = {"images": 10**7, "size": 4096}
    out: Path
    """Folder to make; it must not exist."""
    images: int = 5000
    """Images in train/; val/ gets a quarter as many."""
    seed: int = 0
    """Same seed, same bytes."""
    size: int | None = None
    """Longer side in pixels; without it about 500x375 in 80-110 KB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seed >= 0, "--seed", self.seed, "must be 0 or more")


@dataclass(kw_only=True)
class FashionOptions(Options):
    """Fashion-MNIST from its four idx files."""

    out: Path
    """Folder to make; it must not exist."""
    source: Path | None = None
    """Folder of the idx files; else Debian's package, else a download."""
    images: int | None = None
    """Only the first so many images of train/."""
    val_images: int | None = None
    """Only the first so many images of val/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("images", "val_images"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}", value, "must be at least 1")


@dataclass(kw_only=True)
class ShapesOptions(Options):
    """Textured shapes on photographs, as VOC masks and as COCO boxes, for dense transfer."""

    MOST: ClassVar[dict[str, float]] = {"images": 10**7}
    out: Path
    """Folder to make; it must not exist."""
    images: int = 400
    """Training images; a quarter as many are for validation."""
    seed: int = 0
    """Same seed, same bytes."""
    size: int = 128
    """Side in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seed >= 0, "--seed", self.seed, "must be 0 or more")


@dataclass(kw_only=True)
class PackOptions(Options):
    """Write the images of a folder as one .beton file, which ffcv reads too."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "out")
    MOST: ClassVar[dict[str, float]] = {"threads": 4096}
    source: Path
    """One split: a folder of class folders or of images, or a .beton file."""
    out: Path
    """The .beton file to make; it must not exist."""
    mode: Literal["jpg", "raw", "auto"] = "auto"
    """JPEG files, raw pixels, or JPEG but raw where that takes at most 16 KB. JPEGs that need no change are copied."""
    max_side: int | None = None
    """Reduce images whose longer side has more pixels."""
    quality: int = 90
    """Of JPEGs that are made anew, 1 to 100."""
    skip_bad: bool = False
    """Leave unreadable images out instead of stopping."""
    threads: int = 0
    """0 takes one per CPU core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threads >= 0, "--threads", self.threads, "must be 0 (all cores) or more")

    @classmethod
    def key(cls, name: str) -> str:
        """With dashes only: --max-side."""
        return super().key(name).replace("_", "-")


@dataclass(kw_only=True)
class PreviewOptions(Options):
    """Draw 8 images of a config's data set and both their views."""

    out: Path = Path("preview.png")
    """PNG file to write."""


@dataclass(kw_only=True)
class ProfileOptions(Options):
    """Say where the milliseconds of a training step go."""

    MOST: ClassVar[dict[str, float]] = {"steps": 10**6}
    steps: int = 20
    """Steps that are measured part by part."""
    out: Path = Path("profile")
    """Folder for the page, the figures and the trace."""


@dataclass(kw_only=True)
class BenchOptions(Options):
    """Time loader, step and both together, beside the step's bound."""

    MOST: ClassVar[dict[str, float]] = {"rounds": 10**6, "steps": 10**6}
    rounds: int = 3
    """Turns of each measurement."""
    steps: int = 10
    """Steps of a turn."""
    out: Path | None = None
    """JSON file to write."""


@dataclass(kw_only=True)
class PlanOptions(Options):
    """Estimate rate, time, memory and network of a config on GPUs that are not here."""

    MOST: ClassVar[dict[str, float]] = {"gpus": 10**6, "cores": 10**6, "images": 10**12}
    gpus: int = 1
    """How many."""
    gpu: str | None = None
    """a100-40, a100-80 or h100: their published rates."""
    rates: Path | None = None
    """Instead: file of `fastbyol bench --out`, the rates of a machine."""
    cores: int = 0
    """CPU cores beside each GPU that load images; 0: as many as it takes."""
    images: int = 0
    """Training images; 0: those in data.root, else ImageNet's."""


@dataclass(kw_only=True)
class ReportOptions(Options):
    """Write report.html of a run."""

    run: Path
    """The run's folder."""
    root: str | None = None
    """Data set that the pictures are taken from, where it is not where the run had it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root is not None:
            self.root = expand_path(self.root, "--root")


@dataclass(kw_only=True)
class ExportOptions(Options):
    """Write a run's backbone for another library, with a model card."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("checkpoint",)
    checkpoint: Path
    """Checkpoint file, or a run's folder: its newest one."""
    format: Literal["timm", "torchvision", "safetensors", "detectron2", "onnx"]
    """safetensors is fastbyol's own, which --init reads; timm, torchvision and detectron2 load theirs directly."""
    out: Path | None = None
    """File to write; it must not exist. Without it beside the run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    with safe_stdio() as output, console_logging(), _signals_unwind():
        if caches.note is not None and local_rank() == 0:
            print(f"fastbyol: note: {caches.note}", file=sys.stderr)
        code = _run(given)
        if output.lost is None or output.reader_left:
            return code
        print(f"fastbyol: warning: standard output cannot be written: {output.lost}", file=sys.stderr)
        printed_only = (
            not given or given[0] in ("doctor", "plan", "bench", "help") or not {*HELP, *VERSION}.isdisjoint(given)
        )
        return max(code, 1) if printed_only else code


def _run(given: Sequence[str]) -> int:
    if caches.fault is not None:
        return _fail(caches.fault, 1)
    try:
        os.getcwd()  # noqa: PTH109 - Path.cwd() is the same
    except FileNotFoundError:  # torch's libraries end the process where there is none
        return _fail("the working directory is gone: cd to one that exists", 2)
    try:
        if len(given) == 1 and given[0] in VERSION:
            print(f"fastbyol {__version__}")
            return 0
        with _one_speaks():
            call = read(given, COMMANDS)
            _check_environment(call)
        return call.command.work(call)
    except HelpAsked as page:
        if local_rank() == 0:
            print(page)
        return 0
    except PeerFailure as error:
        return error.exit_code
    except FastbyolError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except _Ended as signaled:
        return _fail(f"ended by {signaled.number.name}", 128 + signaled.number)
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(str(RunError(f"out of memory or threads: {first_line(error)}; {_LOWER}")), 1)
    except OSError as error:
        where = f"{format_value(error.filename)}: " if error.filename is not None else ""
        return _fail(str(RunError(f"{where}{error_reason(error)}")), 1)


class _Ended(BaseException):
    """A signal asks the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does, so that what is half written is removed; a training saves besides.

    Not under torchrun: a process that waits for one which is gone could not be ended so.
    """
    mine = threading.current_thread() is threading.main_thread() and "TORCHELASTIC_RUN_ID" not in os.environ
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if mine and signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once
    raise _Ended(number)


def local_rank() -> int:
    """Number of this process among those that torchrun has started on the machine; 0 without torchrun."""
    rank = os.environ.get("LOCAL_RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    return int(rank) if rank.isdecimal() else 0


@contextmanager
def _one_speaks() -> Iterator[None]:
    """torchrun gives all its processes the same words: one process of a machine says what is wrong with them."""
    try:
        yield
    except InputError:
        if local_rank() == 0:
            raise
        time.sleep(_WAIT_FOR_TORCHRUN_S)  # it ends all processes as soon as one has ended: let the one speak first
        raise PeerFailure from None


def _check_environment(call: Call) -> None:
    """Refuses variables that numba answers with a traceback, and torchrun where processes would write the same files."""
    threads = os.environ.get("NUMBA_NUM_THREADS")
    if threads is not None and not _NUMBA_THREADS.fullmatch(threads):
        raise InputError(
            f"NUMBA_NUM_THREADS={format_value(threads)} in the environment: expected a whole number of at least 1"
        )
    processes = os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ else "1"
    if processes != "1" and not call.command.takes_ranks:
        raise InputError(
            f"{call.name} runs in one process, but torchrun started {processes}: start it without torchrun"
        )


def _fail(text: str, code: int) -> int:
    print(f"fastbyol: error: {printable(text)}", file=sys.stderr)
    return code


def train_config(words: Sequence[str]) -> Config:
    """The config that `fastbyol train WORDS` runs with.

    Raises:
        InputError: it is not one.
    """
    return read(["train", *words], COMMANDS).config


def _train(call: Call) -> int:
    from fastbyol.tools.report import write_report
    from fastbyol.train import train

    result = train(call.config)
    if result.finished_before:
        return 0
    if result.stopped_by is not None:
        return 130 if result.stopped_by == signal.SIGINT else 0
    if result.first_rank:
        try:
            say(f"report: {write_report(result.folder, say)}")
        except InputError as error:  # the run is over: this is no mistake in its input
            raise RunError(str(error)) from None
    return 0


def _eval(call: Call) -> int:
    from fastbyol.evaluate import evaluate
    from fastbyol.tools.report import refresh_report

    evaluate(call.name, call.options, say)
    try:
        refresh_report(Path(call.options.run), say, root=call.options.root)
    except FastbyolError as error:  # the run's folder may not be ours; the result is written
        say(f"warning: {error}")
    return 0


def _prepare(call: Call) -> int:
    from fastbyol.tools.corpora import prepare_fashion_mnist, prepare_photos
    from fastbyol.tools.shapes import prepare_shapes

    writers = {"photos": prepare_photos, "fashion-mnist": prepare_fashion_mnist, "shapes": prepare_shapes}
    say(_with_progress(call.name, partial(writers[call.name], **asdict(call.options))))
    return 0


def _pack(call: Call) -> int:
    from fastbyol.data import open_split
    from fastbyol.data.pack import pack

    options = asdict(call.options)
    source = options.pop("source")
    images = open_split(source, ".", key="source")
    for note in images.notes:
        say(f"warning: {note}")
    say(_with_progress("pack", partial(pack, images, options.pop("out"), **options)))
    return 0


def _with_progress(name: str, work: Callable[..., str]) -> str:
    """work(progress=...) beside a progress bar."""
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        return work(progress=lambda done, total: progress.update(task, completed=done, total=total))


def _preview(call: Call) -> int:
    from fastbyol.tools.preview import write_preview

    say(write_preview(call.config, call.options.out, say))
    return 0


def _profile(call: Call) -> int:
    from fastbyol.tools.profiling import profile

    profile(call.config, **asdict(call.options), say=say)
    return 0


def _bench(call: Call) -> int:
    from fastbyol.tools.bench import bench

    bench(call.config, **asdict(call.options), say=say)
    return 0


def _plan(call: Call) -> int:
    from fastbyol.tools.plan import plan

    plan(call.config, **asdict(call.options), say=say)
    return 0


def _report(call: Call) -> int:
    from fastbyol.tools.report import write_report

    say(write_report(call.options.run, say, root=call.options.root))
    return 0


def _export(call: Call) -> int:
    from fastbyol.weights.export import export

    say(export(call.options.checkpoint, call.options.format, call.options.out, say))
    return 0


def _doctor(call: Call) -> int:
    from fastbyol.tools.doctor import diagnose

    return diagnose(say)


COMMANDS = Group(
    "BYOL pre-training of vision backbones, as fast as the hardware allows.",
    {
        "train": Command(_train, text="Pre-train a backbone.", takes_config=True, takes_ranks=True),
        "eval": Group(
            "Evaluate the features of a checkpoint.",
            {name: Command(_eval, options) for name, options in EVALUATIONS.items()},
        ),
        "prepare": Group(
            "Make an image folder from what is on the machine.",
            {
                "photos": Command(_prepare, PhotosOptions),
                "fashion-mnist": Command(_prepare, FashionOptions),
                "shapes": Command(_prepare, ShapesOptions),
            },
        ),
        "pack": Command(_pack, PackOptions),
        "preview": Command(_preview, PreviewOptions, takes_config=True),
        "profile": Command(_profile, ProfileOptions, takes_config=True, takes_ranks=True),
        "bench": Command(_bench, BenchOptions, takes_config=True, takes_ranks=True),
        "plan": Command(_plan, PlanOptions, takes_config=True),
        "report": Command(_report, ReportOptions),
        "export": Command(_export, ExportOptions),
        "doctor": Command(_doctor, text="Say what works on this machine and what mends the rest.", takes_ranks=True),
    },
)
