"""Semi-supervised evaluation: fine-tune backbone and linear classifier on part of the labels.

Protocol: Grill et al. 2020, appendix C.2: random crops and flips, SGD with Nesterov momentum 0.9,
cosine schedule, no weight decay. With more than one learning rate, the best on held-out labeled
images is used. The row of the untrained network shows what the same labels give from random
weights.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastbyol.config import Config, DistributedConfig
from fastbyol.data.images import Images
from fastbyol.data.subset import select_training_images
from fastbyol.errors import InputError, RunError
from fastbyol.evaluation.context import EvalContext, Row
from fastbyol.evaluation.features import (
    feature_dim,
    network_outputs,
    open_splits,
    readable_indices,
    training_batches,
    unchanged,
)
from fastbyol.evaluation.knn import accuracies, top_hits
from fastbyol.evaluation.options import FinetuneEval
from fastbyol.evaluation.task import EvalTask
from fastbyol.parallel import GradientMean, sync_batch_norm
from fastbyol.precision import autocast
from fastbyol.runtime.logging import logger
from fastbyol.weights.files import check_new, save_backbone

_MOMENTUM = 0.9
_HELD_OUT_FRACTION = 0.2


class Diverged(RunError):
    """The network became NaN or infinite: another learning rate may work."""


class FinetuneData(NamedTuple):
    """The labeled part of the training split, the validation split and the run's config."""

    train: Images
    val: Images
    config: Config

    @property
    def classes(self) -> list[str]:
        """Class names, the same in both splits."""
        return self.train.classes


def finetune(
    backbone: nn.Module,
    images: Images,
    context: EvalContext,
    *,
    base_lr: float,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    stage: str = "",
) -> nn.Sequential:
    """Train a copy of the backbone with a linear classifier on labeled images.

    Every rank must call this; ranks share every batch and its BatchNorm statistics.

    Args:
        stage: name of the training in the partial result, where it is saved after every epoch.

    Raises:
        InputError: batches are too small for BatchNorm, or no image is readable.
        Diverged: the loss or a weight became NaN or infinite.
    """
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())
    min_batch = 2 if has_batch_norm else 1
    if batch_size < min_batch:
        raise InputError(
            f"batch_size={batch_size}: the backbone's BatchNorm needs at least {min_batch} images per step"
        )
    if len(images) < min_batch:
        raise InputError(f"{images.root}: {len(images)} labeled image(s) are too few for training; raise fraction")
    batch_size = min(batch_size, len(images))
    head = nn.Linear(feature_dim(backbone, context), len(images.classes), device=context.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    world = context.world
    network = nn.Sequential(copy.deepcopy(backbone), head).train()
    sync_batch_norm(network, DistributedConfig(), world)
    average_gradients = GradientMean(network.parameters(), world)
    optimizer = torch.optim.SGD(network.parameters(), 1.0, momentum=_MOMENTUM, nesterov=True)
    steps = len(images) // batch_size  # per epoch
    first, loss = 0, torch.zeros((), device=context.device)
    if (saved := context.partial.stage(stage)) is not None:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    description = f"fine-tuning, base lr {base_lr:g}"
    batches = training_batches(
        images,
        context,
        epochs=range(first, epochs),
        batch_size=batch_size,
        seed=seed,
        description=description,
        dtype=context.training_dtype,
    )
    for step, (x, labels, _) in enumerate(batches, start=first * steps):
        optimizer.param_groups[0]["lr"] = (
            base_lr * batch_size / 256 * (1 + math.cos(math.pi * step / (epochs * steps))) / 2
        )
        with autocast(context.device, context.training_dtype):
            loss = F.cross_entropy(network(x).float(), labels)
        loss.backward()
        average_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % steps == 0:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            context.partial.save(stage, {"epoch": (step + 1) // steps} | state)
    if not all(torch.isfinite(value).all() for value in (world.mean(loss.detach()), *network.parameters())):
        raise Diverged(
            f"base_lrs={base_lr:g}: the network became NaN or infinite during fine-tuning; choose a lower one"
        )
    return network


def _select_base_lr(
    backbone: nn.Module, images: Images, options: FinetuneEval, context: EvalContext, training: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """Return the best learning rate on held-out images, and {"held_out_top1": its accuracy}."""
    if len(options.base_lrs) == 1:
        return options.base_lrs[0], {}
    if len(images) < 4:
        raise InputError(
            f"{images.root}: {len(images)} labeled images are too few to hold some out for choosing among base_lrs; "
            "raise fraction or give one rate"
        )
    order = np.random.default_rng(0).permutation(len(images))
    held_out = max(1, round(_HELD_OUT_FRACTION * len(order)))
    fit, test = images.subset(np.sort(order[held_out:])), images.subset(np.sort(order[:held_out]))
    accuracy = {}
    for base_lr in options.base_lrs:
        stage = f"base lr {base_lr:g}"
        if (saved := context.partial.stage(stage)) is None or "top1" not in saved:
            try:
                network = finetune(backbone, fit, context, base_lr=base_lr, stage=stage, **training)
                saved = {"top1": _accuracy(network, test, context)["top1"]}
            except Diverged as error:
                logger.warning(str(error))
                continue
            context.partial.save(stage, saved)
        accuracy[base_lr] = saved["top1"]
    if not accuracy:
        raise RunError(f"base_lrs={list(options.base_lrs)}: the network became NaN or infinite with all of them")
    best = max(accuracy, key=accuracy.__getitem__)
    return best, {"held_out_top1": accuracy[best]}


def _accuracy(network: nn.Module, split: Images, context: EvalContext) -> dict[str, float]:
    totals, bad = torch.zeros(3, dtype=torch.int64, device=context.device), dict[int, str]()
    for (logits,), indices in network_outputs(network, split, context, [unchanged], "validation", bad):
        labels = torch.from_numpy(split.labels[indices]).to(context.device)
        totals += torch.cat((top_hits(logits, labels), logits.isfinite().logical_not_().sum()[None]))
    count, totals = len(readable_indices(split, bad, context)), context.world.sum(totals)
    if totals[2]:
        raise Diverged("the logits hold NaN or infinity: the network has diverged during fine-tuning; lower base_lrs")
    return accuracies(totals[:2], count)


class FinetuneTask(EvalTask):
    """Fine-tuning on a fraction of the labels."""

    name = "finetune"
    title = "Fine-tuning on a part of the labels"
    uses_pixels = False

    def open(self, options: FinetuneEval, config: Config, context: EvalContext) -> FinetuneData:
        """Return both splits, the training split reduced to the labeled fraction.

        Raises:
            InputError: the fraction leaves a class without images.
        """
        splits = open_splits(options, config, context.sources, context.world)
        part = replace(
            config.data, fraction=options.fraction, images_per_class=0, file_list=None, subset_seed=options.subset_seed
        )
        return FinetuneData(select_training_images(splits.train, part, prefix=""), splits.val, config)

    def measure(self, backbone: nn.Module, data: FinetuneData, options: FinetuneEval, context: EvalContext) -> Row:
        """Return top-1, top-5 and the learning rate used.

        Saves the network of the first row, the checkpoint's.

        Raises:
            InputError: the file to save to exists.
        """
        save = None if options.save is None or context.partial.rows else Path(options.save)
        # A killed evaluation may have saved its network before its row.
        is_resumed = context.partial.stage("final") is not None
        if save is not None and not is_resumed:
            check_new(save, "save")
        training = {"epochs": options.epochs, "batch_size": options.batch_size}
        base_lr, held_out = _select_base_lr(backbone, data.train, options, context, training)
        network = finetune(backbone, data.train, context, base_lr=base_lr, stage="final", **training)
        row = _accuracy(network, data.val, context) | {"base_lr": base_lr} | held_out
        if save is not None and context.world.is_main_process and not (is_resumed and save.exists()):
            config = data.config
            save_backbone(save, network[0], config.model, config.data.image_size_px, key="save")
        return row


FINETUNE = FinetuneTask()
