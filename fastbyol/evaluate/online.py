"""Evaluations during pre-training, as callbacks of the run: a linear classifier on every batch, and
kNN after epochs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbyol.build import Training
from fastbyol.callbacks import Callback
from fastbyol.config import Config
from fastbyol.data import Batch, ImageSet, find_images
from fastbyol.errors import InputError, RunError
from fastbyol.evaluate.context import EvalContext, missing_images_warning
from fastbyol.evaluate.features import check_splits, extract_features
from fastbyol.evaluate.knn import knn_accuracy
from fastbyol.model import BYOLOutput
from fastbyol.run import Run
from fastbyol.runtime.logging import logger


def online_callbacks(config: Config) -> list[Callback]:
    """Return the configured evaluations during pre-training."""
    return [*([OnlineProbe()] if config.probe.enabled else []), OnlineKnn()]


class OnlineProbe(Callback):
    """A linear classifier on the features of view 1.

    It learns from the labels and does not change the backbone.

    It trains with Adam on the cross-entropy, and reports the accuracy on the images of each epoch.
    """

    name = "probe"

    def on_build(self, training: Training) -> None:
        """Create the classifier.

        Raises:
            InputError: the images have fewer than two classes.
        """
        self.classes = len(training.images.classes)
        if self.classes < 2:
            raise InputError(f"probe.enabled=true: {training.images.root} has fewer than 2 classes; set it to false")
        training.model.return_features = True
        self._world = training.world
        self._layer = nn.Linear(training.model.num_features, self.classes, device=training.device)
        nn.init.zeros_(self._layer.weight)
        nn.init.zeros_(self._layer.bias)
        self._optimizer = torch.optim.Adam(self._layer.parameters(), training.config.probe.lr, fused=True)
        # Of the epoch so far: images, loss * images, top-1 and top-5 hits.
        self._sums = torch.zeros(4, dtype=torch.float64, device=training.device)

    def on_step(self, run: Run, batch: Batch, output: BYOLOutput) -> None:
        """Count the hits, then learn. Reads no device value."""
        self.step(output.features, batch.labels, output.loss)

    def step(self, features: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """Count the hits on a batch, then learn from it.

        Args:
            features: (B, F), without gradient.
            labels: (B,).
            loss: () of the pre-training.
        """
        scores = self._layer(features)
        F.cross_entropy(scores, labels).backward()
        if self._world.size > 1:
            for p in self._layer.parameters():
                p.grad = self._world.mean(p.grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            hits = scores.topk(min(5, self.classes), dim=1).indices == labels[:, None]
            count = torch.full((), len(labels), dtype=torch.float64, device=labels.device)
            self._sums += torch.stack((count, loss.double() * count, hits[:, 0].sum().double(), hits.sum().double()))

    def on_epoch_end(self, run: Run, done: int) -> bool:
        """Log loss, top-5 and top-1 of the epoch."""
        run.check_finite()
        run.log.probe(done, self.end_of_epoch())
        return False

    def end_of_epoch(self) -> dict[str, float]:
        """Return loss, top5 and top1 of the epoch over all ranks, and start the next epoch."""
        images, loss, top1, top5 = self._world.mean(self._sums).tolist()
        self._sums.zero_()
        return {"loss": loss / images, "top5": top5 / images, "top1": top1 / images}

    def state_dict(self) -> dict[str, Any]:
        """Return the classifier, Adam's state and the sums of the epoch."""
        return {"layer": self._layer.state_dict(), "adam": self._optimizer.state_dict(), "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._layer.load_state_dict(state["layer"])
        self._optimizer.load_state_dict(state["adam"])
        self._sums.copy_(state["sums"])


class OnlineKnn(Callback):
    """Weighted kNN on the features of the online backbone, every knn.every_epochs epochs.

    Rank 0 evaluates.
    """

    name = "knn"

    def __init__(self) -> None:
        self.accuracy = {"last": math.nan, "best": math.nan}
        self._val: ImageSet | None = None
        self._bad: dict[str, str] = {}  # images left out: location -> reason

    def on_build(self, training: Training) -> None:
        """Open the validation split. Without a usable one, log why and do without kNN."""
        if training.config.knn.every_epochs == 0 or not training.world.is_main_process:
            return
        try:
            val = find_images(training.config.data, "val")
            check_splits(training.images, val)
        except InputError as error:
            logger.warning(f"no online kNN: {error}")
            return
        for note in val.notes:
            logger.warning(note)
        self._val = val

    def on_epoch_end(self, run: Run, done: int) -> bool:
        """Log top-1 and top-5 accuracy; return True if top-1 is the best so far."""
        epoch, every = run.step.schedule.epoch(done), run.config.knn.every_epochs
        if not every or (epoch % every and epoch != run.config.optim.epochs):
            return False
        run.check_finite()
        return run.world.gather(self._val is not None and self._evaluate(run, done))[0]

    def _evaluate(self, run: Run, done: int) -> bool:
        with run.log.pause():
            accuracy = self._measure(run)
        if accuracy is None:
            return False
        best = not accuracy["top1"] <= self.accuracy["best"]  # also True while best is NaN
        self.accuracy = {"last": accuracy["top1"], "best": accuracy["top1"] if best else self.accuracy["best"]}
        run.log.knn(done, accuracy)
        return best

    def _measure(self, run: Run) -> dict[str, float] | None:
        """Return top-1 and top-5 accuracy; at most knn.max_bank_images training images vote.

        If no image of a split can be read, log why, return None, and do without kNN from then on.
        """
        assert self._val is not None
        config, training = run.config, run.training
        context = EvalContext(
            size=config.data.image_size_px, device=training.device, dtype=run.step.dtype, threads=config.data.threads
        )
        voters = training.images.subsample(config.knn.max_bank_images)
        try:
            backbone = training.model.online.backbone
            bank, val = (extract_features(backbone, split, context, None) for split in (voters, self._val))
        except InputError as error:
            logger.warning(f"no online kNN from here on: {error}")
            self._val = None
            return None
        self._log_left_out(run, voters, bank.bad, self._val, val.bad)
        try:
            return knn_accuracy(bank, val, k=config.knn.k, temperature=config.knn.temperature)
        except InputError as error:
            raise RunError(f"online kNN: {error}; {run.folder.last_good()}") from None

    def _log_left_out(
        self, run: Run, voters: ImageSet, bad_voters: dict[int, str], val: ImageSet, bad_val: dict[int, str]
    ) -> None:
        """Log unreadable images once, and not again if the training has already logged them."""
        positions = run.training.images.subsample_indices(len(voters))
        indices = {voters.location(i): int(positions[i]) for i in bad_voters}
        for split, bad in ((voters, bad_voters), (val, bad_val)):
            new = {where: reason for i, reason in bad.items() if (where := split.location(i)) not in self._bad}
            self._bad |= new
            for where, reason in new.items():
                if indices.get(where) not in run.named_bad:
                    logger.warning(f"skipped {where}: {reason}")
            if new and (text := missing_images_warning(split, bad)) is not None:
                logger.warning(f"online kNN: {text}")
        run.named_bad.update(indices.values())

    def summary(self) -> dict[str, Any]:
        """Return accuracies and unreadable images."""
        return {"knn_last": self.accuracy["last"], "knn_best": self.accuracy["best"], "knn_bad_images": self._bad}

    def state_dict(self) -> dict[str, Any]:
        """Return the last and the best accuracy."""
        return dict(self.accuracy)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self.accuracy = {key: float(state[key]) for key in ("last", "best")}
