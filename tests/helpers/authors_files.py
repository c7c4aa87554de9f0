"""Checkpoints in the format of BYOL's authors, written with stand-ins for Haiku's and dill's
classes, and the features that their network computes from them.
"""

import pickle
import sys
from collections import namedtuple
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from torch.nn import functional as F

FIELDS = ["online_params", "target_params", "online_state", "target_state", "opt_state"]
DEPTHS = {"res_net18": (2, 2, 2, 2), "res_net50": (3, 4, 6, 3)}


class FlatMapping:
    """haiku._src.data_structures.FlatMapping of 2020: a constructor and a dict."""

    def __init__(self, mapping):
        self.mapping = mapping

    def __reduce__(self):
        return FlatMapping, (self.mapping,)


def _create_array(constructor, arguments, state, attributes=None):
    """As dill._dill._create_array."""
    array = constructor(*arguments)
    array.__setstate__(state)
    return array


def _create_namedtuple(name, fields, module):
    """As dill._dill._create_namedtuple."""
    return namedtuple(name, fields, module=module)


class _ScaleByLarsState(namedtuple("_ScaleByLarsState", ["mu"])):
    pass


@contextmanager
def foreign_modules(modules):
    """Context manager: modules that pickle finds, name -> classes and functions."""
    before = dict(sys.modules)
    try:
        for name, content in modules.items():
            parts = name.split(".")
            for k in range(1, len(parts) + 1):
                sys.modules[".".join(parts[:k])] = ModuleType(".".join(parts[:k]))
            for value in content:
                value.__module__ = name
                setattr(sys.modules[name], value.__name__, value)
        yield
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


class _Dill(pickle._Pickler):
    """Writes arrays and named tuples as dill does."""

    def reducer_override(self, value):
        if type(value) is np.ndarray:
            return _create_array, (*value.__reduce__(), None)
        if isinstance(value, type) and hasattr(value, "_fields") and value.__name__ == "_ByolExperimentState":
            return _create_namedtuple, (value.__name__, value._fields, value.__module__)
        return NotImplemented


def write(path, content, *, like_dill=True, protocol=2, module="byol.byol_experiment"):
    """Write a checkpoint with the names that the authors' files contain."""
    modules = {
        "haiku._src.data_structures": [FlatMapping],
        "byol.utils.optimizers": [_ScaleByLarsState],
        module: [type(content["experiment_state"])],
    }
    modules |= {"dill._dill": [_create_array, _create_namedtuple]} if like_dill else {}
    with foreign_modules(modules), open(path, "wb") as file:
        (_Dill if like_dill else pickle.Pickler)(file, protocol=protocol).dump(content)
    return path


def haiku_network(name="res_net50", width=1, hidden=24, outputs=12, seed=0):
    """Return params and state of the authors' network with random values."""
    rng = np.random.default_rng(seed)
    params, state = {}, {}
    bottleneck = name == "res_net50"

    def draw(*shape, scale):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def conv(path, size, inputs, channels):
        params[path] = {"w": draw(size, size, inputs, channels, scale=(2 / (size * size * inputs)) ** 0.5)}

    def norm(path, *shape):
        # Keeps the features of order 1, like those of a trained network.
        small = 0.1 if path.endswith(f"/batchnorm_{2 if bottleneck else 1}") else 0.4 if "shortcut" in path else 1
        scale = (rng.uniform(0.5, 1.5, shape) * small).astype(np.float32)
        params[path] = {"scale": scale, "offset": draw(*shape, scale=0.2)}
        for kind, average in (("mean", draw(*shape, scale=0.3)), ("var", np.abs(draw(*shape, scale=1)) + 0.5)):
            counter = np.array(7, np.int32)
            state[f"{path}/~/{kind}_ema"] = {"counter": counter, "hidden": average / 2, "average": average}

    channels = 64 * width
    conv(f"{name}/~/initial_conv", 7, 3, channels)
    norm(f"{name}/~/initial_batchnorm", 1, 1, 1, channels)
    for group, depth in enumerate(DEPTHS[name]):
        inner = 64 * width * 2**group
        outer = 4 * inner if bottleneck else inner
        for block in range(depth):
            prefix = f"{name}/~/block_group_{group}/~/block_{block}/~"
            if block == 0:
                conv(f"{prefix}/shortcut_conv", 1, channels, outer)
                norm(f"{prefix}/shortcut_batchnorm", 1, 1, 1, outer)
            sizes = [(1, channels, inner), (3, inner, inner), (1, inner, outer)]
            for k, shape in enumerate(sizes if bottleneck else [(3, channels, inner), (3, inner, inner)]):
                conv(f"{prefix}/conv_{k}", *shape)
                norm(f"{prefix}/batchnorm_{k}", 1, 1, 1, shape[2])
            channels = outer
    for head, inputs in (("projector", channels), ("predictor", outputs)):
        params[f"{head}/linear"] = {"w": draw(inputs, hidden, scale=inputs**-0.5), "b": draw(hidden, scale=0.1)}
        norm(f"{head}/batch_norm", 1, hidden)
        params[f"{head}/linear_1"] = {"w": draw(hidden, outputs, scale=hidden**-0.5)}
    params["classifier"] = {"w": draw(channels, 10, scale=0.1), "b": draw(10, scale=0.1)}
    return params, state


def checkpoint(online, target, *, mapping=FlatMapping, step=312784):
    """Return the content of a file; `online` and `target` are (params, state)."""
    kind = namedtuple("_ByolExperimentState", FIELDS)

    def nested(tree):
        return mapping({path: mapping(values) for path, values in tree.items()})

    trees = [nested(tree) for pair in zip(online, target, strict=True) for tree in pair]
    return {"experiment_state": kind(*trees, _ScaleByLarsState(trees[0])), "step": step, "rng": np.zeros(2, np.uint32)}


def features(params, state, images):
    """Return the features (N, F) of images (N, 3, S, S), in float64 and with TensorFlow's padding,
    written down apart from timm's network.
    """
    name = next(path for path in params if path.endswith("initial_conv")).split("/")[0]

    def pad(x, size, stride, value=0.0):
        total = max((-(-x.shape[2] // stride) - 1) * stride + size - x.shape[2], 0)
        low, high = total // 2, total - total // 2
        return F.pad(x, (low, high, low, high), value=value)

    def conv(x, path, stride=1):
        w = torch.from_numpy(params[path]["w"]).double().permute(3, 2, 0, 1)
        return F.conv2d(pad(x, w.shape[2], stride), w, stride=stride)

    def norm(x, path):
        mean, var = (
            torch.from_numpy(state[f"{path}/~/{kind}_ema"]["average"]).double().reshape(-1, 1, 1)
            for kind in ("mean", "var")
        )
        scale, offset = (torch.from_numpy(params[path][key]).double().reshape(-1, 1, 1) for key in ("scale", "offset"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + offset

    x = norm(conv(images.double(), f"{name}/~/initial_conv", 2), f"{name}/~/initial_batchnorm").relu()
    x = F.max_pool2d(pad(x, 3, 2, -torch.inf), 3, 2)
    for group, depth in enumerate(DEPTHS[name]):
        for block in range(depth):
            prefix = f"{name}/~/block_group_{group}/~/block_{block}/~"
            stride = 2 if group and not block else 1
            shortcut = x
            if not block:
                shortcut = norm(conv(x, f"{prefix}/shortcut_conv", stride), f"{prefix}/shortcut_batchnorm")
            count = 3 if name == "res_net50" else 2
            for k in range(count):
                x = conv(x, f"{prefix}/conv_{k}", stride if k == count - 2 else 1)
                x = norm(x, f"{prefix}/batchnorm_{k}")
                x = x if k == count - 1 else x.relu()
            x = (x + shortcut).relu()
    return x.mean((2, 3))
