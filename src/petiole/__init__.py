"""petiole joins small plugins to one large pretrained model."""

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module; imported at first use, so that `import petiole` stays light; type checkers read `__init__.pyi`
_PUBLIC = {
    "Adapted": "core.adapted",
    "BackboneError": "errors",
    "FacT": "plugins.fact",
    "FitError": "errors",
    "FitResult": "train.loop",
    "Full": "plugins.full",
    "Linear": "plugins.linear",
    "LoRA": "plugins.lora",
    "MergeError": "errors",
    "PetioleError": "errors",
    "PluginError": "errors",
    "PluginFileError": "errors",
    "PluginInfo": "files",
    "ProofError": "errors",
    "Recipe": "train.recipe",
    "Task": "tasks",
    "TaskError": "errors",
    "Transform": "tasks",
    "adapt": "joining",
    "backbone": "backbones.bundled",
    "fit": "train.loop",
    "inspect": "files",
    "load": "files",
    "merge": "joining",
    "open_task": "tasks",
    "predict": "train.evaluate",
    "save": "files",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
