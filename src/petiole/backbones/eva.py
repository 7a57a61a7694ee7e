"""timm's Eva: EVA, EVA-02, DINOv3, ViTs with rotary positions, Perception Encoder.

x -> norm1 -> q, k, v -> q_norm, k_norm -> rotate patches -> attention -> norm -> (gate) -> proj -> gamma_1
  -> drop_path1 -> + -> norm2 -> (SwiGLU) MLP -> gamma_2 -> drop_path2 -> +
post-norm blocks have their norms after the branches, and no gammas
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from ..core.flow import Flow
from ..core.site import Kind, Site
from ..core.taps import Taps
from ._timm import Attend, TimmView, drops_patches, need_blocks, patch_grid, run_attention, run_block, run_mlp


class TimmEva(TimmView):
    """Walks timm's `Eva`, with pre-norm or post-norm blocks.

    In a post-norm block a branch sees the residual stream itself: there is no norm before it. Rotary positions belong
    to the whole grid, so with them there are no tokens sites.
    """

    def absent(self, model: Any) -> Sequence[Kind]:
        return () if model.rope is None else ("tokens",)

    def block_sites(self, name: str, block: Any, i: int) -> list[Site]:
        sites = super().block_sites(name, block, i)
        if isinstance(block, EvaBlockPostNorm):
            for norm, branch in (("norm1", "attn"), ("norm2", "mlp")):
                moved = [site for site in sites if site.name == f"{name}.{norm}"]
                sites = [site for site in sites if site not in moved]
                end = [site.name for site in sites].index(f"{name}.{branch}")
                sites[end:end] = moved
        return sites

    def check(self, model: Any) -> None:
        need_blocks(self, model, (EvaBlock, EvaBlockPostNorm), (EvaAttention, AttentionRope))

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        grid = None if drops_patches(model) else patch_grid(model, images)
        flow = Flow(model.num_prefix_tokens, grid, has_class=model.cls_token is not None)
        x, rope = model._pos_embed(taps.affine("patch_embed", model.patch_embed(images), flow))
        x = model.norm_pre(x)
        for i, (name, block) in enumerate(self.blocks(model)):
            # mixed rotary positions are learnt per block
            turn = None if rope is None else rotation(block.attn, rope[i] if model.rope_mixed else rope)
            attention = partial(run_attention, block.attn, f"{name}.attn", taps, turn)
            step = run_post_norm_block if isinstance(block, EvaBlockPostNorm) else run_block
            x, flow = taps.block(name, x, flow, partial(step, block, name, taps, attention))
        x, flow = taps.leave(x, flow)
        return taps.affine("norm", model.norm(x), flow), flow


def rotation(attn: Any, rope: Tensor) -> Callable[[Tensor, Flow], Tensor]:
    """Returns the rotation of queries or keys `[B, h, N, d_head]` by position, which spares the prefix tokens."""

    def turn(t: Tensor, flow: Flow) -> Tensor:
        patches = apply_rot_embed_cat(t[:, :, flow.num_prefix :], rope, half=attn.rotate_half)
        return torch.cat([t[:, :, : flow.num_prefix], patches], dim=2)

    return turn


def run_post_norm_block(
    block: Any, name: str, taps: Taps, attention: Attend, x: Tensor, flow: Flow
) -> tuple[Tensor, Flow]:
    """Returns the residual stream after one post-norm block; arguments as in `run_block`."""
    y, attended = attention(x, flow)
    y = taps.affine(f"{name}.norm1", block.norm1(y), flow)
    x = taps.branch(f"{name}.attn", x + block.drop_path1(y), x, flow, residual=x)
    x, flow = taps.tokens(f"{name}.tokens", x, attended, flow)
    del attended  # queries and keys need not live on through the MLP
    y = run_mlp(block.mlp, f"{name}.mlp", x, taps, flow)
    y = taps.affine(f"{name}.norm2", block.norm2(y), flow)
    return taps.branch(f"{name}.mlp", x + block.drop_path2(y), x, flow, residual=x), flow
