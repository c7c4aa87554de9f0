"""The command line: the table of commands, main(), and what it prints and returns on errors.

Errors that the user can fix are one line on stderr. The exit code is 2 for unusable input and 1 for
a run that had to stop.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import Progress

from fastbyol import __version__
from fastbyol.config import Config
from fastbyol.errors import (
    FastbyolError,
    InputError,
    PeerFailure,
    RunError,
    StorageError,
    error_reason,
    first_line,
    is_out_of_memory,
    printable,
)
from fastbyol.evaluation.options import EVALUATIONS, EmbedConfig
from fastbyol.runtime import caches
from fastbyol.runtime.console import safe_stdio
from fastbyol.runtime.logging import console_logging, logger, muted
from fastbyol.settings.command_line import HelpRequested, parse_command_line
from fastbyol.settings.commands import HELP, VERSION, Call, Command, Group
from fastbyol.settings.messages import format_value
from fastbyol.tools import options

_NUMBA_THREADS = re.compile(r"\s*\+?0*[1-9][0-9]{0,5}\s*")
_WAIT_FOR_TORCHRUN_S = 10
_PRINT_ONLY = ("configs", "doctor", "plan", "bench", "help")  # commands whose only result is what they print
_SAVE_MEMORY = "lower data.batch_size, data.image_size_px, data.threads, the model's width or other large settings"
_SAVE_MEMORY_IN_EVALUATION = "lower --threads and other large options, or use more GPUs with torchrun"


def _train(call: Call) -> int:
    from fastbyol.api import train
    from fastbyol.tools.report import write_report

    result = train(call.config)
    if result.already_finished:
        return 0
    if result.stopped_by is not None:
        return 130 if result.stopped_by == signal.SIGINT else 0
    if result.is_main_process:
        try:
            logger.info(f"report: {write_report(result.folder)}")
        except (InputError, StorageError) as error:  # the run is over, so its input was fine
            raise RunError(str(error)) from None
    return 0


def _eval(call: Call) -> int:
    from fastbyol.evaluation.run import evaluate
    from fastbyol.runtime.distributed import world_from_environment
    from fastbyol.tools.report import refresh_report

    evaluate(call.name, call.options)
    if not world_from_environment().is_main_process:
        return 0
    try:
        refresh_report(Path(call.options.run), root=call.options.root)
    except FastbyolError as error:  # the result is saved; the run's folder may be read-only
        logger.warning(str(error))
    return 0


def _embed(call: Call) -> int:
    from fastbyol.evaluation.embed import embed

    embed(call.options)
    return 0


def _prepare(call: Call) -> int:
    from fastbyol.tools.corpora import prepare_fashion_mnist, prepare_photos
    from fastbyol.tools.image_sets import prepare_cifar10, prepare_imagenette
    from fastbyol.tools.imagenet import prepare_imagenet

    prepare = {
        "photos": prepare_photos,
        "fashion-mnist": prepare_fashion_mnist,
        "cifar10": prepare_cifar10,
        "imagenette": prepare_imagenette,
        "imagenet": prepare_imagenet,
    }[call.name]
    logger.info(_with_progress_bar(call.name, partial(prepare, **asdict(call.options))))
    return 0


def _pack(call: Call) -> int:
    from fastbyol.data import open_split
    from fastbyol.data.pack import pack

    arguments = asdict(call.options)
    images = open_split(arguments.pop("source"), ".", key="source")
    for note in images.notes:
        logger.warning(note)
    logger.info(_with_progress_bar("pack", partial(pack, images, arguments.pop("out"), **arguments)))
    return 0


def _with_progress_bar(name: str, work: Callable[..., str]) -> str:
    """Return work(progress=update), where update(done, total) moves a progress bar."""
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        return work(progress=lambda done, total: bar.update(task, completed=done, total=total))


def _preview(call: Call) -> int:
    from fastbyol.tools.preview import write_preview

    logger.info(write_preview(call.config, call.options.out))
    return 0


def _profile(call: Call) -> int:
    from fastbyol.tools.profiling import profile

    profile(call.config, **asdict(call.options))
    return 0


def _bench(call: Call) -> int:
    from fastbyol.tools.bench import bench

    bench(call.config, **asdict(call.options))
    return 0


def _tune(call: Call) -> int:
    from fastbyol.tools.tune import tune_config

    tune_config(call.config)
    return 0


def _plan(call: Call) -> int:
    from fastbyol.tools.plan import plan

    plan(call.config, **asdict(call.options))
    return 0


def _report(call: Call) -> int:
    from fastbyol.tools.report import write_report

    logger.info(write_report(call.options.run, root=call.options.root))
    return 0


def _compare(call: Call) -> int:
    from fastbyol.tools.compare import write_comparison

    logger.info(write_comparison(call.options.runs, call.options.out))
    return 0


def _export(call: Call) -> int:
    from fastbyol.weights.export import export

    logger.info(export(call.options.checkpoint, call.options.format, call.options.out))
    return 0


def _configs(call: Call) -> int:
    from fastbyol.tools.configs import print_config, print_configs

    if call.options.name is None:
        print_configs()
    else:
        print_config(call.options.name)
    return 0


def _push(call: Call) -> int:
    from fastbyol.weights.push import push

    logger.info(push(call.options.checkpoint, call.options.target, call.options.dry_run))
    return 0


def _doctor(call: Call) -> int:
    from fastbyol.tools.doctor import diagnose

    return diagnose()


COMMANDS = Group(
    "BYOL pre-training of vision backbones, as fast as the hardware allows.",
    {
        "train": Command(_train, text="Pre-train a backbone.", takes_config=True, takes_ranks=True),
        "eval": Group(
            "Evaluate the features of a checkpoint.",
            {name: Command(_eval, kind, takes_ranks=True, builds_networks=True) for name, kind in EVALUATIONS.items()},
        ),
        "embed": Command(_embed, EmbedConfig, takes_ranks=True, builds_networks=True),
        "prepare": Group(
            "Create an image folder from bundled photographs or the published files of a data set.",
            {
                "photos": Command(_prepare, options.PhotosOptions),
                "fashion-mnist": Command(_prepare, options.FashionOptions),
                "cifar10": Command(_prepare, options.Cifar10Options),
                "imagenette": Command(_prepare, options.ImagenetteOptions),
                "imagenet": Command(_prepare, options.ImagenetOptions),
            },
        ),
        "pack": Command(_pack, options.PackOptions),
        "preview": Command(_preview, options.PreviewOptions, takes_config=True),
        "profile": Command(_profile, options.ProfileOptions, takes_config=True, takes_ranks=True),
        "bench": Command(_bench, options.BenchOptions, takes_config=True, takes_ranks=True),
        "tune": Command(
            _tune,
            text="Measure the kernels of 1x1 convolutions again, with data.batch_size images on one GPU.",
            takes_config=True,
        ),
        "plan": Command(_plan, options.PlanOptions, takes_config=True),
        "report": Command(_report, options.ReportOptions, builds_networks=True),
        "compare": Command(_compare, options.CompareOptions),
        "export": Command(_export, options.ExportOptions, builds_networks=True),
        "configs": Command(_configs, options.ConfigsOptions),
        "push": Command(_push, options.PushOptions, builds_networks=True),
        "doctor": Command(
            _doctor, text="Check what works on this machine and how to fix what does not.", takes_ranks=True
        ),
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: the words after `fastbyol`; sys.argv by default.
    """
    words = sys.argv[1:] if arguments is None else arguments
    with safe_stdio() as output, console_logging(), _signals_raise():
        if caches.note is not None and local_rank() == 0:
            print(f"fastbyol: note: {caches.note}", file=sys.stderr)
        code = _run(words)
        if output.lost is None or output.reader_left:
            return code
        print(f"fastbyol: warning: standard output cannot be written: {output.lost}", file=sys.stderr)
        print_only = not words or words[0] in _PRINT_ONLY or not {*HELP, *VERSION}.isdisjoint(words)
        return max(code, 1) if print_only else code


def train_config(words: Sequence[str]) -> Config:
    """Return the config of `fastbyol train WORDS`.

    Raises:
        InputError: the words or the config are invalid.
    """
    return parse_command_line(["train", *words], COMMANDS).config


def _run(words: Sequence[str]) -> int:
    """Run a command, and turn errors into one line and an exit code."""
    if caches.error is not None:
        return _fail(caches.error, 1)
    try:
        os.getcwd()  # noqa: PTH109 - Path.cwd() is the same
    except FileNotFoundError:  # torch's libraries would abort the process
        return _fail("the working directory is gone: cd to one that exists", 2)
    try:
        return _parse_and_run(words)
    except HelpRequested as page:
        if local_rank() == 0:
            print(page)
        return 0
    except PeerFailure as error:
        return error.exit_code
    except FastbyolError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except _Signaled as error:
        return _fail(f"ended by {error.signal.name}", 128 + error.signal)
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = _SAVE_MEMORY_IN_EVALUATION if words and words[0] in ("eval", "embed") else _SAVE_MEMORY
        return _fail(str(RunError(f"out of memory or threads: {first_line(error)}; {remedy}")), 1)
    except OSError as error:
        path = f"{format_value(error.filename)}: " if error.filename is not None else ""
        return _fail(str(RunError(f"{path}{error_reason(error)}")), 1)


def _parse_and_run(words: Sequence[str]) -> int:
    if len(words) == 1 and words[0] in VERSION:
        print(f"fastbyol {__version__}")
        return 0
    with _one_error_per_machine(), muted(local_rank() != 0):
        call = parse_command_line(words, COMMANDS)
        _check_environment(call)
        if call.modules:
            from fastbyol.plugins import import_module

            for module in call.modules:
                import_module(module)
    return call.command.run(call)


def _fail(text: str, code: int) -> int:
    print(f"fastbyol: error: {printable(text)}", file=sys.stderr)
    return code


class _Signaled(BaseException):
    """A signal asks the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Context manager: SIGTERM and SIGHUP raise, as Ctrl-C does, so that partial files are removed.

    Not under torchrun: a process that waits for another one that has died must still end on a
    signal.
    """
    ours = threading.current_thread() is threading.main_thread() and "TORCHELASTIC_RUN_ID" not in os.environ
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if ours and signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _raise_signaled)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _raise_signaled(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once
    raise _Signaled(number)


def local_rank() -> int:
    """Return the local rank of this process under torchrun, 0 otherwise."""
    rank = os.environ.get("LOCAL_RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    return int(rank) if rank.isdecimal() else 0


@contextmanager
def _one_error_per_machine() -> Iterator[None]:
    """Context manager: only local rank 0 reports an InputError of the shared command line."""
    try:
        yield
    except InputError:
        if local_rank() == 0:
            raise
        time.sleep(_WAIT_FOR_TORCHRUN_S)  # torchrun ends all ranks when one ends: let rank 0 report first
        raise PeerFailure from None


def _check_environment(call: Call) -> None:
    """Check environment variables.

    Raises:
        InputError: numba could not parse NUMBA_NUM_THREADS; or torchrun started multiple processes
            of a command whose processes would write the same files.
    """
    threads = os.environ.get("NUMBA_NUM_THREADS")
    if threads is not None and not _NUMBA_THREADS.fullmatch(threads):
        given = f"NUMBA_NUM_THREADS={format_value(threads)} in the environment"
        raise InputError(f"{given}: expected an integer of at least 1")
    processes = os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ else "1"
    if processes != "1" and not call.command.takes_ranks:
        raise InputError(
            f"{call.name} runs in one process, but torchrun started {processes}: start it without torchrun"
        )
