"""timm's VisionTransformer: ViT, DeiT (also distilled), DeiT-III, DINOv2 (also with registers), CLIP and SigLIP towers.

x -> norm1 -> qkv -> q_norm, k_norm -> attention -> norm -> (gate) -> proj -> ls1 -> drop_path1 -> +
  -> norm2 -> fc1 -> act -> fc2 -> ls2 -> drop_path2 -> +
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from ..core.flow import Flow
from ..core.site import Site
from ..core.taps import Taps
from ._timm import (
    TimmView,
    attend,
    block_sites,
    drops_patches,
    need_blocks,
    patch_grid,
    run_linear,
    run_mlp,
    run_qkv,
)


class TimmViT(TimmView):
    """Walks timm's `VisionTransformer` with pre-norm blocks."""

    def check(self, model: Any) -> None:
        need_blocks(self, model, (Block,), (Attention,))

    def sites(self, model: Any) -> Sequence[Site]:
        return [site for i, (name, b) in enumerate(self.blocks(model)) for site in block_sites(name, b, i)]

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        grid = None if drops_patches(model) else patch_grid(model, images)
        flow = Flow(model.num_prefix_tokens, grid)
        for name, block in self.blocks(model):
            x, flow = run_block(block, name, x, taps, flow)
        return model.norm(x), flow


def run_block(block: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> tuple[Tensor, Flow]:
    """Returns the residual stream after one block."""
    h = block.norm1(x)
    y, keys = run_attention(block.attn, f"{name}.attn", h, taps, flow)
    x = taps.branch(f"{name}.attn", x + block.drop_path1(block.ls1(y)), h, flow, residual=x)
    x, flow = taps.tokens(f"{name}.tokens", x, keys, flow)
    h = block.norm2(x)
    y = run_mlp(block.mlp, f"{name}.mlp", h, taps, flow)
    return taps.branch(f"{name}.mlp", x + block.drop_path2(block.ls2(y)), h, flow, residual=x), flow


def run_attention(attn: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> tuple[Tensor, Tensor]:
    """Returns the attention's output `[B, N, d]` and its keys `[B, h, N, d_head]`."""
    gate = None if getattr(attn, "gate", None) is None else attn.gate(x).sigmoid()
    q, k, v = run_qkv(attn, name, x, taps, flow)
    q, k = attn.q_norm(q), attn.k_norm(k)
    y = attn.norm(attend(attn, q, k, v))
    y = y if gate is None else y * gate
    return attn.proj_drop(run_linear(attn.proj, f"{name}.proj", y, taps, flow)), k
