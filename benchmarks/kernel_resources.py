"""Compile the Triton kernels without a GPU and print their resource usage.

    python benchmarks/kernel_resources.py

Compiles every kernel for A100 (sm_80), H100 (sm_90) and B200 (sm_100) with Triton's own assembler
and prints registers, shared memory, spills, the widest access to global memory, bytes per element,
and a lower bound of the time, from memory bandwidth.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbyol.kernels.augment_params import COLUMNS, blur_radius
from fastbyol.kernels.conv import Tile
from fastbyol.kernels.triton import augment, batch_norm, conv1x1, crop, lars_ema
from fastbyol.tuning import tiles

CAPABILITIES = (80, 90, 100)
# Copy bandwidth in TB/s, estimated as 90 % of the data sheet's memory bandwidth; `make gpu`
# measures it.
BANDWIDTHS = {"A100-40": 0.9 * 1.555, "A100-80": 0.9 * 2.039, "H100": 0.9 * 3.35}
_R50_PARAMETERS = 35_100_000  # of a ResNet-50 and its heads
_R50_TARGETS = 33_000_000  # parameters with a target
_PIXELS = 512 * 224 * 224  # of 512 views


@dataclass(frozen=True)
class Build:
    """One kernel, specialized as in its launches."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Types of the runtime arguments, in order; pointers are aligned to 16 bytes, and integers of
    type i32:16 are multiples of 16."""
    constants: dict[str, Any]
    warps: int
    streaming: bool
    """True if bound by memory bandwidth: must load and store 16 bytes per access."""
    bytes_per_element: float
    elements: int
    """Elements of the workload that the time is computed for."""
    workload: str
    stores_sums_only: bool = False
    """True if a program stores only a few sums, with any width."""
    stages: int | None = None
    """Stages of the software pipeline; Triton's default."""


@dataclass(frozen=True)
class Usage:
    """Resource usage of a build on one GPU."""

    registers: int
    shared_bytes: int
    spill_bytes: int
    load_bits: int
    """Widest load from global memory, per thread."""
    store_bits: int


def builds() -> list[Build]:
    """Return all kernels, as launched for a ResNet-50 pair and 512 views of 224 px in bfloat16."""
    tables = {"chunk_row": "*i64", "chunk_start": "*i64"}
    table = {"addresses": "*i64", "sizes": "*i64", "row_group": "*i64"}
    chunks = {"CHUNK": lars_ema.CHUNK, "BLOCK": lars_ema.BLOCK, "ALIGNED": True}
    pair = f"R50 pair, {_R50_PARAMETERS / 1e6:.1f} M + {_R50_TARGETS / 1e6:.0f} M"
    update_bytes = 20 + 8 * _R50_TARGETS / _R50_PARAMETERS
    lars = []
    for name, dtype in lars_ema.GRADIENTS.items():
        suffix = str(name).removeprefix("torch.")
        width = name.itemsize
        lars += [
            Build(
                f"norms {suffix}",
                lars_ema.norms_kernel,
                tables
                | table
                | {"decays": "*fp32", "etas": "*fp32", "inv_scale": "*fp32", "found_inf": "*fp32", "sums": "*fp32"}
                | {"first_chunk": "i32"},
                chunks | {"SCALED": name.itemsize == 2, "DTYPE": dtype},
                lars_ema.WARPS,
                True,
                4 + width,
                _R50_PARAMETERS,
                pair,
                stores_sums_only=True,
            ),
            Build(
                f"update {suffix}",
                lars_ema.update_kernel,
                tables
                | {"chunk_first": "*i64"}
                | table
                | {"lrs": "*i64", "decays": "*fp32", "momenta": "*fp32", "etas": "*fp32", "tau": "*fp32"}
                | {"inv_scale": "*fp32", "found_inf": "*fp32", "sums": "*fp32", "first_chunk": "i32"},
                chunks | {"DTYPE": dtype},
                lars_ema.WARPS,
                True,
                update_bytes - 4 + width,
                _R50_PARAMETERS,
                pair,
            ),
        ]
    size = 224
    views = "512 views, 224 px"
    return [
        *lars,
        *_batch_norm_builds(),
        *_conv_builds(),
        Build(
            "ema",
            lars_ema.ema_kernel,
            tables | {"addresses": "*i64", "sizes": "*i64", "tau": "*fp32", "first_chunk": "i32"},
            chunks,
            lars_ema.WARPS,
            True,
            12,
            _R50_TARGETS,
            "R50 target",
        ),
        Build(
            "crop",
            crop.crop_kernel,
            {"images": "*i64", "widths": "*i64", "boxes": "*i32", "flips": "*i32", "out": "*u8", "count": "i32"}
            | {"size": "i32"},
            {"BLOCK": crop.BLOCK},
            crop.WARPS,
            False,
            # BYOL's crops cover 0.54 of an image on average. Images of 500x375 px, 3 bytes per
            # pixel, per pixel of a view.
            3 + 3 * 0.54 * 500 * 375 / size**2,
            _PIXELS,
            views,
        ),
        Build(
            "mean",
            augment.mean_kernel,
            {"crops": "*u8", "parameters": "*fp32", "sums": "*fp32", "size": "i32"},
            {"PARTS": augment.PARTS, "BLOCK": augment.MEAN_BLOCK},
            augment.MEAN_WARPS,
            False,
            3 * 0.8,  # of the views with jitter
            _PIXELS,
            views,
        ),
        Build(
            "finish bfloat16",
            augment.finish_kernel,
            {"crops": "*u8", "parameters": "*fp32", "sums": "*fp32", "out": "*bf16", "size": "i32"},
            {"RADIUS": blur_radius(size), "PARTS": augment.PARTS, "TILE": augment.TILE, "WINDOW": augment.window(size)},
            augment.FINISH_WARPS,
            False,
            3 + 6 + 4 * COLUMNS / size**2,
            _PIXELS,
            views,
        ),
    ]


def _batch_norm_builds() -> list[Build]:
    """Return BatchNorm's kernels in bfloat16, as launched for the 512 views of a batch."""
    table = {"stats": "*fp32", "weight": "*fp32", "bias": "*fp32"}
    residual_table = {f"residual_{name}": kind for name, kind in table.items()}
    sizes = {"rows": "i32:16", "channels": "i32:16"}
    image = {"height": "i32:16", "width": "i32:16"}
    epsilons = {"eps": 1e-5, "residual_eps": 1e-5}
    stream = {"ITERATIONS": batch_norm.ITERATIONS}
    finish = {"ROWS": batch_norm.FINISH_ROWS, "CHANNELS": batch_norm.FINISH_CHANNELS, "VIEWS": 2}
    stage, stem = 512 * 256 * 56 * 56, 512 * 64 * 112 * 112  # values of x

    def build(name: str, kernel: Any, types: Any, constants: Any, passes: float, absent: str = "") -> Build:
        """Build a kernel without the tensors named in `absent`, for the stem if it pools."""
        pooled = "places" in types and "places" not in absent.split()
        return Build(
            f"batch_norm {name}",
            kernel,
            {name: kind for name, kind in types.items() if name not in absent.split()},
            constants | dict.fromkeys(absent.split()) | batch_norm.tile(64 if pooled else 256),
            batch_norm.WARPS,
            True,
            2 * passes,
            stem if pooled else stage,
            "(512, 64, 112, 112) and max-pool" if pooled else "(512, 256, 56, 56)",
            stores_sums_only=kernel is batch_norm.moments_kernel or "g" in absent.split(),
        )

    def finishing(name: str, kernel: Any, types: Any, constants: Any) -> Build:
        partials = batch_norm.PROGRAMS // 2  # per channel
        warps, workload = batch_norm.FINISH_WARPS, "(512, 256, 56, 56)"
        return Build(f"batch_norm {name}", kernel, types, constants, warps, False, 8 * partials, 256, workload)

    moments = {"x": "*bf16", "stats": "*fp32", "partials": "*fp32"} | sizes
    running = {"running_mean": "*fp32", "running_var": "*fp32", "batches": "*i64"}
    apply = {"x": "*bf16", "residual": "*bf16", "y": "*bf16", "mask": "*u8"} | table | residual_table | sizes
    pool = {"x": "*bf16", "y": "*bf16", "places": "*u8"} | table | sizes | image
    sums = {"x": "*bf16", "dy": "*bf16", "dy2": "*bf16", "mask": "*u8", "places": "*u8", "residual": "*bf16"}
    sums |= {"g": "*bf16", "partials": "*fp32"} | table | {"residual_stats": "*fp32"} | sizes | image
    gradient = {"x": "*bf16", "g": "*bf16", "g2": "*bf16", "places": "*u8", "residual": "*bf16", "dx": "*bf16"}
    gradient |= {"d_residual": "*bf16", "means": "*fp32"} | table | residual_table | sizes | image
    no_norm = " ".join(residual_table)
    bit = 1 / 16  # of a bfloat16 pass
    relu, from_x = stream | epsilons | {"RELU": True}, {"MASK_FROM_X": True}
    options = {"SAME": False, "MASK_FROM_X": False}
    of_sums, of_gradient = {"eps": 1e-5} | options, stream | epsilons | options
    return [
        build("moments", batch_norm.moments_kernel, moments, {}, 1),
        finishing(
            "finish moments",
            batch_norm.finish_moments_kernel,
            {"partials": "*fp32", "stats": "*fp32"} | running | sizes | {"parts": "i32"},
            finish | {"momentum": 0.1},
        ),
        build("apply", batch_norm.apply_kernel, apply, relu, 2, f"residual mask {no_norm}"),
        build("apply + residual", batch_norm.apply_kernel, apply, relu, 3 + bit, no_norm),
        build("apply + normalized residual", batch_norm.apply_kernel, apply, relu, 3 + bit),
        build(
            "apply and pool", batch_norm.apply_and_pool_kernel, pool, stream | {"eps": 1e-5, "SAME": False}, 1 + 1.5 / 4
        ),
        build("sums", batch_norm.sums_kernel, sums, of_sums | from_x, 2, "dy2 mask places residual g residual_stats"),
        build("sums + residual", batch_norm.sums_kernel, sums, of_sums, 4 + bit, "places residual residual_stats"),
        build("sums + normalized residual", batch_norm.sums_kernel, sums, of_sums, 5 + bit, "places"),
        build(
            "sums of the pool",
            batch_norm.sums_kernel,
            sums,
            of_sums | from_x,
            1 + 2.5 / 4,
            "mask residual g residual_stats",
        ),
        finishing(
            "finish sums",
            batch_norm.finish_sums_kernel,
            {"partials": "*fp32", "stats": "*fp32", "residual_stats": "*fp32", "means": "*fp32", "gradients": "*fp32"}
            | sizes
            | {"parts": "i32"},
            finish | epsilons | {"NORMS": 2},
        ),
        build(
            "gradient",
            batch_norm.gradient_kernel,
            gradient,
            of_gradient | from_x,
            3,
            f"g2 places residual d_residual {no_norm}",
        ),
        build(
            "gradient + residual",
            batch_norm.gradient_kernel,
            gradient,
            of_gradient,
            3,
            f"g2 places residual d_residual {no_norm}",
        ),
        build("gradient + normalized residual", batch_norm.gradient_kernel, gradient, of_gradient, 5, "g2 places"),
        build(
            "gradient of the pool",
            batch_norm.gradient_kernel,
            gradient,
            of_gradient | from_x,
            2 + 2.5 / 4,
            f"residual d_residual {no_norm}",
        ),
    ]


def _conv_builds() -> list[Build]:
    """Return the 1x1 convolution in bfloat16: one shape with all tiles, others with the first."""
    tensors = {"x": "*bf16", "weight": "*bf16", "y": "*bf16", "partials": "*fp32"}
    norm = dict.fromkeys(("norm_stats", "norm_weight", "norm_bias"), "*fp32")
    sizes = dict.fromkeys(("rows", "channels", "out_height", "out_width", "height", "width"), "i32:16")

    def build(inputs: int, channels: int, side: int, tile: Tile, name: str = "", stride: int = 1) -> Build:
        constants = {"eps": 1e-5, "INPUTS": inputs, "STRIDE": stride, "BLOCK_ROWS": tile.rows}
        constants |= {"BLOCK_CHANNELS": tile.channels, "BLOCK_INPUTS": tile.inputs}
        return Build(
            f"conv1x1 {inputs} to {channels}{name}, {tile.rows}x{tile.channels}",
            conv1x1.conv1x1_kernel,
            tensors | (norm if "norm" in name else {}) | sizes,
            constants | ({} if "norm" in name else dict.fromkeys(norm)),
            tile.warps,
            True,
            2 * stride**2 * inputs / channels + 2,
            512 * channels * (side // stride) ** 2,
            f"(512, {inputs}, {side}, {side})",
            stages=tile.stages,
        )

    return [
        *(build(64, 256, 56, tile) for tile in tiles(64, 256)),
        build(64, 256, 56, tiles(64, 256)[0], " with norm"),
        build(512, 128, 28, tiles(512, 128)[0]),
        build(512, 1024, 28, tiles(512, 1024)[0], " strided", stride=2),
    ]


def compile_for(build: Build, capability: int) -> Usage:
    """Compile for compute capability `capability` / 10 and return the resource usage.

    Raises:
        RuntimeError: cuobjdump's output has no register count.
    """
    names = build.kernel.arg_names
    signature = {name: build.types.get(name, "constexpr").removesuffix(":16") for name in names}
    divisible = [name for name, kind in build.types.items() if kind[0] == "*" or kind.endswith(":16")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(build.kernel, signature, constexprs=build.constants, attrs=attributes)
    options = {"num_warps": build.warps} | ({} if build.stages is None else {"num_stages": build.stages})
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        report = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        code = _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    if "REG" not in used:
        raise RuntimeError(f"cuobjdump reports no registers: {report.strip()}")
    return Usage(
        registers=used["REG"],
        shared_bytes=binary.metadata.shared,
        spill_bytes=used.get("STACK", 0) + used.get("LOCAL", 0) + 4 * len(re.findall(r"\b(?:LDL|STL)\b", code)),
        load_bits=max(_widest_access(code, name) for name in ("LDG", "LDGSTS")),  # LDGSTS: to shared memory
        store_bits=_widest_access(code, "STG"),
    )


def _run(program: str, *arguments: str) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def _widest_access(code: str, instruction: str) -> int:
    """Return the widest access of an instruction in bits; 32 if it names no width."""
    modifiers = re.findall(rf"\b{instruction}((?:\.\w+)+)", code)
    return max((int(next(iter(re.findall(r"\.(?:U|S|B)?(8|16|64|128|256)\b", m)), 32)) for m in modifiers), default=0)


def main() -> int:
    """Print the table."""
    header = ["kernel", "target", "registers", "shared", "spills", "load", "store", "bytes/element"]
    rows = [header + [f"min {gpu}" for gpu in BANDWIDTHS] + ["workload"]]
    for build in builds():
        times = [f"{build.elements * build.bytes_per_element / rate / 1e9:.3f} ms" for rate in BANDWIDTHS.values()]
        for capability in CAPABILITIES:
            usage = compile_for(build, capability)
            widths = [f"{usage.load_bits // 8} B", f"{usage.store_bits // 8} B"]
            row = [
                build.name,
                f"sm_{capability}",
                str(usage.registers),
                f"{usage.shared_bytes} B",
                f"{usage.spill_bytes} B",
                *widths,
            ]
            rows.append([*row, f"{build.bytes_per_element:.1f}", *times, build.workload])
    columns = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=True)).rstrip())
    rates = ", ".join(f"{gpu} {rate:.2f}" for gpu, rate in BANDWIDTHS.items())
    print(f"\nMinimum times at {rates} TB/s: 90 % of the data sheets' bandwidth, an estimate; `make gpu` measures it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
