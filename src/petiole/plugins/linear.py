"""The linear probe: a new head on a frozen backbone."""

from collections.abc import Sequence

import torch

from ..core.plugin import Plugin
from ..core.site import Site


class Linear(Plugin):
    """Trains the head alone.

    Source: the `Linear` row of VTAB-1k tables, e.g. Jie and Deng, 2022, arXiv 2207.07039, table 1.
    Parameters: 0 beside the head.
    """

    method = "linear"

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return ()

    def build(self, generator: torch.Generator | None) -> None:
        """Creates nothing."""
