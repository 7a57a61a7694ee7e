"""transformers' ViT: ViTModel and ViTForImageClassification."""

from typing import Any, ClassVar

from torch import Tensor

from ..core.flow import Flow
from ..core.taps import Taps
from ._hf import HFView
from ._plain import Wiring


class HFViT(HFView):
    """Walks transformers' ViT; a classifier sees the class token, a new head on a `ViTModel` its pooler's output."""

    wiring = Wiring(
        blocks="layers",
        norm1="layernorm_before",
        attn="attention",
        proj="o_proj",
        after1=("dropout",),
        norm2="layernorm_after",
        fc1="mlp.fc1",
        act=("mlp.activation_fn",),
        fc2="mlp.fc2",
        after2=("dropout",),
        norm="layernorm",
    )
    patches = "embeddings.patch_embeddings.projection"
    transform: ClassVar[dict[str, Any]] = {
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        x, flow = self.start(model, images)
        x, flow = self.run_blocks(model, x, taps, flow)
        return taps.affine("norm", self.body(model).layernorm(x), flow), flow

    def pool(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        pooler = self.body(model).pooler
        return tokens[:, 0] if pooler is None else pooler(tokens)

    def num_features(self, model: Any) -> int:
        pooler = self.body(model).pooler
        return super().num_features(model) if pooler is None else pooler.dense.out_features
