"""Settings from Python: every wrong one is a ValueError with the key and plain words, whoever builds the object."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fastbyol.config import Config, DataConfig, FewshotEval, KnnEval, OptimConfig
from fastbyol.data.workers import map_in_order, resolve_threads
from fastbyol.settings.base import leaves
from fastbyol.settings.messages import nearest
from fastbyol.settings.types import parts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"epochs": None}}, r"optim.epochs: has no value \(blank\); expected an integer"),
        ({"optim": {"epochs": "3"}}, "optim.epochs='3': expected an integer"),
        ({"optim": {"epochs": True}}, "optim.epochs=True: expected an integer"),
        ({"optim": {"epochs": 3.5}}, "optim.epochs=3.5: expected an integer"),
        ({"optim": {"epochs": [3]}}, r"optim.epochs=\[3\]: expected an integer"),
        ({"optim": {"epochs": 10**18}}, "optim.epochs=10+: must be at most 1000000"),
        ({"optim": {"epochs": 10**5000}}, "optim.epochs=a number of 16610 bits: must"),
        ({"optim": {"base_lr": float("nan")}}, "optim.base_lr=nan: must be finite"),
        ({"optim": {"base_lr": float("-inf")}}, "optim.base_lr=-inf: must be finite"),
        ({"optim": {"base_lr": 1e40}}, r"optim.base_lr=1e\+40: must lie within 1e\+30 of 0"),
        ({"optim": {"base_lr": False}}, "optim.base_lr=False: expected a number"),
        ({"optim": {"name": "lasr"}}, "optim.name='lasr': expected one of lars, sgd, adamw, adam; did you mean lars?"),
        ({"optim": {"warmup_epochs": 101}}, "optim.warmup_epochs=101: must lie between 0 and optim.epochs=100"),
        ({"optim": {"epoch": 3}}, "optim.epoch: unknown key; did you mean optim.epochs?"),
        ({"epochs": 3}, "epochs: unknown key; did you mean optim.epochs?"),
        ({"optim.epochs": 3}, "optim.epochs: dotted keys are not accepted here: write {'optim': {'epochs': ...}}"),
        ({"": 3}, "'': unknown key"),
        ({"optm": {}}, "optm: unknown key; did you mean optim?"),
        ({3: 4}, "3: unknown key"),
        ({"optim": None}, "optim: has no value: expected a section"),
        ({"optim": 3}, "optim=3: expected a section with settings such as optim.name"),
        ({"optim": []}, r"optim=\[\]: expected a section"),
        ({"data": {"batch_size": "many"}}, "data.batch_size='many': expected an integer or auto"),
        ({"data": {"batch_size": None}}, "data.batch_size: has no value"),
        ({"data": {"classes": "cat"}}, "data.classes='cat': expected names, such as cat,dog"),
        ({"data": {"classes": [3]}}, "data.classes=3: expected text"),
        ({"data": {"root": 3}}, "data.root=3: expected text"),
        ({"data": {"root": "a\0"}}, "data.root='a.x00': has a NUL character"),
        ({"data": {"threads": -1}}, "data.threads=-1: must be 0"),
        ({"probe": {"enabled": 1}}, "probe.enabled=1: expected true or false"),
        ({"name": "a/b"}, "name='a/b': must be a non-empty name without '/'"),
        (None, "the settings: has no value: expected a section with settings such as name"),
        ([], r"the settings=\[\]: expected"),
        ("x", "the settings='x': expected"),
    ],
)
def test_what_no_config_can_be(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Config.from_dict(values)


def test_a_config_comes_back_from_its_dict():
    config = Config(data=DataConfig(classes=["a", "b"], batch_size="auto"), optim=OptimConfig(epochs=5), seed=3)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["optim"]["warmup_epochs"] is None


def test_a_number_becomes_one_of_python_and_a_whole_one_an_int():
    config = Config.from_dict(
        {"optim": {"epochs": 3.0, "base_lr": 1, "warmup_epochs": np.float32(0.5)}, "seed": np.int64(7)}
    )
    found = [config.optim.epochs, config.optim.base_lr, config.optim.warmup_epochs, config.seed]
    assert found == [3, 1, 0.5, 7]
    assert [type(value) for value in found] == [int, int, float, int]


@pytest.mark.parametrize(
    "build", [lambda: OptimConfig(epochs=None), lambda: dataclasses.replace(OptimConfig(), epochs="x")]
)
def test_objects_are_checked_too(build):
    with pytest.raises(ValueError, match=r"optim\.epochs"):
        build()


def test_an_evaluations_settings_are_checked():
    assert KnnEval(run=Path("runs/x")).run == "runs/x"
    assert FewshotEval(run="x", shots=[1, 2]).shots == (1, 2)
    with pytest.raises(ValueError, match="shots='1': expected integers, such as 1,5,10"):
        FewshotEval(run="x", shots="1")
    with pytest.raises(ValueError, match="k=10+: must be at most 1000000"):
        KnnEval(run="x", k=10**18)


def test_every_whole_number_and_every_number_has_a_limit():
    for name, f, owner in leaves(Config):
        for kind, value in ((int, 10**30), (float, 1e300)):
            if kind in parts(f.type):
                with pytest.raises(ValueError, match=rf"^{name}="):
                    owner(**{f.name: value})


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("--epochs", "optim.epochs"),
        ("optim.epoch", "optim.epochs"),
        ("optm.epochs", "optim.epochs"),
        ("data.batch-size", "data.batch_size"),
        ("lr", "probe.lr"),
        ("data.lr", "probe.lr"),
        ("image_size", "data.image_size_px"),
        ("DEVICE", "device"),
        ("zebra", None),
        ("", None),
    ],
)
def test_the_nearest_name(name, found):
    assert nearest(name, [key for key, _, _ in leaves(Config)]) == found


@pytest.mark.parametrize(
    ("epochs", "given", "used"),
    [(100, None, 10), (20, None, 10), (5, None, 2.5), (1, None, 0.5), (5, 5, 5), (300, 0, 0)],
)
def test_the_default_warmup_is_at_most_half_of_the_run(epochs, given, used):
    assert OptimConfig(epochs=epochs, warmup_epochs=given).warmup == used


@pytest.mark.parametrize("count", [lambda: resolve_threads(-1), lambda: next(map_in_order(abs, [1], threads=-1))])
def test_fewer_than_no_threads_are_refused(count):
    with pytest.raises(ValueError, match="threads=-1: must be 0"):
        count()
