"""Writes the tables and the picture of the README and of docs/ from the committed result files.

    python benchmarks/readme_tables.py [--check]

A table stands between `<!-- NAME: ... -->` and `<!-- end -->`; NAME is a function of this file. `--check` only says
whether all pages and the picture are up to date (exit code 1 if not); the tests do the same.
"""

import re
import sys
from pathlib import Path
from statistics import mean, median

import against
import summary
from results_csv import by_round, machine, ratios, read, spread

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_MARK = re.compile(r"(<!-- (\w+):[^\n]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)


def source_note(rows: list[dict[str, str]], packages: tuple[str, ...], name: str, target: str) -> str:
    """Machine, versions, commits, number of rounds, and the file NAME.csv that `make TARGET` writes."""
    first = rows[0]
    versions = ", ".join(f"{package} {first[package]}" for package in packages if first.get(package))
    commits = ", ".join(dict.fromkeys(row["fastbyol"].split()[-1] for row in rows))
    rounds = len({row["round"] for row in rows})
    turns = f"{rounds} rounds in turn, ratios within a round" if rounds > 1 else "1 round"
    return (
        f"{machine(name, first)}; {versions}; commit {commits}; {turns}. "
        f"Source: benchmarks/results/{name}.csv (`make {target}`)."
    )


def demo_seeds() -> str:
    rows = read("demo_seeds")
    lines = ["| | " + " | ".join(f"seed {row['seed']}" for row in rows) + " | mean |", "|---" * (len(rows) + 2) + "|"]
    for protocol, title in (("knn", "kNN"), ("linear", "linear probe")):
        for column, name in (
            ("BYOL", "BYOL"),
            ("untrained_network", "untrained network"),
            ("raw_pixels", "raw pixels"),
        ):
            values = [100 * float(row[f"{protocol}_top1_{column}"]) for row in rows]
            label = f"{title}, {name}"
            cells = " | ".join(f"**{v:.1f}**" if column == "BYOL" else f"{v:.1f}" for v in [*values, mean(values)])
            lines.append(f"| {label} | {cells} |")
    first = rows[0]
    seconds = ", ".join(f"{float(row['total_s']):.0f}" for row in rows)
    note = (
        f"{first['cpu']}; Python {first['python']}, torch {first['torch']}; commit {first['fastbyol'].split()[-1]}; training "
        f"and both evaluations took {seconds} s. Source: benchmarks/results/demo_seeds.csv."
    )
    return "\n".join([*lines, "", note]) + "\n"


def dense() -> str:
    """mIoU and mAP of the demo corpus's features on `prepare shapes`, seed by seed."""
    rows = read("dense")
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |", "|---" * (len(seeds) + 2) + "|"]
    took = []
    for protocol, title in (("segmentation", "segmentation, mIoU"), ("detection", "detection, mAP")):
        own = [row for row in rows if row["protocol"] == protocol]
        for column, name in (("BYOL", "BYOL"), ("untrained_network", "untrained network")):
            values = [100 * float(row[column]) for row in own]
            cells = " | ".join(f"**{v:.1f}**" if column == "BYOL" else f"{v:.1f}" for v in [*values, mean(values)])
            lines.append(f"| {title}: {name} | {cells} |")
        took.append(f"{protocol} {', '.join(row['seconds'] for row in own)} s")
    first = rows[0]
    note = (
        f"{first['cpu']}, {first['threads']} of torch's threads; torch {first['torch']}, torchvision {first['torchvision']}; commit "
        f"{first['fastbyol'].split()[-1]}; both networks together took: {'; '.join(took)}. Source: benchmarks/results/dense.csv "
        "(`python benchmarks/dense_transfer.py`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def loader() -> str:
    pairs = [("fastbyol", other) for other in ("decode only", "lightly", "torchvision v2", "DALI CPU")]
    return _loaders("loader", [*pairs, ("fastbyol", "fastbyol 1 thread"), ("decode only", "decode only 1 thread")])


def doors() -> str:
    """The same images through every door."""
    others = (".beton jpg", ".beton raw", "dali", "ffcv .beton jpg", "ffcv .beton raw")
    return _loaders("doors", [(f"fastbyol {other}", "fastbyol") for other in others])


def _loaders(file: str, pairs: list[tuple[str, str]]) -> str:
    rows = read(file)
    sizes = sorted({int(row["size_px"]) for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["contender"] for row in rows))

    def rates(name: str, size: int) -> list[float]:
        own = [r for r in rows if r["contender"] == name and int(r["size_px"]) == size]
        return [float(r["images_per_s"]) for r in sorted(own, key=lambda r: int(r["round"]))]

    def ratio(name: str, other: str, size: int) -> str:
        """Median over the rounds of the ratio within a round, and its range."""
        values = [a / b for a, b in zip(rates(name, size), rates(other, size), strict=True)]
        return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    lines = ["| images/s: median (range) | " + " | ".join(f"{size} px" for size in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for name in names:
        cells = (
            f"{median(rates(name, size)):.0f} ({min(rates(name, size)):.0f}-{max(rates(name, size)):.0f})"
            for size in sizes
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, other in pairs:
        cells = " | ".join(ratio(name, other, size) for size in sizes)
        lines.append(f"| **{name} / {other}** | {cells} |")
    first = rows[0]
    versions = ", ".join(f"{key} {first[key]}" for key in ("torch", "torchvision", "lightly", "numba"))
    note = (
        f"{first['cpu']}; {versions}, DALI {first['nvidia-dali-cuda130']}, FFCV {first['ffcv']}; commit "
        f"{first['fastbyol'].split()[-1]}; {len(rates(names[0], sizes[0]))} rounds in turn, ratios within a round. "
        f"Source: benchmarks/results/{file}.csv (`make bench-loader`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def dct_scaling() -> str:
    rows = read("dct_scaling")
    lines = [
        "| size | images decoded smaller | mean difference of their views | 95 % of them below |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if float(row["share_reduced"]) == 0:
            lines.append(f"| {row['size_px']} px | none of {row['images']} | | |")
            continue
        share = f"{100 * float(row['share_reduced']):.0f} % of {row['images']}"
        differences = f"{row['mean_difference_255ths']}/255 | {row['p95_difference_255ths']}/255"
        lines.append(f"| {row['size_px']} px | {share} | {differences} |")
    note = f"Commit {rows[0]['fastbyol'].split()[-1]}. Source: benchmarks/results/dct_scaling.csv."
    return "\n".join([*lines, "", note]) + "\n"


def kernels() -> str:
    """Times on the CPU, and how many times as long as fastbyol's, in the same round."""
    sets = [
        (row["set"], f, row) for f in ("lars_ema_cpu", "augment_cpu") for row in {r["set"]: r for r in read(f)}.values()
    ]
    titles = {"R18": "LARS + target, R18 pair", "R50": "LARS + target, R50 pair"}
    lines = ["| | ms: median (range) | times fastbyol's: median (range) |", "|---|---|---|"]
    for name, file, _ in sets:
        rows = [row for row in read(file) if row["set"] == name]
        times = by_round(rows, "ms")
        lines.append(f"| **{titles.get(name, f'augmentation, {name}')}** | | |")
        for contender, ms in times.items():
            ratio = "" if contender == "fastbyol" else spread(ratios(ms, times["fastbyol"]), 2)
            lines.append(f"| {contender} | {spread(list(ms.values()), 1)} | {ratio} |")
    commits = ", ".join(dict.fromkeys(row["fastbyol"].split()[-1] for _, _, row in sets))
    first = sets[0][2]
    note = (
        f"{first['cpu']}; torch {first['torch']}, numba {first['numba']}, lightly {first['lightly']}, kornia {first['kornia']}; "
        f"commit {commits}; contenders in turn, ratios within a round. Source: benchmarks/results/lars_ema_cpu.csv and "
        "augment_cpu.csv (`make bench-kernels`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def step(device: str = "cpu") -> str:
    """Times of one training step, and how many times as long as fastbyol's, in the same round."""
    rows = read(f"step_{device}")
    lines = ["| | ms: median (range) | images/s | times fastbyol's: median (range) |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        times, rates = by_round(own, "ms"), by_round(own, "images_per_s")
        lines.append(f"| **{name}** | | | |")
        for contender, ms in times.items():
            comparable = contender not in ("fastbyol", "supervised")
            ratio = spread(ratios(ms, times["fastbyol"]), 2) if comparable else ""
            rate = median(rates[contender].values())
            lines.append(
                f"| {contender} | {spread(list(ms.values()), 1)} | {rate:.{0 if rate >= 100 else 1}f} | {ratio} |"
            )
        bounds = {row["round"]: row for row in own if row["contender"] == "fastbyol" and row["share_of_bound"]}
        if bounds:
            bound = median(float(row["bound_images_per_s"]) for row in bounds.values())
            share = spread([float(row["share_of_bound"]) for row in bounds.values()], 2)
            lines.append(f"| *bound: 3/8 of supervised* | | {bound:.0f} | *fastbyol reaches {share} of it* |")
    packages = ("torch", "torchvision", "timm", "lightly", "byol-pytorch", "stable-pretraining")
    note = source_note(rows, packages, f"step_{device}", "bench-step" if device == "cpu" else "gpu")
    return "\n".join([*lines, "", note]) + "\n"


def train_run(device: str = "cpu") -> str:
    """Rates of whole training, loader and step, and how many times as long as fastbyol an image takes, in the same round."""
    rows = read(f"train_{device}")
    lines = [
        "| | images/s: median (range) | waiting for data | share of its step alone | times fastbyol's: median (range) |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        rates, times = by_round(own, "images_per_s"), by_round(own, "ms")
        waits = by_round(own, "wait_share")
        shares = by_round([row for row in own if row["share_of_step_alone"]], "share_of_step_alone")
        lines.append(f"| **{name}** | | | | |")
        for contender, values in rates.items():
            alone = contender.endswith("step alone")
            reference = times["fastbyol step alone" if alone else "fastbyol"]
            ratio = spread(ratios(times[contender], reference), 2) if times[contender] is not reference else ""
            wait = "" if alone else f"{100 * median(waits[contender].values()):.0f} %"
            share = spread(list(shares[contender].values()), 2) if contender in shares else ""
            rate = spread(list(values.values()), 1)
            lines.append(f"| {contender} | {rate} | {wait} | {share} | {ratio} |")
    packages = ("torch", "torchvision", "lightly", "pillow", "simplejpeg")
    note = source_note(rows, packages, f"train_{device}", "bench-train" if device == "cpu" else "gpu")
    return "\n".join([*lines, "", note]) + "\n"


def agreement() -> str:
    """What profile, bench and plan say of one machine, each over another; median and range over the rounds."""
    rows = read("agreement")
    lines = [
        "| | step, profile | parts / step | bench / profile | plan / bench | with the rates of another |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        digits = {"parts_over_step": 3, "bench_over_profile": 3, "plan_over_bench": 2, "plan_from_other": 2}
        ms = spread([float(row["profile_step_ms"]) for row in own], 1)
        cells = [f"{ms} ms", *(spread([float(row[key]) for row in own], n) for key, n in digits.items())]
        lines.append(f"| {name} | " + " | ".join(cells) + f", {own[0]['rates_from']} |")
    note = source_note(rows, ("torch", "timm", "numba"), "agreement", "bench-agreement")
    return "\n".join([*lines, "", note]) + "\n"


def kernels_cuda() -> str:
    """Times of BatchNorm and of LARS + target on a GPU, and their bandwidth beside a copy's."""
    lines = ["| | ms: median (range) | GB/s | share of a copy's bandwidth |", "|---|---|---|---|"]
    files = {"batch_norm_cuda": "BatchNorm, forward and backward", "lars_ema_cuda": "LARS + target, pair of"}
    found = {name: read(name) for name in files}
    for name, title in files.items():
        for key in dict.fromkeys(row["set"] for row in found[name]):
            lines.append(f"| **{title} {key}** | | | |")
            own = [row for row in found[name] if row["set"] == key]
            times = by_round(own, "ms")
            rates, shares = by_round(own, "gb_per_s"), by_round(own, "share_of_copy")
            for contender, ms in times.items():
                rate, share = (median(values[contender].values()) for values in (rates, shares))
                lines.append(f"| {contender} | {spread(list(ms.values()), 3)} | {rate:.0f} | {share:.2f} |")
    rows = [row for own in found.values() for row in own]
    rounds = [len({row["round"] for row in own}) for own in found.values()]
    note = (
        f"{machine('kernels_cuda', rows[0])}; torch {rows[0]['torch']}, Triton {rows[0]['triton']}; commit {rows[0]['fastbyol'].split()[-1]}; "
        f"rounds: {rounds[0]} of BatchNorm, {rounds[1]} of LARS. Bytes are those of the floor. Source: benchmarks/results/batch_norm_cuda.csv and lars_ema_cuda.csv (`make gpu`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def loader_cuda() -> str:
    """Rates of the loader into a GPU, and the processor's time that it takes."""
    rows = read("loader_cuda")
    lines = ["| | images/s | CPU seconds per 1,000 images |", "|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['contender']}, {row['size_px']} px | {float(row['images_per_s']):.0f} | {float(row['cpu_s_per_1000']):.2f} |"
        )
    return "\n".join([*lines, "", source_note(rows, ("torch", "numba", "simplejpeg"), "loader_cuda", "gpu")]) + "\n"


def cuda_bytes() -> str:
    """Bytes and launches of the compiled step, by contender."""
    rows = read("cuda_bytes")
    names = {"fastbyol": "fastbyol", "plain": "plain compiled BYOL"}
    lines = [
        "| GB a step (launches) | Triton forward | Triton backward | convolutions, matrix products | total | MB an image | kept for backward |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        n = {key: int(value) for key, value in row.items() if key.endswith(("bytes", "launches"))}
        library = n["library_forward_bytes"] + n["library_backward_bytes"]
        library_launches = n["library_forward_launches"] + n["library_backward_launches"]
        launches = n["triton_forward_launches"] + n["triton_backward_launches"] + library_launches
        cells = [
            names[row["contender"]],
            f"{n['triton_forward_bytes'] / 1e9:.1f} ({n['triton_forward_launches']})",
            f"{n['triton_backward_bytes'] / 1e9:.1f} ({n['triton_backward_launches']})",
            f"{library / 1e9:.1f} ({library_launches})",
            f"{n['bytes'] / 1e9:.1f} ({launches})",
            f"{float(row['mb_per_image']):.0f}",
            f"{n['kept_bytes'] / 1e9:.1f} GB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first, moved = rows[0], {row["contender"]: int(row["bytes"]) for row in rows}
    note = (
        f"Counted, not measured: {first['set']}, bfloat16, channels-last, compiled for an H100 by torch {first['torch']}, Triton {first['triton']}; "
        f"fastbyol / plain {moved['fastbyol'] / moved['plain']:.3f}; commit {first['fastbyol'].split()[-1]}. "
        "Source: benchmarks/results/cuda_bytes.csv (`python benchmarks/cuda_bytes.py`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def exchange() -> str:
    """The estimate of what GPUs exchange; times beside the computing time of a step."""
    rows = read("exchange")
    lines = [
        "| GPUs | images per GPU | gradients sent, float32 (bfloat16) | on the link at full rate | backward pass computes | "
        "gradients hidden | SyncBN sent | on the link + latency | step computes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def pair(full: dict[str, str], half: dict[str, str], column: str, scale: float, form: str) -> str:
        return f"{scale * float(full[column]):{form}} ({scale * float(half[column]):{form}})"

    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        lines.append(f"| **{gpu}** | | | | | | | | |")
        own = {(row["gpus"], row["gradient_dtype"]): row for row in rows if row["gpu"] == gpu}
        for gpus in dict.fromkeys(key[0] for key in own):
            full, half = own[gpus, "float32"], own[gpus, "bfloat16"]
            if int(gpus) == 1:
                computes = f"{float(full['backward_ms']):.0f} ms"
                lines.append(
                    f"| 1 | {full['images_per_gpu']} | 0 | | {computes} | | 0 | | {float(full['step_ms']):.0f} ms |"
                )
                continue
            cells = [
                gpus,
                full["images_per_gpu"],
                f"{pair(full, half, 'gradient_bytes_sent', 1e-6, '.0f')} MB",
                f"{pair(full, half, 'gradient_link_ms', 1, '.2f')} ms, {full['link']}",
                f"{float(full['backward_ms']):.1f} ms",
                f"{pair(full, half, 'gradient_share_hidden', 100, '.0f')} %",
                f"{1e-6 * float(full['syncbn_bytes_sent']):.2f} MB in {full['syncbn_collectives']} collectives",
                f"{float(full['syncbn_link_ms']):.2f} + {float(full['syncbn_latency_ms']):.1f} ms",
                f"{float(full['step_ms']):.1f} ms",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    links = {row["link"]: f"{row['link']} {row['link_gb_per_s_one_way']} GB/s" for row in rows if row["link"]}
    latency = {row["link"].split()[0]: row["assumed_latency_us"] for row in rows if row["link"]}
    rates = dict.fromkeys(f"{row['gpu']} {row['images_per_s_per_gpu']}: {row['rate_source']}" for row in rows)
    note = (
        f"Estimates, nothing measured: {first['backbone']}, {first['size_px']} px, batch {first['batch']} over all GPUs; bytes that "
        f"each GPU sends (and receives) per optimizer step in a ring, counted on the model. Links one way, per GPU: {', '.join(links.values())} "
        f"(NVIDIA's data sheets). Assumed latency of a collective: {', '.join(f'{v} us over {k}' for k, v in latency.items())}. Computing, "
        f"images/s: {'; '.join(rates)}. Commit {first['fastbyol'].split()[-1]}. Source: benchmarks/results/exchange.csv "
        "(`python benchmarks/exchange.py`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


CORPORA = {"photos": "demo corpus", "fashion-mnist": "Fashion-MNIST"}


def variants() -> str:
    """Mean and spread over the seeds of every variant, on both corpora."""
    rows = read("variants")
    corpora = [corpus for corpus in CORPORA if any(row["corpus"] == corpus for row in rows)]
    lines = ["| | " + " | ".join(f"{CORPORA[c]}: kNN | linear" for c in corpora) + " |"]
    lines.append("|---" * (2 * len(corpora) + 1) + "|")
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = [
            _percent(
                [float(row[f"{protocol}_top1"]) for row in rows if (row["corpus"], row["variant"]) == (corpus, name)]
            )
            for corpus in corpora
            for protocol in ("knn", "linear")
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row["fastbyol"].split()[-1] for row in rows))
    seeds = len({row["seed"] for row in rows})
    note = (
        f"Top-1 in %, mean and (lowest-highest) of {seeds} seeds; {first['cpu']}; torch {first['torch']}; commit {commits}. "
        "Source: benchmarks/results/variants.csv (`python benchmarks/variants.py`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def variant_commands() -> str:
    """The command of each row of `variants`, for its first seed on each corpus."""
    lines = []
    rows = read("variants")
    first = min(int(row["seed"]) for row in rows)
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        lines += [f"**{CORPORA[corpus]}**", "", "| | command |", "|---|---|"]
        own = [row for row in rows if row["corpus"] == corpus and int(row["seed"]) == first]
        lines += [f"| {row['variant']} | `{row['command']}` |" for row in own]
        lines.append("")
    return "\n".join(lines)


def _percent(shares: list[float]) -> str:
    """Mean and range in %."""
    values = [100 * share for share in shares]
    return f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else ""


def accuracy() -> str:
    """Wall time and kNN of whole runs, seed by seed."""
    rows = read("accuracy")
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    by = {(row["contender"], row["seed"]): row for row in rows}
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | median |", "|---" * (len(seeds) + 2) + "|"]
    for name in dict.fromkeys(row["contender"] for row in rows):
        knn, seconds = ([float(by[name, seed][key]) for seed in seeds] for key in ("knn_top1", "seconds"))
        lines.append(f"| {name}: kNN | " + " | ".join(f"{100 * v:.1f} %" for v in [*knn, median(knn)]) + " |")
        lines.append(f"| {name}: seconds | " + " | ".join(f"{v:.1f}" for v in [*seconds, median(seconds)]) + " |")
    times = [float(by["lightly", s]["seconds"]) / float(by["fastbyol", s]["seconds"]) for s in seeds]
    lines.append(
        "| **lightly / fastbyol: seconds** | " + " | ".join(f"{v:.2f}" for v in [*times, median(times)]) + " |"
    )
    first = rows[0]
    lrs = ", ".join(dict.fromkeys(f"{row['contender']} {row['base_lr']}" for row in rows))
    note = (
        f"{first['epochs']} epochs; learning rates per 256 images: {lrs}; {first['cpu']}; torch "
        f"{first['torch']}, timm {first['timm']}, lightly {first['lightly']}; commit {first['fastbyol'].split()[-1]}. Source: "
        "benchmarks/results/accuracy.csv (`make bench-accuracy`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


TABLES = {
    "summary": summary.table,
    "against": lambda: against.table(against.comparisons()),
    "variants": variants,
    "variant_commands": variant_commands,
    "accuracy": accuracy,
    "dense": dense,
    "kernels": kernels,
    "dct_scaling": dct_scaling,
    "demo_seeds": demo_seeds,
    "loader": loader,
    "backends": doors,
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
    """A page's text with every table made anew."""
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
