"""petiole joins small plugins to one large pretrained model."""

from .lazy import resolver

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
    "EyesInfo": "vision_language.eyes_info",
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
    "Question": "tasks.question",
    "QuestionTask": "tasks.question",
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
    "answer": "vision_language.answering",
    "answer_recipe": "vision_language.learning",
    "backbone": "backbones.bundled",
    "combine": "joining",
    "compress": "compressing",
    "distill": "train.distilling",
    "fit": "train.loop",
    "fit_answers": "vision_language.learning",
    "give_eyes": "vision_language.sighted",
    "inspect": "files",
    "inspect_eyes": "vision_language.eyes_info",
    "load": "files",
    "load_eyes": "vision_language.eyes_file",
    "merge": "joining",
    "only": "joining",
    "open_images": "tasks",
    "open_questions": "tasks.questions",
    "open_task": "tasks",
    "predict": "train.evaluate",
    "pull": "files.hub",
    "push": "files.hub",
    "quantise": "joining",
    "recipe": "train.published",
    "save": "files",
    "save_eyes": "vision_language.eyes_file",
    "search": "train.searching",
}

__all__ = sorted(_PUBLIC)
__getattr__ = resolver(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
