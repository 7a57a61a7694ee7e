"""FacT: all weight changes of a transformer as slices of one low-rank tensor.

every linear map is cut into blocks of width d (q, k, v, proj: one; fc1: 4 side by side; fc2: 4 stacked)
x ── U^T ──> z [r] ── S_i [r, r] ── drop ── V^T ──> + y_i      U, V: shared by all layers, S_i: one per block
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.here import Here
from ..core.plugin import Delta
from ..core.site import Site
from ..errors import PluginError
from ..nn.blocks import expand, num_blocks, tile
from ..nn.product import add_product
from ..nn.weights import FULL, Weights, check_bits, near_zero
from ._maps import uniform
from ._select import linear_sites


class FacT(Delta):
    """Factor-tuning, tensor-train or Tucker.

    Source: Jie and Deng, 2023, "FacT", arXiv 2212.03145; section 3. A change of block i is `scale * U S_i V^T` in the
    row convention `y = x W`; `tt` learns every core S_i, `tk` mixes them from r shared ones, `S_i = sum_k P[k, i] C_k`.
    Parameters: tt `2 d r + n r^2`, tk `2 d r + n r + r^3` for n blocks (12 per layer of a ViT), for each width d.

    Args:
        rank: Rank r of the tensor.
        form: `tt` or `tk`.
        roles: Which linear maps, by role; None for all.
        scale: Factor of the change.
        dropout: Dropout rate of the rank-wide code before V, in training.
        layout: Of tk, for maps of several blocks: `paper` gives each its own `S_i`, `reference` interleaves them.
        bits: Bits per weight, 1 to 8, trained straight through; 32 for the weights as they are.

    Differs from the paper: where a map is not a multiple of d wide, its last block is cut.
    """

    method = "fact"

    def __init__(
        self,
        *,
        rank: int = 8,
        form: Literal["tt", "tk"] = "tt",
        roles: Sequence[str] | None = None,
        scale: float = 1.0,
        dropout: float = 0.1,
        layout: Literal["paper", "reference"] = "paper",
        bits: int = FULL,
    ) -> None:
        super().__init__()
        if rank < 1 or form not in ("tt", "tk") or layout not in ("paper", "reference"):
            raise PluginError(f"rank is at least 1, form tt or tk, layout paper or reference: {rank}, {form}, {layout}")
        self.rank, self.form, self.scale, self.dropout, self.layout = rank, form, scale, dropout, layout
        self.roles, self.bits = None if roles is None else tuple(roles), check_bits(bits)

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return linear_sites(self, sites, self.roles)

    def build(self, generator: torch.Generator | None) -> None:
        r = self.rank
        u, v, core, mix = (dict[str, Tensor]() for _ in range(4))
        self.first: dict[str, int] = {}
        for width in dict.fromkeys(site.width for site in self.sites):
            key, bounds = str(width), list[float]()
            for site in (site for site in self.sites if site.width == width):
                (rows, columns), self.first[site.name] = _grid(site), len(bounds)
                bounds += [(rows * r) ** -0.5] * (rows * columns)
            u[key], v[key] = uniform((r, width), generator), near_zero((width, r), self.bits, generator)
            if self.form == "tt":
                core[key] = nn.init.uniform_(torch.empty(len(bounds), r, r), -1, 1, generator=generator)
                core[key] *= torch.tensor(bounds)[:, None, None]
            else:
                core[key] = nn.init.xavier_uniform_(torch.empty(r, r, r), generator=generator)
                mix[key] = nn.init.xavier_uniform_(torch.empty(r, len(bounds)), generator=generator)
        self.u, self.v, self.core, self.mix = (Weights(tensors, self.bits) for tensors in (u, v, core, mix))

    def cores(self, site: Site) -> Tensor:
        """Returns the scaled cores of a site, `[rows * r, columns * r]` for its rows x columns blocks."""
        (rows, columns), key, first, r = _grid(site), str(site.width), self.first[site.name], self.rank
        here = slice(first, first + rows * columns)
        if self.form == "tt":
            return self.scale * tile(self.core.part(key, here), rows, columns)
        slab = (self.core[key].flatten(-3, -2) @ self.mix[key][..., here]).unflatten(-2, (r, r))
        if self.layout == "reference" and rows * columns > 1:
            return self.scale * (slab.flatten(-2) if rows == 1 else slab.flatten(-2).mT)
        return self.scale * tile(slab.movedim(-1, -3), rows, columns)

    def code(self, sites: Sequence[Site], x: Tensor) -> Tensor:
        """Returns what V is applied to, `[B, N * columns, r]`, for all blocks of all sites that share `x` at once."""
        (batch, tokens), width, r, rows = x.shape[:2], sites[0].width, self.rank, _grid(sites[0])[0]
        x = F.pad(x, (0, rows * width - x.shape[-1])) if x.shape[-1] % width else x
        code = (x.reshape(batch, tokens * rows, width) @ self.u[str(width)].mT).reshape(batch, tokens, rows * r)
        code = code @ torch.cat([self.cores(site) for site in sites], dim=-1)
        return F.dropout(code, self.dropout, self.training).reshape(batch, -1, r)

    def add_group(self, sites: Sequence[Site], x: Tensor, here: Here) -> Sequence[Tensor]:
        width = sites[0].width
        y = (self.code(sites, x) @ self.v[str(width)].mT).reshape(*x.shape[:2], -1)
        pieces = y.split([_grid(site)[1] * width for site in sites], dim=-1)
        return [piece[..., : site.d_out] for piece, site in zip(pieces, sites, strict=True)]

    def add_onto(self, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        if any(site.d_out % site.width for site in sites):
            return super().add_onto(sites, x, y, here)
        return add_product(y, self.code(sites, x), self.v[str(sites[0].width)])

    def change(self, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        factors = (factor[str(site.width)] for factor in (self.u, self.v))
        return expand(self.cores(site), *factors)[: site.d_out, : site.d_in], None


def _grid(site: Site) -> tuple[int, int]:
    return num_blocks(site.d_in, site.width), num_blocks(site.d_out, site.width)
