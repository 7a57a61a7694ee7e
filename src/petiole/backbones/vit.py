"""timm's VisionTransformer: ViT, DeiT (also distilled), DeiT-III, DINOv2 (also with registers), CLIP and SigLIP towers.

x -> norm1 -> qkv -> q_norm, k_norm -> attention -> norm -> (gate) -> proj -> ls1 -> drop_path1 -> +
  -> norm2 -> fc1 -> act -> fc2 -> ls2 -> drop_path2 -> +
"""

from functools import partial
from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from ..core.flow import Flow
from ..core.taps import Taps
from ._timm import TimmView, drops_patches, need_blocks, patch_grid, run_attention, run_block


class TimmViT(TimmView):
    """Walks timm's `VisionTransformer` with pre-norm blocks."""

    def check(self, model: Any) -> None:
        need_blocks(self, model, (Block,), (Attention,))

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        grid = None if drops_patches(model) else patch_grid(model, images)
        flow = Flow(model.num_prefix_tokens, grid, has_class=model.cls_token is not None)
        patches = taps.affine("patch_embed", model.patch_embed(images), flow)
        x = model.norm_pre(model.patch_drop(model._pos_embed(patches)))
        for name, block in self.blocks(model):
            attention = partial(run_attention, block.attn, f"{name}.attn", taps, None)
            x, flow = taps.block(name, x, flow, partial(run_block, block, name, taps, attention))
        x, flow = taps.leave(x, flow)
        return taps.affine("norm", model.norm(x), flow), flow
