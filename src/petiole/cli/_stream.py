"""What the commands of `petiole stream` share: options, and how a learner is found."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import TASK_HELP

if TYPE_CHECKING:
    from ..continual.learner import Learner
    from ..continual.saving import LearnerInfo
    from ..tasks.task import Task

AUTO = "auto"
# the table of learners would import torch for a help; a test holds the two equal
NAMES = (
    "a-gem, confit, der++, er, er-ace, ewc, fine-tune, fine-tune-network, gdumb, generative, joint, lwf, mir, ncm, "
    "online-der++, online-er, online-er-ace, plugins, random-ridge, ridge, scr, slda, taer"
)
Data = Annotated[str, typer.Argument(metavar="DATA", help=TASK_HELP)]
LearnerFile = Annotated[Path, typer.Argument(metavar="FILE", help="Learner's file, or the run folder that it is in")]


def learner_file(path: Path) -> Path:
    """Returns the learner's file of a run folder; a file is its own."""
    from ..continual.journey import LEARNER

    return path / LEARNER if path.is_dir() else path


def load(path: Path, backbone: str | None) -> tuple["Learner", "LearnerInfo"]:
    """Returns a learner and what its file says."""
    import torch

    from ..backbones.bundled import backbone as build
    from ..continual.saving import inspect_learner, load_learner

    file = learner_file(path)
    info = inspect_learner(file)  # a file that is none should not cost a download
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host = None if backbone is None else build(backbone).to(device)
    return load_learner(file, backbone=host), info


def known_task(source: str, seed: int, info: "LearnerInfo", path: Path) -> "Task":
    """Returns a task with the labels that a learner gave its classes.

    Raises:
        TaskError: The learner has not met a class.
    """
    from ..continual.journey import taken_up
    from ..errors import TaskError
    from ..tasks import open_task

    task = open_task(source, seed=seed)
    if new := [name for name in task.classes if name not in info.classes]:
        raise TaskError(
            f"{task.name} has the class {new[0]!r}, which the learner in {path} has not met: "
            f"`petiole stream fit {source} --continue {path}` teaches it"
        )
    return taken_up(task, info.classes)


def settings_of(name: str, words: list[str]) -> dict[str, Any]:
    """Returns a learner's settings from `key=value` words."""
    from ..continual.catalogue import settings_of as defaults
    from ._options import read_words

    return read_words(name, words, defaults(name))
