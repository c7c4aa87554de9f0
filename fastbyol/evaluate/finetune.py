"""Semi-supervised: backbone and a linear classifier are trained on a part of the labels.

Protocol: Grill et al. 2020, appendix C.2: the whole network from the pre-trained weights, random crop and flip, SGD with Nesterov
momentum 0.9, cosine, no weight decay; of several learning rates the one that does best on held-out labeled images. The row of
the untrained network is what the same labels give from random weights.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastbyol.config import Config, FinetuneEval
from fastbyol.data.images import ImageSet
from fastbyol.data.subset import select_training_images
from fastbyol.errors import InputError, RunError
from fastbyol.evaluate.features import extract_features, feature_count, open_splits, training_batches
from fastbyol.evaluate.knn import top_accuracies
from fastbyol.evaluate.protocol import EvalContext, Protocol, Row
from fastbyol.precision import autocast
from fastbyol.weights.load import check_new, save_backbone

_MOMENTUM = 0.9
_HOLDOUT = 0.2


class Labeled(NamedTuple):
    """The labeled part of the training split, the validation split, and what the network is."""

    train: ImageSet
    val: ImageSet
    config: Config

    @property
    def classes(self) -> list[str]:
        """Of both splits."""
        return self.train.classes


def open_labeled(options: FinetuneEval, config: Config, frame: EvalContext) -> Labeled:
    """Both splits; of the training split the labeled part.

    Raises:
        InputError: the fraction leaves a class without an image, or the file to save in exists.
    """
    if options.save is not None:
        check_new(Path(options.save), "save")
    splits = open_splits(options, config)
    part = replace(
        config.data, fraction=options.fraction, images_per_class=0, file_list=None, subset_seed=options.subset_seed
    )
    return Labeled(select_training_images(splits.train, part, prefix=""), splits.val, config)


def finetune(
    backbone: nn.Module,
    images: ImageSet,
    frame: EvalContext,
    *,
    base_lr: float,
    epochs: int,
    batch_size: int,
    seed: int = 0,
) -> nn.Sequential:
    """A copy of the backbone (n, 3, S, S) -> (n, F) with a linear classifier, trained on all labels of `images`.

    Raises:
        InputError: batches would be too small for BatchNorm, or no image can be read.
        RunError: the loss or a weight became NaN or infinite.
    """
    fewest = 2 if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()) else 1
    if batch_size < fewest:
        raise InputError(f"batch_size={batch_size}: the backbone's BatchNorm needs at least {fewest} images per step")
    if len(images) < fewest:
        raise InputError(f"{images.root}: {len(images)} labeled image(s) to train on are too few; raise fraction")
    batch_size = min(batch_size, len(images))
    head = nn.Linear(feature_count(backbone, frame), len(images.classes), device=frame.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    network = nn.Sequential(copy.deepcopy(backbone), head).train()
    optimizer = torch.optim.SGD(network.parameters(), 1.0, momentum=_MOMENTUM, nesterov=True)
    total = epochs * (len(images) // batch_size)
    loss = None
    what = f"fine-tuning, base lr {base_lr:g}"
    batches = training_batches(images, frame, epochs=epochs, batch_size=batch_size, seed=seed, what=what)
    for step, (x, labels, _) in enumerate(batches):
        if len(x) < fewest:  # the others cannot be read
            continue
        optimizer.param_groups[0]["lr"] = base_lr * batch_size / 256 * (1 + math.cos(math.pi * step / total)) / 2
        with autocast(frame.device, frame.training_dtype):
            loss = F.cross_entropy(network(x).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if loss is None:
        raise InputError(f"{images.root}: no batch had {fewest} images that can be read")
    if not all(torch.isfinite(value).all() for value in (loss, *network.parameters())):
        raise RunError(
            f"base_lrs={base_lr:g}: the network became NaN or infinite while fine-tuning; choose a lower one"
        )
    return network


def _measure(backbone: nn.Module | None, splits: Labeled, options: FinetuneEval, frame: EvalContext) -> Row:
    assert backbone is not None
    training = {"epochs": options.epochs, "batch_size": options.batch_size}
    best, extra = options.base_lrs[0], {}
    if len(options.base_lrs) > 1:
        if len(splits.train) < 4:
            raise InputError(
                f"{splits.train.root}: {len(splits.train)} labeled images are too few to hold some out, on which one of "
                "several base_lrs is picked; raise fraction or name one rate"
            )
        order = np.random.default_rng(0).permutation(len(splits.train))
        held = max(1, round(_HOLDOUT * len(order)))
        fit, test = splits.train.subset(np.sort(order[held:])), splits.train.subset(np.sort(order[:held]))
        found = {}
        for base_lr in options.base_lrs:
            try:
                network = finetune(backbone, fit, frame, base_lr=base_lr, **training)
            except RunError as error:  # the other rates may do
                frame.say(f"warning: {error}")
                continue
            found[base_lr] = _accuracy(network, test, frame)["top1"]
        if not found:
            raise RunError(f"base_lrs={list(options.base_lrs)}: the network became NaN or infinite with all of them")
        best = max(found, key=found.__getitem__)
        extra = {"held_out_top1": found[best]}
    network = finetune(backbone, splits.train, frame, base_lr=best, **training)
    if options.save is not None and not Path(options.save).exists():  # the first row is the checkpoint's
        config = splits.config
        save_backbone(Path(options.save), network[0], config.model, config.data.image_size_px, key="save")
    return _accuracy(network, splits.val, frame) | {"base_lr": best} | extra


def _accuracy(network: nn.Module, split: ImageSet, frame: EvalContext) -> dict[str, float]:
    logits = extract_features(network, split, frame, "validation")
    return top_accuracies(logits.x, logits.labels)


def _text(row: Row) -> str:
    return f"top-1 {row['top1']:6.1%}  top-5 {row['top5']:6.1%}  (base lr {row['base_lr']:g})"


FINETUNE = Protocol(
    name="finetune",
    title="Fine-tuning on a part of the labels",
    open=open_labeled,
    measure=_measure,
    takes_pixels=False,
    row_text=_text,
)
