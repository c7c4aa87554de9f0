"""Augmentations, and the parameters of both views drawn per (seed, epoch, position).

Drawing is separate from applying. `sample` is a pure function of its arguments (numpy only, a
counter-based generator, no state), so every backend applies the same numbers, and a run is the same
for any number of threads, ranks or restarts. `apply_reference` defines the meaning of those numbers
in float32; the tests compare the fast kernels with it.

Source: Grill et al. 2020, appendix B, and `byol/utils/{dataset,augmentations}.py` of
google-deepmind/deepmind-research (commit 4822a45).

Shapes: n images, V = 2 views, S = side of a view in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastbyol.kernels import augment, augment_params, crop

VIEWS = 2
# The 24 orders of the four color operations, numbered as in kernels/augment_params.py.
ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Ranges and probabilities of the random operations.

    A pair of probabilities is (view 1, view 2).
    """

    area: tuple[float, float] = (0.08, 1.0)  # share of the image's area, uniform
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, log-uniform
    crop_tries: int = 0  # 0: clamp the box to the image; else redraw up to N times, then use a center crop
    flip_p: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4  # half-width of the uniform range, like the next three
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # turns
    color: Literal["byol", "torchvision"] = "byol"  # variant of the four operations, see kernels/augment.py
    gray_p: float = 0.2
    blur_p: tuple[float, float] = (1.0, 0.1)
    sigma: tuple[float, float] = (0.1, 2.0)  # in pixels of the output
    solarize_p: tuple[float, float] = (0.0, 0.2)


_NO_COLOR: dict[str, Any] = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}

AUGMENTATIONS = {
    "byol": Augmentation(),
    "torchvision": Augmentation(crop_tries=10, color="torchvision"),
    "crop_flip": Augmentation(**_NO_COLOR),  # for training classifiers
    # Both views are the center square: the only try fails unless the image is square, and a center
    # crop follows.
    "none": Augmentation(area=(1.0, 1.0), aspect=(1.0, 1.0), crop_tries=1, flip_p=0.0, **_NO_COLOR),
}


@dataclass(frozen=True)
class ViewParams:
    """Parameters of V views of n images, each array of shape (n, V) unless noted."""

    box: NDArray[np.int32]  # (n, V, 4): top, left, height, width in source pixels
    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]  # True if the four color operations are applied
    order: NDArray[np.uint8]  # (n, V, 4): the color operations in the order of application
    brightness: NDArray[np.float32]  # byol: added; torchvision: a factor
    contrast: NDArray[np.float32]  # factor
    saturation: NDArray[np.float32]  # factor
    hue: NDArray[np.float32]  # added, in turns
    torchvision_color: NDArray[np.bool_]  # True for torchvision's variant of the four operations
    gray: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    sigma: NDArray[np.float32]  # pixels
    solarize: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "ViewParams":
        """Return the parameters of some of the images."""
        return ViewParams(*(getattr(self, f.name)[rows] for f in fields(self)))

    def pack(self) -> NDArray[np.float32]:
        """Return (n, V, augment_params.COLUMNS) float32, the kernels' layout.

        All values are exact in float32.
        """
        packed = np.empty((*self.flip.shape, augment_params.COLUMNS), dtype=np.float32)
        packed[..., augment_params.BOX : augment_params.BOX + 4] = self.box
        packed[..., augment_params.FLIP] = self.flip
        packed[..., augment_params.JITTER] = self.jitter
        packed[..., augment_params.ORDER : augment_params.ORDER + 4] = self.order
        packed[..., augment_params.BRIGHTNESS] = self.brightness
        packed[..., augment_params.CONTRAST] = self.contrast
        packed[..., augment_params.SATURATION] = self.saturation
        packed[..., augment_params.HUE] = self.hue
        packed[..., augment_params.TORCHVISION] = self.torchvision_color
        packed[..., augment_params.GRAY] = self.gray
        packed[..., augment_params.SIGMA] = np.where(self.blur, self.sigma, 0)
        packed[..., augment_params.SOLARIZE] = self.solarize
        return packed


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """Return the order (n,) of an epoch: order[p] is the image at position p.

    A stable argsort of one 64-bit random key per image, which depends on (seed, epoch, n) alone.
    """
    words = _philox(seed, np.arange(n), epoch, 0, stream=1)
    keys = words[0] << np.uint64(32) | words[1]
    return np.argsort(keys, kind="stable")


class Sampler:
    """Draws the parameters of a set of positions. Only the boxes need the image sizes.

    A loader draws a whole batch at once, and the boxes of an image once it is decoded.

    Args:
        augmentation: distribution of the views.
        seed: seed of the run.
        epoch: number of the epoch.
        positions: (n,) positions in the epoch's order, below 2^32.
    """

    def __init__(self, augmentation: Augmentation, seed: int, epoch: int, positions: ArrayLike) -> None:
        self.augmentation = augmentation
        positions = np.atleast_1d(np.asarray(positions, dtype=np.int64))
        n = len(positions)
        u = self._u = _uniforms(seed, epoch, positions, 16 + 2 * augmentation.crop_tries)  # (n, V, draws)
        tries = [0, *range(16, u.shape[2] - 2, 2)]  # column of each try's area; its aspect follows
        low, high = augmentation.area
        log_low, log_high = np.log(augmentation.aspect[0]), np.log(augmentation.aspect[1])
        self._area = low + (high - low) * u[..., tries]  # (n, V, tries), shares of the image's area
        self._aspect = np.exp(log_low + (log_high - log_low) * u[..., [t + 1 for t in tries]])

        def between(column: int, half_width: float, center: float) -> NDArray[np.float32]:
            return (center + half_width * (2 * u[..., column] - 1)).astype(np.float32)

        low, high = augmentation.sigma
        torchvision = augmentation.color == "torchvision"
        self._params = ViewParams(
            box=np.zeros((n, VIEWS, 4), dtype=np.int32),
            flip=u[..., 4] < augmentation.flip_p,
            jitter=u[..., 5] < augmentation.jitter_p,
            order=ORDERS[(u[..., 6] * len(ORDERS)).astype(np.int64)],
            brightness=between(7, augmentation.brightness, 1.0 if torchvision else 0.0),
            contrast=between(8, augmentation.contrast, 1.0),
            saturation=between(9, augmentation.saturation, 1.0),
            hue=between(10, augmentation.hue, 0.0),
            torchvision_color=np.full((n, VIEWS), torchvision),
            gray=u[..., 11] < augmentation.gray_p,
            blur=u[..., 12] < np.array(augmentation.blur_p),
            sigma=(low + (high - low) * u[..., 13]).astype(np.float32),
            solarize=u[..., 14] < np.array(augmentation.solarize_p),
        )

    def boxes(self, rows: slice, sizes: ArrayLike) -> NDArray[np.int32]:
        """Return the crop boxes (m, V, 4) of m images; `sizes` (m, 2) are (height, width)."""
        sizes = np.asarray(sizes, dtype=np.int64)
        out = np.empty((len(sizes), VIEWS, 4), dtype=np.int32)
        clamp = self.augmentation.crop_tries == 0
        crop.random_resized_crop(
            self._area[rows], self._aspect[rows], self._u[rows, :, 2:4], sizes, clamp, *self.augmentation.aspect, out
        )
        return out

    def params(self, sizes: ArrayLike | None = None) -> ViewParams:
        """Return all parameters. Without `sizes` (n, 2) the boxes are 0 and must be filled in."""
        if sizes is not None:
            self._params.box[:] = self.boxes(slice(None), sizes)
        return self._params


def sample(
    augmentation: str | Augmentation, seed: int, epoch: int, positions: ArrayLike, sizes: ArrayLike
) -> ViewParams:
    """Draw the parameters of both views of the images at `positions` of an epoch.

    Args:
        augmentation: an Augmentation, or a name in AUGMENTATIONS.
        seed: seed of the run.
        epoch: number of the epoch.
        positions: (n,) positions in the epoch's order (not image indices), below 2^32.
        sizes: (n, 2) height and width of each image in pixels.
    """
    augmentation = AUGMENTATIONS[augmentation] if isinstance(augmentation, str) else augmentation
    return Sampler(augmentation, seed, epoch, positions).params(sizes)


def center_box(height: int, width: int, fraction: float) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the centered square of `fraction` * the short side.

    Rounded as in the authors' code (`dataset.py`, _decode_and_center_crop): the side down, the
    offsets up.
    """
    side = max(1, int(fraction * min(height, width)))
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side


def apply_reference(images: Sequence[Tensor], params: ViewParams, size: int) -> Tensor:
    """Apply crop, flip, color, gray, blur, solarize, clip and normalize in plain torch, float32.

    Args:
        images: n decoded images, each uint8 (H, W, 3).
        params: their parameters.
        size: S, side of a view in pixels.

    Returns:
        (V, n, 3, S, S) float32, normalized with the ImageNet mean and standard deviation.
    """
    packed = params.pack()
    out = torch.empty(packed.shape[1], len(images), 3, size, size)
    for i, image in enumerate(images):
        for v, p in enumerate(packed[i]):
            top, left, height, width = (int(x) for x in p[augment_params.BOX : augment_params.BOX + 4])
            view = crop.crop_reference(image, (top, left, height, width), flip=bool(p[augment_params.FLIP]), size=size)
            out[v, i] = augment.normalize_reference(augment.augment_reference(view, p))
    return out


def _uniforms(seed: int, epoch: int, positions: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Return uniforms (n, V, draws) in (0, 1) by (seed, epoch, position, view, draw) alone."""
    blocks = -(-draws // 4)
    view = np.arange(VIEWS)[None, :, None]
    block = np.arange(blocks)[None, None, :]
    words = _philox(seed, positions[:, None, None], epoch, view << 16 | block, stream=0)
    u = (np.stack(words, axis=-1).astype(np.float64) + 0.5) * 2.0**-32
    return u.reshape(len(positions), VIEWS, 4 * blocks)[..., :draws]


def _philox(seed: int, c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, stream: int) -> tuple[NDArray[np.uint64], ...]:
    """Return the four words of Philox4x32-10 of counters (c0, c1, c2, stream) and key `seed`.

    Counter-based: any draw can be made without the ones before it. Source: Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3"; the tests check its published vectors.
    """
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = np.broadcast_arrays(*(np.asarray(x, dtype=np.uint64) & mask for x in (c0, c1, c2, stream)))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = (
            product1 >> shift ^ c[1] ^ np.uint64(k0),
            product1 & mask,
            product0 >> shift ^ c[3] ^ np.uint64(k1),
            product0 & mask,
        )
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c
