"""`petiole fit`: adapt a backbone to a task."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from ._options import TASK_HELP, AsJson, BackboneName, method_names


def fit(
    task: Annotated[str, typer.Argument(help=TASK_HELP)],
    backbone: BackboneName = "micro",
    method: Annotated[str, typer.Option("--method", "-m", help=", ".join(method_names()))] = "fact",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="key=value for the method; repeatable (`petiole doctor micro` lists them)"),
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
    seed: Annotated[int, typer.Option(help="Seed of splits, initial values, batch order and dropout")] = 0,
    save_every: Annotated[float, typer.Option(help="Seconds between two writes of the state")] = 60.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a backbone to a task; keep the plugin as a file.

    The same command continues a run that was stopped. Under `accelerate launch -m petiole fit ...` or
    `torchrun -m petiole fit ...` it uses every process.
    """
    from ..backbones.bundled import backbone as build
    from ..joining import adapt
    from ..tasks import open_task
    from ..train.evaluate import num_trained
    from ..train.loop import fit as train
    from ..train.recipe import Recipe
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
    folder = out or Path("runs") / re.sub(r"[^\w.-]+", "-", f"{data.name}-{method}")
    trained = num_trained(model)
    if is_main := os.environ.get("RANK", "0") == "0":
        _show.say(f"{model} on {data.name}: {len(data.train)} images, {trained:,} trained parameters, into {folder}")
    try:
        result = train(model, data, recipe, out=folder, tensorboard=tensorboard, save_every=save_every)
    except KeyboardInterrupt:
        if is_main:
            _show.say(f"stopped: the same command goes on from the state in {folder}")
        raise typer.Exit(130) from None
    if is_main:
        _tell(type(plugin).__name__, data.name, repr(model), result, folder, as_json)
    _leave_processes()


def _tell(method, task, text, result, folder: Path, as_json: bool) -> None:  # type: ignore[no-untyped-def]
    """Writes the report and prints what came out."""
    from ..errors import FitError
    from ..train.report import COLUMNS, Entry, row_of, write_report
    from ..train.run import PLUGIN, REPORT
    from . import _show

    entry = Entry(method, result, (folder / PLUGIN).stat().st_size)
    try:
        write_report(folder / REPORT, f"{method} on {task}", text, [entry])
        told = f"report: {folder / REPORT}"
    except FitError as error:
        told = f"no report: {error}"
    if as_json:
        _show.as_json({**result.metrics, "num_bytes": entry.num_bytes, "file": str(folder / PLUGIN)})
    else:
        _show.table(COLUMNS, [row_of(entry)])
    _show.say(f"plugin: {folder / PLUGIN}\n{told}")


def _leave_processes() -> None:
    """Takes leave of the other processes, if there are any, which PyTorch asks of every program."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
