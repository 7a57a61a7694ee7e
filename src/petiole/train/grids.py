"""Which settings a search tries: the papers' grids, and every combination of a grid as something to train.

Source of `GRIDS`: what the papers searched on VTAB-1k, trained on 800 images and scored on 200. `convpass` is of Jie
and Deng, 2022, arXiv 2207.07039; `fact` of Jie and Deng, 2023, arXiv 2212.03145; `adaptformer` and `lora` of Jie, Wang
and Deng, 2023, arXiv 2307.16867; `repadapter` of Luo et al., 2023, arXiv 2302.08106, the authors' scripts; `vpt` and
`full` of Jia et al., 2022, arXiv 2203.12119, with the learning rates of AdamW there. The other rows are petiole's own:
`adapter` takes AdaptFormer's scales, and methods without a setting worth a search take learning rates from the
recipe's upwards, since few trained numbers bear larger steps.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..core.plugin import Plugin
from ..errors import FitError, PluginError
from ..plugins import METHODS, settings_of
from ..plugins import method as make
from .recipe import Recipe

Grid = Mapping[str, Sequence[Any]]

_SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
_RATES = (1e-3, 3e-3, 1e-2)

# method -> setting, or field of the recipe -> values
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "adapter": {"scale": _SCALES},
    "adaptformer": {"scale": _SCALES},
    "bitfit": {"lr": _RATES},
    "convpass": {"scale": _SCALES, "init": ("xavier", "dirac")},
    "fact": {"rank": (1, 2, 4, 8, 16), "scale": _SCALES},
    "full": {"lr": (1e-4, 5e-4, 1e-3, 5e-3)},
    "layernorm": {"lr": _RATES},
    "linear": {"lr": _RATES},
    "lora": {"scale": _SCALES},
    "repadapter": {"scale": (0.1, 0.5, 1.0, 5.0, 10.0)},
    "ssf": {"lr": _RATES},
    "vpt": {"num_prompts": (1, 5, 10, 50, 100, 200)},
}
# the ranks of "fact" are those of the tensor train; of the Tucker form the paper searched these
_TK_RANKS = (2, 4, 8, 16, 32)
# what a grid may vary in the recipe, and an example of each value's type: nothing that decides what is measured
RECIPE_AXES: dict[str, Any] = {
    "batch_size": 64, "drop_path": 0.1, "label_smoothing": 0.1, "lr": 1e-3, "warmup_epochs": 10, "weight_decay": 1e-4,
}  # fmt: skip


def papers_grid(method: str, changes: Grid | None = None) -> dict[str, Sequence[Any]]:
    """Returns a method's grid from `GRIDS`, with some axes set or replaced; one value alone fixes a setting.

    Raises:
        PluginError: An unknown method.
        FitError: No grid is known for the method, and none is given.
    """
    _check(method)
    changes = changes or {}
    if method not in GRIDS and not changes:
        raise FitError(f"no grid of settings is known for {method}: name settings and their values")
    grid: dict[str, Sequence[Any]] = {**GRIDS.get(method, {})}
    if method == "fact" and [*changes.get("form", ())] == ["tk"]:
        grid["rank"] = _TK_RANKS
    return {**grid, **changes}


@dataclass(frozen=True)
class Combination:
    """One combination of a grid.

    Args:
        method: The method's name.
        settings: Setting or field of the recipe -> its value.
        recipe: How it is trained.
    """

    method: str
    settings: dict[str, Any]
    recipe: Recipe

    def plugin(self) -> Plugin:
        """Returns a new plugin.

        Raises:
            PluginError: The settings contradict each other.
        """
        own = {name: value for name, value in self.settings.items() if name not in fields_of(self.settings)}
        return make(self.method, **own)


def combinations(method: str, grid: Grid, recipe: Recipe) -> list[Combination]:
    """Returns every combination of a grid, the last axis fastest; each is checked, and none comes twice.

    Raises:
        PluginError: An unknown method or setting, or values a plugin cannot take.
        FitError: An axis without values, or values a recipe cannot take.
    """
    _check(method)
    known = known_axes(method)
    for name, values in grid.items():
        if name not in known:
            raise PluginError(
                f"{method} has no setting {name!r} that a search could vary: there are {', '.join(known)}"
            )
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise FitError(f"{name} needs a list of values to try, got {values!r}")
    found: dict[str, Combination] = {}
    for values in product(*grid.values()):
        settings = {name: _plain(value, known[name]) for name, value in zip(grid, values, strict=True)}
        changed = replace(recipe, **fields_of(settings))
        combination = Combination(method, settings, changed)
        combination.plugin()
        found.setdefault(slug(settings), combination)
    return [*found.values()]


def fields_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a combination's settings that are fields of the recipe."""
    return {name: value for name, value in settings.items() if name in RECIPE_AXES}


def known_axes(method: str) -> dict[str, Any]:
    """Returns what a grid of the method may vary: its settings with their defaults, then fields of the recipe."""
    settings = settings_of(method)
    return settings | {name: like for name, like in RECIPE_AXES.items() if name not in settings}


def words(settings: Mapping[str, Any]) -> str:
    """Returns settings as a person writes them: `rank=8, scale=10`."""
    return ", ".join(f"{name}={text(value)}" for name, value in settings.items()) or "the defaults"


def text(value: Any) -> str:
    """Returns a setting's value as a person writes it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return "+".join(map(text, value)) if isinstance(value, list | tuple) else str(value)


def slug(settings: Mapping[str, Any]) -> str:
    """Returns settings as the name of a folder, the same in whichever order they come: `rank=8,scale=10`."""
    whole = ",".join(f"{name}={text(settings[name])}" for name in sorted(settings)) or "defaults"
    plain = re.sub(r"[^\w.=,+-]", "-", whole)[:120]
    # what was cut or replaced must not make two settings one
    return plain if plain == whole else f"{plain}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _check(method: str) -> None:
    if method not in METHODS:
        make(method)  # raises, and says which there are


def _plain(value: Any, like: Any) -> Any:
    """Returns a value of a grid as JSON keeps it; a whole number where a setting takes any number becomes one."""
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(like, float) and math.isfinite(value):
        return float(value)
    return list(value) if isinstance(value, tuple) else value
