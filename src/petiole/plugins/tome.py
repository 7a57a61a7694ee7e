"""ToMe: similar tokens are merged between attention and MLP.

x ── attention ── + ──┬── odd and even tokens, matched by keys ── mean weighted by sizes ──> fewer tokens ── MLP
                      └── sizes ──> log sizes added to the scores of the next attention, weights of the pooling
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..core.attended import Attended
from ..core.flow import Flow
from ..core.plugin import Reducer
from ..core.site import Site
from ..nn.matching import match, merge
from ..nn.schedule import Budget, removed
from ._select import token_sites


class ToMe(Reducer):
    """Token merging: each block removes some tokens by averaging the most similar ones. Trains nothing.

    Source: Bolya et al., 2023, "Token Merging: Your ViT But Faster", arXiv 2210.09461; section 3.
    Parameters: none.

    Args:
        budget: Tokens that each block removes: a whole number, the share of patches it keeps as a float, a line
            `(r, -1)` that removes 2 r at first and none at last, or a list by block. 0 changes nothing, bit for bit.
        proportional: Whether attention counts a token as often as the tokens it stands for. Off for models that were
            pretrained without it and are used as they are, e.g. MAE.

    Differs from the paper: every prefix token is protected, and the mean is taken in float32.
    """

    method = "tome"

    def __init__(self, *, budget: Budget = 8, proportional: bool = True) -> None:
        super().__init__(budget)
        self.proportional = proportional

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return token_sites(self, sites)

    def reduce(self, site: Site, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        count = removed(self.requests[site.name], x.shape[1], flow.num_prefix)
        merging = match(attended.keys.mean(dim=1), count, flow.num_prefix) if count else None
        if merging is None:
            return x, flow
        x, sizes = merge(x, flow.sizes, merging)
        return x, replace(flow, grid=None, sizes=sizes, bias=sizes.log()[:, None, None] if self.proportional else None)
