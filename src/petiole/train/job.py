"""A run: steps, epochs, state and result."""

import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .descent import Descent
from .evaluate import num_trained
from .events import events
from .progress import Progress
from .run import Run
from .stop import Stop
from .world import World

Row = dict[str, float]


@dataclass
class FitResult:
    """What a run came to.

    Args:
        metrics: Scores as shares, `best_epoch`, `seconds`, `trained_parameters`. `val_accuracy` and `test_accuracy` are
            of the weights that were kept, `last_*` of the last epoch; captions have `cider` in place of `accuracy`.
        history: One row per epoch: `epoch`, `loss`, `lr`, and `val_accuracy` where it was measured.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)


@dataclass
class Record:
    """How far a run is, what it has seen, and the best weights so far; begins with nothing."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    history: list[Row] = field(default_factory=list)
    best: dict[str, Any] | None = None
    metrics: dict[str, float] | None = None


class Job:
    """One run from wherever it is to its end.

    Args:
        steps: What is trained, and how.
        splits: What is scored: `val` after an epoch, `test` at the end.
        run: Its folder; None keeps nothing.
        state: What the folder held; None for a new run.
        save_every: Time between two writes of the state [s].
    """

    def __init__(
        self,
        steps: Descent,
        splits: Mapping[str, Any],
        run: Run | None,
        state: Mapping[str, Any] | None,
        save_every: float,
    ) -> None:
        self.steps, self.splits, self.run, self.save_every = steps, splits, run, save_every
        self.model, self.recipe, self.world = steps.model, steps.recipe, steps.world
        self.criterion = f"val_{steps.criterion}"
        self.record = Record()
        if state is not None:
            self.steps.restore(state)
            self.record = Record(**{name: state[name] for name in asdict(Record())})
        self.began = self.saved = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether the result is known."""
        return self.record.metrics is not None

    def run_to_end(self, bar: Progress, event: Callable[[Row], None]) -> FitResult:
        """Trains what is left to train, keeps the right weights and writes the plugin file."""
        record = self.record
        if self.is_done:
            bar.say("this run is finished, there is nothing to train")
            bar.at(self.steps.total, self._words())
        elif record.step:
            bar.say(f"goes on after step {record.step} of {self.steps.total}")
        if record.metrics is None:
            self._train(bar, event)
            record.metrics = self.finish()
            self._save()
        self.model.eval()
        metrics = dict(record.metrics)
        if self.run:
            # without the wall clock, equal runs give equal files
            self.steps.keep(self.run, {key: value for key, value in metrics.items() if key != "seconds"})
        return FitResult(metrics, record.history)

    def _train(self, bar: Progress, event: Callable[[Row], None]) -> None:
        record, steps = self.record, self.steps
        with Stop() as stop:
            while record.step < steps.total:
                loss, num_samples = steps.take(record.step)
                record.loss += loss * num_samples
                record.step += 1
                if record.step % steps.per_epoch == 0:
                    event(self._close_epoch())
                bar.at(record.step, self._words())
                is_due = time.monotonic() - self.saved >= self.save_every
                if is_due or stop.is_asked or record.step == steps.total:
                    self._save()
                if stop.is_asked:
                    raise KeyboardInterrupt

    def _close_epoch(self) -> Row:
        """Scores the epoch that just ended and returns its row of the history."""
        record, epoch = self.record, self.record.step // self.steps.per_epoch
        row: Row = {"epoch": epoch, "loss": record.loss / self.steps.num_samples, "lr": self.steps.lr()}
        record.loss = 0.0
        is_due = epoch == self.recipe.epochs or epoch % self.recipe.eval_every == 0
        if is_due and (scores := self.score("val")):
            row |= scores
            # of equally good epochs, the later one has trained longer
            if record.best is None or row[self.criterion] >= record.best[self.criterion]:
                record.best = {"epoch": epoch, **scores, "weights": self.steps.weights()}
        record.history.append(row)
        if self.run:
            self.run.log(row)
        return row

    def finish(self) -> dict[str, float]:
        """Scores the last epoch's and the kept weights on test, and leaves the kept ones in the model."""
        last = {**_validation(self.record.history[-1]), **self.score("test")}
        best, kept, epoch = self.record.best, last, self.recipe.epochs
        if self._keeps_best and best is not None and best["epoch"] != epoch:
            self.steps.load(best["weights"])
            epoch, kept = best["epoch"], {**_validation(best), **self.score("test")}
        return {
            "trained_parameters": num_trained(self.model),
            **{f"last_{key}": value for key, value in last.items()},
            **kept,
            "best_epoch": epoch,
            "seconds": round(self.seconds(), 1),
        }

    @property
    def _keeps_best(self) -> bool:
        return self.record.best is not None and self.recipe.select == "best"

    def score(self, name: str) -> dict[str, float]:
        split = self.splits.get(name)
        return {} if split is None else {f"{name}_{key}": value for key, value in self.steps.score(split).items()}

    def seconds(self) -> float:
        return self.record.seconds + time.monotonic() - self.began

    def _words(self) -> str:
        """Returns the last epoch's numbers in words."""
        if not self.record.history:
            return ""
        row, is_share = self.record.history[-1], self.steps.criterion == "accuracy"
        val = f", validation {row[self.criterion]:{'.1%' if is_share else '.3f'}}" if self.criterion in row else ""
        return f"epoch {row['epoch']:.0f}: loss {row['loss']:.3f}{val}"

    def _save(self) -> None:
        if self.run:
            record = {name: getattr(self.record, name) for name in asdict(Record())}
            self.run.save({**record, **self.steps.state(), "seconds": self.seconds()})
        self.saved = time.monotonic()


def carry_out(
    make: Callable[[Run | None, Mapping[str, Any] | None], Job],
    config: Mapping[str, Any],
    world: World,
    out: Path | None,
    title: str,
    *,
    is_shown: bool,
    tensorboard: bool = False,
) -> FitResult:
    """Returns what a job came to that goes on wherever its folder says it is.

    Args:
        make: From the folder and the state it held, None where there is none, to the job.
        config: Everything that decides the outcome, as plain values.
        world: The processes; the first one writes.
        out: The folder; None keeps nothing.
        title: What the progress bar says.
        is_shown: Whether there is one.
        tensorboard: Whether to write TensorBoard events into the folder.

    Raises:
        FitError: The folder holds another run, is in use, or cannot be written.
    """
    run = None if out is None or world.rank else Run(out)
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices), closing(run) if run else nullcontext():
        job = make(run, world.first(lambda: None if run is None else run.open(config)))
        folder = run.folder / "tensorboard" if run and tensorboard and not job.is_done else None
        bar = Progress(title, job.steps.total, is_shown=is_shown, num_notes=job.recipe.epochs)
        with bar, events(folder, len(job.record.history)) as event:
            result = job.run_to_end(bar, event)
    world.release()
    return result


def _validation(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the scores on validation among others."""
    return {key: value for key, value in row.items() if key.startswith("val_")}
