"""What a search knows about its candidates, kept in a file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FitError
from ..files.container import one_line
from .grids import slug
from .run import CONFIG, PLUGIN, STATE, Run

SEARCH = "search"
RECORD = "search.jsonl"
CHOSEN = "chosen.json"
EARLIER = "earlier"


@dataclass(frozen=True)
class Candidate:
    """What training with one combination of settings came to.

    Args:
        settings: Setting or field of the recipe -> its value.
        trained_parameters: How many numbers were trained, with the head.
        seconds: How long that took [s].
        val_accuracy: Share of validation images that are right after the last epoch; None where training failed.
        failure: Why there is no accuracy; None where there is one.
    """

    settings: dict[str, Any]
    trained_parameters: int
    seconds: float
    val_accuracy: float | None = None
    failure: str | None = None


class Record:
    """The candidates that a search has finished, a line each in `search.jsonl`.

    A line that a killed search has left unfinished is dropped: its candidate runs again from where it was.

    Args:
        folder: Where the search keeps everything; a candidate has a run folder of its own in it.
    """

    def __init__(self, folder: Path) -> None:
        self.run = Run(folder)
        self.path = folder / RECORD

    def open(self, config: Mapping[str, Any]) -> dict[str, Candidate]:
        """Takes the folder for a search and returns what is known, by folder name.

        Args:
            config: What all candidates have in common, as plain values.

        Raises:
            FitError: The folder holds a search of another configuration, is in use, or cannot be read or written.
        """
        self.run.claim(config)
        try:
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        except OSError as error:
            raise FitError(f"{self.path} cannot be read: {one_line(error)}") from error
        known = [candidate for line in lines if (candidate := _parse(line)) is not None]
        self.run.write(RECORD, b"".join(map(_line, known)))
        return {slug(candidate.settings): candidate for candidate in known}

    def close(self) -> None:
        """Lets others have the folder."""
        self.run.close()

    def folder(self, candidate: str) -> Path:
        """Returns the run folder of a candidate."""
        return self.run.folder / candidate

    def add(self, candidate: Candidate) -> None:
        """Adds a finished candidate.

        Raises:
            FitError: The file cannot be written.
        """
        try:
            # unbuffered: the line is written whole or not at all
            with open(self.path, "ab", buffering=0) as file:
                file.write(_line(candidate))
        except OSError as error:
            raise FitError(f"{self.path} cannot be written: {one_line(error)}") from error

    def lighten(self, candidate: str) -> None:
        """Removes what a recorded candidate needs no more: its state and its weights, which may be heavy."""
        for name in (STATE, PLUGIN):
            (self.folder(candidate) / name).unlink(missing_ok=True)


def make_room(out: Path, settings: Mapping[str, Any]) -> Path | None:
    """Readies a folder that holds a search for the model with the chosen settings.

    Where a search of an earlier, smaller grid has chosen otherwise, the model it led to is set aside, not replaced.

    Args:
        out: The folder above the search's.
        settings: What the search has chosen now.

    Returns:
        Where an earlier model is now, None where there was none.

    Raises:
        FitError: Something cannot be moved or written.
    """
    note, aside = out / SEARCH / CHOSEN, None
    try:
        before = slug(json.loads(note.read_text(encoding="utf8"))) if note.exists() else None
        if before not in (None, slug(settings)) and (out / CONFIG).exists():
            number = 1 + sum(1 for _ in (out / EARLIER).glob("*"))
            aside = out / EARLIER / f"{number}-{before}"
            aside.mkdir(parents=True)
            for path in [path for path in out.iterdir() if path.name not in (SEARCH, EARLIER)]:
                path.rename(aside / path.name)
    except (OSError, ValueError) as error:
        raise FitError(f"{out} cannot be readied for the chosen settings: {one_line(error)}") from error
    Run(out / SEARCH).write(CHOSEN, json.dumps(settings).encode())
    return aside


def _line(candidate: Candidate) -> bytes:
    return json.dumps(asdict(candidate), ensure_ascii=False).encode() + b"\n"


def _parse(line: bytes) -> Candidate | None:
    try:
        candidate = Candidate(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return candidate if isinstance(candidate.settings, dict) else None
