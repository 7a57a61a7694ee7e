"""A learner's way through a stream, kept in a run folder: it goes on wherever it was stopped."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..core.fingerprint import digest, fingerprint
from ..errors import FitError
from ..tasks.task import Split, Task
from ..tasks.transform import Transform
from ..train.progress import Progress
from ..train.run import METRICS, Run
from ..train.stop import Stop
from .learner import Event, Learner, run
from .matrix import AccuracyMatrix
from .saving import Keeper, leaves, read_learner, restore
from .streams import Stream

LEARNER = "learner.safetensors"


@dataclass
class Journey:
    """What a way through a stream came to.

    Args:
        matrix: Accuracies after each experience.
        history: A row for each experience: `experience`, `num_classes` met so far, `num_steps`, `seconds` of learning,
            `average_accuracy` over what was met, and `accuracy.N` of each column N that was scored.
    """

    matrix: AccuracyMatrix
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """What is reported: those metrics of the matrix that are known, and the seconds of learning."""
        known = {name: value for name, value in self.matrix.metrics().items() if not math.isnan(value)}
        return {**known, "seconds": round(sum(row["seconds"] for row in self.history), 3)}


def carry(
    stream: Stream,
    learner: Learner,
    out: str | Path,
    *,
    transform: Transform | None = None,
    is_task_known: bool = False,
    looks_ahead: bool = False,
    about: Mapping[str, Any] | None = None,
    notes: str = "",
    progress: bool = True,
    save_every: float = 60.0,
    test_batch_size: int = 256,
) -> Journey:
    """Leads a learner through a stream and keeps all in a run folder.

    `learner.safetensors` is a classifier at every moment, and holds how far it is: the same call goes on where an
    earlier one was stopped, however it was stopped, and ends with the same learner bit for bit (on a CPU). A finished
    one returns its result. Ctrl-C is answered between two steps, after saving. `metrics.jsonl` has a line for each
    experience, `config.yaml` what was asked.

    Args:
        stream: The stream.
        learner: A learner as it begins, fresh or loaded; changed in place.
        out: The run folder.
        transform: How images become input; None where the learner says it, or the stream brings no images.
        is_task_known: As of `run`.
        looks_ahead: As of `run`.
        about: Further plain values that decide the outcome, e.g. where the data come from.
        notes: Free text for the learner's file.
        progress: Whether to show how far it is, on stderr.
        save_every: Time between two writes of the learner [s]: what a killed run can lose at the most.
        test_batch_size: As of `run`.

    Raises:
        FitError: Learner and stream do not fit, or the folder holds another run, is in use or cannot be written.
        PluginFileError: The learner cannot be kept, or its file in the folder is damaged.

    Example:
        >>> import torch
        >>> from petiole.continual.closed_form import NCM
        >>> from petiole.continual.heads import HeadLearner
        >>> from petiole.continual.streams import class_incremental
        >>> data = torch.eye(6), torch.arange(6)
        >>> stream = class_incremental(data, data, num_experiences=3)
        >>> carry(stream, HeadLearner(NCM()), "runs/eye", progress=False).matrix.final_average()
        1.0
    """
    asked: dict[str, Any] = {"is_task_known": is_task_known, "looks_ahead": looks_ahead}
    # refused before anything is written
    run(stream, learner, **asked)
    keeper = Keeper(learner, classes=stream.classes, transform=transform, notes=notes)
    folder = Run(Path(out))
    with closing(folder):
        folder.claim(_configuration(stream, keeper, {**asked, **(about or {})}))
        way = _Way(stream, keeper, folder, save_every)
        way.resume()
        title = keeper.words["settings"].get("head", keeper.words)["part"]
        bar = Progress(title, way.num_steps, is_shown=progress, num_notes=len(stream))
        with bar, Stop() as stop:
            way.tell(bar)
            matrix, place = way.journey.matrix, way.start
            for event in run(stream, learner, **asked, matrix=matrix, start=place, test_batch_size=test_batch_size):
                is_asked = stop.is_asked
                way.take(event, must_save=is_asked)
                bar.at(way.num_done, way.note)
                if is_asked:
                    raise KeyboardInterrupt
    return way.journey


def recalled(kept: Mapping[str, Any]) -> Journey:
    """Returns what a way has come to, from what a learner's file keeps of it."""
    rows = [[math.nan if value is None else value for value in row] for row in kept["rows"]]
    matrix = AccuracyMatrix(kept["columns"], kept["counts"], kept["met"], rows)
    return Journey(matrix, [dict(row) for row in kept["history"]])


def taken_up(task: Task, classes: Sequence[str]) -> Task:
    """Returns a task whose labels go on from those that a learner knows, so that it can take it up.

    Args:
        task: The task; its classes may be known, new or both.
        classes: What the learner knows; known names keep their labels, new ones come behind.
    """
    names = [*classes, *(name for name in task.classes if name not in classes)]
    labels = np.array([names.index(name) for name in task.classes])
    splits = {
        part: Split(split.images, labels[split.labels])
        for part in ("train", "val", "test")
        if (split := getattr(task, part)) is not None
    }
    return Task(task.name, tuple(names), **splits)


class _Way:
    """How far a learner is, and what is written of it.

    Args:
        stream: The stream.
        keeper: Writes the learner.
        folder: The run folder, which is taken.
        save_every: Time between two writes [s].
    """

    def __init__(self, stream: Stream, keeper: Keeper, folder: Run, save_every: float) -> None:
        self.stream, self.keeper, self.folder, self.save_every = stream, keeper, folder, save_every
        self.starts = [0, *accumulate(experience.num_steps for experience in stream)]
        self.journey = Journey(AccuracyMatrix([], [], []))
        self.start, self.seconds, self.before, self.note = (0, 0), 0.0, 0.0, ""
        self.saved = time.monotonic()

    @property
    def num_steps(self) -> int:
        """Steps of all experiences."""
        return self.starts[-1]

    @property
    def num_done(self) -> int:
        """Steps that are done."""
        return self.starts[self.start[0]] + self.start[1]

    def resume(self) -> None:
        """Goes to where the folder's learner is, if there is one."""
        path = self.folder.folder / LEARNER
        if path.exists():
            info, _, state = read_learner(path)
            if info.journey is None:
                raise FitError(f"{path} is no learner of a run: choose another folder")
            restore(self.keeper.learner, state, info.path)
            kept = info.journey
            self.start, self.before = (kept["experience"], kept["step"]), kept["seconds"]
            self.journey = recalled(kept)
        self.folder.write(METRICS, "".join(json.dumps(row) + "\n" for row in self.journey.history).encode())

    def tell(self, bar: Progress) -> None:
        """Says where it begins."""
        if self.start[0] == len(self.stream):
            bar.say("this run is finished, there is nothing to learn")
            bar.at(self.num_done)
        elif self.start != (0, 0):
            bar.say(f"goes on after step {self.num_done} of {self.num_steps}")

    def take(self, event: Event, *, must_save: bool) -> None:
        """Takes note of an event, and writes the learner where it is time."""
        self.seconds = self.before + event.seconds
        self.start = (event.experience, event.step)
        if event.matrix is not None:
            self.start, self.journey.matrix = (event.experience + 1, 0), event.matrix
            self._close(event)
        if event.matrix is not None or must_save or time.monotonic() - self.saved >= self.save_every:
            self._save()

    def _close(self, event: Event) -> None:
        """Adds an experience's row to the history."""
        met = {label for experience in self.stream.experiences[: event.experience + 1] for label in experience.classes}
        matrix = self.journey.matrix
        average = matrix.averages()[-1]
        row: dict[str, float] = {
            "experience": event.experience,
            "num_classes": len(met),
            "num_steps": event.num_steps,
            "seconds": round(self.seconds, 3),
            **({} if math.isnan(average) else {"average_accuracy": average}),
        }
        scored = zip(matrix.columns, matrix.rows[-1], strict=True)
        row |= {f"accuracy.{name}": value for name, value in scored if not math.isnan(value)}
        self.journey.history.append(row)
        self.folder.log(row)
        self.before = self.seconds = 0.0
        told = "" if math.isnan(average) else f", average accuracy {average:.1%}"
        self.note = f"experience {event.experience + 1} of {len(self.stream)}: {len(met)} classes{told}"

    def _save(self) -> None:
        matrix, (experience, step) = self.journey.matrix, self.start
        kept = {
            "experience": experience,
            "step": step,
            "seconds": self.seconds,
            "columns": list(matrix.columns),
            "counts": list(matrix.counts),
            "met": list(matrix.met),
            "rows": [[None if math.isnan(value) else value for value in row] for row in matrix.rows],
            # pairs: a file does not keep the order of a dictionary
            "history": [list(row.items()) for row in self.journey.history],
        }
        metrics = {name: value for name, value in matrix.metrics().items() if not math.isnan(value)}
        self.keeper.write(self.folder.folder / LEARNER, journey=kept, metrics=metrics)
        self.saved = time.monotonic()


def _configuration(stream: Stream, keeper: Keeper, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all that decides what comes out, as plain values."""
    begins = [(name, leaf) for name, leaf in leaves(keeper.learner.state())]
    tensors = {name: leaf for name, leaf in begins if isinstance(leaf, Tensor)}
    rest = [[name, leaf] for name, leaf in begins if not isinstance(leaf, Tensor)]
    begin = hashlib.sha256((fingerprint(sorted(tensors.items())) + json.dumps(rest)).encode()).hexdigest()
    experiences = [
        {
            "classes": list(experience.classes),
            "train": len(experience.train),
            "test": 0 if experience.test is None else len(experience.test),
            "samples": digest(torch.stack([experience.train.rows, experience.train.labels])).split()[-1][:16],
            **{key: getattr(experience, key) for key in ("batch_size", "epochs", "seed")},
        }
        for experience in stream
    ]
    return {
        "petiole": __version__,
        **asked,
        "learner": keeper.words,
        "begins": begin[:16],
        "stream": {
            "classes": list(stream.classes),
            "has_boundaries": stream.has_boundaries,
            "experiences": experiences,
        },
    }
