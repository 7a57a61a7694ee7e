"""SSF: scales and shifts what every linear map, every norm and the patch embedding give.

y ──> gamma * y + beta
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.here import Here
from ..core.plugin import Delta
from ..core.site import Site
from ..errors import PluginError


class SSF(Delta):
    """Scaling and shifting of features.

    Source: Lian et al., 2022, "Scaling & Shifting Your Features", arXiv 2210.08823.
    Parameters: 2 d_out per site: (22 L + 4) d in a ViT of L blocks. What is stored is `gamma - 1`, so that a
    half-precision tensor can hold a small change and weight decay draws towards no change.

    Differs from the paper: gamma starts as 1 and beta as 0, not at random around them with std 0.02, so that a fresh
    plugin changes nothing. A map without a bias is scaled alone: a shift would have no bias to be merged into. Maps
    outside the blocks other than the patch embedding and the last norm, such as the patch merging of a Swin, are left
    alone.
    """

    method = "ssf"

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        chosen = [site for site in sites if site.kind in ("linear", "affine")]
        if not chosen:
            raise PluginError("SSF scales the outputs of linear maps and norms, but this backbone has no such site")
        return chosen

    def build(self, generator: torch.Generator | None) -> None:
        # one tensor a width, a row a site: hundreds of small ones would cost more in a file, and in an optimiser's step
        scales, shifts = dict[int, int](), dict[int, int]()
        self.scale_row, self.shift_row = dict[str, int](), dict[str, int]()
        for site in self.sites:
            self.scale_row[site.name] = scales.setdefault(site.d_out, 0)
            scales[site.d_out] += 1
            if site.bias:
                self.shift_row[site.name] = shifts.setdefault(site.d_out, 0)
                shifts[site.d_out] += 1
        self.scale = nn.ParameterDict({str(width): torch.zeros(n, width) for width, n in scales.items()})
        self.shift = nn.ParameterDict({str(width): torch.zeros(n, width) for width, n in shifts.items()})

    def scale_of(self, site: Site) -> Tensor:
        """Returns `gamma - 1` of a site `[..., d_out]`."""
        return self.scale[str(site.d_out)][..., self.scale_row[site.name], :]

    def shift_of(self, site: Site) -> Tensor | None:
        """Returns beta of a site `[..., d_out]`, None where the map has no bias."""
        return self.shift[str(site.d_out)][..., self.shift_row[site.name], :] if site.bias else None

    def add_group(self, sites: Sequence[Site], x: Tensor, here: Here) -> Sequence[Tensor]:
        additions = []
        for site, y in zip(sites, here.outputs, strict=True):
            scale, shift = self.scales([site], y), self.shifts([site], y)
            additions.append(y * scale if shift is None else torch.addcmul(shift, y, scale))
        return additions

    def add_onto(self, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        # one pass over y, and none in place: its old values are needed for the gradient of gamma
        gamma, shift = 1 + self.scales(sites, y), self.shifts(sites, y)
        return y * gamma if shift is None else torch.addcmul(shift, y, gamma)

    def scales(self, sites: Sequence[Site], like: Tensor) -> Tensor:
        """Returns `gamma - 1` of some sites, side by side and ready to broadcast over tokens, `[..., 1, sum of d_out]`.

        In the dtype of `like`: under autocast the product of both would otherwise be wider than what it replaces.
        """
        return _row([self.scale_of(site) for site in sites]).to(like.dtype)

    def shifts(self, sites: Sequence[Site], like: Tensor) -> Tensor | None:
        """Returns beta of some sites as `scales` does gamma, zero where there is none; None where none has one."""
        parts = [self.shift_of(site) for site in sites]
        own = [part for part in parts if part is not None]
        if not own:
            return None
        axes = own[0].shape[:-1]
        filled = [own[0].new_zeros(*axes, s.d_out) if p is None else p for s, p in zip(sites, parts, strict=True)]
        return _row(filled).to(like.dtype)

    def change(self, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale, shift = self.scale_of(site), self.shift_of(site)
        dw = scale.reshape(-1, *[1] * (weight.ndim - 1)) * weight
        return dw, None if bias is None or shift is None else scale * bias + shift


def _row(parts: Sequence[Tensor]) -> Tensor:
    return (torch.cat(list(parts), dim=-1) if len(parts) > 1 else parts[0]).unsqueeze(-2)
