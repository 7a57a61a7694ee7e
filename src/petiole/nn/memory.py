"""Entries beside a feed-forward layer's own: keys that a token is compared with, and values that it takes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import PluginError

Activation = Callable[[Tensor], Tensor]


class Memory(NamedTuple):
    """Keys and values of a pass, the same in all layers.

    Args:
        keys: What tokens are compared with `[B, m, d]`.
        values: What they take `[B, m, d]`.
    """

    keys: Tensor
    values: Tensor

    def to(self, dtype: torch.dtype) -> "Memory":
        """Returns the memory in another dtype."""
        return Memory(self.keys.to(dtype), self.values.to(dtype))


def attend_memory(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    activation: Activation,
    *,
    mask: Tensor | None = None,
    on_factors: bool = False,
    drop_share: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """Returns what tokens take from memory: `sum_j phi(<x, k_j>) v_j`.

    A feed-forward layer is this sum over its own columns and rows. Rows of one sample, e.g. its beams, lie side by
    side, as transformers expands them; they are seen as one long row, so no entry is copied.

    Source: Jie et al., 2024, arXiv 2405.05615, section 3; activation of both factors and dropped scores: Hao et al.,
    2024, arXiv 2410.17779.

    Args:
        x: Tokens `[B * k, L, d]`, the k rows of each sample side by side.
        keys: `[B, m, d]`.
        values: `[B, m, d]`.
        activation: phi, elementwise.
        mask: Which entries count, bool `[B, m]`; None for all.
        on_factors: Whether the score is `<phi(x), phi(k)>` instead of `phi(<x, k>)`.
        drop_share: Share of each sample's entries that every token leaves out, those of its lowest scores; at least
            0, below 1.
        dropout: Dropout rate of the scores.

    Returns:
        The sum `[B * k, L, d]`.

    Raises:
        PluginError: The rows of `x` are not a multiple of those of the memory.
    """
    if len(x) % len(keys):
        raise PluginError(
            f"{len(x)} rows of text cannot share the memory of {len(keys)} samples: give each its own, or one to all"
        )
    queries = x.reshape(len(keys), -1, x.shape[-1])
    scores = activation(queries) @ activation(keys).mT if on_factors else activation(queries @ keys.mT)
    counts = None if mask is None else mask.unsqueeze(1)
    if drop_share:
        scores = _without_lowest(scores, drop_share, counts)
    if counts is not None:
        scores = scores.masked_fill(~counts, 0)
    if dropout:
        scores = F.dropout(scores, dropout)
    return (scores @ values).view(x.shape)


def _without_lowest(scores: Tensor, share: float, counts: Tensor | None) -> Tensor:
    """Returns scores `[B, N, m]` with the lowest share of those that count `[B, 1, m]` at zero, token by token."""
    num_entries = scores.new_full((1, 1, 1), scores.shape[-1]) if counts is None else counts.sum(-1, keepdim=True)
    ranked = (scores if counts is None else scores.masked_fill(~counts, torch.inf)).detach().sort().values
    first_kept = (share * num_entries).long().expand(*scores.shape[:2], 1)
    return scores.masked_fill(scores < ranked.gather(-1, first_kept), 0)
