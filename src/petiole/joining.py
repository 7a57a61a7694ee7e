"""Joins a backbone, plugins and a head."""

from collections.abc import Sequence

from torch import nn

from .backbones import view_of
from .core.adapted import Adapted
from .core.plugin import Plugin
from .core.prove import prove_attached, prove_merged, prove_view


def adapt(
    backbone: nn.Module, *plugins: Plugin, classes: Sequence[str] | None = None, seed: int = 0, prove: bool = True
) -> Adapted:
    """Returns a frozen backbone with plugins and a new head.

    Args:
        backbone: A pretrained model of timm, transformers, torchvision or open_clip; never written to.
        plugins: Any number of methods, e.g. `FacT(rank=16)`.
        classes: Class names of a new linear head; None keeps the backbone's own classifier.
        seed: Seed of the initial values.
        prove: Whether to check that the walk equals the model and that every plugin is alive at every site.

    Raises:
        BackboneError: No view walks the backbone.
        PluginError: A plugin fits no site or belongs to another model.
        ProofError: The walk or a plugin fails its proof.

    Example:
        >>> import petiole as pt
        >>> model = pt.adapt(pt.backbone("micro"), pt.FacT(rank=4), classes=["cat", "dog"])
    """
    view = view_of(backbone)
    if prove:
        prove_view(view, backbone)
    model = Adapted(backbone, view, plugins, classes, seed)
    if prove:
        prove_attached(model)
    return model


def merge(model: Adapted) -> nn.Module:
    """Returns an ordinary model of the backbone's class with plugins and head folded in, checked against the original.

    Raises:
        MergeError: A plugin is not linear, or the class has no classifier for the head.
        ProofError: The merged model answers otherwise.
    """
    plain = model.merged()
    prove_merged(model, plain)
    return plain
