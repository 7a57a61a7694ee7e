"""What every kind of plugin file says of a model's parts, and the strict reading of it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import __version__
from ..core.adapted import Adapted
from ..core.fingerprint import fingerprint
from ..core.plugin import Plugin
from ..errors import PetioleError, PluginFileError
from ..nn.weights import Weights
from ..plugins import METHODS, method

Kinds = type | tuple[type, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a plugin file: its name, dtype as torch calls it, shape and size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def describe_plugin(
    plugin: Plugin, methods: Mapping[str, str] = METHODS, make: Callable[..., Plugin] = method
) -> dict[str, Any]:
    """Returns method and settings of a plugin, after making an equal one from them as loading will.

    Args:
        plugin: What is described.
        methods: The table of methods, name -> class.
        make: From a name of the table and settings to a plugin.

    Raises:
        PluginFileError: The plugin is not in the table, or its settings cannot be kept.
    """
    cls, name = type(plugin), getattr(plugin, "method", None)
    if methods.get(str(name)) != cls.__name__:
        raise PluginFileError(
            f"{cls.__name__} cannot be saved: its method {name!r} is not in the table of methods, so no file could be "
            f"loaded again. Put it in petiole/plugins/<method>.py and add a line to petiole.plugins.METHODS"
        )
    try:
        settings = json.loads(json.dumps(plugin.settings(), allow_nan=False))
        again = make(str(name), **settings)
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


def describe_backbone(model: Adapted) -> dict[str, Any]:
    """Returns which backbone an adapted model was made from."""
    backbone, view = model.backbone, model.view
    return {
        "class": class_name(backbone),
        **view.identify(backbone),
        "dtype": dtype_name(next(backbone.parameters()).dtype),
        "fingerprint": fingerprint(view.frozen_weights(backbone), model.origin),
        "width": view.num_features(backbone),
    }


def describe_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns metrics as a file keeps them.

    Raises:
        PluginFileError: One is not finite.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise PluginFileError(f"the metric {name} is {value}: leave it out, or give a finite number")
    return {name: float(value) for name, value in metrics.items()}


def tensor_table(tensors: Mapping[str, Tensor]) -> tuple[TensorInfo, ...]:
    """Returns what is said of a file's tensors, by name."""
    return tuple(
        TensorInfo(name, dtype_name(t.dtype), tuple(t.shape), t.numel() * t.element_size())
        for name, t in sorted(tensors.items())
    )


def read_input_config(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how images become input as timm has it, with tuples: JSON has lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}


def class_name(model: object) -> str:
    """Returns module and name of a model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def dtype_name(dtype: object) -> str:
    """Returns a dtype without its library, e.g. `float32`."""
    return str(dtype).removeprefix("torch.")


def check_version(info: Mapping[str, Any], version: int, where: str) -> None:
    """Checks that metadata is of the version that is read.

    Raises:
        PluginFileError: It is of another one.
    """
    found = info.get("schema_version")
    if type(found) is not int or found != version:
        advice = "upgrade petiole" if isinstance(found, int) and found > version else "save it again"
        raise PluginFileError(
            f"{where} has schema version {found!r}, petiole {__version__} reads version {version}: {advice}"
        )


def check_fields(info: Mapping[str, Any], schema: Mapping[str, Kinds], where: str) -> None:
    """Checks that metadata has every field, of its type.

    Args:
        info: The metadata.
        schema: Key -> what it must be; keys of nested objects after a dot.
        where: What messages call the file.

    Raises:
        PluginFileError: A field is absent or of another type.
    """
    for key, kinds in schema.items():
        value: Any = info
        for part in key.split("."):
            value = value.get(part, ...)
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            found = "nothing" if value is ... else repr(value)[:40]
            raise PluginFileError(f"{where}: the metadata `{key}` should be {wanted}, found {found}")


def check_entries(entries: Sequence[Any], where: str, methods: Mapping[str, str] = METHODS) -> None:
    """Checks that plugins are described by a method of a table and settings.

    Raises:
        PluginFileError: One is not.
    """
    for entry in entries:
        if not (isinstance(entry, dict) and entry.get("method") in methods and isinstance(entry.get("settings"), dict)):
            raise PluginFileError(
                f"{where} needs the plugin {str(entry)[:80]}; this petiole has the methods {', '.join(methods)}"
            )
