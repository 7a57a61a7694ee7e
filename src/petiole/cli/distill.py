"""`petiole distill`: train a compensator between token budgets from unlabelled images."""

from pathlib import Path
from typing import Annotated

import typer

from . import _recipe as how
from ._options import AsJson, BackboneName, leave_processes
from ._run import goes_on, is_main


def distill(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Folders of images, .npz packs or tasks; labels are not looked at"),
    ],
    backbone: BackboneName = "micro",
    groups: Annotated[int, typer.Option(help="Largest degree: most tokens that a block is to remove")] = 16,
    dim: Annotated[int, typer.Option(help="Rank of the step from each degree to the next")] = 2,
    head: Annotated[
        Path | None,
        typer.Option(
            help="Plugin file on the same backbone, e.g. a linear probe, whose head turns features into the answers "
            "that are compared, where the backbone has no classifier; features are compared without one"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder [default: runs/BACKBONE-tocom]")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the images")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images per step, over all processes")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay")] = 0.05,
    drop_path: how.DropPath = None,
    precision: how.Precision = None,
    seed: how.Seed = None,
    normalize: how.Normalize = None,
    resize: how.Resize = None,
    augment: how.Augment = None,
    checkpoint: how.Checkpoint = None,
    save_every: Annotated[float, typer.Option(help="Seconds between two writes of the state")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Train a token compensator from unlabelled images.

    Once per backbone: it then serves every model that is trained on it, see `petiole compress`. The same command
    continues a run that was stopped. Under `accelerate launch -m petiole distill ...` it uses every process.
    """
    given = {"warmup_epochs": 0, **how.read_fields(locals())}
    from ..backbones.bundled import backbone as build
    from ..errors import FitError
    from ..files import inspect, load
    from ..joining import adapt
    from ..plugins.tocom import ToCom
    from ..tasks import open_images
    from ..train.distilling import distill as train
    from ..train.evaluate import num_trained
    from ..train.run import PLUGIN
    from . import _show

    plugin, recipe = ToCom(groups=groups, dim=dim, target=groups), how.build_recipe(None, given)
    if head is not None:
        inspect(head)
    images, host = open_images(sources, seed=recipe.seed), build(backbone)
    probe = None if head is None else load(head, host).head
    if head is not None and probe is None:
        raise FitError(f"{head} has no head of its own: pass the file of a model that was trained with classes")
    model, folder = adapt(host, plugin), out or Path("runs") / f"{backbone.replace('/', '-')}-tocom"
    if is_main():
        _show.say(f"{model}: {len(images)} images, {num_trained(model):,} trained parameters, into {folder}")
    with goes_on(folder):
        result = train(model, images, recipe, head=probe, out=folder, save_every=save_every)
    if is_main():
        metrics, file = result.metrics, folder / PLUGIN
        if as_json:
            _show.as_json({**metrics, "num_bytes": file.stat().st_size, "file": str(file)})
        else:
            row = [f"{metrics[key]:.3g}" for key in ("loss_without", "loss_with")]
            columns = ("compensator", "loss without", "loss with", "pairs improved", "file")
            _show.table(columns, [("ToCom", *row, f"{metrics['pairs_improved']:.0%}", _show.size(file.stat().st_size))])
        _show.say(f"compensator: {file}")
    leave_processes()
