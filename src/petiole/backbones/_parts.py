"""What views of every library share: looking for parts, linear maps and their sites. Imports no host library."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..core.flow import Flow
from ..core.site import Site, Slot
from ..core.taps import Taps
from ..errors import BackboneError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def need(model: Any, part: str, kind: type | tuple[type, ...] = nn.Module) -> Any:
    """Returns a sub-module by its dotted name.

    Raises:
        BackboneError: It is absent or of another type; says which type was looked for and what was found.
    """
    found: object = model
    for step in part.split("."):
        found = getattr(found, step, None)
    if not isinstance(found, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise BackboneError(
            f"{type(model).__name__} is not wired as expected: looked for {part} of type {wanted}, "
            f"found {type(found).__name__}"
        )
    return found


def at(module: Any, part: str) -> Any:
    """Returns a sub-module by its dotted name, known to be there."""
    for step in part.split("."):
        module = getattr(module, step)
    return module


def put(model: nn.Module, part: str, module: nn.Module) -> None:
    """Sets a sub-module by its dotted name."""
    parent, _, name = part.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def plain_linear(head: nn.Linear) -> nn.Linear:
    """Returns an ordinary linear layer with a head's numbers in memory of its own."""
    copy = nn.Linear(head.in_features, head.out_features).to(head.weight)
    copy.load_state_dict(head.state_dict())
    return copy


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Returns `[B, N, d]` as `[B, h, N, d_head]`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def run_linear(module: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> Tensor:
    """Returns a linear map's output with the plugins' additions."""
    return taps.linear((name,), x, module(x), module.weight, flow)[0]


def run_linears(modules: Sequence[Any], names: Sequence[str], x: Tensor, taps: Taps, flow: Flow) -> Sequence[Tensor]:
    """Returns the outputs of separate linear maps that share the input `x`, with the plugins' additions."""
    return taps.linear(names, x, [module(x) for module in modules], [module.weight for module in modules], flow)


def linear_site(name: str, parameter: str, module: Any, block: int, width: int, drop_path: float = 0.0) -> Site:
    """Returns the site of a whole linear map.

    Args:
        name: The site's name.
        parameter: The module's name in the state dict.
        module: The map.
        block: Index of its block.
        width: Width of the residual stream.
        drop_path: Stochastic-depth rate of its branch.
    """
    d_out, d_in = module.weight.shape
    bias = None if module.bias is None else Slot(f"{parameter}.bias", 0, d_out)
    return Site(name, "linear", block, width, d_in, d_out, Slot(f"{parameter}.weight", 0, d_out), bias, drop_path)


def affine_site(name: str, parameter: str, module: Any, block: int) -> list[Site]:
    """Returns the site behind a norm or a patch convolution, nothing where it has no weight.

    Args:
        name: The site's name.
        parameter: The module's name in the state dict.
        module: The norm or convolution.
        block: Index of the block it belongs to.
    """
    if getattr(module, "weight", None) is None:
        return []
    d = len(module.weight)
    bias = None if getattr(module, "bias", None) is None else Slot(f"{parameter}.bias", 0, d)
    return [Site(name, "affine", block, d, d, d, Slot(f"{parameter}.weight", 0, d), bias)]


def fused_sites(
    name: str, d: int, block: int, width: int, drop_path: float, weight: str, biases: Sequence[Slot | None]
) -> list[Site]:
    """Returns the sites q, k, v of a fused map.

    Args:
        name: Name of the attention.
        d: Output width of each of the three.
        block: Index of the block.
        width: Width of the residual stream, which the map sees.
        drop_path: Stochastic-depth rate of the branch.
        weight: Name of the fused weight `[3 d, width]`.
        biases: Where each bias lies, None where there is none.
    """
    return [
        Site(f"{name}.{role}", "linear", block, width, width, d, Slot(weight, j * d, (j + 1) * d), biases[j], drop_path)
        for j, role in enumerate("qkv")
    ]


def thirds(bias: str | None, d: int) -> list[Slot | None]:
    """Returns where the biases of q, k and v lie in a fused bias `[3 d]`; None stands for no bias."""
    return [None if bias is None else Slot(bias, j * d, (j + 1) * d) for j in range(3)]
