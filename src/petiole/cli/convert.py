"""`petiole convert`: the same plugin in fewer bits, or in another library's format."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import AsJson, OtherBackbone

if TYPE_CHECKING:
    from ..core.adapted import Adapted

_BIN = ".bin"
_PLUGIN = ".safetensors"
# how the authors name a file, in a folder of the method's name or with it in front: kitti-bit1-dim32.bin
_NAME = re.compile(r"(?:(?P<method>[a-z-]+)--)?(?P<task>[a-z0-9_]+)-bit(?P<bits>\d)-dim\d+")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Plugin file (.safetensors), 1-bit file of the Binary-Adapter authors (.bin), or folder of a PEFT LoRA"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="What to write: .safetensors, .bin, or a folder for PEFT")],
    bits: Annotated[
        int | None, typer.Option(help="Bits per weight of the plugin: 1 to 8, or 32 [default: as it is]")
    ] = None,
    head_bits: Annotated[
        int | None, typer.Option("--head-bits", help="Bits per weight of the head; below 32 it has no bias")
    ] = None,
    backbone: OtherBackbone = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="Of a .bin file: adaptformer, adaptformer-bihead, lora or lora-bihead [default: read off its name]",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Of a .bin file: VTAB-1k task, for the scale [default: off its name]")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Class names, separated by commas, where the source has none")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Of a .bin file: scale s [default: the authors' for the task]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a plugin in other bits or another format.

    Rounding a trained plugin to few bits loses more than training it with `--set bits=1` from the start.
    """
    from ..errors import PluginFileError
    from ..files import save
    from ..files.official import save_official
    from ..joining import quantise
    from ..peft import export_peft
    from . import _show

    if out.exists() and not force:
        raise PluginFileError(f"{out} exists already: choose another name, or pass --force to replace it")
    if not out.parent.is_dir():
        raise PluginFileError(f"there is no folder {out.parent} to write {out.name} into: make it first")
    names = classes.split(",") if classes else None
    model = _read(source, backbone, method, task, names, scale)
    if bits is not None or head_bits is not None:
        model = quantise(model, bits, head_bits)
    if out.suffix == _PLUGIN:
        num_bytes = save(model, out)
    elif out.suffix == _BIN:
        num_bytes = save_official(model, out)
    elif out.suffix:
        raise PluginFileError(f"{out} ends in {out.suffix}: name a .safetensors or .bin file, or a folder for PEFT")
    else:
        num_bytes = sum(path.stat().st_size for path in export_peft(model, out).iterdir())
    if as_json:
        _show.as_json({"file": str(out), "num_bytes": num_bytes})
    else:
        _show.say(f"wrote {out}: {model}, {num_bytes:,} bytes")


def _read(
    source: Path,
    backbone: str | None,
    method: str | None,
    task: str | None,
    classes: list[str] | None,
    scale: float | None,
) -> "Adapted":
    """Returns the model of a source, whatever its format."""
    from ..backbones.bundled import backbone as build
    from ..errors import PluginFileError
    from ..peft import import_peft
    from ._options import load_model

    is_foreign = source.is_dir() or source.suffix == _BIN
    if not is_foreign:
        return load_model(source, backbone)
    if not source.exists():
        raise PluginFileError(f"{source} does not exist: give a plugin file, a .bin file or a folder of a PEFT LoRA")
    if backbone is None:
        raise PluginFileError(f"{source} does not say what it belongs to: name it with --backbone")
    if source.is_dir():
        return import_peft(source, build(backbone), classes=classes)
    return _read_official(source, backbone, method, task, classes, scale)


def _read_official(
    source: Path,
    backbone: str,
    method: str | None,
    task: str | None,
    classes: list[str] | None,
    scale: float | None,
) -> "Adapted":
    """Returns the model of a file of the Binary-Adapter authors; what it does not say is read off its name."""
    from ..backbones.bundled import backbone as build
    from ..errors import PluginFileError, nearest
    from ..files.official import load_official
    from ..train.published import NUM_CLASSES, PUBLISHED

    named = _NAME.fullmatch(source.stem)
    task = task or (named["task"] if named else None)
    method = method or (named["method"] or source.parent.name if named else None)
    if method is None:
        raise PluginFileError(f"{source} does not say its method: name it with --method, e.g. adaptformer-bihead")
    if classes is None and task not in NUM_CLASSES:
        asked = f"{task!r} is no VTAB-1k task{nearest(task, NUM_CLASSES)}" if task else "no task was named"
        raise PluginFileError(f"{source} does not say its classes and {asked}: pass --task, or --classes cat,dog")
    names = classes or [str(i) for i in range(NUM_CLASSES[str(task)])]
    bits = int(named["bits"]) if named else 1
    model = load_official(
        source, build(backbone), method=method, classes=names, scale=1.0 if scale is None else scale, bits=bits
    )
    if scale is None:
        size = model.taps.plugins[0].settings()["dim" if method.startswith("adaptformer") else "rank"]
        rows = PUBLISHED.get(f"bi-{method}{'-1' if size == 1 else ''}-paper")
        if rows is None or size not in (1, 32) or task not in rows.rows:
            raise PluginFileError(f"{source} does not say its scale and no paper has one of dim {size}: pass --scale")
        model.taps.plugins[0].scale = rows.rows[str(task)]["scale"]
    return model
