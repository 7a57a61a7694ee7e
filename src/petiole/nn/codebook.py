"""Level tables for quantising normally distributed numbers."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

# the authors' tables stop here, which converges at 1, 2 and 4 bits; it starts from levels of zero
REFERENCE_ITERATIONS = 500


@lru_cache
def levels(bits: int, table: str = "converged") -> Tensor:
    """Returns the ascending levels `[2 ** bits]` that quantise a standard normal number with the least absolute error.

    A level is the conditional median of its cell, and a threshold lies midway between two levels. This is the fixed
    point for the L1 error; Lloyd-Max levels are conditional means, for the L2 error.

    Source: Jie, Wang and Deng, 2023, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision
    Redundancy", arXiv 2307.16867.

    Args:
        bits: Bits per number, 1 to 8.
        table: `converged`, or `reference`: the authors' iteration as far as they took it. They differ at 8 bits, where
            the authors' is far from converged; older files of theirs need it.

    Raises:
        ValueError: Not 1 to 8 bits, or no such table.
    """
    if bits not in range(1, 9) or table not in ("converged", "reference"):
        raise ValueError(f"a table has 1 to 8 bits and is converged or reference, got {bits} bits and {table!r}")
    # a table is computed and cached, also where a model is being built on another device
    with torch.device("cpu"):
        half = _reference(bits) if table == "reference" else _converged(2 ** (bits - 1))
        return torch.cat([-half.flip(0), half])


def _medians(half: Tensor) -> tuple[Tensor, Tensor]:
    """Returns thresholds from 0 to infinity around positive levels, and the conditional median of each cell."""
    edge = half.new_tensor([0.0]), half.new_tensor([torch.inf])
    thresholds = torch.cat([edge[0], (half[1:] + half[:-1]) / 2, edge[1]])
    below = ndtr(thresholds)
    return thresholds, ndtri((below[1:] + below[:-1]) / 2)


def _converged(num: int) -> Tensor:
    # start: the asymptotic density of levels for the L1 error is that of a normal of variance 2
    i = torch.arange(num, 2 * num, dtype=torch.float64)
    half = 2**0.5 * ndtri((i + 0.5) / (2 * num))
    density = torch.distributions.Normal(half.new_zeros(()), half.new_ones(()))
    for _ in range(50):
        # Newton's method on `medians(half) - half`, whose Jacobian is tridiagonal
        thresholds, medians = _medians(half)
        inner = density.log_prob(thresholds[1:-1]).exp()
        at_medians = density.log_prob(medians).exp()
        jacobian = -torch.eye(num, dtype=torch.float64)
        for side in (0, 1):  # the threshold below level i + 1 is the one above level i: half of either level
            rows = torch.arange(num - 1) + side
            slope = inner / (4 * at_medians[rows])
            jacobian[rows, torch.arange(num - 1)] += slope
            jacobian[rows, torch.arange(1, num)] += slope
        step = torch.linalg.solve(jacobian, half - medians)
        half = half + step
        if step.abs().max() < 1e-14:
            break
    return half


def _reference(bits: int) -> Tensor:
    half = torch.zeros(2 ** (bits - 1), dtype=torch.float64)
    for _ in range(REFERENCE_ITERATIONS):
        half = _medians(half)[1]
    return half
