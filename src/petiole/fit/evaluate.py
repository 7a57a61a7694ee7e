"""What a model answers, and how often it is right."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from ..core.adapted import Adapted
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
def evaluate(model: Adapted, pixels: Pixels, world: World | None = None, batch_size: int = 256) -> Scores:
    """Returns a model's scores on a split; leaves the model in the mode it was in.

    Args:
        model: An adapted model with classes.
        pixels: The split, transformed as the model wants it.
        world: Where to run; the model's device alone by default.
        batch_size: Images per forward pass.

    Raises:
        FitError: The split has no images, or labels the model has no class for.
    """
    world = world or World("fp32")
    num_classes = len(model.classes or ())
    if not len(pixels):
        raise FitError("there are no images to evaluate on")
    counts = torch.zeros(2, num_classes, dtype=torch.float64)
    was_training = model.training
    model.eval()
    mine = range(world.rank, len(pixels), world.size)
    for start in range(0, len(mine), batch_size):
        images, labels = pixels.batch(list(mine[start : start + batch_size]))
        if int(labels.max()) >= num_classes:
            raise FitError(f"label {int(labels.max())} has no class: the model knows {num_classes}")
        with world.autocast():
            logits = model(pixels.transform.normalize(images.to(world.device)))
        hits = logits.argmax(1).cpu() == labels
        counts[0] += torch.bincount(labels, hits.double(), minlength=num_classes)
        counts[1] += torch.bincount(labels, minlength=num_classes)
    model.train(was_training)
    right, seen = world.sum(counts.float().to(world.device)).double().cpu()
    present = seen > 0
    return Scores(float(right.sum() / seen.sum()), float((right[present] / seen[present]).mean()), int(seen.sum()))


@torch.inference_mode()
def features(model: Adapted, pixels: Pixels, world: World, batch_size: int = 256) -> Tensor:
    """Returns what the head sees for every image of a split `[n, num_features]`, in eval mode."""
    was_training = model.training
    model.eval()
    rows = []
    for start in range(0, len(pixels), batch_size):
        images, _ = pixels.batch(list(range(start, min(start + batch_size, len(pixels)))))
        with world.autocast():
            rows.append(model.forward_features(pixels.transform.normalize(images.to(world.device))).float())
    model.train(was_training)
    return torch.cat(rows).clone()


@torch.inference_mode()
def predict(model: Adapted, images: Iterable[Image.Image], batch_size: int = 64) -> Tensor:
    """Returns class probabilities `[n, C]` for PIL images, on the CPU.

    Args:
        model: An adapted model with classes; used in eval mode.
        images: Pictures of any size and mode.
        batch_size: Images per forward pass.
    """
    transform, device = Transform(model.input_config), next(model.parameters()).device
    was_training = model.training
    model.eval()
    stack = [transform.pixels(image) for image in images]
    rows = [
        model(transform.normalize(torch.stack(stack[i : i + batch_size]).to(device))).float().softmax(1).cpu()
        for i in range(0, len(stack), batch_size)
    ]
    model.train(was_training)
    return torch.cat(rows) if rows else torch.empty(0, len(model.classes or ()))


def num_trained(module: nn.Module) -> int:
    """Returns the number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
