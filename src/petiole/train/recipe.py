"""How to train."""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import FitError


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run; the defaults are the papers' VTAB-1k recipe.

    Source: Jie and Deng, 2022, arXiv 2207.07039 and 2023, arXiv 2212.03145, section 4: AdamW, 100 epochs, batch 64,
    learning rate 1e-3, weight decay 1e-4, cosine with 10 epochs of warm-up, no augmentation. Expected there: 75.3 to
    76.6 on VTAB-1k with ViT-B/16. Run time: 1,000 images of 64x64 on two CPU cores take about five seconds an epoch.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step over all processes; the last batch of an epoch may be smaller.
        lr: Peak learning rate.
        weight_decay: AdamW's weight decay, on every trained tensor.
        warmup_epochs: Epochs of linear warm-up, shortened to a tenth of a run of fewer than ten times as many.
        drop_path: Stochastic depth in the backbone, growing linearly to this rate; None leaves the backbone's own. A
            method that trains the head alone sees the backbone in eval mode, without it.
        label_smoothing: Share of the target spread over all classes.
        precision: `fp32`; `bf16` autocast; `auto` is bf16 on a GPU that has it and fp32 elsewhere.
        select: Which weights to keep: `best` of the epochs on the validation split, or `last`.
        eval_every: Epochs between two validations.
        seed: Seed of batch order, dropout and stochastic depth.

    Differs from the papers: the learning rate follows the cosine step by step, reaches its peak, and the last batch is
    used; nothing is ever selected on test.

    Raises:
        FitError: A value is out of range.
    """

    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: int = 10
    drop_path: float | None = None
    label_smoothing: float = 0.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    select: Literal["best", "last"] = "best"
    eval_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "warmup_epochs", "eval_every", "seed"):
            self._require(name, isinstance(getattr(self, name), int), "a whole number")
        for name in ("epochs", "batch_size", "eval_every"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_epochs", "seed"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("lr", 0 < self.lr < math.inf, "above 0")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        self._require("drop_path", self.drop_path is None or 0 <= self.drop_path < 1, "from 0 to below 1")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1")
        self._require("precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")
        self._require("select", self.select in ("best", "last"), "best or last")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up as they are run."""
        return min(self.warmup_epochs, self.epochs / 10)

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise FitError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
