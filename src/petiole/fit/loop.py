"""Trains an adapted model on a task."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapted import Adapted
from ..core.plugin import Tuning
from ..errors import FitError
from ..files import save
from ..tasks.cache import Pixels
from ..tasks.task import Task
from ..tasks.transform import Transform
from .evaluate import evaluate, features, num_trained
from .progress import Progress
from .recipe import Recipe
from .run import PLUGIN, Run
from .world import World, find_world

# seconds between two writes of the state: what a killed run can lose at the most
SAVE_EVERY = 60.0


@dataclass
class FitResult:
    """What a run came to.

    Args:
        metrics: Accuracies as shares, `best_epoch`, `seconds`, `trained_parameters`. `val_accuracy` and
            `test_accuracy` are of the weights that were kept, `last_*` of the last epoch.
        history: One row per epoch: `epoch`, `loss`, `lr`, and `val_accuracy` where it was measured.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: Adapted,
    task: Task,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    tensorboard: bool = False,
) -> FitResult:
    """Trains a model's plugins and head, keeps the weights that did best on validation, and scores them on test.

    The same call with the same `out` goes on where an earlier one was stopped and ends with the same weights bit for
    bit (one process, CPU). Under `accelerate launch` or `torchrun` every process takes its share of each batch.

    Args:
        model: An adapted model with classes; trained in place, left in eval mode.
        task: What to learn; its classes must be the model's.
        recipe: How to train.
        out: Run folder for `plugin.safetensors`, `metrics.jsonl`, `config.yaml` and the state; None keeps nothing.
        progress: Whether to show how far the run is, on stderr.
        tensorboard: Whether to write TensorBoard events into the run folder as well.

    Raises:
        FitError: Model and task do not fit, the run folder holds another run, or the loss is no longer finite.

    Example:
        >>> import petiole as pt
        >>> task = pt.open_task("digits")
        >>> model = pt.adapt(pt.backbone("micro"), pt.FacT(rank=4), classes=task.classes)
        >>> result = pt.fit(model, task, pt.Recipe(epochs=1), progress=False)
    """
    recipe = recipe or Recipe()
    _check(model, task)
    world = find_world(recipe.precision)
    is_main = world.rank == 0
    run = None if out is None else _open(Path(out), _config(model, task, recipe), world)
    model.to(world.device)
    if recipe.drop_path is not None:
        model.view.set_drop_path(model.backbone, recipe.drop_path)
    transform = Transform(model.input_config)
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        job = _Job(model, Pixels(task.train, transform), recipe, world)
        val = None if task.val is None else Pixels(task.val, transform)
        state = (run.load() if run else None) or job.start()
        job.restore(state)
        bar = Progress(_title(model), job.total, is_shown=progress and is_main)
        with bar, _events(run if is_main else None, tensorboard) as event:
            saved = time.monotonic()
            while job.step < job.total:
                job.advance()
                if job.step % job.per_epoch == 0:
                    event(job.close_epoch(val))
                bar.at(job.step, job.note())
                if run and is_main and (time.monotonic() - saved > SAVE_EVERY or job.step == job.total):
                    run.save(job.state())
                    saved = time.monotonic()
        test = None if task.test is None else Pixels(task.test, transform)
        result = job.finish(val, test)
    if run and is_main:
        save(model, run.folder / PLUGIN, metrics=result.metrics)
    world.wait()
    return result


class _Job:
    """The moving parts of one run: network, optimiser, schedule, and the state they are in."""

    def __init__(self, model: Adapted, train: Pixels, recipe: Recipe, world: World) -> None:
        self.model, self.train, self.recipe, self.world = model, train, recipe, world
        self.trained = dict(model.trained())
        self.per_epoch = math.ceil(len(train) / recipe.batch_size)
        self.total = recipe.epochs * self.per_epoch
        optimizer = torch.optim.AdamW(self.trained.values(), recipe.lr, weight_decay=recipe.weight_decay)
        # where only the head is trained, the backbone's answer for an image never changes: compute it once
        self.features = features(model, train, world) if _is_head_only(model) else None
        assert model.head is not None
        net: nn.Module = model if self.features is None else model.head
        self.net, self.optimizer = world.prepare(net, optimizer)
        warmup = round(recipe.warmup * self.per_epoch)
        self.schedule = CosineLRScheduler(
            optimizer, max(1, self.total - warmup), lr_min=recipe.lr / 100, warmup_t=warmup,
            warmup_lr_init=recipe.lr / 1000, warmup_prefix=True, t_in_epochs=False,
        )  # fmt: skip
        self.raw = optimizer
        self.began = time.monotonic()

    def start(self) -> dict[str, Any]:
        """Returns the state before the first step."""
        return {"step": 0, "seconds": 0.0, "loss": 0.0, "history": [], "best": None, "trained": None, "optimizer": None}

    def restore(self, state: dict[str, Any]) -> None:
        """Puts network and optimiser into a saved state."""
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]
        self.history, self.best = list(state["history"]), state["best"]
        if state["trained"] is not None:
            self.load(state["trained"])
            self.raw.load_state_dict(state["optimizer"])

    def state(self) -> dict[str, Any]:
        """Returns all that `restore` needs."""
        return {
            "step": self.step,
            "seconds": self.seconds + time.monotonic() - self.began,
            "loss": self.loss,
            "history": self.history,
            "best": self.best,
            "trained": self.weights(),
            "optimizer": self.raw.state_dict(),
        }

    def weights(self) -> dict[str, Tensor]:
        """Returns a copy of everything trained."""
        return {name: p.detach().cpu().clone() for name, p in self.trained.items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Writes weights into the model."""
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(weights[name])

    def rows(self) -> list[int]:
        """Returns this process's share of the current batch.

        Order and noise depend only on the seed and the step, so a run that goes on needs no generator's state.
        """
        epoch, i = divmod(self.step, self.per_epoch)
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.train))
        batch = order[i * self.recipe.batch_size : (i + 1) * self.recipe.batch_size]
        # every process must take part with equally many images: what is left over waits for another epoch
        share = max(1, len(batch) // self.world.size)
        return [int(j) for j in np.resize(batch, share * self.world.size)[self.world.rank :: self.world.size]]

    def advance(self) -> None:
        """Takes one step."""
        rows = self.rows()
        noise = np.random.SeedSequence((self.recipe.seed, self.step, self.world.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(noise[0]))
        self.schedule.step_update(self.step)
        self.net.train()
        if self.features is None:
            images, labels = self.train.batch(rows)
            x = self.train.transform.normalize(images.to(self.world.device))
        else:
            x, labels = self.features[rows], self.train.labels[rows]
        with self.world.autocast():
            logits = self.net(x)
        loss = F.cross_entropy(
            logits.float(), labels.to(self.world.device), label_smoothing=self.recipe.label_smoothing
        )
        value = loss.item()
        if not math.isfinite(value):
            lr, epoch = self.raw.param_groups[0]["lr"], self.step // self.per_epoch + 1
            raise FitError(
                f"the loss became {value} at step {self.step + 1} (epoch {epoch}) with learning rate {lr:.1e}: "
                "lower the learning rate or the plugin's scale"
            )
        self.optimizer.zero_grad()
        self.world.backward(loss)
        self.optimizer.step()
        self.loss += value
        self.step += 1

    def close_epoch(self, val: Pixels | None) -> dict[str, float]:
        """Scores the epoch that just ended and returns its row of the history."""
        epoch = self.step // self.per_epoch
        row = {"epoch": epoch, "loss": self.loss / self.per_epoch, "lr": self.raw.param_groups[0]["lr"]}
        self.loss = 0.0
        is_last = epoch == self.recipe.epochs
        if val is not None and (is_last or epoch % self.recipe.eval_every == 0):
            row["val_accuracy"] = evaluate(self.model, val, self.world).accuracy
            if self.best is None or row["val_accuracy"] >= self.best["val_accuracy"]:
                self.best = {"epoch": epoch, "val_accuracy": row["val_accuracy"], "weights": self.weights()}
        self.history.append(row)
        return row

    def note(self) -> str:
        """Returns the last epoch's numbers in words."""
        if not self.history:
            return ""
        row = self.history[-1]
        val = f", validation {row['val_accuracy']:.1%}" if "val_accuracy" in row else ""
        return f"epoch {row['epoch']:.0f}: loss {row['loss']:.3f}{val}"

    def finish(self, val: Pixels | None, test: Pixels | None) -> FitResult:
        """Scores the last epoch and the kept weights on test, and leaves the kept ones in the model."""
        metrics: dict[str, float] = {"trained_parameters": num_trained(self.model)}
        metrics["seconds"] = round(self.seconds + time.monotonic() - self.began, 1)
        keeps_best = self.best is not None and self.recipe.select == "best"
        for prefix, is_kept in (("last_", False), ("", True)):
            if is_kept and keeps_best:
                self.load(self.best["weights"])
            for name, split in (("val", val), ("test", test)):
                if split is not None:
                    metrics[f"{prefix}{name}_accuracy"] = evaluate(self.model, split, self.world).accuracy
        metrics["best_epoch"] = self.best["epoch"] if keeps_best else self.recipe.epochs
        self.model.eval()
        return FitResult(metrics, self.history)


def _is_head_only(model: Adapted) -> bool:
    return all(not plugin.sites and not isinstance(plugin, Tuning) for plugin in model.taps.plugins)


def _title(model: Adapted) -> str:
    return " + ".join(type(plugin).__name__ for plugin in model.taps.plugins) or "head"


def _check(model: Adapted, task: Task) -> None:
    if model.classes is None:
        raise FitError("the model has no head of its own: adapt it with classes=task.classes")
    if len(model.classes) != len(task.classes):
        raise FitError(f"the model has {len(model.classes)} classes, the task {task.name} has {len(task.classes)}")


def _open(folder: Path, config: dict[str, Any], world: World) -> Run:
    """Returns the run's folder; the first process makes it before the others look."""
    run = Run(folder, config) if world.rank == 0 else None
    world.wait()
    return run or Run(folder, config)


def _config(model: Adapted, task: Task, recipe: Recipe) -> dict[str, Any]:
    """Returns everything that decides the outcome."""
    sizes = {name: len(split) for name in ("train", "val", "test") if (split := getattr(task, name)) is not None}
    return {
        "task": {"name": task.name, "classes": len(task.classes), **sizes},
        "backbone": model.view.identify(model.backbone),
        "plugins": [{"method": plugin.method, **plugin.settings()} for plugin in model.taps.plugins],
        "transform": Transform(model.input_config).config,
        "recipe": asdict(recipe),
    }


@contextmanager
def _events(run: Run | None, wanted: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    """Gives a function that writes a row of the history as TensorBoard events, or does nothing."""
    if run is None or not wanted:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FitError("TensorBoard events need an extra: pip install 'petiole[track]'") from error
    with SummaryWriter(run.folder / "tensorboard") as writer:

        def write(row: dict[str, float]) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, int(row["epoch"]))

        yield write
