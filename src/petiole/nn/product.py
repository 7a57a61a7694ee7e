"""Adding a low-rank product to a tensor without a temporary of the tensor's size."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def add_product(y: Tensor, code: Tensor, up: Tensor, start: int = 0) -> Tensor:
    """Returns `y + code @ up^T`, or that for some columns of `y` alone, written into `y` where that is safe.

    A step of a small plugin is bound by memory traffic: the product as a tensor of its own, then a sum, touch five
    times `y`'s size where one accumulating matrix product touches two.

    Args:
        y: Fresh output of a frozen map `[B, N, d]`; its values are lost to the caller.
        code: Low-rank code, `[B, M, r]` with M * w = N * d.
        up: Matrix `[w, r]`, or one per row of the batch `[B, w, r]`.
        start: First of the columns that are added to, where there is one code per token, M = N; the others stay.

    Returns:
        The sum `[B, N, d]`.
    """
    code, up = code.to(y.dtype), up.to(y.dtype)
    # a row axis needs a batched product; a compiler fuses the sum itself; a view cannot be written into under autograd
    if up.ndim > 2 or torch.compiler.is_compiling() or y._is_view() or not y.is_contiguous():
        product = code @ up.mT
        whole = product.numel() == y.numel()
        return y + (product.reshape(y.shape) if whole else F.pad(product, (start, y.shape[-1] - start - up.shape[-2])))
    return _AddProduct.apply(y, code.reshape(-1, code.shape[-1]), up, start)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, code: Tensor, up: Tensor, start: int) -> Tensor:
        _columns(y, code, up, start).addmm_(code, up.mT)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        y, code, up, ctx.start = inputs
        ctx.mark_dirty(y)
        ctx.save_for_backward(code, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        code, up = ctx.saved_tensors
        flat = _columns(grads[0].contiguous(), code, up, ctx.start)
        return grads[0], flat @ up, flat.mT @ code, None


def _columns(y: Tensor, code: Tensor, up: Tensor, start: int) -> Tensor:
    """Returns what of `y` the product is added to, a view `[B * M, w]`: rows of w entries, or w columns of each row."""
    width = up.shape[0]
    return y.view(-1, y.numel() // len(code))[:, start : start + width]
