"""ToCom: a compensator for a model that runs on another token budget than it was trained for.

x ──┬── W ────────────────────────────────────────────────┐
    └── D [g h, d] ── groups between the degrees ── U [d, g h] ── * (+-scale) ── + ── y      at q and v
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
from ..nn.weights import Weights
from ._maps import uniform
from ._select import linear_sites


class ToCom(Delta):
    """Token compensator: what a model trained at one degree of token merging lacks when it runs at another.

    The step from degree i to i + 1 is a group of channels; a model goes from its source to its target degree by the sum
    of the steps between, and back by their negative. So a change is antisymmetric, additive along a chain of degrees,
    and nothing at equal ones. One compensator serves every model on its backbone; `petiole.merge` folds it for a pair.

    Source: Jie et al., 2024, "Token Compensator: Altering Inference Cost of Vision Transformer without Re-Tuning",
    arXiv 2408.06798; section 3.
    Parameters: groups * dim * (d_in + d_out) per site; two sites a block.

    Args:
        groups: Largest degree: steps from 0 to it.
        dim: Channels h of each step.
        source: Degree of the model's training: tokens that each block removed.
        target: Degree at which it runs.
        scale: Factor of the change.
        dropout: Dropout rate of the code, in training.
    """

    method = "tocom"
    adds_to_some = True

    def __init__(
        self,
        *,
        groups: int = 16,
        dim: int = 2,
        source: int = 0,
        target: int = 8,
        scale: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if groups < 1 or dim < 1:
            raise PluginError(f"groups and dim are at least 1, got {groups} and {dim}")
        for name, degree in (("source", source), ("target", target)):
            if not 0 <= degree <= groups:
                raise PluginError(
                    f"the {name} degree lies between 0 and {groups}, for which it is trained; got {degree}"
                )
        self.groups, self.dim, self.source, self.target = groups, dim, source, target
        self.scale, self.dropout = scale, dropout

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return linear_sites(self, sites, ("q", "v"))

    def build(self, generator: torch.Generator | None) -> None:
        self.index, rank = {site.name: i for i, site in enumerate(self.sites)}, self.groups * self.dim
        self.down = Weights([uniform((rank, site.d_in), generator) for site in self.sites])
        self.up = Weights([torch.zeros(site.d_out, rank) for site in self.sites])

    def factors(self, site: Site) -> tuple[Tensor, Tensor]:
        """Returns the rows of D and the columns of U between the two degrees; the step from 0 to 1 lies last."""
        low, high = sorted((self.source, self.target))
        i, here = self.index[site.name], slice((self.groups - high) * self.dim, (self.groups - low) * self.dim)
        return self.down[i][..., here, :], self.up[i][..., here]

    def code(self, site: Site, x: Tensor) -> Tensor:
        """Returns the scaled codes of the steps `[B, N, steps * dim]`."""
        code = F.dropout(x @ self.factors(site)[0].mT, self.dropout, self.training)
        return code * (self.scale if self.target > self.source else -self.scale)

    def add_group(self, sites: Sequence[Site], x: Tensor, here: Here) -> Sequence[Tensor]:
        return [self.code(site, x) @ self.factors(site)[1].mT for site in sites]

    def add_onto(self, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        for site, start in zip(sites, here.starts or (0,), strict=True) if self.source != self.target else ():
            y = add_product(y, self.code(site, x), self.factors(site)[1], start)
        return y

    def change(self, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        down, up = self.factors(site)
        return (self.scale if self.target > self.source else -self.scale) * (up @ down), None
