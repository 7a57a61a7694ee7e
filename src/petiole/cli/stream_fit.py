"""`petiole stream fit`: learn classes as they come, and go on learning."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _stream as st
from ._options import AsJson, BackboneName, method_names
from ._run import goes_on

if TYPE_CHECKING:
    from torch import nn

    from ..continual.catalogue import Rest
    from ..continual.choosing import Tried
    from ..continual.learner import Learner
    from ..continual.plan import Plan
    from ..continual.samples import Samples
    from ..core.adapted import Adapted
    from ..tasks.task import Split, Task

_EPOCHS = 10  # of a network that is tuned; heads make their own, and online learners see everything once


def fit(
    source: st.Data,
    learner: Annotated[
        str, typer.Option("--learner", "-l", help=f"{st.AUTO} (a head, chosen on validation), {st.NAMES}")
    ] = st.AUTO,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="key=value for the learner; repeatable")
    ] = None,
    backbone: BackboneName = "micro",
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--scratch", help="Pretrained weights or random ones, of a network to train")
    ] = True,
    size: Annotated[
        int | None, typer.Option(help="Side of an image for a convolutional network [pixels] [default: its own]", min=8)
    ] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="Plugin file that the features of a head are to come through")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="Plugin that a head's backbone is adapted by to the first experience, or `plugins` to each: "
            f"{', '.join(method_names())}",
        ),
    ] = None,
    method_settings: Annotated[
        list[str] | None, typer.Option("--method-set", help="key=value for that plugin; repeatable")
    ] = None,
    method_epochs: Annotated[int, typer.Option(help="Epochs of adapting to the first experience", min=1)] = 20,
    experiences: Annotated[
        int | None, typer.Option("--experiences", "-n", help="Experiences [default: 5; with --continue 1]", min=1)
    ] = None,
    first: Annotated[int | None, typer.Option(help="Classes of the first experience", min=1)] = None,
    order: Annotated[int | None, typer.Option(help="Seed of the order of classes [default: as they are named]")] = None,
    smooth: Annotated[
        float | None,
        typer.Option(help="Let classes come and go without boundaries: spread of each, as a share of the stream"),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help=f"Passes over an experience [default: 1, of tuned networks {_EPOCHS}]", min=1),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step", min=1)] = 32,
    exemplars: Annotated[int, typer.Option(help="Exemplars of each class that are kept", min=1)] = 20,
    capacity: Annotated[int | None, typer.Option(help="Exemplars that are kept in all, instead", min=1)] = None,
    policy: Annotated[
        str, typer.Option(help="Which images are exemplars: class-balanced, reservoir, ring or herding")
    ] = "class-balanced",
    augment: Annotated[str, typer.Option(help="How a network's images are changed: none, shift or crop")] = "none",
    task_known: Annotated[
        bool, typer.Option("--task-known", help="Score with the classes of each image's experience told")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random", min=0)] = 0,
    continued: Annotated[
        Path | None, typer.Option("--continue", help="Run folder or file of a learner that goes on with this data")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder [default: runs/DATA-LEARNER]")] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between two writes of the learner")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Learn classes as they come; keep the learner as a file.

    It learns from train and val together and is scored on test after each experience. `auto` first learns from train
    alone with each of several heads and takes the one that did best on val. The same command goes on where it was
    stopped; with `--continue` a learner goes on with other data, and its earlier file stays as it is.
    """
    from ..backbones.bundled import backbone as build
    from ..continual.catalogue import Rest, made, offer
    from ..continual.journey import carry, taken_up
    from ..continual.plan import Plan
    from ..errors import FitError
    from ..tasks import open_task
    from . import _show
    from ._options import read_settings

    is_auto, is_fresh = learner == st.AUTO and continued is None, continued is None
    if settings and (is_auto or not is_fresh):
        raise FitError("--set is for a fresh learner that is named: give --learner, or leave it away")
    tried: list[Tried] = []
    about, words = dict[str, Any](), {} if is_auto or not is_fresh else st.settings_of(learner, settings or [])
    if continued is not None:
        found, info = st.load(continued, None if backbone == "micro" else backbone)
        kind, about["continues"] = "tuned" if found.groups() else "head", str(continued)
    else:
        kind = "head" if is_auto else offer(learner).kind
    plan = Plan(
        num_experiences=experiences or (5 if is_fresh else 1),
        first=first,
        order=order,
        sigma=smooth,
        epochs=epochs or (_EPOCHS if kind == "tuned" else 1),
        batch_size=batch_size,
        seed=seed,
    )
    data = open_task(source, seed=seed)
    if continued is not None:
        data, learner = taken_up(data, info.classes), f"{continued.stem}-continued"
    folder = out or Path("runs") / re.sub(r"[^\w.+-]+", "-", f"{data.name}-{learner}")
    joined = data.joined().train
    with goes_on(folder):
        if is_fresh:
            rest = Rest(
                num_classes=len(data.classes),
                per_class=exemplars,
                capacity=capacity,
                policy=policy,
                augment=augment,
                size=size,
                plugin=None if method is None else (method, read_settings(method, method_settings or [])),
                seed=seed,
            )
            if kind == "head":
                base: nn.Module = _seer(data, plan, rest, backbone, plugin, method_epochs, folder)
            else:
                base = build(backbone, pretrained=pretrained)
            if is_auto:
                # every head stands on the same features: they are seen once for all
                train = _seen(made("ncm", base, rest, {}), joined, "train", folder)
                tried = _chosen(partial(made, base=base, rest=rest), data, train, plan, is_shown=not as_json)
                learner, words = tried[0].name, tried[0].settings
                about["chosen"] = learner
            found = made(learner, base, rest, words)
        if not is_auto:
            train = _seen(found, joined, "train", folder)
        test = None if data.test is None else _seen(found, data.test, "test", folder)
        stream = plan.stream(train, test, classes=data.classes)
        _show.say(f"{data.name}: {len(stream)} experiences, {len(train)} images, into {folder}")
        carry(
            stream,
            found,
            folder,
            is_task_known=task_known or kind == "tuned",
            about={"task": data.name, **about},
            save_every=save_every,
        )
    _tell(folder, data.name, tried, as_json)


def _seer(
    data: "Task", plan: "Plan", rest: "Rest", backbone: str, plugin: Path | None, epochs: int, folder: Path
) -> "Adapted":
    """Returns the frozen model whose features a head stands on."""
    from ..backbones.bundled import backbone as build
    from ..continual.adapting import adapt_first
    from ..errors import FitError
    from ..joining import adapt
    from ..plugins import method as make
    from ..train.recipe import Recipe
    from ._options import load_model

    if plugin is not None and rest.plugin is not None:
        raise FitError("features come through a plugin file or through one that is trained first: give one of them")
    if plugin is not None:
        return load_model(plugin, None)
    if rest.plugin is None:
        return adapt(build(backbone))
    if not plan.has_boundaries:
        raise FitError("a smooth stream has no first experience to adapt to: leave --method away, or --smooth")
    name, settings = rest.plugin
    labels, recipe = plan.labels(data.train.labels)[0], Recipe(epochs=epochs, seed=rest.seed)
    return adapt_first(build(backbone), [make(name, **settings)], data, labels, recipe, out=folder / "first")


def _seen(learner: "Learner", images: "Split", part: str, folder: Path) -> "Samples":
    """Returns images as a learner takes them."""
    from ..continual.sources import samples_of
    from ..train.progress import Progress

    with Progress(f"seeing {part} images", len(images), is_aside=True) as bar:
        return samples_of(
            learner, images, folder=folder / "features", progress=lambda done, total: bar.at(min(done, total))
        )


def _chosen(
    make: Callable[..., "Learner"], data: "Task", samples: "Samples", plan: "Plan", is_shown: bool
) -> list["Tried"]:
    """Returns the candidates, the best first."""
    from ..continual.choosing import CANDIDATES, choose
    from ..continual.sources import parted
    from ..train.progress import Progress
    from . import _show

    train, val = parted(samples, data)
    with Progress("choosing a learner", len(CANDIDATES), is_aside=True) as bar:
        tried = choose(
            CANDIDATES,
            lambda name, words: make(name, settings=words),
            plan.stream(train, val, classes=data.classes),
            bar.at,
        )
    if is_shown:
        _show.table(
            ("learner", "validation, final average", "over time", "s"),
            [(t.name, f"{t.final_average:.1%}", f"{t.average_incremental:.1%}", f"{t.seconds:.1f}") for t in tried],
        )
    return tried


def _tell(folder: Path, task: str, tried: list["Tried"], as_json: bool) -> None:
    """Writes the report and prints what came out."""
    from dataclasses import asdict

    from ..continual.journey import LEARNER
    from ..continual.report import COLUMNS, read_told, row_of, write_stream_report
    from ..errors import FitError
    from ..train.run import REPORT
    from . import _show

    told = read_told(folder)
    try:
        write_stream_report(folder / REPORT, f"{told.name}: {task}", f"A stream of {task}.", [told])
        words = f"report: {folder / REPORT}"
    except FitError as error:
        words = f"no report: {error}"
    if as_json:
        chosen = {"tried": [asdict(item) for item in tried]} if tried else {}
        metrics = told.journey.metrics
        _show.as_json({**metrics, "num_bytes": told.num_bytes, "file": str(folder / LEARNER), **chosen})
    else:
        _show.table(COLUMNS, [row_of(told)])
    _show.say(f"learner: {folder / LEARNER}\n{words}")
