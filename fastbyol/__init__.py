"""fastbyol: BYOL (Bootstrap Your Own Latent, arXiv 2006.07733) pre-training of vision backbones."""

from fastbyol.runtime import caches

__version__ = "0.1.0"

caches.prepare()
