"""`petiole fit`: adapt a backbone to a task."""

import re
from pathlib import Path
from typing import Annotated

import typer

from . import _recipe as how
from ._options import AsJson, BackboneName, leave_processes, method_names
from ._run import goes_on, is_main
from ._search import GridAxes, IsSearch, SearchEpochs


def fit(
    source: how.Data = None,
    backbone: BackboneName = "micro",
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help=f"{', '.join(method_names())} [default: {how.DEFAULT_METHOD}]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="key=value for the method; repeatable (`petiole doctor micro` lists them)"),
    ] = None,
    head_bits: Annotated[
        int | None,
        typer.Option(
            "--head-bits",
            help="Bits per weight of the head, 1 to 8 without a bias, or 32 [default: the recipe's, else 32]",
        ),
    ] = None,
    search: IsSearch = False,
    grid: GridAxes = None,
    search_epochs: SearchEpochs = None,
    published: how.Published = None,
    task: how.Row = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder [default: runs/TASK-METHOD, runs/TASK-RECIPE]")
    ] = None,
    epochs: how.Epochs = None,
    batch_size: how.BatchSize = None,
    lr: how.LearningRate = None,
    weight_decay: how.WeightDecay = None,
    warmup_epochs: how.WarmupEpochs = None,
    drop_path: how.DropPath = None,
    label_smoothing: how.LabelSmoothing = None,
    precision: how.Precision = None,
    select: how.Select = None,
    eval_every: how.EvalEvery = None,
    seed: how.Seed = None,
    normalize: how.Normalize = None,
    resize: how.Resize = None,
    augment: how.Augment = None,
    train_on: how.TrainOn = None,
    checkpoint: how.Checkpoint = None,
    save_every: Annotated[float, typer.Option(help="Seconds between two writes of the state")] = 60.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a backbone to a task; keep the plugin as a file.

    The same command continues a run that was stopped. Under `accelerate launch -m petiole fit ...` or
    `torchrun -m petiole fit ...` it uses every process.
    """
    given = how.read_fields(locals())
    from ..backbones.bundled import backbone as build
    from ..joining import adapt
    from ..nn.weights import FULL
    from ..tasks import open_task
    from ..train.evaluate import num_trained
    from ..train.loop import fit as train
    from ..train.published import find
    from . import _show
    from ._options import build_plugin
    from ._search import choose, read_grid

    recipe, opened = how.build_recipe(published, given), how.source_of(source, task, published)
    method, settings = how.method_of(method, published), settings or []
    plugin = build_plugin(method, settings)
    is_searched = search or bool(grid) or search_epochs is not None
    fixed = how.recipe_words(published, None) if published and is_searched else []
    axes = read_grid(method, [*fixed, *settings], grid or [], given, recipe) if is_searched else None
    data = open_task(opened, seed=recipe.seed)
    if published and not is_searched:
        plugin = build_plugin(method, [*how.recipe_words(published, task or data.name), *settings])
    host, found = build(backbone), None
    bits = head_bits if head_bits is not None else find(published).head_bits if published else FULL
    folder = out or Path("runs") / re.sub(r"[^\w.-]+", "-", f"{data.name}-{published or method}")
    with goes_on(folder):
        if axes is not None:
            found = choose(host, method, data, axes, recipe, folder, search_epochs, bits, save_every, not as_json)
            plugin, recipe = found.plugin(), found.recipe
        model = adapt(host, plugin, classes=data.classes, head_bits=bits, seed=recipe.seed)
        if is_main():
            images = data.joined().train if recipe.train_on == "train+val" else data.train
            about = f"{len(images)} images, {num_trained(model):,} trained parameters"
            _show.say(f"{model} on {data.name}: {about}, into {folder}")
            if published:
                _show.say(find(published).about(task or data.name))
        result = train(model, data, recipe, out=folder, tensorboard=tensorboard, save_every=save_every)
    if is_main():
        _tell(type(plugin).__name__, data.name, repr(model), result, folder, as_json, found)
    leave_processes()


def _tell(method, task, text, result, folder: Path, as_json: bool, found) -> None:  # type: ignore[no-untyped-def]
    """Writes the report and prints what came out."""
    from ..errors import FitError
    from ..train.report import COLUMNS, Entry, row_of, write_report
    from ..train.run import PLUGIN, REPORT
    from . import _show

    entry = Entry(method, result, (folder / PLUGIN).stat().st_size)
    try:
        write_report(folder / REPORT, f"{method} on {task}", text, [entry], found)
        told = f"report: {folder / REPORT}"
    except FitError as error:
        told = f"no report: {error}"
    if as_json:
        search = {"search": found.as_plain()} if found else {}
        _show.as_json({**result.metrics, "num_bytes": entry.num_bytes, "file": str(folder / PLUGIN), **search})
    else:
        _show.table(COLUMNS, [row_of(entry)])
    _show.say(f"plugin: {folder / PLUGIN}\n{told}")
