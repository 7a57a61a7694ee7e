"""LayerNorm tuning: gains and biases of the norms, and nothing else, are trained."""

from torch import nn

from ..core.plugin import Tuning


class LayerNorm(Tuning):
    """Trains a copy of the weight and bias of every normalisation layer.

    Source: Basu et al., 2023, "Strong Baselines for Parameter Efficient Few-Shot Fine-Tuning", arXiv 2304.01917;
    `LN-Tune`.
    Parameters: (4 L + 2) d in a ViT of L blocks: gain and bias of two norms a block and of the last one.
    """

    method = "layernorm"

    def trains(self, name: str, owner: nn.Module) -> bool:
        # Libraries bring norms of their own (RMSNorm, LayerNorm2d, LayerNormFp32), so they are known by their shape: a
        # gain for each channel, perhaps a bias, both by their usual names. LayerScale calls its gains otherwise; the
        # weight of every map has more than one axis.
        own = dict(owner.named_parameters(recurse=False))
        is_norm = "weight" in own and own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
        return is_norm and not isinstance(owner, nn.PReLU)
