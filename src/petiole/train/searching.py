"""Chooses a method's settings on the validation split."""

import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..core.adapted import Adapted
from ..core.plugin import Plugin
from ..errors import DivergedError, FitError
from ..joining import adapt
from ..nn.weights import FULL
from ..tasks.task import Task
from .config import configuration
from .evaluate import num_trained
from .grids import Combination, Grid, combinations, fields_of, papers_grid, slug, words
from .loop import fit
from .progress import Progress
from .recipe import Recipe
from .record import SEARCH, Candidate, Record
from .world import find_world


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Args:
        method: The method's name.
        candidates: All candidates, in the order of the grid.
        chosen: The one with the best validation accuracy.
        recipe: How to train it: the recipe as it was given, with the chosen values of the fields that were searched.
    """

    method: str
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    recipe: Recipe

    def plugin(self) -> Plugin:
        """Returns a new plugin with the chosen settings."""
        return Combination(self.method, self.chosen.settings, self.recipe).plugin()

    def as_plain(self) -> dict[str, Any]:
        """Returns the chosen settings and all candidates as plain values."""
        return {"settings": self.chosen.settings, "candidates": [asdict(candidate) for candidate in self.candidates]}


def search(
    backbone: nn.Module,
    method: str,
    task: Task,
    grid: Grid | None = None,
    recipe: Recipe | None = None,
    *,
    epochs: int | None = None,
    head_bits: int = FULL,
    out: str | Path | None = None,
    progress: bool = True,
    save_every: float = 60.0,
) -> SearchResult:
    """Trains a method once for every combination of a grid and chooses the one that does best on validation.

    Every candidate sees the training split alone and is scored on validation once, after its last epoch; the task's
    test split is taken away before anything begins. Of equally good candidates the one with fewer trained parameters
    is chosen, then the one that comes first. A candidate whose loss is no longer finite has no score.

    Source: the protocol of Jie and Deng, 2022, arXiv 2207.07039, section 4, and 2023, arXiv 2212.03145, section 4:
    settings are searched on VTAB-1k's 800 training and 200 validation images.

    The same call with the same `out` goes on where an earlier one was stopped. A changed grid trains only what the
    earlier one did not.

    Args:
        backbone: A pretrained model, as `adapt` takes it; never written to.
        method: Name of the method, e.g. `fact`.
        task: What to learn; needs a validation split.
        grid: Setting of the method, or field of the recipe such as `lr`, -> values to try; one value alone fixes it.
            None takes the grid of the papers.
        recipe: How to train; `select`, `eval_every` and `train_on` do not matter here.
        epochs: Epochs of each candidate, with the schedule shortened to them; None for the recipe's.
        head_bits: Bits per weight of the head, as `adapt` takes them.
        out: Folder that gets a folder `search` with the record of all candidates; None keeps nothing.
        progress: Whether to show how far the search is, on stderr.
        save_every: Time between two writes of a candidate's state [s].

    Raises:
        PluginError: An unknown method or setting, or values it cannot take.
        FitError: The task has no validation split, every candidate failed, or the folder holds another search.

    Example:
        >>> import petiole as pt
        >>> task, recipe = pt.open_task("digits"), pt.Recipe(epochs=1)
        >>> found = pt.search(pt.backbone("micro"), "fact", task, {"scale": [1.0, 10.0]}, recipe, progress=False)
        >>> model = pt.adapt(pt.backbone("micro"), found.plugin(), classes=task.classes)
        >>> result = pt.fit(model, task, found.recipe, progress=False)
    """
    recipe = recipe or Recipe()
    if task.val is None:
        raise FitError(
            f"{task.name} has no validation split to choose settings on, and test images never serve for that"
        )
    length = recipe.epochs if epochs is None else epochs
    # nothing is scored before the end, and validation images are no training images
    short = replace(recipe, epochs=length, select="last", eval_every=max(1, length), train_on="train")
    plans = combinations(method, papers_grid(method) if grid is None else grid, short)
    job = _Search(backbone, replace(task, test=None), plans, short, head_bits, out, save_every, progress)
    candidates = job.run_to_end()
    scored = [i for i, candidate in enumerate(candidates) if candidate.val_accuracy is not None]
    if not scored:
        raise FitError(f"no candidate of the search has a score; {words(plans[0].settings)}: {candidates[0].failure}")
    best = min(scored, key=lambda i: (-(candidates[i].val_accuracy or 0.0), candidates[i].trained_parameters, i))
    chosen, among = candidates[best], f"best of {len(scored)} on validation"
    job.say(f"chose {words(chosen.settings)}: {chosen.val_accuracy:.1%}, {among}")
    return SearchResult(method, tuple(candidates), chosen, replace(recipe, **fields_of(chosen.settings)))


class _Search:
    """One search from wherever it is to its end."""

    def __init__(
        self,
        backbone: nn.Module,
        task: Task,
        plans: list[Combination],
        recipe: Recipe,
        head_bits: int,
        out: str | Path | None,
        save_every: float,
        progress: bool,
    ) -> None:
        assert task.test is None
        self.backbone, self.task, self.plans, self.recipe = backbone, task, plans, recipe
        self.head_bits = head_bits
        self.out, self.save_every, self.is_shown = out, save_every, progress
        self.world = find_world(recipe.precision)
        self.bar = Progress("search", len(plans), is_shown=progress and self.world.rank == 0)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self.bar.say(text)

    def run_to_end(self) -> list[Candidate]:
        """Returns what every combination came to; trains those that no record knows."""
        slugs = [slug(plan.settings) for plan in self.plans]
        # the first model is proven and trained; whoever takes it leaves nothing behind that would hold its memory
        ready = {slugs[0]: self._adapt(self.plans[0], prove=True)}
        record = None if self.out is None else Record(Path(self.out) / SEARCH)
        with closing(record) if record else nullcontext():
            # what all candidates have in common
            config = configuration(ready[slugs[0]], self.task, self.recipe)
            config["plugins"] = [{"method": self.plans[0].method}]
            known = self.world.first(lambda: {} if record is None else record.open(config))
            if num_known := sum(name in known for name in slugs):
                self.say(f"{num_known} of {len(slugs)} candidates are known")
            for i, (name, plan) in enumerate(zip(slugs, self.plans, strict=True), start=1):
                if name not in known:
                    self.say(f"candidate {i} of {len(slugs)}: {words(plan.settings)}")
                    known[name] = self._train(plan, ready.pop(name, None), record.folder(name) if record else None)
                    if record and self.world.rank == 0:
                        record.add(known[name])
                if record and self.world.rank == 0:
                    record.lighten(name)
        return [replace(known[name], settings=plan.settings) for name, plan in zip(slugs, self.plans, strict=True)]

    def _adapt(self, plan: Combination, *, prove: bool) -> Adapted:
        seed, bits = plan.recipe.seed, self.head_bits
        plugin, classes = plan.plugin(), self.task.classes
        return adapt(self.backbone, plugin, classes=classes, head_bits=bits, seed=seed, prove=prove)

    def _train(self, plan: Combination, model: Adapted | None, folder: Path | None) -> Candidate:
        """Trains one candidate; how far it is, is kept in the folder."""
        model = model or self._adapt(plan, prove=False)
        began = time.monotonic()
        try:
            result = fit(model, self.task, plan.recipe, out=folder, progress=self.is_shown, save_every=self.save_every)
        except DivergedError as error:
            self.say(f"no score: {error}")
            seconds = round(time.monotonic() - began, 1)
            return Candidate(plan.settings, num_trained(model), seconds, failure=str(error))
        metrics = result.metrics
        return Candidate(plan.settings, num_trained(model), metrics["seconds"], val_accuracy=metrics["val_accuracy"])
