"""What a learner is made of, in words that a file can keep, and a learner made from such words again.

The table is the list of learners, heads, exemplars and so on that can be kept; each is imported when it is met.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import view_of
from ..core.adapted import Adapted
from ..errors import PetioleError, PluginFileError, nearest
from ..files.container import one_line
from ..files.description import describe_backbone
from ..tasks.transform import Transform
from .features import Extractor
from .frozen import (
    build_network,
    describe_extractor,
    describe_network,
    found_backbone,
    make_extractor,
    match_network,
)

# name in a file -> module, class
PARTS = {
    "AGEM": ("online.rehearsal", "AGEM"),
    "ClassBalanced": ("exemplars", "ClassBalanced"),
    "ConFiT": ("confit.learner", "ConFiT"),
    "CropColour": ("online.augment", "CropColour"),
    "CrossEntropy": ("online.objectives", "CrossEntropy"),
    "DERpp": ("replay", "DERpp"),
    "DarkExperience": ("online.rehearsal", "DarkExperience"),
    "ER": ("replay", "ER"),
    "ERACE": ("replay", "ERACE"),
    "EWC": ("confit.baselines", "EWC"),
    "FineTune": ("trained", "FineTune"),
    "FineTuneNetwork": ("confit.baselines", "FineTune"),
    "GDumb": ("online.baselines", "GDumb"),
    "HeadLearner": ("heads", "HeadLearner"),
    "Herding": ("exemplars", "Herding"),
    "Hybrid": ("online.pairs", "Hybrid"),
    "Joint": ("trained", "Joint"),
    "JointRehearsal": ("online.rehearsal", "Joint"),
    "LwF": ("confit.baselines", "LwF"),
    "MIR": ("online.rehearsal", "MIR"),
    "MultiSimilarity": ("online.pairs", "MultiSimilarity"),
    "NCM": ("closed_form", "NCM"),
    "OnlineLearner": ("online.learner", "OnlineLearner"),
    "PluginPerTask": ("per_task", "PluginPerTask"),
    "ProxyNCA": ("online.objectives", "ProxyNCA"),
    "RandomRidge": ("closed_form", "RandomRidge"),
    "Reservoir": ("exemplars", "Reservoir"),
    "Ridge": ("closed_form", "Ridge"),
    "Ring": ("exemplars", "Ring"),
    "SLDA": ("closed_form", "SLDA"),
    "ShiftFlip": ("online.augment", "ShiftFlip"),
    "SupCon": ("online.pairs", "SupCon"),
    "TAER": ("taer", "TAER"),
}
# settings whose network a learner leaves alone; every other network is trained, and its weights are in the state
FROZEN, BACKBONE = "extract", "backbone"


@dataclass(frozen=True)
class Supply:
    """What a learner is made from, beside words.

    Args:
        tensors: The file's, by name.
        backbone: What its extractor stands on; None builds it by its name.
        given: Networks and functions, by the setting they are.
        where: What messages call the file.
    """

    tensors: Mapping[str, Tensor]
    backbone: nn.Module | None
    given: Mapping[str, Any]
    where: str


def describe(value: Any, name: str = "learner") -> tuple[Any, dict[str, Tensor]]:
    """Returns a learner, or a setting of one, in words, and the tensors of what is frozen in it.

    Args:
        value: A part of the table, an extractor, a network, a function or a plain value.
        name: Where it stands, e.g. `learner.exemplars.extract`.

    Raises:
        PluginFileError: It is none of these, or a part does not keep a setting under its name.
    """
    if (part := _name_of(value)) is not None:
        settings: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for key in inspect.signature(type(value)).parameters:
            if not hasattr(value, key):
                raise PluginFileError(f"{type(value).__name__} cannot be saved: it does not keep its setting {key}")
            settings[key], own = describe(getattr(value, key), f"{name}.{key}")
            tensors |= own
        return {"part": part, "settings": settings}, tensors
    if isinstance(value, Extractor):
        words, own = describe_extractor(value)
        return {"extractor": words}, {f"{name}/{key}": tensor for key, tensor in own.items()}
    if isinstance(value, nn.Module) and _last(name) == BACKBONE:
        model = Adapted(value, view_of(value), ())
        return {"backbone": describe_backbone(model), "input_config": dict(model.input_config)}, {}
    if isinstance(value, nn.Module):
        return {"network": describe_network(value, is_frozen=_last(name) == FROZEN)}, {}
    if isinstance(owner := getattr(value, "__self__", None), Transform) and value == owner.normalize:
        return {"normalize": owner.config}, {}
    if (kind := _optimizer(value)) is not None:
        return {"optimizer": kind.__name__, "settings": dict(getattr(value, "keywords", {}))}, {}
    if callable(value):
        return {"function": getattr(value, "__qualname__", type(value).__qualname__)}, {}
    try:
        return json.loads(json.dumps(value, allow_nan=False)), {}
    except (TypeError, ValueError) as error:
        raise PluginFileError(
            f"{name} cannot be saved: {type(value).__name__} is no plain value, and none of the parts that a file can "
            f"name: {', '.join(PARTS)}"
        ) from error


def make(words: Any, supply: Supply, name: str = "learner") -> Any:
    """Returns what was described.

    Args:
        words: What `describe` said of it.
        supply: What it is made from.
        name: Where it stands.

    Raises:
        PluginFileError: Something is not given, is something else than described, or does not fit the rest.
    """
    match words:
        case {"part": str(kind), "settings": dict(settings)}:
            made = {key: make(value, supply, f"{name}.{key}") for key, value in settings.items()}
            try:
                return _class(kind, supply.where)(**made)
            except (PetioleError, TypeError, ValueError) as error:
                raise PluginFileError(f"{supply.where}: no {kind} can be made again: {one_line(error)}") from error
        case {"extractor": dict(inside)}:
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): t for key, t in supply.tensors.items() if key.startswith(prefix)}
            return make_extractor(inside, own, supply.backbone, supply.where)
        case {"backbone": dict(inside)}:
            return found_backbone(inside, supply.backbone, supply.where)[0]
        case {"network": dict(inside)}:
            key = _last(name)
            found = supply.given[key] if key in supply.given else build_network(inside, key, supply.where)
            return match_network(inside, found, key, supply.where)
        case {"normalize": dict(config)}:
            return Transform(config).normalize
        case {"optimizer": str(kind), "settings": dict(settings)} if _optimizer(getattr(torch.optim, kind, None)):
            return partial(getattr(torch.optim, kind), **settings)
        case {"function": str(function)}:
            if (key := _last(name)) not in supply.given:
                raise PluginFileError(
                    f"{supply.where} needs the function {function} that it was saved with: pass given={{{key!r}: ...}}"
                )
            return supply.given[key]
    return words


def input_config(words: Any) -> dict[str, Any] | None:
    """Returns how images become input of what was described; None where it does not say."""
    match words:
        case (
            {"extractor": {"input_config": dict(config)}} | {"input_config": dict(config)} | {"normalize": dict(config)}
        ):
            return config
        case {"settings": dict(settings)}:
            return next((found for value in settings.values() if (found := input_config(value))), None)
    return None


def _name_of(value: Any) -> str | None:
    """Returns the name of a part in the table; None for what is no such part."""
    kind = (type(value).__module__.removeprefix(f"{__package__}."), type(value).__qualname__)
    return next((name for name, entry in PARTS.items() if entry == kind), None)


def _class(part: str, where: str) -> type:
    if part not in PARTS:
        raise PluginFileError(f"{where} holds a {part}, which this petiole does not know{nearest(part, PARTS)}")
    module, name = PARTS[part]
    found: type = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return found


def _optimizer(value: Any) -> type | None:
    """Returns the class of PyTorch's optimisers that a setting is, or has filled in by keywords; None for others."""
    kind = value.func if isinstance(value, partial) and not value.args else value
    is_known = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    return kind if is_known and getattr(torch.optim, kind.__name__, None) is kind else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]
