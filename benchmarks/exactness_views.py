"""Comparisons of exactness.py: crops, decoding and augmentation.

Their functions run unchanged: the random numbers that they draw from a JAX key are drawn again from
the same key and given to our kernels.
"""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow.compat.v2 as tf
import torch
from exactness_shared import Row, compare, compare_boxes, nchw, photographs

from fastbyol.data.crops import CENTER_FRACTION
from fastbyol.data.decode import decode
from fastbyol.data.rendering import Renderer
from fastbyol.data.views import center_box
from fastbyol.kernels import augment_params as columns
from fastbyol.kernels.augment import blur_reference
from fastbyol.kernels.crop import crop_reference, random_resized_crop

SIZE = 224  # of a view, fixed in the authors' code


def their_boxes(
    authors: SimpleNamespace, sizes: np.ndarray, area: np.ndarray, log_aspect: np.ndarray, u: np.ndarray
) -> np.ndarray:
    """Return the boxes (n, 4) of their training crop. u: (n, 2), relative positions in y and x."""
    draws = iter([tf.constant(area), tf.constant(log_aspect), u[:, 1], u[:, 0]])

    def uniform(shape: Any, minval: Any, maxval: Any, dtype: Any) -> tf.Tensor:
        draw = next(draws)
        return draw if dtype is tf.float32 else tf.cast(tf.floor(draw * tf.cast(maxval, tf.float64)), tf.int32)

    height, width = tf.constant(sizes.T.astype(np.int32))
    with (
        patch.object(tf.random, "uniform", uniform),
        patch.object(tf.image, "extract_jpeg_shape", lambda data: (height, width)),
        patch.object(tf.io, "decode_and_crop_jpeg", lambda data, window, channels: window),
    ):
        return authors.dataset._decode_and_random_crop(b"").numpy().T


def crop_boxes(authors: SimpleNamespace, n: int = 10**6) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(32, 2000, (n, 2))
    area = rng.uniform(0.08, 1, n).astype(np.float32)
    log_aspect = rng.uniform(np.log(3 / 4), np.log(4 / 3), n).astype(np.float32)
    u = rng.uniform(size=(n, 2))
    ours = np.empty((n, 1, 4), np.int32)
    aspect = np.exp(log_aspect.astype(np.float64))
    random_resized_crop(
        area.astype(np.float64)[:, None, None], aspect[:, None, None], u[:, None], sizes, True, 3 / 4, 4 / 3, ours
    )
    theirs = their_boxes(authors, sizes, area, log_aspect, u)
    yield compare_boxes("crop: training", "box, pixels; images of 32 to 2000 px", ours[:, 0], theirs)

    # A side of 1 pixel gives them an empty box, and us one pixel.
    height, width = (axis.ravel() for axis in np.mgrid[2:601, 2:601].astype(np.int32))
    with patch.object(tf.image, "decode_and_crop_jpeg", lambda data, window, channels: window):
        theirs = authors.dataset._decode_and_center_crop(b"", (tf.constant(height), tf.constant(width))).numpy().T
    ours = np.array([center_box(h, w, CENTER_FRACTION) for h, w in zip(height.tolist(), width.tolist(), strict=True)])
    yield compare_boxes("crop: evaluation", "box, pixels; images of 2 to 600 px", ours, theirs)


def decoding(authors: SimpleNamespace) -> Iterator[Row]:
    files = list(photographs().values())
    ours = [decode(data).copy() for data in files]
    for method, note in (("", "their default, fast inverse DCT"), ("INTEGER_ACCURATE", "accurate inverse DCT")):
        theirs = [tf.io.decode_jpeg(data, channels=3, dct_method=method).numpy() for data in files]
        yield compare("JPEG decoding", f"levels of 255; {note}", ours, theirs)
    windows = [(h // 5, w // 7, h // 2, w // 3) for h, w, _ in (image.shape for image in ours)]
    crops = [image[y : y + h, x : x + w] for image, (y, x, h, w) in zip(ours, windows, strict=True)]
    for method, note in (("", "their default"), ("INTEGER_ACCURATE", "accurate inverse DCT")):
        theirs = [
            tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method=method).numpy()
            for data, window in zip(files, windows, strict=True)
        ]
        yield compare("JPEG decoding of a crop", f"levels of 255; {note}", crops, theirs)


def preprocess(authors: SimpleNamespace, image: np.ndarray, box: list[int]) -> np.ndarray:
    """Return their crop, resized to (SIZE, SIZE, 3), for a given box."""
    y, x, h, w = box
    with patch.object(
        authors.dataset, "_decode_and_random_crop", lambda data: tf.constant(image[y : y + h, x : x + w])
    ):
        return authors.dataset._preprocess_image(b"", authors.dataset.PreprocessMode.PRETRAIN).numpy()


def random_boxes(n: int, sizes: list[tuple[int, int]]) -> list[list[int]]:
    rng, boxes = np.random.default_rng(1), np.empty((n, 1, 4), np.int32)
    area, aspect = rng.uniform(0.08, 1, (n, 1, 1)), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (n, 1, 1)))
    random_resized_crop(area, aspect, rng.uniform(size=(n, 1, 2)), np.array(sizes), True, 3 / 4, 4 / 3, boxes)
    return boxes[:, 0].tolist()


def color_draws(key: jax.Array, brightness: float, contrast: float, saturation: float, hue: float) -> dict[str, Any]:
    """Return what their color transform draws from one image's key."""
    keys = jax.random.split(jax.random.split(key)[1], 7)
    order, *values = keys[:5]
    ranges = (0, brightness), (1, contrast), (1, saturation), (0, hue)
    values = [
        jax.random.uniform(k, (), minval=center - width, maxval=center + width)
        for k, (center, width) in zip(values, ranges, strict=True)
    ]
    jitter, gray = (jax.random.uniform(k) for k in keys[5:])
    order = jax.random.permutation(order, jnp.arange(4, dtype=jnp.int32))
    return {"order": order, "values": jnp.stack(values), "jitter": jitter, "gray": gray}


def blur_draws(key: jax.Array) -> dict[str, Any]:
    apply, transform = jax.random.split(key)
    (sigma,) = jax.random.split(transform, 1)
    return {"blur": jax.random.uniform(apply), "sigma": jax.random.uniform(sigma, (), minval=0.1, maxval=2.0)}


def rows_of(
    n: int, color: Any = None, jitter_p: float = 0, gray_p: float = 0, sigma: Any = 0, solarize: Any = 0
) -> Any:
    """Return the parameter rows (n, COLUMNS) of n images."""
    rows = np.zeros((n, columns.COLUMNS), np.float32)
    if color is not None:
        rows[:, columns.ORDER : columns.ORDER + 4] = color["order"]
        rows[:, columns.BRIGHTNESS : columns.HUE + 1] = color["values"]
        rows[:, columns.JITTER], rows[:, columns.GRAY] = color["jitter"] <= jitter_p, color["gray"] <= gray_p
    rows[:, columns.SIGMA], rows[:, columns.SOLARIZE] = sigma, solarize
    return rows


def augment(renderer: Renderer, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return our augmentation of images (n, S, S, 3) in [0, 1]: normalized, same shape."""
    out = np.empty_like(images)
    for image, row, view in zip(images, rows, out, strict=True):
        renderer._planes[:] = image.transpose(2, 0, 1)
        renderer.augment(row, view)
    return out


def views(authors: SimpleNamespace, n: int = 64) -> Iterator[Row]:
    theirs, renderer, key = authors.augmentations, Renderer(SIZE), jax.random.PRNGKey(0)
    photos = [decode(data).copy() for data in photographs().values()]
    sources = [photos[k % len(photos)] for k in range(2 * n)]
    boxes = random_boxes(2 * n, [image.shape[:2] for image in sources])
    crops = np.stack([preprocess(authors, *pair) for pair in zip(sources, boxes, strict=True)])
    exact = [
        crop_reference(torch.from_numpy(s), tuple(b), flip=False, size=SIZE)
        for s, b in zip(sources, boxes, strict=True)
    ]
    exact = torch.stack(exact).permute(0, 2, 3, 1)
    resized = []
    for source, box in zip(sources, boxes, strict=True):
        renderer.crop(source, box, False)
        resized.append(renderer._planes.transpose(1, 2, 0).copy())
    yield compare("views: bicubic resize", "of [0, 1]", np.stack(resized), crops)
    yield compare("views: bicubic resize", "of [0, 1]; our formula with exact weights", exact, crops)

    images, keys = crops[:n], jax.random.split(key, n)
    mean, std = np.array(columns.IMAGENET_MEAN), np.array(columns.IMAGENET_STD)

    def operation(name: str, result: Any, rows: np.ndarray) -> Row:
        ours = augment(renderer, images, rows).astype(np.float64) * std + mean
        return compare(f"views: {name}", "of [0, 1]", ours, np.asarray(result).clip(0, 1))

    for name, strength in {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}.items():
        ranges = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0) | {name: strength}
        result = theirs.color_transform(images, key, color_jitter_prob=1.0, to_grayscale_prob=0.0, **ranges)
        yield operation(name, result, rows_of(n, jax.vmap(partial(color_draws, **ranges))(keys), 1))
    ranges = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    yield from color_orders(authors, renderer, images, ranges)
    result = theirs.color_transform(images, key, color_jitter_prob=0.0, to_grayscale_prob=1.0, **ranges)
    yield operation("grayscale", result, rows_of(n, jax.vmap(partial(color_draws, **ranges))(keys), 0, 1))
    sigma = jax.vmap(blur_draws)(keys)["sigma"]
    result = theirs.gaussian_blur(images, key)
    yield operation("blur", result, rows_of(n, sigma=sigma))
    exact = [blur_reference(nchw(x[None])[0], float(s)).permute(1, 2, 0) for x, s in zip(images, sigma, strict=True)]
    yield compare("views: blur", "of [0, 1]; our formula with all taps", exact, result)
    yield operation("solarize", theirs.solarize(images, key), rows_of(n, solarize=1))
    ours = augment(renderer, images, rows_of(n))
    yield compare("views: normalization", "normalized values", ours, authors.dataset.normalize_images(images))

    batch = {"view1": crops[:n], "view2": crops[n:], "labels": np.zeros(n)}
    batch = theirs.postprocess(batch, key)
    for v, view_key in enumerate(jax.random.split(key, 2)):
        flip, color, blur, solarize = (jax.random.split(k, n) for k in jax.random.split(view_key, 4))
        flips = jax.vmap(lambda k: jax.random.uniform(jax.random.split(k)[1]))(flip) <= 0.5
        drawn = jax.vmap(blur_draws)(blur)
        sigma = np.where(drawn["blur"] <= (1.0, 0.1)[v], drawn["sigma"], 0)
        solarized = jax.vmap(jax.random.uniform)(solarize) <= (0.0, 0.2)[v]
        rows = rows_of(n, jax.vmap(partial(color_draws, **ranges))(color), 0.8, 0.2, sigma, solarized)
        result = authors.dataset.normalize_images(batch[f"view{v + 1}"])
        own = slice(v * n, (v + 1) * n)
        flipped = np.where(np.asarray(flips)[:, None, None, None], crops[own][:, :, ::-1], crops[own])
        ours = augment(renderer, flipped, rows)
        yield compare(f"views: view {v + 1}, from the same crops", "normalized values", ours, result)
        out = np.empty_like(flipped)
        for k, row in enumerate(rows):
            renderer.crop(sources[own][k], boxes[own][k], bool(flips[k]))
            renderer.augment(row, out[k])
        yield compare(f"views: view {v + 1}, from the same decoded images", "normalized values", out, result)


def color_orders(
    authors: SimpleNamespace, renderer: Renderer, images: np.ndarray, ranges: dict[str, float]
) -> Iterator[Row]:
    """All four color operations, in each of their 24 orders."""
    keys = jax.random.split(jax.random.PRNGKey(1), 2000)
    draws = jax.vmap(partial(color_draws, **ranges))(keys)
    _, first, counts = np.unique(np.asarray(draws["order"]), axis=0, return_index=True, return_counts=True)
    assert len(first) == 24, counts
    transform = partial(
        authors.augmentations._color_transform_single_image,
        **ranges, to_grayscale_prob=0.0, color_jitter_prob=1.0, apply_prob=1.0, shuffle=True,
    )  # fmt: skip
    rows = rows_of(len(keys), draws, 1)
    mean, std = np.array(columns.IMAGENET_MEAN), np.array(columns.IMAGENET_STD)
    ours, theirs = [], []
    for k in first:
        batch = images[:8]
        theirs.append(jax.vmap(transform, (0, None))(batch, keys[k]))
        ours.append(augment(renderer, batch, np.repeat(rows[k : k + 1], len(batch), 0)).astype(np.float64) * std + mean)
    yield compare("views: 24 orders of the color operations", "of [0, 1]", ours, theirs)
