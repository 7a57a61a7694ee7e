"""`petiole stream eval`: score a learner on a task."""

from dataclasses import asdict
from typing import Annotated

import typer

from . import _stream as st
from ._options import AsJson, OtherBackbone


def evaluate(
    file: st.LearnerFile,
    source: st.Data,
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the task's splits, as it was for fit")] = 0,
    backbone: OtherBackbone = None,
    as_json: AsJson = False,
) -> None:
    """Score a learner on one split of a task.

    A learner with a head for each experience is told which one an image belongs to.
    """
    from ..continual.scoring import score
    from ..continual.sources import samples_of
    from ..train.progress import Progress
    from . import _show
    from ._options import part_of

    learner, info = st.load(file, backbone)
    data = st.known_task(source, seed, info, file)
    images = part_of(data, split)
    with Progress("seeing images", len(images), is_aside=True) as bar:
        samples = samples_of(learner, images, progress=lambda done, total: bar.at(done))
    with Progress("scoring images", len(images), is_aside=True) as bar:
        scores = score(learner, samples, progress=bar.at)
    if as_json:
        by_class = {data.classes[label]: share for label, share in scores.by_class.items()}
        _show.as_json({"task": data.name, "split": split, **asdict(scores), "by_class": by_class})
        return
    told = "yes" if scores.is_task_known else "no"
    _show.table(
        ("task", "split", "images", "accuracy", "mean class accuracy", "experience told"),
        [
            (
                data.name,
                split,
                str(scores.num_samples),
                f"{scores.accuracy:.2%}",
                f"{scores.mean_class_accuracy:.2%}",
                told,
            )
        ],
    )
