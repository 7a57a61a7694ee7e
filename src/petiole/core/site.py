"""Places in a backbone where a plugin can sit."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "branch", "tokens"]


@dataclass(frozen=True)
class Slot:
    """Rows of one backbone tensor: what a linear site multiplies by.

    Args:
        name: The tensor's name in the backbone's state dict.
        start: First row.
        stop: One past the last row.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Site:
    """A named place in a backbone.

    Args:
        name: Unique in the backbone, e.g. `blocks.3.attn.q`; the last part is the site's `role`.
        kind: `linear` sees a linear map's input and adds to its output; `branch` sees the normed input of attention or
            MLP and the residual stream, and adds to the residual stream; `tokens` sees the token sequence between
            attention and MLP and may shorten it.
        block: Index of the block, counted from 0 over the whole backbone.
        width: Width of the residual stream here.
        d_in: Width of what the site sees.
        d_out: Width of what the site adds to.
        weight: Rows of the weight `[d_out, d_in]` behind a linear site.
        bias: Entries of the bias behind a linear site, None where the map has none.
        drop_path: Stochastic-depth rate of the branch the site belongs to.
    """

    name: str
    kind: Kind
    block: int
    width: int
    d_in: int
    d_out: int
    weight: Slot | None = None
    bias: Slot | None = None
    drop_path: float = 0.0

    @property
    def role(self) -> str:
        """What the site is within its block: `q`, `k`, `v`, `proj`, `fc1`, `fc2`, `attn`, `mlp`, `tokens`."""
        return self.name.rsplit(".", 1)[1]
