"""Convolution of a token sequence whose patches form a grid."""

import torch
from torch import Tensor
from torch.nn import functional as F


def convolve(x: Tensor, num_prefix: int, grid: tuple[int, int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the tokens after a zero-padded convolution of their grid; each prefix token is an image of 1 x 1.

    Args:
        x: Prefix tokens, then the patches row by row `[B, num_prefix + H * W, c]`.
        num_prefix: Tokens in front of the patches; only the kernel's centre acts on them.
        grid: H and W of the patch grid.
        weight: Kernel of odd size `[d, c, k, k]`, or one per row of the batch `[B, d, c, k, k]`.
        bias: Bias `[d]`, or one per row `[B, d]`; None for none.

    Returns:
        As many tokens `[B, N, d]`.
    """
    patches, middle = x[:, num_prefix:].unflatten(1, grid).permute(0, 3, 1, 2), weight.shape[-1] // 2
    if weight.ndim == 4:
        y = F.conv2d(patches, weight, bias, padding=middle)
    else:
        # rows as groups of channels of one image, so that each meets its own kernel
        image = patches.reshape(1, -1, *grid)
        y = F.conv2d(
            image, weight.flatten(0, 1), None if bias is None else bias.flatten(), padding=middle, groups=x.shape[0]
        )
        y = y.unflatten(1, (x.shape[0], -1)).squeeze(0)
    y = y.flatten(2).mT
    if not num_prefix:
        return y
    centre = weight[..., middle, middle]
    alone = x[:, :num_prefix] @ centre.mT
    alone = alone if bias is None else alone + bias.unsqueeze(-2)
    return torch.cat([alone.to(y.dtype), y], dim=1)
