"""How one step learns from a batch of the stream and from exemplars.

Joint           as one batch
MIR             as one batch, with those exemplars that the batch alone would harm most
AGEM            from the batch, in a direction that does not harm the exemplars
DarkExperience  from the batch, from exemplars, and from what was said of exemplars when they came
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import DivergedError, FitError
from ..growing import positions

if TYPE_CHECKING:
    from .learner import OnlineLearner


class Rehearsal(ABC):
    """How a step learns from a batch and from exemplars. Its constructor's arguments are its settings."""

    needs_logits: ClassVar[bool] = False
    """Whether the objective must have logits."""

    @abstractmethod
    def backward(self, learner: "OnlineLearner", x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Leaves the gradients of a step in the learner's parameters, and returns what is kept beside each sample.

        Args:
            learner: The learner, in training mode, without gradients.
            x: The batch `[B, ...]`.
            y: Its labels `[B]`.
        """


class Joint(Rehearsal):
    """Batch and exemplars as one batch: experience replay.

    Source: Chaudhry et al., 2019, "On Tiny Episodic Memories in Continual Learning", arXiv 1902.10486.
    """

    def backward(self, learner: "OnlineLearner", x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        _learn_jointly(learner, x, y, learner.draw())
        return ()


class MIR(Rehearsal):
    """As `Joint`, with the exemplars whose loss a step on the batch alone would raise most.

    Source: Aljundi et al., 2019, "Online Continual Learning with Maximally Interfered Retrieval", arXiv 1908.04742.

    Args:
        candidates: Exemplars to choose from at each step.

    Differs from the paper: candidates are judged in eval mode and not augmented, so that batch norm does not see them.
    """

    needs_logits = True

    def __init__(self, *, candidates: int = 50) -> None:
        if candidates < 1:
            raise FitError(f"MIR chooses from at least 1 candidate, got {candidates}")
        self.candidates = candidates

    def backward(self, learner: "OnlineLearner", x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        drawn = learner.draw(self.candidates if learner.replay else 0)
        if len(drawn) and len(drawn[1]) > learner.replay:
            learner.loss(x, y, len(y)).backward()
            before = _losses(learner, *drawn[:2])
            with _stepped(learner):
                harm = _losses(learner, *drawn[:2]) - before
            worst = harm.topk(learner.replay).indices
            drawn = tuple(t[worst] for t in drawn)
            learner.network.train()
            learner.network.zero_grad()
            learner.objective.zero_grad()
        _learn_jointly(learner, x, y, drawn)
        return ()


class AGEM(Rehearsal):
    """Learns from the batch alone, without that part of the gradient which would raise the loss of exemplars.

    Source: Chaudhry et al., 2019, "Efficient Lifelong Learning with A-GEM", arXiv 1812.00420, equation 11.
    """

    def backward(self, learner: "OnlineLearner", x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        learner.loss(x, y, len(y)).backward()
        if drawn := learner.draw():
            parameters = [p for p in learner.trained.values() if p.grad is not None]
            own = [p.grad for p in parameters if p.grad is not None]
            loss = learner.loss(drawn[0], drawn[1], 0)
            reference = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            size = torch.stack([r.square().sum() for r in reference]).sum()
            along = torch.stack([(g * r).sum() for g, r in zip(own, reference, strict=True)]).sum()
            against = along.clamp(max=0) / size.clamp_min(torch.finfo(size.dtype).tiny)
            torch._foreach_sub_(own, torch._foreach_mul(reference, against))
        return ()


class DarkExperience(Rehearsal):
    """Learns from the batch, from exemplars, and from the logits that exemplars had when they came: DER++.

    Source: Buzzega et al., 2020, "Dark Experience for General Continual Learning: a Strong, Simple Baseline", arXiv
    2004.07211, equation 6.

    Args:
        num_classes: Classes there will be at most: the width of the logits that are kept.
        alpha: Weight of the squared distance between logits.
        beta: Weight of the objective on exemplars.

    Differs from the paper: the three parts share a forward pass, and so the statistics of batch norm; an exemplar is
    not held to logits of classes that came after it.
    """

    needs_logits = True

    def __init__(self, *, num_classes: int, alpha: float = 0.1, beta: float = 0.5) -> None:
        if num_classes < 1 or alpha < 0 or beta < 0:
            raise FitError(
                f"DER++ needs at least 1 class and weights of 0 or more, got {num_classes}, {alpha:g} and {beta:g}"
            )
        self.num_classes, self.alpha, self.beta = num_classes, alpha, beta

    def backward(self, learner: "OnlineLearner", x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        # two independent draws: one for what was said, one for the labels
        past, again = learner.draw(), learner.draw()
        batches = [(x, y), *((drawn[0], drawn[1]) for drawn in (past, again) if drawn)]
        features, labels = (t.unflatten(0, (learner.views, -1)) for t in learner.training_features(*_joined(batches)))
        if len(learner.objective.classes) > self.num_classes:
            raise FitError(
                f"{self.num_classes} logits are kept, and there are {len(learner.objective.classes)} classes"
            )
        sizes = [len(batch[1]) for batch in batches]
        parts = list(zip(features.split(sizes, 1), labels.split(sizes, 1), strict=True))
        loss = _loss(learner, parts[0], True)
        if past:
            logits = learner.objective.logits(parts[1][0].flatten(0, 1))
            gaps = logits - past[2].repeat(learner.views, 1)[:, : logits.shape[1]]
            distance = gaps[~gaps.isnan()].square().mean()
            loss = loss + self.alpha * distance + self.beta * _loss(learner, parts[2], False)
        finite(loss).backward()
        said = learner.objective.logits(parts[0][0][0].detach()).detach()
        return (F.pad(said, (0, self.num_classes - said.shape[1]), value=torch.nan),)


def _loss(learner: "OnlineLearner", part: tuple[Tensor, Tensor], is_incoming: bool) -> Tensor:
    """Returns the objective on features `[views, B, d]` and labels `[views, B]`."""
    features, labels = part[0].flatten(0, 1), part[1].flatten()
    return learner.objective(features, labels, torch.full_like(labels, is_incoming, dtype=torch.bool))


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _learn_jointly(learner: "OnlineLearner", x: Tensor, y: Tensor, drawn: tuple[Tensor, ...]) -> None:
    whole = _joined([(x, y), (drawn[0], drawn[1])]) if drawn else (x, y)
    learner.loss(*whole, len(y)).backward()


@torch.no_grad()
def _losses(learner: "OnlineLearner", x: Tensor, y: Tensor) -> Tensor:
    """Returns the cross-entropy of each sample `[B]`."""
    logits = learner.objective.logits(learner.features(x))
    return F.cross_entropy(logits, positions(learner.objective.classes, y), reduction="none")


@contextmanager
def _stepped(learner: "OnlineLearner") -> Iterator[None]:
    """Takes a plain step along the gradients there are, and takes it back bit for bit."""
    moved = [(p, p.grad) for p in learner.trained.values() if p.grad is not None]
    before = [p.detach().clone() for p, _ in moved]
    try:
        with torch.no_grad():
            for p, gradient in moved:
                p.sub_(learner.lr * gradient)
        yield
    finally:
        with torch.no_grad():
            for (p, _), value in zip(moved, before, strict=True):
                p.copy_(value)


def finite(loss: Tensor) -> Tensor:
    """Returns the loss.

    Raises:
        DivergedError: It is not finite.
    """
    if not math.isfinite(value := loss.item()):
        raise DivergedError(f"the loss is {value}: lower lr, or look at the inputs")
    return loss
