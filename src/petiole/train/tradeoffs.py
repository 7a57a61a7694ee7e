"""What a token budget costs and gives: tokens, operations, measured speed, accuracy; as rows and as a picture."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapted import Adapted
from ..core.attended import Attended
from ..core.flow import Flow
from ..core.plugin import Plugin
from ..core.prove import eval_mode
from ..core.taps import Taps
from ..errors import FitError
from ..files.container import atomic_write
from ..nn.schedule import Budget, macs
from ..tasks.cache import Pixels
from .evaluate import evaluate
from .figures import svg

_PLAIN = ("q", "k", "v", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class Candidate:
    """A model at one token budget.

    Args:
        budget: Its budget.
        model: The model, as it is scored.
        scale: Scale of its compensator, None without one.
        served: What is timed, e.g. a `petiole.Elastic`, in which the compensator is folded; None for the model itself.
    """

    budget: Budget
    model: Adapted
    scale: float | None = None
    served: nn.Module | None = None

    @property
    def timed(self) -> nn.Module:
        """What is timed."""
        return self.model if self.served is None else self.served


@dataclass(frozen=True)
class Tradeoff:
    """What a model at one token budget costs and gives.

    Args:
        budget: Its budget.
        scale: Scale of its compensator, None without one.
        num_tokens: Tokens that leave the last block.
        macs: Multiply-accumulate operations on one image, plugins and head left out; None where the backbone is no
            plain vision transformer.
        images_per_second: Measured throughput [images/s].
        speed_up: Its throughput over that of the first model.
        accuracy: Accuracy on the split that was given, None without one.
    """

    budget: Budget
    scale: float | None
    num_tokens: int
    macs: int | None
    images_per_second: float
    speed_up: float
    accuracy: float | None


def compare(
    candidates: Sequence[Candidate],
    speeds: Sequence[float],
    pixels: Pixels | None = None,
    *,
    progress: Callable[[int], object] | None = None,
) -> list[Tradeoff]:
    """Returns a row for each model; speed-ups are over the first.

    Args:
        candidates: The models, the one before any change first.
        speeds: Throughput of each [images/s], as `throughputs` measures it.
        pixels: The split to score them on, None for none.
        progress: Called with the number of models that are scored.
    """
    rows = []
    for candidate, speed in zip(candidates, speeds, strict=True):
        counts = TokenCounts.of(candidate.model)
        rows.append(
            Tradeoff(
                budget=candidate.budget,
                scale=candidate.scale,
                num_tokens=counts.left[-1],
                macs=counts.macs(candidate.model),
                images_per_second=speed,
                speed_up=speed / speeds[0],
                accuracy=None if pixels is None else evaluate(candidate.model, pixels).accuracy,
            )
        )
        if progress is not None:
            progress(len(rows))
    return rows


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens a model works on, as seen on an image.

    Args:
        left: Tokens that enter the first block's attention, then those that each block's MLP gets `[depth + 1]`; one
            entry where the backbone has no place to remove any.
        num_prefix: How many of them are no patches.
        patch_size: Side of a patch [pixels], None where patches are no squares.
    """

    left: tuple[int, ...]
    num_prefix: int
    patch_size: int | None

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Adapted) -> "TokenCounts":
        """Returns the counts of a model."""
        images, taps = model.view.probe(model.backbone, 1), _Counting(model.taps.plugins)
        with eval_mode(model):
            tokens, flow = model.view.run(model.backbone, images, taps)
        first = taps.first or flow
        height, width = images.shape[2:]
        sides = None if first.grid is None else {height / first.grid[0], width / first.grid[1]}
        size = round(sides.pop()) if sides is not None and len(sides) == 1 else None
        return cls(tuple(taps.left) or (tokens.shape[1],), first.num_prefix, size)

    def macs(self, model: Adapted) -> int | None:
        """Returns the multiply-accumulate operations of the backbone on one image, None if it is no plain ViT."""
        sites = model.view.sites(model.backbone)
        linear = [site for site in sites if site.kind == "linear"]
        blocks = {site.block for site in linear}
        if self.patch_size is None or len(self.left) != len(blocks) + 1:
            return None
        width, hidden = linear[0].d_in, linear[-1].d_in
        wanted = dict.fromkeys(_PLAIN, (width, width)) | {"fc1": (width, hidden), "fc2": (hidden, width)}
        found = sorted((site.block, site.role, site.d_in, site.d_out) for site in linear)
        if found != sorted((block, role, *sizes) for block in blocks for role, sizes in wanted.items()):
            return None
        return macs(
            self.left,
            width,
            mlp_ratio=hidden / width,
            patch_size=self.patch_size,
            num_protected=self.num_prefix,
        )


class _Counting(Taps):
    """Taps that keep how many tokens there are at each tokens site."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        super().__init__(plugins)
        self.left: list[int] = []
        self.first: Flow | None = None

    def tokens(self, name: str, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        if self.first is None:
            self.first, self.left = flow, [x.shape[1]]
        x, flow = super().tokens(name, x, attended, flow)
        self.left.append(x.shape[1])
        return x, flow


def require_plot() -> None:
    """Checks that what draws a plot is installed.

    Raises:
        FitError: It is not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise FitError(f"a plot needs an extra ({error.name} is missing): pip install 'petiole[plot]'") from error


def write_plot(path: Path, rows: Sequence[Tradeoff], split: str) -> None:
    """Writes accuracy against measured throughput as SVG, a line without and one with the compensator.

    Args:
        path: The file.
        rows: What `compare` returned with a split; the first row, the model before any change, begins both lines.
        split: Name of the split.

    Raises:
        FitError: matplotlib is not installed.
        PluginFileError: The file cannot be written.
    """
    require_plot()
    atomic_write(path, svg(lambda axes: _draw(axes[0], rows, split), 1, (6, 4)).encode())


def _draw(axes: Any, rows: Sequence[Tradeoff], split: str) -> None:
    first, compressed = rows[0], rows[1:]
    with_it = [row for row in compressed if row.scale is not None]
    without = [row for row in compressed if row.scale is None]
    for label, line, style in (("without ToCom", without, "o--"), ("with ToCom", with_it, "o-")):
        if line:
            points = sorted((row.images_per_second, row.accuracy) for row in (first, *line))
            axes.plot(*zip(*points, strict=True), style, label=label, ms=4)
    # both lines have the same budgets: one name for each does, at the upper point
    for row in (first, *_best_by_budget(compressed)):
        place = (row.images_per_second, row.accuracy)
        axes.annotate(str(row.budget), place, textcoords="offset points", xytext=(4, 4), fontsize="small")
    axes.set(xlabel="throughput [images/s]", ylabel=f"{split} accuracy")
    axes.grid(alpha=0.3)
    if with_it:
        axes.legend(frameon=False)


def _best_by_budget(rows: Sequence[Tradeoff]) -> list[Tradeoff]:
    best: dict[str, Tradeoff] = {}
    for row in rows:
        key = str(row.budget)
        if key not in best or (row.accuracy or -math.inf) > (best[key].accuracy or -math.inf):
            best[key] = row
    return list(best.values())
