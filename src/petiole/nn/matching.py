"""Shortening a token sequence: which tokens join which, and the mean of those that do.

    metric ── match ──┐
                      ├─> Merging ── merge ──> fewer tokens ── unmerge ──> as many as before
    scores ── prune ──┘        └──── sources ──> where each first token ended

A merging is decided once and says nothing about values, so that everything with a row per token can follow it.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import PluginError
from .schedule import most_removed


@dataclass(frozen=True, eq=False)
class Merging:
    """Which tokens of a sequence stay, and which of those each other token joins.

    Args:
        kept: Positions of the M tokens that stay, in the order they come out `[B, M]`.
        removed: Positions of the R tokens that join one of them, N = M + R `[B, R]`.
        into: Which of the M each of the R joins `[B, R]`.
        weights: What each token counts in the mean of its group, positive `[B, N]`; None for its size.
    """

    kept: Tensor
    removed: Tensor
    into: Tensor
    weights: Tensor | None = None

    @property
    def num_before(self) -> int:
        """Length N of the sequence."""
        return self.kept.shape[1] + self.removed.shape[1]

    @property
    def num_after(self) -> int:
        """Length M of the shortened sequence."""
        return self.kept.shape[1]

    @property
    def target(self) -> Tensor:
        """Position in the shortened sequence at which each token ends `[B, N]`."""
        places = torch.arange(self.num_after, device=self.kept.device).expand_as(self.kept)
        empty = self.kept.new_zeros(self.kept.shape[0], self.num_before)
        return empty.scatter(1, self.kept, places).scatter(1, self.removed, self.into)


def match(metric: Tensor, num_merged: int, num_protected: int = 1) -> Merging | None:
    """Returns which tokens merge: the most similar pairs between even and odd positions.

    Each token at an even position finds its most similar token at an odd one, by cosine. The even tokens with the best
    partners join them; several may join the same. Ties go to the token in front. Protected tokens take no part.

    The protected tokens come out in front, then the even tokens that stay, then the odd ones, in their order. Without
    protected tokens, the even ones come in the order of falling similarity. No gradient flows into the metric.

    Source: Bolya et al., 2023, "Token Merging: Your ViT But Faster", arXiv 2210.09461, section 3.

    Args:
        metric: What similarity is measured on `[B, N, d]`: the attention's keys, averaged over its heads.
        num_merged: Tokens to remove; at most half of those not protected are.
        num_protected: How many tokens at the front always stay: class, distillation and register tokens.

    Returns:
        The merging, or None if nothing merges.

    Example:
        >>> import torch
        >>> from petiole.nn.matching import match, merge
        >>> x, keys = torch.randn(1, 197, 768), torch.randn(1, 12, 197, 64)
        >>> x, sizes = merge(x, None, match(keys.mean(1), num_merged=8))  # [1, 189, 768] and [1, 189]
    """
    batch, num_tokens, _ = metric.shape
    num_removed = min(num_merged, most_removed(num_tokens, num_protected))
    if num_removed <= 0:
        return None
    first_even, first_odd = num_protected + num_protected % 2, num_protected + 1 - num_protected % 2
    metric = metric.detach().to(_at_least_float(metric))
    # half precision has too few digits to rank cosines by, also where autocast would choose it
    with _full_precision(metric.device):
        unit = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(1e-12)
        best, partner = (unit[:, first_even::2] @ unit[:, first_odd::2].mT).max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    joining, stay = order[:, :num_removed], order[:, num_removed:]
    if num_protected:
        stay = stay.sort(dim=-1).values
    front, odd = (
        torch.arange(start, end, step, device=metric.device).expand(batch, -1)
        for start, end, step in ((0, num_protected, 1), (first_odd, num_tokens, 2))
    )
    return Merging(
        kept=torch.cat([front, first_even + 2 * stay, odd], dim=1),
        removed=first_even + 2 * joining,
        into=num_protected + stay.shape[1] + partner.gather(1, joining),
    )


def prune(scores: Tensor, num_removed: int, num_protected: int = 1, *, is_weighted: bool = True) -> Merging | None:
    """Returns a merging in which the tokens of the lowest scores become one.

    To shorten the sequence by R, the R + 1 lowest are fused. The protected tokens come out in front, then those that
    stay, in their order, then the fused one. Ties go to the token in front. To keep a share k of n tokens beside the
    fused one, as the paper does, remove `n - ceil(k n) - 1`.

    Source: Liang et al., 2022, "Not All Patches Are What You Need: Expediting Vision Transformers via Token
    Reorganizations", arXiv 2202.07800, section 3.

    Args:
        scores: Importance of each token, at least 0 `[B, N]`: the attention the class token pays to it, averaged over
            heads. Those of protected tokens are not looked at.
        num_removed: By how many tokens the sequence gets shorter; one of those not protected is left at
            least.
        num_protected: How many tokens at the front always stay.
        is_weighted: Whether the fused token is the mean weighted by the scores, through which gradients flow;
            otherwise by the sizes. Under proportional attention, the scores of merged tokens hold their sizes already.

    Returns:
        The merging, or None if nothing is dropped.

    Differs from the paper: the fused token is the scores' weighted mean, where the paper has their weighted sum.
    """
    batch, num_tokens = scores.shape
    num_removed = min(num_removed, most_removed(num_tokens, num_protected, is_pruning=True))
    if num_removed <= 0:
        return None
    patches = scores[:, num_protected:]
    order = num_protected + patches.argsort(dim=-1, descending=True, stable=True)
    num_kept = order.shape[1] - num_removed - 1
    front = torch.arange(num_protected, device=scores.device).expand(batch, -1)
    # the best of the dropped tokens gives the fused one its place
    kept = torch.cat([front, order[:, :num_kept].sort(dim=-1).values, order[:, num_kept : num_kept + 1]], dim=1)
    dropped = order[:, num_kept + 1 :]
    weights = None
    if is_weighted:
        # scores that are all zero weigh the same
        positive = patches.to(_at_least_float(scores)).clamp_min(torch.finfo(torch.float32).tiny)
        weights = F.pad(positive, (num_protected, 0), value=1.0)
    return Merging(kept, dropped, torch.full_like(dropped, kept.shape[1] - 1), weights)


def merge(x: Tensor, sizes: Tensor | None, merging: Merging) -> tuple[Tensor, Tensor]:
    """Returns the shortened sequence, each token the weighted mean of those it stands for, and their new sizes.

    Means are taken in float32 at least, of shares rather than of products with sizes, so that half precision does not
    overflow. A token that nothing joins keeps its values bit for bit. Nothing is added at indices, which a GPU does in
    any order: two runs agree bit for bit. Gradients flow into `x`.

    Args:
        x: Tokens `[B, N, d]`.
        sizes: How many first tokens each of them stands for, `[B, N]` or `[B, N, 1]`; None for one each.
        merging: Which tokens join which.

    Returns:
        The tokens `[B, M, d]`, in the dtype of `x`, and the sizes in the shape they came in, `[B, M]` for None, in
        float32 at least. Sizes add up whatever the weights of the mean are.
    """
    own = torch.ones(x.shape[:2], device=x.device) if sizes is None else sizes.reshape(x.shape[:2])
    own = own.to(_at_least_float(x))
    pairs = _Pairs.of(merging)
    counted = pairs.counts(own)
    total = own.gather(1, merging.kept).scatter(1, merging.into, counted[2])
    if merging.weights is not None:
        counted = pairs.counts(merging.weights.to(own))
    arguments = (x, counted[0] / counted[2], counted[1] / counted[2], pairs)
    # without gradients, the wrapper alone would cost as much as a third of the arithmetic of one image
    y = _Mean.apply(*arguments) if torch.is_grad_enabled() else _Mean.forward(*arguments)
    return y, total if sizes is None else total.reshape(x.shape[0], -1, *sizes.shape[2:])


def unmerge(y: Tensor, merging: Merging) -> Tensor:
    """Returns a row for every token before the merging `[B, N, d]`: that of the token it ended in.

    Args:
        y: Rows of the shortened sequence `[B, M, d]`.
        merging: Which tokens had joined which.
    """
    return _rows(y, merging.target)


def sources(mergings: Iterable[Merging | None]) -> Tensor:
    """Returns where each token of the first sequence ended after several blocks `[B, N]`, to draw or to unmerge by.

    Args:
        mergings: Those of the blocks in their order; None where a block merged nothing.

    Raises:
        PluginError: No block merged anything: every token is where it was.
    """
    ended: Tensor | None = None
    for merging in mergings:
        if merging is not None:
            ended = merging.target if ended is None else merging.target.gather(1, ended)
    if ended is None:
        raise PluginError("no block merged any tokens, so each ended where it was: there is nothing to trace")
    return ended


def _at_least_float(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context without autocast, which would take products in half precision."""
    kind = device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def _flat(index: Tensor, length: int) -> Tensor:
    """Returns indices into rows of all sequences one after another: much faster than `gather`."""
    return (index + length * torch.arange(index.shape[0], device=index.device).unsqueeze(-1)).flatten()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Returns rows `[B, K, d]` of `[B, N, d]` at `[B, K]`."""
    return x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).unflatten(0, index.shape)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The R tokens that join another, each beside the one it joins. Most tokens are in no pair, and are only copied.

    Args:
        merging: Which tokens join which.
        joined: Positions of the tokens that are joined `[B, R]`; one stands there once for each that joins it.
        together: Which of the R join the same one, as 0 and 1 `[B, R, R]`.
        first: Which of them is the first `[B, R]`.
    """

    merging: Merging
    joined: Tensor
    together: Tensor
    first: Tensor

    @classmethod
    def of(cls, merging: Merging) -> "_Pairs":
        together = merging.into.unsqueeze(1) == merging.into.unsqueeze(2)
        joined = merging.kept.gather(1, merging.into)
        return cls(merging, joined, together, together.to(torch.uint8).argmax(dim=-1))

    def counts(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what each pair's joined token, its joining one and their whole group count, `[B, R]` each."""
        own, joining = values.gather(1, self.joined), values.gather(1, self.merging.removed)
        with _full_precision(values.device):
            total = own + (self.together.to(values.dtype) @ joining.unsqueeze(-1)).squeeze(-1)
        # all of a group have the same bits
        return own, joining, total.gather(1, self.first)


class _Mean(torch.autograd.Function):
    """The means `[B, M, d]` of tokens `[B, N, d]`, by the shares of joined and joining tokens in them `[B, R]`.

    Taken through autograd, that would add three tensors of full size where the gradient is one look-up.
    """

    @staticmethod
    def forward(x: Tensor, own: Tensor, joining: Tensor, pairs: _Pairs) -> Tensor:
        kept, removed, into = pairs.merging.kept, pairs.merging.removed, pairs.merging.into
        parts = _rows(x, torch.cat([pairs.joined, removed], dim=1)) * torch.cat([own, joining], dim=1).unsqueeze(-1)
        # tokens that join the same one: each gets the sum of all, and they write the same row
        with _full_precision(x.device):
            means = parts[:, : into.shape[1]] + pairs.together.to(own.dtype) @ parts[:, into.shape[1] :]
        y, means = _rows(x, kept), _rows(means, pairs.first).to(x.dtype)
        return y.flatten(0, 1).index_copy_(0, _flat(into, y.shape[1]), means.flatten(0, 1)).view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, own, joining, pairs = inputs
        ctx.pairs = pairs
        ctx.save_for_backward(x if own.requires_grad or joining.requires_grad else None, own, joining)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, own, joining = ctx.saved_tensors
        merging, joined = ctx.pairs.merging, ctx.pairs.joined
        grad = _rows(grads[0], merging.target)
        share = torch.ones(grad.shape[:2], dtype=own.dtype, device=own.device)
        share = share.scatter(1, joined, own).scatter(1, merging.removed, joining).unsqueeze(-1)
        if x is None:
            return (grad * share).to(grad.dtype), None, None, None
        by_share = (grad.to(share.dtype) * x).sum(dim=-1)
        # of those that join the same token, the first reads its share for all
        is_first = ctx.pairs.first == torch.arange(joined.shape[1], device=joined.device)
        return (
            (grad * share).to(grad.dtype),
            by_share.gather(1, joined) * is_first,
            by_share.gather(1, merging.removed),
            None,
        )
