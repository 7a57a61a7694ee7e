"""transformers' decoder-only language models: Llama, Qwen2, Mistral.

x -> self_attn -> + -> post_attention_layernorm -> mlp (gate_proj, act_fn, up_proj, down_proj) -> +
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.language import FeedForward, LanguageView
from ..core.site import Site
from ._parts import need


class Decoder(LanguageView):
    """Finds the gated feed-forward parts of decoders built like Llama."""

    def feed_forwards(self, model: Any) -> Sequence[FeedForward]:
        parts = []
        for i, layer in enumerate(need(model, "model.layers", nn.ModuleList)):
            mlp = need(layer, "mlp")
            d = need(layer, "mlp.down_proj").out_features
            site = Site(f"layers.{i}.mlp", "branch", i, d, d, d)
            attention, activation = need(layer, "self_attn"), need(layer, "mlp.act_fn")
            parts.append(FeedForward(site, layer, (attention,), mlp, mlp, activation))
        return parts

    def probe(self, model: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(4, device=model.device)[None]}
