"""`init`: the weights that a new run's backbone starts from."""

from fastbyol.callbacks import Callback
from fastbyol.config import Config
from fastbyol.model import BYOL
from fastbyol.runtime.logging import logger
from fastbyol.weights.load import load_backbone


class InitialWeights(Callback):
    """Loads config.init into the backbone, and into the target's if it starts as a copy."""

    def on_model(self, model: BYOL, config: Config) -> None:
        """Load the weights.

        Raises:
            InputError: see `load_backbone`.
        """
        if config.init == "none":
            return
        online = model.online.backbone
        logger.info(load_backbone(config.init, online, config.model.backbone, config=config.model))
        if model.target is not None and config.model.target_init == "copy":
            model.target.backbone.load_state_dict(online.state_dict())
