"""The folder of a run: what was asked, how far it is, what came out."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import FitError
from ..files.container import atomic_write

STATE = "state.pt"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
PLUGIN = "plugin.safetensors"
REPORT = "report.html"


class Run:
    """One run's folder, which the same command finds again and goes on with.

    Args:
        folder: Where to keep the run; made if absent.
        config: Everything that decides the outcome, as plain values.

    Raises:
        FitError: The folder holds a run of another configuration, or cannot be written.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        config = json.loads(json.dumps(config))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FitError(f"the run folder {folder} cannot be made: {error.strerror}") from error
        if (folder / CONFIG).exists():
            before = yaml.safe_load((folder / CONFIG).read_text(encoding="utf8"))
            changed = [
                f"{k} {_short(before.get(k))} -> {_short(config[k])}" for k in config if before.get(k) != config[k]
            ]
            if changed:
                raise FitError(
                    f"{folder} holds a run with other settings ({'; '.join(changed)}): "
                    "choose another folder, or remove this one to start afresh"
                )
        else:
            atomic_write(folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())

    def load(self) -> dict[str, Any] | None:
        """Returns the state the run was last saved in, None for a new run.

        Raises:
            FitError: The state file is damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise FitError(
                f"{path} is damaged and cannot be continued: remove {self.folder} to start afresh"
            ) from error
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes the state, then the metrics it contains; a crash between leaves the older metrics to be rewritten."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        atomic_write(self.folder / STATE, buffer.getvalue())
        lines = "".join(json.dumps(row) + "\n" for row in state["history"])
        atomic_write(self.folder / METRICS, lines.encode())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
