"""Compare fastbyol with the BYOL authors' own JAX code: same inputs, parameters and random draws.

    git clone https://github.com/google-deepmind/deepmind-research AUTHORS
    git -C AUTHORS checkout 4822a45
    pip install -r benchmarks/requirements-authors.txt
    python benchmarks/exactness.py --authors AUTHORS [--parts views loss ...]

AUTHORS is the folder that holds `byol/`. Its files are imported as they are. Two modules that they
import for reading ImageNet are replaced by empty ones, and two functions that JAX has since renamed
are restored. Everything is float32 on the CPU. Columns of benchmarks/results/exactness.csv:

    error        largest absolute difference between our values and theirs
    mean_error   mean absolute difference
    magnitude    largest absolute value of theirs
    n            number of values
    differ       of integers: number of cases that differ
    rounding     largest difference between their float32 and their float64 result, where computed

Takes about 20 minutes on two cores, most of it for the backbones in float64.
"""

import fastbyol.build  # noqa: F401, I001 (loads Triton, which crashes if it is loaded after TensorFlow)

import argparse
from pathlib import Path

import exactness_training
import exactness_views
import results_csv
from exactness_shared import import_authors

from fastbyol.runtime import environment

RESULT = results_csv.FOLDER / "exactness.csv"
PARTS = {
    "boxes": exactness_views.crop_boxes,
    "decoding": exactness_views.decoding,
    "views": exactness_views.views,
    "loss": exactness_training.loss,
    "batch_norm": exactness_training.batch_norm,
    "heads": exactness_training.heads,
    "lars": exactness_training.lars,
    "schedules": exactness_training.schedules,
    "backbones": exactness_training.backbones,
    "training": exactness_training.training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=Path, required=True, help="folder that holds byol/")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    authors = import_authors(args.authors)
    facts = environment.describe()
    facts = {key: facts[key] for key in ("fastbyol", "cpu", "python", "torch", "timm", "numba", "simplejpeg")}
    facts |= {name: environment.installed(name) for name in ("jax", "dm-haiku", "tensorflow-cpu")}
    rows = [row | facts for part in args.parts for row in PARTS[part](authors)]
    results_csv.write(args.out, rows)


if __name__ == "__main__":
    main()
