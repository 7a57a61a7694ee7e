"""open_clip's VisionTransformer: the image tower `model.visual` of a CLIP model."""

from collections.abc import Sequence
from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from ..core.flow import Flow
from ..core.taps import Taps
from ..errors import BackboneError, MergeError, PluginError
from ._mha import MhaView
from ._parts import CLIP, need
from ._plain import Wiring


class OpenClipViT(MhaView):
    """Walks open_clip's `VisionTransformer`; a new head sees the image embedding, after the tower's projection."""

    wiring = Wiring(
        blocks="transformer.resblocks",
        norm1="ln_1",
        attn="attn",
        proj="out_proj",
        after1=("ls_1",),
        norm2="ln_2",
        fc1="mlp.c_fc",
        act=("mlp.gelu",),
        fc2="mlp.c_proj",
        after2=("ls_2",),
    )

    def check(self, model: Any) -> None:
        for _, part, _ in self.blocks(model):
            need(model, part, ResidualAttentionBlock)
        super().check(model)
        if not model.transformer.batch_first or model.pool_type == "none":
            raise BackboneError(
                f"{type(model).__name__} is not wired as expected: looked for a transformer with batch_first that "
                f"pools to one vector, found batch_first={model.transformer.batch_first}, pool_type={model.pool_type!r}"
            )

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        x = model._embeds(images)
        drops = model.training and getattr(model.patch_dropout, "prob", 0.0) > 0
        flow = Flow(1, None if drops else tuple(model.grid_size), has_class=True)
        return self.run_blocks(model, x, taps, flow)

    def pool(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        if flow.sizes is not None and (model.attn_pool is not None or model.pool_type != "tok"):
            raise PluginError(
                f"this {type(model).__name__} does not pool by its class token, and its pooling has no weights for "
                "merged tokens: use it without token compression"
            )
        pooled, _ = model._pool(tokens)
        return pooled if model.proj is None else pooled @ model.proj

    def classify(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        return self.pool(model, tokens, flow)

    def num_features(self, model: Any) -> int:
        return model.ln_post.normalized_shape[0] if model.proj is None else model.proj.shape[1]

    def classifiers(self, model: Any) -> Sequence[str]:
        return []

    def set_head(self, model: Any, head: nn.Linear) -> None:
        raise MergeError(
            "open_clip's VisionTransformer has no classifier to carry the head: use timm's VisionTransformer with the "
            "same weights, or merge without a head"
        )

    def input_config(self, model: Any) -> dict[str, Any]:
        own = getattr(model, "preprocess_cfg", {})
        return {
            "input_size": (3, *model.image_size),
            "interpolation": own.get("interpolation", "bicubic"),
            "mean": tuple(own.get("mean", CLIP["mean"])),
            "std": tuple(own.get("std", CLIP["std"])),
            "crop_pct": 1.0,
            "crop_mode": "squash" if own.get("resize_mode") == "squash" else "center",
        }
