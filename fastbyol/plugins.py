"""Backbones and image sets from outside of fastbyol: registered, installed, or of a named module.

A config or a checkpoint may come from a stranger, so it can name code, but never run it: only
modules that the user has named are used (`--import`, `import_module`), and entry points of packages
that the user has installed.
"""

import copy
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from torch import nn

from fastbyol.errors import InputError, first_line
from fastbyol.settings.limits import URL

Factory = Callable[..., nn.Module]
Opener = Callable[[str, str], Any]
"""(location, split) -> images of a split, or None if there is no such split."""

BACKBONE_GROUP, IMAGE_SET_GROUP = "fastbyol.backbones", "fastbyol.image_sets"
OBJECT = "object:"
"""Prefix of the names of backbones that were given as objects."""

_backbones: dict[str, Factory] = {}
_image_sets: dict[str, Opener] = {}
_modules: set[str] = set()
_given: Factory | None = None  # in `backbone_object`


def import_module(name: str) -> None:
    """Import a module, and allow configs and checkpoints to name its functions.

    A module in the working directory is found too.

    Raises:
        InputError: there is no such module, or importing it raises an exception.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"--import {name}: there is no module {error.name} in {Path.cwd()} or among the installed packages"
            ) from None
        raise InputError(f"--import {name}: {_where(error)}") from None
    except Exception as error:  # of the module's own code
        raise InputError(f"--import {name}: {_where(error)}") from None
    _modules.add(name)


def _where(error: BaseException) -> str:
    """Return an exception and where it was raised, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def register_backbone(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make a function available as `model.backbone: name`.

    The function takes `model.backbone_args` and returns a module (B, 3, H, W) -> (B, F).

    Raises:
        ValueError: the name is taken.
    """
    return _register(_backbones, name)


def register_image_set(scheme: str) -> Callable[[Opener], Opener]:
    """Decorator: make a function available as `data.root: scheme://location`.

    The function takes the location and the name of a split, and returns its images in any form that
    `fastbyol.train` accepts, or None if there is no such split.

    Raises:
        ValueError: the scheme is taken, or is none of a URL, in lower case.
    """
    if URL.fullmatch(f"{scheme}://") is None or scheme != scheme.lower():
        raise ValueError(f"{scheme!r} is no scheme of a URL: use lower-case letters, digits and '-'")
    return _register(_image_sets, scheme)


def _register(registry: dict[str, Any], name: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        before = registry.get(name)
        if before is not None and (before.__module__, before.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise ValueError(f"{name!r} is already registered")
        registry[name] = function  # again, if its module was reloaded
        return function

    return register


def backbone_factory(name: str) -> Factory | None:
    """Return the factory of a backbone that is not timm's; None if the name is not known.

    Raises:
        InputError: the name is MODULE:FACTORY of a module that the user has not named, or the
            backbone was given as an object.
    """
    if name in _backbones:
        return _backbones[name]
    if name.startswith(OBJECT):
        if _given is not None:
            return _given
        raise InputError(
            f"model.backbone={name}: the run's backbone was a Python object; give it again as backbone=... in Python"
        )
    if (point := _entry_point(BACKBONE_GROUP, name)) is not None:
        return _load(point, f"model.backbone={name}")
    module, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), attribute]):
        return None
    if module not in _modules:
        raise InputError(
            f"model.backbone={name}: runs code of the module {module}; if you trust it, add --import {module} (in Python: "
            f"fastbyol.import_module({module!r}))"
        )
    found = getattr(sys.modules[module], attribute, None)
    # Not what the module has imported: `os.system` of a module that imports os.
    is_own = f"{getattr(found, '__module__', None)}.".startswith(f"{module}.")
    if not (inspect.isfunction(found) or inspect.isclass(found)) or not is_own:
        raise InputError(f"model.backbone={name}: the module {module} defines no function or class {attribute}")
    return found


def open_image_set(root: str, split: str, key: str) -> Any:
    """Return what an image set's function returns for a split; None if the scheme is not known.

    Raises:
        InputError: the function raises an exception, or has no such split.
    """
    scheme, _, location = root.partition("://")
    opener = _image_sets.get(scheme)
    if opener is None and (point := _entry_point(IMAGE_SET_GROUP, scheme)) is not None:
        opener = _load(point, f"{key}={root}")
    if opener is None:
        return None
    try:
        found = opener(location, split)
    except InputError:
        raise
    except Exception as error:  # of a user's code
        raise InputError(f"{key}={root}: {_where(error)}") from None
    if found is None:
        raise InputError(f"{key}={root}: has no split {split}")
    return found


def _entry_point(group: str, name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=group, name=name)), None)


def _load(point: EntryPoint, key: str) -> Any:
    try:
        return point.load()
    except Exception as error:  # of an installed package
        raise InputError(f"{key}: the entry point {point.value} cannot be loaded: {_where(error)}") from None


@contextmanager
def backbone_object(backbone: nn.Module | Factory | str) -> Iterator[str]:
    """Context manager: yield the name, for `model.backbone`, of a backbone that is an object.

    A module is copied for every network; a function is called.
    """
    global _given
    if isinstance(backbone, str):
        yield backbone
        return
    is_module = isinstance(backbone, nn.Module)
    if not is_module and not callable(backbone):
        raise InputError(f"backbone: a {type(backbone).__name__} is no torch.nn.Module, function or name")
    before, _given = _given, (lambda **args: _copy(backbone, args)) if is_module else backbone
    try:
        yield f"{OBJECT}{type(backbone).__name__ if is_module else getattr(backbone, '__name__', 'function')}"
    finally:
        _given = before


def _copy(module: nn.Module, args: dict[str, Any]) -> nn.Module:
    if args:
        raise InputError("model.backbone_args: the backbone is a module already; give a function to use arguments")
    return copy.deepcopy(module)
