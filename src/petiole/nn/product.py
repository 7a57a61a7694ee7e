"""Adding a low-rank product to a tensor without a temporary of the tensor's size."""

from typing import Any

import torch
from torch import Tensor


def add_product(y: Tensor, code: Tensor, up: Tensor) -> Tensor:
    """Returns `y + code @ up^T`, written into `y` where that is safe.

    A step of a small plugin is bound by memory traffic: the product as a tensor of its own, then a sum, touch five
    times `y`'s size where one accumulating matrix product touches two.

    Args:
        y: Fresh output of a frozen map `[B, N, d]`; its values are lost to the caller.
        code: Low-rank code, `[B, M, r]` with M * w = N * d.
        up: Matrix `[w, r]`, or one per row of the batch `[B, w, r]`.

    Returns:
        The sum `[B, N, d]`.
    """
    code, up = code.to(y.dtype), up.to(y.dtype)
    # a row axis needs a batched product; a compiler fuses the sum itself; a view cannot be written into under autograd
    if up.ndim > 2 or torch.compiler.is_compiling() or y._is_view() or not y.is_contiguous():
        return y + (code @ up.mT).reshape(y.shape)
    return _AddProduct.apply(y, code.reshape(-1, code.shape[-1]), up)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, code: Tensor, up: Tensor) -> Tensor:
        y.view(-1, up.shape[0]).addmm_(code, up.mT)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        y, code, up = inputs
        ctx.mark_dirty(y)
        ctx.save_for_backward(code, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code, up = ctx.saved_tensors
        flat = grads[0].reshape(-1, up.shape[0])
        return grads[0], flat @ up, flat.mT @ code
