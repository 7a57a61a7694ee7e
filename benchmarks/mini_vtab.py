"""Accuracy of methods on small tasks, by the VTAB protocol, three seeds.

    python benchmarks/mini_vtab.py --data ../shared/data/tasks                   # everything: minutes a task on a GPU
    python benchmarks/mini_vtab.py --data ../shared/data/tasks --tasks short --epochs 20 --choose-epochs 6 \
        --seeds 1 --precision bf16 --unfused                                     # what two CPU cores can do
    python benchmarks/mini_vtab.py --data digits --methods fact-tt8 --epochs 15

For each method and task, the setting is chosen on validation (trained on the training split, seed 0); the model is then
trained on training and validation images together and scored on test after the last epoch, once per seed. Nothing is
ever selected on test. Every run keeps a line in `--out`, so the script goes on where it was stopped, and several may
work on different methods at once; the tables at the end are what the documentation quotes.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import petiole as pt
from petiole.plugins import method

GROUPS = {
    "natural": ("caltech101", "trashnet", "sign_digits", "fashion_mnist"),
    "specialised": ("bccd_cell", "pneumonia_mnist", "omniglot_alphabet"),
    "structured": ("nlvr_count", "dsprites_loc", "dsprites_ori"),
}
# the tasks of a run on two CPU cores
SHORT = ("caltech101", "sign_digits", "pneumonia_mnist", "dsprites_loc", "nlvr_count")
SCALES = {"scale": (1.0, 10.0)}
# name -> method, fixed settings, settings to choose from, learning rates to choose from
CONTESTANTS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[Any, ...]], tuple[float, ...]]] = {
    "linear": ("linear", {}, {}, (1e-3, 1e-2)),
    "full": ("full", {}, {}, (3e-4, 1e-3)),
    "bitfit": ("bitfit", {}, {}, (3e-3, 1e-2)),
    "vpt-deep": ("vpt", {"num_prompts": 10, "deep": True}, {}, (3e-3, 1e-2)),
    "adaptformer-8": ("adaptformer", {"dim": 8}, SCALES, (3e-3,)),
    "lora-8": ("lora", {"rank": 8}, SCALES, (3e-3,)),
    "ssf": ("ssf", {}, {}, (3e-3, 1e-2)),
    "fact-tt4": ("fact", {"rank": 4}, SCALES, (3e-3,)),
    "fact-tt16": ("fact", {"rank": 16}, SCALES, (3e-3,)),
    "fact-tk16": ("fact", {"rank": 16, "form": "tk"}, SCALES, (3e-3,)),
    "convpass-attn": ("convpass", {"roles": ("attn",)}, SCALES, (3e-3,)),
    "convpass": ("convpass", {}, SCALES, (3e-3,)),
    "fact-tt8": ("fact", {"rank": 8, "scale": 10.0}, {}, (3e-3,)),
}
# the last one is for the handwritten digits
TABLE = tuple(CONTESTANTS)[:-1]


def choices(name: str) -> Iterator[tuple[dict[str, Any], float]]:
    """Yields every setting and learning rate a contestant may choose."""
    _, fixed, grid, rates = CONTESTANTS[name]
    for values in itertools.product(*grid.values()):
        for lr in rates:
            yield {**fixed, **dict(zip(grid, values, strict=True))}, lr


def score(
    task: pt.Task, name: str, settings: dict[str, Any], lr: float, seed: int, epochs: int, args: argparse.Namespace
) -> dict[str, float]:
    """Returns the metrics of one run."""
    backbone = pt.backbone(args.backbone)
    for module in backbone.modules() if args.unfused else ():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    model = pt.adapt(backbone, method(CONTESTANTS[name][0], **settings), classes=task.classes, seed=seed, prove=False)
    recipe = pt.Recipe(epochs=epochs, lr=lr, seed=seed, select="last", eval_every=epochs, precision=args.precision)
    return pt.fit(model, task, recipe, progress=False).metrics


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Returns the test accuracies as Markdown: a row a method, a column a task, then the mean of the groups' means."""
    tasks = [task for group in GROUPS.values() for task in group if any(task in rows for rows in results.values())]
    lines = [f"| method | {' | '.join(tasks)} | mean of groups |", "|---|" + "---:|" * (len(tasks) + 1)]
    for name, rows in results.items():
        cells = []
        for task in tasks:
            runs = [100 * share for share in rows.get(task, ())]
            spread = f" +- {statistics.stdev(runs):.1f}" if len(runs) > 1 else ""
            cells.append(f"{statistics.mean(runs):.1f}{spread}" if runs else "")
        groups = [[statistics.mean(rows[task]) for task in group if task in rows] for group in GROUPS.values()]
        means = [statistics.mean(group) for group in groups if group]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * statistics.mean(means):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="folder of packs, or the name of a task")
    parser.add_argument("--methods", default=",".join(TABLE))
    parser.add_argument("--tasks", help="comma-separated names of packs, or `short`; all by default")
    parser.add_argument("--backbone", default="micro")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--choose-epochs", type=int, help="epochs of the runs that choose a setting [--epochs]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    # in bf16 on a CPU, the backward pass of PyTorch's fused attention is five times slower than in fp32
    parser.add_argument("--unfused", action="store_true", help="attention as plain products")
    parser.add_argument("--out", type=Path, default=Path("runs/mini_vtab.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {json.dumps(row["run"], sort_keys=True): row["metrics"] for row in done}

    def once(task: pt.Task, name: str, settings: dict[str, Any], lr: float, seed: int, phase: str) -> dict[str, float]:
        epochs = args.choose_epochs or args.epochs if phase == "choose" else args.epochs
        run = {"task": task.name, "method": name, "settings": settings, "lr": lr, "seed": seed, "phase": phase}
        run |= {"epochs": epochs, "backbone": args.backbone}
        key = json.dumps(run, sort_keys=True)
        if key not in known:
            # a setting is chosen where the test images cannot be seen at all
            split = dataclasses.replace(task, test=None) if phase == "choose" else task.joined()
            known[key] = score(split, name, settings, lr, seed, epochs, args)
            with args.out.open("a") as file:
                file.write(json.dumps({"run": run, "metrics": known[key]}) + "\n")
        return known[key]

    folder = Path(args.data)
    sources: list[Any] = sorted(folder.glob("*.npz")) if folder.is_dir() else [args.data]
    if args.tasks:
        wanted = SHORT if args.tasks == "short" else args.tasks.split(",")
        sources = [folder / f"{name}.npz" for name in wanted]
    results: dict[str, dict[str, list[float]]] = {}
    for name in args.methods.split(","):
        for source in sources:
            task = pt.open_task(source)
            options = list(choices(name))
            best = options[0]
            if len(options) > 1:
                best = max(options, key=lambda c: once(task, name, *c, 0, "choose")["last_val_accuracy"])
            runs = [once(task, name, *best, seed, "test")["last_test_accuracy"] for seed in range(args.seeds)]
            results.setdefault(name, {})[task.name] = runs
            spread = f" +- {100 * statistics.stdev(runs):.1f}" if len(runs) > 1 else ""
            print(f"{name:14}{task.name:20}{100 * statistics.mean(runs):6.1f}{spread}   {best}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
