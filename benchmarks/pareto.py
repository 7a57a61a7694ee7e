"""Accuracy against stored bytes of plugins at 1, 2, 4 and 32 bits a weight, by the VTAB protocol.

    python benchmarks/pareto.py --data ../shared/data/tasks                     # everything: for a GPU
    python benchmarks/pareto.py --data ../shared/data/tasks --tasks short --epochs 20 --choose-epochs 6 \
        --seeds 1 --precision bf16 --unfused                                    # what two CPU cores can do
    python benchmarks/pareto.py --known --out benchmarks/results/pareto_short.jsonl --plot docs/pareto.svg

The table at the end is what the documentation quotes; `protocol.py` says how runs are made and kept. Bytes are what a
plugin file holds of the plugin: packed codes, and 8 bytes of mean and deviation a matrix; the head is counted apart.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import petiole as pt
from petiole.nn.weights import Weights
from petiole.plugins import method
from protocol import Contestant, mean_and_spread, mean_of_groups, parser, run_all

# what a few epochs on validation images bear: few bits like large steps
GRID: Mapping[str, tuple[Any, ...]] = {"scale": (1.0, 10.0)}
RATES = (1e-2,)


def contestants() -> dict[str, Contestant]:
    """Returns all contestants: every method at every width and number of bits, without biases."""
    found = {}
    for bits in (1, 2, 4, 32):
        for dim in (1, 8, 32):
            fixed = {"dim": dim, "bias": False, "bits": bits}
            found[f"adaptformer-{dim}-{bits}bit"] = Contestant("adaptformer", fixed, GRID, RATES)
            found[f"lora-{dim}-{bits}bit"] = Contestant("lora", {"rank": dim, "bits": bits}, GRID, RATES)
        found[f"fact-tt16-{bits}bit"] = Contestant("fact", {"rank": 16, "bits": bits}, GRID, RATES)
        found[f"convpass-8-{bits}bit"] = Contestant("convpass", {"bias": False, "bits": bits}, GRID, RATES)
    for name in [name for name in found if name.endswith("-1bit")]:
        plain = found[name]
        found[f"{name}-bihead"] = Contestant(plain.method, plain.fixed, plain.grid, plain.rates, head_bits=1)
    return found


CONTESTANTS = contestants()


def plugin_bytes(contestant: Contestant) -> int:
    """Returns what a file holds of a contestant's plugin on the bundled backbone [bytes]."""
    plugin = method(contestant.method, **contestant.fixed)
    model = pt.adapt(pt.backbone("micro"), plugin, prove=False)
    bits = contestant.fixed["bits"]
    weights = [m for m in model.modules() if isinstance(m, Weights)]
    total = sum(-(-sum(p.numel() for p in w.parameters()) * bits // 8) for w in weights)
    return total + (8 * sum(w.num_matrices for w in weights) if bits < 32 else 0)


def head_bytes(num_classes: int, bits: int, width: int = 192) -> int:
    """Returns what a file holds of the head [bytes]."""
    return 4 * (width + 1) * num_classes if bits == 32 else -(-width * num_classes * bits // 8) + 8


def main() -> None:
    options = parser(__doc__, list(CONTESTANTS), "runs/pareto.jsonl")
    options.add_argument("--plot", type=Path, help="picture to draw, .svg or .png")
    args = options.parse_args()
    tests = run_all(CONTESTANTS, args).tests(list(CONTESTANTS))
    tasks = sorted({task for rows in tests.values() for task in rows})
    print(f"| plugin | bits | head bits | bytes | {' | '.join(tasks)} | mean |")
    print("|---|---:|---:|---:|" + "---:|" * (len(tasks) + 1))
    points: dict[str, list[tuple[int, float]]] = {}
    for name, rows in sorted(tests.items(), key=lambda item: plugin_bytes(CONTESTANTS[item[0]])):
        contestant = CONTESTANTS[name]
        accuracies = {task: [run["last_test_accuracy"] for run in runs] for task, runs in rows.items()}
        cells = [mean_and_spread(accuracies[task]) if task in rows else "" for task in tasks]
        title, size = name.split("bit")[0].rpartition("-")[0], plugin_bytes(contestant)
        mean = f"{100 * mean_of_groups(accuracies):.1f}" if len(rows) == len(tasks) else ""
        bits, head = contestant.fixed["bits"], contestant.head_bits
        print(f"| {title} | {bits} | {head} | {size:,} | {' | '.join(cells)} | {mean} |")
        if mean and head == 32:
            points.setdefault(f"{contestant.method}, {bits} bit", []).append((size, 100 * mean_of_groups(accuracies)))
    if args.plot:
        draw(points, args.plot)


def draw(points: Mapping[str, list[tuple[int, float]]], path: Path) -> None:
    """Draws accuracy over bytes: a colour a method, a marker a number of bits."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "petiole"
    from matplotlib import pyplot as plt

    markers = {"1": "o", "2": "s", "4": "^", "32": "x"}
    methods = list(dict.fromkeys(title.split(",")[0] for title in points))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for title, found in points.items():
        name, bits = title.removesuffix(" bit").split(", ")
        sizes, accuracies = zip(*sorted(found), strict=True)
        colour = f"C{methods.index(name)}"
        axes.plot(sizes, accuracies, color=colour, marker=markers[bits], linewidth=0.8, label=title)
    axes.set(xscale="log", xlabel="plugin [bytes]", ylabel="mean test accuracy [%]")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
