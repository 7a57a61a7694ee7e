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
from ..nn.weights import FULL, Weights, check_bits, near_zero
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
        bias: Whether projections and convolution have biases.
        bits: Bits per weight, 1 to 8, trained straight through; 32 for the weights as they are. Biases stay whole.

    Differs from the paper: any grid and any number of prefix tokens. Each of them, be it a class, distillation or
    register token or a prompt, passes the convolution as an image of 1 x 1, like the paper's class token.
    """

    method = "convpass"
    needs_grid = True

    def __init__(
        self,
        *,
        dim: int = 8,
        roles: Sequence[str] = ("attn", "mlp"),
        scale: float = 1.0,
        init: Literal["xavier", "dirac"] = "xavier",
        dropout: float = 0.1,
        bias: bool = True,
        bits: int = FULL,
    ) -> None:
        super().__init__()
        if dim < 1 or init not in ("xavier", "dirac"):
            raise PluginError(f"dim is at least 1 and init xavier or dirac; got dim {dim} and init {init!r}")
        self.dim, self.roles, self.scale, self.init, self.dropout = dim, tuple(roles), scale, init, dropout
        self.bias, self.bits = bias, check_bits(bits)

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return branch_sites(self, sites, self.roles)

    def build(self, generator: torch.Generator | None) -> None:
        self.index = {site.name: i for i, site in enumerate(self.sites)}
        h, downs, convs = self.dim, list[Tensor](), list[Tensor]()
        for site in self.sites:
            downs.append(nn.init.xavier_uniform_(torch.empty(h, site.d_in), generator=generator))
            conv = torch.empty(h, h, 3, 3)
            conv = nn.init.dirac_(conv) if self.init == "dirac" else nn.init.xavier_uniform_(conv, generator=generator)
            convs.append(conv.flatten(1))
        ups = [near_zero((site.d_out, h), self.bits, generator) for site in self.sites]
        self.down, self.up = Maps(downs, self.bias, self.bits), Maps(ups, self.bias, self.bits)
        # a kernel as a matrix [h, 9 h], which has one mean and deviation
        self.conv = Weights(convs, self.bits)
        self.conv_bias = nn.ParameterList(torch.zeros(h) for _ in self.sites if self.bias)

    def add(self, site: Site, x: Tensor, here: Here) -> Tensor:
        i, grid = self.index[site.name], here.flow.grid
        if grid is None:
            raise PluginError(
                f"Convpass needs the whole patch grid at {site.name}, but patches were dropped before it: use it "
                "without patch dropout"
            )
        code = _quick_gelu(self.down.down(i, x))
        kernel = self.conv[i].unflatten(-1, (self.dim, 3, 3))
        bias = self.conv_bias[i] if self.bias else None
        code = _quick_gelu(convolve(code, here.flow.num_prefix, grid, kernel, bias))
        code = F.dropout(code, self.dropout, self.training)
        # stochastic depth of the bypass, apart from the backbone's own: dropout of one number per sample
        keep = F.dropout(code.new_ones(code.shape[0], 1, 1), site.drop_path, self.training and site.drop_path > 0)
        return self.up.up(i, code, self.scale * keep)


def _quick_gelu(t: Tensor) -> Tensor:
    return t * torch.sigmoid(1.702 * t)
