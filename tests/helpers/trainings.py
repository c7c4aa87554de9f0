"""Build trainings without running them."""

from helpers.steps import CPU

from fastbyol.build import build_training
from fastbyol.data import find_images
from fastbyol.kernels.cpu.jit_cache import compile_cpu_kernels
from fastbyol.runtime.distributed import World


def training_of(config):
    compile_cpu_kernels()
    return build_training(config, World(), CPU, find_images(config.data, "train"))
