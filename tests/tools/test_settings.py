"""Types, limits and renamed settings. test_cli.py tests YAML files and the command line."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from fastbyol.cli import train_config
from fastbyol.config import RENAMED, Config, DataConfig, OptimConfig
from fastbyol.data.workers import map_in_order, resolve_threads
from fastbyol.errors import InputError
from fastbyol.evaluation.options import FewshotEval, KnnEval
from fastbyol.settings.base import Settings, leaves
from fastbyol.settings.command_line import HelpRequested
from fastbyol.settings.limits import above, absolute_path, at_least, at_most, interval
from fastbyol.settings.messages import BadSetting, nearest
from fastbyol.settings.types import check, expected, parse, parts


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
def test_invalid_config_raises(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Config.from_dict(values)


def test_config_dict_round_trip():
    config = Config(data=DataConfig(classes=["a", "b"], batch_size="auto"), optim=OptimConfig(epochs=5), seed=3)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["optim"]["warmup_epochs"] is None


def test_numbers_become_python_int_or_float():
    config = Config.from_dict(
        {"optim": {"epochs": 3.0, "base_lr": 1, "warmup_epochs": np.float32(0.5)}, "seed": np.int64(7)}
    )
    found = [config.optim.epochs, config.optim.base_lr, config.optim.warmup_epochs, config.seed]
    assert found == [3, 1, 0.5, 7]
    assert [type(value) for value in found] == [int, int, float, int]


@pytest.mark.parametrize(
    "build", [lambda: OptimConfig(epochs=None), lambda: dataclasses.replace(OptimConfig(), epochs="x")]
)
def test_constructor_and_replace_check_values(build):
    with pytest.raises(ValueError, match=r"optim\.epochs"):
        build()


def test_eval_options_are_checked():
    assert KnnEval(run=Path("runs/x")).run == "runs/x"
    assert FewshotEval(run="x", shots=[1, 2]).shots == (1, 2)
    with pytest.raises(ValueError, match="shots='1': expected integers, such as 1,5,10"):
        FewshotEval(run="x", shots="1")
    with pytest.raises(ValueError, match="k=10+: must be at most 1000000"):
        KnnEval(run="x", k=10**18)


def test_all_numbers_have_an_upper_limit():
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
def test_nearest_name(name, found):
    assert nearest(name, [key for key, _, _ in leaves(Config)]) == found


@pytest.mark.parametrize(
    ("epochs", "given", "used"),
    [(100, None, 10), (20, None, 10), (5, None, 2.5), (1, None, 0.5), (5, 5, 5), (300, 0, 0)],
)
def test_default_warmup_is_at_most_half_of_the_run(epochs, given, used):
    assert OptimConfig(epochs=epochs, warmup_epochs=given).warmup == used


@pytest.mark.parametrize("count", [lambda: resolve_threads(-1), lambda: next(map_in_order(abs, [1], threads=-1))])
def test_negative_threads_raise(count):
    with pytest.raises(ValueError, match="threads=-1: must be 0"):
        count()


@dataclasses.dataclass(kw_only=True)
class Limited(Settings):
    """One field per kind of limit."""

    count: Annotated[int, at_least(1), at_most(9)] = 1
    threads: Annotated[int, at_least(0, "all cores")] = 0
    seed: Annotated[int, at_least(0)] = 0
    batch: Annotated[int | Literal["auto"], at_least(2, message="two at least")] = "auto"
    size: Annotated[int, at_least(1)] | None = None
    rate: Annotated[float, above(0)] = 1.0
    part: Annotated[float, interval(0, 1, open_low=True)] = 1.0
    decay: Annotated[float, interval(0, 1, open_high=True)] = 0.0
    side: Annotated[int, interval(32, 64, zero=True)] = 0
    shots: Annotated[tuple[int, ...], at_least(1)] = ()
    root: Annotated[str, absolute_path] | None = None


@pytest.mark.parametrize(
    ("name", "valid", "invalid", "message"),
    [
        ("count", [1, 9], 0, "count=0: must be at least 1"),
        ("count", [], 10, "count=10: must be at most 9"),
        ("threads", [0], -1, r"threads=-1: must be 0 \(all cores\) or more"),
        ("seed", [0], -1, "seed=-1: must be 0 or more"),
        ("batch", ["auto", 2], 1, "batch=1: two at least"),
        ("size", [None, 1], 0, "size=0: must be at least 1"),
        ("rate", [1e-9], 0, "rate=0: must be above 0"),
        ("part", [1, 0.1], 0, r"part=0: must lie in \(0, 1\]"),
        ("part", [], 1.1, r"part=1.1: must lie in \(0, 1\]"),
        ("decay", [0, 0.9], 1, r"decay=1: must lie in \[0, 1\)"),
        ("decay", [], -0.1, r"decay=-0.1: must lie in \[0, 1\)"),
        ("side", [0, 32, 64], 31, r"side=31: must be 0 or lie in \[32, 64\]"),
        ("side", [], 65, r"side=65: must be 0 or lie in \[32, 64\]"),
        ("shots", [(), (1, 2)], (1, 0), "shots=1,0: must all be at least 1"),
        ("root", [None, "/x"], "", "root='': must not be empty"),
    ],
)
def test_limits(name, valid, invalid, message):
    for value in valid:
        assert getattr(Limited(**{name: value}), name) == value
    with pytest.raises(BadSetting, match=f"^{message}$"):
        Limited(**{name: invalid})


def test_limits_may_convert_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Limited(root="x").root == str(tmp_path / "x")


def test_annotations_do_not_change_what_a_type_accepts():
    plain, annotated = int | Literal["auto"] | None, Annotated[int | Literal["auto"], at_least(2)] | None
    for kind in (plain, annotated):
        assert expected(kind) == "an integer or auto"
        assert [parse(kind, word) for word in ("3", "auto", "null", "x")] == [3, "auto", None, "x"]
        assert check(kind, 1.0, "key") == 1  # limits are not applied here


OLD_NAMES = [
    ("data.recipe", "none", "none"),
    ("model.weight_standardisation", True, True),
    ("step.checkpoint_stages", 2, 2),
    ("log.tensorboard", True, ["tensorboard"]),
    ("log.tensorboard", False, []),
]


def value_of(config, name):
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def test_every_renamed_setting_is_tested_and_points_to_a_setting():
    assert {old for old, _, _ in OLD_NAMES} == set(RENAMED)
    assert set(RENAMED.values()) <= {name for name, _, _ in leaves(Config)}


@pytest.mark.parametrize(("old", "value", "current"), OLD_NAMES)
def test_old_checkpoints_load_silently(old, value, current, log_lines):
    section, _, key = old.partition(".")
    values = Config().to_dict()
    del values[section][RENAMED[old].partition(".")[2]]
    values[section][key] = value
    before = json.dumps(values)
    assert value_of(Config.from_dict(values), RENAMED[old]) == current
    assert json.dumps(values) == before
    assert log_lines == []


@pytest.mark.parametrize(("old", "value", "current"), OLD_NAMES)
def test_dict_with_old_and_new_name_raises(old, value, current):
    values = Config().to_dict()
    section, _, key = old.partition(".")
    values[section][key] = value
    with pytest.raises(ValueError, match=f"^{RENAMED[old]} is set twice, as {old} too: keep one$"):
        Config.from_dict(values)


@pytest.mark.parametrize(("old", "value", "current"), OLD_NAMES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "dotted"])
def test_old_names_in_yaml_give_one_warning(old, value, current, nested, tmp_path, log_lines):
    path = tmp_path / "c.yaml"
    section, _, key = old.partition(".")
    text = f"{section}:\n  {key}: {value}\n" if nested else f"# a comment\n{old}: {value}\n"
    path.write_text(text)
    assert value_of(train_config(["--config", str(path)]), RENAMED[old]) == current
    assert log_lines == [f"warning: {path}, line 2: {old} is now called {RENAMED[old]}; the old name still works"]


@pytest.mark.parametrize(("old", "value", "current"), OLD_NAMES)
@pytest.mark.parametrize("separate", [True, False], ids=["value", "equals"])
def test_old_names_on_the_command_line_give_one_warning(old, value, current, separate, log_lines):
    words = [f"--{old}", str(value)] if separate else [f"--{old}={value}"]
    assert value_of(train_config(words), RENAMED[old]) == current
    assert log_lines == [f"warning: --{old} is now called {RENAMED[old]}; the old name still works"]


@pytest.mark.parametrize(
    "text",
    [
        "data: {recipe: byol, augmentation: none}",
        "data: {augmentation: none}\ndata.recipe: byol",
        "data.recipe: byol\ndata.augmentation: none",
    ],
)
def test_yaml_with_old_and_new_name_is_set_twice(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"c.yaml, line \d: data.augmentation is set twice, on line 1 too: keep one$"):
        train_config(["--config", str(path)])


def test_the_later_of_old_and_new_name_wins_on_the_command_line():
    assert train_config(["--data.recipe=none", "--data.augmentation=torchvision"]).data.augmentation == "torchvision"
    assert train_config(["--data.augmentation=torchvision", "--data.recipe=none"]).data.augmentation == "none"


def test_errors_under_an_old_name_show_the_current_name(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {recipe: bol}")
    with pytest.raises(InputError, match=r"c.yaml, line 1: data.augmentation='bol': .*did you mean byol\?"):
        train_config(["--config", str(tmp_path / "c.yaml")])
    with pytest.raises(InputError, match=r"--data.augmentation='bol': .*did you mean byol\?|data.augmentation='bol'"):
        train_config(["--data.recipe=bol"])


def test_old_values_are_checked_against_the_old_type(tmp_path):
    (tmp_path / "c.yaml").write_text("log: {tensorboard: wandb}")
    message = "log.tensorboard='wandb': expected true or false"
    with pytest.raises(InputError, match=f"c.yaml, line 1: {message}$"):
        train_config(["--config", str(tmp_path / "c.yaml")])
    with pytest.raises(InputError, match=message):
        train_config(["--log.tensorboard", "wandb"])
    assert train_config(["--log.tensorboard", "off"]).log.trackers == []


def test_lists_of_choices():
    assert train_config(["--log.trackers", "wandb,mlflow"]).log.trackers == ["wandb", "mlflow"]
    with pytest.raises(InputError, match=r"log.trackers='wand': expected one of .*trackio; did you mean wandb\?"):
        train_config(["--log.trackers", "wand"])
    with pytest.raises(ValueError, match="log.trackers=True: expected a list of tensorboard, wandb, mlflow, trackio"):
        Config.from_dict({"log": {"trackers": True}})
    with pytest.raises(InputError, match="names a tracker twice"):
        train_config(["--log.trackers", "wandb,wandb"])


def test_hints_and_help_show_current_names_only(tmp_path):
    for old in RENAMED:
        with pytest.raises(InputError) as caught:
            train_config([f"--{old}x", "1"])
        assert old not in str(caught.value).partition(";")[2]
        (tmp_path / "c.yaml").write_text(f"{old}x: 1")
        with pytest.raises(InputError) as caught:
            train_config(["--config", str(tmp_path / "c.yaml")])
        assert old not in str(caught.value).partition(";")[2]
    with pytest.raises(HelpRequested) as page:
        train_config(["--help-all"])
    for old, new in RENAMED.items():
        assert f"--{new} " in str(page.value)
        assert f"--{old} " not in str(page.value)
