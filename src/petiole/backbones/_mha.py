"""What families around PyTorch's own `nn.MultiheadAttention` share: torchvision and open_clip."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attended import Attended
from ..core.flow import Flow
from ..core.site import Site
from ..core.taps import Taps
from ..errors import BackboneError
from ..nn.attention import attend
from ._parts import fused_sites, need, split_heads, thirds
from ._plain import PlainView


class MhaView(PlainView):
    """Walks blocks with `nn.MultiheadAttention`.

    The oracle is the module's ordinary path. In eval mode without gradients PyTorch takes another, fused one, whose
    numbers differ by rounding; the adapted model never takes it, since it has nowhere to call out.
    """

    def check_attention(self, model: Any, part: str) -> None:
        attn = need(model, part, nn.MultiheadAttention)
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or not attn.batch_first:
            raise BackboneError(
                f"{type(model).__name__} is not wired as expected: looked for {part} as plain self-attention with "
                "in_proj_weight and batch_first, found separate maps, an extra key or another order of axes"
            )

    def qkv_sites(self, attn: Any, name: str, part: str, block: int, width: int, drop_path: float) -> list[Site]:
        biases = thirds(None if attn.in_proj_bias is None else f"{part}.in_proj_bias", width)
        return fused_sites(name, width, block, width, drop_path, f"{part}.in_proj_weight", biases)

    def run_attention(self, attn: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> tuple[Tensor, Attended]:
        # the host multiplies with tokens as the first axis; the same order of rows keeps every bit
        fused = F.linear(x.transpose(0, 1), attn.in_proj_weight, attn.in_proj_bias)
        names = (f"{name}.q", f"{name}.k", f"{name}.v")
        parts = taps.linear(names, x, fused.transpose(0, 1), attn.in_proj_weight, flow)
        q, k, v = (split_heads(t, attn.num_heads) for t in parts)
        bias, dropout = None if flow.bias is None else flow.bias.to(q.dtype), attn.dropout if attn.training else 0.0
        y = attend(q, k, v, bias, dropout)
        y = y.permute(2, 0, 1, 3).flatten(2)
        # `out_proj` is read, not called, as the host does
        out = F.linear(y, attn.out_proj.weight, attn.out_proj.bias).transpose(0, 1)
        out = taps.linear((f"{name}.proj",), y.transpose(0, 1), (out,), attn.out_proj.weight, flow)[0]
        return out, Attended(q, k, attn.head_dim**-0.5)

    def answer(self, model: Any, images: Tensor) -> Tensor:
        # an input that wants a gradient keeps the attention off its fused path
        with torch.enable_grad():
            answer = model(images.detach().requires_grad_())
        answer = answer[0] if isinstance(answer, tuple) else answer
        return answer.detach()
