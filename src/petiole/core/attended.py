"""What one attention compared: its queries and keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import Flow


@dataclass(frozen=True, eq=False)
class Attended:
    """Queries and keys of one attention as they meet: normed, rotated, and as many heads of keys as of queries.

    Holds references only; nothing is computed until a reducer asks.

    Args:
        queries: Queries `[B, h, N, d_head]`.
        keys: Keys, alike.
        scale: Factor of their products.
    """

    queries: Tensor
    keys: Tensor
    scale: float

    def class_attention(self, flow: Flow) -> Tensor:
        """Returns the attention that the class token, the first of all, pays to each token `[B, N]`, mean over heads.

        One row of the softmax, in float32 at least and before dropout. Each sums to 1 over the tokens.

        Args:
            flow: Facts about the tokens: what attention adds to the scores counts here too.
        """
        wide = torch.promote_types(self.keys.dtype, torch.float32)
        # as a sum of products: autocast would take a matrix product in half precision, too coarse to rank scores by
        query = self.queries[:, :, :1].to(wide) * self.scale
        scores = (query * self.keys.to(wide)).sum(dim=-1)
        if flow.bias is not None:
            scores = scores + flow.bias[:, :, 0].to(wide)
        return scores.softmax(dim=-1).mean(dim=1)
