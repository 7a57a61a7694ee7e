"""Attention with a bias for each key, also by kernels that take no mask.

mask      softmax(q k^T * scale + bias) v
channel   softmax([q, 1 / scale] [k, bias]^T * scale) v: the same scores, the bias as one more channel
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# fused kernels take head dimensions that are multiples of this
MULTIPLE = 8


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Returns what queries attend to `[B, h, N, d_head]`, by PyTorch's fused attention.

    The bias is the mask. Where every kernel that would take one is switched off, it is one more channel.

    Args:
        q: Queries `[B, h, N, d_head]`.
        k: Keys, alike.
        v: Values, alike.
        bias: What is added to the scores, broadcast to `[B, h, N, N]`; as a channel it must be the same for all heads
            and queries, `[B, 1, 1, N]`.
        dropout: Dropout rate of the attention.
    """
    if bias is None or takes_masks(q.device) or bias.shape[1:3] != (1, 1):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    scale, d_head = q.shape[-1] ** -0.5, v.shape[-1]
    q, k, v = with_bias_channel(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)[..., :d_head]


def takes_masks(device: torch.device) -> bool:
    """Whether a kernel that takes a mask is allowed on a device; `torch.nn.attention.sdpa_kernel` may forbid them."""
    cuda = torch.backends.cuda
    return device.type != "cuda" or cuda.mem_efficient_sdp_enabled() or cuda.math_sdp_enabled()


def with_bias_channel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v with further channels, by which the scores of each key grow by its bias.

    The first further channel is 1 / scale for queries and the bias for keys; the others, up to a multiple of 8, and all
    of the values' are 0. The first `d_head` channels of what attention then gives are the answer.

    Args:
        q: Queries `[B, h, N, d_head]`.
        k: Keys, alike.
        v: Values, alike.
        bias: What is added to the scores of each key `[B, 1, 1, N]`.
        scale: Factor of the products of queries and keys.
    """
    num_further = MULTIPLE - q.shape[-1] % MULTIPLE
    wide_q, wide_k, wide_v = (F.pad(t, (0, num_further)) for t in (q, k, v))
    wide_q[..., q.shape[-1]] = 1 / scale
    wide_k[..., k.shape[-1]] = bias[:, :, 0].to(k.dtype)
    return wide_q, wide_k, wide_v
