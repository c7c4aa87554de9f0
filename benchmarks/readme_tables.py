"""Generate the tables and the chart in README.md and docs/ from the committed result files.

    python benchmarks/readme_tables.py [--check]

A table stands between `<!-- NAME: ... -->` and `<!-- end -->`, where NAME is a key of TABLES.
`--check` writes nothing and exits with 1 if a page or the chart is out of date; the tests check the
same.
"""

import re
import sys
from pathlib import Path
from statistics import mean, median

import against
import summary
from results_csv import by_round, commits, machine, markdown_table, ratios, read, spread

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOWDOWN = "slowdown relative to fastbyol: median (range)"
_MARK = re.compile(r"(<!-- (\w+):[^\n]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)
Rows = list[dict[str, str]]


def source_note(rows: Rows, packages: tuple[str, ...], name: str, target: str) -> str:
    """Return the note below the table of NAME.csv, which `make TARGET` writes."""
    first = rows[0]
    versions = ", ".join(f"{package} {first[package]}" for package in packages if first.get(package))
    rounds = len({row["round"] for row in rows})
    repeats = f"{rounds} interleaved rounds, ratios within each round" if rounds > 1 else "1 round"
    return (
        f"{machine(name, first)}; {versions}; commit {commits(rows)}; {repeats}. "
        f"Source: benchmarks/results/{name}.csv (`make {target}`)."
    )


def _unique(rows: Rows, column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _percentages(label: str, shares: list[float], bold: bool) -> list[str]:
    """Return a line of percentages, one per seed, and their mean."""
    values = [100 * share for share in shares]
    return [label, *(f"**{v:.1f}**" if bold else f"{v:.1f}" for v in [*values, mean(values)])]


def demo_seeds() -> str:
    """Accuracy of the demo, by seed."""
    rows = read("demo_seeds")
    header = ["", *(f"seed {row['seed']}" for row in rows), "mean"]
    lines = []
    for protocol, title in (("knn", "kNN"), ("linear", "linear probe")):
        for features in ("BYOL", "untrained network", "raw pixels"):
            column = f"{protocol}_top1_{features.replace(' ', '_')}"
            shares = [float(row[column]) for row in rows]
            lines.append(_percentages(f"{title}, {features}", shares, features == "BYOL"))
    first, seconds = rows[0], ", ".join(f"{float(row['total_s']):.0f}" for row in rows)
    note = (
        f"{first['cpu']}; Python {first['python']}, torch {first['torch']}; commit {first['fastbyol'].split()[-1]}; training "
        f"and both evaluations took {seconds} s. Source: benchmarks/results/demo_seeds.csv."
    )
    return markdown_table(header, lines, note)


def dense() -> str:
    """MIoU and mAP of the demo corpus's features on the corpus of shapes.py, by seed."""
    rows = read("dense")
    lines, durations = [], []
    for protocol, title in (("segmentation", "segmentation, mIoU"), ("detection", "detection, mAP")):
        own = [row for row in rows if row["protocol"] == protocol]
        for features in ("BYOL", "untrained network"):
            shares = [float(row[features.replace(" ", "_")]) for row in own]
            lines.append(_percentages(f"{title}: {features}", shares, features == "BYOL"))
        durations.append(f"{protocol} {', '.join(row['seconds'] for row in own)} s")
    first = rows[0]
    note = (
        f"{first['cpu']}, {first['threads']} threads; torch {first['torch']}, torchvision {first['torchvision']}; commit "
        f"{first['fastbyol'].split()[-1]}; duration for both networks: {'; '.join(durations)}. "
        "Source: benchmarks/results/dense.csv (`python benchmarks/dense_transfer.py`)."
    )
    return markdown_table(["", *(f"seed {seed}" for seed in _unique(rows, "seed")), "mean"], lines, note)


def evaluation() -> str:
    """Time and memory of the evaluation protocols on CIFAR-10, with two source trees."""
    rows = read("evaluation_trees")
    lines = []
    for name in _unique(rows, "protocol"):
        own = {row["tree"]: row for row in rows if row["protocol"] == name}
        before, after = own["before"], own["after"]
        ratio = float(after["seconds"]) / float(before["seconds"])
        cells = [
            f"{float(row[key]):{form}}"
            for key, form in (("seconds", ".0f"), ("peak_gb", ".1f"))
            for row in (before, after)
        ]
        lines.append([name, before["images"], cells[0], cells[1], f"{ratio:.2f}", cells[2], cells[3]])
    trees = {tree: commits([row for row in rows if row["tree"] == tree]) for tree in ("before", "after")}
    first = rows[0]
    note = (
        f"n = 1; {first['cpu']}; torch {first['torch']}; before: commit {trees['before']}, after: {trees['after']}. Source: "
        "benchmarks/results/evaluation_trees.csv (`benchmarks/compare_evaluations.py`)."
    )
    header = ["protocol", "images", "s before", "s after", "after / before", "GB before", "GB after"]
    return markdown_table(header, lines, note)


def loader() -> str:
    """Throughput of the loader and its peers on the CPU."""
    pairs = [("fastbyol", other) for other in ("decode only", "lightly", "torchvision v2", "DALI CPU")]
    return _loaders("loader", [*pairs, ("fastbyol", "fastbyol 1 thread"), ("decode only", "decode only 1 thread")])


def backends() -> str:
    """Throughput of all input formats and data backends for the same images."""
    others = (".beton jpg", ".beton raw", "dali", "ffcv .beton jpg", "ffcv .beton raw")
    return _loaders("backends", [(f"fastbyol {other}", "fastbyol") for other in others])


def image_sets() -> str:
    """Throughput of tar shards and Parquet for the same images."""
    others = ("tar", "parquet", "parquet snappy")
    return _loaders("image_sets", [(f"fastbyol {other}", "fastbyol") for other in others])


def _loaders(file: str, pairs: list[tuple[str, str]]) -> str:
    """Return images/s of every contender by image size, and the ratios of the given pairs."""
    rows = read(file)
    by_size = {
        size: by_round([row for row in rows if row["size_px"] == size], "images_per_s")
        for size in sorted(_unique(rows, "size_px"), key=int, reverse=True)
    }
    lines = [
        [name, *(spread(list(rates[name].values()), 0) for rates in by_size.values())]
        for name in _unique(rows, "contender")
    ]
    for name, other in pairs:
        cells = (spread(ratios(rates[name], rates[other]), 2) for rates in by_size.values())
        lines.append([f"**{name} / {other}**", *cells])
    first = rows[0]
    versions = ", ".join(f"{key} {first[key]}" for key in ("torch", "torchvision", "lightly", "numba") if first[key])
    note = (
        f"{first['cpu']}; {versions}, DALI {first['nvidia-dali-cuda130']}, FFCV {first['ffcv']}; commit "
        f"{first['fastbyol'].split()[-1]}; {len(_unique(rows, 'round'))} interleaved rounds, ratios within each round. "
        f"Source: benchmarks/results/{file}.csv (`make bench-loader`)."
    )
    return markdown_table(["images/s: median (range)", *(f"{size} px" for size in by_size)], lines, note)


def dct_scaling() -> str:
    """Share of images that data.dct_scaling decodes at a reduced size, and change of their
    views.
    """
    rows, lines = read("dct_scaling"), []
    for row in rows:
        if float(row["share_reduced"]) == 0:
            lines.append([f"{row['size_px']} px", f"none of {row['images']}"])
            continue
        share = f"{100 * float(row['share_reduced']):.0f} % of {row['images']}"
        differences = (f"{row[key]}/255" for key in ("mean_difference_255ths", "p95_difference_255ths"))
        lines.append([f"{row['size_px']} px", share, *differences])
    note = f"Commit {rows[0]['fastbyol'].split()[-1]}. Source: benchmarks/results/dct_scaling.csv."
    header = ["size", "images decoded at reduced size", "mean difference of their views", "95th percentile"]
    return markdown_table(header, lines, note)


def kernels() -> str:
    """Times of the kernels on the CPU."""
    lines, firsts = [], []
    for file, title in (("lars_ema_cpu", "LARS + EMA update"), ("augment_cpu", "augmentation")):
        for name in _unique(read(file), "set"):
            rows = [row for row in read(file) if row["set"] == name]
            firsts.append(rows[0])
            lines.append([f"**{title}, {name}**"])
            times = by_round(rows, "ms")
            for contender, ms in times.items():
                slowdown = "" if contender == "fastbyol" else spread(ratios(ms, times["fastbyol"]), 2)
                lines.append([contender, spread(list(ms.values()), 1), slowdown])
    first = firsts[0]
    note = (
        f"{first['cpu']}; torch {first['torch']}, numba {first['numba']}, lightly {first['lightly']}, kornia {first['kornia']}; "
        f"commit {commits(firsts)}; interleaved rounds, ratios within each round. Source: benchmarks/results/lars_ema_cpu.csv and "
        "augment_cpu.csv (`make bench-kernels`)."
    )
    return markdown_table(["", "ms: median (range)", SLOWDOWN], lines, note)


def step(device: str = "cpu") -> str:
    """Times of one training step."""
    rows, lines = read(f"step_{device}"), []
    for name in _unique(rows, "set"):
        own = [row for row in rows if row["set"] == name]
        times, rates = by_round(own, "ms"), by_round(own, "images_per_s")
        lines.append([f"**{name}**"])
        for contender, ms in times.items():
            comparable = contender not in ("fastbyol", "supervised")
            slowdown = spread(ratios(ms, times["fastbyol"]), 2) if comparable else ""
            rate = median(rates[contender].values())
            lines.append([contender, spread(list(ms.values()), 1), f"{rate:.{0 if rate >= 100 else 1}f}", slowdown])
        bounded = [row for row in own if row["contender"] == "fastbyol" and row["share_of_bound"]]
        if bounded:
            bound = median(float(row["bound_images_per_s"]) for row in bounded)
            share = spread([float(row["share_of_bound"]) for row in bounded], 2)
            lines.append(["*bound: 3/8 of supervised*", "", f"{bound:.0f}", f"*fastbyol / bound: {share}*"])
    packages = ("torch", "torchvision", "timm", "lightly", "byol-pytorch", "stable-pretraining")
    note = source_note(rows, packages, f"step_{device}", "bench-step" if device == "cpu" else "gpu")
    return markdown_table(["", "ms: median (range)", "images/s", SLOWDOWN], lines, note)


def train_run(device: str = "cpu") -> str:
    """Throughput of end-to-end training: loader and step."""
    rows, lines = read(f"train_{device}"), []
    for name in _unique(rows, "set"):
        own = [row for row in rows if row["set"] == name]
        rates, times, waits = (by_round(own, column) for column in ("images_per_s", "ms", "wait_share"))
        shares = by_round([row for row in own if row["share_of_step_only"]], "share_of_step_only")
        lines.append([f"**{name}**"])
        for contender, values in rates.items():
            step_only = contender.endswith("step only")
            reference = times["fastbyol step only" if step_only else "fastbyol"]
            lines.append(
                [
                    contender,
                    spread(list(values.values()), 1),
                    "" if step_only else f"{100 * median(waits[contender].values()):.0f} %",
                    spread(list(shares[contender].values()), 2) if contender in shares else "",
                    spread(ratios(times[contender], reference), 2) if times[contender] is not reference else "",
                ]
            )
    packages = ("torch", "torchvision", "lightly", "pillow", "simplejpeg")
    note = source_note(rows, packages, f"train_{device}", "bench-train" if device == "cpu" else "gpu")
    header = ["", "images/s: median (range)", "time waiting for data", "end-to-end / step only", SLOWDOWN]
    return markdown_table(header, lines, note)


def agreement() -> str:
    """Ratios between the results of profile, bench and plan: median and range over the rounds."""
    rows, lines = read("agreement"), []
    digits = {"parts_over_step": 3, "bench_over_profile": 3, "plan_over_bench": 2, "plan_from_other": 2}
    for name in _unique(rows, "set"):
        own = [row for row in rows if row["set"] == name]
        ms = spread([float(row["profile_step_ms"]) for row in own], 1)
        *cells, other = (spread([float(row[key]) for row in own], n) for key, n in digits.items())
        lines.append([name, f"{ms} ms", *cells, f"{other}, {own[0]['rates_from']}"])
    header = [
        "",
        "profiled step",
        "sum of spans / step",
        "bench / profile",
        "plan / bench",
        "plan / bench, with rates of another workload",
    ]
    return markdown_table(header, lines, source_note(rows, ("torch", "timm", "numba"), "agreement", "bench-agreement"))


def kernels_cuda() -> str:
    """Times and relative bandwidth of BatchNorm and the LARS + EMA update on a GPU."""
    files = {"batch_norm_cuda": "BatchNorm, forward and backward,", "lars_ema_cuda": "LARS + EMA update,"}
    found, lines = {name: read(name) for name in files}, []
    for file, title in files.items():
        for name in _unique(found[file], "set"):
            lines.append([f"**{title} {name}**"])
            own = [row for row in found[file] if row["set"] == name]
            times, rates, shares = (by_round(own, column) for column in ("ms", "gb_per_s", "share_of_copy"))
            for contender, ms in times.items():
                rate, share = (median(values[contender].values()) for values in (rates, shares))
                lines.append([contender, spread(list(ms.values()), 3), f"{rate:.0f}", f"{share:.2f}"])
    rows = [row for own in found.values() for row in own]
    rounds = [len(_unique(own, "round")) for own in found.values()]
    note = (
        f"{machine('kernels_cuda', rows[0])}; torch {rows[0]['torch']}, Triton {rows[0]['triton']}; "
        f"commit {rows[0]['fastbyol'].split()[-1]}; rounds: {rounds[0]} of BatchNorm, {rounds[1]} of LARS. Bandwidth counts the "
        "minimum number of bytes. Source: benchmarks/results/batch_norm_cuda.csv and lars_ema_cuda.csv (`make gpu`)."
    )
    return markdown_table(["", "ms: median (range)", "GB/s", "bandwidth relative to copy"], lines, note)


def loader_cuda() -> str:
    """Throughput of the loader into a GPU, and the CPU time that it takes."""
    rows = read("loader_cuda")
    lines = [
        [
            f"{row['contender']}, {row['size_px']} px",
            f"{float(row['images_per_s']):.0f}",
            f"{float(row['cpu_s_per_1000']):.2f}",
        ]
        for row in rows
    ]
    note = source_note(rows, ("torch", "numba", "simplejpeg"), "loader_cuda", "gpu")
    return markdown_table(["", "images/s", "CPU seconds per 1,000 images"], lines, note)


def cuda_bytes() -> str:
    """Memory traffic and launches of the compiled step."""
    rows, lines = read("cuda_bytes"), []
    names = {"fastbyol cudnn": "fastbyol, 1x1 convolutions by cuDNN", "plain": "plain compiled BYOL"}
    for row in rows:
        n = {key: int(value) for key, value in row.items() if key.endswith(("bytes", "launches"))}
        library = n["library_forward_bytes"] + n["library_backward_bytes"]
        library_launches = n["library_forward_launches"] + n["library_backward_launches"]
        launches = n["triton_forward_launches"] + n["triton_backward_launches"] + library_launches
        lines.append(
            [
                names.get(row["contender"], row["contender"]),
                f"{n['triton_forward_bytes'] / 1e9:.1f} ({n['triton_forward_launches']})",
                f"{n['triton_backward_bytes'] / 1e9:.1f} ({n['triton_backward_launches']})",
                f"{library / 1e9:.1f} ({library_launches})",
                f"{n['bytes'] / 1e9:.1f} ({launches})",
                f"{float(row['mb_per_image']):.0f}",
                f"{n['kept_bytes'] / 1e9:.1f} GB",
            ]
        )
    first, moved = rows[0], {row["contender"]: int(row["bytes"]) for row in rows}
    note = (
        f"Counted, not measured: {first['set']}, bfloat16, channels-last, compiled for an H100 by torch {first['torch']}, Triton {first['triton']}; "
        f"fastbyol / plain {moved['fastbyol'] / moved['plain']:.3f} ({moved['fastbyol cudnn'] / moved['plain']:.3f} by cuDNN); commit {first['fastbyol'].split()[-1]}. "
        "Source: benchmarks/results/cuda_bytes.csv (`python benchmarks/cuda_bytes.py`)."
    )
    parts = ("Triton forward", "Triton backward", "cuDNN and cuBLAS", "total")
    return markdown_table(["GB per step (launches)", *parts, "MB per image", "saved for backward"], lines, note)


def exactness() -> str:
    """Differences between fastbyol and the authors' code."""
    rows = read("exactness")
    header = ["part", "compared", "largest difference", "mean", "values up to", "rounding", "values"]
    lines = []
    for row in rows:
        cases = f"; {int(row['differ']):,} of {int(row['n']):,} differ" if row["differ"] else ""
        cells = (row[column] for column in ("error", "mean_error", "magnitude", "rounding"))
        lines.append([row["part"], f"{row['compared']}{cases}", *cells, f"{int(row['n']):,}"])
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "jax", "dm-haiku", "tensorflow-cpu"))
    note = (
        f"{first['cpu']}; Python {first['python']}; {versions}; commit {commits(rows)}. "
        "Source: benchmarks/results/exactness.csv (`python benchmarks/exactness.py`)."
    )
    return markdown_table(header, lines, note)


def exchange() -> str:
    """Estimated communication between GPUs, next to the estimated computing time of a step."""
    rows, lines = read("exchange"), []
    for gpu in _unique(rows, "gpu"):
        lines.append([f"**{gpu}**"])
        own = {(row["gpus"], row["gradient_dtype"]): row for row in rows if row["gpu"] == gpu}
        for gpus in dict.fromkeys(key[0] for key in own):
            lines.append(_exchange_line(own[gpus, "float32"], own[gpus, "bfloat16"]))
    header = [
        "GPUs",
        "images per GPU",
        "gradients sent, float32 (bfloat16)",
        "gradient transfer",
        "backward pass",
        "gradients overlapped",
        "SyncBN sent",
        "SyncBN transfer + latency",
        "step",
    ]
    return markdown_table(header, lines, _exchange_note(rows))


def _exchange_line(full: dict[str, str], half: dict[str, str]) -> list[str]:
    """Return a line of the table from the rows of float32 and bfloat16 gradients."""

    def pair(column: str, scale: float, form: str) -> str:
        return f"{scale * float(full[column]):{form}} ({scale * float(half[column]):{form}})"

    backward_ms, step_ms = float(full["backward_ms"]), float(full["step_ms"])
    if int(full["gpus"]) == 1:
        return ["1", full["images_per_gpu"], "0", "", f"{backward_ms:.0f} ms", "", "0", "", f"{step_ms:.0f} ms"]
    return [
        full["gpus"],
        full["images_per_gpu"],
        f"{pair('gradient_bytes_sent', 1e-6, '.0f')} MB",
        f"{pair('gradient_link_ms', 1, '.2f')} ms, {full['link']}",
        f"{backward_ms:.1f} ms",
        f"{pair('gradient_share_hidden', 100, '.0f')} %",
        f"{1e-6 * float(full['syncbn_bytes_sent']):.2f} MB in {full['syncbn_collectives']} collectives",
        f"{float(full['syncbn_link_ms']):.2f} + {float(full['syncbn_latency_ms']):.1f} ms",
        f"{step_ms:.1f} ms",
    ]


def _exchange_note(rows: Rows) -> str:
    first = rows[0]
    links = {row["link"]: f"{row['link']} {row['link_gb_per_s_one_way']} GB/s" for row in rows if row["link"]}
    latency = {row["link"].split()[0]: row["assumed_latency_us"] for row in rows if row["link"]}
    rates = dict.fromkeys(f"{row['gpu']} {row['images_per_s_per_gpu']}: {row['rate_source']}" for row in rows)
    return (
        f"Estimated, not measured: {first['backbone']}, {first['size_px']} px, batch {first['batch']} over all GPUs; bytes that "
        f"each GPU sends (and receives) per optimizer step in a ring, computed from the model. Link rates, one way, per GPU: "
        f"{', '.join(links.values())} (NVIDIA's data sheets). Assumed latency of a collective: "
        f"{', '.join(f'{v} us over {k}' for k, v in latency.items())}. Compute rates, images/s: {'; '.join(rates)}. "
        f"Commit {first['fastbyol'].split()[-1]}. Source: benchmarks/results/exchange.csv (`python benchmarks/exchange.py`)."
    )


CORPORA = {"photos": "demo corpus", "fashion-mnist": "Fashion-MNIST"}


def variants() -> str:
    """Accuracy of every variant on both corpora: mean and range over the seeds."""
    rows = read("variants")
    corpora = [corpus for corpus in CORPORA if any(row["corpus"] == corpus for row in rows)]
    lines = []
    for name in _unique(rows, "variant"):
        cells = (
            _mean_percent(
                [float(row[f"{protocol}_top1"]) for row in rows if (row["corpus"], row["variant"]) == (corpus, name)]
            )
            for corpus in corpora
            for protocol in ("knn", "linear")
        )
        lines.append([name, *cells])
    first, seeds = rows[0], len(_unique(rows, "seed"))
    note = (
        f"Top-1 in %, mean (range) of {seeds} seeds; {first['cpu']}; torch {first['torch']}; commit {commits(rows)}. "
        "Source: benchmarks/results/variants.csv (`python benchmarks/variants.py`)."
    )
    titles = [title for corpus in corpora for title in (f"{CORPORA[corpus]}: kNN", "linear")]
    return markdown_table(["", *titles], lines, note)


def quality() -> str:
    """What runs of known outcome show without labels, and the report's verdict on them."""
    rows = read("quality")
    lines = [
        [
            row["run"],
            f"{100 * float(row['spread']):.0f} %",
            f"{float(row['rank_first']):.1f}, {float(row['rank_highest']):.1f}, {float(row['rank_last']):.1f}",
            f"{100 * float(row['rank_last']) / int(row['rank_limit']):.1f} %",
            row["loss"],
            f"{100 * float(row['knn_top1']):.1f} %",
            row["verdict"],
        ]
        for row in rows
    ]
    first = rows[0]
    note = (
        f"1 seed; {first['cpu']}; torch {first['torch']}; commit {commits(rows)}. Commands in "
        "benchmarks/results/quality.csv (`python benchmarks/quality_runs.py`)."
    )
    titles = ["", "std, relative", "rank: first, highest, last", "last rank, relative", "loss", "kNN", "verdict"]
    return markdown_table(titles, lines, note)


def variant_commands() -> str:
    """The commands of the rows of `variants`, for the first seed on each corpus."""
    lines = []
    rows = read("variants")
    first = min(int(row["seed"]) for row in rows)
    for corpus in _unique(rows, "corpus"):
        lines += [f"**{CORPORA[corpus]}**", "", "| | command |", "|---|---|"]
        own = [row for row in rows if row["corpus"] == corpus and int(row["seed"]) == first]
        lines += [f"| {row['variant']} | `{row['command']}` |" for row in own]
        lines.append("")
    return "\n".join(lines)


def _mean_percent(shares: list[float]) -> str:
    values = [100 * share for share in shares]
    return f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else ""


def accuracy() -> str:
    """Wall time and kNN accuracy of training runs, by seed."""
    rows = read("accuracy")
    seeds = _unique(rows, "seed")
    by = {(row["contender"], row["seed"]): row for row in rows}
    lines = []
    for name in _unique(rows, "contender"):
        knn, seconds = ([float(by[name, seed][key]) for seed in seeds] for key in ("knn_top1", "seconds"))
        lines.append([f"{name}: kNN", *(f"{100 * v:.1f} %" for v in [*knn, median(knn)])])
        lines.append([f"{name}: seconds", *(f"{v:.1f}" for v in [*seconds, median(seconds)])])
    slowdowns = [float(by["lightly", s]["seconds"]) / float(by["fastbyol", s]["seconds"]) for s in seeds]
    lines.append(["**lightly / fastbyol: seconds**", *(f"{v:.2f}" for v in [*slowdowns, median(slowdowns)])])
    first = rows[0]
    lrs = ", ".join(dict.fromkeys(f"{row['contender']} {row['base_lr']}" for row in rows))
    note = (
        f"{first['epochs']} epochs; learning rates per 256 images: {lrs}; {first['cpu']}; torch "
        f"{first['torch']}, timm {first['timm']}, lightly {first['lightly']}; commit {first['fastbyol'].split()[-1]}. Source: "
        "benchmarks/results/accuracy.csv (`make bench-accuracy`)."
    )
    return markdown_table(["", *(f"seed {seed}" for seed in seeds), "median"], lines, note)


TABLES = {
    "exactness": exactness,
    "summary": summary.table,
    "against": lambda: against.table(against.comparisons()),
    "variants": variants,
    "quality": quality,
    "variant_commands": variant_commands,
    "accuracy": accuracy,
    "dense": dense,
    "evaluation": evaluation,
    "kernels": kernels,
    "dct_scaling": dct_scaling,
    "demo_seeds": demo_seeds,
    "loader": loader,
    "backends": backends,
    "image_sets": image_sets,
    "step": step,
    "step_cuda": lambda: step("cuda"),
    "train_run": train_run,
    "train_run_cuda": lambda: train_run("cuda"),
    "exchange": exchange,
    "cuda_bytes": cuda_bytes,
    "kernels_cuda": kernels_cuda,
    "loader_cuda": loader_cuda,
    "agreement": agreement,
}


def render(text: str) -> str:
    """Return the text of a page with all tables regenerated."""
    return _MARK.sub(lambda match: match[1] + TABLES[match[2]]() + match[4], text)


def main() -> int:
    fresh = {page: render(page.read_text()) for page in PAGES}
    fresh[against.PICTURE] = against.picture(against.comparisons())
    fresh[summary.PICTURE] = summary.picture()
    if "--check" in sys.argv:
        return int(any(not page.exists() or page.read_text() != text for page, text in fresh.items()))
    for page, text in fresh.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
