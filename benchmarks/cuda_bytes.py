"""Count the bytes and kernel launches of the compiled CUDA step, without a GPU.

    python benchmarks/cuda_bytes.py [--backbone resnet50 --size 224 --batch 256]
        [--only fastbyol plain] [--top 10] [--save /tmp/code]

Inductor compiles the forward and backward passes for an H100, with fake tensors and a stub of the
CUDA driver (cuda_stub.c). The script sums Inductor's estimate of each kernel's reads and writes. It
launches and times nothing, and rejects machines with a CUDA driver, where bench_step.py measures.
ResNet-18 takes one minute per contender, ResNet-50 three.

Contenders:
    fastbyol        fastbyol's model under torch.compile, as the step calls it, with all 1x1
                    convolutions before a BatchNorm as Triton kernels
    fastbyol cudnn  the same with step.conv1x1=cudnn
    plain           a direct implementation of the paper (references.PlainBYOL) under torch.compile
Both use channels-last weights and views and bfloat16 autocast.

The operands of each kernel count once per kernel. Caches may serve some of them, and a library call
may launch multiple kernels and use a workspace. Convolutions and matrix products are library calls;
everything else is Triton code. A run chooses the faster of Triton and cuDNN for each 1x1
convolution, so its bytes lie between those of the first two contenders. The graphs contain no
optimizer, target update or augmentation.
Saved bytes are the forward pass's results for the backward pass, without its inputs.

`--out` writes one row per contender, with commit and versions, since fusion depends on torch.
"""

import argparse
import collections
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_step
import results_csv
import torch

from fastbyol.config import Config, DataConfig, ModelConfig
from fastbyol.errors import FastbyolError, InputError, RunError
from fastbyol.layers import pointwise_convs
from fastbyol.parallel import prepare_forward
from fastbyol.runtime import environment
from fastbyol.runtime.distributed import World
from fastbyol.tools.roofline import meta_model
from fastbyol.tuning import tiles

CONTENDERS = ["fastbyol", "fastbyol cudnn", "plain"]
STUB = Path(__file__).with_name("cuda_stub.c")
FACTS = ("fastbyol", "torch", "triton", "torchvision", "timm")


@dataclass(frozen=True)
class Kernel:
    """One launch of a Triton kernel, or one library call."""

    phase: str
    """forward or backward."""
    kind: str
    """triton or library."""
    bytes: int
    """Bytes read and written."""
    operations: str
    """Names of the fused ATen operators."""


@dataclass(frozen=True)
class Counts:
    """Kernels and bytes of the forward and backward pass of one step."""

    contender: str
    work: bench_step.Work
    kernels: list[Kernel]
    kept_bytes: int
    """Bytes that the forward pass saves for the backward pass."""

    def of(self, phase: str | None = None, kind: str | None = None) -> tuple[int, int]:
        """Return launches and bytes of a phase and a kind; None selects all."""
        chosen = [k.bytes for k in self.kernels if phase in (None, k.phase) and kind in (None, k.kind)]
        return len(chosen), sum(chosen)

    @property
    def mb_per_image(self) -> float:
        """MB per image, including both views."""
        return self.of()[1] / 1e6 / self.work.batch


# --- the process of one contender, with the stub as CUDA driver ---


class _H100:
    """Device properties that Inductor reads."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    multi_processor_count, warp_size = 132, 32
    max_threads_per_block, max_threads_per_multi_processor, regs_per_multiprocessor = 1024, 2048, 65536


def _pretend_h100() -> None:
    """Patch everything that allocates or launches on the device, or needs a real driver."""
    import triton
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.constant_folding import ConstantFolder
    from torch._inductor.fx_passes import fuse_attention
    from torch._subclasses import fake_tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.backends.compiler import GPUTarget

    torch.cuda.init()  # must precede the next line, which it would undo
    torch.cuda._get_device_properties = lambda index: _H100
    # Triton's own driver compiles a module against libcuda.
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))

    fake_tensor.init_gpu_context = lambda device: None  # torch 2.11 allocates a real tensor with the first fake one
    # Attention patterns allocate real tensors, and these models have no attention.
    fuse_attention._sfdp_init = lambda *args, **kwargs: None
    config.shape_padding = False  # would time matrix products of odd sizes with and without padding

    class OnCpu(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            return func(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))

    fold = ConstantFolder.run

    def fold_on_cpu(self: ConstantFolder) -> Any:
        with OnCpu():  # evaluates uniform constants as real one-element tensors
            return fold(self)

    ConstantFolder.run = fold_on_cpu
    config.force_disable_caches = True  # a cached graph would skip the lowering
    config.compile_threads = 1  # no worker pool, since no kernel is compiled
    functorch_config.force_non_lazy_backward_lowering = True  # lower it without running a backward pass


def _build(contender: str, work: bench_step.Work) -> tuple[torch.nn.Module, Callable[[torch.nn.Module], Any]]:
    """Return the contender's model on the meta device, and a function that compiles its forward."""
    if contender != "plain":
        data = DataConfig(batch_size=work.batch, image_size_px=work.size)
        model = ModelConfig(backbone=work.backbone, hidden_dim=bench_step.HIDDEN, projection_dim=bench_step.PROJECTION)
        config = Config(precision="bf16", data=data, model=model)
        model = meta_model(config)
        for conv, after_norm in pointwise_convs(model) if contender == "fastbyol" else ():
            conv.tile = tiles(conv.in_channels, conv.out_channels)[0]
            conv.norm_tile = conv.tile if after_norm else None
        return model, lambda m: prepare_forward(m, config, "compile", torch.device("cuda"), World())
    with torch.device("meta"):
        return bench_step.plain_byol(work), partial(torch.compile, fullgraph=True, dynamic=False)


def _kernels(graph: Any, phase: str) -> Iterable[Kernel]:
    """Yield the kernels of a lowered graph (torch._inductor.graph.GraphLowering)."""
    from torch._inductor.ir import MultiOutput, UserDefinedTritonKernel
    from torch._inductor.scheduler import NopKernelSchedulerNode

    for node in graph.scheduler.nodes:
        if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
            continue  # no launch: only memory, or one result of a library call
        if isinstance(node.node, UserDefinedTritonKernel):  # Inductor counts its results as read and written
            operands = {operand.get_name(): _size(operand) for operand in node.node.inputs}
            yield Kernel(phase, "triton", sum(operands.values()), node.node.get_kernel_and_metadata()[0].fn.__name__)
            continue
        origins = {str(o.target) for part in node.get_nodes() if part.node is not None for o in part.node.get_origins()}
        names = sorted({name.removeprefix("aten.").removeprefix("prims.").partition(".")[0] for name in origins})
        kind = "library" if node.is_extern() else "triton"
        yield Kernel(phase, kind, node.get_read_write_buffers_sizes(), " ".join(names))


def _size(value: Any) -> int:
    """Return the bytes of a tensor of a lowered graph."""
    return value.get_dtype().itemsize * int(value.get_numel())


def _count_here(contender: str, work: bench_step.Work, save: Path | None) -> Counts:
    """Implement `count` in the process with the stub."""
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    _pretend_h100()
    kernels: list[Kernel] = []
    kept = 0

    def lower(graph: GraphLowering) -> Any:
        """Count, and return a module without kernels; replaces GraphLowering.compile_to_module."""
        nonlocal kept
        phase = "backward" if graph.is_backward else "forward"
        code, _ = graph.codegen()
        kernels.extend(_kernels(graph, phase))
        if graph.is_backward:
            own = ("primals", "tangents")  # AOTAutograd's names for inputs of the forward pass and for gradients
            kept = sum(_size(t) for name, t in graph.graph_inputs.items() if not name.startswith(own))
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            (save / f"{contender}_{phase}.py").write_text(code.value)

        def call(args: list[Any]) -> list[torch.Tensor]:
            layouts = [output.get_layout() for output in graph.graph_outputs]
            return [torch.empty_strided(t.size, t.stride, dtype=t.dtype, device=t.device) for t in layouts]

        return SimpleNamespace(call=call, key="", __file__="")

    GraphLowering.compile_to_module = lower
    torch.backends.cudnn.benchmark = True  # the step sets it too
    model, compile_forward = _build(contender, work)
    model = model.to(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True):  # for the meta tensors
        fake = {name: torch.empty_like(t, device="cuda") for name, t in model.state_dict().items()}
        model.load_state_dict(fake, assign=True)
        shape = (work.batch, 3, work.size, work.size)
        view = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16):
            compile_forward(model)(view, torch.empty_like(view))
    return Counts(contender, work, kernels, kept)


# --- the parent process ---


def check_machine() -> None:
    """Check that the stub can be built and used on this machine.

    Raises:
        InputError: if there is a CUDA driver, which the stub must not shadow; if torch has no CUDA
            backend; or if gcc is missing.
    """
    if torch.cuda.is_available() or _has_driver():
        raise InputError("this machine has a CUDA driver, which the stub would shadow: run bench_step.py instead")
    if torch.version.cuda is None:
        raise InputError(f"torch {torch.__version__} is built without CUDA: install a CUDA build; no GPU is needed")
    if shutil.which("gcc") is None:
        raise InputError("gcc is missing and needed for cuda_stub.c: apt-get install gcc libc6-dev")


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def count(contender: str, backbone: str, size: int, batch: int, save: Path | None = None) -> Counts:
    """Count a contender's kernels and bytes in a separate process.

    Args:
        contender: one of CONTENDERS.
        backbone: name of the backbone.
        size: side of the views in pixels.
        batch: images; each has two views.
        save: folder for the generated code.

    Raises:
        InputError: see `check_machine`, or if the stub does not compile.
        RunError: if the contender does not compile. Its process prints the cause.
    """
    check_machine()
    with tempfile.TemporaryDirectory() as folder:
        stub, result = Path(folder) / "libcuda.so.1", Path(folder) / "counts.json"
        command = ["gcc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{stub.name}", "-o", str(stub), str(STUB)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise InputError(f"gcc cannot compile {STUB.name}: {built.stderr.strip().splitlines()[-1]}")
        command = [sys.executable, "-W", "ignore", __file__, "--only", contender, "--result", str(result)]
        command += ["--backbone", backbone, "--size", str(size), "--batch", str(batch)]
        command += ["--save", str(save)] if save is not None else []
        if subprocess.run(command, env=os.environ | {"LD_PRELOAD": str(stub)}).returncode:
            raise RunError(f"{contender} could not be counted: see above")
        return from_json(result.read_text())


def to_json(counts: Counts) -> str:
    """Serialize the result of the contender's process."""
    return json.dumps(asdict(counts))


def from_json(text: str) -> Counts:
    """Inverse of `to_json`."""
    values = json.loads(text)
    kernels = [Kernel(**kernel) for kernel in values["kernels"]]
    return Counts(values["contender"], bench_step.Work(**values["work"]), kernels, values["kept_bytes"])


def ratio(counts: list[Counts]) -> float | None:
    """Return fastbyol's bytes divided by plain's; None if one of them is missing."""
    moved = {c.contender: c.of()[1] for c in counts}
    return moved["fastbyol"] / moved["plain"] if {"fastbyol", "plain"} <= moved.keys() else None


def table(counts: list[Counts]) -> str:
    """Return a table with one line per contender: GB and launches by phase and kind."""
    parts = {"Triton forward": ("forward", "triton"), "Triton backward": ("backward", "triton")}
    parts |= {"library": (None, "library"), "total": (None, None)}
    lines = [
        f"{'GB (launches)':<14}" + "".join(f"{name:>18}" for name in parts) + f"{'MB per image':>14}{'GB saved':>10}"
    ]
    for c in counts:
        cells = [f"{moved / 1e9:.2f} ({launches})" for launches, moved in (c.of(*part) for part in parts.values())]
        lines.append(
            f"{c.contender:<14}"
            + "".join(f"{cell:>18}" for cell in cells)
            + f"{c.mb_per_image:>14.1f}{c.kept_bytes / 1e9:>10.2f}"
        )
    if (quotient := ratio(counts)) is not None:
        lines.append(f"fastbyol / plain: {quotient:.3f}")
    return "\n".join(lines)


def heaviest(counts: Counts, top: int) -> str:
    """Return the kernels with the most bytes, without duplicate lines."""
    same = collections.Counter(
        f"{k.bytes / 1e9:7.3f} GB  {k.phase:<8} {k.kind:<7} {k.operations[:100]}"
        for k in sorted(counts.kernels, key=lambda k: -k.bytes)
    )
    return "\n".join(f"{times:4d} x {line}" for line, times in list(same.items())[:top])


def row(counts: Counts) -> dict[str, Any]:
    """Return a row of the result file."""
    values: dict[str, Any] = {"kind": "count", "contender": counts.contender, "set": str(counts.work)}
    for kind in ("triton", "library"):
        for phase in ("forward", "backward"):
            launches, moved = counts.of(phase, kind)
            values |= {f"{kind}_{phase}_launches": launches, f"{kind}_{phase}_bytes": moved}
    values |= {"bytes": counts.of()[1], "kept_bytes": counts.kept_bytes}
    return values | {"mb_per_image": f"{counts.mb_per_image:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50", help="name in both torchvision and timm")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--batch", type=int, default=256, help="images; each has two views")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="contenders to count")
    parser.add_argument("--top", type=int, default=0, help="number of kernels to list, by bytes")
    parser.add_argument("--save", type=Path, help="folder for the generated code")
    parser.add_argument("--out", type=Path, help="result file, one row per contender")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # set in a contender's process
    args = parser.parse_args()
    if args.result is not None:
        work = bench_step.Work(args.backbone, args.size, args.batch)
        args.result.write_text(to_json(_count_here(args.only[0], work, args.save)))
        return
    try:
        counts = [count(name, args.backbone, args.size, args.batch, args.save) for name in args.only]
    except FastbyolError as error:
        print(f"cuda_bytes.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{counts[0].work}, compiled for an H100 by torch {torch.__version__}")
    print(table(counts))
    for c in counts if args.top else ():
        print(f"\n{c.contender}\n{heaviest(c, args.top)}")
    if args.out is not None:
        facts = environment.describe()
        results_csv.write(args.out, [row(c) | {name: facts.get(name, "") for name in FACTS} for c in counts])


if __name__ == "__main__":
    main()
