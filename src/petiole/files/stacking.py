"""Lists of equal tensors, kept as one: a header entry costs 80 bytes, as much as a small 1-bit matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor

_ALL = "*"


def stack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with every list of one shape and dtype as one tensor: `a.0.b, a.1.b` as `a.*.b` `[n, ...]`.

    The number of a list is the last one in the name; a list counts from 0 without a gap.
    """
    lists: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        places = [i for i, part in enumerate(parts) if part.isdigit()]
        if places:
            number, parts[places[-1]] = parts[places[-1]], _ALL
            lists.setdefault(".".join(parts), {})[number] = tensor
    packed = dict(tensors)
    for pattern, items in lists.items():
        order = [str(i) for i in range(len(items))]
        kinds = {(tensor.shape, tensor.dtype) for tensor in items.values()}
        if len(items) > 1 and items.keys() == set(order) and len(kinds) == 1:
            packed[pattern] = torch.stack([items[i] for i in order])
            for i in order:
                del packed[_name(pattern, i)]
    return packed


def unstack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what `stack` was given; leaves every other tensor as it is."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _ALL in name.split(".") and tensor.ndim:
            plain |= {_name(name, str(i)): item for i, item in enumerate(tensor)}
        else:
            plain[name] = tensor
    return plain


def _name(pattern: str, number: str) -> str:
    return ".".join(number if part == _ALL else part for part in pattern.split("."))
