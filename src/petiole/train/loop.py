"""Trains an adapted model on a task."""

import warnings
from pathlib import Path

from ..core.adapted import Adapted
from ..tasks.augment import Augmented
from ..tasks.cache import Pixels
from ..tasks.task import Split, Task
from ..tasks.transform import Transform
from .config import check, configuration
from .events import require
from .job import FitResult, Job, carry_out
from .progress import Progress
from .recipe import Recipe
from .steps import Steps
from .world import find_world

FROM_CODES = (
    "the model was read from codes, without the latent weights they were made of: training starts from the values the "
    "codes stand for. To go on exactly, save with latent=True, or continue the run in its folder"
)


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
    train = read_train(task.train, transform, recipe, is_shown)
    named = {"val": task.val, "test": task.test}
    splits = {n: read_split(n, split, transform, is_shown) for n, split in named.items() if split is not None}
    return carry_out(
        lambda run, state: Job(Steps(model, train, recipe, world), splits, run, state, save_every),
        configuration(model, task, recipe),
        world,
        None if out is None else Path(out),
        " + ".join(type(plugin).__name__ for plugin in model.taps.plugins) or "head",
        is_shown=is_shown,
        tensorboard=tensorboard,
    )


def read_train(split: Split, transform: Transform, recipe: Recipe, is_shown: bool) -> Pixels | Augmented:
    if recipe.augment == "none":
        return read_split("train", split, transform, is_shown)
    with Progress("reading train images", len(split), is_shown=is_shown, is_aside=True) as bar:
        return Augmented(split, transform, recipe.seed, progress=lambda done, total: bar.at(done))


def read_split(name: str, split: Split, transform: Transform, is_shown: bool) -> Pixels:
    with Progress(f"reading {name} images", len(split), is_shown=is_shown, is_aside=True) as bar:
        return Pixels(split, transform, progress=lambda done, total: bar.at(done))
