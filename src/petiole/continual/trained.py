"""Linear heads that are trained by gradients on features, and the ends of their scale.

FineTune   trained on the samples of each experience alone: what all others are to be better than
Joint      trained anew on all samples of all experiences: what the others approach
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DivergedError, FitError
from .growing import positions
from .heads import Features, Head, checked

# norm of a head's inputs over the square root of their width
NORM = 0.2

Loss = Callable[[Tensor, Tensor, int], Tensor]
"""From logits of a step `[b + r, k]`, their rows in the pool and the number b of samples of the experience."""


@dataclass(frozen=True)
class Pool:
    """What a head is trained on in an experience: its samples, then the exemplars from before.

    Args:
        x: Inputs `[n + m, d]`.
        y: Labels `[n + m]`.
        num_current: The n samples of the experience.
    """

    x: Tensor
    y: Tensor
    num_current: int


@dataclass(kw_only=True, eq=False)
class FineTune(Head):
    """A linear head trained on each experience's samples alone, from where the last one left it.

    Features are centred and brought to one norm, `0.2 sqrt(d)`; rows of new classes start from zero. Each experience
    has its own run of SGD, whose learning rate falls to zero along a cosine.

    Args:
        epochs: Passes over the samples of an experience.
        min_steps: Steps that an experience takes at least, by more passes, however few samples it has.
        batch_size: Samples a step; of an experience, and as many exemplars.
        lr: Learning rate at the start.
        momentum: Momentum of SGD.
        weight_decay: Weight decay; biases have none.
        mean: Centre of the features `[d]`, e.g. that of the data the backbone was pretrained on; None for the mean of
            the first experience.
        seed: Seed of the order of samples.
    """

    takes_experiences: ClassVar[bool] = True

    epochs: int = 20
    min_steps: int = 300
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    mean: Sequence[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        if self.epochs < 1 or self.batch_size < 1 or self.min_steps < 0:
            found = f"{self.epochs}, {self.batch_size} and {self.min_steps}"
            raise FitError(f"epochs and batch_size are at least 1 and min_steps at least 0, got {found}")
        if not self.lr > 0 or not 0 <= self.momentum < 1 or not self.weight_decay >= 0:
            found = f"{self.lr}, {self.momentum} and {self.weight_decay}"
            raise FitError(f"lr is above 0, momentum from 0 to below 1, weight_decay at least 0, got {found}")
        self._generator = torch.Generator().manual_seed(self.seed)
        self._weight = self._bias = self._centre = torch.empty(0)

    def partial_fit(self, features: Features, labels: Features | Sequence[int]) -> Self:
        x, y = checked(features, labels, self.d_in)
        # outside of the caller's inference mode, in which nothing could be trained
        with torch.inference_mode(False), torch.enable_grad():
            if len(x):
                self._meet(x, y)
                self._learn(x, y)
        return self

    def scores(self, features: Tensor) -> Tensor:
        return F.linear(self._inputs(features), self._weight, self._bias)

    def state(self) -> dict[str, Any]:
        tensors = {"weight": self._weight, "bias": self._bias, "centre": self._centre}
        return {"classes": self.classes, "d_in": self.d_in, **tensors, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.classes, self.d_in = list(state["classes"]), state["d_in"]
        self._weight, self._bias, self._centre = state["weight"], state["bias"], state["centre"]
        self._generator.set_state(state["generator"])

    def _learn(self, x: Tensor, y: Tensor) -> None:
        """Learns an experience, whose classes have rows by now."""
        pool = Pool(self._inputs(x), y, len(x))
        self._train(pool, torch.arange(len(self.classes)), lambda target: cross_entropy(target, 0.0))

    def _meet(self, x: Tensor, y: Tensor) -> None:
        """Adds rows for new classes; at first, also finds the centre."""
        if self.d_in is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            self._centre = x.to(dtype).mean(0) if self.mean is None else self._given_mean(x.to(dtype))
            self._weight, self._bias = self._centre.new_zeros(0, x.shape[1]), self._centre.new_zeros(0)
            self.d_in = x.shape[1]
        new = sorted(set(y.tolist()) - set(self.classes))
        self.classes = [*self.classes, *new]
        self._weight, self._bias = F.pad(self._weight, (0, 0, 0, len(new))), F.pad(self._bias, (0, len(new)))

    def _given_mean(self, x: Tensor) -> Tensor:
        mean = torch.as_tensor(self.mean, dtype=x.dtype, device=x.device)
        if mean.shape != x.shape[1:]:
            raise FitError(f"features of width {x.shape[1]} need a mean of that width, got one of {list(mean.shape)}")
        return mean

    def _inputs(self, features: Tensor) -> Tensor:
        """Returns features as the head sees them `[n, d]`: around the centre, and of one norm."""
        x = F.normalize(features.to(self._centre) - self._centre, dim=1)
        return x * (NORM * math.sqrt(x.shape[1]))

    def _rows(self, y: Tensor) -> Tensor:
        return positions(self.classes, y.to(self._weight.device))

    def _train(self, pool: Pool, trained: Tensor, objective: Callable[[Tensor], Loss]) -> None:
        """Trains some rows on a pool; all others are not given to the optimiser, and keep every bit.

        While the others are fixed, all they say of a sample is one number, the logarithm of the sum of their
        exponentials. It is computed once, and is the logit of one class "other" in front of the trained ones.

        Args:
            pool: Samples and exemplars.
            trained: Rows to train `[k]`.
            objective: From targets `[n + m]`, columns of the logits of a step, to the loss of a step.

        Raises:
            DivergedError: A weight is no longer finite.
        """
        trained = trained.to(self._weight.device)
        places = torch.full((len(self.classes),), -1, device=trained.device)
        places[trained] = torch.arange(len(trained), device=trained.device)
        other = self._others(pool.x, places < 0)
        loss = objective(places[self._rows(pool.y)] + other.shape[1])
        weight, bias = (rows[trained].requires_grad_() for rows in (self._weight, self._bias))
        groups: list[dict[str, Any]] = [{"params": [weight], "weight_decay": self.weight_decay}, {"params": [bias]}]
        optimizer = torch.optim.SGD(groups, self.lr, self.momentum)
        steps = self._steps(pool)
        for step, (rows, num) in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 + math.cos(math.pi * step / len(steps))) / 2
            logits = torch.cat([other[rows], F.linear(pool.x[rows], weight, bias)], 1)
            optimizer.zero_grad()
            loss(logits, rows, num).backward()
            optimizer.step()
        if not weight.isfinite().all() or not bias.isfinite().all():
            raise DivergedError(f"training a head left the finite numbers: lower lr, which is {self.lr}")
        self._weight = self._weight.index_copy(0, trained, weight.detach())
        self._bias = self._bias.index_copy(0, trained, bias.detach())

    @torch.no_grad()
    def _others(self, x: Tensor, is_fixed: Tensor) -> Tensor:
        """Returns what rows that are not trained say of each input together `[n + m, 1]`; `[n + m, 0]` without any."""
        if not is_fixed.any():
            return x.new_zeros(len(x), 0)
        return F.linear(x, self._weight[is_fixed], self._bias[is_fixed]).logsumexp(1, keepdim=True)

    def _steps(self, pool: Pool) -> list[tuple[Tensor, int]]:
        """Returns the rows of each step, first of the experience's samples, and how many these are."""
        n, m = pool.num_current, len(pool.x) - pool.num_current
        num = max(self.epochs * n, self.min_steps * self.batch_size)
        current = passes(n, num, self._generator).to(pool.x.device).split(self.batch_size)
        if not m:
            return [(rows, len(rows)) for rows in current]
        num_replayed = min(self.batch_size, m)
        replayed = n + passes(m, num_replayed * len(current), self._generator).to(pool.x.device)
        return [(torch.cat(pair), len(pair[0])) for pair in zip(current, replayed.split(num_replayed), strict=True)]


@dataclass(kw_only=True, eq=False)
class Joint(FineTune):
    """A linear head trained anew on all samples of all experiences, which it keeps: the upper bound.

    Args: those of `FineTune`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._kept: list[tuple[Tensor, Tensor]] = []

    def state(self) -> dict[str, Any]:
        return {**super().state(), "kept": {str(i): {"x": x, "y": y} for i, (x, y) in enumerate(self._kept)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        kept = state["kept"]
        self._kept = [(kept[str(i)]["x"], kept[str(i)]["y"]) for i in range(len(kept))]

    def _learn(self, x: Tensor, y: Tensor) -> None:
        self._kept = [*self._kept, (x, y)]
        self._weight, self._bias = torch.zeros_like(self._weight), torch.zeros_like(self._bias)
        super()._learn(torch.cat([x for x, _ in self._kept]), torch.cat([y for _, y in self._kept]))


def passes(num: int, total: int, generator: torch.Generator) -> Tensor:
    """Returns `total` numbers below `num`, int64: all of them in a random order, then all in another, and so on."""
    orders = [torch.randperm(num, generator=generator) for _ in range(-(-total // num))]
    return torch.cat(orders)[:total]


def cross_entropy(target: Tensor, weight: float) -> Loss:
    """Returns the loss `(L_current + w L_exemplars) / (1 + w)` of means of cross-entropies.

    Args:
        target: Column of each one's class in the logits of a step `[n + m]`.
        weight: w; 0 where there are no exemplars.
    """

    def loss(logits: Tensor, rows: Tensor, num_current: int) -> Tensor:
        own = F.cross_entropy(logits, target[rows], reduction="none")
        if len(own) == num_current:
            return own.mean()
        return (own[:num_current].mean() + weight * own[num_current:].mean()) / (1 + weight)

    return loss
