"""Runs a model on fewer tokens, and changes how many while it serves."""

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import bundled
from .core.adapted import Adapted
from .core.plugin import Reducer
from .core.twin import twin
from .errors import PluginError
from .files import transplant
from .joining import adapt, refuse_tuned, rejoined
from .nn.schedule import Budget
from .plugins import METHODS, settings_of
from .plugins import method as build
from .plugins.tocom import ToCom

Compensator = ToCom | Adapted | str | os.PathLike[str]


def compress(
    model: Adapted | nn.Module,
    r: Budget = 8,
    *,
    compensator: Compensator | None = None,
    source: int | None = None,
    scale: float | None = None,
    method: str = "tome",
    **settings: Any,
) -> Adapted:
    """Returns a model that works on fewer and fewer tokens, with the same plugins and head. Nothing is trained.

    An earlier budget of the model is replaced. A compensator makes up for the difference between the budget of the
    model's training and this one; a model that has one keeps it.

    Args:
        model: An adapted model, or a backbone with its own classifier.
        r: Token budget: tokens that each block removes, or what else `ToMe` takes; 0 removes none. With a compensator
            a whole number up to its largest degree.
        compensator: File of `petiole distill`, model of `petiole.distill` or plugin, for the same backbone, which may
            have been tuned since; `"micro"` for the bundled one of the backbone `micro`. None for none, or for the one
            the model has.
        source: Budget the model was trained with, where there is a compensator; None for the budget that the model
            comes with, 0 without one.
        scale: Factor of the compensation; None for the compensator's own.
        method: How tokens go: `tome` merges, `evit` prunes.
        settings: Further settings of the method, e.g. `proportional=False`.

    Raises:
        BackboneError: No view walks the backbone.
        PluginError: Tokens cannot go in this backbone, a plugin of the model needs all of them, or the compensator
            does not know the budget.
        PluginFileError: The compensator's file is none, or belongs to another backbone.

    Example:
        >>> import petiole as pt
        >>> model = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=4), classes=["cat", "dog"])
        >>> fast = pt.compress(model, r=4)
    """
    if method in METHODS and "budget" not in settings_of(method):
        raise PluginError(f"{method} removes no tokens: choose tome or evit")
    reducer = build(method, budget=r, **settings)
    if not isinstance(model, Adapted):
        if compensator is None:
            return adapt(model, reducer)
        model = adapt(model)
    refuse_tuned(model, "has trained the backbone itself: compress what petiole.merge gives")
    plugins = model.taps.plugins
    had = [plugin.budget for plugin in plugins if isinstance(plugin, Reducer)]
    own = [plugin for plugin in plugins if isinstance(plugin, ToCom)]
    known = own[0] if own else None
    if compensator is not None:
        found = _find(compensator, model)
    elif known is not None:
        found = known.taken()
    elif source is not None or scale is not None:
        raise PluginError("source and scale belong to a compensator, and there is none: pass compensator")
    else:
        found = None
    kept = [plugin.taken() for plugin in plugins if not isinstance(plugin, Reducer | ToCom)]
    if found is None:
        return rejoined(model, [*kept, reducer])
    if source is None:
        source = known.source if known is not None else _degree(had[0]) if had else 0
    found.scale = found.scale if scale is None else scale
    found.set_degrees(source, _degree(r))
    return rejoined(model, [*kept, found, reducer])


class Elastic(nn.Module):
    """A compressed model whose token budget changes while it serves, in milliseconds.

    The compensator is folded into weights of q and v that belong to this model alone, anew for each budget, so that it
    adds nothing to a pass; everything else is shared with the model it was made from. What `petiole.merge` would fold
    beside it stays as it is. Change the budget between passes, not during one.

    Args:
        model: What `petiole.compress` returned.

    Raises:
        PluginError: The model has no token budget.

    Example:
        >>> import petiole as pt
        >>> fast = pt.compress(pt.adapt(pt.backbone("micro"), classes=["cat", "dog"]), r=8, compensator=pt.ToCom())
        >>> live = pt.Elastic(fast)
        >>> live.set_budget(4)
    """

    def __init__(self, model: Adapted) -> None:
        super().__init__()
        plugins = model.taps.plugins
        if not any(isinstance(plugin, Reducer) for plugin in plugins):
            raise PluginError("the model has no token budget that could change: make it by petiole.compress")
        self.base = model
        # copies, so that the model it was made from keeps its own degrees
        self.compensators = nn.ModuleList(copy.deepcopy(p) for p in plugins if isinstance(p, ToCom))
        names = {s.weight.name for plugin in self._compensators() for s in plugin.sites if s.weight is not None}
        own = twin(model.backbone, lambda name, owner: name in names).requires_grad_(False)
        self.folded = rejoined(model, [p.taken() for p in plugins if not isinstance(p, ToCom)], backbone=own)
        self.train(model.training)
        self._fold()

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits `[B, C]` for images `[B, 3, H, W]`."""
        return self.folded(images)

    @property
    def budget(self) -> Budget:
        """The token budget it runs on."""
        return self._reducer.budget

    def set_budget(self, r: Budget) -> None:
        """Changes the budget, from the next pass on.

        Raises:
            PluginError: The budget is none, or one that the compensator does not know. The model is then as before.
        """
        for plugin in self._compensators():
            plugin.set_degrees(plugin.source, _degree(r))
        self._reducer.set_budget(r)
        self._fold()

    @property
    def _reducer(self) -> Reducer:
        return next(plugin for plugin in self.folded.taps.plugins if isinstance(plugin, Reducer))

    def _compensators(self) -> list[ToCom]:
        return [plugin for plugin in self.compensators if isinstance(plugin, ToCom)]

    @torch.no_grad()
    def _fold(self) -> None:
        for plugin in self._compensators():
            for site in plugin.sites:
                weight, (down, up) = self.base.frozen(site)[0], plugin.factors(site)
                torch.addmm(weight, up, down, alpha=plugin.factor, out=self.folded.frozen(site)[0])


def _find(compensator: Compensator, model: Adapted) -> ToCom:
    """Returns a compensator that is free to join a model."""
    if isinstance(compensator, ToCom):
        return compensator.taken() if compensator.is_attached else compensator
    if isinstance(compensator, Adapted):
        found = compensator
    else:
        found = transplant(bundled.compensator() if str(compensator) == "micro" else compensator, model.backbone)
    for plugin in found.taps.plugins:
        if isinstance(plugin, ToCom):
            return plugin.taken()
    raise PluginError(f"{compensator} has no compensator: it is what petiole distill writes")


def _degree(budget: Budget) -> int:
    if not isinstance(budget, int):
        raise PluginError(
            f"a compensator goes between constant budgets, whole numbers of tokens that each block removes; got "
            f"{budget!r}"
        )
    return budget
