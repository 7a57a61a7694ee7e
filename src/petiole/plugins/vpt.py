"""VPT: trained prompt tokens between the class token and the patches.

[cls, prompts, patches] ── block 0 ──> [cls, _, patches] ── fresh prompts in place of _ ── block 1 ──> ...      (deep)
                                       [cls, what became of the prompts, patches] ──────── block 1 ──> ...   (shallow)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.flow import Flow
from ..core.plugin import Prompter
from ..core.site import Site
from ..errors import PluginError


class VPT(Prompter):
    """Visual prompt tuning.

    Source: Jia et al., 2022, "Visual Prompt Tuning", arXiv 2203.12119; section 3.2.
    Parameters: `num_prompts * d` a block if deep, once if shallow.

    Args:
        num_prompts: Prompts P in each sequence [tokens].
        deep: Whether every block gets prompts of its own; otherwise those of the first block travel on.
        dropout: Dropout rate of the prompts, in training.

    Differs from the paper: prompts start uniform within `sqrt(6 / (2 d))`. The paper has the values of a patch in place
    of one d, which is the same for a ViT-B/16, whose patches have 3 * 16 * 16 = d values.
    """

    method = "vpt"

    def __init__(self, *, num_prompts: int = 10, deep: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        if num_prompts < 1:
            raise PluginError(f"num_prompts must be at least 1, got {num_prompts}")
        self.num_prompts, self.deep, self.dropout = num_prompts, deep, dropout

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        inputs = [site for site in sites if site.kind == "input"]
        if not inputs:
            raise PluginError(
                "VPT adds tokens to the sequence, but this backbone takes none: its attention knows every token by its "
                "place (windows or relative positions). Choose a method that adds no tokens, e.g. FacT or LoRA"
            )
        return inputs if self.deep else inputs[:1]

    def build(self, generator: torch.Generator | None) -> None:
        self.index = {site.name: i for i, site in enumerate(self.sites)}
        self.prompts = nn.ParameterList(torch.empty(self.num_prompts, site.width) for site in self.sites)
        for prompts in self.prompts:
            bound = (3 / prompts.shape[1]) ** 0.5
            nn.init.uniform_(prompts, -bound, bound, generator=generator)

    def enter(self, site: Site, x: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
        prompts = self.prompts[self.index[site.name]].to(x.dtype).expand(len(x), -1, -1)
        prompts = F.dropout(prompts, self.dropout, self.training)
        num_own = flow.num_prefix - flow.num_prompts
        x = torch.cat([x[:, :num_own], prompts, x[:, flow.num_prefix :]], dim=1)
        return x, flow.with_prompts(self.num_prompts)
