"""Images -> batches of two views."""

from fastbyol.data.backends import build_loader, choose_backend
from fastbyol.data.batch import Batch, Loader
from fastbyol.data.images import Images
from fastbyol.data.splits import find_images, open_split

__all__ = ["Batch", "Images", "Loader", "build_loader", "choose_backend", "find_images", "open_split"]
