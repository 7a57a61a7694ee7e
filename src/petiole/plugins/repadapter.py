"""RepAdapter: a linear bottleneck in front of attention and MLP, folded into the maps that follow it.

x ── Down [dim, d] + b_d ── drop ── Up [d, dim], in groups, + b_u ── * s ── + x ──> q, k, v or fc1
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.here import Here
from ..core.plugin import Delta
from ..core.site import Site
from ..errors import MergeError, PluginError
from ..nn.product import add_product
from ..nn.weights import FULL, Weights, check_bits, near_zero
from ._select import linear_sites

# the linear maps that see the normed input of a branch
ROLES = {"attn": ("q", "k", "v"), "mlp": ("fc1", "fc1_g", "fc1_x")}


class RepAdapter(Delta):
    """A re-parametrisable adapter on the input of a branch.

    With `P = W Up` behind a map W, the branch sees `W (x + s (Up z + b_u)) = W x + s (P z + W b_u)`. P is as cheap as a
    weight, not as a token, so that training costs what a low-rank bypass costs.

    Source: Luo et al., 2023, "Towards Efficient Visual Adaption via Structural Re-parameterization", arXiv 2302.08106.
    Parameters: `dim d (1 + 1 / groups)` an adapter, two adapters a block; with bias `dim + d` more.

    Args:
        dim: Width of the bottleneck.
        groups: Blocks of Up: each gives d / groups values from dim / groups codes.
        roles: Which branches have an adapter: `attn` one for q, k and v together, `mlp` one for fc1.
        scale: Factor s of the adapter's output.
        dropout: Dropout rate of the codes, in training.
        bias: Whether Down and Up have biases. They merge where the following maps have biases.
        bits: Bits per weight, 1 to 8, trained straight through; 32 for the weights as they are. Biases stay whole.
    """

    method = "repadapter"

    def __init__(
        self,
        *,
        dim: int = 8,
        groups: int = 2,
        roles: Sequence[str] = ("attn", "mlp"),
        scale: float = 1.0,
        dropout: float = 0.1,
        bias: bool = True,
        bits: int = FULL,
    ) -> None:
        super().__init__()
        if dim < 1 or groups < 1 or dim % groups:
            raise PluginError(f"dim must be a multiple of groups, got dim {dim} and groups {groups}")
        if not roles or not set(roles) <= set(ROLES):
            raise PluginError(f"RepAdapter's roles are attn and mlp, got {', '.join(roles) or 'none'}")
        self.dim, self.groups, self.roles, self.scale = dim, groups, tuple(roles), scale
        self.dropout, self.bias, self.bits = dropout, bias, check_bits(bits)

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        known = {site.role for site in sites if site.kind == "linear"}
        chosen = linear_sites(self, sites, [r for role in self.roles for r in ROLES[role] if r in known])
        for site in chosen:
            if site.d_in % self.groups:
                raise PluginError(f"groups {self.groups} must divide the width {site.d_in} at {site.name}")
        return chosen

    def build(self, generator: torch.Generator | None) -> None:
        widths = {_branch(site): site.d_in for site in self.sites}
        self.index = {site.name: list(widths).index(_branch(site)) for site in self.sites}
        shape = (self.groups, self.dim // self.groups)
        downs = [nn.init.xavier_uniform_(torch.empty(self.dim, d), generator=generator) for d in widths.values()]
        ups = [near_zero((shape[0], d // shape[0], shape[1]), self.bits, generator) for d in widths.values()]
        self.down, self.up = Weights(downs, self.bits), Weights(ups, self.bits)
        if self.bias:
            self.down_bias = nn.ParameterList(torch.zeros(self.dim) for _ in widths)
            self.up_bias = nn.ParameterList(torch.zeros(d) for d in widths.values())

    def add_group(self, sites: Sequence[Site], x: Tensor, here: Here) -> Tensor:
        return self.code(sites[0], x) @ self.product(sites, here.weights).mT

    def add_onto(self, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        return add_product(y, self.code(sites[0], x), self.product(sites, here.weights))

    def code(self, site: Site, x: Tensor) -> Tensor:
        """Returns the scaled codes `[B, N, dim]`; with bias `[B, N, dim + 1]`, the last one being the factor of b_u."""
        i = self.index[site.name]
        code = x @ self.down[i].mT
        if self.bias:
            code = code + self.down_bias[i].to(code.dtype).unsqueeze(-2)
        code = F.dropout(code, self.dropout, self.training) * self.scale
        return F.pad(code, (0, 1), value=self.scale) if self.bias else code

    def product(self, sites: Sequence[Site], weights: Sequence[Tensor]) -> Tensor:
        """Returns `W Up`, with bias and `W b_u` as a last column, for maps one above the other."""
        products = []
        for site, weight in zip(sites, weights, strict=True):
            i = self.index[site.name]
            columns = weight.unflatten(-1, (self.groups, -1)).transpose(0, 1)
            product = (columns @ self.up[i]).transpose(-3, -2).flatten(-2)
            if self.bias:
                product = torch.cat([product, weight @ self.up_bias[i].unsqueeze(-1)], dim=-1)
            products.append(product)
        return torch.cat(products, dim=-2) if len(products) > 1 else products[0]

    def change(self, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.bias and bias is None:
            raise MergeError(f"{site.name} has no bias to fold the adapter's biases into: train RepAdapter(bias=False)")
        i, product = self.index[site.name], self.scale * self.product([site], [weight])
        if not self.bias:
            return product @ self.down[i], None
        return product[:, :-1] @ self.down[i], product[:, :-1] @ self.down_bias[i] + product[:, -1]


def _branch(site: Site) -> str:
    return site.name.rpartition(".")[0]
