"""A second body for the backbone that shares its weights."""

import copy
from collections.abc import Callable

from torch import nn

from ..errors import BackboneError


def twin(backbone: nn.Module, trains: Callable[[str, nn.Module], bool] | None = None) -> nn.Module:
    """Returns a copy of a model's structure whose frozen weights are the model's own memory.

    The twin has its own modules, flags, mode and buffers, so nothing done to it reaches the backbone: no gradient, no
    `train()`, no running statistics. Parameters are shared without gradient, except those that are trained, which are
    copied.

    Args:
        backbone: The user's model.
        trains: Says of a parameter's name and the module that holds it whether it is trained; None for no parameter.

    Raises:
        BackboneError: The model cannot be copied, e.g. because a module holds a tensor of an earlier graph.
    """
    memo: dict[int, object] = {}
    for path, module in backbone.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_trained = trains is not None and trains(f"{path}.{name}".lstrip("."), module)
            data = parameter.detach()
            if id(parameter) not in memo or is_trained:
                memo[id(parameter)] = nn.Parameter(data.clone() if is_trained else data, requires_grad=is_trained)
    try:
        return copy.deepcopy(backbone, memo)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{type(backbone).__name__} cannot be copied ({error}): adapt it before its first forward pass, "
            "or remove what cannot be copied"
        ) from error
