"""LoRA: a low-rank bypass of its own beside each chosen linear map.

x ──┬── W ──────────────────┐
    └── A [r, d_in] ── drop ── B [d_out, r] ── * scale ── + ── y
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.here import Here
from ..core.plugin import Delta
from ..core.site import Site
from ..errors import PluginError
from ..nn.product import add_product
from ..nn.weights import FULL, Weights, check_bits, near_zero
from ._maps import uniform
from ._select import linear_sites


class LoRA(Delta):
    """Low-rank adaptation.

    Source: Hu et al., 2021, "LoRA", arXiv 2106.09685; sites and dropout as in Jie et al., 2023, arXiv 2307.16867.
    Parameters: rank * (d_in + d_out) per site; 4 * L * d * rank on q and v of a ViT.

    Args:
        rank: Rank of each change.
        roles: Which linear maps, by role: `q`, `k`, `v`, `proj`, `fc1`, `fc2`; also inside a fused qkv.
        scale: Factor of the change (other libraries' alpha / rank).
        dropout: Dropout rate of the rank-wide code, in training.
        bits: Bits per weight, 1 to 8, trained straight through (Bi-LoRA, Jie et al., 2023); 32 for the weights as they
            are.
    """

    method = "lora"
    adds_to_some = True

    def __init__(
        self,
        *,
        rank: int = 8,
        roles: Sequence[str] = ("q", "v"),
        scale: float = 1.0,
        dropout: float = 0.1,
        bits: int = FULL,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise PluginError(f"rank must be at least 1, got {rank}")
        self.rank, self.roles, self.scale, self.dropout = rank, tuple(roles), scale, dropout
        self.bits = check_bits(bits)

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return linear_sites(self, sites, self.roles)

    def build(self, generator: torch.Generator | None) -> None:
        self.index = {site.name: i for i, site in enumerate(self.sites)}
        self.down = Weights([uniform((self.rank, site.d_in), generator) for site in self.sites], self.bits)
        self.up = Weights([near_zero((site.d_out, self.rank), self.bits, generator) for site in self.sites], self.bits)

    def add_group(self, sites: Sequence[Site], x: Tensor, here: Here) -> Sequence[Tensor]:
        codes = self.code(sites, x).split(self.rank, dim=-1)
        return [code @ self.up[self.index[site.name]].mT for code, site in zip(codes, sites, strict=True)]

    def add_onto(self, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        codes = self.code(sites, x).split(self.rank, dim=-1)
        for site, code, start in zip(sites, codes, here.starts or (0,), strict=True):
            y = add_product(y, code, self.up[self.index[site.name]], start)
        return y

    def code(self, sites: Sequence[Site], x: Tensor) -> Tensor:
        """Returns the low-rank codes of sites that share `x`, side by side `[B, N, sites * rank]`."""
        downs = [self.down[self.index[site.name]] for site in sites]
        code = x @ (torch.cat(downs, dim=-2) if len(downs) > 1 else downs[0]).mT
        return F.dropout(code, self.dropout, self.training) * self.scale

    def change(self, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        i = self.index[site.name]
        return self.scale * (self.up[i] @ self.down[i]), None
