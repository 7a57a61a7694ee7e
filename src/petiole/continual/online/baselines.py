"""The generative method and what it is compared with: the same learner with other parts, and GDumb.

Each function takes a network that gives features, a store for exemplars and settings of `OnlineLearner`. Whether a
network is classified by its logits or by the class means of the exemplars is a choice at test: `classifier="ncm"`
alone gains much on experience replay (Mai et al., 2021, arXiv 2103.13885).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from ...errors import FitError
from ..exemplars import Exemplars
from ..learner import Learner
from .learner import Augment, OnlineLearner
from .objectives import CrossEntropy
from .pairs import Hybrid, SupCon
from .rehearsal import AGEM, MIR, DarkExperience

Classifier = Literal["ncm", "softmax"]


class Settings(TypedDict, total=False):
    """Settings of `OnlineLearner` that no method has an opinion on."""

    lr: float
    optimizer: Callable[..., torch.optim.Optimizer] | None
    replay: int
    augment: Augment | None
    views: int
    normalize: Callable[[Tensor], Tensor] | None
    renorm: bool
    seed: int


def generative(network: nn.Module, exemplars: Exemplars, **settings: Unpack[Settings]) -> OnlineLearner:
    """Returns the generative classifier with the hybrid objective: Shen et al., 2022, arXiv 2205.09347."""
    return OnlineLearner(network, Hybrid(), exemplars, **settings)


def fine_tune(network: nn.Module, **settings: Unpack[Settings]) -> OnlineLearner:
    """Returns a learner without exemplars: the lower bound."""
    settings["replay"] = 0
    return OnlineLearner(network, CrossEntropy(), None, classifier="softmax", **settings)


def er(
    network: nn.Module, exemplars: Exemplars, *, classifier: Classifier = "softmax", **settings: Unpack[Settings]
) -> OnlineLearner:
    """Returns experience replay: Chaudhry et al., 2019, arXiv 1902.10486."""
    return OnlineLearner(network, CrossEntropy(), exemplars, classifier=classifier, **settings)


def er_ace(
    network: nn.Module, exemplars: Exemplars, *, classifier: Classifier = "softmax", **settings: Unpack[Settings]
) -> OnlineLearner:
    """Returns replay with asymmetric cross-entropy: Caccia et al., 2022, arXiv 2104.05025."""
    return OnlineLearner(network, CrossEntropy(negatives="incoming"), exemplars, classifier=classifier, **settings)


def mir(
    network: nn.Module,
    exemplars: Exemplars,
    *,
    candidates: int = 50,
    classifier: Classifier = "softmax",
    **settings: Unpack[Settings],
) -> OnlineLearner:
    """Returns replay of what a step would harm: Aljundi et al., 2019, arXiv 1908.04742."""
    rehearsal = MIR(candidates=candidates)
    return OnlineLearner(network, CrossEntropy(), exemplars, classifier=classifier, rehearsal=rehearsal, **settings)


def a_gem(network: nn.Module, exemplars: Exemplars, **settings: Unpack[Settings]) -> OnlineLearner:
    """Returns averaged gradient episodic memory: Chaudhry et al., 2019, arXiv 1812.00420."""
    return OnlineLearner(network, CrossEntropy(), exemplars, classifier="softmax", rehearsal=AGEM(), **settings)


def dark_experience(
    network: nn.Module,
    exemplars: Exemplars,
    *,
    num_classes: int,
    alpha: float = 0.1,
    beta: float = 0.5,
    **settings: Unpack[Settings],
) -> OnlineLearner:
    """Returns dark experience replay, DER++: Buzzega et al., 2020, arXiv 2004.07211."""
    rehearsal = DarkExperience(num_classes=num_classes, alpha=alpha, beta=beta)
    return OnlineLearner(network, CrossEntropy(), exemplars, classifier="softmax", rehearsal=rehearsal, **settings)


def scr(
    network: nn.Module,
    exemplars: Exemplars,
    *,
    projection: int | None = 128,
    temperature: float = 0.07,
    **settings: Unpack[Settings],
) -> OnlineLearner:
    """Returns supervised contrastive replay: Mai et al., 2021, arXiv 2103.13885; it needs many exemplars a step."""
    return OnlineLearner(network, SupCon(temperature=temperature, projection=projection), exemplars, **settings)


class GDumb(Learner):
    """Keeps exemplars, and learns from them alone, from the network's first weights, when something is to be predicted.

    Source: Prabhu et al., 2020, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning".

    Args:
        network: Gives features; it keeps its weights, copies are trained.
        exemplars: The store; `ClassBalanced` is the paper's.
        epochs: Passes over the exemplars.
        lr: Learning rate, from which a cosine falls to a hundredth.
        batch_size: Samples a step.
        augment: As of `OnlineLearner`.
        normalize: As of `OnlineLearner`.
        seed: Seed of order and augmentation.

    Differs from the paper: one cosine without restarts, no cutmix, fewer epochs.
    """

    def __init__(
        self,
        network: nn.Module,
        exemplars: Exemplars,
        *,
        epochs: int = 30,
        lr: float = 0.05,
        batch_size: int = 16,
        augment: Augment | None = None,
        normalize: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if epochs < 1 or batch_size < 1 or not lr > 0:
            raise FitError(
                f"epochs and batch_size are at least 1 and lr above 0, got {epochs}, {batch_size} and {lr:g}"
            )
        self.network, self.exemplars, self.epochs, self.lr = network, exemplars, epochs, lr
        self.batch_size, self.augment, self.normalize, self.seed = batch_size, augment, normalize, seed
        self._trained: OnlineLearner | None = None

    def observe(self, x: Tensor, y: Tensor) -> None:
        self.exemplars.add(x, y)
        self._trained = None

    def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
        if self._trained is None:
            self._trained = self._train()
        return self._trained.predict(x, among)

    def state(self) -> dict[str, Any]:
        weights = {name: value.clone() for name, value in self.network.state_dict().items()}
        return {"network": weights, "exemplars": self.exemplars.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.exemplars.restore(state["exemplars"])
        self._trained = None

    def _train(self) -> OnlineLearner:
        """Returns a learner of the exemplars; the same ones give the same learner."""
        learner = fine_tune(
            deepcopy(self.network), lr=self.lr, augment=self.augment, normalize=self.normalize, seed=self.seed
        )
        generator = torch.Generator().manual_seed(self.seed)
        num = len(self.exemplars)
        for epoch in range(self.epochs if num else 0):
            learner.lr = self.lr * (0.505 + 0.495 * math.cos(math.pi * epoch / self.epochs))
            # equal parts: batch norm cannot learn from a rest of one sample
            for rows in torch.randperm(num, generator=generator).tensor_split(-(-num // self.batch_size)):
                learner.observe(*(column[rows.to(column.device)] for column in self.exemplars.all()[:2]))
        return learner
