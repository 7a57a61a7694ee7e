"""What a learner stands behind, in words and tensors that a file can keep: extractors and networks."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.bundled import micro
from ..core.adapted import Adapted
from ..core.fingerprint import fingerprint
from ..core.prove import eval_mode
from ..core.view import View
from ..errors import PetioleError, PluginFileError
from ..files.codes import packed, unpacked
from ..files.container import one_line
from ..files.description import (
    class_name,
    describe_backbone,
    describe_plugin,
    dtype_name,
    read_input_config,
)
from ..files.hosts import build_backbone, match_backbone
from ..files.plugin_file import TOLERANCE
from ..files.stacking import stack, unstack
from ..files.state import check_finite, fill, own_tensors
from ..plugins import method
from .features import Extractor

_HEAD, _CHECK = "head.", "check"
# the check keeps about this many features of one synthetic image, evenly spaced
_NUM_CHECKED = 32


def describe_extractor(extract: Extractor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what an extractor is, and the tensors of its plugins; its backbone is named, not kept.

    Raises:
        PluginFileError: A plugin is no method of the table, or a tensor is not finite.
    """
    model = extract.model
    tensors = own_tensors(model)
    check_finite(tensors, "the extractor")
    own = {name: t for name, t in packed(model, tensors).items() if not name.startswith(_HEAD)}
    words = {
        "backbone": describe_backbone(model),
        "plugins": [describe_plugin(plugin) for plugin in model.taps.plugins],
        "input_config": dict(model.input_config),
        "dtype": dtype_name(extract.dtype),
    }
    return words, {**stack(own), _CHECK: _probed(model)}


def make_extractor(
    words: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: nn.Module | None, where: str
) -> Extractor:
    """Returns the extractor that was described.

    Args:
        words: What `describe_extractor` said of it.
        tensors: Its plugins'.
        backbone: What it stands on; None builds it by its name, which may download its weights.
        where: What messages call the file.

    Raises:
        PluginFileError: It is another backbone, or what was described does not fit it.
    """
    backbone, view = found_backbone(words["backbone"], backbone, where)
    try:
        plugins = [method(entry["method"], **entry["settings"]) for entry in words["plugins"]]
        model = Adapted(backbone, view, plugins)
    except (PetioleError, TypeError, ValueError, RuntimeError) as error:
        raise PluginFileError(f"{where} describes plugins that do not fit: {one_line(error)}") from error
    kept = {name: tensor for name, tensor in tensors.items() if name != _CHECK}
    own = unpacked(model, unstack(kept), where)
    fill(model, own, model.task_state(), [f"backbone.{name}" for name in model.origin], where)
    model.input_config = read_input_config(words["input_config"])
    _check(model.eval(), tensors.get(_CHECK, torch.empty(0)), where)
    return Extractor(model, dtype=getattr(torch, words["dtype"]))


def found_backbone(words: Mapping[str, Any], backbone: nn.Module | None, where: str) -> tuple[nn.Module, View]:
    """Returns the backbone that was described, and its view.

    Args:
        words: What `describe_backbone` said of it.
        backbone: The one that is given; None builds it by its name.
        where: What messages call the file.

    Raises:
        PluginFileError: It is another one, or cannot be built.
    """
    if backbone is None:
        backbone = build_backbone(words, where, f"give the backbone: load_learner({where!r}, backbone=...)")
    return backbone, match_backbone(words, backbone, where)


def describe_network(network: nn.Module, *, is_frozen: bool) -> dict[str, Any]:
    """Returns which architecture a network has, and which weights where they are frozen and so given again.

    Args:
        network: The network.
        is_frozen: Whether a learner leaves its weights alone.
    """
    config, state = getattr(network, "default_cfg", None) or {}, sorted(network.state_dict().items())
    kinds = {name: f"{dtype_name(tensor.dtype)}{list(tensor.shape)}" for name, tensor in state}
    return {
        "class": class_name(network),
        "name": str(config.get("architecture", "")),
        "num_classes": getattr(network, "num_classes", None),
        "num_parameters": sum(p.numel() for p in network.parameters()),
        "shapes": fingerprint(state, kinds),
        "weights": fingerprint(state) if is_frozen else None,
    }


def match_network(words: Mapping[str, Any], network: nn.Module, name: str, where: str) -> nn.Module:
    """Returns a network after comparing it with the one that was described.

    Args:
        words: What `describe_network` said.
        network: What is given.
        name: Setting of the learner that it is.
        where: What messages call the file.

    Raises:
        PluginFileError: It is another network; says in what.
    """
    found = describe_network(network, is_frozen=words["weights"] is not None)
    if odd := [key for key in ("class", "num_parameters", "shapes", "weights") if found[key] != words[key]]:
        raise PluginFileError(
            f"{where} belongs to another {name}: {_title(words)} in the file, {_title(found)} here, of another {odd[0]}"
        )
    return network


def build_network(words: Mapping[str, Any], name: str, where: str) -> nn.Module:
    """Returns the network that was described, with random weights.

    Raises:
        PluginFileError: It cannot be built by its name.
    """
    is_random = words["weights"] is None
    if not (words["class"].startswith("timm.") and is_random and re.fullmatch(r"[A-Za-z0-9_]+", words["name"])):
        raise PluginFileError(f"{where} needs the {name} it was saved with, {_title(words)}: give {name}=...")
    import timm

    if words["name"] == "micro":
        return micro(pretrained=False)
    try:
        sizes = {} if words["num_classes"] is None else {"num_classes": words["num_classes"]}
        network: nn.Module = timm.create_model(words["name"], **sizes)
    except (RuntimeError, ValueError, TypeError) as error:
        raise PluginFileError(f"{where} needs {_title(words)}: {one_line(error)}; give {name}=...") from error
    return network


def _title(words: Mapping[str, Any]) -> str:
    weights = "" if words["weights"] is None else f" {words['weights'][:12]}"
    return f"{words['name']} {words['class']} of {words['num_parameters']:,} parameters{weights}".strip()


@torch.no_grad()
def _probed(model: Adapted) -> Tensor:
    """Returns features of a fixed synthetic image, about 32 of them, in eval mode, as float64."""
    with eval_mode(model):
        features = model.forward_features(model.view.probe(model.backbone, 1))[0]
    return features[:: max(1, len(features) // _NUM_CHECKED)].double().cpu()


def _check(model: Adapted, expected: Tensor, where: str) -> None:
    found = _probed(model)
    allowed = TOLERANCE[next(model.parameters()).dtype]
    off = float((found - expected).norm() / expected.norm().clamp_min(1e-30)) if found.shape == expected.shape else 1.0
    if not off <= allowed:
        raise PluginFileError(
            f"{where} fails its check: the features of a synthetic image are off by {off:.1e} relative, allowed are "
            f"{allowed:.0e}. The weights agree, so the backbone runs otherwise than before: compare library versions "
            "and settings (pooling, image size)"
        )
