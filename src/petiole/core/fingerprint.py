"""What tells one set of weights from another."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """Returns a tensor's values as bytes in row-major order, without a copy where it already lies so in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> str:
    """Returns dtype, shape and a hash of the values, e.g. `float32[2, 3] 5f0c...`; equal on every device."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind}{list(tensor.shape)} {hashlib.sha256(raw_bytes(tensor)).hexdigest()}"


def fingerprint(weights: Iterable[tuple[str, Tensor]], known: Mapping[str, str] | None = None) -> str:
    """Returns a hash over names, dtypes, shapes and values of weights, 64 hex digits.

    Args:
        weights: Name and tensor, in an order that does not depend on the caller.
        known: Digests that stand in for tensors which have changed since, by name.
    """
    known = known or {}
    lines = (f"{name} {known[name] if name in known else digest(tensor)}\n" for name, tensor in weights)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
