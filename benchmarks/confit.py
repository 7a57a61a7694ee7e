"""Continual fine-tuning of ResNets: ways to train crossed with ways to normalise earlier tasks, three seeds.

    python benchmarks/confit.py --data ../shared/data                                      # all of it: hours
    python benchmarks/confit.py --data ../shared/data --tasks caltech101 --depths 20 --trainings plain,staged
    python benchmarks/confit.py --known --out benchmarks/results/confit.jsonl              # the tables alone

A network trained on CIFAR-10 learns a task class group by class group, and is told at the end which group a test image
belongs to. Batch statistics do not influence training, so each run is read in every way:

    latest      the network as the last experience left it, for all
    stale       statistics, gains and shifts of each experience, as recorded
    channel, phases, taps               likewise, with means recovered from the inputs of convolutions
    taps+rescaled, taps+latest          taps, with variances rescaled or those of the last experience
    anew        likewise, but measured again on the experience's own training images: what no learner can have

Learning rate and strength are chosen on validation images for each cell of the table by itself, from the runs of seed
0; then the model is trained on training and validation images and scored on test images, once per seed. A seed says the
order of classes and of images. Runs are lines of a journal, so a benchmark goes on where it was stopped.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import petiole as pt
from cifar_resnet import cifar_resnet
from petiole.continual.confit.bank import StatisticsBank
from petiole.continual.confit.baselines import EWC, FineTune, LwF
from petiole.continual.confit.learner import Normalising
from petiole.continual.confit.pairing import find_pairs
from petiole.continual.confit.tuning import TaskLearner
from petiole.continual.learner import accuracy
from petiole.continual.streams import Experience, Stream, class_incremental
from petiole.errors import DivergedError
from petiole.tasks.cache import Pixels
from protocol import Journal, mean_and_spread

RATES = (0.02, 0.05, 0.1)
TRAININGS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "plain": (FineTune, {"lr": RATES}),
    "staged": (FineTune, {"lr": RATES, "stages": ((0.2, 0.5),)}),
    "lwf": (LwF, {"lr": RATES, "strength": (1.0, 3.0)}),
    "ewc": (EWC, {"lr": RATES, "strength": (30.0, 300.0, 3000.0)}),
}
READINGS: Mapping[str, Mapping[str, Any]] = {
    "latest": {"mean": "latest", "variance": "latest", "affine": "latest"},
    "stale": {"mean": "stale"},
    "channel": {"statistic": "channel"},
    "phases": {"statistic": "phases"},
    "taps": {},
    "taps+rescaled": {"variance": "rescaled"},
    "taps+latest": {"variance": "latest"},
    "anew": {"mean": "stale"},
}
# experiences of a task
GROUPS = {"caltech101": 10, "sign_digits": 5}


class Readings:
    """A bank for each way to read a network that is being tuned."""

    def __init__(self, learner: TaskLearner, size: int) -> None:
        self.learner, body = learner, learner.tuned.body
        pairing = find_pairs(body, torch.rand(2, 3, size, size))
        self.banks = {name: StatisticsBank(body, pairing, **settings) for name, settings in READINGS.items()}

    def record(self, experience: Experience) -> None:
        """Records an experience that was just learnt."""
        for bank in self.banks.values():
            bank.record(str(experience.index), self._batches(experience))

    def record_anew(self, experience: Experience) -> None:
        """Measures the statistics of an earlier experience again, with its own gains and shifts."""
        bank = self.banks["anew"]
        with bank.activate(str(experience.index)):
            again = StatisticsBank(bank.network, bank.pairing, **READINGS["anew"])
            again.record(str(experience.index), self._batches(experience))
        bank.records |= again.records

    def accuracy(self, name: str, experience: Experience) -> float:
        """Returns the test accuracy on one experience, read in one way."""
        assert experience.test is not None
        self.learner.guard, guard = Normalising(self.banks[name]), self.learner.guard
        try:
            return accuracy(self.learner, experience.test, experience.classes)
        finally:
            self.learner.guard = guard

    def _batches(self, experience: Experience) -> Iterator[torch.Tensor]:
        per_epoch = experience.num_steps // experience.epochs
        for x, _ in experience.batches(experience.num_steps - per_epoch):
            if len(x) == min(experience.batch_size, len(experience.train)):
                yield self.learner.prepare(x)


def measured(learner: TaskLearner, stream: Stream, size: int) -> dict[str, float]:
    """Returns the mean accuracy of experiences when they were learnt, and at the end in each reading."""
    began, readings = time.perf_counter(), Readings(learner, size)
    learnt, kernels = [], {}
    for experience in stream:
        learner.begin(experience)
        for x, y in experience.batches():
            learner.observe(x, y)
        learner.end(experience)
        readings.record(experience)
        learnt.append(readings.accuracy("latest", experience))
        kernels = kernels or {n: p.clone() for n, p in learner.tuned.body.state_dict().items() if p.ndim > 1}
    for experience in stream:
        readings.record_anew(experience)
    now = learner.tuned.body.state_dict()
    metrics = {
        "learnt": statistics.mean(learnt),
        # how far kernels went after the first experience, in norms of what they were then
        "drift": statistics.mean(float((now[name] - p).norm() / p.norm()) for name, p in kernels.items()),
    }
    for name in READINGS:
        metrics[name] = statistics.mean(readings.accuracy(name, experience) for experience in stream)
    return metrics | {"seconds": time.perf_counter() - began}


def once(journal: Journal, task: pt.Task, run: dict[str, Any], args: argparse.Namespace) -> Mapping[str, float]:
    """Returns the metrics of one run, from the journal where it is there."""
    if run not in journal:
        # a setting is chosen where the test images cannot be seen at all
        train, test = (task.train, task.val) if run["phase"] == "choose" else (task.joined().train, task.test)
        transform = pt.Transform({"input_size": (3, args.size, args.size), "crop_pct": 1.0})
        stream = class_incremental(
            Pixels(train, transform),
            Pixels(test, transform),
            num_experiences=GROUPS[run["task"]],
            order=run["seed"],
            batch_size=args.batch_size,
            epochs=args.epochs,
            seed=run["seed"],
        )
        learner = TRAININGS[run["training"]][0](
            cifar_resnet(run["depth"], args.data / "weights"),
            **run["settings"],
            prepare=transform.normalize,
            input_size=(3, args.size, args.size),
            seed=run["seed"],
        )
        try:
            journal.add(run, measured(learner, stream, args.size))
        except DivergedError:
            journal.add(run, dict.fromkeys((*READINGS, "learnt", "drift"), 0.0))
    return journal[run]


def run_all(journal: Journal, args: argparse.Namespace) -> None:
    """Runs what is not in the journal yet: one training of all seeds for each setting that some reading chose."""
    for name, depth, training in itertools.product(args.tasks.split(","), args.depths, args.trainings.split(",")):
        task = pt.open_task(args.data / "tasks" / f"{name}.npz")
        grid = {**TRAININGS[training][1], **({"lr": tuple(args.rates)} if args.rates else {})}
        options = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        common = {"task": name, "depth": depth, "training": training, "size": args.size, "epochs": args.epochs}
        common |= {"batch_size": args.batch_size}
        chosen = [once(journal, task, common | {"settings": o, "seed": 0, "phase": "choose"}, args) for o in options]
        best = {reading: max(range(len(options)), key=lambda i: chosen[i][reading]) for reading in READINGS}
        for i, seed in itertools.product(sorted(set(best.values())), range(args.seeds)):
            run = common | {"settings": options[i], "seed": seed, "phase": "test"}
            metrics = once(journal, task, run, args)
            print(f"{name} ResNet-{depth} {training:8}seed {seed} {options[i]}", dict(metrics), flush=True)


def table(journal: Journal) -> str:
    """Returns final test accuracies as Markdown, a table a task and depth: a row a way to read, a column one to train.

    Each cell is read from the runs of the setting that did best on validation images when read this way. `learnt` is
    the accuracy right after an experience, and `drift` how far kernels went since the first one, in percent, both of
    the setting of the row `latest`. A cell whose setting has not been run on test is empty.
    """
    cells: dict[tuple[str, int], dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, float]]]]] = {}
    for run, metrics in journal.runs():
        group = cells.setdefault((run["task"], run["depth"]), {})
        group.setdefault((run["training"], run["phase"]), []).append((run, metrics))
    return "\n\n".join(f"{task}, ResNet-{depth}\n\n{_of_one(group)}" for (task, depth), group in cells.items())


def _of_one(cells: Mapping[tuple[str, str], list[tuple[dict[str, Any], dict[str, float]]]]) -> str:
    trainings = [training for training in TRAININGS if (training, "test") in cells]
    lines = [f"| | {' | '.join(trainings)} |", "|---|" + "---:|" * len(trainings)]
    for metric in (*READINGS, "learnt", "drift"):
        row, reading = [metric], metric if metric in READINGS else "latest"
        for training in trainings:
            tried = cells[training, "choose"]
            best = max(tried, key=lambda item: item[1][reading])[0]["settings"]
            found = [m[metric] for run, m in cells[training, "test"] if run["settings"] == best]
            row.append(mean_and_spread(found) if found else "")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with tasks/ and weights/")
    options.add_argument("--tasks", default=",".join(GROUPS))
    options.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    options.add_argument("--trainings", default=",".join(TRAININGS))
    options.add_argument("--size", type=int, default=48, help="side of an image [pixels]")
    options.add_argument("--epochs", type=int, default=25)
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--rates", type=float, nargs="+", help=f"learning rates to choose from [{RATES}]")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path("runs/confit.jsonl"))
    options.add_argument("--known", action="store_true", help="run nothing: print what --out has")
    args = options.parse_args()
    journal = Journal(args.out)
    if not args.known:
        run_all(journal, args)
    print(table(journal))


if __name__ == "__main__":
    main()
