"""What a model answers, and how often it is right."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor, nn

from ..core.adapted import Adapted
from ..core.prove import eval_mode
from ..errors import FitError
from ..tasks.cache import Pixels
from ..tasks.transform import Transform
from .world import World


@dataclass(frozen=True)
class Scores:
    """How often a model is right on one split.

    Args:
        accuracy: Share of images whose most probable class is right.
        mean_class_accuracy: Mean of that share over the classes that occur.
        num_images: Images scored.
    """

    accuracy: float
    mean_class_accuracy: float
    num_images: int


@torch.inference_mode()
def evaluate(
    model: Adapted,
    pixels: Pixels,
    world: World | None = None,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
    seen: Tensor | None = None,
) -> Scores:
    """Returns a model's scores on a split; leaves the model in the mode it was in.

    Args:
        model: An adapted model with classes; runs where it is.
        pixels: The split, transformed as the model wants it.
        world: The processes that share the work, and their precision; by default this one alone, without autocast.
        batch_size: Images per forward pass.
        progress: Called with the number of this process's images that are done.
        seen: What `features` returned for the split, where that is known: the head alone then runs.

    Raises:
        FitError: The model has no classes of its own, or the split has labels that it has no class for.
    """
    world = world or World("fp32")
    if model.classes is None or model.head is None:
        raise FitError("the model has no head of its own, so its answers are not the task's classes")
    device, num_classes = _device(model), len(model.classes)
    counts = torch.zeros(2, num_classes, dtype=torch.float64)
    mine = range(world.rank, len(pixels), world.size)
    with eval_mode(model):
        for start in range(0, len(mine), batch_size):
            rows = mine[start : start + batch_size]
            labels = pixels.labels[list(rows)]
            if int(labels.max()) >= num_classes:
                raise FitError(f"label {int(labels.max())} has no class: the model knows {num_classes}")
            with world.autocast():
                if seen is not None:
                    logits = model.head(seen[list(rows)])
                else:
                    logits = model(pixels.transform.normalize(pixels.batch(list(rows))[0].to(device)))
            hits = logits.argmax(1).cpu() == labels
            counts[0] += torch.bincount(labels, hits.double(), minlength=num_classes)
            counts[1] += torch.bincount(labels, minlength=num_classes)
            if progress is not None:
                progress(start + len(rows))
    right, total = world.sum(counts.float().to(world.device)).double().cpu()
    present = total > 0
    return Scores(float(right.sum() / total.sum()), float((right[present] / total[present]).mean()), int(total.sum()))


@torch.no_grad()
def features(model: Adapted, pixels: Pixels, world: World, batch_size: int = 256) -> Tensor:
    """Returns what the head sees for every image of a split `[n, num_features]`, in eval mode."""
    rows, device = [], _device(model)
    with eval_mode(model):
        for start in range(0, len(pixels), batch_size):
            images, _ = pixels.batch(list(range(start, min(start + batch_size, len(pixels)))))
            with world.autocast():
                rows.append(model.forward_features(pixels.transform.normalize(images.to(device))).float())
    return torch.cat(rows)


@torch.no_grad()
def predict(model: Adapted, images: Iterable[Image.Image], batch_size: int = 64) -> Tensor:
    """Returns class probabilities `[n, C]` for PIL images, on the CPU; leaves the model in the mode it was in.

    Args:
        model: An adapted model; runs where it is.
        images: Pictures of any size and mode, taken one batch at a time: a generator need not fit into memory.
        batch_size: Images per forward pass.

    Raises:
        TaskError: An image has no defined white (float images).

    Example:
        >>> import petiole as pt
        >>> model = pt.load("pets.safetensors")
        >>> pt.predict(model, [Image.open("tom.jpg")]).argmax(1)
    """
    transform, device = Transform(model.input_config), _device(model)
    source, rows = iter(images), []
    with eval_mode(model):
        while stack := [transform.pixels(image) for image in islice(source, batch_size)]:
            logits = model(transform.normalize(torch.stack(stack).to(device)))
            rows.append(logits.float().softmax(1).cpu())
    return torch.cat(rows) if rows else torch.empty(0, len(model.classes or ()))


def num_trained(module: nn.Module) -> int:
    """Returns the number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
