"""Trainings that are built and not run."""

from helpers.steps import CPU

from fastbyol.runtime.distributed import World
from fastbyol.tools.profiling import build


def training_of(config):
    return build(config, World(), CPU, lambda text: None)
