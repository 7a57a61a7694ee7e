"""Quantised tensors in a file: their codes, packed, and the mean and deviation of every matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import PluginFileError
from ..nn.weights import quantised


def packed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a model's tensors with every group of latent ones as `NAME.codes` and `NAME.statistics`."""
    found = dict(tensors)
    for name, weights in quantised(model):
        for key in weights:
            del found[f"{name}.{key}"]
        found[f"{name}.codes"], found[f"{name}.statistics"] = weights.encoded()
    return found


def unpacked(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the state that a file's tensors stand for: values and statistics in place of codes.

    Args:
        model: A fresh model as the file describes it, which takes the codes here.
        tensors: The file's; latent tensors may be there as they are.
        where: What messages call the file.

    Raises:
        PluginFileError: Codes or statistics are missing, or are not as many as the model has.
    """
    found = dict(tensors)
    for name, weights in quantised(model):
        codes, statistics = found.pop(f"{name}.codes", None), found.pop(f"{name}.statistics", None)
        if codes is None and statistics is None:
            continue
        if codes is None or statistics is None:
            raise PluginFileError(f"{where} holds only one of {name}.codes and {name}.statistics: both are needed")
        num_matrices, num = weights.num_matrices, sum(p.numel() for p in weights.parameters())
        if codes.dtype != torch.uint8 or codes.numel() != -(-num * weights.bits // 8):
            raise PluginFileError(
                f"{where}: {name}.codes should be {num} codes of {weights.bits} bits in {-(-num * weights.bits // 8)} "
                f"bytes, found {codes.numel()} of {codes.dtype}"
            )
        if statistics.shape != (num_matrices, 2) or not torch.isfinite(statistics).all():
            raise PluginFileError(
                f"{where}: {name}.statistics should be {num_matrices} finite means and deviations, found "
                f"{list(statistics.shape)}"
            )
        weights.hold(codes, statistics)
        found |= {f"{name}.{key}": tensor for key, tensor in weights.state_dict().items()}
    return found
