"""`petiole demo`: the main job from end to end."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..tasks import Task

# method -> settings; the learning rate is the demo's, far above the papers' because the runs are far shorter
METHODS = {
    "linear": {},
    "lora": {"rank": 8, "scale": 10.0},
    "fact": {"rank": 8, "scale": 10.0},
    "convpass": {"scale": 10.0},
}
LR = 3e-3
# a head alone sees each image's features, computed once: it can train to the end at no cost, and must, to be a fair bar
LINEAR_TIMES = 20
# a file that says: what lies here, a demo has made, and the next one may remove
MARK = ".petiole-demo"
SCANS = "scans"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for runs, images and report")] = Path("demo"),
    epochs: Annotated[int, typer.Option(help="Epochs of each method")] = 6,
) -> None:
    """Adapt the bundled backbone to handwritten digits.

    Trains four methods, each a file of some kilobytes, writes a report, and classifies images with one file in a new
    process. Takes three to four minutes on two CPU cores; starts afresh each time.
    """
    from ..backbones.bundled import backbone
    from ..joining import adapt
    from ..plugins import method
    from ..tasks import open_task
    from ..train.loop import fit
    from ..train.page import require
    from ..train.recipe import Recipe
    from ..train.report import COLUMNS, Entry, row_of, write_report
    from ..train.run import PLUGIN, REPORT
    from . import _show

    recipe = Recipe(epochs=epochs, lr=LR)
    recipes = {"linear": dataclasses.replace(recipe, epochs=LINEAR_TIMES * epochs)}
    require()
    task = open_task("digits")
    _start_afresh(out)
    _show.say(
        f"{task.name}: {len(task.train)} training, {len(task.val or ())} validation, {len(task.test or ())} test scans"
    )
    entries = []
    for name, settings in METHODS.items():
        model = adapt(backbone("micro"), method(name, **settings), classes=task.classes)
        result = fit(model, task, recipes.get(name, recipe), out=out / name)
        entries.append(Entry(type(model.plugins[0]).__name__, result, (out / name / PLUGIN).stat().st_size))
    title = "Handwritten digits on the bundled backbone"
    text = f"{epochs} epochs at learning rate {LR}, {LINEAR_TIMES * epochs} for the head alone; one seed."
    write_report(out / REPORT, title, text, entries)
    _show.table(COLUMNS, [row_of(entry) for entry in entries])
    _show.say(f"report: {out / REPORT}")
    _save_scans(task, out / SCANS)
    command = [sys.executable, "-m", "petiole", "predict", str(out / "convpass" / PLUGIN), str(out / SCANS)]
    _show.say("in a new process: petiole " + " ".join(command[3:]))
    if code := subprocess.run(command, check=False).returncode:
        raise typer.Exit(code)


def _start_afresh(out: Path) -> None:
    """Removes what an earlier demo has made in the folder, and nothing else.

    Raises:
        FitError: The folder holds something that no demo has made.
    """
    from ..errors import FitError
    from ..train.run import REPORT

    if out.exists() and not (out.is_dir() and ((out / MARK).exists() or not any(out.iterdir()))):
        raise FitError(f"{out} exists and was not made by a demo: choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    for name in (*METHODS, SCANS):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / REPORT).unlink(missing_ok=True)


def _save_scans(task: "Task", folder: Path) -> None:
    """Writes five test images as files whose names say what they show."""
    assert task.test is not None
    folder.mkdir()
    for i in range(5):
        label = task.classes[task.test.labels[i]]
        task.test.images[i].save(folder / f"scan{i}_is_{label}.png")
