"""timm's SwinTransformer (v1): attention in shifted windows, four stages of growing width.

x -> norm1 -> shift -> windows -> qkv -> attention + position bias, mask -> proj -> map -> shift back -> drop_path1 -> +
  -> norm2 -> fc1 -> act -> fc2 -> drop_path2 -> +
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from ..core.flow import Flow
from ..core.site import Kind
from ..core.taps import Taps
from ._parts import need, run_linear, split_heads
from ._timm import TimmView, attend, need_blocks, run_mlp, run_qkv


class TimmSwin(TimmView):
    """Walks timm's `SwinTransformer`.

    Branch sites see the map as `[B, H * W, d]` with `flow.grid` of their stage; linear sites of the attention see
    its windows, padded and one after the other, `[B, windows * window area, d]`, which are no grid. There are no
    tokens and no input sites: a window needs all its tokens.
    """

    stack = "layers"

    def check(self, model: Any) -> None:
        for s, _ in enumerate(need(model, self.stack, nn.Sequential)):
            need(model, f"layers.{s}", SwinTransformerStage)
        need_blocks(self, model, (SwinTransformerBlock,), (WindowAttention,))

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        for s, stage in enumerate(model.layers):
            for i, block in enumerate(stage.blocks):
                yield f"layers.{s}.blocks.{i}", block

    def absent(self, model: Any) -> Sequence[Kind]:
        return ("tokens", "input")

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        x = model.patch_embed(images)
        x = taps.affine("patch_embed", x, Flow(0, (x.shape[1], x.shape[2])))
        for s, stage in enumerate(model.layers):
            x = stage.downsample(x)
            for i, block in enumerate(stage.blocks):
                name, flow = f"layers.{s}.blocks.{i}", Flow(0, (x.shape[1], x.shape[2]))
                x, flow = taps.block(name, x, flow, partial(run_block, block, name, taps))
        x = taps.affine("norm", model.norm(x), flow)
        return x.flatten(1, 2), flow

    def pool(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        return super().pool(model, _as_map(tokens, flow), flow)

    def classify(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        return super().classify(model, _as_map(tokens, flow), flow)


def _as_map(tokens: Tensor, flow: Flow) -> Tensor:
    assert flow.grid is not None
    return tokens.unflatten(1, flow.grid)


def run_block(block: Any, name: str, taps: Taps, x: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
    """Returns the map `[B, H, W, d]` after one block, and the facts as they were."""
    h = taps.affine(f"{name}.norm1", block.norm1(x), flow)
    y = x + block.drop_path1(run_windows(block, f"{name}.attn", h, taps))
    x = taps.branch(f"{name}.attn", y.flatten(1, 2), h.flatten(1, 2), flow, residual=x.flatten(1, 2))
    h = taps.affine(f"{name}.norm2", block.norm2(x), flow)
    y = x + block.drop_path2(run_mlp(block.mlp, f"{name}.mlp", h, taps, flow))
    assert flow.grid is not None
    return taps.branch(f"{name}.mlp", y, h, flow, residual=x).unflatten(1, flow.grid), flow


def run_windows(block: Any, name: str, x: Tensor, taps: Taps) -> Tensor:
    """Returns the attention's output for a normed map `[B, H, W, d]`, as a map."""
    (batch, height, width, _), window, shift = x.shape, block.window_size, block.shift_size
    if any(shift):
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    padded = x.shape[1:3]
    mask = block.get_attn_mask(x) if getattr(block, "dynamic_mask", False) else block.attn_mask
    x = window_partition(x, window).reshape(batch, -1, x.shape[-1])
    y = run_attention(block.attn, name, x, mask, taps)
    y = window_reverse(y.reshape(-1, *window, y.shape[-1]), window, *padded)[:, :height, :width].contiguous()
    return torch.roll(y, shifts=tuple(shift), dims=(1, 2)) if any(shift) else y


def run_attention(attn: Any, name: str, x: Tensor, mask: Tensor | None, taps: Taps) -> Tensor:
    """Returns the attention's output within windows.

    Args:
        attn: The attention module.
        name: Its name.
        x: Windows, one after the other `[B, windows * area, d]`.
        mask: What shifted windows must not see `[windows, area, area]`, None without shift.
        taps: Where to call out.
    """
    (batch, tokens, _), area, flow = x.shape, attn.window_area, Flow(0, None)
    parts = run_qkv(attn, name, x, taps, flow)
    q, k, v = (split_heads(t.reshape(-1, area, t.shape[-1]), attn.num_heads) for t in parts)
    masks = [attn._get_rel_pos_bias()]
    if mask is not None:
        masks.append(mask[None, :, None].expand(batch, -1, attn.num_heads, -1, -1).flatten(0, 1))
    y = attend(attn, q, k, v, *masks).reshape(batch, tokens, -1)
    return attn.proj_drop(run_linear(attn.proj, f"{name}.proj", y, taps, flow))
