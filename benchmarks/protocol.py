"""The VTAB protocol on small tasks, run by run: what the accuracy benchmarks have in common.

The setting of a contestant is chosen on validation (trained on the training split, seed 0); the model is then trained
on training and validation images together and scored on test after the last epoch, once per seed. Nothing is ever
selected on test. Every run is a line of a journal, so a benchmark goes on where it was stopped, and several processes
may work on different contestants at once.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
SCALES: Mapping[str, tuple[Any, ...]] = {"scale": (1.0, 10.0)}


@dataclass(frozen=True)
class Contestant:
    """A method with what is fixed about it and what it may choose on validation.

    Args:
        method: Name in the table of methods.
        fixed: Settings that are not chosen.
        grid: Settings to choose from.
        rates: Learning rates to choose from.
        head_bits: Bits per weight of the head.
    """

    method: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rates: tuple[float, ...] = (3e-3,)
    head_bits: int = 32

    def choices(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Yields every setting and learning rate it may choose."""
        for values in itertools.product(*self.grid.values()):
            for lr in self.rates:
                yield {**self.fixed, **dict(zip(self.grid, values, strict=True))}, lr


class Journal:
    """Runs that are done, by what was asked; each is a line of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {_key(row["run"]): row["metrics"] for row in map(json.loads, lines)}

    def add(self, run: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Notes a run that was just done."""
        self.known[_key(run)] = dict(metrics)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"run": run, "metrics": metrics}) + "\n")

    def __contains__(self, run: Mapping[str, Any]) -> bool:
        return _key(run) in self.known

    def __getitem__(self, run: Mapping[str, Any]) -> dict[str, float]:
        return self.known[_key(run)]

    def runs(self) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
        """Yields every run and its metrics."""
        return ((json.loads(key), metrics) for key, metrics in self.known.items())

    def tests(self, names: Sequence[str]) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Returns run and metrics of every test run, by contestant and task, in the order of their seeds."""
        found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in names}
        for run, metrics in self.runs():
            if run["phase"] == "test" and run["method"] in found:
                found[run["method"]].setdefault(run["task"], []).append(run | metrics)
        return {name: rows for name, rows in found.items() if rows}


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def run_all(contestants: Mapping[str, Contestant], args: argparse.Namespace) -> Journal:
    """Runs what is not in the journal yet, a line of text per contestant and task, and returns the journal."""
    journal = Journal(args.out)
    for name in [] if args.known else args.methods.split(","):
        contestant = contestants[name]
        for source in sources(args):
            task = pt.open_task(source)
            options = list(contestant.choices())
            scores = [
                _once(journal, task, name, contestant, *option, 0, True, args)["last_val_accuracy"]
                for option in (options if len(options) > 1 else ())
            ]
            best = options[scores.index(max(scores))] if scores else options[0]
            for seed in range(args.seeds):
                metrics = _once(journal, task, name, contestant, *best, seed, False, args)
                accuracy = 100 * metrics["last_test_accuracy"]
                print(f"{name:28}{task.name:20}seed {seed}{accuracy:7.1f}   {best}", flush=True)
    return journal


def sources(args: argparse.Namespace) -> list[Any]:
    """Returns the tasks that the options ask for, as `open_task` takes them."""
    folder = Path(args.data)
    if args.tasks:
        return [folder / f"{name}.npz" for name in (SHORT if args.tasks == "short" else args.tasks.split(","))]
    return sorted(folder.glob("*.npz")) if folder.is_dir() else [args.data]


def _once(
    journal: Journal,
    task: pt.Task,
    name: str,
    contestant: Contestant,
    settings: dict[str, Any],
    lr: float,
    seed: int,
    is_choice: bool,
    args: argparse.Namespace,
) -> Mapping[str, float]:
    """Returns the metrics of one run, from the journal where it is there."""
    epochs = args.choose_epochs or args.epochs if is_choice else args.epochs
    run = {"task": task.name, "method": name, "settings": settings, "lr": lr, "seed": seed}
    run |= {"phase": "choose" if is_choice else "test", "epochs": epochs, "backbone": args.backbone}
    if contestant.head_bits != 32:
        run["head_bits"] = contestant.head_bits
    if run not in journal:
        # a setting is chosen where the test images cannot be seen at all
        split = dataclasses.replace(task, test=None) if is_choice else task.joined()
        journal.add(run, train(contestant, split, run, args)[1].metrics)
    return journal[run]


def train(
    contestant: Contestant, task: pt.Task, run: Mapping[str, Any], args: argparse.Namespace
) -> tuple[pt.Adapted, pt.FitResult]:
    """Returns a model trained as a run of the journal says, and what its training came to."""
    epochs, seed = run["epochs"], run["seed"]
    plugin, bits = method(contestant.method, **run["settings"]), contestant.head_bits
    model = pt.adapt(open_host(args), plugin, classes=task.classes, head_bits=bits, seed=seed, prove=False)
    recipe = pt.Recipe(
        epochs=epochs, lr=run["lr"], seed=seed, select="last", eval_every=epochs, precision=args.precision
    )
    return model, pt.fit(model, task, recipe, progress=False)


def open_host(args: argparse.Namespace) -> Any:
    """Returns the backbone that the options ask for."""
    backbone = pt.backbone(args.backbone)
    for module in backbone.modules() if args.unfused else ():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return backbone


def parser(text: str | None, contestants: Sequence[str], out: str) -> argparse.ArgumentParser:
    """Returns the options that the benchmarks have in common."""
    options = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", default="digits", help="folder of packs, or the name of a task")
    options.add_argument("--methods", default=",".join(contestants))
    options.add_argument("--tasks", help="comma-separated names of packs, or `short`; all by default")
    options.add_argument("--backbone", default="micro")
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument("--choose-epochs", type=int, help="epochs of the runs that choose a setting [--epochs]")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--precision", default="auto")
    # in bf16 on a CPU, the backward pass of PyTorch's fused attention is five times slower than in fp32
    options.add_argument("--unfused", action="store_true", help="attention as plain products")
    options.add_argument("--out", type=Path, default=Path(out))
    options.add_argument("--known", action="store_true", help="run nothing: print what --out has")
    return options


def mean_and_spread(values: Sequence[float]) -> str:
    """Returns the mean in percent, with the deviation over seeds where there are several."""
    percent = [100 * value for value in values]
    return f"{statistics.mean(percent):.1f}" + (f" +- {statistics.stdev(percent):.1f}" if len(percent) > 1 else "")


def mean_of_groups(rows: Mapping[str, Sequence[float]]) -> float:
    """Returns the mean over groups of the mean over their tasks of the mean over seeds."""
    groups = [[statistics.mean(rows[task]) for task in group if task in rows] for group in GROUPS.values()]
    return statistics.mean(statistics.mean(group) for group in groups if group)
