"""AdaptFormer: a bottleneck in parallel to each MLP.

x ──┬── norm2 ── MLP ── drop path ───────────────────────────────┐
    └── down [dim, d] ── ReLU ── drop ── up [d, dim] ── * scale ── + ── + x
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.here import Here
from ..core.plugin import Bypass
from ..core.site import Site
from ..errors import PluginError
from ..nn.weights import FULL, check_bits, near_zero
from ._maps import Maps, uniform
from ._select import branch_sites


class AdaptFormer(Bypass):
    """A bottleneck beside each MLP, which sees the residual stream before the MLP's norm.

    Source: Chen et al., 2022, "AdaptFormer", arXiv 2205.13535; section 3. With few bits and without biases this is
    Bi-AdaptFormer: Jie et al., 2023, arXiv 2307.16867.
    Parameters: 2 * d * dim + dim + d per block, 2 * d * dim without biases.

    Args:
        dim: Width of the bottleneck.
        scale: Factor of what is added.
        dropout: Dropout rate of the code before the up projection, in training.
        bias: Whether the two projections have biases.
        bits: Bits per weight, 1 to 8, trained straight through; 32 for the weights as they are. Biases stay whole.

    Differs from the paper: its scale is 0.1; Jie et al. choose one per task, and 1 is neutral.
    The input is taken before norm2, as in the authors' code; their figure shows it behind.
    """

    method = "adaptformer"

    def __init__(
        self, *, dim: int = 8, scale: float = 1.0, dropout: float = 0.1, bias: bool = True, bits: int = FULL
    ) -> None:
        super().__init__()
        if dim < 1:
            raise PluginError(f"dim must be at least 1, got {dim}")
        self.dim, self.scale, self.dropout, self.bias, self.bits = dim, scale, dropout, bias, check_bits(bits)

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return branch_sites(self, sites, ("mlp",))

    def build(self, generator: torch.Generator | None) -> None:
        self.index = {site.name: i for i, site in enumerate(self.sites)}
        ups = [near_zero((site.d_out, self.dim), self.bits, generator) for site in self.sites]
        self.down = Maps([uniform((self.dim, site.d_in), generator) for site in self.sites], self.bias, self.bits)
        self.up = Maps(ups, self.bias, self.bits)

    def add(self, site: Site, x: Tensor, here: Here) -> Tensor:
        assert here.residual is not None
        i = self.index[site.name]
        code = torch.relu(self.down.down(i, here.residual))
        return self.up.up(i, F.dropout(code, self.dropout, self.training), self.scale)
