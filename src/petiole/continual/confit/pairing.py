"""Which convolution stands in front of which batch norm: seen in a forward pass, not guessed from names."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core.prove import eval_mode
from ...errors import BackboneError
from .statistics import STATISTICS, is_map

# how far the mean that is worked out may be from the one that is seen, in standard deviations of the output: room for
# ten-bit products of GPUs and for half precision, not for a map that does more than multiply with its weight
TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Call:
    """A map at work.

    Args:
        name: Name of the map in the network.
        x: What it was given.
        y: What it answered.
        version: How often the answer had been written into by then.
    """

    name: str
    x: Tensor
    y: Tensor
    version: int


@dataclass(frozen=True)
class Pairing:
    """The batch norms of a network and the convolutions, or linear maps, whose output they take.

    Args:
        pairs: Name of a batch norm -> name of the map in front of it.
        lone_norms: Name of a batch norm without one -> the reason.
        lone_maps: Names of the maps that stand in front of no batch norm.
    """

    pairs: Mapping[str, str]
    lone_norms: Mapping[str, str]
    lone_maps: tuple[str, ...]

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of all batch norms."""
        return (*self.pairs, *self.lone_norms)

    def __str__(self) -> str:
        lines = [f"{norm} takes the output of {name}" for norm, name in self.pairs.items()]
        lines += [f"{norm} is not paired: {reason}" for norm, reason in self.lone_norms.items()]
        lines += [f"{name} is not paired: no batch norm takes its output" for name in self.lone_maps]
        return "\n".join(lines)


@torch.no_grad()
def find_pairs(network: nn.Module, example: Tensor) -> Pairing:
    """Returns which map each batch norm of a network stands behind, from one forward pass in eval mode.

    A pair is a convolution or linear map and a batch norm that takes the very tensor it gave, with nothing written
    into it in between. Pooling or an activation between the two makes no pair, and neither does a map that computes
    something else than the products with its weight, such as a standardised convolution: the mean of its output is
    worked out from its input and compared.

    Args:
        network: Any model; left as it was.
        example: Inputs `[B, ...]` that it takes. Any size that the model allows will do.

    Raises:
        BackboneError: The network has no batch norm.

    Example:
        >>> import timm, torch
        >>> find_pairs(timm.create_model("resnet10t"), torch.rand(1, 3, 64, 64)).pairs["layer1.0.bn1"]
        'layer1.0.conv1'
    """
    norms = [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise BackboneError(
            f"{type(network).__name__} has no batch norm whose statistics could be kept per experience: use FineTune"
        )
    passes: list[tuple[str, Tensor, Call | None]] = []
    with eval_mode(network), watch(network, lambda *seen: passes.append(seen)):
        network(example)
    times = Counter(norm for norm, _, _ in passes)
    pairs, lone = {}, {norm: "the forward pass does not call it" for norm in norms if not times[norm]}
    for norm, x, call in passes:
        if times[norm] > 1:
            lone[norm] = f"the forward pass calls it {times[norm]} times"
        elif fault := _fault(network, norm, x, call):
            lone[norm] = fault
        elif call is not None:
            pairs[norm] = call.name
    paired = set(pairs.values())
    maps = [name for name, module in network.named_modules() if is_map(module) and name not in paired]
    return Pairing(pairs, {norm: lone[norm] for norm in norms if norm in lone}, tuple(maps))


@contextmanager
def watch(network: nn.Module, seen: Callable[[str, Tensor, Call | None], object]) -> Iterator[None]:
    """Calls `seen` before each batch norm of a forward pass.

    It is given the name of the batch norm, its input, and the call of the map that gave this very tensor; None where
    no map did, or something was written into the tensor since.
    """
    # the calls hold what maps gave, so that no other tensor can get the same id during the pass
    calls: dict[int, Call] = {}

    def after_map(name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        calls[id(y)] = Call(name, args[0], y, y._version)

    def before_norm(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        call = calls.get(id(args[0]))
        seen(name, args[0], call if call is not None and call.version == args[0]._version else None)

    def after_pass(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        calls.clear()

    with ExitStack() as stack:
        for name, module in network.named_modules():
            if is_map(module):
                stack.callback(module.register_forward_hook(partial(after_map, name)).remove)
            elif isinstance(module, _BatchNorm):
                stack.callback(module.register_forward_pre_hook(partial(before_norm, name)).remove)
        stack.callback(network.register_forward_hook(after_pass).remove)
        yield


def _fault(network: nn.Module, norm: str, x: Tensor, call: Call | None) -> str:
    """Returns why a batch norm is not paired with the map whose call gave its input; nothing where it is."""
    module: Any = network.get_submodule(norm)
    if module.running_mean is None:
        return "it keeps no running statistics"
    if call is None:
        return "no convolution or linear map gives its input"
    named: Any = network.get_submodule(call.name)
    if isinstance(named, nn.Linear) and x.ndim != 2:
        return f"the linear map {call.name} before it gives {x.ndim} axes, of which it takes another one for channels"
    odd = f"the mean output of {call.name} does not follow from its weight and its mean input"
    try:
        taps = STATISTICS["taps"].reduce(named, call.x.mean(0, dtype=torch.float32))
    except RuntimeError:  # its forward does more with its weight than to multiply, and does not take another one
        return odd
    found = STATISTICS["taps"].recover(named, taps, call.x.shape[2:], named.weight, named.bias)
    std, mean = torch.std_mean(x.float().transpose(0, 1).flatten(1), 1)
    return "" if bool(((found - mean).abs() <= TOLERANCE * std.max()).all()) else odd
