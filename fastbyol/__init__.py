"""fastbyol: BYOL (Bootstrap Your Own Latent, arXiv 2006.07733) pre-training of vision backbones."""

from pathlib import Path

__version__ = "0.1.0"

# An installed package holds kernels/; in a checkout that is not installed it lies beside this folder.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").exists():
    __path__.append(str(_here.parent))
