"""Facts about the tokens of one forward pass."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flow:
    """What a plugin may need to know about the tokens it sees; travels as an argument and is returned.

    Args:
        num_prefix: Tokens in front of the patches: class, distillation and register tokens, then prompts.
        grid: Height and width of the patch grid; None once the patches no longer form one (dropped or merged).
        num_prompts: How many of the prefix tokens are prompts of a plugin.
        sizes: How many of the first tokens each token stands for `[B, N]`; None while each stands for itself. Pooling
            weights by them.
        bias: What attention adds to the scores of each key `[B, 1, 1, N]`; None for nothing.
        has_class: Whether the first of the prefix tokens is a class token.
    """

    num_prefix: int
    grid: tuple[int, int] | None
    num_prompts: int = 0
    sizes: Tensor | None = None
    bias: Tensor | None = None
    has_class: bool = False

    def with_prompts(self, num_prompts: int) -> "Flow":
        """Returns the facts once fresh prompts, the last prefix tokens, stand in place of the earlier ones."""
        own = self.without_prompts()
        # a prompt stands for itself, and attention adds nothing for it
        sizes, bias = (
            t if t is None else _widened(t, own.num_prefix, num_prompts, value)
            for t, value in ((own.sizes, 1.0), (own.bias, 0.0))
        )
        return replace(own, num_prefix=own.num_prefix + num_prompts, num_prompts=num_prompts, sizes=sizes, bias=bias)

    def without_prompts(self) -> "Flow":
        """Returns the facts once the prompts, the last prefix tokens, are gone."""
        start, stop = self.num_prefix - self.num_prompts, self.num_prefix
        kept = [t if t is None else _cut(t, start, stop) for t in (self.sizes, self.bias)]
        return replace(self, num_prefix=start, num_prompts=0, sizes=kept[0], bias=kept[1])


def _widened(t: Tensor, start: int, count: int, value: float) -> Tensor:
    fresh = t.new_full((*t.shape[:-1], count), value)
    return torch.cat([t[..., :start], fresh, t[..., start:]], dim=-1)


def _cut(t: Tensor, start: int, stop: int) -> Tensor:
    return torch.cat([t[..., :start], t[..., stop:]], dim=-1)
