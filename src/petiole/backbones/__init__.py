"""One family, one view. The table below is the list of families; a view is imported when a model of it is met."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.view import View
from ..errors import BackboneError

_REGISTERS = "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"

# class of the model -> module of its view, class of the view
VIEWS = {
    "open_clip.transformer.VisionTransformer": ("open_clip_vit", "OpenClipViT"),
    "timm.models.beit.Beit": ("beit", "TimmBeit"),
    "timm.models.eva.Eva": ("eva", "TimmEva"),
    "timm.models.swin_transformer.SwinTransformer": ("swin", "TimmSwin"),
    "timm.models.vision_transformer.VisionTransformer": ("vit", "TimmViT"),
    "torchvision.models.vision_transformer.VisionTransformer": ("torchvision_vit", "TorchvisionViT"),
    "transformers.models.clip.modeling_clip.CLIPForImageClassification": ("hf_clip", "HFCLIP"),
    "transformers.models.clip.modeling_clip.CLIPVisionModel": ("hf_clip", "HFCLIP"),
    "transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection": ("hf_clip", "HFCLIP"),
    "transformers.models.dinov2.modeling_dinov2.Dinov2ForImageClassification": ("hf_dinov2", "HFDinov2"),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": ("hf_dinov2", "HFDinov2"),
    f"{_REGISTERS}.Dinov2WithRegistersForImageClassification": ("hf_dinov2", "HFDinov2"),
    f"{_REGISTERS}.Dinov2WithRegistersModel": ("hf_dinov2", "HFDinov2"),
    "transformers.models.siglip.modeling_siglip.SiglipForImageClassification": ("hf_siglip", "HFSiglip"),
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": ("hf_siglip", "HFSiglip"),
    "transformers.models.vit.modeling_vit.ViTForImageClassification": ("hf_vit", "HFViT"),
    "transformers.models.vit.modeling_vit.ViTModel": ("hf_vit", "HFViT"),
}


def view_of(model: nn.Module) -> View:
    """Returns the view that walks a model, found by its class or a base class.

    Raises:
        BackboneError: No view knows the model's class; lists the classes that are known.
    """
    view: View = made(model, VIEWS, "no view walks")
    view.check(model)
    return view


def made(model: nn.Module, views: Mapping[str, tuple[str, str]], fault: str) -> Any:
    """Returns the view that a table has for a model's class or a base class.

    Args:
        model: The model.
        views: Class of the model -> module of its view, class of the view.
        fault: What is wrong where the table has none, before the name of the class.

    Raises:
        BackboneError: The table has none; lists the classes it has.
    """
    for cls in type(model).__mro__:
        entry = views.get(f"{cls.__module__}.{cls.__qualname__}")
        if entry is not None:
            module, name = entry
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)()
    known = "\n  ".join(sorted(views))
    raise BackboneError(
        f"{fault} {type(model).__module__}.{type(model).__qualname__}: looked for one of these classes "
        f"or a subclass\n  {known}"
    )
