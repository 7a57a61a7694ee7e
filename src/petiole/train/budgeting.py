"""Chooses a token budget by measured speed, and a compensator's scale by validation accuracy."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from ..backbones import view_of
from ..core.adapted import Adapted
from ..core.prove import eval_mode
from ..errors import FitError
from ..tasks.cache import Pixels
from .evaluate import evaluate

# the grid of arXiv 2408.06798, section 4
SCALES = (0.05, 0.08, 0.1, 0.12, 0.15)
# rounds over all models: enough for a median that a busy moment does not move
NUM_ROUNDS = 5

Measure = Callable[[Sequence[nn.Module]], Sequence[float]]


def throughput(model: nn.Module, *, batch_size: int = 32, seconds: float = 2.0, images: Tensor | None = None) -> float:
    """Returns how many images a model answers in a second, measured; the arguments are those of `throughputs`."""
    return throughputs([model], batch_size=batch_size, seconds=seconds, images=images)[0]


@torch.inference_mode()
def throughputs(
    models: Sequence[nn.Module],
    *,
    batch_size: int = 32,
    seconds: float = 2.0,
    images: Tensor | None = None,
) -> list[float]:
    """Returns how many images each model answers in a second [images/s], measured in turns.

    Every model gets a part of its time in each of five rounds, every other round the other way round, so that a
    machine that grows slower or is busy for a while hits all alike. The median of the rounds counts.

    Args:
        models: Models of one input size on one device; they keep their modes.
        batch_size: Images per forward pass.
        seconds: Time each model is measured for [s], after two passes of warm-up; at least five passes.
        images: What the models see `[B, 3, H, W]`; None for random images of the first model's own input size.

    Raises:
        FitError: No image a batch, or no time.
    """
    if batch_size < 1 or not seconds > 0:
        raise FitError(f"speed is measured on at least 1 image for more than 0 s, got {batch_size} and {seconds:g}")
    images = random_images(models[0], batch_size) if images is None else images
    rates: list[list[float]] = [[] for _ in models]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
        for model in models:
            _time(model, images, 1)  # the first pass fetches memory and chooses kernels
        counts = [max(1, round(seconds / NUM_ROUNDS / max(_time(model, images, 1), 1e-9))) for model in models]
        for i in range(NUM_ROUNDS):
            for j in range(len(models))[:: -1 if i % 2 else 1]:
                rates[j].append(counts[j] * len(images) / _time(models[j], images, counts[j]))
    return [median(row) for row in rates]


def random_images(model: nn.Module, batch_size: int) -> Tensor:
    """Returns random images of a model's own input size `[B, 3, H, W]`, on its device."""
    inside = next((module for module in model.modules() if isinstance(module, Adapted)), None)
    if inside is not None:
        return inside.view.probe(inside.backbone, batch_size)
    return view_of(model).probe(model, batch_size)


def budget_for(
    speed_up: float,
    reference: nn.Module,
    at: Callable[[int], nn.Module],
    largest: int,
    *,
    measure: Measure = throughputs,
    progress: Callable[[int, float], object] | None = None,
) -> int:
    """Returns the smallest constant token budget whose measured speed-up reaches a target.

    Found by bisection, so it takes for granted that more removed tokens are never slower. Each model is measured in
    turns with the reference.

    Args:
        speed_up: The target: images/s over those of the reference, above 1.
        reference: The model without the budget.
        at: Makes the model at a budget, e.g. `lambda r: petiole.compress(model, r)`.
        largest: Largest budget to look at [tokens per block].
        measure: Returns [images/s] of several models.
        progress: Called with each budget that is measured and its speed-up.

    Raises:
        FitError: The target is none, or even the largest budget does not reach it.

    Example:
        >>> import petiole as pt
        >>> model = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=4), classes=["cat", "dog"])
        >>> r = budget_for(1.2, model, lambda r: pt.compress(model, r), largest=32)
    """
    if not speed_up > 1:
        raise FitError(f"the speed-up to reach is above 1, got {speed_up:g}")
    if largest < 1:
        raise FitError("the model has no tokens that could go, so that no budget makes it faster")

    def measured(r: int) -> float:
        before, after = measure([reference, at(r)])
        if progress is not None:
            progress(r, after / before)
        return after / before

    found = measured(largest)
    if found < speed_up:
        raise FitError(
            f"a speed-up of {speed_up:g} cannot be reached: a budget of {largest}, the largest, gives {found:.2f}; ask "
            "for less, or for larger batches"
        )
    low, high = 0, largest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if measured(middle) >= speed_up else (middle, high)
    return high


@dataclass(frozen=True)
class ScaleChoice:
    """Which scale of a compensator was chosen.

    Args:
        scale: The chosen one; 0 where the model is better off without the compensator.
        accuracies: Scale -> validation accuracy; 0 is the model without it.
    """

    scale: float
    accuracies: Mapping[float, float]


def choose_scale(
    at: Callable[[float], Adapted],
    pixels: Pixels,
    scales: Sequence[float] = SCALES,
    *,
    own: float = 0.1,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> ScaleChoice:
    """Returns the scale of compensation with the best validation accuracy, 0 among them.

    The compensator is left off only where that is better than every scale. Of equally good scales the one nearest to
    the compensator's own is chosen, then the one that comes first.

    Source: Jie et al., 2024, arXiv 2408.06798, section 4, the grid.

    Args:
        at: Makes the model at a scale, e.g. `lambda s: petiole.compress(model, 8, compensator=file, scale=s)`.
        pixels: The validation split; never the test split.
        scales: Scales to try beside 0.
        own: The compensator's own scale.
        batch_size: Images per forward pass.
        progress: Called with the number of models that are scored.

    Example:
        >>> import petiole as pt
        >>> model = pt.adapt(pt.backbone("micro"), classes=pt.open_task("digits").classes)
        >>> pixels = Pixels(pt.open_task("digits").val, pt.Transform(model.input_config))
        >>> at = lambda s: pt.compress(model, 4, compensator=pt.ToCom(), scale=s)
        >>> choice = choose_scale(at, pixels)

    Differs from the paper: no compensation is one of the candidates.
    """
    tried = list(dict.fromkeys((*scales, 0.0)))
    accuracies: dict[float, float] = {}
    for scale in tried:
        accuracies[scale] = evaluate(at(scale), pixels, batch_size=batch_size).accuracy
        if progress is not None:
            progress(len(accuracies))
    # rounded: 0.08 and 0.12 are equally near to 0.1
    best = max(tried, key=lambda scale: (accuracies[scale], scale != 0, -round(abs(scale - own), 9)))
    return ScaleChoice(best, accuracies)


def _time(model: nn.Module, images: Tensor, num_passes: int) -> float:
    """Returns how long some forward passes take [s]."""
    _wait(images.device)
    start = perf_counter()
    for _ in range(num_passes):
        model(images)
    _wait(images.device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    """Waits until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
