"""Places in a backbone where a plugin can sit."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "affine", "branch", "tokens", "input"]


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
        kind: `linear` sees a linear map's input and adds to its output; `affine` sees the output of a norm or of the
            patch embedding and adds to it; `branch` sees the normed input of attention or MLP and the residual stream,
            and adds to the residual stream; `tokens` sees the token sequence between attention and MLP and may shorten
            it; `input` sees the token sequence at a block's input and may put prompts into it.
        block: Index of the block, counted from 0 over the whole backbone.
        width: Width of the residual stream here.
        d_in: Width of what the site sees.
        d_out: Width of what the site adds to.
        weight: Rows of the weight behind a linear site `[d_out, d_in]` or an affine one `[d_out, ...]`.
        bias: Entries of the bias behind it, None where there is none.
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
        """What the site is within its block: `norm1`, `q`, `k`, `v`, `proj`, `attn`, `fc1`, `fc2`, `mlp`, ..."""
        return self.name.rpartition(".")[2]
