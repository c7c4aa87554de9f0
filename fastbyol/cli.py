"""The command line: sub-commands and their arguments, no logic.

Errors that a user can mend are one line on stderr: exit code 2 where the input is unusable, 1 where a run had to stop.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console
from rich.progress import Progress

from fastbyol import __version__
from fastbyol.config import EVALUATIONS, Config
from fastbyol.errors import FastbyolError, InputError, StoppedByAnother

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_ALIASES = {"--batch-size": "--data.batch_size"}
_NO_CONFIG = ("out", "steps", "rounds", "gpus", "gpu", "rates", "cores", "images")  # options beside a config's
_LISTS = ("--shots", "--base_lrs")  # take 1,5,10 as well as [1,5,10]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    arguments = _plainly(given)
    try:
        args = _parser().parse_args(arguments)
        return _COMMANDS[args.subcommand](args[args.subcommand])
    except argparse.ArgumentError as error:
        return _fail(" ".join(str(error).split()), 2)
    except StoppedByAnother as error:
        return error.exit_code
    except FastbyolError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _plainly(arguments: Sequence[str]) -> list[str]:
    """The arguments in the parser's own spelling."""
    words: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            key, value = "", argument
        if (equals and key in _LISTS) or (words and words[-1] in _LISTS and not key):
            value = value if value.startswith("[") else f"[{value}]"
        words.append(_ALIASES.get(key, key) + equals + value if key else value)
    return words


def _fail(text: str, code: int) -> int:
    print(f"fastbyol: error: {text}", file=sys.stderr)
    return code


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="fastbyol",
        description="BYOL pre-training of vision backbones, as fast as the hardware allows.",
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(metavar="COMMAND")

    def add(to: Any, name: str, text: str) -> ArgumentParser:
        sub = ArgumentParser(description=text, exit_on_error=False)
        to.add_subcommand(name, sub, help=text)
        return sub

    train = add(commands, "train", "Pre-train a backbone.")
    _add_config(train)

    evaluation = add(commands, "eval", "Evaluate the features of a checkpoint.").add_subcommands(metavar="PROTOCOL")
    for name, options in EVALUATIONS.items():
        add(evaluation, name, (options.__doc__ or "").splitlines()[0]).add_class_arguments(options)

    prepare = add(commands, "prepare", "Make an image folder from what is on the machine.").add_subcommands(
        metavar="CORPUS"
    )
    photos = add(prepare, "photos", "Cuts of the photographs inside scikit-image and scikit-learn, one class each.")
    photos.add_argument("--out", type=Path, required=True, help="Folder to make; it must not exist.")
    photos.add_argument("--images", type=int, default=5000, help="Images in train/; val/ gets a quarter as many.")
    photos.add_argument("--seed", type=int, default=0, help="Same seed, same bytes.")
    photos.add_argument("--size", type=int, help="Longer side in pixels; without it about 500x375 in 80-110 KB.")
    fashion = add(prepare, "fashion-mnist", "Fashion-MNIST from its four idx files.")
    fashion.add_argument("--out", type=Path, required=True, help="Folder to make; it must not exist.")
    fashion.add_argument("--source", type=Path, help="Folder of the idx files; else Debian's package, else a download.")
    fashion.add_argument("--images", type=int, help="Only the first so many images of train/.")
    fashion.add_argument("--val_images", type=int, help="Only the first so many images of val/.")

    shapes = add(
        prepare, "shapes", "Textured shapes on photographs, as VOC masks and as COCO boxes, for dense transfer."
    )
    shapes.add_argument("--out", type=Path, required=True, help="Folder to make; it must not exist.")
    shapes.add_argument(
        "--images", type=int, default=400, help="Training images; a quarter as many are for validation."
    )
    shapes.add_argument("--seed", type=int, default=0, help="Same seed, same bytes.")
    shapes.add_argument("--size", type=int, default=128, help="Side in pixels.")

    pack = add(commands, "pack", "Write the images of a folder as one .beton file, which ffcv reads too.")
    pack.add_argument("source", type=Path, help="One split: a folder of class folders or of images, or a .beton file.")
    pack.add_argument("out", type=Path, help="The .beton file to make; it must not exist.")
    pack.add_argument(
        "--mode",
        type=Literal["jpg", "raw", "auto"],
        default="auto",
        help="JPEG files, raw pixels, or JPEG but raw where that takes at most 16 KB. JPEGs that need no change are copied.",
    )
    pack.add_argument("--max-side", type=int, help="Reduce images whose longer side has more pixels.")
    pack.add_argument("--quality", type=int, default=90, help="Of JPEGs that are made anew, 1 to 100.")
    pack.add_argument("--skip-bad", action="store_true", help="Leave unreadable images out instead of stopping.")
    pack.add_argument("--threads", type=int, default=0, help="0 takes one per CPU core.")

    preview = add(commands, "preview", "Draw 8 images of a config's data set and both their views.")
    _add_config(preview)
    preview.add_argument("--out", type=Path, default=Path("preview.png"), help="PNG file to write.")

    profile = add(commands, "profile", "Say where the milliseconds of a training step go.")
    _add_config(profile)
    profile.add_argument("--steps", type=int, default=20, help="Steps that are measured part by part.")
    profile.add_argument(
        "--out", type=Path, default=Path("profile"), help="Folder for the page, the figures and the trace."
    )

    bench = add(commands, "bench", "Time loader, step and both together, beside the step's bound.")
    _add_config(bench)
    bench.add_argument("--rounds", type=int, default=3, help="Turns of each measurement.")
    bench.add_argument("--steps", type=int, default=10, help="Steps of a turn.")
    bench.add_argument("--out", type=Path, help="JSON file to write.")

    plan = add(commands, "plan", "Estimate rate, time, memory and network of a config on GPUs that are not here.")
    _add_config(plan)
    plan.add_argument("--gpus", type=int, default=1, help="How many.")
    plan.add_argument("--gpu", type=str, help="a100-40, a100-80 or h100: their published rates.")
    plan.add_argument("--rates", type=Path, help="Instead: file of `fastbyol bench --out`, the rates of a machine.")
    plan.add_argument(
        "--cores", type=int, default=0, help="CPU cores beside each GPU that load images; 0: as many as it takes."
    )
    plan.add_argument("--images", type=int, default=0, help="Training images; 0: those in data.root, else ImageNet's.")

    report = add(commands, "report", "Write report.html of a run.")
    report.add_argument("--run", type=Path, required=True, help="The run's folder.")

    export = add(commands, "export", "Write a run's backbone for another library, with a model card.")
    export.add_argument("checkpoint", type=Path, help="Checkpoint file, or a run's folder: its newest one.")
    export.add_argument(
        "--format",
        type=Literal["timm", "torchvision", "safetensors", "detectron2", "onnx"],
        required=True,
        help="safetensors is fastbyol's own, which --init reads; timm, torchvision and detectron2 load theirs directly.",
    )
    export.add_argument("--out", type=Path, help="File to write; it must not exist. Without it beside the run.")

    add(commands, "doctor", "Say what works on this machine and what mends the rest.")
    return parser


def _add_config(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file; later options override it.")
    parser.add_class_arguments(Config)


def _config(args: Namespace) -> Config:
    values = args.as_dict()
    for key in ("config", *_NO_CONFIG):
        values.pop(key, None)
    try:
        return Config.from_dict(values)
    except ValueError as error:
        raise InputError(str(error)) from None


def train_config(words: Sequence[str]) -> Config:
    """The config that `fastbyol train WORDS` runs with.

    Raises:
        InputError, argparse.ArgumentError: it is not one.
    """
    return _config(_parser().parse_args(["train", *_plainly(words)]).train)


def _train(args: Namespace) -> int:
    from fastbyol.report import write_report
    from fastbyol.train import train

    config = _config(args)
    result = train(config)
    if result.stopped_by is not None:
        return 130 if result.stopped_by == signal.SIGINT else 0
    if result.first_rank:
        print(f"report: {write_report(result.folder, print)}")
    return 0


def _eval(args: Namespace) -> int:
    from fastbyol.evaluate import evaluate
    from fastbyol.report import refresh_report

    try:
        options = EVALUATIONS[args.subcommand](**args[args.subcommand].as_dict())
    except ValueError as error:
        raise InputError(str(error)) from None
    evaluate(args.subcommand, options, print)
    refresh_report(Path(options.run), print)
    return 0


def _prepare(args: Namespace) -> int:
    from fastbyol.data.prepare import prepare_fashion_mnist, prepare_photos
    from fastbyol.data.shapes import prepare_shapes

    options = args[args.subcommand].as_dict()
    writers = {"photos": prepare_photos, "fashion-mnist": prepare_fashion_mnist, "shapes": prepare_shapes}
    writer = writers[args.subcommand]
    print(_with_progress(args.subcommand, partial(writer, **options)))
    return 0


def _pack(args: Namespace) -> int:
    from fastbyol.data import open_split
    from fastbyol.data.beton import pack

    options = args.as_dict()
    source = options.pop("source")
    images = open_split(source, ".", key="source")
    for note in images.notes:
        print(f"warning: {note}")
    print(_with_progress("pack", partial(pack, images, options.pop("out"), **options)))
    return 0


def _with_progress(name: str, work: Callable[..., str]) -> str:
    """work(progress=...) beside a progress bar."""
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        return work(progress=lambda done, total: progress.update(task, completed=done, total=total))


def _preview(args: Namespace) -> int:
    from fastbyol.preview import write_preview

    print(write_preview(_config(args), args.out))
    return 0


def _profile(args: Namespace) -> int:
    from fastbyol.profiling import profile

    profile(_config(args), steps=args.steps, out=args.out, say=print)
    return 0


def _bench(args: Namespace) -> int:
    from fastbyol.bench import bench

    bench(_config(args), rounds=args.rounds, steps=args.steps, out=args.out, say=print)
    return 0


def _plan(args: Namespace) -> int:
    from fastbyol.plan import plan

    options = {key: args[key] for key in ("gpus", "gpu", "rates", "cores", "images")}
    plan(_config(args), **options, say=print)
    return 0


def _report(args: Namespace) -> int:
    from fastbyol.report import write_report

    print(write_report(args.run, print))
    return 0


def _export(args: Namespace) -> int:
    from fastbyol.export import export

    print(export(args.checkpoint, args.format, args.out, print))
    return 0


def _doctor(args: Namespace) -> int:
    from fastbyol.doctor import diagnose

    return diagnose(print)


_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "prepare": _prepare,
    "pack": _pack,
    "preview": _preview,
    "profile": _profile,
    "bench": _bench,
    "plan": _plan,
    "report": _report,
    "export": _export,
    "doctor": _doctor,
}
