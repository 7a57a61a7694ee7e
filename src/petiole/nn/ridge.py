"""Ridge regression and shrinkage from sums over samples: systems, and how strong to regularise them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import FitError

# ridge strengths to choose from, relative to the mean squared norm of the centred features
RIDGES = tuple(10 ** (k / 2) for k in range(-12, 9))


def solve_ridge(matrix: Tensor, strength: Tensor, right: Tensor) -> Tensor:
    """Returns `(matrix + strength I)^-1 right`, of a symmetric matrix.

    Source: Hoerl and Kennard, 1970, "Ridge Regression: Biased Estimation for Nonorthogonal Problems".

    Args:
        matrix: Symmetric, positive semi-definite `[d, d]`.
        strength: What is added to its diagonal `[]`.
        right: Right sides `[d, C]`.

    Raises:
        FitError: The sum is not positive definite.

    Example:
        >>> import torch
        >>> solve_ridge(3 * torch.eye(2), torch.tensor(1.0), torch.tensor([[4.0], [8.0]])).mT
        tensor([[1., 2.]])
    """
    shifted = matrix + strength * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise FitError(
            f"the {len(matrix)} features are linearly dependent on the samples so far: give shrinkage or ridge a "
            "larger value, or None"
        )
    return torch.cholesky_solve(right, factor)


def chosen_ridge(gram: Tensor, moments: Tensor, counts: Tensor, candidates: Sequence[float] = RIDGES) -> float:
    """Returns the ridge strength with the smallest score of generalised cross-validation.

    Args:
        gram: As of `gcv_scores`.
        moments: As of `gcv_scores`.
        counts: As of `gcv_scores`.
        candidates: As of `gcv_scores`; the first of equally good ones is chosen.

    Example:
        >>> import torch
        >>> x, y = torch.eye(6).repeat(9, 1).double(), torch.eye(3).repeat(18, 1).double()
        >>> x = x - x.mean(0)
        >>> chosen_ridge(x.mT @ x, x.mT @ y, y.sum(0))
        1e-06
    """
    return float(candidates[int(gcv_scores(gram, moments, counts, candidates).argmin())])


def gcv_scores(gram: Tensor, moments: Tensor, counts: Tensor, candidates: Sequence[float] = RIDGES) -> Tensor:
    """Returns the score of generalised cross-validation of each ridge strength `[k]`; lower is better.

    It is of a regression with a free intercept to one-hot classes. With eigenvalues l of the Gram matrix, p the moments
    in its eigenvectors, and the strength s, the score is
    `(rest + sum p^2 / l (s / (l + s))^2) / (n - 1 - rank + sum s / (l + s))^2`: squared residuals over the square of
    the degrees of freedom that they have. Every term is positive, so that small strengths lose no digits. One
    eigendecomposition serves all candidates.

    Source: Golub, Heath and Wahba, 1979, "Generalized Cross-Validation as a Method for Choosing a Good Ridge
    Parameter".

    Args:
        gram: Sums of products of centred features `[d, d]`.
        moments: Sums of products of centred features with one-hot classes `[d, C]`.
        counts: Samples of each class `[C]`.
        candidates: Strengths, relative to the mean squared norm of the centred features.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]), torch.eye(2).repeat_interleave(2, 0)
        >>> gcv_scores(x.mT @ x, x.mT @ y, y.sum(0), [1.0])
        tensor([0.0165])
    """
    n = counts.sum()
    values, vectors = torch.linalg.eigh(gram)
    is_real = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    values = values[is_real]
    explained = (vectors[:, is_real].mT @ moments).square().sum(1) / values
    rest = (n - counts.square().sum() / n - explained.sum()).clamp_min(0)
    strengths = torch.tensor(candidates).to(gram) * gram.trace() / n
    left = strengths.unsqueeze(1) / (values + strengths.unsqueeze(1))
    residuals = rest + (explained * left.square()).sum(1)
    freedom = (n - 1 - len(values)).clamp_min(0) + left.sum(1)
    return residuals / freedom.square()


def oas_shrinkage(covariance: Tensor, num_samples: float) -> Tensor:
    """Returns the share of a round covariance by the oracle approximating shrinkage estimator `[]`, from 0 to 1.

    Source: Chen, Wiesel, Eldar and Hero, 2010, "Shrinkage Algorithms for MMSE Covariance Estimation", arXiv 0907.4698,
    eq. 23.

    Args:
        covariance: Mean product of centred samples `[d, d]`.
        num_samples: How many samples it is of.

    Example:
        >>> import torch
        >>> oas_shrinkage(torch.diag(torch.tensor([3.0, 1.0])), 9)
        tensor(0.8889)
    """
    d, square, trace = len(covariance), covariance.square().sum(), covariance.trace()
    over = (1 - 2 / d) * square + trace.square()
    under = (num_samples + 1 - 2 / d) * (square - trace.square() / d)
    return torch.where(under > 0, over / under, 1).clamp(max=1)
