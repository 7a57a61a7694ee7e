"""Heads in closed form: all they learn are sums over samples, so that nothing is ever forgotten.

NCM           nearest class mean                     keeps class sums
SLDA          linear discriminant analysis           keeps class sums and the scatter within classes
Ridge         ridge regression to the classes        keeps the same
RandomRidge   the same on random features            keeps the same, of random features

Learning part by part, in any order, comes to what learning from all samples at once comes to, up to rounding.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import FitError
from ..nn.ridge import chosen_ridge, oas_shrinkage, solve_ridge
from .growing import positions
from .heads import Features, Head, checked

# samples whose sums are taken at once: bounds the memory that random features need
NUM_AT_ONCE = 4096


class ClosedForm(Head):
    """A head that is linear in its inputs, by weights that follow from sums over samples.

    The sums are in float64 and stay on the device of the first samples. Weights are computed when they are first
    needed after learning.
    """

    has_scatter: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._counts = self._sums = self._scatter = torch.empty(0)
        self._solved: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def partial_fit(self, features: Features, labels: Features | Sequence[int]) -> Self:
        x, y = checked(features, labels, self.d_in)
        self.d_in = x.shape[1]
        for part, own in zip(x.split(NUM_AT_ONCE), y.split(NUM_AT_ONCE), strict=True):
            self._add(_wide(self._inputs(_wide(part))), own)
        self._solved = None
        return self

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        if self._solved is None:
            self._solved = self._solve()
        x = features.to(self._sums.device, torch.promote_types(features.dtype, torch.float32))
        x = self._inputs(x)
        centre, weight, bias = (tensor.to(x) for tensor in self._solved)
        return torch.addmm(bias, x - centre, weight)

    def state(self) -> dict[str, Any]:
        sums = {"counts": self._counts, "sums": self._sums, "scatter": self._scatter}
        return {"classes": self.classes, "d_in": self.d_in, **sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.classes, self.d_in = list(state["classes"]), state["d_in"]
        self._counts, self._sums, self._scatter = state["counts"], state["sums"], state["scatter"]
        self._solved = None

    def _inputs(self, x: Tensor) -> Tensor:
        """Returns what the head is linear in `[n, k]`, of features `[n, d]`."""
        return x

    @abstractmethod
    def _solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns centre `[k]`, weight `[k, C]` and bias `[C]` of the scores `(inputs - centre) weight + bias`."""

    @property
    def _means(self) -> Tensor:
        """Mean input of each class `[C, k]`."""
        return self._sums / self._counts.unsqueeze(1).clamp_min(1)

    def _add(self, x: Tensor, y: Tensor) -> None:
        """Adds inputs `[n, k]` to the sums, none of which is changed in place: `state` hands them out."""
        if not self.classes:
            self._counts, self._sums, self._scatter = x.new_zeros(0), x.new_zeros(0, x.shape[1]), x.new_zeros(())
        x, y = x.to(self._sums), y.to(self._sums.device)
        new = sorted(set(y.tolist()) - set(self.classes))
        self.classes = [*self.classes, *new]
        self._counts, self._sums = F.pad(self._counts, (0, len(new))), F.pad(self._sums, (0, 0, 0, len(new)))
        rows = positions(self.classes, y)
        counts = torch.bincount(rows, minlength=len(self.classes)).to(x)
        sums = torch.zeros_like(self._sums).index_add_(0, rows, x)
        if self.has_scatter:
            self._scatter = self._scatter_with(x, rows, counts, sums)
        self._counts, self._sums = self._counts + counts, self._sums + sums

    def _scatter_with(self, x: Tensor, rows: Tensor, counts: Tensor, sums: Tensor) -> Tensor:
        """Returns the scatter within classes of the samples before and these.

        Sums of squares around means are added by the rule of Chan et al. (1983), class by class: they lose no digits
        where means are large, as raw sums of squares do.
        """
        means = sums / counts.unsqueeze(1).clamp_min(1)
        shared = self._counts * counts / (self._counts + counts).clamp_min(1)
        shifts = (means - self._means) * shared.sqrt().unsqueeze(1)
        deviations = torch.cat([x - means[rows], shifts[shared > 0]])
        return torch.addmm(self._scatter, deviations.mT, deviations)


class NCM(ClosedForm):
    """Nearest class mean.

    The generative classifier with equal round Gaussians, or equal von Mises-Fisher distributions, and a uniform prior:
    no weight is trained by how often a class occurs.

    Source: Mensink et al., 2013, "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost";
    Rebuffi et al., 2017, arXiv 1611.07725, section 2.1, for means that are computed anew as features move.

    Args:
        metric: `cosine` compares directions: means are of samples scaled to length 1, and are scaled to length 1 too;
            `euclidean` compares distances.

    Example:
        >>> import torch
        >>> head = NCM().partial_fit(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), [3, 5])
        >>> head.predict(torch.tensor([[0.1, 0.2]]))
        tensor([5])
    """

    has_scatter = False

    def __init__(self, *, metric: Literal["cosine", "euclidean"] = "cosine") -> None:
        if metric not in ("cosine", "euclidean"):
            raise FitError(f"metric is cosine or euclidean, got {metric!r}")
        super().__init__()
        self.metric = metric

    def _inputs(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) if self.metric == "cosine" else x

    def _solve(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.metric == "cosine":
            means = F.normalize(self._means, dim=1)
            return means.new_zeros(()), means.mT, means.new_zeros(len(means))
        centre = self._means.mean(0)
        means = self._means - centre
        return centre, means.mT, -means.square().sum(1) / 2


class SLDA(ClosedForm):
    """Streaming linear discriminant analysis: Gaussians with a mean per class and one covariance, uniform prior.

    Source: Hayes and Kanan, 2020, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", arXiv
    1909.01520.

    Args:
        shrinkage: Share of a round covariance of the same trace in the covariance, 0 to 1; None for the share that the
            oracle approximating estimator finds: Chen et al., 2010, arXiv 0907.4698, eq. 23.

    Differs from the paper: the covariance is exactly that of all samples around the final class means, so that order
    means nothing; the round part is relative to the trace, so that scale means nothing.
    """

    def __init__(self, *, shrinkage: float | None = None) -> None:
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise FitError(f"shrinkage is a share from 0 to 1, got {shrinkage}")
        super().__init__()
        self.shrinkage = shrinkage

    def _solve(self) -> tuple[Tensor, Tensor, Tensor]:
        num_samples = float(self._counts.sum())
        covariance = self._scatter / num_samples
        share = oas_shrinkage(covariance, num_samples) if self.shrinkage is None else self.shrinkage
        variance = covariance.diagonal().mean()
        # one sample a class: there is no scatter, and every round covariance answers alike
        variance = torch.where(variance > 0, variance, 1)
        centre = self._means.mean(0)
        means = self._means - centre
        weight = solve_ridge((1 - share) * covariance, share * variance, means.mT)
        return centre, weight, -(means.mT * weight).sum(0) / 2


class Ridge(ClosedForm):
    """Ridge regression from features to one-hot classes, with a free intercept.

    What the regression says of a class is divided by how often the class occurred: a uniform prior, as in the other
    heads. Without that, rare classes are hardly ever predicted; where all are equally frequent it means nothing.

    The strength is chosen by generalised cross-validation, which needs nothing but the sums: no sample is held out,
    none is kept, and the choice too does not depend on how the samples were cut into parts. One eigendecomposition
    serves all candidates.

    Source: Golub, Heath and Wahba, 1979, "Generalized Cross-Validation as a Method for Choosing a Good Ridge
    Parameter".

    Args:
        ridge: Strength, relative to the mean squared norm of the centred features; None chooses one whenever weights
            are computed.
    """

    # inputs whose sums choose the strength; None for all
    num_choosing: ClassVar[int | None] = None

    def __init__(self, *, ridge: float | None = None) -> None:
        if ridge is not None and not ridge > 0:
            raise FitError(f"ridge is above 0, or None to be chosen, got {ridge}")
        super().__init__()
        self.ridge = ridge

    def _solve(self) -> tuple[Tensor, Tensor, Tensor]:
        num_samples = self._counts.sum()
        centre = self._sums.sum(0) / num_samples
        means = (self._means - centre).mT
        moments = means * self._counts
        gram = torch.addmm(self._scatter, moments, means.mT)
        ridge, k = self.ridge, self.num_choosing
        if ridge is None:
            ridge = chosen_ridge(gram[:k, :k], moments[:k], self._counts)
        total = gram.trace()
        # where all samples are alike there is nothing to regress on, and every strength answers alike
        strength = torch.where(total > 0, ridge * total / num_samples, 1)
        # the solution for `moments`, over the classes' shares of the samples
        weight = num_samples * solve_ridge(gram, strength, means)
        return centre, weight, torch.ones_like(self._counts)


class RandomRidge(Ridge):
    """Ridge regression on a random projection with ReLU: linear in features of features, so not linear in features.

    Source: McDonnell et al., 2023, "RanPAC: Random Projections and Pre-trained Models for Continual Learning", arXiv
    2307.02251; without its first-session adaptation.

    Args:
        num_projections: Random features; the sums take 8 bytes for each pair of them.
        ridge: As of `Ridge`.
        seed: Seed of the projection.

    Differs from the paper: an intercept, and a strength that is chosen by generalised cross-validation on the first
    1,000 random features; the paper holds out a part of each experience and solves once a candidate.
    """

    num_choosing = 1000

    def __init__(self, *, num_projections: int = 10_000, ridge: float | None = None, seed: int = 0) -> None:
        if num_projections < 1:
            raise FitError(f"num_projections is at least 1, got {num_projections}")
        super().__init__(ridge=ridge)
        self.num_projections, self.seed = num_projections, seed
        self._projection: Tensor | None = None

    def state(self) -> dict[str, Any]:
        return {**super().state(), "projection": self._projection}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._projection = state["projection"]

    def _inputs(self, x: Tensor) -> Tensor:
        if self._projection is None:
            generator = torch.Generator().manual_seed(self.seed)
            self._projection = torch.randn(x.shape[1], self.num_projections, generator=generator).to(x.device)
        return F.relu(x @ self._projection.to(x))


def _wide(x: Tensor) -> Tensor:
    """Returns a tensor in float64, or float32 on Apple's GPUs, which have no more."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)
