"""What the GPU kernels compile to, without a GPU: `python -m fastbyol.kernels.triton.resources`.

Compiles every Triton kernel for A100 (sm_80), H100 (sm_90) and B200 (sm_100) with the assembler that comes with Triton and
prints registers, shared memory, spills, the widest access to global memory, bytes per element, and the time that those bytes
take at least.
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

from fastbyol.kernels.augment import COLUMNS, blur_radius
from fastbyol.kernels.triton import augment, crop, lars_ema

CAPABILITIES = (80, 90, 100)
# Copy bandwidth in TB/s: taken as 90 % of the data sheet's memory bandwidth; `make gpu` measures that of the GPU at hand.
BANDWIDTHS = {"A100-40": 0.9 * 1.555, "A100-80": 0.9 * 2.039, "H100": 0.9 * 3.35}
_R50_PAIR = 35_100_000  # parameters of a ResNet-50 and its heads
_R50_TARGETS = 33_000_000  # those with a target
_PIXELS = 512 * 224 * 224  # of 512 views


@dataclass(frozen=True)
class Build:
    """One kernel, specialized as the wrappers launch it."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Of the arguments that are not compile-time constants, in their order; pointers begin multiples of 16 bytes."""
    constants: dict[str, Any]
    warps: int
    streaming: bool
    """Whether it does nothing but pass over memory: must load and store 16 bytes at a time."""
    bytes_per_element: float
    elements: int
    """Of the job that the floor is given for."""
    job: str


@dataclass(frozen=True)
class Compiled:
    """What became of a build on one GPU."""

    registers: int
    shared_bytes: int
    spill_bytes: int
    load_bits: int
    """The widest load from global memory, a thread."""
    store_bits: int


def builds() -> list[Build]:
    """All kernels, as for a ResNet-50 pair with float32 gradients and for 512 views of 224 px in bfloat16."""
    tables = {"chunk_row": "*i64", "chunk_start": "*i64"}
    where = {"addresses": "*i64", "sizes": "*i64", "row_group": "*i64"}
    chunks = {"CHUNK": lars_ema.CHUNK, "BLOCK": lars_ema.BLOCK, "ALIGNED": True}
    pair = f"R50 pair, {_R50_PAIR / 1e6:.1f} M + {_R50_TARGETS / 1e6:.0f} M"
    update_bytes = 20 + 8 * _R50_TARGETS / _R50_PAIR
    lars = []
    for name, dtype in lars_ema.GRADIENTS.items():
        suffix = str(name).removeprefix("torch.")
        width = name.itemsize
        lars += [
            Build(
                f"norms {suffix}",
                lars_ema.norms_kernel,
                tables
                | where
                | {"decays": "*fp32", "etas": "*fp32", "inv_scale": "*fp32", "found_inf": "*fp32", "sums": "*fp32"}
                | {"first_chunk": "i32"},
                chunks | {"SCALED": name.itemsize == 2, "DTYPE": dtype},
                lars_ema.WARPS,
                True,
                4 + width,
                _R50_PAIR,
                pair,
            ),
            Build(
                f"update {suffix}",
                lars_ema.update_kernel,
                tables
                | {"chunk_first": "*i64"}
                | where
                | {"lrs": "*i64", "decays": "*fp32", "momenta": "*fp32", "etas": "*fp32", "tau": "*fp32"}
                | {"inv_scale": "*fp32", "found_inf": "*fp32", "sums": "*fp32", "first_chunk": "i32"},
                chunks | {"DTYPE": dtype},
                lars_ema.WARPS,
                True,
                update_bytes - 4 + width,
                _R50_PAIR,
                pair,
            ),
        ]
    size = 224
    views = "512 views, 224 px"
    return [
        *lars,
        Build(
            "average",
            lars_ema.average_kernel,
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
            # BYOL's crops hold 0.54 of an image on average; of 500x375 pixels, 3 bytes each, per pixel of a view.
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


def compile_for(build: Build, capability: int) -> Compiled:
    """Compiles for compute capability `capability` / 10.

    Raises:
        RuntimeError: the kernel's binary cannot be read.
    """
    names = build.kernel.arg_names
    signature = {name: build.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in build.types.items() if kind[0] == "*"}
    source = ASTSource(build.kernel, signature, constexprs=build.constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": build.warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        code = _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if "REG" not in used:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage.strip()}")
    return Compiled(
        registers=used["REG"],
        shared_bytes=binary.metadata.shared,
        spill_bytes=used.get("STACK", 0) + used.get("LOCAL", 0) + 4 * len(re.findall(r"\b(?:LDL|STL)\b", code)),
        load_bits=_widest(code, "LDG"),
        store_bits=_widest(code, "STG"),
    )


def _run(program: str, *arguments: str) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def _widest(code: str, instruction: str) -> int:
    """The widest access in bits that an instruction makes in disassembled code; 32 where it names no width."""
    modifiers = re.findall(rf"\b{instruction}((?:\.\w+)+)", code)
    return max((int(next(iter(re.findall(r"\.(?:U|S|B)?(8|16|64|128|256)\b", m)), 32)) for m in modifiers), default=0)


def main() -> int:
    """Prints the table."""
    header = ["kernel", "target", "registers", "shared", "spills", "load", "store", "bytes/element"]
    rows = [header + [f"floor {gpu}" for gpu in BANDWIDTHS] + ["job"]]
    for build in builds():
        floors = [f"{build.elements * build.bytes_per_element / rate / 1e9:.3f} ms" for rate in BANDWIDTHS.values()]
        for capability in CAPABILITIES:
            c = compile_for(build, capability)
            widths = [f"{c.load_bits // 8} B", f"{c.store_bits // 8} B"]
            row = [
                build.name,
                f"sm_{capability}",
                str(c.registers),
                f"{c.shared_bytes} B",
                f"{c.spill_bytes} B",
                *widths,
            ]
            rows.append([*row, f"{build.bytes_per_element:.1f}", *floors, build.job])
    columns = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=True)).rstrip())
    rates = ", ".join(f"{gpu} {rate:.2f}" for gpu, rate in BANDWIDTHS.items())
    print(f"\nFloors at {rates} TB/s: 90 % of the data sheets' bandwidth, an estimate; `make gpu` measures it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
