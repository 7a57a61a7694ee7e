"""Trains an adapted model on a task."""

import time
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.adapted import Adapted
from ..tasks.augment import Augmented
from ..tasks.cache import Pixels
from ..tasks.task import Split, Task
from ..tasks.transform import Transform
from .config import check, configuration
from .evaluate import evaluate, num_trained
from .events import events, require
from .progress import Progress
from .recipe import Recipe
from .run import Run
from .steps import Steps
from .stop import Stop
from .world import World, find_world

Row = dict[str, float]
FROM_CODES = (
    "the model was read from codes, without the latent weights they were made of: training starts from the values the "
    "codes stand for. To go on exactly, save with latent=True, or continue the run in its folder"
)


@dataclass
class FitResult:
    """What a run came to.

    Args:
        metrics: Accuracies as shares, `best_epoch`, `seconds`, `trained_parameters`. `val_accuracy` and
            `test_accuracy` are of the weights that were kept, `last_*` of the last epoch.
        history: One row per epoch: `epoch`, `loss`, `lr`, and `val_accuracy` where it was measured.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)


def fit(
    model: Adapted,
    task: Task,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    tensorboard: bool = False,
    save_every: float = 60.0,
) -> FitResult:
    """Trains a model's plugins and head, keeps the weights that did best on validation, and scores them on test.

    The same call with the same `out` goes on where an earlier one was stopped, however it was stopped, and ends with
    the same weights bit for bit (one process, CPU); a finished run returns its result. Ctrl-C saves the state first.
    Under `accelerate launch` or `torchrun` every process takes its share of each batch, and the first one writes.

    Args:
        model: An adapted model with classes; trained in place, left in eval mode. Its `input_config` becomes what the
            recipe says, so that whatever uses the model or its file prepares images alike. If it was read from codes,
            a warning says that training starts from their values, as the latent weights were not kept.
        task: What to learn; its classes must be the model's.
        recipe: How to train.
        out: Run folder for `plugin.safetensors`, `metrics.jsonl`, `config.yaml` and the state; None keeps nothing.
        progress: Whether to show how far the run is, on stderr.
        tensorboard: Whether to write TensorBoard events into the run folder as well.
        save_every: Time between two writes of the state [s]: what a killed run can lose at the most.

    Raises:
        DivergedError: The loss is no longer finite.
        FitError: Model and task do not fit, or the run folder holds another run or cannot be written.
        TaskError: An image cannot be read.

    Example:
        >>> import petiole as pt
        >>> task = pt.open_task("digits")
        >>> model = pt.adapt(pt.backbone("micro"), pt.FacT(rank=4), classes=task.classes)
        >>> result = pt.fit(model, task, pt.Recipe(epochs=1), progress=False)
    """
    recipe = recipe or Recipe()
    check(model, task)
    if tensorboard:
        require()
    world = find_world(recipe.precision)
    is_shown = progress and world.rank == 0
    if recipe.drop_path is not None:
        model.set_drop_path(recipe.drop_path)
    if recipe.checkpoint:
        model.set_checkpointing(True)
    if recipe.train_on == "train+val":
        task = task.joined()
    model.input_config = model.input_config | recipe.input_config(model.view.input_config(model.backbone))
    model.to(world.device)
    if model.holds_codes:
        warnings.warn(FROM_CODES, stacklevel=2)
        model.release()
    # every image is read before anything is written
    transform = Transform(model.input_config)
    train = _read_train(task.train, transform, recipe, is_shown)
    named = {"val": task.val, "test": task.test}
    splits = {n: _read(n, split, transform, is_shown) for n, split in named.items() if split is not None}
    run = None if out is None or world.rank else Run(Path(out))
    with torch.random.fork_rng(_devices(world)), closing(run) if run else nullcontext():
        state = world.first(lambda: None if run is None else run.open(configuration(model, task, recipe)))
        job = _Job(model, train, splits, recipe, world, run, state, save_every)
        folder = run.folder / "tensorboard" if run and tensorboard and not job.is_done else None
        title = " + ".join(type(plugin).__name__ for plugin in model.taps.plugins) or "head"
        bar = Progress(title, job.steps.total, is_shown=is_shown, num_notes=recipe.epochs)
        with bar, events(folder, len(job.record.history)) as event:
            result = job.run_to_end(bar, event)
    world.release()
    return result


@dataclass
class _Record:
    """How far a run is, what it has seen, and the best weights so far; begins with nothing."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    history: list[Row] = field(default_factory=list)
    best: dict[str, Any] | None = None
    metrics: dict[str, float] | None = None


class _Job:
    """One run from wherever it is to its end."""

    def __init__(
        self,
        model: Adapted,
        train: Pixels | Augmented,
        splits: dict[str, Pixels],
        recipe: Recipe,
        world: World,
        run: Run | None,
        state: dict[str, Any] | None,
        save_every: float,
    ) -> None:
        self.model, self.splits, self.recipe, self.world = model, splits, recipe, world
        self.run, self.save_every = run, save_every
        self.steps = Steps(model, train, recipe, world)
        self.record = _Record()
        if state is not None:
            self.steps.restore(state)
            self.record = _Record(**{name: state[name] for name in asdict(_Record())})
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
            bar.at(self.steps.total, _words(record.history))
        elif record.step:
            bar.say(f"goes on after step {record.step} of {self.steps.total}")
        if record.metrics is None:
            self._train(bar, event)
            record.metrics = self._finish()
            self._save()
        self.model.eval()
        metrics = dict(record.metrics)
        if self.run:
            # without the wall clock, equal runs give equal files
            self.run.save_plugin(self.model, {key: value for key, value in metrics.items() if key != "seconds"})
        return FitResult(metrics, record.history)

    def _train(self, bar: Progress, event: Callable[[Row], None]) -> None:
        record, steps = self.record, self.steps
        with Stop() as stop:
            while record.step < steps.total:
                loss, num_images = steps.take(record.step)
                record.loss += loss * num_images
                record.step += 1
                if record.step % steps.per_epoch == 0:
                    event(self._close_epoch())
                bar.at(record.step, _words(record.history))
                is_due = time.monotonic() - self.saved >= self.save_every
                if is_due or stop.is_asked or record.step == steps.total:
                    self._save()
                if stop.is_asked:
                    raise KeyboardInterrupt

    def _close_epoch(self) -> Row:
        """Scores the epoch that just ended and returns its row of the history."""
        record, epoch = self.record, self.record.step // self.steps.per_epoch
        row: Row = {"epoch": epoch, "loss": record.loss / len(self.steps.train), "lr": self.steps.lr()}
        record.loss = 0.0
        is_due = epoch == self.recipe.epochs or epoch % self.recipe.eval_every == 0
        if is_due and (scores := self._score("val")):
            row |= scores
            # of equally good epochs, the later one has trained longer
            if record.best is None or row["val_accuracy"] >= record.best["val_accuracy"]:
                record.best = {"epoch": epoch, **scores, "weights": self.steps.weights()}
        record.history.append(row)
        if self.run:
            self.run.log(row)
        return row

    def _finish(self) -> dict[str, float]:
        """Scores the last epoch's and the kept weights on test, and leaves the kept ones in the model."""
        last = {key: value for key, value in self.record.history[-1].items() if key == "val_accuracy"}
        last |= self._score("test")
        best, kept, epoch = self.record.best, last, self.recipe.epochs
        if self._keeps_best and best is not None and best["epoch"] != epoch:
            self.steps.load(best["weights"])
            epoch, kept = best["epoch"], {"val_accuracy": best["val_accuracy"], **self._score("test")}
        return {
            "trained_parameters": num_trained(self.model),
            **{f"last_{key}": value for key, value in last.items()},
            **kept,
            "best_epoch": epoch,
            "seconds": round(self._seconds(), 1),
        }

    @property
    def _keeps_best(self) -> bool:
        return self.record.best is not None and self.recipe.select == "best"

    def _score(self, name: str) -> dict[str, float]:
        split = self.splits.get(name)
        if split is None:
            return {}
        return {f"{name}_accuracy": evaluate(self.model, split, self.world, seen=self.steps.seen(split)).accuracy}

    def _seconds(self) -> float:
        return self.record.seconds + time.monotonic() - self.began

    def _save(self) -> None:
        if self.run:
            record = {name: getattr(self.record, name) for name in asdict(_Record())}
            self.run.save({**record, **self.steps.state(), "seconds": self._seconds()})
        self.saved = time.monotonic()


def _read_train(split: Split, transform: Transform, recipe: Recipe, is_shown: bool) -> Pixels | Augmented:
    if recipe.augment == "none":
        return _read("train", split, transform, is_shown)
    with Progress("reading train images", len(split), is_shown=is_shown, is_aside=True) as bar:
        return Augmented(split, transform, recipe.seed, progress=lambda done, total: bar.at(done))


def _read(name: str, split: Split, transform: Transform, is_shown: bool) -> Pixels:
    with Progress(f"reading {name} images", len(split), is_shown=is_shown, is_aside=True) as bar:
        return Pixels(split, transform, progress=lambda done, total: bar.at(done))


def _devices(world: World) -> list[torch.device]:
    return [world.device] if world.device.type == "cuda" else []


def _words(history: list[Row]) -> str:
    """Returns the last epoch's numbers in words."""
    if not history:
        return ""
    row = history[-1]
    val = f", validation {row['val_accuracy']:.1%}" if "val_accuracy" in row else ""
    return f"epoch {row['epoch']:.0f}: loss {row['loss']:.3f}{val}"
