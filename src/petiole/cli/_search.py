"""What `petiole fit` does before it trains when settings are searched."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import nearest
from . import _show
from ._options import read_settings, read_value

if TYPE_CHECKING:
    from torch import nn

    from ..tasks import Task
    from ..train.grids import Grid
    from ..train.recipe import Recipe
    from ..train.searching import SearchResult

IsSearch = Annotated[
    bool, typer.Option("--search", help="First choose settings on validation, from the grid of the papers")
]
GridAxes = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        "-g",
        help="key=value,value,... to search, a setting of the method or e.g. lr; in place of the papers' values; "
        "repeatable; implies --search",
    ),
]
SearchEpochs = Annotated[
    int | None,
    typer.Option(
        help="Epochs of each candidate, its whole schedule shortened to them: faster, but what does best in a short "
        "run need not in a long one; implies --search [default: those of the final training]"
    ),
]


def choose(
    backbone: "nn.Module",
    method: str,
    task: "Task",
    grid: "Grid",
    recipe: "Recipe",
    folder: Path,
    epochs: int | None,
    head_bits: int,
    save_every: float,
    shows_table: bool,
) -> "SearchResult":
    """Searches a method's settings and readies the run folder for the model with the chosen ones.

    Args:
        backbone: What is adapted.
        method: The method's name.
        task: What to learn.
        grid: What `read_grid` returned.
        recipe: How to train the final model.
        folder: Its run folder.
        epochs: Epochs of each candidate, None for the recipe's.
        head_bits: Bits per weight of the head.
        save_every: Time between two writes of a candidate's state [s].
        shows_table: Whether to print the candidates.

    Raises:
        FitError: The folder holds a run that no search has led to, or the search fails.
    """
    from ..errors import FitError
    from ..train.record import SEARCH, make_room
    from ..train.run import CONFIG
    from ..train.search_report import candidate_columns, candidate_rows
    from ..train.searching import search

    # found out now, not after hours
    if (folder / CONFIG).exists() and not (folder / SEARCH / CONFIG).exists():
        raise FitError(f"{folder} holds a run without a search: choose another folder with --out, or remove this one")
    found = search(
        backbone, method, task, grid, recipe, epochs=epochs, head_bits=head_bits, out=folder, save_every=save_every
    )
    if os.environ.get("RANK", "0") == "0":
        if aside := make_room(folder, found.chosen.settings):
            _show.say(f"the model with the settings that were chosen before is now in {aside}")
        if shows_table:
            _show.table(candidate_columns(found), candidate_rows(found))
    return found


def read_grid(
    method: str, settings: list[str], axes: list[str], given: Collection[str], recipe: "Recipe"
) -> dict[str, Any]:
    """Returns what is searched: the papers' grid, changed by `--grid`, without what is fixed.

    Args:
        method: The method's name.
        settings: What `--set` fixes.
        axes: What `--grid` searches.
        given: Fields of the recipe that an option fixes.
        recipe: How to train the final model.

    Raises:
        PluginError: An unknown method or setting, or values it cannot take.
        FitError: Values the recipe cannot take, or nothing is left to search.
    """
    from ..errors import FitError, PluginError
    from ..train.grids import combinations, papers_grid

    fixed = read_settings(method, settings)
    varied = {}
    for axis in axes:
        key, equals, text = axis.partition("=")
        if not equals:
            raise PluginError(f"--grid takes key=value,value,..., e.g. --grid scale=0.1,1,10; got {axis!r}")
        varied[key] = _values(method, key, text)
        if key in fixed or key in given:
            raise PluginError(f"--grid searches {key}, and another option fixes it: name it once")
    grid = papers_grid(method, {key: [value] for key, value in fixed.items()} | varied)
    grid = {key: values for key, values in grid.items() if key in varied or key not in given}
    if all(len(values) == 1 for values in grid.values()):
        raise FitError(f"nothing is left to search for {method}: name values with --grid, or leave --search out")
    combinations(method, grid, recipe)  # a value that cannot be is found before anything is built
    return grid


def _values(method: str, key: str, text: str) -> list[Any]:
    """Returns the values of an axis; a value that is a list itself is written as YAML, `[[q,v],[q]]`."""
    import yaml

    from ..errors import PluginError
    from ..train.grids import RECIPE_AXES, known_axes

    known = known_axes(method)
    if key not in known:
        own = [name for name in known if name not in RECIPE_AXES]
        has = f"it has {', '.join(own)}" if own else "it has none"
        raise PluginError(
            f"{method} has no setting {key!r}{nearest(key, known)}: {has}; of the recipe, --grid takes "
            f"{', '.join(RECIPE_AXES)}"
        )
    parts = text.split(",")
    if text.lstrip().startswith("["):
        try:
            parts = [yaml.safe_dump(part, default_flow_style=True) for part in yaml.safe_load(text)]
        except yaml.YAMLError as error:
            raise PluginError(f"--grid {key} takes values between commas, or a YAML list; got {text!r}") from error
    hint = f"e.g. {known[key]}" if key in RECIPE_AXES else ""
    return [read_value(f"--grid {key}", part, known[key], hint) for part in parts]
