"""transformers' DINOv2, without and with registers."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath

from ..core.flow import Flow
from ..core.taps import Taps
from ._hf import HFView
from ._parts import IMAGENET, run_linear, run_linears
from ._plain import Wiring
from ._pooling import mean_of_patches


class HFDinov2(HFView):
    """Walks transformers' DINOv2; a classifier sees the class token beside the mean patch, a bare model's head the
    class token alone."""

    wiring = Wiring(
        blocks="encoder.layer",
        norm1="norm1",
        attn="attention",
        proj="o_proj",
        after1=("layer_scale1", "drop_path"),
        norm2="norm2",
        fc1="mlp.fc1",
        act=("mlp.activation_fn",),
        fc2="mlp.fc2",
        after2=("layer_scale2", "drop_path"),
        norm="layernorm",
    )
    patches = "embeddings.patch_embeddings.projection"
    transform: ClassVar[dict[str, Any]] = {
        "interpolation": "bicubic",
        **IMAGENET,
        "crop_pct": 0.875,
        "crop_mode": "center",
    }

    def mlp_maps(self, block: Any) -> dict[str, str]:
        if hasattr(block.mlp, "gate_proj"):
            return {"fc1_g": "mlp.gate_proj", "fc1_x": "mlp.up_proj", "fc2": "mlp.down_proj"}
        return super().mlp_maps(block)

    def run_mlp(self, block: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> Tensor:
        mlp = block.mlp
        if not hasattr(mlp, "gate_proj"):
            return super().run_mlp(block, name, x, taps, flow)
        names = (f"{name}.fc1_g", f"{name}.fc1_x")
        gate, value = run_linears((mlp.gate_proj, mlp.up_proj), names, x, taps, flow)
        h = mlp.act_fn(gate) * value
        return run_linear(mlp.down_proj, f"{name}.fc2", h, taps, flow)

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        x, flow = self.start(model, images)
        x, flow = self.run_blocks(model, x, taps, flow)
        return taps.affine("norm", self.body(model).layernorm(x), flow), flow

    def pool(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        if not self.classifiers(model):
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], mean_of_patches(tokens, flow)], dim=1)

    def num_features(self, model: Any) -> int:
        return super().num_features(model) * (2 if self.classifiers(model) else 1)

    def drop_path(self, block: Any) -> float:
        return getattr(block.drop_path, "drop_prob", 0.0)

    def set_drop_path(self, model: Any, rate: float) -> None:
        blocks = list(self.blocks(model))
        for i, (_, _, block) in enumerate(blocks):
            block.drop_path = Dinov2DropPath(rate * i / max(1, len(blocks) - 1)).train(block.training)
