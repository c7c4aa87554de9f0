"""What GPUs send each other in an optimizer step, and how long the step waits for it.

Gradients: one ring all-reduce of all gradients of the online network and predictor, in float32 or
bfloat16. It overlaps the backward pass.

SyncBN: both views pass through as one batch. In a forward pass, a BatchNorm layer of C channels
makes one all-reduce of (2 views, 2 moments, C) in float64; in a backward pass, one of the same
shape in float32. The target has no backward pass, and the predictor has no target. The next layer
waits for each of them.

In a ring of n GPUs, each GPU sends 2 (n - 1) / n times the payload of an all-reduce. Times are
bytes over the one-way rate of the slowest link of the ring: NVLink within a node, each GPU's
InfiniBand port between nodes. Latencies are assumptions.
"""

from dataclasses import dataclass

from fastbyol.data.views import VIEWS
from fastbyol.layers import batch_norms
from fastbyol.model import BYOL
from fastbyol.tools.hardware import GPUS_PER_NODE, Gpu, Link

GRADIENT_BYTES = {"float32": 4, "bfloat16": 2}
BACKWARD_SHARE = 4 / 8  # of a step: 4 of the 8 forward passes of a view that it costs
LATENCY_US = (20.0, 50.0)  # assumed, of one collective: within a node, between nodes
_MOMENTS = 2
_FORWARD_BYTES = 8  # statistics are float64 (kernels/batch_norm.py)
_BACKWARD_BYTES = 4  # their gradients are float32


@dataclass(frozen=True)
class Counts:
    """What a model exchanges per optimizer step.

    Attributes:
        gradient_values: Trained parameters.
        online_channels: Channels of all BatchNorm layers of backbone, projector and predictor.
        target_channels: Channels of all BatchNorm layers of the target.
        collectives: Collectives of SyncBN.
    """

    gradient_values: int
    online_channels: int
    target_channels: int
    collectives: int

    @property
    def syncbn_bytes(self) -> int:
        """Payload of all SyncBN collectives: online forward and backward, target forward."""
        forward = _FORWARD_BYTES * (self.online_channels + self.target_channels)
        return VIEWS * _MOMENTS * (forward + _BACKWARD_BYTES * self.online_channels)


@dataclass(frozen=True)
class Exchange:
    """Bytes and milliseconds of one optimizer step, per GPU.

    Attributes:
        gradient_ms: Time on the link.
        syncbn_ms: Time on the link.
        latency_ms: Latency of SyncBN's collectives.
        exposed_ms: What the step waits for: gradients beyond the backward pass, and all of SyncBN.
        link: The slowest link of the gradients' ring; None for one GPU.
    """

    gradient_bytes_sent: int = 0
    gradient_ms: float = 0.0
    syncbn_bytes_sent: int = 0
    syncbn_ms: float = 0.0
    latency_ms: float = 0.0
    exposed_ms: float = 0.0
    link: Link | None = None


def count_exchange(model: BYOL) -> Counts:
    """Count gradients and BatchNorm channels of a model."""
    online = [norm.num_features for part in (model.online, model.predictor) for norm in batch_norms(part)]
    target = [] if model.target is None else [norm.num_features for norm in batch_norms(model.target)]
    return Counts(
        gradient_values=sum(p.numel() for p in model.parameters() if p.requires_grad),
        online_channels=sum(online),
        target_channels=sum(target),
        collectives=2 * len(online) + len(target),
    )


def estimate_exchange(
    counts: Counts,
    gpu: Gpu,
    *,
    gpus: int,
    backward_ms: float,
    gradient_dtype: str,
    sync_bn_ranks: int = 0,
    micro_batches: int = 1,
    latency_us: tuple[float, float] = LATENCY_US,
) -> Exchange:
    """Estimate bytes and times of one optimizer step, per GPU.

    Args:
        counts: Of the model.
        gpu: One of GPUS.
        gpus: Number of GPUs, in one ring.
        backward_ms: Duration of the backward pass, which hides the gradients' all-reduce.
        gradient_dtype: Key of GRADIENT_BYTES.
        sync_bn_ranks: Neighboring ranks that share BatchNorm statistics; 0 for all.
        micro_batches: Micro-batches per step. Each has its own statistics.
        latency_us: Latency of one collective within a node, and between nodes.
    """
    if gpus == 1:
        return Exchange()
    syncbn_ranks = sync_bn_ranks or gpus
    gradient_bytes = _bytes_sent(GRADIENT_BYTES[gradient_dtype] * counts.gradient_values, gpus)
    syncbn_bytes = _bytes_sent(micro_batches * counts.syncbn_bytes, syncbn_ranks)
    gradient_ms = _link_ms(gradient_bytes, _slowest_link(gpu, gpus))
    syncbn_ms = _link_ms(syncbn_bytes, _slowest_link(gpu, syncbn_ranks))
    collectives = micro_batches * counts.collectives if syncbn_ranks > 1 else 0
    latency_ms = collectives * (1e-3 * latency_us[syncbn_ranks > GPUS_PER_NODE])
    return Exchange(
        gradient_bytes_sent=gradient_bytes,
        gradient_ms=gradient_ms,
        syncbn_bytes_sent=syncbn_bytes,
        syncbn_ms=syncbn_ms,
        latency_ms=latency_ms,
        exposed_ms=max(0.0, gradient_ms - backward_ms) + syncbn_ms + latency_ms,
        link=_slowest_link(gpu, gpus),
    )


def _bytes_sent(payload: int, ranks: int) -> int:
    """Bytes that each GPU sends in a ring all-reduce."""
    return round(2 * (ranks - 1) / ranks * payload)


def _slowest_link(gpu: Gpu, ranks: int) -> Link:
    return gpu.node if ranks <= GPUS_PER_NODE else gpu.cluster


def _link_ms(size: int, link: Link) -> float:
    return 1e3 * size / (link.gb_per_s * 1e9)
