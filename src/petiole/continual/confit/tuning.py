"""Fine-tuning on experience after experience: one loop, with an exchangeable guard of what was learnt before."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.prove import eval_mode
from ...errors import DivergedError, FitError
from ..growing import positions
from ..heads import choose
from ..learner import Learner
from ..streams import Experience
from .network import TaskNetwork

Batches = Iterator[tuple[Tensor, Tensor]]


class Guard:
    """What protects earlier experiences while a network is tuned to a new one; this one protects nothing."""

    def begin(self, tuned: TaskNetwork) -> None:
        """Prepares for an experience, before it gets its head."""

    def penalty(self, tuned: TaskNetwork, x: Tensor, features: Tensor) -> Tensor | float:
        """Returns what is added to the cross-entropy of a step.

        Args:
            tuned: The network; the new head is its last.
            x: Inputs of the step, as the network takes them.
            features: Its features of them `[B, d]`.
        """
        return 0.0

    def end(self, tuned: TaskNetwork, batches: Batches) -> None:
        """Concludes an experience.

        Args:
            tuned: The network.
            batches: One pass over the experience: inputs, as the network takes them, and rows of the last head.
        """

    def reading(self, index: int) -> AbstractContextManager[None]:
        """Returns a context in which the network answers for an experience."""
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """Returns all that it keeps, as `Learner.state` does."""
        return {}

    def restore(self, tuned: TaskNetwork, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned."""


class TaskLearner(Learner):
    """Fine-tunes its own copy of a network on experience after experience, with a head for each.

    Plain SGD, without momentum and decay: what a step gives no gradient stays bit for bit as it is. An experience may
    be learnt in three stages: its head alone; then gains and shifts of the norms too; then everything. Batches that are
    smaller than the others are left out, for batch norms normalise with what is in a batch.

    It answers where it is told which experience a sample belongs to: `predict(x, among)` takes the head of the latest
    experience that has all labels of `among`. Without `among` it can answer while one experience has them all.

    Args:
        network: A model from inputs to features or logits; copied, and never written to. A linear map at its end is its
            classifier and is left out.
        lr: Learning rate.
        stages: Shares of an experience's steps after which norms and everything train, rising, from 0 to 1; (0, 0)
            trains everything from the start.
        prepare: From inputs as the stream gives them to what the network takes, e.g. `transform.normalize`; None where
            the stream gives that already.
        input_size: Size of one input that the network takes [pixels], to see how it is put together; others may follow.
        seed: Seed of dropout and of what a guard draws.

    Raises:
        FitError: A setting is out of range.
        BackboneError: The network does not give features `[B, d]`, or lacks what a guard needs.
    """

    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float,
        stages: Sequence[float],
        prepare: Callable[[Tensor], Tensor] | None,
        input_size: Sequence[int],
        seed: int,
    ) -> None:
        if not lr > 0:
            raise FitError(f"lr is above 0, got {lr}")
        if len(stages) != 2 or not 0 <= stages[0] <= stages[1] <= 1:
            raise FitError(f"stages are two rising shares from 0 to 1, of norms and of everything, got {list(stages)}")
        self.network, self.lr, self.stages, self.prepare = network, lr, list(stages), prepare
        self.input_size, self.seed = list(input_size), seed
        like = next(network.parameters())
        # no zero mean: what a map does not do with its weight alone shows in the mean
        example = torch.rand(2, *self.input_size, generator=torch.Generator().manual_seed(seed)).to(like)
        self.tuned = TaskNetwork(network, example)
        self.guard = self.make_guard(example)
        self.progress: dict[str, int] | None = None
        self._optimizer = self._start()

    @abstractmethod
    def make_guard(self, example: Tensor) -> Guard:
        """Returns what protects earlier experiences.

        Args:
            example: Inputs `[B, ...]` that the network takes.
        """

    def begin(self, experience: Experience) -> None:
        size = min(experience.batch_size, len(experience.train))
        if size < 2:
            raise FitError(f"fine-tuning with batch norms needs batches of at least 2 samples, got {size}")
        self.guard.begin(self.tuned)
        self.tuned.grow(experience.classes)
        noise = np.random.SeedSequence((self.seed, len(self.tuned.classes))).generate_state(1)
        self.progress = {
            "step": 0,
            "num_steps": experience.num_steps,
            "batch_size": size,
            "noise": int(noise[0]) << 20,
        }
        self._optimizer = self._start()

    def observe(self, x: Tensor, y: Tensor) -> None:
        if self.progress is None:
            raise FitError(f"{type(self).__name__} must be told where experiences begin: call begin(experience) first")
        x, step = self._prepared(x), self.progress["step"]
        self.progress["step"] += 1
        if len(y) < self.progress["batch_size"]:
            return
        index, rows = len(self.tuned.classes) - 1, self._rows(y)
        norms, everything = (step >= int(share * self.progress["num_steps"]) for share in self.stages)
        self.tuned.set_trained(norms=norms, everything=everything)
        with self._noise(step):
            features = self.tuned.features(x)
            loss = F.cross_entropy(self.tuned.heads[index](features), rows)
            loss = loss + self.guard.penalty(self.tuned, x, features)
        if not math.isfinite(value := loss.item()):
            raise DivergedError(f"the loss is {value} at step {step} of experience {index}: lower lr={self.lr:g}")
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def end(self, experience: Experience) -> None:
        assert self.progress is not None
        last = experience.num_steps - experience.num_steps // experience.epochs
        size = self.progress["batch_size"]
        batches = ((self._prepared(x), self._rows(y)) for x, y in experience.batches(last) if len(y) == size)
        self.guard.end(self.tuned, batches)
        self.progress = None

    @torch.no_grad()
    def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
        index = self.tuned.index_of(among)
        if index is None:
            return torch.full((len(x),), -1)
        with eval_mode(self.tuned), self.guard.reading(index):
            return choose(self.tuned(self._prepared(x), index), self.tuned.classes[index], among)

    def groups(self) -> Sequence[Sequence[int]]:
        return self.tuned.classes

    def state(self) -> dict[str, Any]:
        progress = None if self.progress is None else dict(self.progress)
        return {"network": self.tuned.snapshot(), "progress": progress, "guard": self.guard.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.tuned.restore(state["network"])
        self.guard.restore(self.tuned, state["guard"])
        self.progress = None if state["progress"] is None else dict(state["progress"])
        self._optimizer = self._start()

    def _start(self) -> torch.optim.Optimizer:
        """Puts the network into training mode, and returns what takes its steps, which keeps no state of its own."""
        self.tuned.train()
        return torch.optim.SGD(self.tuned.parameters(), self.lr)

    def _prepared(self, x: Tensor) -> Tensor:
        x = x.to(self.tuned.device)
        if self.prepare is not None:
            return self.prepare(x)
        if not x.is_floating_point():
            raise FitError(f"the stream gives {x.dtype}, which no network takes: prepare=transform.normalize")
        return x

    def _rows(self, y: Tensor) -> Tensor:
        """Returns the row of each label in the last head `[B]`."""
        return positions(self.tuned.classes[-1], y).to(self.tuned.device)

    @contextmanager
    def _noise(self, step: int) -> Iterator[None]:
        """Lets what a network draws follow from seed, experience and step alone: one that goes on needs no state."""
        assert self.progress is not None
        device = self.tuned.device
        # reseeding by `torch.manual_seed` reaches every device there may be, and takes a quarter of a millisecond
        generator = torch.default_generator
        if device.type == "cuda":
            generator = torch.cuda.default_generators[device.index or 0]
        before = generator.get_state()
        generator.manual_seed(self.progress["noise"] + step)
        try:
            yield
        finally:
            generator.set_state(before)
