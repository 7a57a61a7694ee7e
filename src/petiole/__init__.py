"""petiole joins small plugins to one large pretrained model."""

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module; imported at first use, so that `import petiole` stays light; type checkers read `__init__.pyi`
_PUBLIC = {
    "AdaptFormer": "plugins.adaptformer",
    "Adapted": "core.adapted",
    "Adapter": "plugins.adapter",
    "BackboneError": "errors",
    "BitFit": "plugins.bitfit",
    "Convpass": "plugins.convpass",
    "DivergedError": "errors",
    "EViT": "plugins.evit",
    "Elastic": "compressing",
    "FacT": "plugins.fact",
    "FitError": "errors",
    "FitResult": "train.job",
    "Full": "plugins.full",
    "LayerNorm": "plugins.layernorm",
    "Linear": "plugins.linear",
    "LoRA": "plugins.lora",
    "MemVP": "plugins.memvp",
    "MergeError": "errors",
    "PetioleError": "errors",
    "PluginError": "errors",
    "PluginFileError": "errors",
    "PluginInfo": "files",
    "ProofError": "errors",
    "Recipe": "train.recipe",
    "RepAdapter": "plugins.repadapter",
    "SSF": "plugins.ssf",
    "SearchResult": "train.searching",
    "Sighted": "vision_language.sighted",
    "Task": "tasks",
    "TaskError": "errors",
    "ToCom": "plugins.tocom",
    "ToMe": "plugins.tome",
    "Transform": "tasks",
    "VPT": "plugins.vpt",
    "adapt": "joining",
    "backbone": "backbones.bundled",
    "combine": "joining",
    "compress": "compressing",
    "distill": "train.distilling",
    "fit": "train.loop",
    "give_eyes": "vision_language.sighted",
    "inspect": "files",
    "load": "files",
    "merge": "joining",
    "only": "joining",
    "open_images": "tasks",
    "open_task": "tasks",
    "predict": "train.evaluate",
    "pull": "files.hub",
    "push": "files.hub",
    "quantise": "joining",
    "recipe": "train.published",
    "save": "files",
    "search": "train.searching",
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
