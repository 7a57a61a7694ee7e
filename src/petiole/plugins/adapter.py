"""Adapter: a bottleneck behind a sub-layer, in sequence with it.

x ── proj or fc2 ──┬────────────────────────────────────────────────┐
                   └── down [dim, d] ── GELU ── up [d, dim] ── * scale ── + ── y
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.here import Here
from ..core.plugin import Bypass
from ..core.site import Site
from ..errors import PluginError
from ..nn.weights import FULL, check_bits, near_zero
from ._maps import Maps, uniform
from ._select import linear_sites

_ROLES = {"houlsby": ("proj", "fc2"), "pfeiffer": ("fc2",)}


class Adapter(Bypass):
    """Sequential bottlenecks: each sees what the output map of a sub-layer gives.

    Source: Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.1;
    Pfeiffer et al., 2021, "AdapterFusion", arXiv 2005.00247.
    Parameters: 2 * d * dim + dim + d per site; two sites per block for `houlsby`, one for `pfeiffer`.

    Args:
        dim: Width of the bottleneck.
        placement: `houlsby` behind attention and MLP, `pfeiffer` behind the MLP only.
        scale: Factor of what is added.
        bits: Bits per weight, 1 to 8, trained straight through; 32 for the weights as they are. Biases stay whole.

    Differs from the paper: up starts at zero instead of near it, so that a fresh plugin changes nothing. Like the
    sub-layer's own output, the addition passes LayerScale and drop path where the backbone has them; Pfeiffer's
    extra norm, which post-norm language models need, is left out.
    """

    method = "adapter"

    def __init__(
        self,
        *,
        dim: int = 8,
        placement: Literal["houlsby", "pfeiffer"] = "pfeiffer",
        scale: float = 1.0,
        bits: int = FULL,
    ) -> None:
        super().__init__()
        if dim < 1 or placement not in _ROLES:
            asked = f"dim {dim} and placement {placement!r}"
            raise PluginError(f"dim is at least 1 and placement houlsby or pfeiffer; got {asked}")
        self.dim, self.placement, self.scale, self.bits = dim, placement, scale, check_bits(bits)

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return linear_sites(self, sites, _ROLES[self.placement])

    def build(self, generator: torch.Generator | None) -> None:
        self.index = {site.name: i for i, site in enumerate(self.sites)}
        bits = self.bits
        self.down = Maps([uniform((self.dim, site.d_out), generator) for site in self.sites], bits=bits)
        self.up = Maps([near_zero((site.d_out, self.dim), bits, generator) for site in self.sites], bits=bits)

    def add(self, site: Site, x: Tensor, here: Here) -> Tensor:
        i = self.index[site.name]
        return self.up.up(i, F.gelu(self.down.down(i, here.outputs[0])), self.scale)
