"""Embeddings in front of a decoder's text.

prefix [B, n, d] ────────┐
                         ├── [prefix, text] ── decoder ── logits of the text
text ── its embedding ───┘
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PluginError


class Prefix(NamedTuple):
    """What stands in front of texts, one row for each of them or one for all.

    Args:
        embeddings: `[B, n, d]`.
        is_there: 1 where there is one and 0 where a text sees nothing `[B, n]`.
    """

    embeddings: Tensor
    is_there: Tensor


def forward_behind(language_model: Any, prefix: Prefix | None, texts: dict[str, Any]) -> Any:
    """Returns what a decoder returns for texts behind a prefix: logits and loss are those of the text alone.

    Positions are counted over what is there, so that a text whose prefix is not there is as it is without. Cache and
    hidden states hold the prefix as well.

    Args:
        language_model: The decoder, of transformers.
        prefix: What stands in front; None for nothing, which is the decoder's own call.
        texts: Its keyword arguments.

    Raises:
        PluginError: There is no text, it goes on from a cache, or it has a mask of another shape or positions.
    """
    if prefix is None:
        return language_model(**texts)
    inputs, kept, num = _behind(language_model, prefix, texts), texts.get("logits_to_keep", 0), prefix.is_there.shape[1]
    length = inputs["inputs_embeds"].shape[1] - num
    # places of the text are counted from its beginning, negative ones and a number from its end
    is_places = isinstance(kept, Tensor)
    kept = torch.where(kept < 0, kept, kept + num) if is_places else min(kept or length, length)
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return language_model(**inputs | {"position_ids": places, "logits_to_keep": kept})


def generate_behind(language_model: Any, prefix: Prefix | None, texts: dict[str, Any]) -> Any:
    """Returns what a decoder's `generate` returns for texts behind a prefix: the text's tokens, then the new ones.

    Transformers always generates with a cache here, and its penalties for repetition see the new tokens alone.

    Args:
        language_model: The decoder, of transformers.
        prefix: What stands in front; None for nothing, which is the decoder's own call.
        texts: Keyword arguments of `generate`. Lengths in them count the text's tokens and the new ones. Texts that
            are padded need their `attention_mask`.

    Raises:
        PluginError: There is no text, it goes on from a cache, or it has a mask of another shape or positions; or
            there is a draft model, which would not read the prefix.
    """
    if prefix is None:
        return language_model.generate(**texts)
    if texts.get("assistant_model") is not None:
        raise PluginError("a draft model cannot read tokens in front of a text: leave assistant_model out")
    inputs = _behind(language_model, prefix, texts)
    lengths = {key: inputs[key] + prefix.is_there.shape[1] for key in ("max_length", "min_length") if key in inputs}
    found, tokens = language_model.generate(**inputs | lengths), _tokens(texts)
    if tokens is None:
        return found
    added = found if isinstance(found, Tensor) else found["sequences"]
    rows = tokens.to(added).repeat_interleave(len(added) // len(tokens), dim=0)
    whole = torch.cat([rows, added], dim=1)
    if isinstance(found, Tensor):
        return whole
    found["sequences"] = whole
    return found


def _behind(language_model: Any, prefix: Prefix, texts: dict[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments with embeddings of prefix and text in place of tokens, and a mask of both."""
    if texts.get("position_ids") is not None:
        raise PluginError("position_ids were given, and with tokens in front of a text they come from attention_mask")
    text = _embeddings(language_model, texts)
    mask = texts.get("attention_mask")
    mask = text.new_ones(text.shape[:2], dtype=torch.int64) if mask is None else mask
    # a cache is known by what it can do: its argument has had several names
    caches = [value for value in texts.values() if hasattr(value, "get_seq_length")]
    if mask.shape != text.shape[:2] or any(int(cache.get_seq_length()) for cache in caches):
        raise PluginError(
            f"tokens stand in front of whole texts with an attention_mask of their shape, got {tuple(mask.shape)} for "
            f"{tuple(text.shape[:2])}, or a cache to go on from: take `generate`, which goes on by itself"
        )
    embeddings, is_there = prefix.embeddings.to(text), prefix.is_there.to(mask)
    rest = {key: value for key, value in texts.items() if key not in ("input_ids", "inputs")}
    return rest | {
        "inputs_embeds": torch.cat([embeddings.expand(len(text), -1, -1), text], dim=1),
        "attention_mask": torch.cat([is_there.expand(len(text), -1), mask], dim=1),
    }


def _embeddings(language_model: Any, texts: dict[str, Any]) -> Tensor:
    given, tokens = texts.get("inputs_embeds"), _tokens(texts)
    if given is not None:
        return given
    if tokens is None:
        raise PluginError("tokens stand in front of a text, and there is none: give input_ids")
    return language_model.get_input_embeddings()(tokens)


def _tokens(texts: dict[str, Any]) -> Tensor | None:
    return next((texts[name] for name in ("input_ids", "inputs") if texts.get(name) is not None), None)
