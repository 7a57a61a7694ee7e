"""MemVP: images as entries of a language model's feed-forward layers.

features ── down [hidden, d_image] ── SiLU ── up [d, hidden] ── * image_scale ─┬─ + key positions   ── keys
                                                                               └─ + value positions ── * scale ── values
x ──┬── FFN ─────────────────────────────────────────┐
    └── phi(<x, keys>) ── drop ── sum over values ── + ── y      in every layer
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.language import IMAGE, Recaller
from ..core.site import Site
from ..errors import PluginError
from ..nn.memory import Activation, Memory, attend_memory
from ._maps import Maps
from ._select import branch_sites


class MemVP(Recaller):
    """Memory-space visual prompts: projected image features are keys and values beside a feed-forward layer's own.

    All layers share one memory, so a pass computes it once. Slots that no image feature fills hold their position
    embeddings alone: an ordinary bottleneck that also text without an image passes.

    Source: Jie et al., 2024, "Memory-Space Visual Prompting for Efficient Vision-Language Fine-Tuning", arXiv
    2405.05615; section 3. With `on_factors` and `drop_share=0.1` it scores as ADEM-VL does: Hao et al., 2024, arXiv
    2410.17779.
    Parameters: 2 * slots * d + hidden * (d_image + d + 1) + d.

    Args:
        slots: Entries of the memory; at least as many as image features.
        hidden: Width of the projector's bottleneck.
        scale: Factor of what is added.
        image_scale: Factor of the projected features.
        dropout: Dropout rate of the scores, in training.
        on_factors: Whether the score of an entry is `<phi(x), phi(k)>` instead of `phi(<x, k>)`.
        drop_share: Share of the entries that each token leaves out, those of its lowest scores.

    Differs from the paper: its total of 3,879,040 for LLaMA-7B also counts 589,824 of the adapters in the image tower
    and 8,192 of a modality embedding that nothing reads; here that embedding does not exist.
    """

    method = "memvp"

    def __init__(
        self,
        *,
        slots: int = 320,
        hidden: int = 128,
        scale: float = 0.1,
        image_scale: float = 0.01,
        dropout: float = 0.1,
        on_factors: bool = False,
        drop_share: float = 0.0,
    ) -> None:
        super().__init__()
        if slots < 1 or hidden < 1:
            raise PluginError(f"slots and hidden are at least 1, got {slots} and {hidden}")
        if not 0 <= drop_share < 1:
            raise PluginError(f"drop_share is at least 0 and below 1, got {drop_share}")
        self.slots, self.hidden, self.scale, self.image_scale = slots, hidden, scale, image_scale
        self.dropout, self.on_factors, self.drop_share = dropout, on_factors, drop_share

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        images = [site for site in sites if site.name == IMAGE]
        if not images:
            raise PluginError(
                "MemVP sits in a language model that sees images: give_eyes(language_model, eyes, MemVP()) joins it"
            )
        layers = branch_sites(self, sites, ("mlp",))
        if odd := [site for site in layers if site.width != images[0].d_out]:
            raise PluginError(
                f"MemVP shares one memory of width {images[0].d_out} among all layers: {odd[0].name} has {odd[0].width}"
            )
        return [*images, *layers]

    def build(self, generator: torch.Generator | None) -> None:
        image, d = self.sites[0], self.sites[0].d_out
        down, up = torch.empty(self.hidden, image.d_in), torch.empty(d, self.hidden)
        self.down, self.up = (Maps([nn.init.xavier_uniform_(w, generator=generator)]) for w in (down, up))
        self.key_positions = nn.Parameter(0.02 * torch.randn(1, self.slots, d, generator=generator))
        self.value_positions = nn.Parameter(torch.zeros(1, self.slots, d))

    def memory(self, features: Tensor, indicator: Tensor) -> Memory:
        batch, n = features.shape[:2]
        if n > self.slots:
            raise PluginError(f"{n} image features do not fit into {self.slots} slots: use MemVP(slots={n}), or more")
        if len(indicator) != batch or n % indicator[0].numel():
            raise PluginError(
                f"the indicator says of each sample or image whether it is there: {tuple(indicator.shape)} does not "
                f"fit {batch} samples of {n} image features"
            )
        # a factor rather than a choice, so that text without images leaves no tensor without a gradient
        is_there = indicator.to(self.key_positions).reshape(batch, -1, 1)
        factor = self.image_scale * is_there.repeat_interleave(n // is_there.shape[1], dim=1)
        with torch.autocast(features.device.type, enabled=False):
            code = F.silu(self.down.down(0, features.to(self.key_positions)))
            entries = F.pad(self.up.up(0, code, factor), (0, 0, 0, self.slots - n))
            return Memory(entries + self.key_positions, self.scale * (entries + self.value_positions))

    def recall(self, site: Site, x: Tensor, memory: Memory, activation: Activation) -> Tensor:
        return attend_memory(
            x,
            memory.keys,
            memory.values,
            activation,
            on_factors=self.on_factors,
            drop_share=self.drop_share,
            dropout=self.dropout if self.training else 0.0,
        )
