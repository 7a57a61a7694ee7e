"""Exchange with Hugging Face PEFT, and our methods as its tuners.

Public names are resolved at first use; only the configs of the tuners import the library `peft`.
"""

import importlib
from typing import Any

# public name -> module of this package
_PUBLIC = {
    "AdaptFormerConfig": "bridge",
    "ConvpassConfig": "bridge",
    "FacTConfig": "bridge",
    "export_peft": "exchange",
    "import_peft": "exchange",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
