"""Pre-training with everything that the config asks for."""

from collections.abc import Sequence

from fastbyol.callbacks import Callback
from fastbyol.config import Config
from fastbyol.evaluate.online import online_callbacks
from fastbyol.train import RunResult, train
from fastbyol.weights.load import InitialWeights, with_init_settings


def pretrain(config: Config, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Pre-train a backbone: `train` with initial weights, online kNN and online classifier as
    configured.

    Args:
        callbacks: further hooks, called after these.

    Raises:
        InputError, RunError: see `train`.
    """
    return train(with_init_settings(config), [InitialWeights(), *online_callbacks(config), *callbacks])
