"""Loads and saves the 1-bit files that the authors of the binary adapters publish."""

import os
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import nn

from ..backbones import view_of
from ..core.adapted import Adapted
from ..core.prove import prove_view
from ..core.site import Site
from ..errors import PluginFileError
from ..nn.weights import FULL, QuantisedLinear, Weights, quantised
from ..plugins.adaptformer import AdaptFormer
from ..plugins.lora import LoRA
from .container import atomic_write, read_bytes
from .official_bytes import KEEP, Official, checked_bits, decode, encode, method_and_head_bits, num_code_bytes

__all__ = ["Official", "decode", "encode", "load_official", "save_official"]

_ROLES = {"adaptformer": ("mlp",), "lora": ("q", "v")}
# the authors squash images to the input's size and leave values from 0 to 1 as they are
_INPUT = {
    "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic",
}  # fmt: skip


@torch.no_grad()
def load_official(
    path: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    method: str,
    classes: Sequence[str],
    scale: float = 1.0,
    bits: int = 1,
    prove: bool = True,
) -> Adapted:
    """Returns the model of an official file, in eval mode; it holds the file's codes, means and deviations.

    The scale is not in the file: the authors keep it beside it, and `petiole.recipe` knows it for each VTAB-1k task.
    Images will be squashed to the input's size and keep values from 0 to 1, as the authors' do. Nothing in the file
    tells a wrong backbone of the right size.

    Args:
        path: The file.
        backbone: The pretrained model it was trained on; never written to.
        method: `adaptformer`, `adaptformer-bihead`, `lora` or `lora-bihead`.
        classes: Class names in the order of the logits.
        scale: Factor of what the plugin adds.
        bits: Bits per weight of the plugin: 1, 2 or 4.
        prove: Whether to check that the walk equals the backbone, as `petiole.adapt` does; there are no logits in the
            file to compare with.

    Raises:
        BackboneError: No view walks the backbone.
        PluginError: The backbone lacks the plugin's sites, or there are fewer than two classes.
        PluginFileError: The file does not fit the backbone, or is none; see `decode`.
        ProofError: The walk of the backbone fails its proof.

    Example:
        >>> import petiole as pt
        >>> model = pt.adapt(pt.backbone("micro"), pt.LoRA(bits=1), classes=["cat", "dog"], head_bits=1)
        >>> num_bytes = save_official(model, "pets.bin")
        >>> again = load_official("pets.bin", pt.backbone("micro"), method="lora-bihead", classes=["cat", "dog"])
    """
    data, where, view = read_bytes(path), os.fspath(path), view_of(backbone)
    name, _ = method_and_head_bits(method)
    if (dtype := next(backbone.parameters()).dtype) not in (torch.float32, torch.float64):
        raise PluginFileError(f"{where} holds float32, the backbone is {dtype}: convert it after loading, not before")
    sites = (AdaptFormer() if name == "adaptformer" else LoRA()).select(view.sites(backbone))
    width, depth = _size(sites, _ROLES[name], view.num_features(backbone))
    official = decode(data, method, len(classes), width=width, depth=depth, bits=bits, where=where)
    if prove:
        prove_view(view, backbone)
    plugin: AdaptFormer | LoRA = LoRA(rank=official.dim, scale=scale, bits=bits)
    if name == "adaptformer":
        plugin = AdaptFormer(dim=official.dim, scale=scale, bias=False, bits=bits)
    model = Adapted(backbone, view, [plugin], classes, head_bits=official.head_bits)
    for weights, pair in zip(_sides(plugin), (official.down, official.up), strict=True):
        weights.hold(*pair)
    if isinstance(model.head, QuantisedLinear):
        model.head.weight.hold(*official.head)
    elif model.head is not None:
        model.head.load_state_dict(dict(zip(("weight", "bias"), official.head, strict=True)))
    model.input_config |= _INPUT
    return model.eval()


def save_official(model: Adapted, path: str | os.PathLike[str]) -> int:
    """Writes an official file, laid out as the authors' own code does, and returns its size [bytes].

    Scale, class names and backbone are not in the file: keep them beside it. What `load_official` returned comes out
    byte for byte.

    Args:
        model: An adapted model with one plugin, `AdaptFormer(bias=False)` or `LoRA` on q and v, of 1, 2 or 4 bits, and
            a head of 1 or 32 bits.
        path: Where to; its folder must exist.

    Raises:
        PluginFileError: The format cannot hold the model, and what of it; or the file cannot be written.

    Example:
        >>> import petiole as pt
        >>> plugin = pt.AdaptFormer(dim=32, bias=False, bits=1)
        >>> model = pt.adapt(pt.backbone("micro"), plugin, classes=["cat", "dog"], head_bits=1)
        >>> num_bytes = save_official(model, "pets.bin")
    """
    if not isinstance(model, Adapted):
        raise PluginFileError(f"save_official takes what petiole.adapt returned, got {type(model).__name__}")
    plugins, head = model.taps.plugins, model.head
    plugin = plugins[0] if len(plugins) == 1 else None
    if not isinstance(plugin, AdaptFormer | LoRA):
        found = ", ".join(type(plugin).__name__ for plugin in plugins) or "none"
        raise PluginFileError(f"an official file holds one plugin, AdaptFormer or LoRA, the model has {found}: {KEEP}")
    if isinstance(plugin, AdaptFormer) and plugin.bias:
        raise PluginFileError(f"an official file holds no biases: train with AdaptFormer(bias=False), or {KEEP}")
    if isinstance(plugin, LoRA) and {*plugin.roles} != {"q", "v"}:
        raise PluginFileError(f"an official file holds LoRA on q and v, not on {', '.join(plugin.roles)}: {KEEP}")
    bits = checked_bits(plugin.bits)
    if head is None or model.head_bits not in (1, FULL):
        found = "the backbone's own classifier" if head is None else f"one of {model.head_bits} bits"
        raise PluginFileError(f"an official file holds a head of 1 or {FULL} bits, the model has {found}: {KEEP}")
    _size(plugin.sites, _ROLES[plugin.method], head.in_features)
    down, up = (weights.encoded() for weights in _sides(plugin))
    for _, weights in quantised(model):
        for matrices in weights.parameters():
            num_code_bytes(matrices.shape[-2:].numel(), weights.bits)
    last = head.weight.encoded() if isinstance(head, QuantisedLinear) else (head.weight, head.bias)
    dim = plugin.dim if isinstance(plugin, AdaptFormer) else plugin.rank
    data = encode(Official(plugin.method, dim, bits, down, up, model.head_bits, last))
    atomic_write(path, data)
    return len(data)


def _size(sites: Sequence[Site], roles: Sequence[str], num_features: int) -> tuple[int, int]:
    """Returns width and depth of the backbone behind sites, which must be the same in each block."""
    width, depth = num_features, len(sites) // len(roles)
    expected = [(block, role, width, width) for block in range(depth) for role in roles]
    for site, wanted in zip_longest(sites, expected):
        if site is None or (site.block, site.role, site.d_in, site.d_out) != wanted:
            found = "lacks one" if site is None else f"has {site.name}, {site.d_in} to {site.d_out}"
            each = f"{' and '.join(roles)} in each block, of the width {width} that the head sees"
            raise PluginFileError(
                f"an official file holds {each}; this backbone {found}: choose a plain ViT, or {KEEP}"
            )
    return width, depth


def _sides(plugin: AdaptFormer | LoRA) -> tuple[Weights, Weights]:
    return (plugin.down, plugin.up) if isinstance(plugin, LoRA) else (plugin.down.weight, plugin.up.weight)
