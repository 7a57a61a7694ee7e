"""BitFit: the biases of a backbone, and nothing else, are trained."""

from torch import nn

from ..core.plugin import Tuning


class BitFit(Tuning):
    """Trains a copy of every bias: of linear maps, norms and the patch embedding.

    Source: Ben Zaken et al., 2022, "BitFit", arXiv 2106.10199.
    Parameters: (11 L + 2) d in a ViT of L blocks: 9 d in the linear maps and 2 d in the norms of a block, d in the last
    norm, d in the patch embedding.
    """

    method = "bitfit"

    def trains(self, name: str, owner: nn.Module) -> bool:
        last = name.rpartition(".")[2]
        # fused maps have `in_proj_bias`, BEiT `q_bias`; a `relative_position_bias_table` is none: nothing adds it to a
        # map's output
        return last == "bias" or last.endswith("_bias")
