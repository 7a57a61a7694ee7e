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
        self.groups, self.dim, self.scale, self.dropout = groups, dim, scale, dropout
        self.set_degrees(source, target)

    def set_degrees(self, source: int, target: int) -> None:
        """Changes the pair of degrees, from the next pass on.

        Raises:
            PluginError: It was not trained for such a degree.
        """
        for name, degree in (("source", source), ("target", target)):
            if type(degree) is not int or not 0 <= degree <= self.groups:
                raise PluginError(
                    f"the {name} degree is a whole number from 0 to {self.groups}, for which the compensator is "
                    f"trained; got {degree!r}"
                )
        self.source, self.target = source, target

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

    @property
    def factor(self) -> float:
        """Factor of the steps between the degrees: negative on the way back."""
        return self.scale if self.target > self.source else -self.scale

    def code(self, site: Site, x: Tensor) -> Tensor:
        """Returns the scaled codes of the steps `[B, N, steps * dim]`."""
        code = F.dropout(x @ self.factors(site)[0].mT, self.dropout, self.training)
        return code * self.factor

    def add_group(self, sites: Sequence[Site], x: Tensor, here: Here) -> Sequence[Tensor]:
        return [self.code(site, x) @ self.factors(site)[1].mT for site in sites]

    def add_onto(self, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        for site, start in zip(sites, here.starts or (0,), strict=True) if self.source != self.target else ():
            y = add_product(y, self.code(site, x), self.factors(site)[1], start)
        return y

    def change(self, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        down, up = self.factors(site)
        return self.factor * (up @ down), None

    def sums(self, site: Site) -> Tensor:
        """Returns the change of the weight from degree 0 to each `[groups + 1, d_out, d_in]`.

        Any pair of degrees follows: the change from m to n is `sums[n] - sums[m]`.
        """
        down, up = (w[self.index[site.name]] for w in (self.down, self.up))
        steps = torch.einsum("ogh,ghi->goi", up.unflatten(-1, (-1, self.dim)), down.unflatten(-2, (-1, self.dim)))
        return F.pad(self.scale * steps.flip(0).cumsum(0), (0, 0, 0, 0, 1, 0))
