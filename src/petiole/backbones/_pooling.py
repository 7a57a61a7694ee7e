"""Pooling of tokens that stand for several: weighted by their sizes, otherwise as the model does it."""

from typing import Any

import torch
from torch import Tensor

from ..core.flow import Flow
from ..errors import PluginError


def mean_of_patches(tokens: Tensor, flow: Flow) -> Tensor:
    """Returns the mean of the patches `[B, d]`, weighted by their sizes where they have some."""
    patches = tokens[:, flow.num_prefix :]
    if flow.sizes is None:
        return patches.mean(dim=1)
    sizes = flow.sizes[:, flow.num_prefix :, None].to(tokens.dtype)
    return (patches * sizes).sum(dim=1) / sizes.sum(dim=1)


def weighed(model: Any, tokens: Tensor, flow: Flow) -> Tensor:
    """Returns tokens whose plain mean, as the model's own pooling takes it, is the mean weighted by their sizes.

    Raises:
        PluginError: The model pools otherwise, e.g. by the maximum.
    """
    if flow.sizes is None or model.global_pool in ("token", ""):
        return tokens
    if model.global_pool != "avg":
        raise PluginError(
            f"{type(model).__name__} pools by {model.global_pool!r}, which has no weights for merged tokens: use it "
            "without token compression"
        )
    start = 0 if getattr(model, "pool_include_prefix", False) else flow.num_prefix
    sizes = flow.sizes[:, start:]
    share = (sizes / sizes.mean(dim=1, keepdim=True)).to(tokens.dtype).unsqueeze(-1)
    return torch.cat([tokens[:, :start], tokens[:, start:] * share], dim=1)


def attention_pool(model: Any, tokens: Tensor, flow: Flow) -> Tensor:
    """Returns what the model's own attention pooling gives for tokens of several sizes `[B, d]`."""
    assert flow.sizes is not None
    start = 0 if model.pool_include_prefix else flow.num_prefix
    bias = flow.sizes[:, None, None, start:].log().to(tokens.dtype)
    return model.attn_pool(tokens[:, start:], attn_mask=bias)
