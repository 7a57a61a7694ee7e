"""The accuracy matrix: what a learner knew of each experience after each, and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import FitError


@dataclass
class AccuracyMatrix:
    """Accuracies after each experience (rows) on each column of the test samples.

    Columns are experiences, or classes where a stream has no boundaries. An accuracy that was not measured is nan:
    columns to come are scored only on request. A metric is nan where nothing speaks for it.

    Args:
        columns: What each column is called.
        counts: Test samples of each column.
        met: For each column, the row after which it was first trained.
        rows: Shares that are right, a row after each experience.
    """

    columns: Sequence[str]
    counts: Sequence[int]
    met: Sequence[int]
    rows: list[list[float]] = field(default_factory=list)

    def add(self, accuracies: Sequence[float]) -> None:
        """Adds the accuracies after one more experience, one a column."""
        self.rows.append([float(value) for value in accuracies])

    @property
    def values(self) -> Tensor:
        """Accuracies `[rows, columns]`, float64; nan where not measured."""
        return torch.tensor(self.rows, dtype=torch.float64).reshape(len(self.rows), len(self.columns))

    def averages(self) -> list[float]:
        """Returns after each experience the mean accuracy over the columns met so far."""
        return [float(row[self._is_met(t)].nanmean()) for t, row in enumerate(self.values)]

    def final_average(self) -> float:
        """Returns the mean accuracy over the columns met, after the last experience."""
        return self.averages()[-1] if self.rows else float("nan")

    def final_accuracy(self) -> float:
        """Returns the share of all test samples that are right after the last experience: columns by their counts."""
        if not self.rows:
            return float("nan")
        last, counts = self.values[-1], torch.tensor(self.counts, dtype=torch.float64)
        counts = counts * (self._is_met(len(self.rows) - 1) & ~last.isnan())
        return float((last.nan_to_num() * counts).sum() / counts.sum())

    def average_incremental(self) -> float:
        """Returns the mean over time of the average accuracy: average incremental, or anytime, accuracy."""
        return float(torch.tensor(self.averages(), dtype=torch.float64).nanmean())

    def forgetting(self, since: Literal["best", "first"] = "best") -> float:
        """Returns how much of a column's accuracy is gone at the end, a mean over the columns met before the last row.

        Args:
            since: `best` compares with the best accuracy that a column had before the last row (Chaudhry et al., 2018,
                arXiv 1801.10112), so is at least minus what later learning gave; `first` compares with the accuracy
                right after the column was met (minus the backward transfer).
        """
        values, losses = self.values, []
        for i, t in enumerate(self.met):
            if t < len(values) - 1:
                before = values[t, i] if since == "first" else _max(values[t:-1, i])
                losses.append(before - values[-1, i])
        return _mean(losses)

    def backward_transfer(self) -> float:
        """Returns what later learning adds to a column's first accuracy: Lopez-Paz and Ranzato, 2017, 1706.08840."""
        return -self.forgetting("first")

    def forward_transfer(self, chance: Sequence[float]) -> float:
        """Returns how far columns were known before they were met, beyond chance; the same paper.

        Args:
            chance: Accuracy of an untrained model on each column.

        Raises:
            FitError: No column was scored before it was met; `run(..., looks_ahead=True)` scores them.
        """
        if len(chance) != len(self.columns):
            raise FitError(
                f"there are {len(self.columns)} columns and {len(chance)} accuracies by chance: give as many"
            )
        values = self.values
        gains = [values[t - 1, i] - chance[i] for i, t in enumerate(self.met) if 0 < t <= len(values)]
        if gains and all(gain.isnan() for gain in gains):
            raise FitError("nothing was scored before it was met: forward transfer needs run(..., looks_ahead=True)")
        return _mean(gains)

    def learning_accuracy(self) -> float:
        """Returns the mean accuracy of columns right after they were met: Riemer et al., 2019, arXiv 1810.11910."""
        values = self.values
        return _mean([values[t, i] for i, t in enumerate(self.met) if t < len(values)])

    def metrics(self) -> dict[str, float]:
        """Returns what is reported of a run, by name."""
        return {
            "final_average": self.final_average(),
            "final_accuracy": self.final_accuracy(),
            "average_incremental": self.average_incremental(),
            "forgetting_since_best": self.forgetting("best"),
            "forgetting_since_first": self.forgetting("first"),
            "learning_accuracy": self.learning_accuracy(),
        }

    def _is_met(self, row: int) -> Tensor:
        return torch.tensor(self.met) <= row


def _max(values: Tensor) -> Tensor:
    """Returns the largest value that was measured."""
    known = values[~values.isnan()]
    return known.max() if len(known) else values.new_tensor(float("nan"))


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).nanmean()) if values else float("nan")
