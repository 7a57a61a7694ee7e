"""A linear classifier that gets rows for classes as they come."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GrowingLinear(nn.Module):
    """A linear map to logits with a block of rows for each time that new classes came.

    Blocks are parameters of their own, so that an optimiser given one block leaves the others alone. Fresh rows are
    zero: a class that was just met is neither favoured nor held back.

    Parameters: (d_in + 1) * num_classes; without bias d_in * num_classes.

    Args:
        d_in: Width of the features.
        bias: Whether rows have a bias.
    """

    def __init__(self, d_in: int, *, bias: bool = True) -> None:
        super().__init__()
        self.d_in, self.bias = d_in, bias
        self.blocks = nn.ModuleList()
        self.classes: list[int] = []

    def grow(self, labels: Iterable[int], like: Tensor | None = None) -> nn.Linear | None:
        """Adds rows for the labels that are new, in rising order, and returns their block; None where none is new.

        Args:
            labels: Labels, known or new.
            like: A tensor whose device and dtype the rows get; None for those of the rows there are.
        """
        new = sorted(set(labels) - set(self.classes))
        if not new:
            return None
        like = next(self.parameters(), torch.empty(0)) if like is None else like
        block = nn.Linear(self.d_in, len(new), bias=self.bias, device=like.device, dtype=like.dtype)
        for p in block.parameters():
            nn.init.zeros_(p)
        self.blocks.append(block)
        self.classes += new
        return block

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `[B, num_classes]` of features `[B, d_in]`, in the order of `classes`."""
        if not self.blocks:
            return x.new_zeros(len(x), 0)
        logits = [block(x) for block in self.blocks]
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def rows(self, labels: Tensor) -> Tensor:
        """Returns the row of each label `[B]`; all must be known."""
        return positions(self.classes, labels)


def positions(classes: Iterable[int], labels: Tensor) -> Tensor:
    """Returns where each label `[B]` stands among classes, int64 `[B]` on the labels' device; -1 where it does not."""
    known = list(classes)
    if not known:
        return torch.full_like(labels, -1)
    if labels.device.type == "cpu":
        # a few tens of numbers are sooner looked up one by one than by a handful of small operations
        places = {label: place for place, label in enumerate(known)}
        return labels.new_tensor([places.get(label, -1) for label in labels.tolist()])
    table = labels.new_full((max(known) + 2,), -1)
    table[torch.tensor(known, device=labels.device)] = torch.arange(len(known), device=labels.device)
    return table[labels.clamp(max=max(known) + 1)]
