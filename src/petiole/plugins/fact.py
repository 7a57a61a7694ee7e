"""FacT: all weight changes of a transformer as slices of one low-rank tensor.

every linear map is cut into blocks of width d (q, k, v, proj: one; fc1: 4 side by side; fc2: 4 stacked)

x ── U^T ──> z [r] ── S_i [r, r] ── drop ── V^T ──> + y_i      U, V: shared by all layers, S_i: one per block
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.flow import Flow
from ..core.plugin import Delta
from ..core.site import Site
from ..errors import PluginError
from ._select import linear_sites


class FacT(Delta):
    """Factor-tuning, tensor-train or Tucker.

    Source: Jie and Deng, 2023, "FacT", arXiv 2212.03145; section 3. A change of block i is `scale * U S_i V^T` in the
    row convention `y = x W`; `tt` learns every core S_i, `tk` mixes them from r shared ones, `S_i = sum_k P[k, i] C_k`.
    Parameters: with n blocks in all (12 per layer of a ViT), tt `2 d r + n r^2`, tk `2 d r + n r + r^3`, for every
    width d the backbone has (one tensor per stage of Swin).

    Args:
        rank: Rank r of the tensor.
        form: `tt` or `tk`.
        roles: Which linear maps, by role; None for all.
        scale: Factor of the change.
        dropout: Dropout rate of the rank-wide code before V, in training.
        layout: How a tk tensor's blocks are laid out in maps of several blocks: `paper` gives each block its own
            `S_i`; `reference` interleaves them as the authors' published checkpoints do. The same count and rank.

    Differs from the paper: where a map is not a multiple of d wide, its last block is cut.
    """

    method = "fact"

    def __init__(
        self,
        *,
        rank: int = 16,
        form: Literal["tt", "tk"] = "tt",
        roles: Sequence[str] | None = None,
        scale: float = 1.0,
        dropout: float = 0.1,
        layout: Literal["paper", "reference"] = "paper",
    ) -> None:
        super().__init__()
        if rank < 1:
            raise PluginError(f"rank must be at least 1, got {rank}")
        if form not in ("tt", "tk") or layout not in ("paper", "reference"):
            raise PluginError(f"form is tt or tk and layout is paper or reference, got {form!r} and {layout!r}")
        self.rank, self.form, self.scale, self.dropout, self.layout = rank, form, scale, dropout, layout
        self.roles = None if roles is None else tuple(roles)

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return linear_sites(self, sites, self.roles)

    def build(self, generator: torch.Generator | None) -> None:
        r = self.rank
        self.u, self.v, self.core, self.mix = (nn.ParameterDict() for _ in range(4))
        self.first: dict[str, int] = {}
        for width in dict.fromkeys(site.width for site in self.sites):
            key, bounds, count = str(width), [], 0
            for site in self.sites:
                if site.width == width:
                    rows, columns = _blocks(site)
                    self.first[site.name] = count
                    count += rows * columns
                    bounds += [(rows * r) ** -0.5] * (rows * columns)
            self.u[key] = nn.init.uniform_(torch.empty(r, width), -(width**-0.5), width**-0.5, generator=generator)
            self.v[key] = torch.zeros(width, r)
            if self.form == "tt":
                bound = torch.tensor(bounds)[:, None, None]
                self.core[key] = nn.init.uniform_(torch.empty(count, r, r), -1, 1, generator=generator) * bound
            else:
                self.core[key] = nn.init.xavier_uniform_(torch.empty(r, r, r), generator=generator)
                self.mix[key] = nn.init.xavier_uniform_(torch.empty(r, count), generator=generator)

    def cores(self, site: Site) -> Tensor:
        """Returns the scaled cores of a site, `[rows * r, columns * r]` for its rows x columns blocks."""
        (rows, columns), key, first = _blocks(site), str(site.width), self.first[site.name]
        r, stop = self.rank, first + rows * columns
        if self.form == "tt":
            blocks = self.core[key][..., first:stop, :, :]
        else:
            slab = (self.core[key].flatten(-3, -2) @ self.mix[key][..., first:stop]).unflatten(-2, (r, r))
            if self.layout == "reference" and rows * columns > 1:
                slab = slab.flatten(-2)
                return self.scale * (slab if rows == 1 else slab.mT)
            blocks = slab.movedim(-1, -3)
        blocks = blocks.unflatten(-3, (rows, columns))
        return self.scale * blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def add(self, site: Site, x: Tensor, flow: Flow, residual: Tensor | None = None) -> Tensor:
        return self.add_group([site], x, flow)

    def add_group(self, sites: Sequence[Site], x: Tensor, flow: Flow) -> Tensor:
        (batch, tokens), key, r = x.shape[:2], str(sites[0].width), self.rank
        rows, width = _blocks(sites[0])[0], sites[0].width
        x = F.pad(x, (0, rows * width - x.shape[-1])) if x.shape[-1] % width else x
        # U and V act on every block of width d alike, so all blocks of all sites go through them in one product each
        code = (x.reshape(batch, tokens * rows, width) @ self.u[key].mT).reshape(batch, tokens, rows * r)
        cores = [self.cores(site) for site in sites]
        code = F.dropout(code @ (torch.cat(cores, dim=-1) if len(cores) > 1 else cores[0]), self.dropout, self.training)
        y = (code.reshape(batch, -1, r) @ self.v[key].mT).reshape(batch, tokens, -1)
        if all(site.d_out % width == 0 for site in sites):
            return y
        pieces = y.split([core.shape[-1] // r * width for core in cores], dim=-1)
        return torch.cat([piece[..., : site.d_out] for piece, site in zip(pieces, sites, strict=True)], dim=-1)

    def weight(self, site: Site) -> Tensor:
        (rows, columns), key, r = _blocks(site), str(site.width), self.rank
        blocks = self.cores(site).reshape(rows, r, columns, r).permute(2, 0, 3, 1)
        dense = self.v[key] @ blocks @ self.u[key]
        return dense.transpose(1, 2).reshape(columns * site.width, rows * site.width)[: site.d_out, : site.d_in]


def _blocks(site: Site) -> tuple[int, int]:
    """Number of blocks of width d along the input and along the output of a site."""
    return -(-site.d_in // site.width), -(-site.d_out // site.width)
