"""What a plugin file says about itself, and the strict reading of it."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import __version__
from ..core.adapted import Adapted
from ..core.fingerprint import fingerprint
from ..core.plugin import Plugin, Reducer
from ..errors import PetioleError, PluginFileError
from ..nn.weights import Weights
from ..plugins import METHODS, method
from .container import parse, read_bytes

SCHEMA_VERSION = 1
# Images of the check: its forward pass is most of what saving and loading cost, and a second one would add nothing.
NUM_IMAGES = 1
_MAX_IMAGES = 16

# key -> what it must be; keys of nested objects after a dot
_SCHEMA: dict[str, type | tuple[type, ...]] = {
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
class TensorInfo:
    """One tensor of a plugin file: its name, dtype as torch calls it, shape and size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


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


def open_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], PluginInfo]:
    """Returns tensors and metadata of a plugin file.

    Raises:
        PluginFileError: The file cannot be read, is damaged, foreign, or of another schema version.
    """
    where, data = os.fspath(path), read_bytes(path)
    tensors, info = parse(data, where)
    _validate(info, where)
    table = tuple(
        TensorInfo(name, dtype_name(t.dtype), tuple(t.shape), t.numel() * t.element_size())
        for name, t in sorted(tensors.items())
    )
    return tensors, PluginInfo(
        path=where,
        schema_version=SCHEMA_VERSION,
        plugins=tuple(info["plugins"]),
        classes=None if info["classes"] is None else tuple(info["classes"]),
        # transforms are compared with and given to timm, which has tuples
        input_config={key: tuple(v) if isinstance(v, list) else v for key, v in info["input_config"].items()},
        **{key: info[key] for key in ("petiole", "backbone", "head", "token_budget", "metrics", "notes", "check")},
        tensors=table,
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
    backbone, view = model.backbone, model.view
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise PluginFileError(f"the metric {name} is {value}: leave it out, or give a finite number")
    return {
        "schema_version": SCHEMA_VERSION,
        "petiole": __version__,
        "plugins": [_describe_plugin(plugin) for plugin in model.taps.plugins],
        "backbone": {
            "class": class_name(backbone),
            **view.identify(backbone),
            "dtype": dtype_name(next(backbone.parameters()).dtype),
            "fingerprint": fingerprint(view.frozen_weights(backbone), model.origin),
            "width": view.num_features(backbone),
        },
        "input_config": model.input_config,
        "classes": None if model.classes is None else list(model.classes),
        "head": _describe_head(model),
        "token_budget": next((p.budget for p in model.taps.plugins if isinstance(p, Reducer)), None),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "notes": notes,
        "check": check,
    }


def class_name(model: object) -> str:
    """Returns module and name of a model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def dtype_name(dtype: object) -> str:
    """Returns a dtype without its library, e.g. `float32`."""
    return str(dtype).removeprefix("torch.")


def _describe_head(model: Adapted) -> dict[str, int] | None:
    if model.head is None:
        return None
    return {
        "in_features": model.head.in_features,
        "out_features": model.head.out_features,
        "bits": model.head_bits,
    }


def _describe_plugin(plugin: Plugin) -> dict[str, Any]:
    """Returns method and settings of a plugin, after making an equal one from them as `load` will."""
    cls, name = type(plugin), getattr(plugin, "method", None)
    if METHODS.get(str(name)) != cls.__name__:
        raise PluginFileError(
            f"{cls.__name__} cannot be saved: its method {name!r} is not in the table of methods, so no file could be "
            f"loaded again. Put it in petiole/plugins/<method>.py and add a line to petiole.plugins.METHODS"
        )
    try:
        settings = json.loads(json.dumps(plugin.settings(), allow_nan=False))
        again = method(str(name), **settings)
        kept = json.loads(json.dumps(again.settings())) == settings
    except (TypeError, ValueError, PetioleError) as error:
        raise PluginFileError(f"the settings of {cls.__name__} cannot be kept in a file: {error}") from error
    if type(again) is not cls or not kept:
        raise PluginFileError(
            f"{cls.__name__} made again from its settings {settings} is another plugin: {again.settings()}"
        )
    weights = [m for m in plugin.modules() if isinstance(m, Weights)]
    return {
        "method": name,
        "settings": settings,
        "num_weights": sum(p.numel() for w in weights for p in w.parameters()),
        "num_matrices": sum(w.num_matrices for w in weights),
    }


def _validate(info: dict[str, Any], where: str) -> None:
    """Checks metadata against the schema.

    Raises:
        PluginFileError: Another version, or a field that is absent or of another type.
    """
    version = info.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        advice = "upgrade petiole" if isinstance(version, int) and version > SCHEMA_VERSION else "save it again"
        raise PluginFileError(
            f"{where} has schema version {version!r}, petiole {__version__} reads version {SCHEMA_VERSION}: {advice}"
        )
    for key, kinds in _SCHEMA.items():
        value: Any = info
        for part in key.split("."):
            value = value.get(part, ...)
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            found = "nothing" if value is ... else repr(value)[:40]
            raise PluginFileError(f"{where}: the metadata `{key}` should be {wanted}, found {found}")
    for entry in info["plugins"]:
        if not (isinstance(entry, dict) and entry.get("method") in METHODS and isinstance(entry.get("settings"), dict)):
            raise PluginFileError(
                f"{where} needs the plugin {str(entry)[:80]}; this petiole has the methods {', '.join(METHODS)}"
            )
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
