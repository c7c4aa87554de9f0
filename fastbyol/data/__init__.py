"""Images -> batches of two views."""

from fastbyol.data.backends import build_loader, choose_backend
from fastbyol.data.batch import Batch, Loader
from fastbyol.data.images import Images
from fastbyol.data.splits import Sources, find_images, open_split

__all__ = ["Batch", "Images", "Loader", "Sources", "build_loader", "choose_backend", "find_images", "open_split"]
