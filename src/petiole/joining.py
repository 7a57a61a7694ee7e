"""Joins a backbone, plugins and a head."""

from collections.abc import Sequence

import torch
from torch import nn

from .backbones import view_of
from .core.adapted import Adapted
from .core.plugin import Plugin, Tuning
from .core.prove import prove_attached, prove_merged, prove_view
from .errors import PluginError
from .nn.weights import FULL, QuantisedLinear, Weights, copy_weights


def adapt(
    backbone: nn.Module,
    *plugins: Plugin,
    classes: Sequence[str] | None = None,
    head_bits: int = FULL,
    seed: int = 0,
    prove: bool = True,
) -> Adapted:
    """Returns a frozen backbone with plugins and a new head.

    Args:
        backbone: A pretrained model of timm, transformers, torchvision or open_clip; never written to.
        plugins: Any number of methods, e.g. `FacT(rank=16)`.
        classes: Class names of a new linear head; None keeps the backbone's own classifier.
        head_bits: Bits per weight of the head, 1 to 8, then without a bias; 32 for an ordinary one.
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
    model = Adapted(backbone, view, plugins, classes, seed, head_bits)
    if prove:
        prove_attached(model)
    return model


def only(model: Adapted, *methods: str) -> Adapted:
    """Returns a model with some of an adapted model's plugins, by method, and the same head on the same backbone.

    Args:
        model: An adapted model, e.g. with FacT and Convpass.
        methods: Names of the methods to keep, e.g. `"fact"`; none for the backbone and the head alone.

    Raises:
        PluginError: The model has no such plugin, or trains tensors of the backbone itself.

    Example:
        >>> import petiole as pt
        >>> both = pt.adapt(pt.backbone("micro"), pt.FacT(rank=4), pt.Convpass(), classes=["cat", "dog"])
        >>> alone = pt.only(both, "fact")
    """
    plugins = model.taps.plugins
    names = [plugin.method for plugin in plugins]
    if unknown := [method for method in methods if method not in names]:
        raise PluginError(f"the model has no plugin {unknown[0]!r}: it has {', '.join(names) or 'none'}")
    refuse_tuned(model, "trains the backbone itself, which cannot be taken apart")
    return rejoined(model, [plugin.taken() for plugin in plugins if plugin.method in methods])


def quantise(model: Adapted, bits: int | None = None, head_bits: int | None = None) -> Adapted:
    """Returns a model with the same plugins and head in other numbers of bits, without training.

    Every matrix is rounded to its few levels; training with `bits` from the start loses less. Back to 32 bits is exact.

    Args:
        model: An adapted model.
        bits: Bits per weight of the plugins, 1 to 8 or 32; None keeps theirs. Biases stay whole.
        head_bits: Bits per weight of the head; None keeps its. With few bits it has no bias.

    Raises:
        PluginError: There is nothing to quantise, or there are no such bits.

    Example:
        >>> import petiole as pt
        >>> model = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=4), classes=["cat", "dog"])
        >>> small = pt.quantise(model, bits=1, head_bits=1)
    """
    plugins = model.taps.plugins
    if whole := [type(plugin).__name__ for plugin in plugins if bits is not None and "bits" not in plugin.settings()]:
        raise PluginError(f"{whole[0]} has no matrices to quantise: leave it as it is, or choose a method with bits")
    if head_bits is not None and model.head is None:
        raise PluginError("the backbone's own classifier answers: there is no head to quantise")
    refuse_tuned(model, "has trained the backbone itself: train it with head_bits instead")
    kept = [p.taken() if bits is None else type(p)(**{**p.settings(), "bits": bits}) for p in plugins]
    other = rejoined(model, kept, model.head_bits if head_bits is None else head_bits)
    for ours, theirs in zip(other.plugins, plugins, strict=True) if bits is not None else ():
        copy_weights(theirs, ours)
    return other


def combine(plugins: Sequence[Plugin], factors: Sequence[float] | None = None) -> Plugin:
    """Returns one plugin whose change is the sum of several plugins' changes, each times its factor. Exact.

    Sums are of LoRA, of FacT or of SSF: ranks add up, and sums of FacT are tensor trains. A single plugin of any
    method with a scale can be multiplied. The result is free to join a model by `adapt`.

    Args:
        plugins: Plugins of adapted models on one backbone, e.g. `model.plugins[0]`.
        factors: One number each; 1 by default.

    Raises:
        PluginError: There is no exact sum: other methods, other sites.

    Example:
        >>> import petiole as pt
        >>> models = [pt.adapt(pt.backbone("micro"), pt.LoRA(rank=4)) for _ in range(2)]
        >>> mean = pt.combine([model.plugins[0] for model in models], [0.5, 0.5])
        >>> model = pt.adapt(pt.backbone("micro"), mean, classes=["cat", "dog"])
    """
    from .plugins._combine import combine as combined

    return combined(plugins, [1.0] * len(plugins) if factors is None else factors)


def merge(model: Adapted) -> nn.Module:
    """Returns an ordinary model of the backbone's class with plugins and head folded in, checked against the original.

    Raises:
        MergeError: A plugin is not linear, or the class has no classifier for the head.
        ProofError: The merged model answers otherwise.
    """
    plain = model.merged()
    prove_merged(model, plain)
    return plain


def refuse_tuned(model: Adapted, fault: str) -> None:
    """Refuses a model whose own backbone was trained: another model on it would belong to no backbone that is kept."""
    if tuned := [plugin.method for plugin in model.taps.plugins if isinstance(plugin, Tuning)]:
        raise PluginError(f"{tuned[0]} {fault}")


def rejoined(
    model: Adapted, plugins: Sequence[Plugin], head_bits: int | None = None, backbone: nn.Module | None = None
) -> Adapted:
    """Returns a model with other plugins, and the head of a model on its backbone, or on another of its shape."""
    bits = model.head_bits if head_bits is None else head_bits
    other = Adapted(backbone or model.backbone, model.view, plugins, model.classes, head_bits=bits)
    other.input_config = dict(model.input_config)
    if model.head is not None and other.head is not None:
        _copy_head(model.head, other.head)
    return other


@torch.no_grad()
def _copy_head(source: nn.Linear | QuantisedLinear, target: nn.Linear | QuantisedLinear) -> None:
    dense = source if isinstance(source, nn.Linear) else source.dense()
    if isinstance(target, nn.Linear):
        target.load_state_dict(dense.state_dict())
    elif isinstance(source, QuantisedLinear) and source.bits == target.bits:
        target.load_state_dict(source.state_dict())
    else:
        target.weight.take(Weights([dense.weight.detach()]))
