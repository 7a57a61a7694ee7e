"""Objectives that compare samples, through pytorch-metric-learning, and the hybrid of one with proxies."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import FitError
from .networks import projector
from .objectives import Negatives, Objective, ProxyNCA

Pairs = tuple[Tensor, Tensor, Tensor, Tensor]


class _ByPairs(Objective):
    """A loss of pytorch-metric-learning on pairs of features, compared by their cosine.

    Args:
        negatives: As of `Objective`.
        loss: The loss, given features, labels and pairs.
        pairs: From features `[n, d]` and labels `[n]` to anchors and their positives, anchors and their negatives.
    """

    def __init__(self, negatives: Negatives, loss: nn.Module, pairs: Callable[[Tensor, Tensor], Pairs]) -> None:
        super().__init__(negatives)
        self._loss, self._pairs = loss, pairs

    def forward(self, features: Tensor, labels: Tensor, is_incoming: Tensor) -> Tensor:
        anchors, positives, pushed, negatives = self._pairs(features, labels)
        wanted = self._may_repel(labels, is_incoming, labels)[pushed, negatives]
        return self._loss(features, labels, (anchors, positives, pushed[wanted], negatives[wanted]))


class MultiSimilarity(_ByPairs):
    """Pairs of one class beyond a similarity, pairs of two classes below it: the hardest in soft form.

    Per sample, with cosines S and offset m: `log(1 + sum exp(-alpha (S - m))) / alpha` over the others of its class,
    plus `log(1 + sum exp(beta (S - m))) / beta` over the other classes; the mean over the batch.

    Source: Wang et al., 2019, "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", arXiv
    1904.06627; the generative part of arXiv 2205.09347, whose settings are not known.

    Args:
        alpha: Weight of positive pairs.
        beta: Weight of negative pairs.
        base: Offset m of the cosine; the paper's text has 1, its common implementations 0.5.
        margin: Mines pairs: positives less similar than the hardest negative plus the margin, negatives more similar
            than the hardest positive minus it. The paper takes 0.1. None keeps all pairs, which is better in batches of
            a few dozen samples.
        negatives: As of `Objective`; chosen behind the mining.

    Raises:
        FitError: pytorch-metric-learning is not installed.
    """

    def __init__(
        self,
        *,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        margin: float | None = None,
        negatives: Negatives = "all",
    ) -> None:
        library = _metric_learning()
        pairs = _all_pairs if margin is None else library.miners.MultiSimilarityMiner(margin)
        super().__init__(negatives, library.losses.MultiSimilarityLoss(alpha, beta, base), pairs)
        self.alpha, self.beta, self.base, self.margin = alpha, beta, base, margin


class SupCon(_ByPairs):
    """Supervised contrast: each sample picks those of its class out of the batch.

    Source: Khosla et al., 2020, "Supervised Contrastive Learning", arXiv 2004.11362.

    Args:
        temperature: Of the cosines.
        projection: Width of what is compared, behind two linear maps that predictions are made without; None compares
            features.
        negatives: As of `Objective`.
        seed: Seed of the projection's weights.

    Raises:
        FitError: pytorch-metric-learning is not installed.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        projection: int | None = None,
        negatives: Negatives = "all",
        seed: int = 0,
    ) -> None:
        super().__init__(negatives, _metric_learning().losses.SupConLoss(temperature), _all_pairs)
        self.temperature, self.projection, self.seed = temperature, projection, seed
        self.projector: nn.Sequential | None = None

    def meet(self, features: Tensor, labels: Tensor) -> list[nn.Parameter]:
        if self.projection is None or self.projector is not None:
            return []
        self.projector = projector(features.shape[1], self.projection, seed=self.seed).to(features)
        return list(self.projector.parameters())

    def forward(self, features: Tensor, labels: Tensor, is_incoming: Tensor) -> Tensor:
        compared = features if self.projector is None else self.projector(features)
        return super().forward(compared, labels, is_incoming)

    def state(self) -> dict[str, Any]:
        return {"d_in": 0 if self.projector is None else self.projector[0].in_features, **super().state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.projector = None
        if state["d_in"]:
            like = next(iter(state["weights"].values()))
            self.meet(like.new_empty(0, state["d_in"]), like.new_empty(0))
        super().restore(state)


class Hybrid(Objective):
    """A loss on pairs, which shapes the features, plus gamma times one that discriminates classes.

    Source: Shen et al., 2022, "Bypassing Logits Bias in Online Class-Incremental Learning with a Generative Framework",
    arXiv 2205.09347: Multi-Similarity and Proxy-NCA. The weight and the settings of both are derived, not read there.

    Args:
        pairs: The first; None for `MultiSimilarity()`.
        proxies: The second, which has the logits; None for `ProxyNCA()`.
        gamma: Weight of the second.
    """

    has_logits = True

    def __init__(self, *, pairs: Objective | None = None, proxies: Objective | None = None, gamma: float = 1.0) -> None:
        super().__init__()
        self.pairs = MultiSimilarity() if pairs is None else pairs
        self.proxies = ProxyNCA() if proxies is None else proxies
        self.gamma = gamma

    @property
    def classes(self) -> list[int]:
        return self.proxies.classes

    def meet(self, features: Tensor, labels: Tensor) -> list[nn.Parameter]:
        return self.pairs.meet(features, labels) + self.proxies.meet(features, labels)

    def forward(self, features: Tensor, labels: Tensor, is_incoming: Tensor) -> Tensor:
        first = self.pairs(features, labels, is_incoming)
        return first + self.gamma * self.proxies(features, labels, is_incoming)

    def logits(self, features: Tensor) -> Tensor:
        return self.proxies.logits(features)

    def state(self) -> dict[str, Any]:
        return {"pairs": self.pairs.state(), "proxies": self.proxies.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.pairs.restore(state["pairs"])
        self.proxies.restore(state["proxies"])


def _all_pairs(features: Tensor, labels: Tensor) -> Pairs:
    """Returns all pairs of one class, and all of two."""
    same = labels[:, None] == labels
    others = same.clone().fill_diagonal_(False)
    return (*others.nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))  # type: ignore[return-value]


def _metric_learning() -> Any:
    try:
        import pytorch_metric_learning as library
        from pytorch_metric_learning import losses, miners  # noqa: F401
    except ImportError as error:
        raise FitError("losses on pairs need pytorch-metric-learning: pip install 'petiole[metric]'") from error
    return library
