"""Script of test_nccl.py: separately compiled modules under DDP in a process group of one rank.

TrainStep and ProcessGroup skip all of this for one rank, so this script assembles the multi-rank
step from the functions that they use.
"""

import json
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from helpers.on_device import DEVICE, Network, run, weights_of

from fastbyol import parallel
from fastbyol.config import DistributedConfig
from fastbyol.cuda_graph import CapturedStep
from fastbyol.layers import batch_norms
from fastbyol.runtime.distributed import ProcessGroup, StopConsensus, World, mean_over_ranks

STEPS = 3
CAPTURED_STEPS = 14  # of which 11 warm up


def main() -> None:
    network, config = Network("test_resnet"), DistributedConfig(timeout_s=60)
    begin = weights_of(network.model)
    plain = run(network.step("eager", "fp32"), STEPS)
    path = weights_of(network.model) - begin
    step, world = network.step("eager", "fp32"), World(0, 2)  # the environment sets the group's size to 1
    with ProcessGroup(world, config, DEVICE):
        group = dist.group.WORLD
        for norm in batch_norms(step.model):
            norm.reduce = lambda x: mean_over_ranks(x, group, 1)
        parallel._compile_parts(step.model)
        step.forward = parallel.data_parallel(step.model, config, DEVICE, static_graph=True)
        captured = run_captured(network, group, config) if DEVICE.type == "cuda" else None
        with StopConsensus(world) as consensus:
            found = {
                "plain": plain,
                "parallel": run(step, STEPS),
                "captured": captured,
                "weight difference": float((weights_of(step.model) - begin - path).norm() / path.norm()),
                "ranks": dist.get_world_size(),
                "backend": group._get_backend(DEVICE).name(),
                "host backend": group._get_backend(torch.device("cpu")).name(),
                "maximum": int(world.maximum(torch.tensor([3], device=DEVICE))),
                "agreed": [consensus.agree(stop) for stop in (False, True, False)],
            }
        step.close()
    print(json.dumps(found))


def run_captured(network: Network, group: Any, config: DistributedConfig) -> list[list[float]]:
    """Return the losses of the step with its exchange, without and with a CUDA graph."""
    losses = []
    for capture in (False, True):
        step = network.step("eager", "fp32")
        graph = CapturedStep(step.compute, DEVICE, ranks=2) if capture else None
        for norm in batch_norms(step.model):
            norm.reduce = lambda x: mean_over_ranks(x, group, 1)
        with nullcontext() if graph is None else graph.stream():
            step.forward = parallel.data_parallel(step.model, config, DEVICE, static_graph=True)
        step._graph = graph
        losses.append(run(step, CAPTURED_STEPS))
        step.close()
    return losses


if __name__ == "__main__":
    main()
