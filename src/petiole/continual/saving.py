"""A learner as one file: a classifier that goes on learning wherever it is loaded.

The file is the same container as a plugin file. Its metadata say what the learner is made of; its tensors are all that
it has learnt, its generators included, so that it goes on exactly. Backbones are named by a fingerprint, not kept.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import FitError, PluginFileError
from ..files.container import one_line, parse, read_bytes, write
from ..files.description import (
    Kinds,
    TensorInfo,
    check_fields,
    check_version,
    describe_metrics,
    read_input_config,
    tensor_table,
)
from ..tasks.transform import Transform
from .learner import Learner
from .parts import Supply, describe, input_config, make

KIND = "learner"
SCHEMA_VERSION = 1
_STATE = "state/"
# key -> what it must be; keys of nested objects after a dot
_SCHEMA: dict[str, Kinds] = {
    "petiole": str,
    "learner": dict,
    "learner.part": str,
    "classes": list,
    "input_config": (dict, type(None)),
    "state": list,
    "journey": (dict, type(None)),
    "metrics": dict,
    "notes": str,
}


@dataclass(frozen=True)
class LearnerInfo:
    """Everything a learner's file says about itself.

    Args:
        path: The file.
        petiole: Version of petiole that wrote it.
        learner: What it is made of: `part` and `settings`, and so on inside.
        classes: Name of each class; label c belongs to `classes[c]`.
        input_config: How images become input; None where its inputs are no images, or it does not say.
        journey: How far it is in a stream, as `carry` keeps it; None where it was saved otherwise.
        metrics: What it reached, by name.
        notes: Free text.
        tensors: What is stored, by name.
        total_bytes: Size of the file.
    """

    path: str
    petiole: str
    learner: dict[str, Any]
    classes: tuple[str, ...]
    input_config: dict[str, Any] | None
    journey: dict[str, Any] | None
    metrics: dict[str, float]
    notes: str
    tensors: tuple[TensorInfo, ...]
    total_bytes: int


class Keeper:
    """Writes a learner into a file, again and again; what is frozen is described once.

    Args:
        learner: What is kept.
        classes: Name of each class.
        transform: How images become input; None where the learner says it, or its inputs are no images.
        notes: Free text.

    Raises:
        PluginFileError: The learner could not be loaded again.
    """

    def __init__(
        self, learner: Learner, *, classes: Sequence[str], transform: Transform | None = None, notes: str = ""
    ) -> None:
        self.learner = learner
        self.words, self.tensors = describe(learner)
        config = input_config(self.words) if transform is None else transform.config
        self.rest = {"classes": list(classes), "input_config": config, "notes": notes}

    def write(
        self,
        path: str | os.PathLike[str],
        *,
        journey: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> int:
        """Writes the file atomically and returns its size [bytes].

        Args:
            path: Where to; its folder must exist.
            journey: How far it is in a stream, as plain values.
            metrics: What it reached, by name.

        Raises:
            PluginFileError: The file cannot be written, or the state holds what a file cannot.
        """
        tensors, state = dict(self.tensors), []
        for name, leaf in leaves(self.learner.state()):
            if isinstance(leaf, Tensor):
                tensors[_STATE + name] = leaf
                state.append([name, "tensor", str(leaf.device)])
            else:
                state.append([name, "value", leaf])
        info = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "petiole": __version__,
            "learner": self.words,
            "state": state,
            "journey": None if journey is None else dict(journey),
            "metrics": describe_metrics(metrics or {}),
            **self.rest,
        }
        return write(path, tensors, info)


def save_learner(
    learner: Learner,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    transform: Transform | None = None,
    metrics: Mapping[str, float] | None = None,
    notes: str = "",
) -> int:
    """Writes a learner's file atomically and returns its size [bytes].

    Holds what the learner is made of and all that it has learnt, with its exemplars and generators. Networks that it
    trains are in it; the backbone that an `Extractor` stands on is not, but its plugins are. Functions are not.

    Args:
        learner: Any learner of petiole, at any moment.
        path: Where to; its folder must exist.
        classes: Name of each class; label c belongs to `classes[c]`.
        transform: How images become input; None where the learner says it, or its inputs are no images.
        metrics: What it reached, by name.
        notes: Free text.

    Raises:
        PluginFileError: The file cannot be written, or the learner could not be loaded again.

    Example:
        >>> import torch
        >>> from petiole.continual.closed_form import NCM
        >>> from petiole.continual.heads import HeadLearner
        >>> learner = HeadLearner(NCM().partial_fit(torch.eye(2), [0, 1]))
        >>> _ = save_learner(learner, "learner.safetensors", classes=["cat", "dog"])
        >>> load_learner("learner.safetensors").predict(torch.eye(2))
        tensor([0, 1])
    """
    keeper = Keeper(learner, classes=classes, transform=transform, notes=notes)
    return keeper.write(path, metrics=metrics)


def load_learner(
    path: str | os.PathLike[str],
    *,
    backbone: nn.Module | None = None,
    network: nn.Module | None = None,
    given: Mapping[str, Any] | None = None,
) -> Learner:
    """Returns the learner of a file, which goes on exactly as the one that was saved.

    Args:
        path: A file of `save_learner`, or of a run.
        backbone: What its extractor stands on; None builds it by the name in the file, which may download its weights.
        network: What it trains: an architecture as it was given, with any weights; None builds it by its timm name.
        given: Functions and frozen networks that it was made with, by the setting they were.

    Raises:
        PluginFileError: The file is damaged, foreign or of another schema version; or something that must be given is
            missing or is another.
    """
    info, tensors, state = read_learner(path)
    made = {**({} if network is None else {"network": network}), **(given or {})}
    learner: Learner = make(info.learner, Supply(tensors, backbone, made, info.path))
    restore(learner, state, info.path)
    return learner


def inspect_learner(path: str | os.PathLike[str]) -> LearnerInfo:
    """Returns everything a learner's file says about itself; needs no backbone and verifies every byte.

    Raises:
        PluginFileError: The file cannot be read, is damaged, foreign, or of another schema version.
    """
    return read_learner(path)[0]


def read_learner(path: str | os.PathLike[str]) -> tuple[LearnerInfo, dict[str, Tensor], dict[str, Any]]:
    """Returns metadata, tensors and state of a learner's file.

    Raises:
        PluginFileError: The file cannot be read, is damaged, foreign, or of another schema version.
    """
    where, data = os.fspath(path), read_bytes(path)
    tensors, found = parse(data, where)
    if found.get("kind") != KIND:
        kind = found.get("kind", "a plugin")
        raise PluginFileError(f"{where} holds {kind}, no learner: give a file of save_learner or `petiole stream fit`")
    check_version(found, SCHEMA_VERSION, where)
    check_fields(found, _SCHEMA, where)
    config = found["input_config"]
    info = LearnerInfo(
        path=where,
        classes=tuple(found["classes"]),
        input_config=None if config is None else read_input_config(config),
        **{key: found[key] for key in ("petiole", "learner", "journey", "metrics", "notes")},
        tensors=tensor_table(tensors),
        total_bytes=len(data),
    )
    return info, tensors, _state(found["state"], tensors, where)


def restore(learner: Learner, state: Mapping[str, Any], where: str) -> None:
    """Lets a learner take over a state.

    Raises:
        PluginFileError: It does not fit.
    """
    try:
        learner.restore(state)
    except (FitError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PluginFileError(f"{where}: what was learnt does not fit the learner: {one_line(error)}") from error


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields name and content of everything in a learner's state.

    Raises:
        PluginFileError: A key is no word that can be kept.
    """
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            if not isinstance(key, str) or not key or "/" in key:
                raise PluginFileError(f"the key {key!r} of the state cannot be kept: a word without / is wanted")
            yield from leaves(inner, (*path, key))
    else:
        yield "/".join(path), value


def _state(entries: Sequence[Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Returns the nested dictionary that `leaves` took apart, tensors on the devices they were on, where there are."""
    state: dict[str, Any] = {}
    for entry in entries:
        match entry:
            case [str(name), "tensor", str(device)] if _STATE + name in tensors:
                leaf: Any = tensors[_STATE + name].to(_present(device))
            case [str(name), "value", leaf]:
                pass
            case _:
                raise PluginFileError(
                    f"{where}: the state has the entry {str(entry)[:60]}, of which there is no tensor"
                )
        *path, last = name.split("/")
        inner = state
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return state


def _present(device: str) -> torch.device:
    """Returns a device, or the CPU where this machine has none of its kind."""
    kind = torch.device(device)
    is_there = kind.type == "cpu" or (kind.type == "cuda" and (kind.index or 0) < torch.cuda.device_count())
    return kind if is_there else torch.device("cpu")
