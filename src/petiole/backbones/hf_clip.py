"""transformers' CLIP image tower: CLIPVisionModel, CLIPVisionModelWithProjection, CLIPForImageClassification."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..core.flow import Flow
from ..core.taps import Taps
from ._hf import HFView
from ._parts import CLIP
from ._plain import Wiring
from ._pooling import mean_of_patches


class HFCLIP(HFView):
    """Walks transformers' CLIP image tower.

    `CLIPForImageClassification` classifies the mean patch. In the other classes a new head sees the normed class
    token, after the projection where there is one.
    """

    wiring = Wiring(
        blocks="encoder.layers",
        norm1="layer_norm1",
        attn="self_attn",
        proj="out_proj",
        after1=(),
        norm2="layer_norm2",
        fc1="mlp.fc1",
        act=("mlp.activation_fn",),
        fc2="mlp.fc2",
        after2=(),
    )
    patches = "embeddings.patch_embedding"
    dropout = "dropout"
    scale = "scale"
    transform: ClassVar[dict[str, Any]] = {"interpolation": "bicubic", **CLIP, "crop_pct": 1.0, "crop_mode": "center"}

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        x, flow = self.start(model, images)
        return self.run_blocks(model, self.body(model).pre_layrnorm(x), taps, flow)

    def pool(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        if self.classifiers(model):
            return mean_of_patches(tokens, flow)
        pooled = self.body(model).post_layernorm(tokens[:, 0])
        return model.visual_projection(pooled) if hasattr(model, "visual_projection") else pooled

    def unused(self, model: Any) -> Sequence[str]:
        # the classifier's mean of patches is taken before this norm
        return [f"{self.prefix(model)}post_layernorm"] if self.classifiers(model) else []

    def num_features(self, model: Any) -> int:
        if hasattr(model, "visual_projection"):
            return model.visual_projection.out_features
        return super().num_features(model)
