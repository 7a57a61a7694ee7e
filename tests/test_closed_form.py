"""Heads in closed form against plain loops, explicit inverses and scikit-learn."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge as SklearnRidge
from torch import Tensor

from petiole.continual.closed_form import NCM, SLDA, ClosedForm, RandomRidge, Ridge
from petiole.continual.heads import Head
from petiole.errors import FitError
from petiole.nn.ridge import RIDGES, chosen_ridge, gcv_scores, oas_shrinkage

Array = NDArray[Any]
LABELS = (7, 2, 4, 11, 0)
D = 6


def uneven(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes of 4, 9, 20, 2 and 13 samples, float64."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(LABELS).repeat_interleave(torch.tensor([4, 9, 20, 2, 13]))
    x = torch.randn(len(y), D, generator=generator, dtype=torch.float64)
    return 2 + x * torch.logspace(0, -1.5, D) + 0.2 * (y % 5)[:, None] * torch.linspace(-1, 1, D), y


def centred(scores: Any) -> Tensor:
    """Scores without what all classes share."""
    scores = torch.as_tensor(scores)
    return scores - scores.mean(1, keepdim=True)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_nearest_mean_is_that_of_a_loop(metric: Any) -> None:
    x, y = (a.numpy() for a in uneven())
    head = NCM(metric=metric).partial_fit(x[:20], y[:20]).partial_fit(x[20:], y[20:])
    for sample, scores in zip(x, head.scores(torch.from_numpy(x)).numpy(), strict=True):
        expected = []
        for label in head.classes:
            own = [row for row, other in zip(x, y, strict=True) if other == label]
            if metric == "cosine":
                mean = sum(row / np.linalg.norm(row) for row in own) / len(own)
                expected.append(sample @ mean / np.linalg.norm(sample) / np.linalg.norm(mean))
            else:
                expected.append(-(np.linalg.norm(sample - sum(own) / len(own)) ** 2) / 2)
        assert scores - scores.mean() == pytest.approx(np.array(expected) - np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("make", [lambda: NCM(metric="euclidean"), SLDA, Ridge])
def test_a_large_common_offset_costs_few_digits(make: Callable[[], ClosedForm]) -> None:
    x, y = uneven()
    near, far = make(), make()
    for part in (slice(0, 20), slice(20, None)):
        near.partial_fit(x[part], y[part])
        far.partial_fit(x[part] + 2.0**20, y[part])
    # samples themselves lose 20 of 53 bits, 1e-10; raw sums of squares would lose 40 before they are subtracted
    torch.testing.assert_close(far.scores(x + 2.0**20), near.scores(x), rtol=1e-6, atol=1e-6)


def discriminants(x: Array, y: Array, classes: Sequence[int], share: float) -> Array:
    """Log densities of Gaussians around class means, by an explicit inverse, without what all share `[n, C]`."""
    means = {c: x[y == c].mean(0) for c in classes}
    covariance = sum(np.outer(row - means[c], row - means[c]) for row, c in zip(x, y, strict=True)) / len(x)
    round_one = np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
    inverse = np.linalg.inv((1 - share) * covariance + share * round_one)
    return np.array([[-(row - means[c]) @ inverse @ (row - means[c]) / 2 for c in classes] for row in x])


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_discriminant_is_that_of_gaussians(share: float) -> None:
    x, y = uneven()
    head = SLDA(shrinkage=share).partial_fit(x[:9], y[:9]).partial_fit(x[9:], y[9:])
    expected = discriminants(x.numpy(), y.numpy(), head.classes, share)
    # two solvers in float64 on a condition number below 1e6
    torch.testing.assert_close(centred(head.scores(x)), centred(expected), rtol=1e-8, atol=1e-8)
    assert head.predict(x).tolist() == [head.classes[i] for i in expected.argmax(1)]


def test_discriminant_is_that_of_scikit_learn() -> None:
    # of classes that are equally frequent: it weighs their covariances by the prior
    x, y = uneven()[0][:40], torch.arange(40) % 5
    head = SLDA(shrinkage=0.2).partial_fit(x, y)
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2, priors=[1 / 5] * 5).fit(x.numpy(), y.numpy())
    assert list(other.classes_) == head.classes
    torch.testing.assert_close(centred(head.scores(x)), centred(other.decision_function(x.numpy())))


def test_shrinkage_that_is_not_given_is_the_papers() -> None:
    x, y = uneven()
    rows = x.numpy() - np.stack([x[y == c].mean(0).numpy() for c in y])
    covariance, (n, d) = rows.T @ rows / len(rows), rows.shape
    # Chen et al., eq. 23, entry by entry
    trace = sum(covariance[i, i] for i in range(d))
    trace_of_square = sum(covariance[i, j] * covariance[j, i] for i in range(d) for j in range(d))
    share = ((1 - 2 / d) * trace_of_square + trace**2) / ((n + 1 - 2 / d) * (trace_of_square - trace**2 / d))
    assert 0.01 < share < 0.9
    assert float(oas_shrinkage(torch.from_numpy(covariance), n)) == pytest.approx(share, rel=1e-12)
    expected = SLDA(shrinkage=share).partial_fit(x, y).scores(x)
    torch.testing.assert_close(SLDA().partial_fit(x, y).scores(x), expected, rtol=1e-9, atol=1e-9)


def test_round_covariance_is_shrunk_wholly() -> None:
    assert float(oas_shrinkage(torch.eye(4), 10)) == 1.0
    assert float(oas_shrinkage(torch.zeros(4, 4), 1)) == 1.0
    assert float(oas_shrinkage(torch.diag(torch.tensor([1.0, 1.1])), 2)) == 1.0


def one_hot(y: Tensor, classes: Sequence[int]) -> Tensor:
    return (y[:, None] == torch.tensor(list(classes))).double()


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
def test_ridge_is_that_of_scikit_learn_over_shares_of_classes(ridge: float) -> None:
    x, y = uneven()
    head = Ridge(ridge=ridge).partial_fit(x[:9], y[:9]).partial_fit(x[9:], y[9:])
    targets = one_hot(y, head.classes)
    strength = ridge * float((x - x.mean(0)).square().sum()) / len(x)
    other = SklearnRidge(alpha=strength).fit(x.numpy(), targets.numpy())
    expected = torch.from_numpy(other.predict(x.numpy())) / targets.mean(0)
    torch.testing.assert_close(head.scores(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("num_samples", "tolerance"), [(48, 1e-8), (6, 1e-3), (3, 1e-3)])
def test_cross_validation_is_that_of_the_hat_matrix(num_samples: int, tolerance: float) -> None:
    x, y = (a[torch.linspace(0, 47, num_samples).long()] for a in uneven())
    targets, rows = one_hot(y, sorted(set(y.tolist()))), x - x.mean(0)
    n, ones, scores = len(x), np.full((len(x), len(x)), 1 / len(x)), []
    for ridge in RIDGES:
        strength = ridge * float(rows.square().sum()) / n
        # the dual form: (X X' + s)^-1 exists where X'X has no full rank
        kernel = rows.numpy() @ rows.numpy().T
        hat = ones + kernel @ np.linalg.inv(kernel + strength * np.eye(n))
        residuals = targets.numpy() - hat @ targets.numpy()
        scores.append((residuals**2).sum() / np.trace(np.eye(n) - hat) ** 2)
    sums = rows.mT @ rows, rows.mT @ targets, targets.sum(0)
    # of few samples, what the hat matrix leaves of them is 1e-6, and has the errors of an inverse: 1e-16 * 1e6
    torch.testing.assert_close(gcv_scores(*sums), torch.tensor(scores), rtol=tolerance, atol=0.0)
    assert chosen_ridge(*sums) == RIDGES[int(np.argmin(scores))]


def test_strength_that_is_not_given_is_chosen() -> None:
    x, y = uneven()
    rows, targets = x - x.mean(0), one_hot(y, sorted(LABELS))
    ridge = chosen_ridge(rows.mT @ rows, rows.mT @ targets, targets.sum(0))
    assert RIDGES[0] < ridge < RIDGES[-1]
    expected = Ridge(ridge=ridge).partial_fit(x, y).scores(x)
    torch.testing.assert_close(Ridge().partial_fit(x, y).scores(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.1, None])
def test_random_ridge_is_ridge_on_its_random_features(ridge: float | None) -> None:
    x, y = uneven()
    head = RandomRidge(num_projections=24, ridge=ridge, seed=3).partial_fit(x, y)
    projection = torch.randn(D, 24, generator=torch.Generator().manual_seed(3))
    features = np.maximum(x.numpy() @ projection.numpy().astype(np.float64), 0)
    expected = Ridge(ridge=ridge).partial_fit(features, y).scores(torch.from_numpy(features))
    torch.testing.assert_close(head.scores(x), expected, rtol=1e-6, atol=1e-6)


def test_random_ridge_chooses_by_its_first_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomRidge, "num_choosing", 8)
    x, y = uneven()
    head = RandomRidge(num_projections=24).partial_fit(x, y)
    rows = torch.relu(x @ head.state()["projection"].double())
    rows, targets = rows - rows.mean(0), one_hot(y, head.classes)
    first = rows[:, :8]
    ridge = chosen_ridge(first.mT @ first, first.mT @ targets, targets.sum(0))
    assert ridge != chosen_ridge(rows.mT @ rows, rows.mT @ targets, targets.sum(0))
    expected = RandomRidge(num_projections=24, ridge=ridge).partial_fit(x, y).scores(x)
    torch.testing.assert_close(head.scores(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [Ridge, lambda: Ridge(ridge=0.1), SLDA, lambda: SLDA(shrinkage=0.1)])
def test_samples_that_are_all_alike_leave_it_open(make: Callable[[], ClosedForm]) -> None:
    scores = make().partial_fit(torch.ones(4, D), [3, 5, 3, 5]).scores(torch.randn(2, D))
    assert torch.equal(scores[:, 0], scores[:, 1])


def test_features_that_depend_on_each_other_are_refused_without_shrinkage() -> None:
    head = SLDA(shrinkage=0).partial_fit(torch.eye(3, D), [0, 1, 1])
    with pytest.raises(FitError, match=r"the 6 features are linearly dependent .*: give shrinkage or ridge a larger"):
        head.predict(torch.ones(1, D))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NCM(metric="manhattan"), "metric is cosine or euclidean, got 'manhattan'"),
        (lambda: SLDA(shrinkage=1.5), "shrinkage is a share from 0 to 1, got 1.5"),
        (lambda: Ridge(ridge=0), "ridge is above 0, or None to be chosen, got 0"),
        (lambda: Ridge(ridge=float("nan")), "ridge is above 0, or None to be chosen, got nan"),
        (lambda: RandomRidge(num_projections=0), "num_projections is at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Head], message: str) -> None:
    with pytest.raises(FitError, match=message):
        make()
