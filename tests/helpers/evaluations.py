"""Script for the ranks of test_ranks.py and test_embed.py.

Usage: `torchrun ... evaluations.py EVALUATIONS.json [kill RANK|losses FILE]`. Runs all evaluations
of a JSON list of [task, options]; task "embed" is fastbyol embed.

- `kill`: RANK sends itself SIGKILL after its first batch of images.
- `losses`: rank 0 writes the losses of all training steps of dense protocols, a list per network.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from helpers.torchrun import exit_code

from fastbyol.evaluation import dense, detection, features
from fastbyol.evaluation.embed import embed
from fastbyol.evaluation.options import EVALUATIONS, EmbedConfig
from fastbyol.evaluation.run import evaluate


def features_of(x, labels, classes):
    """Return the features x (M, F) of M images, on one rank."""
    length = torch.linalg.vector_norm(x, dim=1)
    unit = torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(torch.float32).tiny).half()
    return features.Features(unit, length, torch.arange(len(x)), [len(x)], labels, classes, {})


def record_losses() -> list[list[float]]:
    """Record the losses of dense training, the mean over ranks; return the growing list.

    Detectors draw all proposals, so that their number differs between images.
    """
    detection._MIN_BOXES = 4096
    original, recorded = dense.fit, []

    def fit(network, loss_of, make_sample, images, options, context):
        losses = []
        recorded.append(losses)

        def recording(batch):
            loss = loss_of(batch)
            losses.append(context.world.mean(loss.detach()).item())
            return loss

        original(network, recording, make_sample, images, options, context)

    dense.fit = fit
    return recorded


def sabotage(rank: str) -> None:
    original = features.center_crops

    def watched(*args, **options):
        for batch in original(*args, **options):
            yield batch
            if os.environ["RANK"] == rank:
                os.kill(os.getpid(), signal.SIGKILL)

    features.center_crops = watched


def options_of(task, options):
    """Return the options of a task from JSON values."""
    return EVALUATIONS[task](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def run_task(task, options):
    """Run a task with options from JSON."""
    return embed(EmbedConfig(**options)) if task == "embed" else evaluate(task, options_of(task, options))


def main() -> int:
    what, value = sys.argv[2:] if len(sys.argv) > 2 else (None, None)
    if what == "kill":
        sabotage(value)
    recorded = record_losses() if what == "losses" else None
    evaluations = json.loads(Path(sys.argv[1]).read_text())
    code = exit_code(lambda: [run_task(*evaluation) for evaluation in evaluations])
    if recorded is not None and os.environ["RANK"] == "0":
        Path(value).write_text(json.dumps(recorded))
    return code


if __name__ == "__main__":
    sys.exit(main())
