"""One method, one short file. The table below is the list of methods."""

import importlib
from typing import Any

from ..core.plugin import Plugin
from ..errors import PluginError

# name in files and on the command line -> class, in the module of that name
METHODS = {
    "adapter": "Adapter",
    "adaptformer": "AdaptFormer",
    "bitfit": "BitFit",
    "convpass": "Convpass",
    "fact": "FacT",
    "full": "Full",
    "layernorm": "LayerNorm",
    "linear": "Linear",
    "lora": "LoRA",
    "repadapter": "RepAdapter",
    "ssf": "SSF",
    "vpt": "VPT",
}


def method(name: str, **settings: Any) -> Plugin:
    """Returns a plugin by the method's name, e.g. `method("fact", rank=16)`.

    Raises:
        PluginError: No such method, or a setting it does not have.
    """
    if name not in METHODS:
        raise PluginError(f"no method is called {name!r}: choose one of {', '.join(METHODS)}")
    cls = getattr(importlib.import_module(f"{__name__}.{name}"), METHODS[name])
    try:
        return cls(**settings)
    except TypeError as error:
        raise PluginError(f"{name} cannot take these settings: {error}") from error
