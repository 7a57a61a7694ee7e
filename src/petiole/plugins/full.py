"""Full fine-tuning: every tensor of the backbone is trained."""

from torch import nn

from ..core.plugin import Tuning


class Full(Tuning):
    """Trains a copy of the whole backbone.

    Source: the `Full` row of VTAB-1k tables, e.g. Jie and Deng, 2022, arXiv 2207.07039, table 1.
    Parameters: all of the backbone's. The backbone itself stays as it is; the file holds the whole model.
    """

    method = "full"

    def trains(self, name: str, owner: nn.Module) -> bool:
        return True
