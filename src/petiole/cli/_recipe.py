"""The options of `petiole fit` that say how to train, and published recipes as their defaults."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any

import typer

from ..errors import FitError
from ..train.published import PUBLISHED, find  # recipes need no torch, so that help can show names and defaults
from ..train.recipe import Recipe
from ._options import TASK_HELP

DEFAULT_METHOD = "fact"


def _help(name: str, text: str) -> Any:
    """Returns an option whose help says what holds where neither the option nor a recipe says otherwise."""
    return typer.Option(help=f"{text} [default: {getattr(Recipe, name)}]")


Data = Annotated[str | None, typer.Argument(metavar="DATA", help=TASK_HELP)]
Published = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help=f"Method, settings and training of {', '.join(PUBLISHED)}; other options go before its values",
    ),
]
Row = Annotated[
    str | None,
    typer.Option("--task", help="Row of the recipe's table [default: the data's name]; without DATA also what to open"),
]
Epochs = Annotated[int | None, _help("epochs", "Passes over the training images")]
BatchSize = Annotated[int | None, _help("batch_size", "Images per step, over all processes")]
LearningRate = Annotated[float | None, _help("lr", "Peak learning rate")]
WeightDecay = Annotated[float | None, _help("weight_decay", "AdamW's weight decay")]
WarmupEpochs = Annotated[int | None, _help("warmup_epochs", "Epochs of warm-up, at most a tenth of the run")]
DropPath = Annotated[
    float | None, typer.Option(help="Stochastic depth rate [default: the recipe's, else the backbone's own]")
]
LabelSmoothing = Annotated[float | None, _help("label_smoothing", "Share of the target spread over all classes")]
Precision = Annotated[str | None, _help("precision", "auto, fp32 or bf16")]
Select = Annotated[str | None, _help("select", "Weights to keep: best on validation, or last")]
EvalEvery = Annotated[int | None, _help("eval_every", "Epochs between two validations")]
Seed = Annotated[int | None, _help("seed", "Seed of splits, initial values, batch order, dropout and augmentation")]
Normalize = Annotated[
    str | None, _help("normalize", "Mean and deviation of the input: backbone, imagenet, half (0.5) or none")
]
Resize = Annotated[str | None, _help("resize", "How images get the input's size: backbone, squash or crop")]
Augment = Annotated[str | None, _help("augment", "What happens to training images: none or fgvc")]
TrainOn = Annotated[str | None, _help("train_on", "Splits to train on: train or train+val")]
Checkpoint = Annotated[
    bool | None,
    typer.Option(
        "--checkpoint",
        help="Compute every block again in the backward pass: less memory, more time [default: False]",
    ),
]


def read_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe's fields among a command's arguments, those that were given."""
    return {f.name: value for f in fields(Recipe) if (value := values.get(f.name)) is not None}


def build_recipe(name: str | None, given: Mapping[str, Any]) -> Recipe:
    """Returns a published recipe, or the default one, with what was given instead of its values.

    Raises:
        FitError: There is no such recipe, or a value is out of range.
    """
    return replace(Recipe() if name is None else find(name).recipe, **given)


def method_of(method: str | None, recipe: str | None) -> str:
    """Returns the method that was asked for, the recipe's or the default one.

    Raises:
        FitError: There is no such recipe, or it is of another method than was asked for.
    """
    if recipe is None:
        return method or DEFAULT_METHOD
    own = find(recipe).method
    if method not in (None, own):
        raise FitError(f"the recipe {recipe} is of the method {own}, not {method}: leave --method or --recipe out")
    return own


def source_of(data: str | None, row: str | None, recipe: str | None) -> str:
    """Returns what is to be opened: the data, or what `--task` names.

    Raises:
        FitError: Neither is given, or the row is not one of the recipe, or of no recipe.
    """
    if data is None and row is None:
        raise FitError("nothing to learn was given: pass DATA, e.g. `petiole fit photos/`, or --recipe and --task")
    if row is not None and recipe is None:
        raise FitError(f"--task {row} is the row of a recipe: add --recipe, or pass {row} as DATA")
    if row is not None and recipe is not None:
        find(recipe).settings_for(row)
    return str(row if data is None else data)


def recipe_words(name: str, row: str | None) -> list[str]:
    """Returns a recipe's settings of the method as `--set` takes them.

    Args:
        name: The recipe.
        row: Row of its table; None where a search is to choose what differs from row to row.

    Raises:
        FitError: The recipe's table has no such row.
    """
    entry = find(name)
    settings = entry.fixed() if row is None else entry.settings_for(row)
    return [f"{key}={','.join(v) if isinstance(v, tuple) else v}" for key, v in settings.items()]
