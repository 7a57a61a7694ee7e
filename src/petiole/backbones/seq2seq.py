"""transformers' encoder-decoder language models: BART and T5, with and without gates.

BART  x -> attention -> + -> norm -> fc1 -> activation_fn -> fc2 -> + -> norm
T5    x -> norm -> attention -> + -> norm -> DenseReluDense (wi or wi_0 and wi_1, act, wo) -> +
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.language import FeedForward, LanguageView
from ..core.site import Site
from ._parts import need


class Seq2Seq(LanguageView):
    """Finds the feed-forward parts of the encoder, then those of the decoder."""

    @abstractmethod
    def layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Yields name and module of every layer."""

    @abstractmethod
    def feed_forward(self, name: str, block: int, layer: Any) -> FeedForward:
        """Returns the feed-forward part of one layer."""

    def feed_forwards(self, model: Any) -> Sequence[FeedForward]:
        return [self.feed_forward(name, i, layer) for i, (name, layer) in enumerate(self.layers(model))]

    def probe(self, model: Any) -> dict[str, Tensor]:
        tokens = torch.arange(4, device=model.device)[None]
        return {"input_ids": tokens, "decoder_input_ids": tokens}


class Bart(Seq2Seq):
    """Finds the feed-forward parts of BART: two maps of the layer itself."""

    def layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        for stack in ("encoder", "decoder"):
            for i, layer in enumerate(need(model, f"model.{stack}.layers", nn.ModuleList)):
                yield f"{stack}.layers.{i}", layer

    def feed_forward(self, name: str, block: int, layer: Any) -> FeedForward:
        fc1, fc2 = need(layer, "fc1"), need(layer, "fc2")
        handed = [need(layer, "self_attn")]
        if hasattr(layer, "encoder_attn"):
            handed.append(layer.encoder_attn)
        site = Site(f"{name}.mlp", "branch", block, fc2.out_features, fc1.in_features, fc2.out_features)
        return FeedForward(site, layer, tuple(handed), fc1, fc2, need(layer, "activation_fn"))


class T5(Seq2Seq):
    """Finds the feed-forward parts of T5, v1.1 and Flan: the last of each block's layers."""

    def layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        for stack in ("encoder", "decoder"):
            for i, layer in enumerate(need(model, f"{stack}.block", nn.ModuleList)):
                yield f"{stack}.block.{i}", layer

    def feed_forward(self, name: str, block: int, layer: Any) -> FeedForward:
        *attentions, last = need(layer, "layer", nn.ModuleList)
        mlp, d = need(last, "DenseReluDense"), need(last, "DenseReluDense.wo").out_features
        site = Site(f"{name}.mlp", "branch", block, d, d, d)
        return FeedForward(site, layer, tuple(attentions), mlp, mlp, need(last, "DenseReluDense.act"))
