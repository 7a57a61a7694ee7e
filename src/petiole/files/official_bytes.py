"""The bytes of the 1-bit files that the authors of the binary adapters publish.

    matrices    per block, AdaptFormer: down [dim, d], up [d, dim]; LoRA: down and up of q, then down and up of v
    head        bihead: a matrix [C, d] of 1 bit, whatever the others have; else float32 weight [C, d] and bias [C]
    a matrix    codes, row by row, the first in the lowest bits; float32 mean; float32 standard deviation

There is no header and no checksum. Method, class count, bits and backbone must be known; the dim follows from the
length. The scale is kept beside the file.

Source: Jie, Wang and Deng, 2023, arXiv 2307.16867, the files beside the authors' code.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import PluginFileError, nearest
from ..nn.weights import FULL

Pair = tuple[Tensor, Tensor]

# the authors' backbone is a ViT-B/16
WIDTH, DEPTH = 768, 12
KEEP = "petiole.save keeps any model"

# method -> matrices per block
_PER_BLOCK = {"adaptformer": 2, "lora": 4}
# what the authors call a kind of file -> method, bits of the head
_KINDS = {f"{method}{end}": (method, bits) for method in _PER_BLOCK for end, bits in (("", FULL), ("-bihead", 1))}


@dataclass(frozen=True, eq=False)
class Official:
    """What such a file holds.

    Args:
        method: `adaptformer` or `lora`.
        dim: Width of the bottleneck, or rank.
        bits: Bits per weight of the plugin: 1, 2 or 4.
        down: Codes of all down projections, packed, and float32 mean and deviation of each `[num_matrices, 2]`, as
            `Weights.hold` takes them.
        up: The same of the up projections.
        head_bits: 1 or 32.
        head: Codes and statistics at 1 bit, else weight `[C, width]` and bias `[C]`.
    """

    method: str
    dim: int
    bits: int
    down: Pair
    up: Pair
    head_bits: int
    head: Pair


@dataclass(frozen=True)
class _Layout:
    """Everything but the dim that decides how long a file is."""

    kind: str
    num_classes: int
    width: int
    depth: int
    bits: int

    @property
    def num_matrices(self) -> int:
        return self.depth * _PER_BLOCK[method_and_head_bits(self.kind)[0]]

    @property
    def head(self) -> int:
        """Bytes of the head."""
        is_whole = method_and_head_bits(self.kind)[1] == FULL
        return 4 * (self.width + 1) * self.num_classes if is_whole else self.num_classes * self.width // 8 + 8

    def length(self, dim: int) -> int:
        """Returns the bytes of a file."""
        return self.num_matrices * (self.width * dim * self.bits // 8 + 8) + self.head

    def near(self, length: int) -> int:
        """Returns the least dim whose file is no shorter."""
        num_bytes = -(-(length - self.head) // self.num_matrices) - 8
        return max(1, -(-num_bytes * 8 // (self.width * self.bits)))

    def fits(self, length: int) -> bool:
        return self.length(self.near(length)) == length

    def advice(self, length: int) -> str:
        """Returns what to check, and what else a file of this length may be."""
        counts = sorted(range(1, self.num_classes + 1000), key=lambda count: abs(count - self.num_classes))
        others = [
            replace(self, width=WIDTH, depth=DEPTH),
            *(replace(self, kind=kind) for kind in _KINDS),
            *(replace(self, num_classes=count) for count in counts),
        ]
        what = "check method, classes, bits and backbone"
        for other in others:
            if other != self and other.fits(length):
                return f"{what}; {other} at dim {other.near(length)} is as long"
        return what

    def __str__(self) -> str:
        bits = f"{self.bits} bit" if self.bits == 1 else f"{self.bits} bits"
        return f"{self.kind} of {bits} with {self.num_classes} classes on width {self.width} and depth {self.depth}"


def decode(
    data: bytes,
    method: str,
    num_classes: int,
    *,
    width: int = WIDTH,
    depth: int = DEPTH,
    bits: int = 1,
    where: str = "the file",
) -> Official:
    """Returns what the bytes of an official file hold.

    The dim follows from the length, which cannot always tell dim and class count apart: `adaptformer-bihead` is as
    long with 30 classes and dim 1 as with 6 classes and dim 2. Impossible deviations then give it away.

    Args:
        data: The whole file.
        method: `adaptformer`, `adaptformer-bihead`, `lora` or `lora-bihead`.
        num_classes: Number of classes.
        width: Width of the backbone.
        depth: Its number of blocks.
        bits: Bits per weight of the plugin: 1, 2 or 4. The head of a bihead always has 1.
        where: What messages call the file.

    Raises:
        PluginFileError: There is no such method, no dim gives this length, matrices do not fill whole bytes, or a
            number is not finite or a deviation below zero.

    Example:
        >>> decode(bytes(2888), "adaptformer-bihead", num_classes=4).dim
        1
    """
    name, head_bits = method_and_head_bits(method)
    if min(num_classes, width, depth) < 1:
        raise PluginFileError(f"{where} needs classes, width and depth, got {num_classes}, {width} and {depth}")
    layout = _Layout(method, num_classes, width, depth, checked_bits(bits))
    dim = layout.near(len(data))
    if not layout.fits(len(data)):
        low, high = (f"{layout.length(d)} bytes at dim {d}" for d in (max(1, dim - 1), max(2, dim)))
        advice = layout.advice(len(data))
        raise PluginFileError(f"{where} has {len(data)} bytes, but {layout} has {low} and {high}: {advice}")
    first, last = data[: -layout.head], data[-layout.head :]
    down, up = _pairs(first, num_code_bytes(dim * width, bits), 2)
    if head_bits == FULL:
        numbers = torch.from_numpy(np.frombuffer(last, "<f4").astype(np.float32))
        head = numbers[:-num_classes].reshape(num_classes, width), numbers[-num_classes:]
    else:
        (head,) = _pairs(last, num_code_bytes(num_classes * width, 1), 1)
    official = Official(name, dim, bits, down, up, head_bits, head)
    if (fault := _fault(official)) is not None:
        raise PluginFileError(f"{where}, read as {layout} at dim {dim}, has {fault}: {layout.advice(len(data))}")
    return official


def encode(official: Official) -> bytes:
    """Returns the bytes that `decode` reads as this.

    Raises:
        PluginFileError: The format has no such bits, or a number is not finite.

    Example:
        >>> encode(decode(bytes(2888), "adaptformer-bihead", num_classes=4)) == bytes(2888)
        True
    """
    if (fault := _fault(official)) is not None:
        raise PluginFileError(f"an official file cannot hold {fault}: use an earlier state of the training")
    checked_bits(official.bits)
    matrices = _bytes(official.down, official.up)
    if official.head_bits == 1:
        return matrices + _bytes(official.head)
    return matrices + b"".join(
        tensor.detach().float().cpu().numpy().astype("<f4").tobytes() for tensor in official.head
    )


def method_and_head_bits(kind: str) -> tuple[str, int]:
    """Returns a kind of file's method, `adaptformer` or `lora`, and the bits of its head.

    Raises:
        PluginFileError: There is no such kind.
    """
    if kind not in _KINDS:
        raise PluginFileError(f"no official file is of {kind!r}{nearest(kind, _KINDS)}: choose {', '.join(_KINDS)}")
    return _KINDS[kind]


def checked_bits(bits: int) -> int:
    """Returns bits per weight of a plugin that are read and written here.

    Raises:
        PluginFileError: They are others.
    """
    if bits not in (1, 2, 4):
        why = {
            8: "the original code has a table of 256 levels of its own, which models here do not use",
            FULL: "the original code writes the head alone then, without the plugin",
        }.get(bits, "the original code packs whole numbers of codes into a byte")
        raise PluginFileError(f"official files have 1, 2 or 4 bits per weight here, not {bits}: {why}; {KEEP}")
    return bits


def _fault(official: Official) -> str | None:
    """Returns what no file can hold, in words."""
    pairs = {"down": official.down, "up": official.up, **({"head": official.head} if official.head_bits == 1 else {})}
    for name, (_, statistics) in pairs.items():
        for i, (mean, std) in enumerate(statistics.tolist()):
            if not (math.isfinite(mean) and 0 <= std < math.inf):
                return f"the mean {mean:g} and the deviation {std:g} in matrix {i} of {name}"
    if official.head_bits == FULL and not all(torch.isfinite(tensor).all() for tensor in official.head):
        return "numbers in the head that are not finite"
    return None


def num_code_bytes(num: int, bits: int) -> int:
    """Returns the bytes that the codes of a matrix of so many numbers fill.

    Raises:
        PluginFileError: They fill no whole bytes.
    """
    if left := num * bits % 8:
        raise PluginFileError(
            f"a matrix of {num} numbers has {num * bits} bits, which fill no whole bytes, and the original code never "
            f"writes the last {left // bits}: choose another dim or class count; {KEEP}"
        )
    return num * bits // 8


def _matrix(num_bytes: int) -> "np.dtype[np.void]":
    """Returns how the bytes of a matrix lie, of which so many are codes."""
    return np.dtype([("codes", "u1", (num_bytes,)), ("statistics", "<f4", (2,))])


def _pairs(data: bytes, num_bytes: int, sides: int) -> list[Pair]:
    """Returns codes and statistics of matrices of so many bytes of codes, for each of so many that take turns."""
    matrices = np.frombuffer(data, _matrix(num_bytes)).reshape(-1, sides)
    codes, statistics = matrices["codes"], matrices["statistics"].astype(np.float32)
    return [(torch.from_numpy(codes[:, i].flatten()), torch.from_numpy(statistics[:, i])) for i in range(sides)]


def _bytes(*pairs: Pair) -> bytes:
    """Returns the bytes of matrices that take turns, as `_pairs` reads them."""
    num = len(pairs[0][1])
    matrices = np.empty((num, len(pairs)), _matrix(pairs[0][0].numel() // num))
    for side, (codes, statistics) in enumerate(pairs):
        matrices["codes"][:, side] = codes.numpy().reshape(num, -1)
        matrices["statistics"][:, side] = statistics.float().cpu().numpy()
    return matrices.tobytes()
