"""How many tokens each block of a transformer gives up, and what that saves."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from ..errors import PluginError

Budget: TypeAlias = float | Sequence[float]
"""What is removed: a whole number, a share, a line `(r, inflection)`, or a list by block. See `schedule`."""

# a share times a count may lie a rounding error above the whole number it means: 0.7 * 10 is one
SLACK = 1e-9


def schedule(budget: Budget, depth: int) -> tuple[float, ...]:
    """Returns what each block is asked for: an int is the tokens it removes, a float the share of patches it keeps.

    A budget is one of

    - a whole number: that many tokens in each block;
    - a float in (0, 1]: the share of patch tokens that each block keeps;
    - a pair of a whole number r and an inflection in [-1, 1]: a straight line from `r (1 - inflection)` in the first
      block to `r (1 + inflection)` in the last, both ends and what lies between truncated to whole numbers. -1 starts
      with 2 r and ends with 0. Truncation loses tokens: (8, -1) over 12 blocks removes 91, not 96;
    - a sequence: the request of each block by itself, a whole number or a float as above; blocks it does not reach
      remove nothing. A file's list is one, and so is what this function returns.

    A pair is a line if its second entry is negative, or a float behind a whole number that is not zero. So an
    inflection of 0 or 1 is written as a float.

    Source: Bolya et al., 2023, "Token Merging: Your ViT But Faster", arXiv 2210.09461, the constant and the decreasing
    schedule; Liang et al., 2022, "Not All Patches Are What You Need", arXiv 2202.07800, the share that is kept.

    Args:
        budget: One of the above.
        depth: Number of blocks.

    Raises:
        PluginError: The budget is none of the above, or longer than the depth.

    Example:
        >>> schedule((8, -1), 4)
        (16, 10, 5, 0)
    """
    if isinstance(budget, int | float):
        requests: tuple[float, ...] = (budget,) * depth
    elif not isinstance(budget, Sequence) or isinstance(budget, str):
        raise PluginError(
            f"the tokens to remove are a whole number, a share kept in (0, 1], a pair (r, inflection) or a list by "
            f"block; got {budget!r}"
        )
    elif _is_line(budget):
        requests = _line(int(budget[0]), budget[1], depth)
    elif isinstance(budget, tuple) and len(budget) == 2 != depth and budget[1] in (0, 1) and _is_whole(budget[0]):
        raise PluginError(
            f"{budget} is a line or two blocks: write {(budget[0], float(budget[1]))} for the line, {list(budget)} for "
            "the blocks"
        )
    elif len(budget) > depth:
        raise PluginError(f"{len(budget)} blocks are to remove tokens, but the backbone has {depth}: shorten the list")
    else:
        requests = (*budget, *(0,) * (depth - len(budget)))
    for request in requests:
        _check(request)
    return requests


def most_removed(num_tokens: int, num_protected: int = 1, *, is_pruning: bool = False) -> int:
    """Returns the most tokens that one block can remove.

    Merging pairs tokens, so at most every second one goes. Pruning fuses what it drops into one token, so one remains.

    Args:
        num_tokens: Length N of the sequence.
        num_protected: How many tokens at its front always stay.
        is_pruning: Whether tokens are pruned rather than merged in pairs.
    """
    num_patches = max(num_tokens - num_protected, 0)
    return max(num_patches - 1, 0) if is_pruning else num_patches // 2


def removed(request: float, num_tokens: int, num_protected: int = 1, *, is_pruning: bool = False) -> int:
    """Returns how many tokens a block removes of those it gets.

    Args:
        request: An entry of `schedule`. A share k keeps `ceil(k n)` of n patches, so that some always stay.
        num_tokens: Length N of the sequence.
        num_protected: How many tokens at its front always stay.
        is_pruning: Whether tokens are pruned rather than merged in pairs: another limit, see `most_removed`.
    """
    if isinstance(request, float):
        num_patches = max(num_tokens - num_protected, 0)
        request = num_patches - math.ceil(request * num_patches - SLACK)
    return min(request, most_removed(num_tokens, num_protected, is_pruning=is_pruning))


def resolve(
    budget: Budget, depth: int, num_tokens: int, num_protected: int = 1, *, is_pruning: bool = False
) -> tuple[int, ...]:
    """Returns how many tokens each block removes, within what it can remove.

    Args:
        budget: What `schedule` takes.
        depth: Number of blocks.
        num_tokens: Length N of the sequence at the first block.
        num_protected: How many tokens at its front always stay.
        is_pruning: Whether tokens are pruned rather than merged in pairs.

    Raises:
        PluginError: The budget is none, or longer than the depth.

    Example:
        >>> resolve(0.5, 3, num_tokens=17)
        (8, 4, 2)
    """
    found: list[int] = []
    for request in schedule(budget, depth):
        found.append(removed(request, num_tokens - sum(found), num_protected, is_pruning=is_pruning))
    return tuple(found)


def tokens_after(
    budget: Budget, depth: int, num_tokens: int, num_protected: int = 1, *, is_pruning: bool = False
) -> tuple[int, ...]:
    """Returns how many tokens leave each block; the arguments are those of `resolve`.

    Raises:
        PluginError: The budget is none, or longer than the depth.

    Example:
        >>> tokens_after(16, 12, num_tokens=197)[-2:]
        (21, 11)
    """
    found = [num_tokens]
    for count in resolve(budget, depth, num_tokens, num_protected, is_pruning=is_pruning):
        found.append(found[-1] - count)
    return tuple(found[1:])


def macs(
    num_tokens: Sequence[int], width: int, *, mlp_ratio: float = 4.0, patch_size: int = 16, num_protected: int = 1
) -> int:
    """Returns the multiply-accumulate operations of a plain vision transformer on one RGB image.

    Patch embedding, q, k, v, both products of attention, its projection and the MLP; norms, softmax, the matching and
    the classifier are left out. Tokens are removed between attention and MLP.

    Args:
        num_tokens: Tokens that enter the first block, then those that leave each block `[depth + 1]`.
        width: Width d of the residual stream.
        mlp_ratio: Hidden width of the MLP over d.
        patch_size: Side of a patch [pixels].
        num_protected: How many of the tokens are no patches.
    """
    total = (num_tokens[0] - num_protected) * 3 * patch_size**2 * width
    for before, after in pairwise(num_tokens):
        total += 4 * before * width**2 + 2 * before**2 * width + round(2 * mlp_ratio * after * width**2)
    return total


def _is_whole(request: float, least: int = 1) -> bool:
    return isinstance(request, int) and not isinstance(request, bool) and request >= least


def _is_line(budget: Sequence[float]) -> bool:
    if len(budget) != 2 or not _is_whole(budget[0]):
        return False
    return isinstance(budget[1], float) or budget[1] < 0


def _line(mean: int, inflection: float, depth: int) -> tuple[int, ...]:
    if not -1 <= inflection <= 1:
        raise PluginError(f"an inflection lies between -1 (fewer and fewer) and 1 (more and more), got {inflection}")
    first = int(mean * (1 - inflection))
    last, steps = 2 * mean - first, max(depth - 1, 1)
    # whole numbers throughout: a float step may fall short of a whole number, and truncation then loses one
    return (mean,) * depth if depth == 1 else tuple((first * (steps - i) + last * i) // steps for i in range(depth))


def _check(request: float) -> None:
    if not _is_whole(request, 0) and not (isinstance(request, float) and 0 < request <= 1):
        raise PluginError(
            "a block removes a whole number of tokens, 0 or more, or keeps a share of them in (0, 1], written as a "
            f"float; got {request!r}"
        )
