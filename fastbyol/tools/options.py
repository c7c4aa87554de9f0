"""Options of the commands in tools/, data/ and weights/. Imports no torch, so that --help is fast.

The first line of a class's docstring is the command's help, the docstring below a field is the
option's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from fastbyol.settings.commands import Options
from fastbyol.settings.limits import ExpandedPath, Seed, Threads, at_least, at_most

_Images = Annotated[int, at_most(10**7)]
_Million = Annotated[int, at_most(10**6)]


@dataclass(kw_only=True)
class PhotosOptions(Options):
    """Crops of the photographs in scikit-image and scikit-learn, one class per photograph."""

    out: Path
    """Folder to create. It must not exist."""
    images: _Images = 5000
    """Number of images in train/. val/ gets a quarter of it."""
    seed: Seed = 0
    """Seed of the crops. The same seed gives identical files."""
    size: Annotated[int, at_most(4096)] | None = None
    """Longer side in pixels. By default images have about 500x375 pixels and 80-110 KB."""


@dataclass(kw_only=True)
class FashionOptions(Options):
    """Fashion-MNIST from its four idx files."""

    out: Path
    """Folder to create. It must not exist."""
    source: Path | None = None
    """Folder of the idx files. By default those of Debian's package are used, or else
    downloaded."""
    images: Annotated[int, at_least(1)] | None = None
    """Number of images in train/, from the first. By default all."""
    val_images: Annotated[int, at_least(1)] | None = None
    """Number of images in val/, from the first. By default all."""


@dataclass(kw_only=True)
class Cifar10Options(Options):
    """CIFAR-10 from its official python or binary version, or from image folders."""

    out: Path
    """Folder to create. It must not exist."""
    source: Path | None = None
    """Archive (.tar.gz and others) or unpacked folder. By default the python version is
    downloaded."""


@dataclass(kw_only=True)
class ImagenetteOptions(Options):
    """Imagenette from fast.ai's archive or its unpacked folder."""

    out: Path
    """Folder to create. It must not exist."""
    source: Path
    """imagenette2.tgz, imagenette2-320.tgz or imagenette2-160.tgz, or its unpacked folder."""


@dataclass(kw_only=True)
class ImagenetOptions(Options):
    """ImageNet-1k from its official archives or folders unpacked from them."""

    out: Path
    """Folder to create. It must not exist."""
    source: list[Path]
    """Folder of the official archives or of their unpacked files, or archives separated by commas.
    Files in folders are hard-linked if possible, else copied."""
    devkit: Path | None = None
    """ILSVRC2012_devkit_t12.tar.gz or its folder, for the classes of val/. By default it is looked
    for in the source."""
    val_list: Path | None = None
    """Text file with the classes of val/ instead: a file name and its wnid per line, or its index,
    0 to 999 in the order of the sorted wnids (as Caffe's val.txt)."""
    classes: ExpandedPath | None = None
    """imagenet100, or a file with one wnid per line. By default all 1000 classes."""

    @classmethod
    def key(cls, name: str) -> str:
        """Return the name with dashes: --val-list."""
        return super().key(name).replace("_", "-")


@dataclass(kw_only=True)
class PackOptions(Options):
    """Pack a split into one .beton file, which ffcv can read too."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("source", "out")
    source: ExpandedPath
    """One split: a folder, file, pattern or URL of images."""
    out: Path
    """.beton file to write. It must not exist."""
    mode: Literal["jpg", "raw", "auto"] = "auto"
    """jpg stores JPEGs, raw stores pixels, auto stores JPEGs but pixels for images of at most 16
    KB. JPEGs that need no change are copied."""
    max_side: int | None = None
    """Downscale images whose longer side has more pixels."""
    quality: int = 90
    """Quality of re-encoded JPEGs, 1 to 100."""
    skip_bad: bool = False
    """Skip unreadable images instead of stopping."""
    threads: Threads = 0
    """Threads that encode. 0 uses one per CPU core."""

    @classmethod
    def key(cls, name: str) -> str:
        """Return the name with dashes: --max-side."""
        return super().key(name).replace("_", "-")


@dataclass(kw_only=True)
class PreviewOptions(Options):
    """Draw 8 images of a config's data set and both views of each."""

    out: Path = Path("preview.png")
    """PNG file to write."""


@dataclass(kw_only=True)
class ProfileOptions(Options):
    """Profile a training step part by part."""

    steps: _Million = 20
    """Number of steps to measure."""
    out: Path = Path("profile")
    """Folder for the page, the figures and the trace."""


@dataclass(kw_only=True)
class BenchOptions(Options):
    """Measure the throughput of the loader, the step and both together, and report which one limits
    training.
    """

    rounds: _Million = 3
    """Number of rounds. Each measures everything once."""
    steps: _Million = 10
    """Number of steps per measurement."""
    out: Path | None = None
    """JSON file to write."""


@dataclass(kw_only=True)
class PlanOptions(Options):
    """Estimate throughput, duration, memory and network traffic of a config on other GPUs."""

    gpus: _Million = 1
    """Number of GPUs."""
    gpu: str | None = None
    """GPU model: a100-40, a100-80 or h100, with their published peak rates."""
    rates: Path | None = None
    """File of `fastbyol bench --out` with the measured rates of a machine, instead of `gpu`."""
    cores: _Million = 0
    """CPU cores per GPU for loading. 0 uses as many as needed."""
    images: Annotated[int, at_most(10**12)] = 0
    """Number of training images. 0 uses those in data.root, or else ImageNet's."""


@dataclass(kw_only=True)
class ConfigsOptions(Options):
    """List the configs that come with fastbyol, for --config NAME, or print one."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("name",)
    name: str | None = None
    """Print this config: `fastbyol configs demo > my.yaml`."""


@dataclass(kw_only=True)
class ReportOptions(Options):
    """Write report.html of a run."""

    run: Path
    """The run's folder."""
    root: ExpandedPath | None = None
    """Data set to take images from, if it is not where the run found it."""


@dataclass(kw_only=True)
class CompareOptions(Options):
    """Write a page that compares runs: settings, curves, evaluations."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("runs",)
    runs: list[Path]
    """Folders of two or more runs."""
    out: Path = Path("compare.html")
    """HTML file to write."""


@dataclass(kw_only=True)
class ExportOptions(Options):
    """Write a run's backbone for another library, with a model card."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("checkpoint",)
    checkpoint: Path
    """Checkpoint file, or a run's folder to use its latest checkpoint."""
    format: Literal["timm", "torchvision", "safetensors", "detectron2", "onnx"]
    """Format of the file. safetensors is fastbyol's own, which --init reads; timm, torchvision and
    detectron2 load theirs directly."""
    out: Path | None = None
    """File to write. It must not exist. By default it is next to the run."""


@dataclass(kw_only=True)
class PushOptions(Options):
    """Upload a run's backbone to the Hugging Face Hub, where timm loads it by name."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("checkpoint", "target")
    checkpoint: Path
    """Checkpoint file, or a run's folder to use its latest checkpoint."""
    target: str
    """hf://USER/NAME. The repository is created if it does not exist."""
    dry_run: Path | None = None
    """Folder to create with the files, instead of uploading them."""

    @classmethod
    def key(cls, name: str) -> str:
        """Return the name with dashes: --dry-run."""
        return super().key(name).replace("_", "-")
