"""The README.md beside an exported checkpoint."""

import re

from ..core.adapted import Adapted

# what the Hub takes for the name of a repository
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(model: Adapted, base: str | None) -> str:
    """Returns what a checkpoint is and how it is loaded, as Markdown with the Hub's front matter.

    Args:
        model: What was exported.
        base: What the Hub calls the backbone, None where nobody named it.
    """
    cls, num = type(model.backbone), 0 if model.head is None else model.head.out_features
    name = base or model.view.identify(model.backbone)["name"]
    head = "The backbone's own classifier answers."
    if num:
        head = (
            f"The backbone is built with a classifier of {num} classes, e.g. by timm's "
            f"`backbone.reset_classifier({num})`: the weights of the classifier come from here."
        )
    lines = [
        "---",
        "library_name: peft",
        *([f"base_model: {base}"] if base and _HUB_NAME.fullmatch(base) else []),
        "pipeline_tag: image-classification",
        "tags: [lora, petiole]",
        "---",
        "",
        f"# {name} with {', '.join(type(plugin).__name__ for plugin in model.taps.plugins)}",
        "",
        f"A low-rank change of {name}, written by petiole for Hugging Face PEFT.",
        "",
        "```python",
        *_loading(base, name, cls, num),
        'model = PeftModel.from_pretrained(backbone, "this folder").eval()',
        "```",
        "",
        head,
        "",
        "It is for inference: the dropout of its training is not part of it. Images are prepared with:",
        "",
        *(f"- {key}: {value}" for key, value in model.input_config.items()),
    ]
    if model.classes is not None:
        lines += ["", "Classes, in the order of the logits:", "", *(f"{i}. {c}" for i, c in enumerate(model.classes))]
    return "\n".join(lines) + "\n"


def _loading(base: str | None, name: str, cls: type, num: int) -> list[str]:
    """Returns the lines that build the backbone, as far as its library and name say how."""
    library, peft = cls.__module__.partition(".")[0], "from peft import PeftModel"
    if base is not None and library == "timm" and base.startswith("timm/"):
        classes = f", num_classes={num}" if num else ""
        build = f'timm.create_model("{base.removeprefix("timm/")}", pretrained=True{classes})'
        return ["import timm", peft, "", f"backbone = {build}"]
    if base is not None and library == "transformers":
        classes = f", num_labels={num}, ignore_mismatched_sizes=True" if num else ""
        build = f'{cls.__name__}.from_pretrained("{base}"{classes})'
        return [peft, f"from transformers import {cls.__name__}", "", f"backbone = {build}"]
    return [peft, "", f"backbone = ...  # {name}, a {cls.__module__}.{cls.__name__}"]
