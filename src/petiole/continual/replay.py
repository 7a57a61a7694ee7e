"""Linear heads that replay exemplars while they learn an experience.

ER      cross-entropy on both
ERACE   samples of the experience do not push old classes down
DERpp   exemplars keep the logits they had

`taer.py` has the one whose old rows rest.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import FitError
from .store import Exemplars
from .trained import FineTune, Loss, Pool, cross_entropy


@dataclass(eq=False)
class Replay(FineTune):
    """A linear head trained on each experience's samples and on exemplars of those before.

    The loss of a step is `(L_current + w L_exemplars) / (1 + w)`, means over the samples of each.

    Args:
        exemplars: Where they are kept; samples of an experience are added after it was learnt.
        balance: What the weight w of the exemplars' loss is, where the head rebalances it: `classes` counts the
            exemplars' classes over those of the experience, which suits exemplars that are balanced by class;
            `samples` counts the samples seen before over those of the experience, which suits a reservoir.

    Other arguments: those of `FineTune`.
    """

    exemplars: Exemplars
    _: KW_ONLY
    balance: Literal["classes", "samples"] = "classes"
    is_rebalanced: bool = field(default=False, init=False)
    is_detached: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance not in ("classes", "samples"):
            raise FitError(f"balance is classes or samples, got {self.balance!r}")
        self._num_seen = 0

    def state(self) -> dict[str, Any]:
        return {**super().state(), "num_seen": self._num_seen, "exemplars": self.exemplars.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._num_seen = state["num_seen"]
        self.exemplars.restore(state["exemplars"])

    def _learn(self, x: Tensor, y: Tensor) -> None:
        old_x, old_y, *more = self.exemplars.all() if len(self.exemplars) else (x[:0], y[:0])
        inputs = torch.cat([self._inputs(x), self._inputs(old_x)])
        pool = Pool(inputs, torch.cat([y, old_y.to(y.device)]), len(x))
        trained = self._rows(y.unique()) if self.is_detached else torch.arange(len(self.classes))
        self._train(pool, trained, lambda target: self._loss(pool, target, *more))
        self.exemplars.add(x, y, *self._beside(y))
        self._num_seen += len(y)

    @abstractmethod
    def _loss(self, pool: Pool, target: Tensor, *more: Tensor) -> Loss:
        """Returns the loss of a step.

        Args:
            pool: Samples and exemplars.
            target: Column of each one's class in the logits of a step `[n + m]`.
            more: What is kept beside the exemplars.
        """

    def _beside(self, y: Tensor) -> tuple[Tensor, ...]:
        """Returns what is kept beside the samples of an experience that was just learnt."""
        return ()

    def _weight_of(self, pool: Pool) -> float:
        """Returns the weight of the exemplars' loss."""
        y, old = pool.y[: pool.num_current], pool.y[pool.num_current :]
        if not len(old) or not self.is_rebalanced:
            return float(len(old) > 0)
        return self._num_seen / len(y) if self.balance == "samples" else len(old.unique()) / len(y.unique())


@dataclass(eq=False)
class ER(Replay):
    """Experience replay: cross-entropy over all classes on the experience's samples and on exemplars.

    Source: Chaudhry et al., 2019, "On Tiny Episodic Memories in Continual Learning", arXiv 1902.10486.

    Args:
        is_rebalanced: Whether exemplars weigh as `balance` says, and not as much as the experience's samples.
        is_detached: Whether rows of old classes rest. With both, it is `TAER`; they are here to tell what each does.

    Other arguments: those of `Replay`.

    Differs from the paper: several epochs over each experience, on features.
    """

    is_rebalanced: bool = False
    is_detached: bool = False

    def _loss(self, pool: Pool, target: Tensor, *more: Tensor) -> Loss:
        return cross_entropy(target, self._weight_of(pool))


@dataclass(eq=False)
class ERACE(Replay):
    """Experience replay with asymmetric cross-entropy.

    On the experience's samples, the softmax is over the experience's classes alone, so that they cannot push old ones
    down; on exemplars it is over all.

    Source: Caccia et al., 2022, "New Insights on Reducing Abrupt Representation Change in Online Continual Learning",
    arXiv 2104.05025.

    Args: those of `Replay`.

    Differs from the paper: the classes of a whole experience, not of one batch.
    """

    def _loss(self, pool: Pool, target: Tensor, *more: Tensor) -> Loss:
        plain = cross_entropy(target, self._weight_of(pool))
        closed = pool.x.new_full((len(self.classes),), -torch.inf)
        closed[self._rows(pool.y[: pool.num_current].unique())] = 0

        def loss(logits: Tensor, rows: Tensor, num_current: int) -> Tensor:
            return plain(torch.cat([logits[:num_current] + closed, logits[num_current:]]), rows, num_current)

        return loss


@dataclass(eq=False)
class DERpp(Replay):
    """Dark experience replay, DER++: exemplars keep their classes and the logits they had when they were stored.

    The loss of a step is `(L_current + beta L_exemplars + alpha D) / (1 + beta)`, where D is the mean squared
    difference of logits.

    Source: Buzzega et al., 2020, "Dark Experience for General Continual Learning: a Strong, Simple Baseline", arXiv
    2004.07211, section 3.1.

    Args:
        alpha: Weight of the difference of logits.
        beta: Weight of the exemplars' cross-entropy.

    Other arguments: those of `Replay`.

    Differs from the paper: logits are those at the end of an experience, of the classes known by then, and are
    computed again from a copy of the head as it was, which is kept beside the exemplars; both terms see the same
    exemplars; the sum is over `1 + beta`, so that it is ER's at alpha 0.
    """

    alpha: float = 0.5
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0 or not self.beta >= 0:
            raise FitError(f"alpha and beta are at least 0, got {self.alpha} and {self.beta}")
        self._past: list[tuple[Tensor, Tensor]] = []

    def state(self) -> dict[str, Any]:
        past = {str(i): {"weight": weight, "bias": bias} for i, (weight, bias) in enumerate(self._past)}
        return {**super().state(), "past": past}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        past = state["past"]
        self._past = [(past[str(i)]["weight"], past[str(i)]["bias"]) for i in range(len(past))]

    def _beside(self, y: Tensor) -> tuple[Tensor, ...]:
        self._past = [*self._past, (self._weight, self._bias)]
        return (torch.full_like(y, len(self._past) - 1),)

    def _loss(self, pool: Pool, target: Tensor, *more: Tensor) -> Loss:
        plain = cross_entropy(target, self.beta)
        if not more:
            return plain
        logits_before = self._logits_before(pool.x[pool.num_current :], more[0].to(pool.x.device))
        is_known = ~logits_before.isnan()
        shares = is_known.to(logits_before) / is_known.sum(1, keepdim=True) * self.alpha / (1 + self.beta)

        def loss(logits: Tensor, rows: Tensor, num_current: int) -> Tensor:
            exemplars = rows[num_current:] - pool.num_current
            differences = (logits[num_current:] - logits_before[exemplars].nan_to_num()).square()
            return plain(logits, rows, num_current) + (shares[exemplars] * differences).sum(1).mean()

        return loss

    def _logits_before(self, x: Tensor, times: Tensor) -> Tensor:
        """Returns the logits that each exemplar had `[m, C]`; nan for classes unknown by then."""
        logits = x.new_full((len(x), len(self.classes)), torch.nan)
        for time, (weight, bias) in enumerate(self._past):
            rows = (times == time).nonzero()[:, 0]
            logits[rows, : len(weight)] = F.linear(x[rows], weight, bias)
        return logits
