"""fastbyol: BYOL (Bootstrap Your Own Latent, arXiv 2006.07733) pre-training of vision backbones.

The names below are the public API. They load on first use, so `import fastbyol` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastbyol.runtime import caches

if TYPE_CHECKING:
    from fastbyol.api import build_loader as build_loader
    from fastbyol.api import embed as embed
    from fastbyol.api import evaluate as evaluate
    from fastbyol.api import load_backbone as load_backbone
    from fastbyol.api import train as train
    from fastbyol.callbacks import Callback as Callback
    from fastbyol.config import Config as Config
    from fastbyol.data.images import ImageSet as ImageSet
    from fastbyol.errors import FastbyolError as FastbyolError
    from fastbyol.errors import InputError as InputError
    from fastbyol.errors import RunError as RunError
    from fastbyol.loop import RunResult as RunResult
    from fastbyol.model import BYOL as BYOL
    from fastbyol.optim import LARS as LARS
    from fastbyol.optim import parameter_groups as parameter_groups
    from fastbyol.plugins import import_module as import_module
    from fastbyol.plugins import register_backbone as register_backbone
    from fastbyol.plugins import register_image_set as register_image_set

__version__ = "0.2.0.dev0"

_PUBLIC = {
    "BYOL": "model",
    "Callback": "callbacks",
    "Config": "config",
    "FastbyolError": "errors",
    "ImageSet": "data.images",
    "InputError": "errors",
    "LARS": "optim",
    "RunError": "errors",
    "RunResult": "loop",
    "build_loader": "api",
    "embed": "api",
    "evaluate": "api",
    "import_module": "plugins",
    "load_backbone": "api",
    "parameter_groups": "optim",
    "register_backbone": "plugins",
    "register_image_set": "plugins",
    "train": "api",
}
"""Name -> module below fastbyol."""

__all__ = [*_PUBLIC]

caches.prepare()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastbyol' has no attribute {name!r}")
    value = getattr(import_module(f"fastbyol.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
