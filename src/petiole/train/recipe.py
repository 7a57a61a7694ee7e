"""How to train."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import FitError

# mean and standard deviation of pixel values from 0 to 1; "backbone" has none of its own
_VALUES: dict[str, dict[str, Any]] = {
    "backbone": {},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "half": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "none": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
}
# 224 / 0.875 = 256: resized to 256, cut to 224
_GEOMETRIES: dict[str, dict[str, Any]] = {
    "backbone": {},
    "squash": {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic"},
    "crop": {"crop_mode": "center", "crop_pct": 0.875, "interpolation": "bicubic"},
}


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run; the defaults are the papers' optimiser on the backbone's own input.

    Source: Jie and Deng, 2022, arXiv 2207.07039 and 2023, arXiv 2212.03145, section 4: AdamW, 100 epochs, batch 64,
    learning rate 1e-3, weight decay 1e-4, cosine with 10 epochs of warm-up, no augmentation. What else the papers set
    is in `petiole.recipe`. Run time: 1,000 images of 64x64 on two CPU cores take about five seconds an epoch.

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
        select: Which weights to keep: `best` of the epochs on the validation split, where there is one, or `last`.
        eval_every: Epochs between two validations.
        seed: Seed of batch order, dropout, stochastic depth and augmentation.
        normalize: Mean and standard deviation of the input: the `backbone`'s own, `imagenet`'s, `half` (both 0.5), or
            `none` (values from 0 to 1 as they are). Kept in the model and its file, as `resize` is.
        resize: How an image gets the input's size, in training without augmentation and wherever it is scored: as the
            `backbone`'s own configuration says; `squash`, bicubic, aspect ratio not kept; or `crop`, bicubic to 8/7 of
            the size (256 for 224), then the centre.
        augment: What happens to training images: `none`, or `fgvc`: random resized crop, horizontal flip, RandAugment
            and colour jitter.
        train_on: `train`; or `train+val`, the VTAB protocol, which leaves nothing to validate on.
        checkpoint: Whether every block is computed again in the backward pass, which then keeps only the block's input:
            a fraction of the memory for about 1.5 times the time of a plugin's step. The gradients are the same.

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
    normalize: Literal["backbone", "imagenet", "half", "none"] = "backbone"
    resize: Literal["backbone", "squash", "crop"] = "backbone"
    augment: Literal["none", "fgvc"] = "none"
    train_on: Literal["train", "train+val"] = "train"
    checkpoint: bool = False

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
        self._require("normalize", self.normalize in _VALUES, "backbone, imagenet, half or none")
        self._require("resize", self.resize in _GEOMETRIES, "backbone, squash or crop")
        self._require("augment", self.augment in ("none", "fgvc"), "none or fgvc")
        self._require("checkpoint", isinstance(self.checkpoint, bool), "true or false")
        self._require("train_on", self.train_on in ("train", "train+val"), "train or train+val")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up as they are run."""
        return min(self.warmup_epochs, self.epochs / 10)

    def input_config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Returns how images become input, all but its size: `mean`, `std`, `crop_mode`, `crop_pct`, `interpolation`.

        Args:
            own: The backbone's own values of these.
        """
        asked = _VALUES[self.normalize] | _GEOMETRIES[self.resize]
        return {key: asked.get(key, own[key]) for key in (*_VALUES["half"], *_GEOMETRIES["squash"])}

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise FitError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
