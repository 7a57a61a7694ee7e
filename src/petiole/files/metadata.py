"""What a plugin file says about itself, and the strict reading of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import __version__
from ..core.adapted import Adapted
from ..core.plugin import Reducer
from ..errors import PluginFileError
from .container import parse, read_bytes
from .description import (
    Kinds,
    TensorInfo,
    check_entries,
    check_fields,
    check_version,
    describe_backbone,
    describe_metrics,
    describe_plugin,
    read_input_config,
    tensor_table,
)

SCHEMA_VERSION = 1
# Images of the check: its forward pass is most of what saving and loading cost, and a second one would add nothing.
NUM_IMAGES = 1
_MAX_IMAGES = 16

# who takes files that hold something else
_USERS = {
    "eyes": "petiole.load_eyes and `petiole vqa` take it",
    "learner": "petiole.continual.load_learner and `petiole stream` take it",
}

# key -> what it must be; keys of nested objects after a dot
_SCHEMA: dict[str, Kinds] = {
    "petiole": str,
    "plugins": list,
    "backbone": dict,
    "backbone.class": str,
    "backbone.name": str,
    "backbone.tag": str,
    "backbone.dtype": str,
    "backbone.fingerprint": str,
    "backbone.width": int,
    "input_config": dict,
    "classes": (list, type(None)),
    "head": (dict, type(None)),
    "token_budget": (int, float, list, type(None)),
    "metrics": dict,
    "notes": str,
    "check": dict,
    "check.num_images": int,
    "check.seed": int,
    "check.logits": list,
    "check.tolerance": float,
}


@dataclass(frozen=True)
class PluginInfo:
    """Everything a plugin file says about itself.

    Args:
        path: The file.
        schema_version: Version of the metadata.
        petiole: Version of petiole that wrote it.
        plugins: `method` and `settings` of each plugin.
        backbone: `class`, `name`, `tag`, `dtype`, `fingerprint` and `width` of the backbone it belongs to.
        input_config: How images become input: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
        classes: Class names, None where the backbone's own classifier answers.
        head: `in_features`, `out_features` and `bits`, None where the backbone's own classifier answers.
        token_budget: What the plugin that removes tokens has as its budget, None where there is none.
        metrics: What it reached, by name.
        notes: Free text.
        check: The logits expected on synthetic images: `num_images`, `seed`, `logits`, `tolerance`.
        tensors: What is stored, by name.
        total_bytes: Size of the file.
    """

    path: str
    schema_version: int
    petiole: str
    plugins: tuple[dict[str, Any], ...]
    backbone: dict[str, Any]
    input_config: dict[str, Any]
    classes: tuple[str, ...] | None
    head: dict[str, int] | None
    token_budget: int | float | list[float] | None
    metrics: dict[str, float]
    notes: str
    check: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    total_bytes: int

    @property
    def has_codes(self) -> bool:
        """Whether quantised tensors are kept as their codes; latent weights may be kept in their place."""
        return any(tensor.name.endswith(".codes") for tensor in self.tensors)

    @property
    def overhead_bytes(self) -> int:
        """What the file holds beside the tensors' values [bytes]."""
        return self.total_bytes - sum(tensor.num_bytes for tensor in self.tensors)


def inspect(path: str | os.PathLike[str]) -> PluginInfo:
    """Returns everything a plugin file says about itself; needs no backbone and verifies every byte.

    Raises:
        PluginFileError: The file cannot be read, is damaged, foreign, or of another schema version.

    Example:
        >>> import petiole as pt
        >>> pt.inspect("pets.safetensors").backbone["name"]
    """
    return open_file(path)[1]


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Returns what a file of petiole holds where that is no classifier, e.g. `eyes`; None for a classifier.

    Raises:
        PluginFileError: The file cannot be read, is damaged or foreign.
    """
    kind = parse(read_bytes(path), os.fspath(path))[1].get("kind")
    return None if kind is None else str(kind)


def open_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], PluginInfo]:
    """Returns tensors and metadata of a plugin file.

    Raises:
        PluginFileError: The file cannot be read, is damaged, foreign, or of another schema version.
    """
    where, data = os.fspath(path), read_bytes(path)
    tensors, info = parse(data, where)
    if "kind" in info:
        users = _USERS.get(str(info["kind"]), "no function of this version takes it")
        raise PluginFileError(f"{where} is no classifier's plugin file, it holds {info['kind']!r}: {users}")
    _validate(info, where)
    return tensors, PluginInfo(
        path=where,
        schema_version=SCHEMA_VERSION,
        plugins=tuple(info["plugins"]),
        classes=None if info["classes"] is None else tuple(info["classes"]),
        input_config=read_input_config(info["input_config"]),
        **{key: info[key] for key in ("petiole", "backbone", "head", "token_budget", "metrics", "notes", "check")},
        tensors=tensor_table(tensors),
        total_bytes=len(data),
    )


def describe(model: Adapted, metrics: Mapping[str, float], notes: str, check: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata of an adapted model.

    Args:
        model: What is saved.
        metrics: What it reached, by name.
        notes: Free text.
        check: Its logits on synthetic images, ready for JSON.

    Raises:
        PluginFileError: A plugin is no method of the table, or its settings or a metric cannot be kept.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "petiole": __version__,
        "plugins": [describe_plugin(plugin) for plugin in model.taps.plugins],
        "backbone": describe_backbone(model),
        "input_config": model.input_config,
        "classes": None if model.classes is None else list(model.classes),
        "head": _describe_head(model),
        "token_budget": next((p.budget for p in model.taps.plugins if isinstance(p, Reducer)), None),
        "metrics": describe_metrics(metrics),
        "notes": notes,
        "check": check,
    }


def _describe_head(model: Adapted) -> dict[str, int] | None:
    if model.head is None:
        return None
    return {
        "in_features": model.head.in_features,
        "out_features": model.head.out_features,
        "bits": model.head_bits,
    }


def _validate(info: dict[str, Any], where: str) -> None:
    """Checks a classifier's metadata.

    Raises:
        PluginFileError: Another version, or a field that is absent, of another type or contradicts another.
    """
    check_version(info, SCHEMA_VERSION, where)
    check_fields(info, _SCHEMA, where)
    check_entries(info["plugins"], where)
    _validate_answers(info, where)


def _validate_answers(info: dict[str, Any], where: str) -> None:
    """Checks classes, head and check logits, which must agree with each other."""
    classes, head, check = info["classes"], info["head"], info["check"]
    if not all(isinstance(name, str) for name in classes or ()):
        raise PluginFileError(f"{where}: the class names should be strings, found {str(classes)[:60]}")
    if (classes is None) != (head is None) or (classes is not None and head.get("out_features") != len(classes)):
        found = "no" if classes is None else len(classes)
        raise PluginFileError(f"{where}: the head {head} does not fit {found} class names")
    logits, count = check["logits"], check["num_images"]
    rows_fit = len(logits) == count and all(isinstance(row, list) and len(row) == len(logits[0]) for row in logits)
    if not 1 <= count <= _MAX_IMAGES or not rows_fit or check["seed"] != 0:
        raise PluginFileError(f"{where}: the check should hold logits of 1 to {_MAX_IMAGES} images of seed 0")
    if not all(isinstance(value, float) for row in logits for value in row):
        raise PluginFileError(f"{where}: the check should hold logits, found something that is no decimal number")
