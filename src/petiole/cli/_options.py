"""Options that several commands share."""

import importlib.util
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..core.adapted import Adapted
    from ..core.plugin import Plugin
    from ..nn.schedule import Budget
    from ..tasks.question import QuestionTask
    from ..tasks.task import Task

BackboneName = Annotated[
    str,
    typer.Option("--backbone", "-b", help="`micro` (bundled) or a timm name with its tag"),
]
# the method that joins a language model, which `petiole vqa` alone knows
FOR_LANGUAGE = "memvp"
PluginFile = Annotated[Path, typer.Argument(help="Plugin file, e.g. runs/digits/plugin.safetensors", metavar="FILE")]
OtherBackbone = Annotated[
    str | None, typer.Option("--backbone", "-b", help="Backbone to use instead of building the one the file names")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table")]
TASK_HELP = (
    "digits, position, orientation, counting; a folder of images; a folder of VTAB lists; a .npz pack; or hf:OWNER/NAME"
)


def method_names() -> list[str]:
    """Returns the names of the methods, from the files of the plugins: their table would import torch for a help."""
    spec = importlib.util.find_spec("petiole.plugins")
    assert spec is not None
    names = sorted(m.name for m in pkgutil.iter_modules(spec.submodule_search_locations))
    return [name for name in names if not name.startswith("_") and name != FOR_LANGUAGE]


def build_plugin(method: str, settings: list[str]) -> "Plugin":
    """Returns a plugin from a method's name and `key=value` settings.

    Raises:
        PluginError: An unknown method, or settings it cannot take.
    """
    from ..plugins import method as make

    return make(method, **read_settings(method, settings))


def read_settings(method: str, settings: list[str]) -> dict[str, Any]:
    """Returns a method's settings from `key=value` words.

    Raises:
        PluginError: An unknown method, or settings it cannot take.
    """
    from ..errors import PluginError, nearest
    from ..plugins import METHODS, settings_of

    if method not in METHODS:
        raise PluginError(f"no method is called {method!r}{nearest(method, METHODS)}: choose {_or(list(METHODS))}")
    return read_words(method, settings, settings_of(method))


def defaults_of(plugin: "type[Plugin]") -> dict[str, Any]:
    """Returns the settings of a plugin's class, with their defaults."""
    import inspect

    return {key: parameter.default for key, parameter in inspect.signature(plugin).parameters.items()}


def read_words(method: str, settings: list[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings from `key=value` words, each as the type of its default.

    Raises:
        PluginError: A setting that the method does not have, or a value that it cannot take.
    """
    from ..errors import PluginError, nearest

    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise PluginError(f"--set takes key=value, e.g. --set rank=16; got {setting!r}")
        if key not in defaults:
            has = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise PluginError(f"{method} has no setting {key!r}{nearest(key, defaults)}: {has}")
        values[key] = read_value(f"--set {key}", text, defaults[key])
    return values


def read_value(name: str, text: str, default: Any, hint: str = "") -> Any:
    """Returns a setting's value from what was written, as its default's type.

    Raises:
        PluginError: It is no such value; says what `name` takes.
    """
    import yaml

    from ..errors import PluginError

    try:
        return _typed(yaml.safe_load(text), default)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(type(default), "a name")
        raise PluginError(f"{name} takes {wanted} ({hint or f'default {default}'}), got {text!r}") from error


def _typed(value: Any, default: Any) -> Any:
    """Returns a value as its default's type; lists may be written `q,v`, numbers `1e-3`.

    Raises:
        ValueError: It cannot be one.
    """
    kind = type(default)
    if kind in (list, tuple) and isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if kind is float and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, str) and type(value) is not kind:
        raise ValueError
    return value


def read_budget(name: str, text: str) -> "Budget":
    """Returns a token budget from what was written: `8`, `0.9`, `8:-1` for a line, `8,8,0,4` for a list by block.

    Raises:
        PluginError: It is none; says what `name` takes.
    """
    from ..errors import PluginError
    from ..nn.schedule import schedule

    try:
        if ":" in text:
            mean, inflection = text.split(":")
            found: Budget = (int(mean), float(inflection))
        else:
            found = [_number(part) for part in text.split(",")] if "," in text else _number(text)
    except ValueError as error:
        raise PluginError(
            f"{name} takes the tokens that each block removes (8), the share it keeps (0.9), a line from many to few "
            f"(8:-1) or a list by block (8,8,0,4), got {text!r}"
        ) from error
    # what is no budget is refused before a backbone is built for it
    schedule(found, len(found) if isinstance(found, list) else 1)
    return found


def _number(text: str) -> float:
    return int(text) if text.strip().lstrip("+-").isdigit() else float(text)


def _or(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def load_model(file: Path, backbone: str | None) -> "Adapted":
    """Returns the adapted model of a plugin file, on the named backbone or on the one the file names."""
    import torch

    from ..backbones.bundled import backbone as build
    from ..files import inspect, load

    inspect(file)  # a file that is none should not cost a download
    model = load(file, None if backbone is None else build(backbone))
    return model.to("cuda") if torch.cuda.is_available() else model


def leave_processes() -> None:
    """Takes leave of the other processes, if there are any, which PyTorch asks of every program."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def part_of(task: "Task | QuestionTask", split: str) -> Any:
    """Returns a split of a task, its images or its questions.

    Raises:
        TaskError: There is no such split.
    """
    from ..errors import TaskError, nearest

    splits = ("train", "val", "test")
    if split not in splits:
        raise TaskError(f"no split is called {split!r}{nearest(split, splits)}: choose train, val or test")
    found = getattr(task, split)
    if found is None:
        has = [name for name in splits if getattr(task, name) is not None]
        raise TaskError(f"{task.name} has no {split} split: choose {' or '.join(has)}")
    return found
