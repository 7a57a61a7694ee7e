"""`petiole merge`: fold a plugin into an ordinary checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import OtherBackbone, PluginFile


def merge(
    file: PluginFile,
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, .safetensors")],
    backbone: OtherBackbone = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint if it exists")] = False,
) -> None:
    """Fold a plugin into an ordinary checkpoint.

    The checkpoint is of the backbone's own class, with the plugin's head as its classifier: it needs no petiole. Its
    metadata holds the class names.
    """
    import json

    from safetensors.torch import save

    from ..errors import MergeError
    from ..files.container import atomic_write
    from ..joining import merge as fold
    from . import _show
    from ._options import load_model

    if out.exists() and not force:
        raise MergeError(f"{out} exists already: choose another name, or pass --force to replace it")
    if not out.parent.is_dir():
        raise MergeError(f"there is no folder {out.parent} to write {out.name} into: make it first")
    model = load_model(file, backbone)
    plain = fold(model)
    tensors = {name: tensor.contiguous() for name, tensor in plain.state_dict().items()}
    classes = {} if model.classes is None else {"classes": json.dumps(model.classes, ensure_ascii=False)}
    atomic_write(out, save(tensors, metadata={"format": "pt", **classes}))
    name = ".".join(filter(None, model.view.identify(model.backbone).values()))
    _show.say(f"wrote {out}: {name}, {_show.size(out.stat().st_size)}, {len(model.classes or ())} classes")
