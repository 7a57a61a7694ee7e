"""Quantising tensors to few levels, trained straight through."""

from typing import Any

import torch
from torch import Tensor

# keeps a constant tensor, which has no deviation, from a division by zero
GUARD = 1e-5


def statistics(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and unbiased standard deviation `[..., 1, 1]` of each matrix `[..., m, n]`; 0 for one number."""
    mean = weight.mean((-2, -1), keepdim=True)
    num = weight.shape[-2] * weight.shape[-1]
    return mean, (weight - mean).square().sum((-2, -1), keepdim=True).div(max(1, num - 1)).sqrt()


def encode(weight: Tensor, mean: Tensor, std: Tensor, table: Tensor, is_held: bool = False) -> Tensor:
    """Returns the codes of a matrix, uint8 alike: the index of the level nearest to each standardised number.

    Held statistics did not come from these numbers but made them: without the guard, each falls on its own level.
    """
    unit = std.clamp_min(torch.finfo(std.dtype).tiny) if is_held else std + GUARD
    return torch.bucketize((weight - mean) / unit, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def decode(codes: Tensor, mean: Tensor, std: Tensor, table: Tensor) -> Tensor:
    """Returns the numbers that codes stand for, `mean + std * level`."""
    # on a CPU, `index_select` by int32 takes a fifth of the time of `table[codes.long()]`
    return mean + std * table.index_select(0, codes.flatten().int()).view(codes.shape)


def quantise(weight: Tensor, table: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """Returns a latent weight as its few levels, with a gradient for the latent weight.

    `mean + std * Q(Z)` for `Z = (weight - mean) / (std + guard)`: Q is passed straight through, mean and deviation are
    not. The gradient is the exact one of that: with n numbers, `G + Z / (n - 1) * <G, Q(Z) - Z>` up to the guard.

    Source: Jie, Wang and Deng, 2023, arXiv 2307.16867.

    Args:
        weight: Latent matrix `[..., m, n]`; each is quantised by its own mean and deviation.
        table: Ascending levels, as `levels` of the code book gives them.
        mean: Mean to hold `[..., 1, 1]`, with `std`: the gradient is then passed straight through. None measures them.
        std: Deviation to hold.
    """
    table = table.to(weight.dtype)
    if mean is None or std is None:
        return _Quantise.apply(weight, table)
    return _Nearest.apply(weight, mean, std, table)


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, mean: Tensor, std: Tensor, table: Tensor) -> Tensor:
        return decode(encode(weight, mean, std, table, is_held=True), mean, std, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, table: Tensor) -> Tensor:
        mean, std = statistics(weight)
        return decode(encode(weight, mean, std, table), mean, std, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # W^ = m + s Q with dQ = dZ and Z = (W - m) / (s + g). With a = s / (s + g), which the guard keeps below 1:
        # dW^ = dm + Q ds + a (dW - dm - Z ds), dm = mean(dW), ds = <(W - m) / s, dW> / (n - 1)
        weight, output = ctx.saved_tensors
        (grad,) = grads
        mean, std = statistics(weight)
        share = std / (std + GUARD)
        tiny = torch.finfo(weight.dtype).tiny
        unit = (weight - mean) / std.clamp_min(tiny)
        level = (output - mean) / std.clamp_min(tiny)
        num = weight.shape[-2] * weight.shape[-1]
        along = (grad * (level - share * share * unit)).sum((-2, -1), keepdim=True) / max(1, num - 1)
        return share * grad + (1 - share) * grad.mean((-2, -1), keepdim=True) + unit * along, None
