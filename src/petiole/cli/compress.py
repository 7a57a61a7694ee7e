"""`petiole compress`: fewer tokens for a model that is trained already, by measured speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import TASK_HELP, AsJson, OtherBackbone

if TYPE_CHECKING:
    from ..core.adapted import Adapted
    from ..train.budgeting import ScaleChoice
    from ..train.tradeoffs import Tradeoff
    from ._budgets import Images, Models


def compress(
    file: Annotated[
        str, typer.Argument(help="Plugin file, or a backbone: `micro` or a timm name with its tag", metavar="FILE")
    ],
    data: Annotated[str | None, typer.Argument(help=f"Task to score on: {TASK_HELP}")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-r",
            help="Tokens each block removes (8), share it keeps (0.9), line (8:-1) or list by block (8,8,0,4)",
        ),
    ] = None,
    speed_up: Annotated[
        float | None, typer.Option(help="Speed-up to reach instead: the smallest whole budget that does, measured")
    ] = None,
    tocom: Annotated[
        Path | None,
        typer.Option(help="Compensator of `petiole distill`, or `micro` [default: the one in FILE, if any]"),
    ] = None,
    source: Annotated[
        int | None, typer.Option(help="Budget the model was trained with [default: the one in FILE, else 0]", min=0)
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor of the compensation [default: chosen on val; without DATA, ToCom's]")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="tome merges, evit prunes [default: the one in FILE, else tome]"),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Further budgets to measure, e.g. 0,4,8 [default: none; five with --plot]")
    ] = None,
    backbone: OtherBackbone = None,
    batch_size: Annotated[int, typer.Option(help="Images per pass where speed is measured", min=1)] = 32,
    seconds: Annotated[float, typer.Option(help="Time each model's speed is measured for [s]", min=1e-3)] = 2.0,
    split: Annotated[str | None, typer.Option(help="train, val or test to score [default: test, else val]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the task's splits, as it was for fit")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Plugin file to write, .safetensors")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot of accuracy against images/s to write, .svg")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a trained model on fewer tokens; measure what that brings.

    Prints images/s, measured in turns so that all models are treated alike, and with DATA the accuracy. Where there is
    a compensator (ToCom), both without and with it; its scale is chosen on the validation split. Its speed is that of
    petiole.Elastic, which folds it.
    """
    from functools import partial

    from ..files import save
    from ..train.budgeting import throughputs
    from ..train.tradeoffs import write_plot
    from . import _show
    from ._budgets import Images, Models
    from ._options import read_budget

    _check(budget, speed_up, data, out, plot, force)
    wanted = None if budget is None else read_budget("--budget", budget)
    named = None if budgets is None else [read_budget("--budgets", text) for text in budgets.split(",")]
    model = _open(file, backbone)
    models, images = Models(model, method, tocom, source, scale), Images(data, split, seed, model)
    # what cannot be done is said before the long work
    models.needs_choice(images)
    models.check([*([] if wanted is None else [wanted]), *(named or [])])
    measure = partial(throughputs, batch_size=batch_size, seconds=seconds)
    where = f"on {next(model.parameters()).device.type}, {batch_size} images a batch"
    r = wanted if speed_up is None else models.find(speed_up, measure, where)
    assert r is not None
    choice = models.choose(r, images)
    further = models.sweep() if named is None and plot is not None else named or []
    last, rows = models.compare(r, further, images.pixels(), measure, where)
    told = _told(rows, models, images, choice)
    if out is not None:
        told["num_bytes"] = save(last, out, metrics=told["metrics"], notes=f"speed-up measured {where}")
    if plot is not None:
        write_plot(plot, rows, str(images.split))
    if as_json:
        _show.as_json({"file": file, "measured": where, **told})
    else:
        _show.table(*_table(rows, models.method, images.split))
    for name, path in (("plugin", out), ("plot", plot)):
        if path is not None:
            _show.say(f"{name}: {path}")


def _check(
    budget: str | None, speed_up: float | None, data: str | None, out: Path | None, plot: Path | None, force: bool
) -> None:
    """Refuses options that contradict each other, and files that could not be written in the end."""
    from ..errors import FitError, PluginError, PluginFileError

    if (budget is None) == (speed_up is None):
        both = "both were given" if budget is not None else "neither was given"
        raise PluginError(f"compress goes to --budget or to --speed-up, and {both}: name one of them")
    if speed_up is not None and not speed_up > 1:
        raise PluginError(f"--speed-up is above 1, e.g. 1.5; got {speed_up:g}")
    for path, suffix in ((out, ".safetensors"), (plot, ".svg")):
        if path is None:
            continue
        if path.suffix != suffix:
            raise PluginFileError(f"{path} ends in {path.suffix or 'nothing'}: name a {suffix} file")
        if path.exists() and not force:
            raise PluginFileError(f"{path} exists already: choose another name, or pass --force to replace it")
        if not path.parent.is_dir():
            raise PluginFileError(f"there is no folder {path.parent} to write {path.name} into: make it first")
    if plot is not None:
        from ..train.tradeoffs import require_plot

        if data is None:
            raise FitError("--plot draws accuracy against images/s: name the task to score on, as DATA")
        require_plot()


def _open(file: str, backbone: str | None) -> "Adapted":
    """Returns the model of a plugin file, or of a backbone's name."""
    import torch

    from ..backbones.bundled import backbone as build
    from ..joining import adapt
    from ._options import load_model

    if backbone is not None or Path(file).exists() or file.endswith(".safetensors"):
        return load_model(Path(file), backbone)
    model = adapt(build(file))
    return model.to("cuda") if torch.cuda.is_available() else model


def _told(
    rows: "Sequence[Tradeoff]", models: "Models", images: "Images", choice: "ScaleChoice | None"
) -> dict[str, Any]:
    """Returns what came out, as plain values; `metrics` are those of the model at the budget."""
    from dataclasses import asdict

    last = rows[-1]
    metrics = {"speed_up": last.speed_up}
    if last.accuracy is not None:
        metrics[f"{images.split}_accuracy"] = last.accuracy
    if choice is not None:
        metrics["val_accuracy"] = choice.accuracies[choice.scale]
    return {
        "task": None if images.task is None else images.task.name,
        "split": images.split,
        "method": models.method,
        "budget": last.budget,
        "source": models.source,
        "scale": models.scale,
        "scales": None if choice is None else {f"{scale:g}": found for scale, found in choice.accuracies.items()},
        "metrics": metrics,
        "rows": [asdict(row) for row in rows],
    }


def _table(rows: "Sequence[Tradeoff]", method: str, split: str | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns heads and cells of the table."""
    heads = (
        "model",
        "budget",
        "tokens at the end",
        "GMACs",
        "images/s",
        "speed-up",
        *([f"{split} accuracy"] * bool(split)),
    )
    cells = []
    for i, row in enumerate(rows):
        name = "as trained" if i == 0 else method if row.scale is None else f"{method}, ToCom {row.scale:g}"
        total = "-" if row.macs is None else f"{row.macs / 1e9:.3g}"
        accuracy = () if row.accuracy is None else (f"{row.accuracy:.2%}",)
        speed = f"{row.images_per_second:,.0f}", f"{row.speed_up:.2f}x"
        cells.append((name, str(row.budget), str(row.num_tokens), total, *speed, *accuracy))
    return heads, cells
