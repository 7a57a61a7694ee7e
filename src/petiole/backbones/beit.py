"""timm's Beit: BEiT and BEiT-v2.

x -> norm1 -> qkv (k without bias) -> attention + relative position bias -> proj -> gamma_1 -> drop_path1 -> +
  -> norm2 -> fc1 -> act -> fc2 -> gamma_2 -> drop_path2 -> +
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.beit import Attention, Block
from torch import Tensor

from ..core.attended import Attended
from ..core.flow import Flow
from ..core.site import Kind
from ..core.taps import Taps
from ._parts import run_linear, split_heads
from ._timm import TimmView, attend, biases, need_blocks, run_block, run_qkv


class TimmBeit(TimmView):
    """Walks timm's `Beit`; position biases belong to the whole grid, so with them no token comes or goes."""

    def absent(self, model: Any) -> Sequence[Kind]:
        biases = (block.attn.relative_position_bias_table for _, block in self.blocks(model))
        is_bound = model.rel_pos_bias is not None or any(bias is not None for bias in biases)
        return ("tokens", "input") if is_bound else ()

    def check(self, model: Any) -> None:
        need_blocks(self, model, (Block,), (Attention,))

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        flow = Flow(model.num_prefix_tokens, model.patch_embed.grid_size, has_class=True)
        x = taps.affine("patch_embed", model.patch_embed(images), flow)
        x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)
        shared = () if model.rel_pos_bias is None else (model.rel_pos_bias(),)
        for name, block in self.blocks(model):
            attention = partial(run_attention, block.attn, f"{name}.attn", taps, shared)
            x, flow = taps.block(name, x, flow, partial(run_block, block, name, taps, attention))
        x, flow = taps.leave(x, flow)
        return taps.affine("norm", model.norm(x), flow), flow


def run_attention(
    attn: Any, name: str, taps: Taps, shared: tuple[Tensor, ...], x: Tensor, flow: Flow
) -> tuple[Tensor, Attended]:
    """Returns the attention's output `[B, N, d]`, and its queries and keys.

    Args:
        attn: The attention module.
        name: Its name.
        taps: Where to call out.
        shared: Position bias common to all blocks `[h, N, N]`, or nothing.
        x: Normed input `[B, N, d]`.
        flow: Facts about the tokens.
    """
    q, k, v = (split_heads(t, attn.num_heads) for t in run_qkv(attn, name, x, taps, flow))
    own = () if attn.relative_position_bias_table is None else (attn._get_rel_pos_bias(),)
    y = attend(attn, q, k, v, *own, *shared, *biases(flow, q))
    return attn.proj_drop(run_linear(attn.proj, f"{name}.proj", y, taps, flow)), Attended(q, k, attn.scale)
