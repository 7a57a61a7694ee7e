"""What a plugin can look at beside a site's input."""

from dataclasses import dataclass

from torch import Tensor

from .flow import Flow


@dataclass(frozen=True)
class Here:
    """What a walk has at hand at a site, or at linear sites that share one input, beside that input.

    Outputs and weights are the frozen part's own, whatever other plugins add: plugins at one site do not see each
    other, so their order means nothing and their changes merge as a sum.

    Args:
        flow: Facts about the tokens.
        residual: At a branch site, the residual stream before the norm `[B, N, width]`.
        outputs: At linear and affine sites what the frozen maps gave, one `[B, N, d_out]` a site.
        weights: At linear sites their frozen weights, one `[d_out, d_in]` a site.
        starts: At linear sites of a fused map, where each one's columns begin in the map's output.
    """

    flow: Flow
    residual: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()
    starts: tuple[int, ...] = ()

    def only(self, i: int) -> "Here":
        """Returns what is at hand at one of several sites."""
        one = slice(i, i + 1)
        return Here(self.flow, self.residual, self.outputs[one], self.weights[one], self.starts[one])
