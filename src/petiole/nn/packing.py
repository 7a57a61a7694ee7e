"""Codes of few bits as bytes."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns codes as bytes, uint8 `[ceil(n * bits / 8)]`: one stream, lowest bits first; zeros fill the last byte.

    Args:
        codes: Whole numbers below `2 ** bits`, of any shape, read row by row.
        bits: Bits per code, 1 to 8.
    """
    flat = codes.reshape(-1, 1).to(torch.uint8).cpu().numpy()
    stream = flat if bits == 1 else np.unpackbits(flat, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Returns the codes, uint8 of a shape, that `pack` made bytes of.

    Raises:
        ValueError: The bytes are not as many as the shape needs.
    """
    num = int(np.prod(shape))
    if packed.numel() != -(-num * bits // 8):
        raise ValueError(f"{num} codes of {bits} bits are {-(-num * bits // 8)} bytes, got {packed.numel()}")
    stream = np.unpackbits(packed.cpu().numpy(), count=num * bits, bitorder="little")
    if bits > 1:
        stream = np.packbits(stream.reshape(num, bits), axis=1, bitorder="little")
    return torch.from_numpy(stream.reshape(shape))


def look_up(packed: Tensor, table: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Yields the level of each code, `table[codes]`, float32 `[size]` for each size, one after the other.

    Args:
        packed: Codes of all sizes, as `pack` made them one stream.
        table: Its 2, 4, ..., 256 levels.
        sizes: Numbers of codes.
    """
    levels, bits = table.float().cpu().numpy(), (len(table) - 1).bit_length()
    if 8 % bits or any(size * bits % 8 for size in sizes):
        yield from torch.from_numpy(levels[unpack(packed, bits, (sum(sizes),)).numpy()]).split(list(sizes))
        return
    # whole bytes at once: at 1 bit a tenth of the time that code by code takes
    of_bytes = levels[_every_byte(bits)]
    for part in packed.cpu().split([size * bits // 8 for size in sizes]):
        yield torch.from_numpy(of_bytes.take(part.numpy(), axis=0).ravel())


@lru_cache
def _every_byte(bits: int) -> np.ndarray:
    """Returns the codes in each of the 256 bytes `[256, 8 / bits]`."""
    return np.asarray(unpack(torch.arange(256, dtype=torch.uint8, device="cpu"), bits, (256, 8 // bits)))
