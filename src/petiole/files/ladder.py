"""What a plugin file would hold at other numbers of bits."""

import math
from dataclasses import dataclass

from ..nn.weights import FULL
from .metadata import PluginInfo

STEPS = (FULL, 8, 4, 2, 1)
# mean and deviation of a matrix
_STATISTICS = 2


@dataclass(frozen=True)
class Step:
    """Sizes at one number of bits.

    Args:
        bits: Bits per weight.
        plugin_bytes: The plugins' tensors [bytes]; None where a plugin has nothing to quantise.
        head_bytes: The head's [bytes]; None where the backbone's own classifier answers.
    """

    bits: int
    plugin_bytes: int | None
    head_bytes: int | None


def ladder(info: PluginInfo) -> list[Step]:
    """Returns the sizes of a plugin file's plugins and head at 32, 8, 4, 2 and 1 bits a weight; none of both: none."""
    width = {"float64": 8, "float16": 2, "bfloat16": 2}.get(info.backbone["dtype"], 4)

    def size(numbers: int, matrices: int, bits: int) -> int:
        return numbers * width if bits == FULL else math.ceil(numbers * bits / 8) + _STATISTICS * width * matrices

    own = sum(tensor.num_bytes for tensor in info.tensors if tensor.name.startswith("plugins."))
    parts = [(p["num_weights"], p["num_matrices"], p["settings"].get("bits", FULL)) for p in info.plugins]
    # what stays whole, e.g. biases; latent weights that were kept count as the codes they stand for
    latent = any(p["settings"].get("bits", FULL) != FULL for p in info.plugins) and not info.has_codes
    now = sum(size(numbers, matrices, FULL if latent else bits) for numbers, matrices, bits in parts)
    steps = []
    for bits in STEPS:
        plugins = own - now + sum(size(numbers, matrices, bits) for numbers, matrices, _ in parts)
        head = None
        if info.head is not None:
            numbers = info.head["in_features"] * info.head["out_features"]
            head = size(numbers, 1, bits) + (info.head["out_features"] * width if bits == FULL else 0)
        steps.append(Step(bits, plugins if any(numbers for numbers, _, _ in parts) else None, head))
    return steps if any(step.plugin_bytes or step.head_bytes for step in steps) else []
