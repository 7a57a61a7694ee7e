"""One tiny language model per family, with random weights, and eyes for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
from models import randomised

VOCAB, WIDTH, D_IMAGE, PAD = 61, 32, 12, 0
DECODERS = ("llama", "qwen2", "mistral")
SEQ2SEQ = ("bart", "t5", "t5_gated")

_DECODER = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD}
_BART = {"d_model": WIDTH, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40}
_BART |= {f"{stack}_{what}": 2 for stack in ("encoder", "decoder") for what in ("layers", "attention_heads")}
_BART |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD, "decoder_start_token_id": 1}
_BART |= {"forced_eos_token_id": None, "dropout": 0.0}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_T5 |= {"eos_token_id": None, "pad_token_id": PAD, "decoder_start_token_id": 1}


def _make(cls: str, config: str, settings: dict[str, Any]) -> Callable[[], Any]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        model = getattr(transformers, cls)(getattr(transformers, config)(vocab_size=VOCAB, **settings))
        return randomised(model)

    return make


LANGUAGE_MODELS: dict[str, Callable[[], Any]] = {
    "llama": _make("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen2": _make("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "mistral": _make("MistralForCausalLM", "MistralConfig", _DECODER),
    "bart": _make("BartForConditionalGeneration", "BartConfig", _BART),
    "t5": _make("T5ForConditionalGeneration", "T5Config", _T5),
    "t5_gated": _make("T5ForConditionalGeneration", "T5Config", _T5 | {"feed_forward_proj": "gated-gelu"}),
}


def sighted(name: str = "llama", eyes: nn.Module | None = None, **settings: Any) -> pt.Sighted:
    """A language model with eyes whose memory shows: random tensors, large factors, no dropout."""
    plugin = pt.MemVP(**{"slots": 10, "hidden": 8, "scale": 1.0, "image_scale": 1.0, "dropout": 0.0, **settings})
    width = D_IMAGE if eyes is None else None
    return shown(pt.give_eyes(LANGUAGE_MODELS[name](), eyes, plugin, d_image=width, prove=False))


def shown(model: pt.Sighted) -> pt.Sighted:
    """The model with random tensors in place of its plugin's initial ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.plugin.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(num_rows: int, length: int, seed: int = 0) -> Tensor:
    """Token numbers without padding `[num_rows, length]`."""
    return torch.randint(3, VOCAB, (num_rows, length), generator=torch.Generator().manual_seed(seed))
