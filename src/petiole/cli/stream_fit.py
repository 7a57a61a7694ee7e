"""`petiole stream fit`: learn classes as they come, and go on learning."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _stream as st
from ._options import AsJson, BackboneName, method_names
from ._run import goes_on

if TYPE_CHECKING:
    from ..continual.catalogue import Rest
    from ..continual.choosing import Tried
    from ..continual.learner import Learner
    from ..continual.plan import Plan
    from ..core.adapted import Adapted
    from ..tasks.task import Task

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
    from ..continual.catalogue import Rest, offer
    from ..continual.journey import carry, taken_up
    from ..continual.plan import Plan
    from ..continual.sources import samples_of
    from ..errors import FitError
    from ..tasks import open_task
    from ..train.progress import Progress
    from . import _show

    is_auto = learner == st.AUTO and continued is None
    kind = "head" if is_auto or continued is not None else offer(learner).kind
    if is_auto and settings:
        raise FitError("--set is for a learner that is named: give --learner, or leave the choice to auto")
    words = {} if is_auto or continued is not None else st.settings_of(learner, settings or [])
    plan = Plan(
        num_experiences=experiences or (5 if continued is None else 1),
        first=first,
        order=order,
        sigma=smooth,
        epochs=epochs or (_EPOCHS if kind == "tuned" else 1),
        batch_size=batch_size,
        seed=seed,
    )
    data, tried = open_task(source, seed=seed), []
    about: dict[str, Any] = {"task": data.name}
    if continued is not None:
        found, info = st.load(continued, None if backbone == "micro" else backbone)
        data, name = taken_up(data, info.classes), f"{continued.stem}-continued"
        about["continues"] = str(continued)
    else:
        name = learner
        rest = Rest(
            num_classes=len(data.classes),
            per_class=exemplars,
            capacity=capacity,
            policy=policy,
            augment=augment,
            plugin=(method or "fact", _plugin_settings(method or "fact", method_settings)),
            seed=seed,
        )
    folder = out or Path("runs") / re.sub(r"[^\w.+-]+", "-", f"{data.name}-{name}")
    with goes_on(folder):
        if continued is None:
            make = _maker(kind, data, plan, rest, backbone, pretrained, size, plugin, method, method_epochs, folder)
            if is_auto:
                tried = _chosen(make, data, plan, folder, is_shown=not as_json)
                learner, words = tried[0].name, tried[0].settings
                about["chosen"] = learner
            found = make(learner, words)
        splits = {"train": data.joined().train, "test": data.test}
        samples = {}
        for part, images in splits.items():
            if images is not None:
                with Progress(f"seeing {part} images", len(images), is_aside=True) as bar:
                    samples[part] = samples_of(found, images, folder=folder / "features", progress=_to(bar))
        stream = plan.stream(samples["train"], samples.get("test"), classes=data.classes)
        _show.say(f"{data.name}: {len(stream)} experiences, {len(samples['train'])} images, into {folder}")
        carry(
            stream,
            found,
            folder,
            is_task_known=task_known or bool(kind == "tuned" or found.groups()),
            about=about,
            save_every=save_every,
        )
    _tell(folder, data.name, tried, as_json)


def _plugin_settings(method: str, words: list[str] | None) -> Mapping[str, Any]:
    from ._options import read_settings

    return read_settings(method, words or [])


def _to(bar: Any) -> Callable[[int, int], object]:
    return lambda done, total: bar.at(min(done, total))


def _maker(
    kind: str,
    data: "Task",
    plan: "Plan",
    rest: "Rest",
    backbone: str,
    pretrained: bool,
    size: int | None,
    plugin: Path | None,
    method: str | None,
    method_epochs: int,
    folder: Path,
) -> Callable[[str, Mapping[str, Any]], "Learner"]:
    """Returns what makes a fresh learner of a name and settings."""
    from ..backbones.bundled import backbone as build
    from ..continual.catalogue import input_of, on_features, on_network

    if kind != "head":
        network = build(backbone, pretrained=pretrained)
        transform = input_of(network, size)
        return lambda name, settings: on_network(name, network, transform, rest, settings)
    model = _seer(data, plan, rest, backbone, plugin, method, method_epochs, folder)
    return lambda name, settings: on_features(name, model, rest, settings)


def _seer(
    data: "Task",
    plan: "Plan",
    rest: "Rest",
    backbone: str,
    plugin: Path | None,
    method: str | None,
    method_epochs: int,
    folder: Path,
) -> "Adapted":
    """Returns the frozen model whose features a head stands on."""
    from ..backbones.bundled import backbone as build
    from ..continual.adapting import adapt_first
    from ..errors import FitError
    from ..joining import adapt
    from ..plugins import method as make
    from ..train.recipe import Recipe
    from ._options import load_model

    if plugin is not None and method is not None:
        raise FitError("features come through a plugin file or through one that is trained first: give one of them")
    if plugin is not None:
        return load_model(plugin, None)
    if method is None:
        return adapt(build(backbone))
    if not plan.has_boundaries:
        raise FitError("a smooth stream has no first experience to adapt to: leave --method away, or --smooth")
    name, settings = rest.plugin
    labels = plan.labels(data.train.labels)[0]
    recipe = Recipe(epochs=method_epochs, seed=rest.seed)
    return adapt_first(build(backbone), [make(name, **settings)], data, labels, recipe, out=folder / "first")


def _chosen(
    make: Callable[[str, Mapping[str, Any]], "Learner"], data: "Task", plan: "Plan", folder: Path, is_shown: bool
) -> list["Tried"]:
    """Returns the candidates, the best first."""
    from ..continual.choosing import CANDIDATES, choose
    from ..continual.sources import parted, samples_of
    from ..train.progress import Progress
    from . import _show

    images = data.joined().train
    with Progress("seeing train images", len(images), is_aside=True) as bar:
        samples = samples_of(make("ncm", {}), images, folder=folder / "features", progress=_to(bar))
    train, val = parted(samples, data)
    with Progress("choosing a learner", len(CANDIDATES), is_aside=True) as bar:
        tried = choose(CANDIDATES, make, plan.stream(train, val, classes=data.classes), bar.at)
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
