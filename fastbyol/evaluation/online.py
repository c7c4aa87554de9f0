"""Evaluations during pre-training, as callbacks of the run: a linear classifier on every batch, and
kNN after epochs.
"""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbyol.build import Training
from fastbyol.callbacks import Callback
from fastbyol.config import Config
from fastbyol.data import Batch, Images, find_images
from fastbyol.data.backends import choose_decoder
from fastbyol.errors import InputError, RunError
from fastbyol.evaluation.context import EvalContext, missing_images_warning
from fastbyol.evaluation.features import check_finite, check_splits, extract_features
from fastbyol.evaluation.knn import knn_accuracy
from fastbyol.evaluation.quality import alignment, rank_me, uniformity
from fastbyol.model import BYOLOutput
from fastbyol.run import Run
from fastbyol.runtime.logging import logger

_AUTO_SHARE = 0.02  # of the run's time, for knn.every_epochs=auto
clock = time.monotonic


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
    """Evaluation of the online backbone's features, every knn.every_epochs epochs: weighted kNN if
    there is a labeled validation split, and always what needs no labels (quality.py).

    All ranks share the images and the comparisons.
    """

    name = "knn"

    def __init__(self) -> None:
        self.accuracy = {"last": math.nan, "best": math.nan}
        self.seconds = {"all": 0.0, "last": 0.0, "run": 0.0}
        """Of all evaluations, of the last one, and of the run before this attempt."""
        self.quality: dict[str, float] = {}  # of the last evaluation
        self._began = clock()
        self._val: Images | None = None
        self._steps = 0  # of this attempt
        self._last_step: tuple[Batch, BYOLOutput] | None = None  # of an epoch
        self._bad: dict[str, str] = {}  # images left out: location -> reason

    def on_build(self, training: Training) -> None:
        """Open the validation split. Without a usable one, log why and do without kNN."""
        self._began = clock()
        if training.config.knn.every_epochs == 0:
            return
        sources = training.sources
        if sources.train is not None and sources.val is None:
            logger.info("no online kNN: no validation images were given")
            return

        def find() -> Images | InputError:
            try:
                val = find_images(training.config.data, "val", root=sources.val)
                check_splits(training.images, val)
            except InputError as error:
                return error
            return val

        val = training.world.first_on_machine(find)
        if isinstance(val, InputError):
            logger.warning(f"no online kNN: {val}")
            return
        for note in val.notes:
            logger.warning(note)
        self._val = val

    def on_step(self, run: Run, batch: Batch, output: BYOLOutput) -> None:
        """Keep the last batch of an epoch. Others would take memory during the next step."""
        self._steps += 1
        if run.config.knn.every_epochs != 0 and run.step.schedule.ends_epoch(run.start + self._steps):
            self._last_step = batch, output

    @property
    def run_seconds(self) -> float:
        """Time of the run so far, over all attempts."""
        return self.seconds["run"] + clock() - self._began

    def on_epoch_end(self, run: Run, done: int) -> bool:
        """Log the evaluation; return True if top-1 is the best so far."""
        epoch, every = run.step.schedule.epoch(done), run.config.knn.every_epochs
        if every == 0:
            return False
        last_step, self._last_step = self._last_step, None
        assert last_step is not None
        due = epoch == run.config.optim.epochs or (self._is_affordable() if every == "auto" else epoch % every == 0)
        # Clocks differ, and a rank may not find the split: rank 0 decides, all must be able to.
        plans = run.world.gather((due, self._val is not None))
        if not all(able for _, able in plans):
            self._val = None
        if not plans[0][0]:
            return False
        run.check_finite()
        before = clock()
        with run.log.pause():
            quality, accuracy = self._measure(run, *last_step)
        self.seconds["last"] = clock() - before
        self.seconds["all"] += self.seconds["last"]
        cost = {"seconds": self.seconds["last"], "time_share": self._time_share()}
        if quality is not None:
            self.quality = quality
            run.log.quality(done, quality | cost)
        if accuracy is None:
            return False
        best = not accuracy["top1"] <= self.accuracy["best"]  # also True while best is NaN
        self.accuracy = {"last": accuracy["top1"], "best": accuracy["top1"] if best else self.accuracy["best"]}
        run.log.knn(done, accuracy | cost)
        return best

    def _is_affordable(self) -> bool:
        """Return True if this evaluation and the one after the last epoch keep to _AUTO_SHARE."""
        if not self.seconds["last"]:
            return True  # the first one shows the cost
        return self.seconds["all"] + 2 * self.seconds["last"] <= _AUTO_SHARE * self.run_seconds

    def _time_share(self) -> float:
        return self.seconds["all"] / self.run_seconds

    def _measure(
        self, run: Run, batch: Batch, output: BYOLOutput
    ) -> tuple[dict[str, float] | None, dict[str, float] | None]:
        """Return the quality without labels, and top-1 and top-5 accuracy of the kNN.

        Both use at most knn.max_bank_images training images. If none of these can be read, log why
        and return None. If no validation image can be read, do without kNN from then on.

        Args:
            batch, output: of the last step.
        """
        config, training = run.config, run.training
        context = EvalContext(
            size=config.data.image_size_px,
            device=training.device,
            dtype=run.step.dtype,
            threads=config.data.threads,
            decoder=choose_decoder(config.data, training.device),
            world=run.world,
        )
        voters, backbone = training.images.subsample(config.knn.max_bank_images), training.model.online.backbone
        val, queries = self._val, None
        try:
            bank = extract_features(backbone, voters, context, None)
        except InputError as error:
            logger.warning(f"no online evaluation of this epoch: {error}")
            return None, None
        try:
            queries = None if val is None else extract_features(backbone, val, context, None)
        except InputError as error:
            logger.warning(f"no online kNN from here on: {error}")
            self._val = None
        self._log_left_out(run, voters, bank.bad, val, {} if queries is None else queries.bad)
        try:
            check_finite(*(part for part in (bank, queries) if part is not None))
        except InputError as error:
            raise RunError(f"online kNN: {error}; {run.folder.last_good()}") from None
        quality = {
            "rank_me": rank_me(bank),
            "alignment": alignment(backbone, batch.views, context),
            "uniformity": uniformity(bank),
            "projection_std": run.world.mean(output.projection_std).item(),
        }
        if queries is None:
            return quality, None
        return quality, knn_accuracy(bank, queries, k=config.knn.k, temperature=config.knn.temperature)

    def _log_left_out(
        self, run: Run, voters: Images, bad_voters: dict[int, str], val: Images | None, bad_val: dict[int, str]
    ) -> None:
        """Log unreadable images once, and not again if the training has already logged them."""
        positions = run.training.images.subsample_indices(len(voters))
        indices = {voters.location(i): int(positions[i]) for i in bad_voters}
        for split, bad in ((voters, bad_voters), (val, bad_val)):
            if split is None:
                continue
            new = {where: reason for i, reason in bad.items() if (where := split.location(i)) not in self._bad}
            self._bad |= new
            for where, reason in new.items():
                if indices.get(where) not in run.named_bad:
                    logger.warning(f"skipped {where}: {reason}")
            if new and (text := missing_images_warning(split, bad)) is not None:
                logger.warning(f"online kNN: {text}")
        run.named_bad.update(indices.values())

    def summary(self) -> dict[str, Any]:
        """Return accuracies, their cost, unreadable images and the quality without labels."""
        return {
            "knn_last": self.accuracy["last"],
            "knn_best": self.accuracy["best"],
            "knn_seconds": self.seconds["all"],
            "knn_time_share": self._time_share(),
            "knn_bad_images": self._bad,
            **self.quality,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the accuracies, the last quality without labels, and the seconds spent."""
        return self.accuracy | {"quality": self.quality, "seconds": self.seconds | {"run": self.run_seconds}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self.accuracy = {key: float(state[key]) for key in ("last", "best")}
        self.quality = dict(state.get("quality", {}))  # an older version did not measure it
        self.seconds |= state.get("seconds", {})
        self._began = clock()
