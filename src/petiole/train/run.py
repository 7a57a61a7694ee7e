"""The folder of a run: what was asked, how far it is, what came out."""

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..core.adapted import Adapted
from ..errors import FitError, PluginFileError
from ..files import save
from ..files.container import atomic_write, one_line

STATE = "state.pt"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
PLUGIN = "plugin.safetensors"
REPORT = "report.html"


class Run:
    """One run's folder, which the same command finds again and goes on with.

    Every file but `metrics.jsonl` is replaced as a whole. The metrics grow by a line an epoch, so that they can be
    followed; what they hold beyond the state of a killed run is cut off when it goes on.

    Args:
        folder: Where to keep the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock: int | None = None

    def open(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Takes the folder for this run and returns the state it was last saved in, None for a new run.

        Args:
            config: Everything that decides the outcome, as plain values.

        Raises:
            FitError: The folder holds a run of another configuration, is in use, damaged, or cannot be written.
        """
        self.claim(config)
        state = self._load()
        history = state["history"] if state else []
        self.write(METRICS, "".join(map(_line, history)).encode())
        return state

    def claim(self, config: Mapping[str, Any]) -> None:
        """Takes the folder for what has this configuration.

        Raises:
            FitError: The folder holds a run of another configuration, is in use, or cannot be written.
        """
        config = json.loads(json.dumps(config))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = _lock(self.folder)
            # what a killed run was writing
            for rest in self.folder.glob(".petiole-*.tmp"):
                rest.unlink()
        except OSError as error:
            raise FitError(f"the run folder {self.folder} cannot be made or used: {one_line(error)}") from error
        if (self.folder / CONFIG).exists():
            self._compare(config)
        else:
            self.write(CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())

    def close(self) -> None:
        """Lets others have the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def log(self, row: Mapping[str, float]) -> None:
        """Adds a row to the metrics."""
        try:
            # unbuffered: the line is written whole or not at all
            with open(self.folder / METRICS, "ab", buffering=0) as file:
                file.write(_line(row).encode())
        except OSError as error:
            raise FitError(f"{self.folder / METRICS} cannot be written: {one_line(error)}") from error

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes the state."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        self.write(STATE, buffer.getbuffer())

    def save_plugin(self, model: Adapted, metrics: Mapping[str, float]) -> None:
        """Writes the plugin file."""
        with _as_fit_error():
            save(model, self.folder / PLUGIN, metrics=metrics)

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file of the folder as a whole.

        Raises:
            FitError: It cannot be written; the old file is then intact.
        """
        with _as_fit_error():
            atomic_write(self.folder / name, content)

    def _compare(self, config: Mapping[str, Any]) -> None:
        path = self.folder / CONFIG
        try:
            before = yaml.safe_load(path.read_text(encoding="utf8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise FitError(f"{path} cannot be read, so the run cannot go on: {one_line(error)}") from error
        if not isinstance(before, dict):
            raise FitError(f"{path} is no configuration of a run: choose another folder")
        old, new = _flat(before), _flat(config)
        changed = [
            f"{key} {_short(old, key)} -> {_short(new, key)}" for key in {**old, **new} if _differ(old, new, key)
        ]
        if changed:
            raise FitError(
                f"{self.folder} holds a run with other settings ({'; '.join(changed)}): "
                "choose another folder, or remove this one to start afresh"
            )

    def _load(self) -> dict[str, Any] | None:
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            assert set(state) >= {"history", "weights", "optimizer"}
        except Exception as error:  # unpickling raises almost anything on damaged data
            raise FitError(
                f"{path} is damaged and cannot be continued: remove {self.folder} to start afresh"
            ) from error
        return state


@contextlib.contextmanager
def _as_fit_error():  # type: ignore[no-untyped-def]
    try:
        yield
    except PluginFileError as error:
        raise FitError(str(error)) from error


def _lock(folder: Path) -> int | None:
    """Returns a descriptor that holds the folder until it is closed or the process dies.

    Raises:
        FitError: Another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FitError(f"another process is training in {folder}: wait for it, or choose another folder") from error
    except OSError:  # a file system without locks
        pass
    return descriptor


def _line(row: Mapping[str, float]) -> str:
    return json.dumps(row) + "\n"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Returns nested dictionaries and lists of them as one, with dotted keys."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}
    if isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{name}.{i}").items()}
    return {name: value}


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> bool:
    return key not in old or key not in new or old[key] != new[key]


def _short(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "nothing"
    value = values[key]
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
