"""What `petiole compress` compares: a model by token budget, without and with its compensator."""

from collections.abc import Sequence
from pathlib import Path

from ..compressing import Elastic, compress
from ..core.adapted import Adapted
from ..core.plugin import Reducer
from ..errors import FitError, PluginError, TaskError, nearest
from ..joining import only
from ..nn.schedule import Budget, most_removed
from ..plugins.tocom import ToCom
from ..tasks import open_task
from ..tasks.cache import Pixels
from ..tasks.transform import Transform
from ..train.budgeting import SCALES, Measure, ScaleChoice, budget_for, choose_scale
from ..train.config import check
from ..train.progress import Progress
from ..train.tradeoffs import Candidate, TokenCounts, Tradeoff, compare
from . import _show

# how many budgets a plot has unless they are named
NUM_BUDGETS = 5
SPLITS = ("train", "val", "test")


class Images:
    """The splits a model is scored on, read when they are asked for.

    Args:
        data: What `open_task` takes, None to score nothing.
        split: The split to report; None for test, or val where there is no test.
        seed: Seed of the task's splits.
        model: The model.

    Raises:
        TaskError: The task cannot be read, or has no such split.
        FitError: The model has other classes.
    """

    def __init__(self, data: str | None, split: str | None, seed: int, model: Adapted) -> None:
        self.transform = Transform(model.input_config)
        self.task = None if data is None else open_task(data, seed=seed)
        self.split: str | None = None
        self.known: dict[str, Pixels] = {}
        if self.task is None:
            return
        check(model, self.task)
        has, self.split = [name for name in SPLITS if getattr(self.task, name) is not None], split
        if split is None:
            self.split = next(name for name in reversed(SPLITS) if name in has)
            if self.split != "test":
                _show.say(f"{self.task.name} has no test split: accuracies are those on {self.split}")
        elif split not in SPLITS:
            raise TaskError(f"no split is called {split!r}{nearest(split, SPLITS)}: choose train, val or test")
        elif split not in has:
            raise TaskError(f"{self.task.name} has no {split} split: choose {' or '.join(has)}")

    def pixels(self, split: str | None = None) -> Pixels | None:
        """Returns a split, by default the one to report; None where nothing is scored."""
        name = split or self.split
        if self.task is None or name is None:
            return None
        if name not in self.known:
            images = getattr(self.task, name)
            with Progress("reading images", len(images), is_aside=True) as bar:
                self.known[name] = Pixels(images, self.transform, progress=lambda done, total: bar.at(done))
        return self.known[name]


class Models:
    """One model at any token budget.

    Args:
        model: The model as it comes, perhaps with a budget and a compensator of its own.
        method: How tokens go; None for how they go in the model, else `tome`.
        compensator: File of another compensator; None for the model's own, if it has one.
        source: Budget of its training; None for what the model says, else 0.
        scale: Factor of the compensation; None for the compensator's own, until one is chosen.

    Raises:
        PluginError: Tokens cannot go in this backbone, the compensator does not know the source, or there is none and
            it has a source or scale.
        PluginFileError: The file is no compensator of this backbone.
    """

    def __init__(
        self, model: Adapted, method: str | None, compensator: Path | None, source: int | None, scale: float | None
    ) -> None:
        plugins = model.taps.plugins
        own = next((plugin for plugin in plugins if isinstance(plugin, ToCom)), None)
        self.had = next((plugin for plugin in plugins if isinstance(plugin, Reducer)), None)
        given = own if compensator is None else compensator
        if given is None and not (source is None and scale is None):
            raise PluginError("--source and --scale belong to a compensator, and there is none: name one with --tocom")
        self.method = method or ("tome" if self.had is None else self.had.method)
        settings = self.had.settings() if self.had is not None and self.had.method == self.method else {}
        self.settings = {key: value for key, value in settings.items() if key != "budget"}
        before = 0 if self.had is None else self.had.budget
        self.source: Budget = source if source is not None else before if own is None else own.source
        self.plain = model if own is None else only(model, *(p.method for p in plugins if not isinstance(p, ToCom)))
        self.compensator = None if given is None else self._find(given)
        self.is_scale_given = scale is not None
        self.scale = self.compensator.scale if scale is None and self.compensator is not None else scale

    def check(self, budgets: Sequence[Budget]) -> None:
        """Checks that the model can have these budgets, before the long work.

        Raises:
            PluginError: Tokens cannot go so, or the compensator does not know the budget.
        """
        for budget in budgets:
            self.without(budget)
            if self.is_compensated:
                self.compensated(budget)

    def without(self, budget: Budget) -> Adapted:
        """Returns the model at a budget, without the compensator."""
        return compress(self.plain, budget, method=self.method, **self.settings)

    def compensated(self, budget: Budget, scale: float | None = None) -> Adapted:
        """Returns the model at a budget with the compensator, at a scale or at the one that was chosen."""
        return self._compensated(budget, self.compensator, self.scale if scale is None else scale)

    @property
    def is_compensated(self) -> bool:
        """Whether there is a compensator that is not left off."""
        return self.compensator is not None and self.scale != 0

    def reference(self) -> Adapted:
        """Returns the model at the budget of its training, where there is nothing to compensate."""
        if self.source == (0 if self.had is None else self.had.budget):
            return self.plain
        if self.source != 0:
            return self.without(self.source)
        return only(self.plain, *(p.method for p in self.plain.taps.plugins if not isinstance(p, Reducer)))

    def find(self, speed_up: float, measure: Measure, where: str) -> int:
        """Returns the smallest budget that reaches a measured speed-up, and says what was measured."""
        _show.say(f"looking for the budget of a speed-up of {speed_up:g}, measured {where}")
        counts = TokenCounts.of(self.reference())
        most = most_removed(counts.left[0], counts.num_prefix, is_pruning=self.method == "evit")
        return budget_for(
            speed_up,
            self.reference(),
            self.without,
            self._within(most),
            measure=measure,
            progress=lambda budget, found: _show.say(f"budget {budget}: {found:.2f}x"),
        )

    def choose(self, budget: Budget, images: Images) -> ScaleChoice | None:
        """Chooses the scale on validation images, and says what came out; None where there is none to choose."""
        pixels = images.pixels("val") if self.needs_choice(images) else None
        if pixels is None or self.compensator is None:
            return None
        with Progress("choosing the scale", len(SCALES) + 1, is_aside=True) as bar:
            choice = choose_scale(
                lambda scale: self.compensated(budget, scale), pixels, own=self.compensator.scale, progress=bar.at
            )
        self.scale = choice.scale
        found, off, name = choice.accuracies[choice.scale], choice.accuracies[0.0], f"{len(pixels)} validation images"
        if choice.scale:
            _show.say(f"scale {choice.scale:g}, chosen on {name}: {found:.2%}, without ToCom {off:.2%}")
        else:
            best = max(value for scale, value in choice.accuracies.items() if scale)
            _show.say(f"ToCom is left off: {best:.2%} at best on {name}, {off:.2%} without it")
        if images.split == "val":
            _show.say("the accuracies are on the images the scale was chosen on: new images are a fairer judge")
        return choice

    def needs_choice(self, images: Images) -> bool:
        """Whether the scale is chosen on a validation split.

        Raises:
            FitError: There is none.
        """
        if images.task is None or self.compensator is None or self.is_scale_given:
            return False
        if images.task.val is None:
            raise FitError(f"{images.task.name} has no validation split to choose a scale on: give one with --scale")
        return True

    def sweep(self) -> list[Budget]:
        """Returns constant budgets from 0 to the largest that every block can follow, evenly spaced."""
        counts = TokenCounts.of(self.reference())
        most = self._within((counts.left[0] - counts.num_prefix) // max(1, len(counts.left) - 1))
        return list(dict.fromkeys(round(i * most / (NUM_BUDGETS - 1)) for i in range(NUM_BUDGETS)))

    def candidates(self, budget: Budget, further: Sequence[Budget]) -> list[Candidate]:
        """Returns the model of the training first, then without and with the compensator at each budget.

        The budget that was asked for comes last.
        """
        found = [Candidate(self.source, self.reference())]
        for each in (*(b for b in further if b not in (budget, self.source)), budget):
            found.append(Candidate(each, self.without(each)))
            if self.is_compensated:
                model = self.compensated(each)
                found.append(Candidate(each, model, self.scale, Elastic(model)))
        return found

    def compare(
        self, budget: Budget, further: Sequence[Budget], pixels: Pixels | None, measure: Measure, where: str
    ) -> tuple[Adapted, list[Tradeoff]]:
        """Returns the model at the budget, and a row for each candidate: the reference first, that model last."""
        candidates = self.candidates(budget, further)
        _show.say(f"measuring the speed of {len(candidates)} models {where}")
        speeds = measure([candidate.timed for candidate in candidates])
        # after the speeds, which a moving bar would disturb
        with Progress("scoring models", len(candidates), is_aside=True) as bar:
            return candidates[-1].model, compare(candidates, speeds, pixels, progress=bar.at)

    def _within(self, most: int) -> int:
        return most if self.compensator is None else min(most, self.compensator.groups)

    def _find(self, given: ToCom | Path) -> ToCom:
        """Returns the compensator, once read and joined."""
        return next(p for p in self._compensated(0, given, None).taps.plugins if isinstance(p, ToCom))

    def _compensated(self, budget: Budget, compensator: ToCom | Path | None, scale: float | None) -> Adapted:
        source = self.source
        if not isinstance(source, int):
            raise FitError(
                f"the model was trained with the budget {source!r}, and a compensator goes between whole numbers of "
                "tokens: say which comes near with --source"
            )
        return compress(
            self.plain,
            budget,
            compensator=compensator,
            source=source,
            scale=scale,
            method=self.method,
            **self.settings,
        )
