"""Pre-training with everything that the config asks for."""

from collections.abc import Sequence

from fastbyol.callbacks import Callback
from fastbyol.config import Config
from fastbyol.evaluation.online import online_callbacks
from fastbyol.loop import RunResult, train_loop
from fastbyol.trackers import configured_trackers
from fastbyol.weights.load import InitialWeights, with_init_settings


def train(config: Config, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Pre-train a backbone: `train_loop` with initial weights, online kNN, online classifier and
    trackers as configured.

    Args:
        callbacks: further hooks, called after these.

    Raises:
        InputError, RunError: see `train_loop`.
    """
    config = with_init_settings(config)
    own = [InitialWeights(), *online_callbacks(config), *configured_trackers(config)]
    return train_loop(config, [*own, *callbacks])
