"""Accuracy against stored bytes of plugins at 1, 2, 4 and 32 bits a weight, by the VTAB protocol.

    python benchmarks/pareto.py --data ../shared/data/tasks                     # everything: for a GPU
    python benchmarks/pareto.py --data ../shared/data/tasks --tasks short --epochs 20 --choose-epochs 6 \
        --seeds 1 --precision bf16 --unfused                                    # what two CPU cores can do
    python benchmarks/pareto.py --known --out benchmarks/results/pareto_short.jsonl --plot docs/pareto.svg
    python benchmarks/pareto.py --known --out benchmarks/results/pareto_rates.jsonl --choices

The table at the end is what the documentation quotes; `protocol.py` says how runs are made and kept. Bytes are what a
plugin file holds of the plugin: packed codes, and 8 bytes of mean and deviation a matrix; the head is counted apart.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import petiole as pt
from petiole.nn.weights import Weights
from petiole.plugins import method
from protocol import SCALES, Contestant, Journal, mean_and_spread, mean_of_groups, parser, run_all


def contestants() -> dict[str, Contestant]:
    """Returns all contestants: every method at every width and number of bits, without biases."""
    found = {}
    for bits in (1, 2, 4, 32):
        for dim in (1, 8, 32):
            fixed = {"dim": dim, "bias": False, "bits": bits}
            found[f"adaptformer-{dim}-{bits}bit"] = Contestant("adaptformer", fixed, SCALES)
            found[f"lora-{dim}-{bits}bit"] = Contestant("lora", {"rank": dim, "bits": bits}, SCALES)
        found[f"fact-tt16-{bits}bit"] = Contestant("fact", {"rank": 16, "bits": bits}, SCALES)
        found[f"convpass-8-{bits}bit"] = Contestant("convpass", {"bias": False, "bits": bits}, SCALES)
    for name in [name for name in found if name.endswith("-1bit")]:
        found[f"{name}-bihead"] = replace(found[name], head_bits=1)
    return found


CONTESTANTS = contestants()


class Point(NamedTuple):
    """A plugin in the picture: its method, width, bits a weight, bytes, and mean test accuracy [%]."""

    method: str
    width: str
    bits: int
    num_bytes: int
    accuracy: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """Returns the plugins that are more accurate than all that are no larger, smallest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.num_bytes, -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


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
    options.add_argument("--rates", default="1e-2", help="learning rates to choose from [1e-2]")
    options.add_argument("--choices", action="store_true", help="print every setting's validation accuracy instead")
    args = options.parse_args()
    rates = tuple(map(float, args.rates.split(",")))
    choosing = {name: replace(contestant, rates=rates) for name, contestant in CONTESTANTS.items()}
    journal = run_all(choosing, args)
    table_of_choices(journal) if args.choices else table(journal, args.plot)


def table(journal: Journal, plot: Path | None) -> None:
    """Prints what is known: a row a contestant, smallest first, a column a task; and draws it where `plot` says."""
    tests = journal.tests(list(CONTESTANTS))
    tasks = sorted({task for rows in tests.values() for task in rows})
    print(f"| plugin | bits | head bits | bytes | {' | '.join(tasks)} | mean |")
    print("|---|---:|---:|---:|" + "---:|" * (len(tasks) + 1))
    points: list[Point] = []
    sizes = {name: plugin_bytes(CONTESTANTS[name]) for name in tests}
    for name, rows in sorted(tests.items(), key=lambda item: sizes[item[0]]):
        contestant = CONTESTANTS[name]
        accuracies = {task: [run["last_test_accuracy"] for run in runs] for task, runs in rows.items()}
        cells = [mean_and_spread(accuracies[task]) if task in rows else "" for task in tasks]
        title, size = name.split("bit")[0].rpartition("-")[0], sizes[name]
        num_seeds = min(map(len, accuracies.values())) if len(rows) == len(tasks) else 0
        means = [
            mean_of_groups({task: found[i : i + 1] for task, found in accuracies.items()}) for i in range(num_seeds)
        ]
        mean = mean_and_spread(means) if means else ""
        bits, head = contestant.fixed["bits"], contestant.head_bits
        print(f"| {title} | {bits} | {head} | {size:,} | {' | '.join(cells)} | {mean} |")
        if mean and head == 32:
            width = re.sub(r"\D*", "", title)
            points.append(Point(contestant.method, width, bits, size, 100 * mean_of_groups(accuracies)))
    if plot:
        draw(points, plot)


def table_of_choices(journal: Journal) -> None:
    """Prints the validation accuracy [%] of every setting that was tried: a row a setting, a column a task."""
    rows: dict[tuple[str, float, float, int], dict[str, float]] = {}
    for run, metrics in journal.runs():
        if run["phase"] == "choose":
            setting = (run["method"], run["lr"], run["settings"]["scale"], run["epochs"])
            rows.setdefault(setting, {})[run["task"]] = metrics["last_val_accuracy"]
    tasks = sorted({task for row in rows.values() for task in row})
    print(f"| plugin | rate | scale | epochs | {' | '.join(tasks)} |")
    print("|---|---:|---:|---:|" + "---:|" * len(tasks))
    for (name, lr, scale, epochs), row in sorted(rows.items()):
        cells = " | ".join(f"{100 * row[task]:.1f}" if task in row else "" for task in tasks)
        print(f"| {name} | {lr:g} | {scale:g} | {epochs} | {cells} |")


def draw(points: Sequence[Point], path: Path) -> None:
    """Draws accuracy over bytes: a colour a method, a marker a number of bits, a line what no other plugin beats."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "petiole", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    titles = {"adaptformer": "AdaptFormer", "lora": "LoRA", "fact": "FacT", "convpass": "Convpass"}
    colours = {method: f"C{i}" for i, method in enumerate(titles)}
    markers = {1: "o", 2: "s", 4: "^", 32: "X"}
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    best = frontier(points)
    axes.step([p.num_bytes for p in best], [p.accuracy for p in best], where="post", color="0.75", zorder=1)
    for p in points:
        axes.scatter(p.num_bytes, p.accuracy, s=45, color=colours[p.method], marker=markers[p.bits], zorder=2)
        below = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center"}
        axes.annotate(p.width, (p.num_bytes, p.accuracy), fontsize=7, color="0.35", **below)
    handles = [Line2D([], [], color=colour, label=titles[name], lw=4) for name, colour in colours.items()]
    for bits in sorted({p.bits for p in points}):
        label = f"{bits} bit" + "s" * (bits > 1)
        handles.append(Line2D([], [], color="0.35", marker=markers[bits], linestyle="", label=label))
    axes.set(xscale="log", xlabel="plugin [bytes]", ylabel="mean test accuracy [%]")
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, fontsize=8, ncols=2, loc="upper left", frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
