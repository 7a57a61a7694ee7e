"""One family, one view. The table below is the list of families; a view is imported when a model of it is met."""

import importlib

from torch import nn

from ..core.view import View
from ..errors import BackboneError

# class of the model -> module of its view, class of the view
VIEWS = {
    "timm.models.vision_transformer.VisionTransformer": ("vit", "TimmViT"),
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
