"""`petiole fit`: adapt a backbone to a task."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import TASK_HELP, AsJson, BackboneName


def fit(
    task: Annotated[str, typer.Argument(help=TASK_HELP)],
    backbone: BackboneName = "micro",
    method: Annotated[str, typer.Option("--method", "-m", help="fact, lora, linear or full")] = "fact",
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Setting of the method, key=value; repeatable")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder [default: runs/TASK-METHOD]")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images")] = 100,
    batch_size: Annotated[int, typer.Option(help="Images per step, over all processes")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay")] = 1e-4,
    warmup_epochs: Annotated[int, typer.Option(help="Epochs of warm-up, at most a tenth of the run")] = 10,
    drop_path: Annotated[
        float | None, typer.Option(help="Stochastic depth rate; the backbone's own if not given")
    ] = None,
    label_smoothing: Annotated[float, typer.Option(help="Share of the target spread over all classes")] = 0.0,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
    select: Annotated[str, typer.Option(help="Weights to keep: best on validation, or last")] = "best",
    eval_every: Annotated[int, typer.Option(help="Epochs between two validations")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of initial values, batch order and dropout")] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a backbone to a task and keep the plugin as one file.

    The same command continues a run that was stopped. Under `accelerate launch -m petiole fit ...` or
    `torchrun -m petiole fit ...` it uses every process.

    Example: petiole fit digits --method fact --set rank=8 --epochs 20
    """
    from ..adapt import adapt
    from ..backbones.bundled import backbone as build
    from ..fit.loop import fit as train
    from ..fit.recipe import Recipe
    from ..fit.run import PLUGIN, REPORT
    from ..tasks import open_task
    from . import _show
    from ._options import build_plugin

    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs,
        drop_path=drop_path, label_smoothing=label_smoothing, precision=precision, select=select,  # type: ignore[arg-type]
        eval_every=eval_every, seed=seed,
    )  # fmt: skip
    plugin = build_plugin(method, settings or [])
    data = open_task(task, seed=seed)
    model = adapt(build(backbone), plugin, classes=data.classes, seed=seed)
    folder = out or Path("runs") / f"{data.name}-{method}"
    trained = sum(p.numel() for _, p in model.trained())
    if (is_main := _is_main()) and not as_json:
        _show.say(f"{model} on {data.name}: {len(data.train)} images, {trained:,} trained parameters, into {folder}")
    result = train(model, data, recipe, out=folder, tensorboard=tensorboard)
    if not is_main:
        return
    if as_json:
        _show.as_json({**result.metrics, "file": str(folder / PLUGIN)})
        return
    from ..errors import FitError
    from ..fit.report import COLUMNS, Entry, row_of, write_report

    entry = Entry(type(plugin).__name__, result, (folder / PLUGIN).stat().st_size)
    _show.table(COLUMNS, [row_of(entry)])
    _show.say(f"plugin: {folder / PLUGIN}")
    try:
        write_report(folder / REPORT, f"{entry.name} on {data.name}", repr(model), [entry])
        _show.say(f"report: {folder / REPORT}")
    except FitError as error:
        _show.say(f"no report: {error}")


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"
