"""Import of the checkpoints that BYOL's authors released, and of those that their code writes.

Released are pretrain_res50x1.pkl, pretrain_res200x2.pkl and the ResNet-50s of the ablations.

Source: byol/byol_experiment.py and byol/utils/checkpointing.py of google-deepmind/deepmind-research
(commit 4822a45). A file is a pickle of {"experiment_state": (online_params, target_params,
online_state, target_state, opt_state), "step", "rng"}. Parameters and states are Haiku's: module
path -> name -> numpy array.

A pickle can run code when it is loaded. This reader executes nothing that a file names: arrays are
built by functions of this module, objects of the authors' packages become inert stand-ins, and
every other name is refused.
"""

import os
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.config import STEM_CHANNELS, Config, ModelConfig
from fastbyol.errors import InputError, error_reason
from fastbyol.weights.names import Tensors

SUFFIX = ".pkl"
LICENSE = "CC BY-NC 4.0 (https://creativecommons.org/licenses/by-nc/4.0/legalcode)"
"""License of the released checkpoints, by the README of byol/. Non-commercial use only."""
ARCHITECTURES = {
    (False, (2, 2, 2, 2)): "byol_resnet18",
    (False, (3, 4, 6, 3)): "byol_resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (True, (3, 24, 36, 3)): "resnet200",
}
"""Bottleneck blocks, and blocks per stage -> backbone."""

_MAX_COPIES = 4  # of an array: networks may share it
_MAX_NESTING = 4  # of one stand-in in another
_MAX_SHOWN = 80  # characters of a name in a message
_FIELDS = ("online_params", "target_params", "online_state", "target_state")


def is_authors(path: Path) -> bool:
    """Return True if a path has the suffix of the authors' checkpoints."""
    return path.suffix == SUFFIX and not path.is_dir()


class AuthorsCheckpoint(NamedTuple):
    """A checkpoint with fastbyol's names and layouts."""

    tensors: Tensors
    """State dict of `BYOL`. Heads and target network are left out if the file has none."""
    config: Config
    """The network is the file's; all other settings are defaults."""
    step: int
    """Optimizer steps done; 0 if the file does not say."""


def read_authors(path: Path, where: str) -> AuthorsCheckpoint:
    """Read a checkpoint without running anything that it names.

    Args:
        path: The file.
        where: Start of error messages.

    Raises:
        InputError: The file cannot be read, is damaged, names code, or is not such a checkpoint.
    """
    content = _unpickle(path, where)
    if not isinstance(content, dict) or "experiment_state" not in content:
        raise _other(where, "it has no 'experiment_state'")
    values = _fields(content["experiment_state"], where)
    tensors: Tensors = {}
    try:
        _check_size(values, path)
        for network, params, state in (("online", *values[::2]), ("target", *values[1::2])):
            for name, tensor in network_tensors(params, state).items():
                part = name.split(".")[0]
                if part != "predictor":
                    tensors[f"{network}.{name}"] = tensor
                elif network == "online":
                    tensors[name] = tensor
        step = 0 if content.get("step") is None else _integer(content["step"], "step")
    except _Unexpected as error:
        raise _other(where, str(error)) from None
    model = _model_config({n.removeprefix("online."): t for n, t in tensors.items() if n.startswith("online.")}, where)
    return AuthorsCheckpoint(tensors, Config(name="byol_authors", model=model), step)


def _other(where: str, reason: str) -> InputError:
    return InputError(
        f"{where}: not a pre-training checkpoint of BYOL's authors: {reason}; other weights must be .safetensors or .pth files"
    )


def _check_size(trees: list[Any], path: Path) -> None:
    """Refuse a file that names the same array again and again, since each use is a copy."""
    arrays = (value for tree in trees for _, _, value in _leaves(tree))
    total = sum(array.value.nbytes for array in arrays if isinstance(array, _Array) and array.value is not None)
    if total > _MAX_COPIES * path.stat().st_size:
        raise _Unexpected("its arrays are larger than the file")


def _fields(state: Any, where: str) -> list[Any]:
    """Return online_params, target_params, online_state and target_state."""
    values = state.content if isinstance(state, _StandIn) else state
    if isinstance(values, Mapping):
        values = [values.get(name) for name in _FIELDS]
    if not isinstance(values, tuple | list) or len(values) < len(_FIELDS):
        raise _other(where, "its 'experiment_state' is not a _ByolExperimentState")
    return list(values[: len(_FIELDS)])


# --- names and layouts ---

_BLOCK = re.compile(r"block_group_(\d)/(?:~/)?block_(\d{1,3})/(?:~/)?(shortcut_)?(conv|batchnorm)(?:_(\d))?$")
_STEM = re.compile(r"(?:^|/)initial_(conv|batchnorm)(?:_\d)?$")
_HEAD = re.compile(r"(?:^|/)(projector|predictor)/(?:~/)?(.*)")
_HEAD_LAYERS = {"linear": 0, "batch_norm": 1, "linear_1": 3}
_CLASSIFIER = re.compile(r"(?:^|/)classifier$")
_AVERAGE = re.compile(r"(.*)/~/(mean|var)_ema$")


class _Unexpected(Exception):
    """What a checkpoint has that these networks do not."""


def module_name(path: str) -> str | None:
    """Return our name of one of Haiku's modules, None for the classifier and other heads.

    Raises:
        _Unexpected: There is no such module.
    """
    if match := _STEM.search(path):
        return f"backbone.{'conv' if match[1] == 'conv' else 'bn'}1"
    if match := _BLOCK.search(path):
        group, block, shortcut, kind, number = match.groups()
        prefix = f"backbone.layer{int(group) + 1}.{int(block)}"
        if shortcut:
            return f"{prefix}.downsample.{0 if kind == 'conv' else 1}"
        return f"{prefix}.{'conv' if kind == 'conv' else 'bn'}{int(number or 0) + 1}"
    if match := _HEAD.search(path):
        return f"{match[1]}.{_HEAD_LAYERS[match[2]]}" if match[2] in _HEAD_LAYERS else None
    if _CLASSIFIER.search(path):
        return None
    raise _Unexpected(f"its module {_shown(path)} is unknown")


def _shown(value: Any) -> str:
    """Return a value of the file for a message: short, and at no cost."""
    if not isinstance(value, str):
        return f"of type {type(value).__name__}"
    return repr(value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}...")


def network_tensors(params: Any, state: Any) -> Tensors:
    """Return the tensors of one network: backbone, projector and predictor.

    Args:
        params: Haiku's parameters, module path -> name -> array.
        state: Haiku's state, likewise.

    Raises:
        _Unexpected: There is a module that these networks do not have.
    """
    tensors: Tensors = {}
    for path, name, value in _leaves(params):
        if (module := module_name(path)) is not None:
            kind, tensor = _parameter(f"{path}/{name}", name, value)
            if f"{module}.{kind}" in tensors:
                raise _Unexpected(f"its parameter {_shown(f'{path}/{name}')} occurs twice")
            tensors[f"{module}.{kind}"] = tensor
    for path, name, value in _leaves(state):
        match = _AVERAGE.fullmatch(path)
        if match is None:
            raise _Unexpected(f"its state {_shown(path)} is unknown")
        if (module := module_name(match[1])) is None:
            continue
        if name == "average":
            tensors[f"{module}.running_{match[2]}"] = _tensor(value, f"{path}/{name}").reshape(-1)
        elif name == "counter" and match[2] == "mean":
            tensors[f"{module}.num_batches_tracked"] = torch.tensor(_integer(value, f"{path}/{name}"))
    return tensors


def _leaves(tree: Any) -> list[tuple[str, str, Any]]:
    """Return (module path, name, value) of two nested mappings; none if there is no mapping."""
    found = [(path, name, value) for path, values in _items(tree) for name, value in _items(values)]
    for path, name, _ in found:
        if not isinstance(path, str) or not isinstance(name, str):
            raise _Unexpected("its modules and parameters have no names")
    return found


def _items(mapping: Any) -> list[tuple[Any, Any]]:
    """Return the items of a dict, or of the stand-in of one of Haiku's mappings."""
    for _ in range(_MAX_NESTING):
        if isinstance(mapping, _StandIn):
            content = mapping.content
            mapping = content[0] if isinstance(content, tuple) and len(content) == 1 else content
    return list(mapping.items()) if isinstance(mapping, dict) else []


def _parameter(where: str, name: str, value: Any) -> tuple[str, torch.Tensor]:
    """Return our name and layout of a parameter.

    HWIO -> OIHW, (I, O) -> (O, I), (1, 1, 1, C) -> (C).
    """
    tensor = _tensor(value, where)
    if name == "w" and tensor.ndim == 4:
        return "weight", tensor.permute(3, 2, 0, 1).contiguous()
    if name == "w" and tensor.ndim == 2:
        return "weight", tensor.t().contiguous()
    if name in ("scale", "offset", "b"):
        return "weight" if name == "scale" else "bias", tensor.reshape(-1)
    raise _Unexpected(f"its parameter {_shown(where)} is unknown")


def _tensor(value: Any, where: str) -> torch.Tensor:
    if isinstance(value, _Array) and isinstance(value.value, np.ndarray):
        value = value.value
    if not isinstance(value, np.ndarray | np.generic):
        raise _Unexpected(f"its {_shown(where)} is no array")
    array = np.array(value, dtype=value.dtype.newbyteorder("="))  # a copy, since the file's bytes are read-only
    return torch.from_numpy(array)


def _integer(value: Any, where: str) -> int:
    array = value.value if isinstance(value, _Array) else np.array(value) if isinstance(value, int) else value
    if not isinstance(array, np.ndarray) or array.size != 1 or array.dtype.kind not in "iu":
        raise _Unexpected(f"its {_shown(where)} is no integer")
    number = int(array.reshape(()))
    if not 0 <= number < 1 << 63:
        raise _Unexpected(f"its {_shown(where)} is out of range")
    return number


def _model_config(online: Tensors, where: str) -> ModelConfig:
    """Return the settings of a network, from the names and shapes of its tensors."""
    blocks = [re.match(r"backbone\.layer(\d+)\.(\d+)\.", name) for name in online]
    stages = [{int(m[2]) for m in blocks if m is not None and int(m[1]) == stage} for stage in (1, 2, 3, 4)]
    depths = tuple(len(stage) for stage in stages)
    backbone = ARCHITECTURES.get(("backbone.layer1.0.conv3.weight" in online, depths))
    stem = online.get("backbone.conv1.weight")
    if stem is None or stem.ndim != 4 or not stem.numel() or not any(depths):
        raise _other(where, "it has no ResNet")
    if backbone is None:
        raise _other(where, f"its network has {', '.join(map(str, depths))} blocks per stage")
    heads = {}
    last = online.get("projector.3.weight")
    if last is not None and last.ndim == 2 and last.numel():
        heads = {"projection_dim": last.shape[0], "hidden_dim": last.shape[1]}
    try:
        return ModelConfig(backbone=backbone, width=len(stem) / STEM_CHANNELS, padding="same", **heads)
    except ValueError as error:
        raise _other(where, str(error)) from None


# --- reading the pickle ---

_PACKAGES = ("byol", "chex", "haiku", "jax", "jaxlib", "optax")
_CLASSES = ("_ByolExperimentState", "FlatMapping", "FlatMap", "frozendict", "LarsState", "ScaleByLarsState")
"""Classes of the authors' files, in whatever module they were defined when the file was written."""
_NUMBER_TYPE = re.compile(r"[fiub][1248]")


class _Refused(Exception):
    """What a file contains and this reader does not build."""


class _StandIn:
    """An object that is not built: `content` is what it would have been built from."""

    content: Any

    def __new__(cls, *args: Any) -> "_StandIn":
        self = super().__new__(cls)
        self.content = args
        return self

    def __setstate__(self, state: Any) -> None:
        self.content = state

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(self.content, dict):
            self.content = {}
        self.content[key] = value


class _Number:
    """numpy's dtype of a number."""

    def __init__(self, name: Any, *args: Any) -> None:
        if not isinstance(name, str) or not _NUMBER_TYPE.fullmatch(name):
            raise _Refused(f"an array of type {_shown(name)}, which is not supported")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1] if state[1] in ("<", ">") else "=")


class _Array:
    """A numpy array, once its state is known."""

    value: NDArray[Any] | None = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, number, fortran, data = state
        self.value = _from_bytes(data, number, shape, "F" if fortran else "C").value


def _from_bytes(data: Any, number: Any, shape: Any, order: Any = "C") -> _Array:
    if not isinstance(data, bytes) or not isinstance(number, _Number):
        raise _Refused("an array of objects, which is not supported")
    array = _Array()
    array.value = np.frombuffer(data, number.dtype).reshape(shape, order="F" if order == "F" else "C")
    return array


def _scalar(number: Any, data: Any) -> _Array:
    return _from_bytes(data, number, ())


def _array_from_parts(constructor: Any, arguments: Any, state: Any, *others: Any) -> _Array:
    """dill and jax write an array as the parts of numpy's pickle."""
    if constructor is not _Array:
        raise _Refused("an array of another kind than numpy's, which is not supported")
    array = _Array()
    array.__setstate__(state)
    return array


def _namedtuple_of_dill(*args: Any) -> type[_StandIn]:
    """dill writes named tuples with the definition of their class."""
    return _StandIn


_BUILT: dict[tuple[str, str], Callable[..., Any]] = {
    **{(f"dill.{module}", "_create_array"): _array_from_parts for module in ("dill", "_dill")},
    ("jax._src.array", "_reconstruct_array"): _array_from_parts,
    ("jax._src.device_array", "reconstruct_device_array"): _array_from_parts,
    **{(f"dill.{module}", "_create_namedtuple"): _namedtuple_of_dill for module in ("dill", "_dill")},
    ("numpy", "dtype"): _Number,
    ("numpy", "ndarray"): _StandIn,  # an argument of _reconstruct
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_bytes for core in ("core", "_core")},
}


class _BoundedFile:
    """A file whose `read` allocates no more than the size of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.readline, self._read = file.readline, file.read
        self.size = os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        if count > self.size:
            raise EOFError
        return self._read(count)


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Builds plain values, arrays and stand-ins.

    Python's implementation and not C's, whose memory grows with the indices of a malicious memo.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    # Sets would hash nested tuples, which can take forever; the rest looks up code by other ways.
    for opcode in (
        *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2),
        *(pickle.EXT4, pickle.PERSID, pickle.BINPERSID, pickle.NEXT_BUFFER),
    ):
        del dispatch[opcode[0]]

    def __init__(self, file: _BoundedFile) -> None:
        super().__init__(file)
        self._bytes_left = file.size

    def _encode(self, text: Any, encoding: Any) -> bytes:
        """Protocols before 3 hold bytes as text. Each text is used once."""
        if encoding != "latin1" or not isinstance(text, str):
            raise _Refused(f"text in the encoding {_shown(encoding)}, which is not supported")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise _Refused("more bytes than the file, which is not supported")
        return text.encode("latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) in _BUILT:
            return _BUILT[module, name]
        if name in _CLASSES or set(module.split(".")) & set(_PACKAGES):
            return _StandIn
        raise _Refused(f"{_shown(f'{module}.{name}')[1:-1]}, which is not loaded because it could run code")

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _StandIn | _Array | _Number):
            raise _Refused(f"a state {_shown(self.stack[-1])}, which is not supported")
        self.stack[-1].__setstate__(state)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(self.stack[-1], items)

    def _set_items(self, target: Any, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Large integers and nested tuples can take forever to hash.
            if not isinstance(key, str) and not (isinstance(key, int) and key.bit_length() < 32):
                raise _Refused(f"a key {_shown(key)}, which is not supported")
            target[key] = value

    def load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(count))  # the base class allocates before it reads

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _unpickle(path: Path, where: str) -> Any:
    if path.exists() and not path.is_file():
        raise InputError(f"{where}: not a file")
    try:
        with path.open("rb") as file:
            return _Unpickler(_BoundedFile(file)).load()
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error_reason(error)}") from None
    except _Refused as refused:
        raise _other(where, f"it contains {refused}") from None
    except MemoryError:
        raise
    except Exception:  # a damaged pickle can fail in any of its instructions
        raise InputError(f"{where}: damaged, truncated or not a pickle of plain values; download it again") from None
