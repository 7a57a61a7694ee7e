"""One family, one view. The table below is the list of families; a view is imported when a model of it is met."""

import importlib

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
    "transformers.models.vit.modeling_vit.ViTForImageClassification": ("hf_vit", "HFViT"),
    "transformers.models.vit.modeling_vit.ViTModel": ("hf_vit", "HFViT"),
}


def view_of(model: nn.Module) -> View:
    """Returns the view that walks a model, found by its class or a base class.

    Raises:
        BackboneError: No view knows the model's class; lists the classes that are known.
    """
    for cls in type(model).__mro__:
        entry = VIEWS.get(f"{cls.__module__}.{cls.__qualname__}")
        if entry is not None:
            module, name = entry
            view = getattr(importlib.import_module(f"{__name__}.{module}"), name)()
            view.check(model)
            return view
    known = "\n  ".join(sorted(VIEWS))
    raise BackboneError(
        f"no view walks {type(model).__module__}.{type(model).__qualname__}: looked for one of these classes "
        f"or a subclass\n  {known}"
    )
