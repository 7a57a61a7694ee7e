"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..core.plugin import Plugin

BackboneName = Annotated[
    str,
    typer.Option("--backbone", "-b", help="`micro` (bundled) or a timm name with its tag"),
]
PluginFile = Annotated[Path, typer.Argument(help="Plugin file, e.g. runs/digits/plugin.safetensors", metavar="FILE")]
OtherBackbone = Annotated[
    str | None, typer.Option("--backbone", "-b", help="Backbone to use instead of building the one the file names")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table")]
TASK_HELP = (
    "digits, position, orientation, counting; a folder of images; a folder of VTAB lists; a .npz pack; or hf:OWNER/NAME"
)


def build_plugin(method: str, settings: list[str]) -> "Plugin":
    """Returns a plugin from a method's name and `key=value` settings.

    Raises:
        PluginError: An unknown method, or settings it cannot take.
    """
    import yaml

    from ..errors import PluginError
    from ..plugins import method as make

    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise PluginError(f"--set takes key=value, e.g. --set rank=16; got {setting!r}")
        values[key] = yaml.safe_load(value)
    return make(method, **values)


def load_model(file: Path, backbone: str | None) -> Any:
    """Returns the adapted model of a plugin file, on the named backbone or on the one the file names."""
    from ..backbones.bundled import backbone as build
    from ..files import load

    return load(file, None if backbone is None else build(backbone))
