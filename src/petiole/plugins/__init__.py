"""One method, one short file. The table below is the list of methods."""

import importlib
import inspect
from typing import Any

from ..core.plugin import Plugin
from ..errors import PluginError

# name in files and on the command line -> class, in the module of that name
METHODS = {
    "adapter": "Adapter",
    "adaptformer": "AdaptFormer",
    "bitfit": "BitFit",
    "convpass": "Convpass",
    "evit": "EViT",
    "fact": "FacT",
    "full": "Full",
    "layernorm": "LayerNorm",
    "linear": "Linear",
    "lora": "LoRA",
    "repadapter": "RepAdapter",
    "ssf": "SSF",
    "tocom": "ToCom",
    "tome": "ToMe",
    "vpt": "VPT",
}


def method(name: str, **settings: Any) -> Plugin:
    """Returns a plugin by the method's name, e.g. `method("fact", rank=16)`.

    Raises:
        PluginError: No such method, or a setting it does not have.
    """
    if name not in METHODS:
        raise PluginError(f"no method is called {name!r}: choose one of {', '.join(METHODS)}")
    try:
        return _load(name)(**settings)
    except TypeError as error:
        raise PluginError(f"{name} cannot take these settings: {error}") from error


def settings_of(name: str) -> dict[str, Any]:
    """Returns the settings of a method in the table, with their defaults."""
    return {key: parameter.default for key, parameter in inspect.signature(_load(name)).parameters.items()}


def _load(name: str) -> type[Plugin]:
    return getattr(importlib.import_module(f"{__name__}.{name}"), METHODS[name])
