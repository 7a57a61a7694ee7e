"""`petiole merge`: fold a plugin into an ordinary checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import OtherBackbone, PluginFile


def merge(
    file: PluginFile,
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, .safetensors")],
    backbone: OtherBackbone = None,
) -> None:
    """Fold a plugin and its head into an ordinary checkpoint of the backbone's class.

    Example: petiole merge runs/digits-fact/plugin.safetensors digits.safetensors
    """
    from safetensors.torch import save

    from ..adapt import merge as fold
    from ..files.container import atomic_write
    from . import _show
    from ._options import load_model

    model = load_model(file, backbone)
    plain = fold(model)
    tensors = {name: tensor.contiguous() for name, tensor in plain.state_dict().items()}
    atomic_write(out, save(tensors, metadata={"format": "pt"}))
    name = ".".join(filter(None, model.view.identify(model.backbone).values()))
    _show.say(f"wrote {out}: {name}, {_show.size(out.stat().st_size)}, {len(model.classes or ())} classes")
