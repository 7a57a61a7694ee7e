"""Lists of equal tensors, kept as one: a header entry costs 80 bytes, as much as a small 1-bit matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor

_ALL = "*"


def stack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with every list `a.0, a.1, ...` of one shape and dtype as one tensor `a.*` `[n, ...]`."""
    lists: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, index = name.rpartition(".")
        if index.isdigit():
            lists.setdefault(stem, {})[index] = tensor
    packed = dict(tensors)
    for stem, items in lists.items():
        order = [str(i) for i in range(len(items))]
        kinds = {(tensor.shape, tensor.dtype) for tensor in items.values()}
        if len(items) > 1 and items.keys() == set(order) and len(kinds) == 1:
            packed[f"{stem}.{_ALL}"] = torch.stack([items[i] for i in order])
            for i in order:
                del packed[f"{stem}.{i}"]
    return packed


def unstack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what `stack` was given; leaves every other tensor as it is."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, index = name.rpartition(".")
        if index == _ALL and tensor.ndim:
            plain |= {f"{stem}.{i}": item for i, item in enumerate(tensor)}
        else:
            plain[name] = tensor
    return plain
