"""EViT: tokens that the class token hardly attends to become one, between attention and MLP.

x ── attention ── + ──┬── the tokens of the highest scores, in their order ──────────── ++ ──> fewer tokens ── MLP
          │           └── the others ── mean weighted by scores ── one fused token ─────┘
          └── attention of the class token, mean over heads: the scores
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..core.attended import Attended
from ..core.flow import Flow
from ..core.plugin import Reducer
from ..core.site import Site
from ..errors import PluginError
from ..nn.matching import merge, prune
from ..nn.schedule import Budget, removed
from ._select import token_sites


class EViT(Reducer):
    """Token pruning: blocks keep the tokens that the class token attends to and fuse the rest into one. Trains nothing.

    The fused token is the last of the sequence, and a token like others in the blocks that follow. Gradients flow
    through the scores that weigh it. Attention counts it once, as any other; its size, the number of tokens it stands
    for, matters where a model pools over patches: it weighs there as often.

    Source: Liang et al., 2022, "Not All Patches Are What You Need: Expediting Vision Transformers via Token
    Reorganizations", arXiv 2202.07800; section 3. Its models of 12 blocks keep 70 % of the patches in blocks 4, 7 and
    10: `budget=[0, 0, 0, 0.7, 0, 0, 0.7, 0, 0, 0.7]`.
    Parameters: none.

    Args:
        budget: Tokens that each block removes: a whole number, the share of patches it keeps as a float, a line
            `(r, -1)` that removes 2 r at first and none at last, or a list by block. 0 changes nothing, bit for bit.

    Differs from the paper: every prefix token is protected; a share counts the fused token among those it keeps, where
    the paper keeps as many beside it; the fused token is the weighted mean, where the paper has the weighted sum.
    """

    method = "evit"
    is_pruning = True

    def __init__(self, *, budget: Budget = 8) -> None:
        super().__init__(budget)

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return token_sites(self, sites)

    def reduce(self, site: Site, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        if not flow.has_class:
            raise PluginError(
                "EViT keeps the tokens that the class token attends to, and this backbone has no class token: use ToMe"
            )
        count = removed(self.requests[site.name], x.shape[1], flow.num_prefix, is_pruning=True)
        pruning = prune(attended.class_attention(flow), count, flow.num_prefix) if count else None
        if pruning is None:
            return x, flow
        x, sizes = merge(x, flow.sizes, pruning)
        # where tokens were merged before, attention counts each as often as it stands for, and goes on to
        bias = None if flow.bias is None else sizes.log()[:, None, None]
        return x, replace(flow, grid=None, sizes=sizes, bias=bias)
