"""Convpass: a small convolution on the patch grid beside attention and MLP.

x ── norm ──┬── attention or MLP ── drop path ────────────────────────────────────────────┐
            └── down [h, d] ── phi ── conv 3x3 [h, h] ── phi ── drop ── up [d, h] ── drop path ── * scale ── + ── x
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.here import Here
from ..core.plugin import Bypass
from ..core.site import Site
from ..errors import PluginError
from ..nn.convolution import convolve
from ._maps import Maps
from ._select import branch_sites


class Convpass(Bypass):
    """Convolutional bypasses.

    Source: Jie and Deng, 2022, "Convolutional Bypasses Are Better Vision Transformer Adapters", arXiv 2207.07039;
    section 3. phi is the quick GELU, `t * sigmoid(1.702 t)`; the drop path's draws are the bypass's own.
    Parameters: (2 h + 1) d + 9 h^2 + 2 h per site; two sites per block, one with `roles=("attn",)` (Convpass-attn).

    Args:
        dim: Width h of the bottleneck.
        roles: Beside which branches, `attn` and `mlp`.
        scale: Factor of what is added.
        init: How the convolution starts: `xavier`, or `dirac`, the identity.
        dropout: Dropout rate of the code before the up projection, in training.

    Differs from the paper: any grid and any number of prefix tokens. Each of them, be it a class, distillation or
    register token or a prompt, passes the convolution as an image of 1 x 1, like the paper's class token.
    """

    method = "convpass"

    def __init__(
        self,
        *,
        dim: int = 8,
        roles: Sequence[str] = ("attn", "mlp"),
        scale: float = 1.0,
        init: Literal["xavier", "dirac"] = "xavier",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if dim < 1 or init not in ("xavier", "dirac"):
            raise PluginError(f"dim is at least 1 and init xavier or dirac; got dim {dim} and init {init!r}")
        self.dim, self.roles, self.scale, self.init, self.dropout = dim, tuple(roles), scale, init, dropout

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return branch_sites(self, sites, self.roles)

    def build(self, generator: torch.Generator | None) -> None:
        self.index = {site.name: i for i, site in enumerate(self.sites)}
        self.down = Maps([(self.dim, site.d_in) for site in self.sites])
        self.up = Maps([(site.d_out, self.dim) for site in self.sites])
        self.conv = nn.ParameterList(torch.empty(self.dim, self.dim, 3, 3) for _ in self.sites)
        self.conv_bias = nn.ParameterList(torch.zeros(self.dim) for _ in self.sites)
        for down, conv in zip(self.down.weight, self.conv, strict=True):
            nn.init.xavier_uniform_(down, generator=generator)
            if self.init == "dirac":
                nn.init.dirac_(conv)
            else:
                nn.init.xavier_uniform_(conv, generator=generator)

    def add(self, site: Site, x: Tensor, here: Here) -> Tensor:
        i, grid = self.index[site.name], here.flow.grid
        if grid is None:
            raise PluginError(
                f"Convpass needs the whole patch grid at {site.name}, but patches were dropped or merged before it: "
                "use it without patch dropout and token merging"
            )
        code = _quick_gelu(self.down.down(i, x))
        code = _quick_gelu(convolve(code, here.flow.num_prefix, grid, self.conv[i], self.conv_bias[i]))
        code = F.dropout(code, self.dropout, self.training)
        # stochastic depth of the bypass, apart from the backbone's own: dropout of one number per sample
        keep = F.dropout(code.new_ones(code.shape[0], 1, 1), site.drop_path, self.training and site.drop_path > 0)
        return self.up.up(i, code, self.scale * keep)


def _quick_gelu(t: Tensor) -> Tensor:
    return t * torch.sigmoid(1.702 * t)
