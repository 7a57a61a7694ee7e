"""The two projections of a bottleneck, for every site."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.weights import FULL, Weights


class Maps(nn.Module):
    """Linear maps `y = x W^T + b`, one per site.

    Every tensor may carry one leading axis of the batch's length: its rows then use different maps.

    Args:
        weights: Initial weight `[d_out, d_in]` of each map.
        bias: Whether they have biases, which start at zero and are never quantised.
        bits: Bits per weight, 1 to 8; 32 for the weights as they are.
    """

    def __init__(self, weights: Sequence[Tensor], bias: bool = True, bits: int = FULL) -> None:
        super().__init__()
        self.weight = Weights(weights, bits)
        self.bias = nn.ParameterList(torch.zeros(len(weight)) for weight in weights if bias)

    def down(self, i: int, x: Tensor) -> Tensor:
        """Returns map `i` of something wide `[B, N, d_in]`."""
        weight = self.weight[i]
        if not len(self.bias):
            return x @ weight.mT
        if weight.ndim == 2:
            return F.linear(x, weight, self.bias[i])
        return torch.baddbmm(self.bias[i].unsqueeze(-2), x, weight.mT)

    def up(self, i: int, code: Tensor, factor: Tensor | float) -> Tensor:
        """Returns `factor` times map `i` of a narrow code `[B, N, d_in]`; the factor may differ by row `[B, 1, 1]`.

        The factor meets code and bias, so that nothing of the output's width is read again for it. The product is one
        matrix product a row even where the rows share the map: with so narrow a code this takes half the time of a
        single one over all tokens, measured on a CPU with the backward pass.
        """
        weight = self.weight[i].mT.expand(code.shape[0], -1, -1)
        if not len(self.bias):
            return (code * factor) @ weight
        return torch.baddbmm(self.bias[i].unsqueeze(-2) * factor, code * factor, weight)


def uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Returns the start of PyTorch's `Linear`: uniform within `1 / sqrt(d_in)`, the last axis."""
    return nn.init.uniform_(torch.empty(shape), -(shape[-1] ** -0.5), shape[-1] ** -0.5, generator=generator)
