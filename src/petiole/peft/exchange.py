"""Writes an adapted model as a LoRA checkpoint of Hugging Face PEFT, and reads one as an adapted model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import view_of
from ..core.adapted import Adapted
from ..core.fingerprint import fingerprint
from ..core.prove import prove_merged
from ..core.twin import twin
from ..core.view import View
from ..errors import MergeError, PluginFileError
from ..files import atomic_write
from ..files.container import one_line
from ..files.metadata import describe
from ..joining import adapt
from ..plugins.lora import LoRA
from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from .lora_form import MERGE_INSTEAD, as_peft_runs, check_pairs, fill, linear_modules, pairs_of, take_pairs
from .model_card import model_card


def export_peft(model: Adapted, folder: str | os.PathLike[str], *, base_model: str | None = None) -> Path:
    """Writes an adapted model as a LoRA checkpoint that `peft.PeftModel.from_pretrained` loads to the same logits.

    For LoRA and FacT of any settings and bits, one or several: their changes add up. The backbone to load it onto is a
    fresh one whose classifier has been reset to the number of classes, e.g. by timm's
    `backbone.reset_classifier(num_classes=37)`; the checkpoint then brings the head. Without a head of its own the
    model needs the backbone as it is. What is written is for inference: FacT's shared factors are written out for
    every map, and the dropout of the training is left out. Needs no PEFT.

    Args:
        model: What `petiole.adapt` returned; stays as it is.
        folder: Where to write `adapter_config.json`, `adapter_model.safetensors` and `README.md`; made if it is
            absent, and these three files are replaced.
        base_model: What the checkpoint calls the backbone; None for its name on the Hub, which is `timm/<name>.<tag>`
            for timm.

    Returns:
        The folder.

    Raises:
        PluginFileError: A plugin is no low-rank change; a map is no `nn.Linear` that the backbone's own forward calls;
            or a file cannot be written.
        MergeError: The backbone's class has no classifier for the head.
        ProofError: What would be written answers otherwise than the model.

    Example:
        >>> import petiole as pt
        >>> from petiole.peft import export_peft
        >>> model = pt.adapt(pt.backbone("micro"), pt.FacT(rank=4), classes=["cat", "dog"])
        >>> folder = export_peft(model, "pets_peft")
    """
    if not isinstance(model, Adapted):
        raise PluginFileError(f"export_peft takes what petiole.adapt returned, got {type(model).__name__}")
    pairs = pairs_of(model)
    plain = as_peft_runs(model, pairs, MERGE_INSTEAD)
    prove_merged(model, plain)
    names = () if model.head is None else model.view.classifiers(plain)
    heads = {name: plain.get_submodule(name).state_dict() for name in names}
    info = {key: value for key, value in describe(model, {}, "", {}).items() if key != "check"}
    base = _base_name(model) if base_model is None else base_model
    path, cls = Path(folder), type(model.backbone)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise PluginFileError(f"{path} cannot be made: {one_line(error)}") from error
    mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    write_checkpoint(path, Checkpoint(pairs, heads, provenance=info), base, mapping)
    atomic_write(path / "README.md", model_card(model, base).encode())
    return path


def import_peft(
    folder: str | os.PathLike[str], backbone: nn.Module, *, classes: Sequence[str] | None = None
) -> Adapted:
    """Returns a LoRA checkpoint of PEFT as an adapted model with one LoRA, in eval mode.

    It gives the logits that PEFT gives, in eval mode. petiole's LoRA has one rank at every site: the largest of the
    checkpoint. Where the checkpoint has less, or nothing, the rest changes nothing. Needs no PEFT.

    Args:
        folder: What PEFT's `save_pretrained` or `export_peft` wrote; a local folder.
        backbone: The model it was trained on; never written to. Its classifier may have any number of classes, as
            the checkpoint brings the head.
        classes: Class names in the order of the logits; None takes those that `export_peft` kept, otherwise "0", "1",
            ... A checkpoint without a head has none: the backbone's own classifier answers.

    Raises:
        PluginFileError: A file is missing or malformed, the checkpoint is no plain LoRA of linear maps that the view
            knows, or classes or backbone do not fit it.
        BackboneError: No view walks the backbone.
        ProofError: The walk is not the backbone's own forward, or the model answers otherwise than PEFT would.

    Example:
        >>> import petiole as pt
        >>> from petiole.peft import export_peft, import_peft
        >>> model = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=4), classes=["cat", "dog"])
        >>> again = import_peft(export_peft(model, "pets_peft"), pt.backbone("micro"))
    """
    where, view, found = os.fspath(folder), view_of(backbone), read_checkpoint(folder)
    modules = linear_modules(view, backbone)
    check_pairs(found.pairs, modules, backbone, where)
    info = _check_provenance(found.provenance, view, backbone, where)
    head = _head(found.heads, view, backbone, where)
    names = _class_names(head, classes, info.get("classes"), where)
    pairs = take_pairs(found.pairs, modules)
    roles = dict.fromkeys(site.role for sites in modules.values() for site in sites if site.name in pairs)
    rank = max(pair.rank for pair in pairs.values())
    plugin = LoRA(rank=rank, roles=tuple(roles), dropout=found.dropout)
    model = adapt(backbone, plugin, classes=names).eval()
    fill(plugin, pairs)
    if head is not None and isinstance(model.head, nn.Linear):
        model.head.load_state_dict(head.state_dict())
    if "input_config" in info:
        model.input_config = info["input_config"]
    prove_merged(model, as_peft_runs(model, found.pairs, "Its training had no effect there: train other modules"))
    return model


def _base_name(model: Adapted) -> str | None:
    """Returns what the Hub calls a backbone of timm or transformers, None where it has no name there."""
    found, cls = model.view.identify(model.backbone), type(model.backbone)
    library, name = cls.__module__.partition(".")[0], found["name"]
    if library == "timm":
        import timm

        return "timm/" + ".".join(filter(None, found.values())) if timm.is_model(name) else None
    return name if library == "transformers" and name != cls.__name__ else None


def _check_provenance(info: dict[str, Any] | None, view: View, backbone: nn.Module, where: str) -> dict[str, Any]:
    """Returns what petiole said of a checkpoint it wrote, nothing for others.

    Raises:
        PluginFileError: It was written for other weights.
    """
    if info is None:
        return {}
    try:
        name, wanted = info["backbone"]["name"], info["backbone"]["fingerprint"]
        classes = None if info["classes"] is None else [str(c) for c in info["classes"]]
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in info["input_config"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise PluginFileError(f"{where}: what petiole wrote into it is malformed: {one_line(error)}") from error
    if wanted != (own := fingerprint(view.frozen_weights(backbone))):
        raise PluginFileError(
            f"{where} was written for {name} with the fingerprint {str(wanted)[:12]}, this {type(backbone).__name__} "
            f"has {own[:12]}: give the same pretrained weights, in the same dtype"
        )
    return {"classes": classes, "input_config": config}


def _head(heads: dict[str, dict[str, Tensor]], view: View, backbone: nn.Module, where: str) -> nn.Linear | None:
    """Returns the head among the modules that were trained as a whole.

    Raises:
        PluginFileError: Another module was, or the head does not fit the backbone.
    """
    if not heads:
        return None
    plain, width = twin(backbone), view.num_features(backbone)
    try:
        view.set_head(plain, nn.Linear(width, 2))
    except MergeError as error:
        raise PluginFileError(f"{where} brings a head, but {error}") from error
    known = view.classifiers(plain)
    if other := [name for name in heads if name not in known]:
        raise PluginFileError(
            f"{where} trained {other[0]} as a whole: besides LoRA, petiole reads a head, here {' and '.join(known)}"
        )
    tensors = next(iter(heads.values()))
    weight = tensors.get("weight", torch.empty(0))
    bias = tensors.get("bias", weight.new_zeros(len(weight)))
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        found = {key: list(tensor.shape) for key, tensor in tensors.items()}
        raise PluginFileError(f"{where}: its head should be of the backbone's width {width}, found {found}")
    if any(not _is_equal(own, tensors) for own in heads.values()):
        raise PluginFileError(f"{where} has several heads with different weights: petiole has one")
    head = nn.Linear(width, len(weight)).to(weight.dtype)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def _class_names(
    head: nn.Linear | None, given: Sequence[str] | None, kept: Sequence[str] | None, where: str
) -> Sequence[str] | None:
    """Returns the names of a head's classes.

    Raises:
        PluginFileError: There are more or fewer names than the head has classes.
    """
    if head is None:
        if given is not None:
            raise PluginFileError(
                f"{where} brings no head for {len(given)} classes: leave `classes` out, and join the plugin to a new "
                "head by petiole.adapt(backbone, model.plugins[0].taken(), classes=...)"
            )
        return None
    names = next((names for names in (given, kept) if names is not None), [str(i) for i in range(head.out_features)])
    if len(names) != head.out_features:
        raise PluginFileError(f"{where} has a head of {head.out_features} classes, got {len(names)} class names")
    return names


def _is_equal(some: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return some.keys() == other.keys() and all(torch.equal(some[key], other[key]) for key in some)
