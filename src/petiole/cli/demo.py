"""`petiole demo`: the main job from end to end."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for runs, images and report")] = Path("demo"),
    epochs: Annotated[int, typer.Option(help="Epochs of each method")] = 12,
) -> None:
    """Adapt the bundled backbone to handwritten digits with three methods, then use one file in a new process."""
    from ..adapt import adapt
    from ..backbones.bundled import backbone
    from ..fit.loop import fit
    from ..fit.recipe import Recipe
    from ..fit.report import COLUMNS, Entry, row_of, write_report
    from ..fit.run import PLUGIN, REPORT
    from ..plugins import method
    from ..tasks import open_task
    from . import _show

    task = open_task("digits")
    _show.say(
        f"{task.name}: {len(task.train)} training, {len(task.val or ())} validation, {len(task.test or ())} test scans"
    )
    recipe = Recipe(epochs=epochs, lr=3e-3)
    entries = []
    for name, settings in (("linear", {}), ("fact", {"rank": 8, "scale": 10.0}), ("lora", {"rank": 8, "scale": 10.0})):
        model = adapt(backbone("micro"), method(name, **settings), classes=task.classes)
        result = fit(model, task, recipe, out=out / name)
        entries.append(Entry(type(model.plugins[0]).__name__, result, (out / name / PLUGIN).stat().st_size))
    write_report(
        out / REPORT, "Handwritten digits on the bundled backbone", f"{epochs} epochs each, one seed.", entries
    )
    _show.table(COLUMNS, [row_of(entry) for entry in entries])
    _show.say(f"report: {out / REPORT}")

    (out / "scans").mkdir(exist_ok=True)
    assert task.test is not None
    for i in range(5):
        label = task.classes[task.test.labels[i]]
        task.test.images[i].save(out / "scans" / f"scan{i}_is_{label}.png")
    command = [sys.executable, "-m", "petiole", "predict", str(out / "fact" / PLUGIN), str(out / "scans")]
    _show.say("in a new process: petiole " + " ".join(command[3:]))
    subprocess.run(command, check=True)
