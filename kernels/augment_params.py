"""Constants of the augmentation that the reference, the numba kernel and the Triton kernels share.

A view's parameters are one row of float32, with the columns named below. `views.ViewParams.pack`
fills it.

numba compiles these values into `cpu/augment.py`'s kernel, and its cache does not notice when this
file changes; `cpu/jit_cache.py` does.
"""

# Columns of a view's parameter row.
BOX, FLIP, JITTER, ORDER = 0, 4, 5, 6
BRIGHTNESS, CONTRAST, SATURATION, HUE = 10, 11, 12, 13
TORCHVISION, GRAY, SIGMA, SOLARIZE = 14, 15, 16, 17  # SIGMA is 0 for no blur
COLUMNS = 18

# The four color operations, as numbered in the ORDER columns.
OP_BRIGHTNESS, OP_CONTRAST, OP_SATURATION, OP_HUE = 0, 1, 2, 3

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def blur_radius(size: int) -> int:
    """Return the blur's taps on each side of the center for views of `size` px: 11 at 224."""
    return size // 20
