"""A training step as one CUDA graph: the host launches it with a single call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Real steps: they create what a capture must not, such as optimizer state, compiled code and
# workspaces.
_WARM_UP_STEPS = 3
# DDP rebuilds its buckets and records timings in its first ten iterations (torch's notes on CUDA
# graphs, "Usage with DistributedDataParallel").
_WARM_UP_STEPS_OF_RANKS = 11


class CapturedStep:
    """Runs a function of tensors, and captures it into a CUDA graph after a few calls.

    Args:
        function: reads and writes device memory only, at the same addresses in every call.
        ranks: that exchange gradients inside the function. Their collectives become part of the
            graph, so all ranks must call this object alike.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, ranks: int = 1) -> None:
        self._function = function
        self._warm_up_left = _WARM_UP_STEPS if ranks == 1 else _WARM_UP_STEPS_OF_RANKS
        # One side stream for all warm-up steps: the allocator keeps a memory pool per stream.
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the function on `inputs`. The result is valid until the next call."""
        if self._warm_up_left > 0:
            self._warm_up_left -= 1
            return self._run_on_side_stream(inputs)
        if self._graph is None:
            self._capture(inputs)
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return self._output

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Context manager: the stream of the capture, ordered after the current stream's work and
        before its later work. DDP must be built in it, since its hooks run in the stream of their
        construction.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def drop(self) -> None:
        """Free the graph's memory. The next call captures again."""
        if self._graph is not None:
            self._graph, self._inputs, self._output = None, [], None
            torch.cuda.empty_cache()

    def _run_on_side_stream(self, inputs: tuple[Tensor, ...]) -> Any:
        with self.stream():
            return self._function(*inputs)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [torch.empty_like(x) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        # thread_local: CUDA calls of other threads, such as those of DALI, a loader or NCCL's
        # watchdog, do not end the capture. NCCL's asynchronous error handling stays on, unlike in
        # torch's notes: the watchdog has ignored captured collectives since torch 2.2, and a run
        # needs it to end when another collective times out.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._output = self._function(*self._inputs)
        self._graph = graph
