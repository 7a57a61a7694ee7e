"""What the network of an online learner is trained for: losses on its features.

CrossEntropy      a linear classifier
ProxyNCA          distances to a proxy of each class
MultiSimilarity   pairs of samples, those that are hard above all; in `pairs.py`, as the next
SupCon            pairs of samples, each against the whole batch
Hybrid            pairs of samples, and proxies
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import FitError
from ..growing import GrowingLinear, positions

Negatives = Literal["all", "incoming"]


class Objective(nn.Module, ABC):
    """A loss on features, with the weights it needs beside the network's.

    Args:
        negatives: What a sample of the incoming batch is pushed away from: `all` classes, or those of the `incoming`
            batch only, which leaves old classes in peace. Samples that are learnt again have all classes as negatives.

    Raises:
        FitError: The negatives are neither.
    """

    has_logits: ClassVar[bool] = False
    """Whether it classifies by itself."""

    def __init__(self, negatives: Negatives = "all") -> None:
        super().__init__()
        if negatives not in ("all", "incoming"):
            raise FitError(f"negatives are 'all' or 'incoming', got {negatives!r}")
        self.negatives = negatives

    @property
    def classes(self) -> list[int]:
        """Label of each column of the logits."""
        return []

    def meet(self, features: Tensor, labels: Tensor) -> list[nn.Parameter]:
        """Makes room for classes that are seen for the first time, and returns what is to be trained for them.

        Args:
            features: Those of a batch `[n, d]`.
            labels: Its labels `[n]`.
        """
        return []

    @abstractmethod
    def forward(self, features: Tensor, labels: Tensor, is_incoming: Tensor) -> Tensor:
        """Returns the loss of a batch, a scalar; finite whatever classes are in it.

        Args:
            features: What the network gives, of any length `[n, d]`.
            labels: Classes, all met `[n]`.
            is_incoming: Whether a sample comes from the stream, rather than from the exemplars `[n]`.
        """

    def logits(self, features: Tensor) -> Tensor:
        """Returns what speaks for each class `[n, C]`, in the order of `classes`.

        Raises:
            FitError: The objective compares samples and knows no classes.
        """
        raise FitError(f"{type(self).__name__} has no logits: classify by class means, or add an objective that has")

    def state(self) -> dict[str, Any]:
        """Returns its weights, as `Learner.state` does."""
        return {"weights": {name: value.clone() for name, value in self.state_dict().items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned."""
        self.load_state_dict(state["weights"])

    def _may_repel(self, labels: Tensor, is_incoming: Tensor, classes: Tensor) -> Tensor:
        """Returns whether each class `[C]` may be a negative of each sample `[n, C]`."""
        if self.negatives == "all":
            return torch.ones(len(labels), len(classes), dtype=torch.bool, device=labels.device)
        return torch.isin(classes, labels[is_incoming])[None] | ~is_incoming[:, None]


class _ByRows(Objective):
    """Cross-entropy over the classes seen so far, each of which has a row of weights.

    Args:
        negatives: As of `Objective`.
        bias: Whether a row has a bias.
    """

    has_logits = True

    def __init__(self, negatives: Negatives, bias: bool) -> None:
        super().__init__(negatives)
        self.bias = bias
        self.rows: GrowingLinear | None = None

    @property
    def classes(self) -> list[int]:
        return [] if self.rows is None else self.rows.classes

    def meet(self, features: Tensor, labels: Tensor) -> list[nn.Parameter]:
        if self.rows is None:
            self.rows = GrowingLinear(features.shape[1], bias=self.bias)
        num_known = len(self.classes)
        block = self.rows.grow(labels.tolist(), like=features)
        if block is None:
            return []
        with torch.no_grad():
            for i, label in enumerate(self.classes[num_known:]):
                self._begin(block.weight[i], features[labels == label])
        return list(block.parameters())

    def forward(self, features: Tensor, labels: Tensor, is_incoming: Tensor) -> Tensor:
        logits = self.logits(features)
        if self.negatives == "incoming":
            classes = torch.tensor(self.classes, device=labels.device)
            logits = logits.masked_fill(~self._may_repel(labels, is_incoming, classes), -torch.inf)
        return F.cross_entropy(logits, positions(self.classes, labels))

    def state(self) -> dict[str, Any]:
        if self.rows is None:
            return {"d_in": 0, "groups": [], **super().state()}
        sizes = [block.out_features for block in self.rows.blocks]
        groups = [part.tolist() for part in torch.tensor(self.classes).split(sizes)]
        return {"d_in": self.rows.d_in, "groups": groups, **super().state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rows = GrowingLinear(state["d_in"], bias=self.bias) if state["groups"] else None
        if self.rows is not None:
            like = next(iter(state["weights"].values()))
            for group in state["groups"]:
                self.rows.grow(group, like)
        super().restore(state)

    @abstractmethod
    def _begin(self, row: Tensor, features: Tensor) -> None:
        """Sets the row of a class that is seen for the first time `[d]`, which is zero, by its features `[n, d]`."""


class CrossEntropy(_ByRows):
    """Cross-entropy of a linear classifier on features, with a row for each class seen so far.

    With `incoming` negatives, the loss of ER-ACE: Caccia et al., 2022, "New Insights on Reducing Abrupt Representation
    Change in Online Continual Learning", arXiv 2104.05025.

    Parameters: (d + 1) * num_classes.

    Args:
        negatives: As of `Objective`.

    Differs from the paper: the mean over the joint batch, where ER-ACE adds the means over batch and exemplars.
    """

    def __init__(self, *, negatives: Negatives = "all") -> None:
        super().__init__(negatives, bias=True)

    def logits(self, features: Tensor) -> Tensor:
        return features.new_zeros(len(features), 0) if self.rows is None else self.rows(features)

    def _begin(self, row: Tensor, features: Tensor) -> None:
        # rows stay zero: a class that was just met is neither favoured nor held back
        pass


class ProxyNCA(_ByRows):
    """Cross-entropy over distances to proxies, one for each class seen so far.

    The logit of a class is `-scale * |e - p|^2`, for the feature and the proxy at unit length. A proxy begins as the
    mean of the class's features in the batch that it is first seen in. The part of arXiv 2205.09347 that discriminates;
    which scale and which proxies that paper takes is derived, not read.

    Source: Movshovitz-Attias et al., 2017, "No Fuss Distance Metric Learning using Proxies", arXiv 1703.07464.

    Parameters: d * num_classes.

    Args:
        scale: Sharpness s.
        negatives: As of `Objective`.

    Differs from the paper: the target's proxy stands in the denominator too, the softmax form.
    """

    def __init__(self, *, scale: float = 8.0, negatives: Negatives = "all") -> None:
        super().__init__(negatives, bias=False)
        if not scale > 0:
            raise FitError(f"the scale of distances is above 0, got {scale}")
        self.scale = scale

    def logits(self, features: Tensor) -> Tensor:
        if self.rows is None:
            return features.new_zeros(len(features), 0)
        proxies = torch.cat(list(self.rows.parameters()))
        return 2 * self.scale * (F.normalize(features, dim=1) @ F.normalize(proxies, dim=1).T - 1)

    def _begin(self, row: Tensor, features: Tensor) -> None:
        row.copy_(F.normalize(F.normalize(features, dim=1).mean(0), dim=0))
