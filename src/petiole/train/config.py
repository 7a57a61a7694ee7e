"""Everything that decides the outcome of a run, as plain values."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from .. import __version__
from ..core.adapted import Adapted
from ..core.fingerprint import digest, fingerprint
from ..errors import FitError
from ..tasks.task import Task
from .recipe import Recipe


def check(model: Adapted, task: Task) -> None:
    """Checks that a model answers in the task's classes.

    Raises:
        FitError: It does not.
    """
    advice = "adapt it with classes=task.classes"
    if model.classes is None:
        raise FitError(f"the model has no head of its own: {advice}")
    if len(model.classes) != len(task.classes):
        raise FitError(
            f"the model has {len(model.classes)} classes, the task {task.name} has {len(task.classes)}: {advice}"
        )
    for i, (ours, theirs) in enumerate(zip(model.classes, task.classes, strict=True)):
        if ours != theirs:
            raise FitError(f"class {i} is {ours!r} in the model and {theirs!r} in {task.name}: {advice} in that order")


def configuration(model: Adapted, task: Task, recipe: Recipe) -> dict[str, Any]:
    """Returns what a run is: task, backbone, plugins, transform and recipe."""
    return configuration_of(
        model, recipe, {"task": {"name": task.name, "classes": list(task.classes), **_splits(task)}}
    )


def configuration_of(model: Adapted, recipe: Recipe, learnt: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run is, beside what is learnt: backbone, plugins, transform and recipe."""
    backbone = model.backbone
    weights = fingerprint(model.view.frozen_weights(backbone), model.origin)
    return {
        "petiole": __version__,
        **learnt,
        "backbone": {**model.view.identify(backbone), "fingerprint": weights[:16]},
        "plugins": [{"method": plugin.method, **plugin.settings()} for plugin in model.taps.plugins],
        "head_bits": model.head_bits,
        "transform": dict(model.input_config),
        "recipe": asdict(recipe),
    }


def _splits(task: Task) -> dict[str, dict[str, Any]]:
    splits = {name: split for name in ("train", "val", "test") if (split := getattr(task, name)) is not None}
    return {
        name: {"images": len(split), "labels": digest(torch.from_numpy(split.labels)).split()[-1][:16]}
        for name, split in splits.items()
    }
