"""transformers' SigLIP image tower: SiglipVisionModel, SiglipForImageClassification."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.flow import Flow
from ..core.taps import Taps
from ._hf import HFView
from ._parts import need
from ._pooling import mean_of_patches
from .hf_clip import HFCLIP


class HFSiglip(HFView):
    """Walks transformers' SigLIP image tower, which has no class token.

    `SiglipForImageClassification` classifies the mean patch. In `SiglipVisionModel` a new head sees what the model's
    attention pools.
    """

    wiring = replace(HFCLIP.wiring, norm="post_layernorm")
    patches = "embeddings.patch_embedding"
    dropout = "dropout"
    scale = "scale"
    transform: ClassVar[dict[str, Any]] = {
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }

    def check(self, model: Any) -> None:
        super().check(model)
        if not self.classifiers(model):
            need(model, f"{self.prefix(model)}head.attention", nn.MultiheadAttention)

    def start(self, model: Any, images: Tensor) -> tuple[Tensor, Flow]:
        x, flow = super().start(model, images)
        return x, Flow(0, flow.grid)

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        x, flow = self.start(model, images)
        x, flow = self.run_blocks(model, x, taps, flow)
        return taps.affine("norm", self.body(model).post_layernorm(x), flow), flow

    def pool(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        if self.classifiers(model):
            return mean_of_patches(tokens, flow)
        pooling = self.body(model).head
        if flow.sizes is None:
            return pooling(tokens)
        # as the pooling does it, but that a token which stands for several is attended to as often
        bias = flow.sizes.log().to(tokens.dtype)[:, None].repeat_interleave(pooling.attention.num_heads, dim=0)
        probe = pooling.probe.repeat(len(tokens), 1, 1)
        x, _ = pooling.attention(probe, tokens, tokens, attn_mask=bias, need_weights=False)
        return (x + pooling.mlp(pooling.layernorm(x)))[:, 0]

    def unused(self, model: Any) -> Sequence[str]:
        # the classifier sees the mean patch, beside which the pooling goes for nothing
        inside = f"{self.prefix(model)}head."
        return [n for n, _ in model.named_parameters() if n.startswith(inside)] if self.classifiers(model) else []
