"""fastbyol: BYOL (Bootstrap Your Own Latent, arXiv 2006.07733) pre-training of vision backbones."""

__version__ = "0.1.0"
