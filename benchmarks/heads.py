"""Heads on frozen features that meet classes ten at a time: replay of few exemplars, closed forms, and both ends.

    python benchmarks/heads.py --data ../shared/data                      # everything, one CPU core
    python benchmarks/heads.py --data ../shared/data --sets caltech       # the small set alone
    python benchmarks/heads.py --known --out benchmarks/results/heads.jsonl

Sets, in 10 experiences each; features are those of the bundled backbone, which sees every image once:

caltech   all 99 classes of the pack of Caltech-101, about 10 training images of each (train and val), 2,000 test images
tiny      100 classes of Tiny ImageNet, about 250 training images of each, 50 validation images of each as test

The backbone was pretrained on the training images of Tiny ImageNet and on other images of Caltech-101. So these are
comparisons of heads on one set of features; how good the features are is not measured here.

All that is free is chosen once for each set, head and number of exemplars, by the final average on one stream of other
classes: the 100 of Tiny ImageNet that are not reported, with all their training images or, for caltech, with 10 of
each. They are tested on their own validation images. No class and no image that is reported takes part in a choice. A
seed says the order of classes and of samples, which exemplars are kept and the random projection; heads begin at zero.

Trained heads take 32 samples and 32 exemplars a step, for 20 epochs and at least 300 steps an experience. Random ridge
has 2,000 random features. Seconds are processor time of a run, learning and scoring after each experience, without the
features. Three tables a set: what is reported, what became of the claims, and what learning rates were chosen by.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import petiole as pt
from online import unpack
from petiole.continual.closed_form import NCM, SLDA, RandomRidge, Ridge
from petiole.continual.exemplars import ClassBalanced
from petiole.continual.features import CachedFeatures, cache_features
from petiole.continual.heads import Head, HeadLearner
from petiole.continual.learner import run
from petiole.continual.replay import ER, ERACE, DERpp
from petiole.continual.streams import class_incremental
from petiole.continual.taer import TAER
from petiole.continual.trained import FineTune, Joint
from petiole.errors import DivergedError
from petiole.tasks import Split
from protocol import Journal, mean_and_spread

Arrays = tuple[Tensor, Tensor]
Grid = Mapping[str, tuple[Any, ...]]
SETS, SIZES, NUM_EXPERIENCES, BATCH = ("caltech", "tiny"), (1, 5, 20), 10, 500
METRICS = ("final_average", "average_incremental", "forgetting_since_best", "learning_accuracy")
# how far TAER may be below joint training
BAR = 0.05
RATES: Grid = {"lr": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)}
# head from exemplars, seed and settings; what its settings are chosen from
REPLAYING: Mapping[str, tuple[Callable[..., Head], Grid]] = {
    "ER": (ER, RATES),
    "ER, rebalanced": (partial(ER, is_rebalanced=True), RATES),
    "ER, detached": (partial(ER, is_detached=True), RATES),
    "ER-ACE": (ERACE, RATES),
    "DER++": (DERpp, {"lr": RATES["lr"][:4], "alpha": (0.5, 3.0), "beta": (1.0, 4.0)}),
    "TAER": (TAER, RATES),
    # says why TAER falls behind, and is no contestant: no other head may choose a weight decay
    "TAER, decayed": (partial(TAER, weight_decay=1e-3), {"lr": RATES["lr"][3:6]}),
}
# head from seed and settings
OTHERS: Mapping[str, tuple[Callable[..., Head], Grid]] = {
    "fine-tune": (FineTune, RATES),
    "NCM": (lambda seed, **settings: NCM(**settings), {"metric": ("cosine", "euclidean")}),
    "SLDA": (lambda seed: SLDA(), {}),
    "ridge": (lambda seed: Ridge(), {}),
    "random ridge": (lambda seed: RandomRidge(num_projections=2000, seed=seed), {}),
    "joint": (Joint, {"lr": RATES["lr"][2:5]}),
}
CELLS = [(name, size) for name in REPLAYING for size in SIZES] + [(name, 0) for name in OTHERS]


def main() -> None:
    args = options().parse_args()
    torch.set_num_threads(1)
    journal = Journal(args.out)
    if not args.known:
        run_all(journal, args)
    for name in SETS:
        if rows := cells(journal, name):
            print(f"\n{name}\n\n{table(rows)}\n\n{verdict(rows)}\n\n{rates(journal, name)}")


def run_all(journal: Journal, args: argparse.Namespace) -> None:
    """Runs what the journal does not have, a line of text for each run that is reported."""
    parts = read(args.data, args.features)
    heads = args.heads.split(";")
    for name, (head, size) in itertools.product(args.sets.split(","), CELLS):
        if head not in heads:
            continue
        shared = {"set": name, "head": head, "per_class": size}
        choices = [shared | {"phase": "choose", "settings": settings, "seed": 0} for settings in grid(head)]
        scores = [once(journal, asked, parts)["final_average"] for asked in (choices if len(choices) > 1 else ())]
        best = choices[scores.index(max(scores)) if scores else 0]["settings"]
        for seed in range(args.seeds):
            found = once(journal, shared | {"phase": "test", "settings": best, "seed": seed}, parts)
            words = f"{name:9}{head:16}{size or '':<4}seed {seed}{100 * found['final_average']:7.1f}"
            print(f"{words}{found['seconds']:8.1f} s  {best}", flush=True)


def grid(head: str) -> list[dict[str, Any]]:
    """Returns every setting that a head may choose."""
    wanted = {**REPLAYING, **OTHERS}[head][1]
    return [dict(zip(wanted, values, strict=True)) for values in itertools.product(*wanted.values())]


def once(
    journal: Journal, asked: Mapping[str, Any], parts: Mapping[tuple[str, str], tuple[Arrays, Arrays]]
) -> Mapping[str, float]:
    """Returns the metrics of one run, from the journal where it is there."""
    if asked not in journal:
        began, seed = time.process_time(), asked["seed"]
        train, test = parts[asked["set"], asked["phase"]]
        stream = class_incremental(
            train, test, num_experiences=NUM_EXPERIENCES, order=seed, batch_size=BATCH, seed=seed
        )
        try:
            *_, last = run(stream, HeadLearner(head_of(asked)))
            assert last.matrix is not None
            found = last.matrix.metrics()
        except DivergedError:
            found = dict.fromkeys(METRICS, 0.0)
        journal.add(asked, {key: found[key] for key in METRICS} | {"seconds": time.process_time() - began})
    return journal[asked]


def head_of(asked: Mapping[str, Any]) -> Head:
    """Returns a fresh head."""
    settings = {"seed": asked["seed"], **asked["settings"]}
    if asked["per_class"]:
        exemplars = ClassBalanced(per_class=asked["per_class"], seed=asked["seed"])
        return REPLAYING[asked["head"]][0](exemplars, **settings)
    return OTHERS[asked["head"]][0](**settings)


def read(data: Path, folder: Path) -> dict[tuple[str, str], tuple[Arrays, Arrays]]:
    """Returns features of training and test samples, of each set and of what its settings are chosen on."""
    model = pt.adapt(pt.backbone("micro"))

    def features(images: Split) -> CachedFeatures:
        return cache_features(model, images, folder=folder)

    train, test = (features(unpack(data / "pretrain" / f"tiny_imagenet_64_{part}.npz")) for part in ("part1", "val"))
    task = pt.open_task(data / "tasks" / "caltech101.npz").joined()
    assert task.test is not None
    order, own = np.random.default_rng(0).permutation(200), range(len(task.classes))
    return {
        ("caltech", "choose"): (arrays(train, order[100:], 10), arrays(test, order[100:])),
        ("caltech", "test"): (arrays(features(task.train), own), arrays(features(task.test), own)),
        ("tiny", "choose"): (arrays(train, order[100:]), arrays(test, order[100:])),
        ("tiny", "test"): (arrays(train, order[:100]), arrays(test, order[:100])),
    }


def arrays(samples: CachedFeatures, classes: Any, per_class: int | None = None) -> Arrays:
    """Returns features of some classes and labels from 0 in their order."""
    rows = [(samples.labels == int(c)).nonzero()[:per_class, 0] for c in classes]
    labels = torch.repeat_interleave(torch.tensor([len(found) for found in rows]))
    return samples.batch(torch.cat(rows))[0], labels


def cells(journal: Journal, name: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Returns the reported runs of a set, by head and exemplars of each class, in the order of the table."""
    found: dict[str, dict[tuple[str, int], list[dict[str, Any]]]] = {"choose": {}, "test": {}}
    for asked, metrics in journal.runs():
        if asked["set"] == name:
            cell = asked["head"], asked["per_class"]
            found[asked["phase"]].setdefault(cell, []).append({**asked, **metrics})
    best = {cell: max(rows, key=lambda row: row["final_average"]) for cell, rows in found["choose"].items()}
    # a journal may have runs of settings that were best before others were tried
    tests = {
        cell: [row for row in rows if row["settings"] == best.get(cell, row)["settings"]]
        for cell, rows in found["test"].items()
    }
    return {cell: tests[cell] for cell in CELLS if tests.get(cell)}


def table(found: Mapping[tuple[str, int], list[dict[str, Any]]]) -> str:
    """Returns the runs of a set as Markdown: means and deviations over seeds in percent, and seconds a run."""
    lines = ["| head | exemplars | chosen | final average | average over time | when learnt | forgetting | s |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|---:|")
    for (head, size), rows in found.items():
        chosen = ", ".join(f"{key} {value}" for key, value in rows[0]["settings"].items())
        keys = ("final_average", "average_incremental", "learning_accuracy", "forgetting_since_best")
        numbers = " | ".join(mean_and_spread([row[key] for row in rows]) for key in keys)
        seconds = statistics.mean(row["seconds"] for row in rows)
        lines.append(f"| {head} | {size or ''} | {chosen} | {numbers} | {seconds:.1f} |")
    return "\n".join(lines)


def rates(journal: Journal, name: str) -> str:
    """Returns the final averages that learning rates were chosen by as Markdown, the best of any other setting."""
    best: dict[tuple[str, int], dict[float, float]] = {}
    for asked, metrics in journal.runs():
        if (asked["set"], asked["phase"]) == (name, "choose") and "lr" in asked["settings"]:
            row, lr = best.setdefault((asked["head"], asked["per_class"]), {}), asked["settings"]["lr"]
            row[lr] = max(row.get(lr, 0.0), metrics["final_average"])
    lines = [f"| chosen by, at lr | exemplars | {' | '.join(map(str, RATES['lr']))} |"]
    lines.append("|---|" + "---:|" * (1 + len(RATES["lr"])))
    for head, size in (cell for cell in CELLS if cell in best):
        numbers = [f"{100 * best[head, size][lr]:.1f}" if lr in best[head, size] else "" for lr in RATES["lr"]]
        lines.append(f"| {head} | {size or ''} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def verdict(found: Mapping[tuple[str, int], list[dict[str, Any]]]) -> str:
    """Returns what became of the claims, by exemplars of each class; bold is what falls short."""
    finals = {cell: statistics.mean(row["final_average"] for row in rows) for cell, rows in found.items()}
    return "\n".join(_verdicts(finals))


def _verdicts(finals: Mapping[tuple[str, int], float]) -> Iterator[str]:
    for size in (size for size in SIZES if ("TAER", size) in finals):
        own = finals["TAER", size]
        others = {head: value for (head, s), value in finals.items() if s == size and not head.startswith("TAER")}
        words = [f"TAER with {size} of each class: {100 * own:.1f}"]
        if others:
            best = max(others, key=lambda head: others[head])
            mark = "**" * (own < others[best])
            words.append(f"{mark}{100 * (own - others[best]):+.1f}{mark} over {best}, the best other replay head")
        if ("joint", 0) in finals:
            mark = "**" * (own < finals["joint", 0] - BAR)
            words.append(f"{mark}{100 * (own - finals['joint', 0]):+.1f}{mark} over joint training")
        yield "- " + "; ".join(words)


def options() -> argparse.ArgumentParser:
    """Returns what can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with `tasks` and `pretrain`")
    parser.add_argument("--features", type=Path, default=Path("runs/features"), help="folder to keep features in")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--heads", default=";".join([*REPLAYING, *OTHERS]), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/heads.jsonl"))
    parser.add_argument("--known", action="store_true", help="run nothing: print what --out has")
    return parser


if __name__ == "__main__":
    main()
