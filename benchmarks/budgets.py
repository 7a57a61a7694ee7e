"""Accuracy of models that were trained on one token budget and run on another, without and with a compensator.

    python benchmarks/budgets.py --data ../shared/data/tasks --epochs 20 --choose-epochs 6 --precision bf16 --unfused
    python benchmarks/budgets.py --known --out benchmarks/results/budgets.jsonl

As in the paper's tables (Jie et al., 2024, arXiv 2408.06798): AdaptFormer is trained at every source budget and tested
at every target budget. Its scale is chosen on validation at source 0, once per task; models are trained on training and
validation images together and tested after the last epoch. The compensator was distilled without any of these tasks'
test images, and its scale is the one it was distilled with: nothing about it is chosen.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import petiole as pt
from petiole.tasks import Pixels
from petiole.train.evaluate import evaluate
from petiole.train.world import World
from protocol import GROUPS, SCALES, Journal, mean_and_spread, open_host, parser

SOURCES = (0, 4, 8)
Cells = dict[tuple[int, int, bool], list[float]]


def main() -> None:
    options = parser(__doc__, ("adaptformer-8",), "runs/budgets.jsonl")
    options.add_argument("--compensator", default="micro", help="file of petiole distill, or `micro`")
    options.add_argument("--train-only", action="store_true", help="test nothing yet")
    options.add_argument("--targets", default="0,4,8,12,16,24,32")
    options.set_defaults(tasks=",".join(GROUPS["natural"]))
    args = options.parse_args()
    journal = Journal(args.out)
    for name in [] if args.known else args.tasks.split(","):
        run_task(journal, Path(args.data) / f"{name}.npz", args)
    if not (cells := read(journal)):
        return
    for task in (*sorted({key[0] for key in cells}), None):
        print(f"\n{task or 'mean'}\n\n{table(cells, task)}")
    print(f"\n{summary(cells)}")


def run_task(journal: Journal, path: Path, args: argparse.Namespace) -> None:
    """Trains and tests on one task what is not there yet."""
    task, backbone = pt.open_task(path), open_host(args)
    part = pt.Task(task.name, task.classes, task.train, task.val)
    scores = {}
    for scale in SCALES["scale"]:
        run = {"task": task.name, "phase": "choose", "scale": scale, "epochs": args.choose_epochs or args.epochs}
        if run not in journal:
            journal.add(run, train(backbone, part, scale, 0, 0, run["epochs"], args)[1].metrics)
        scores[scale] = journal[run]["last_val_accuracy"]
    scale = max(scores, key=lambda key: scores[key])
    for seed in range(args.seeds):
        for source in SOURCES:
            file = args.out.with_suffix("") / f"{task.name}-{source}-{seed}.safetensors"
            if not file.exists():
                model, _ = train(backbone, task.joined(), scale, source, seed, args.epochs, args)
                file.parent.mkdir(parents=True, exist_ok=True)
                pt.save(model, file)
            if not args.train_only:
                test(journal, task, file, {"task": task.name, "source": source, "seed": seed}, args)


def train(
    backbone: Any, task: pt.Task, scale: float, source: int, seed: int, epochs: int, args: argparse.Namespace
) -> tuple[pt.Adapted, pt.FitResult]:
    """Returns a model trained at a budget, and what its run came to."""
    plugins = [pt.AdaptFormer(dim=8, scale=scale), *([pt.ToMe(budget=source)] if source else [])]
    model = pt.adapt(backbone, *plugins, classes=task.classes, seed=seed, prove=False)
    recipe = pt.Recipe(epochs=epochs, lr=3e-3, seed=seed, select="last", eval_every=epochs, precision=args.precision)
    return model, pt.fit(model, task, recipe, progress=False)


def test(journal: Journal, task: pt.Task, file: Path, run: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Tests a model at every target budget, without and with the compensator."""
    assert task.test is not None
    model, world = pt.load(file, open_host(args), check=False), World(args.precision)
    pixels = Pixels(task.test, pt.Transform(model.input_config))
    for target in map(int, args.targets.split(",")):
        for is_compensated in (False,) if target == run["source"] else (False, True):
            row = {**run, "phase": "test", "target": target, "is_compensated": is_compensated}
            if row not in journal:
                fast = pt.compress(model, target, compensator=args.compensator if is_compensated else None)
                journal.add(row, {"accuracy": evaluate(fast.eval(), pixels, world).accuracy})
                print(*row.values(), journal[row], flush=True)


def read(journal: Journal) -> dict[tuple[str, int, int, bool], list[float]]:
    """Returns test accuracies by task, source, target and whether it was compensated, one a seed."""
    cells: dict[tuple[str, int, int, bool], list[float]] = {}
    for run, metrics in journal.runs():
        if run["phase"] == "test":
            key = (run["task"], run["source"], run["target"], run["is_compensated"])
            cells.setdefault(key, []).append(metrics["accuracy"])
    return cells


def mean_over_tasks(cells: Mapping[tuple[str, int, int, bool], Sequence[float]]) -> Cells:
    """Returns the means over tasks, one a seed."""
    found: dict[tuple[int, int, bool], list[Sequence[float]]] = {}
    for (_, *key), values in cells.items():
        found.setdefault((int(key[0]), int(key[1]), bool(key[2])), []).append(values)
    return {key: [statistics.mean(seed) for seed in zip(*rows, strict=False)] for key, rows in found.items()}


def table(cells: Mapping[tuple[str, int, int, bool], Sequence[float]], task: str | None) -> str:
    """Returns a task's accuracies, or the means over tasks, as Markdown: two rows a source, a column a target."""
    of_task = {key: values for key, values in cells.items() if task in (None, key[0])}
    means = mean_over_tasks(of_task)
    targets = sorted({target for _, target, _ in means})
    lines = [f"| trained at r | | {' | '.join(f'r = {t}' for t in targets)} |", "|---:|---|" + "---:|" * len(targets)]
    for source in sorted({source for source, _, _ in means}):
        for is_compensated in (False, True):
            row = [means.get((source, t, is_compensated), []) for t in targets]
            words = [mean_and_spread(values) if values else "" for values in row]
            lines.append(f"| {source} | {'ToCom' if is_compensated else 'ToMe'} | {' | '.join(words)} |")
    return "\n".join(lines)


def summary(cells: Mapping[tuple[str, int, int, bool], Sequence[float]]) -> str:
    """Returns the mean gain over all pairs of different budgets, and that of each distance, in points."""
    gains: dict[int, list[float]] = {}
    for (task, source, target, is_compensated), values in cells.items():
        if is_compensated:
            plain = cells[task, source, target, False]
            gains.setdefault(abs(target - source), []).append(100 * (statistics.mean(values) - statistics.mean(plain)))
    everything = [gain for group in gains.values() for gain in group]
    lines = [f"mean gain over {len(everything)} pairs and tasks: {statistics.mean(everything):+.2f} points"]
    lines += [f"| {d} | {statistics.mean(gains[d]):+.2f} | {min(gains[d]):+.2f} |" for d in sorted(gains)]
    return "\n".join([lines[0], "", "| distance | mean gain | smallest |", "|---:|---:|---:|", *lines[1:]])


if __name__ == "__main__":
    main()
