"""What the file of a language model's eyes says about itself, and the strict reading of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor, nn

from .. import __version__
from ..core.fingerprint import fingerprint
from ..core.language import Recaller
from ..errors import PluginFileError
from ..files.container import parse, read_bytes
from ..files.description import (
    Kinds,
    TensorInfo,
    check_entries,
    check_fields,
    check_version,
    class_name,
    describe_backbone,
    describe_metrics,
    describe_plugin,
    dtype_name,
    read_input_config,
    tensor_table,
)
from ..plugins.memvp import MemVP
from .eyes import Eyes
from .sighted import Sighted

KIND = "eyes"
SCHEMA_VERSION = 1
# what joins a language model, by method
RECALLERS: dict[str, type[Recaller]] = {MemVP.method: MemVP}

# key -> what it must be; keys of nested objects after a dot
_SCHEMA: dict[str, Kinds] = {
    "petiole": str,
    "plugin": dict,
    "d_image": int,
    "template": str,
    "language_model": dict,
    "language_model.class": str,
    "language_model.name": str,
    "language_model.dtype": str,
    "language_model.fingerprint": str,
    "language_model.width": int,
    "eyes": (dict, NoneType),
    "input_config": (dict, NoneType),
    "metrics": dict,
    "notes": str,
    "check": dict,
    "check.features": list,
    "check.logits": list,
    "check.tolerance": float,
}
# where there are eyes
_EYES: dict[str, Kinds] = {
    "eyes.block": int,
    "eyes.plugins": list,
    "eyes.class": str,
    "eyes.name": str,
    "eyes.tag": str,
    "eyes.dtype": str,
    "eyes.fingerprint": str,
    "eyes.width": int,
}


@dataclass(frozen=True)
class EyesInfo:
    """Everything the file of a language model's eyes says about itself.

    Args:
        path: The file.
        schema_version: Version of the metadata.
        petiole: Version of petiole that wrote it.
        plugin: `method` and `settings` of what the language model reads.
        d_image: Width of an image feature.
        class_token: Whether the language model reads each image's class token in front of its text.
        template: What a prompt is made of.
        language_model: `class`, `name`, `dtype`, `fingerprint` and `width` of the language model it belongs to.
        eyes: `class`, `name`, `tag`, `dtype`, `fingerprint` and `width` of the image encoder, the `block` whose patches
            are taken, counted from 0, the `scales` at which they are averaged, and its `plugins`; None where features
            are given.
        input_config: How images become input; None where features are given.
        metrics: What it reached, by name.
        notes: Free text.
        check: What is expected of a synthetic image and a few tokens: `features`, `logits`, `tolerance`.
        tensors: What is stored, by name.
        total_bytes: Size of the file.
    """

    path: str
    schema_version: int
    petiole: str
    plugin: dict[str, Any]
    d_image: int
    class_token: bool
    template: str
    language_model: dict[str, Any]
    eyes: dict[str, Any] | None
    input_config: dict[str, Any] | None
    metrics: dict[str, float]
    notes: str
    check: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    total_bytes: int

    @property
    def overhead_bytes(self) -> int:
        """What the file holds beside the tensors' values [bytes]."""
        return self.total_bytes - sum(tensor.num_bytes for tensor in self.tensors)


def inspect_eyes(path: str | os.PathLike[str]) -> EyesInfo:
    """Returns everything a file of `save_eyes` says about itself; needs no model and verifies every byte.

    Raises:
        PluginFileError: The file cannot be read, is damaged, foreign, a classifier's, or of another schema version.

    Example:
        >>> import petiole as pt
        >>> pt.inspect_eyes("dots.safetensors").template
        'Question: {question}\\nAnswer:'
    """
    return open_eyes_file(path)[1]


def open_eyes_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], EyesInfo]:
    """Returns tensors and metadata of a file of `save_eyes`.

    Raises:
        PluginFileError: The file cannot be read, is damaged, foreign, a classifier's, or of another schema version.
    """
    where, data = os.fspath(path), read_bytes(path)
    tensors, info = parse(data, where)
    if "kind" not in info:
        raise PluginFileError(
            f"{where} holds no eyes of a language model, it is a classifier's plugin file: load it by petiole.load"
        )
    _validate(info, where)
    config, eyes = info["input_config"], info["eyes"]
    names = ("petiole", "plugin", "d_image", "template", "language_model", "metrics", "notes", "check")
    return tensors, EyesInfo(
        path=where,
        schema_version=SCHEMA_VERSION,
        class_token=info.get("class_token", False),
        eyes=None if eyes is None else {"scales": [1], **eyes},
        input_config=None if config is None else read_input_config(config),
        **{name: info[name] for name in names},
        tensors=tensor_table(tensors),
        total_bytes=len(data),
    )


def describe(model: Sighted, metrics: Mapping[str, float], notes: str, check: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a language model's eyes.

    Args:
        model: What is saved.
        metrics: What it reached, by name.
        notes: Free text.
        check: What is expected of a synthetic image and a few tokens, ready for JSON.

    Raises:
        PluginFileError: A plugin is in no table of methods, or its settings or a metric cannot be kept.
    """
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "petiole": __version__,
        "plugin": describe_plugin(model.plugin, {name: cls.__name__ for name, cls in RECALLERS.items()}, recaller),
        "d_image": model.d_image,
        "class_token": model.class_token is not None,
        "template": model.template,
        "language_model": describe_language_model(model.language_model),
        "eyes": describe_eyes(model.eyes),
        "input_config": None if model.eyes is None else model.eyes.model.input_config,
        "metrics": describe_metrics(metrics),
        "notes": notes,
        "check": check,
    }


def recaller(name: str, **settings: Any) -> Recaller:
    """Returns what joins a language model, by its method."""
    return RECALLERS[name](**settings)


def describe_language_model(model: nn.Module) -> dict[str, Any]:
    """Returns which language model this is; a folder it was loaded from is not told."""
    name = str(getattr(model.config, "name_or_path", ""))
    return {
        "class": class_name(model),
        "name": Path(name).name if Path(name).is_dir() else name,
        **appearance(model),
        "fingerprint": fingerprint(sorted(model.state_dict().items())),
    }


def appearance(model: Any) -> dict[str, Any]:
    """Returns what tells language models of a class apart at a glance: `dtype` and `width`."""
    return {"dtype": dtype_name(model.dtype), "width": model.get_input_embeddings().embedding_dim}


def describe_eyes(eyes: Eyes | None) -> dict[str, Any] | None:
    """Returns which encoder eyes look through, up to which block, with which plugins.

    Raises:
        PluginFileError: A plugin is in no table of methods, or its settings cannot be kept.
    """
    if eyes is None:
        return None
    plugins = [describe_plugin(plugin) for plugin in eyes.model.taps.plugins]
    where = {"block": eyes.num_blocks - 1, "scales": list(eyes.scales)}
    return {**describe_backbone(eyes.model), **where, "plugins": plugins}


def _validate(info: dict[str, Any], where: str) -> None:
    """Checks the metadata.

    Raises:
        PluginFileError: Another kind or version, or a field that is absent or of another type.
    """
    if info["kind"] != KIND:
        raise PluginFileError(f"{where} holds {info['kind']!r}, petiole {__version__} knows {KIND!r}: upgrade petiole")
    check_version(info, SCHEMA_VERSION, where)
    check_fields(info, _SCHEMA, where)
    check_entries([info["plugin"]], where, {name: cls.__name__ for name, cls in RECALLERS.items()})
    if info["eyes"] is not None:
        check_fields(info, _EYES, where)
        check_entries(info["eyes"]["plugins"], where)
    # files from before there were any have neither
    if not isinstance(info.get("class_token", False), bool):
        raise PluginFileError(f"{where}: the metadata `class_token` should be true or false")
    if not isinstance((info["eyes"] or {}).get("scales", []), list):
        raise PluginFileError(f"{where}: the metadata `eyes.scales` should be a list of whole numbers")
    if (info["eyes"] is None) != (info["input_config"] is None):
        raise PluginFileError(f"{where}: the metadata `eyes` and `input_config` go together, only one of them is there")
    for key in ("features", "logits"):
        if not info["check"][key] or not all(isinstance(value, float) for value in info["check"][key]):
            raise PluginFileError(f"{where}: the check should hold {key}, decimal numbers, at least one")
