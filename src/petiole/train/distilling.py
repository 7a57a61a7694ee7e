"""Trains a compensator between token budgets from unlabelled images, by self-distillation."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapted import Adapted
from ..core.plugin import Plugin
from ..core.prove import eval_mode
from ..core.taps import Taps
from ..errors import FitError
from ..plugins.tocom import ToCom
from ..plugins.tome import ToMe
from ..tasks.augment import Augmented
from ..tasks.cache import Pixels
from ..tasks.task import Split
from ..tasks.transform import Transform
from .config import configuration_of
from .evaluate import num_trained
from .job import FitResult, Job, carry_out
from .loop import read_split, read_train
from .recipe import Recipe
from .steps import Steps
from .world import World, find_world

# what is held out to see what the compensator is worth: at most this many images, and this share of all
NUM_HELD_OUT, SHARE_HELD_OUT = 1000, 0.05
# degrees between which that is measured, evenly spaced
NUM_DEGREES = 5


def distill(
    model: Adapted,
    images: Split,
    recipe: Recipe | None = None,
    *,
    head: nn.Module | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    save_every: float = 60.0,
) -> FitResult:
    """Trains a model's compensator, so that it serves whatever will be trained on the same backbone.

    Each step draws two degrees. The student merges tokens by the target degree, with the compensator; the teacher is
    the same backbone at the source degree, without it. The loss is the divergence between their answers: of the
    probabilities where there is a classifier, KL(teacher, student), else the squared distance of the features.

    The same call with the same `out` goes on where an earlier one was stopped, as in `fit`, also in several processes.

    Source: Jie et al., 2024, arXiv 2408.06798, section 3.3: AdamW, 10 epochs of ImageNet at batch 1024, learning rate
    2e-3, weight decay 0.05, cosine without warm-up. The default recipe is that at batch 128.

    Args:
        model: A backbone with a `ToCom` and nothing else, as `petiole.adapt(backbone, petiole.ToCom())` gives it;
            trained in place. Its own degrees do not matter and stay.
        images: What `petiole.open_images` returned; the labels are not looked at.
        recipe: How to train; `select`, `train_on`, `eval_every` and `label_smoothing` say nothing here.
        head: From features `[B, num_features]` to logits, for a backbone without a classifier of its own, e.g. the head
            of a probe; None compares the features there.
        out: Run folder, as of `fit`; None keeps nothing.
        progress: Whether to show how far the run is, on stderr.
        save_every: Time between two writes of the state [s].

    Returns:
        The result: `loss_without` and `loss_with` are the mean loss between all pairs of five degrees on images that
        were held out, without and with the compensator; `pairs_improved` is the share of pairs where it is lower.

    Raises:
        DivergedError: The loss is no longer finite.
        FitError: The model has another plugin or a head, or the run folder holds another run.
        TaskError: An image cannot be read.

    Example:
        >>> import petiole as pt
        >>> model = pt.adapt(pt.backbone("micro"), pt.ToCom(groups=4, target=4))
        >>> result = pt.distill(model, pt.open_images("digits"), pt.Recipe(epochs=1), progress=False)

    Differs from the paper: every random number is seeded; no mixup, cutmix or random erasing.
    """
    recipe = recipe or Recipe(epochs=10, batch_size=128, lr=2e-3, weight_decay=0.05, warmup_epochs=0)
    _check(model)
    world = find_world(recipe.precision)
    is_shown = progress and world.rank == 0
    if recipe.drop_path is not None:
        model.set_drop_path(recipe.drop_path)
    model.set_checkpointing(recipe.checkpoint)
    model.input_config = model.input_config | recipe.input_config(model.view.input_config(model.backbone))
    transform = Transform(model.input_config)
    train, held_out = parted(images, recipe.seed)
    seen = read_train(train, transform, recipe, is_shown)
    pixels = read_split("held-out", held_out, transform, is_shown)
    pair = Pair(model, head).to(world.device)
    words = {"images": len(images), "head": head is not None, "loss": pair.kind}
    return carry_out(
        lambda run, state: PairJob(PairSteps(pair, seen, recipe, world), {"held_out": pixels}, run, state, save_every),
        configuration_of(model, recipe, {"distill": words}),
        world,
        None if out is None else Path(out),
        "ToCom",
        is_shown=is_shown,
    )


class Pair(nn.Module):
    """Teacher and student of one backbone: without and with the compensator, at two degrees of merging.

    Args:
        model: The backbone with the compensator.
        head: From features to logits, None for what the backbone has.
    """

    def __init__(self, model: Adapted, head: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.head = None if head is None else copy.deepcopy(head).requires_grad_(False)
        self.merging = ToMe(budget=0)
        self.merging.attach(model.view.sites(model.backbone))
        names = [] if head is not None else model.view.classifiers(model.backbone)
        has_classifier = any(True for name in names for _ in model.backbone.get_submodule(name).parameters())
        self.kind = "kl" if head is not None or has_classifier else "mse"

    @property
    def plugin(self) -> ToCom:
        """The compensator."""
        (plugin,) = self.model.taps.plugins
        assert isinstance(plugin, ToCom)
        return plugin

    def forward(self, images: Tensor, source: int, target: int) -> Tensor:
        """Returns the loss of a batch `[B, 3, H, W]` between two degrees, a scalar."""
        with eval_mode(self.model), torch.no_grad():
            teacher = self.answer(images, source, is_compensated=False)
        with self.between(source, target):
            student = self.answer(images, target)
        return self.loss(student.float(), teacher.float())

    def answer(self, images: Tensor, degree: int, *, is_compensated: bool = True) -> Tensor:
        """Returns logits or features at a degree, with or without the compensator."""
        model = self.model
        self.merging.set_budget(degree)
        plugins: list[Plugin] = [self.plugin, self.merging] if is_compensated else [self.merging]
        tokens, flow = model.view.run(model.backbone, images, Taps(plugins, model.taps.is_checkpointed))
        if self.head is None:
            return model.view.classify(model.backbone, tokens, flow)
        return self.head(model.view.pool(model.backbone, tokens, flow))

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the mean over images and classes of the divergence, or the mean squared distance."""
        if self.kind == "mse":
            return F.mse_loss(student, teacher)
        divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
        return divergence / student.numel()

    @contextmanager
    def between(self, source: int, target: int) -> Iterator[None]:
        """While it is entered, the compensator goes from one degree to the other."""
        plugin = self.plugin
        before = plugin.source, plugin.target
        plugin.set_degrees(source, target)
        try:
            yield
        finally:
            plugin.set_degrees(*before)


class PairSteps(Steps):
    """Steps whose loss is the divergence between two degrees, drawn anew each time."""

    def __init__(self, pair: Pair, train: Pixels | Augmented, recipe: Recipe, world: World) -> None:
        self.pair = pair
        super().__init__(pair.model, train, recipe, world)

    def network(self) -> nn.Module:
        return self.pair

    def take(self, step: int) -> tuple[float, int]:
        # for the whole step: what is checkpointed is computed again in the backward pass, at the same degrees
        with self.pair.between(*self.degrees(step)):
            return super().take(step)

    def degrees(self, step: int) -> tuple[int, int]:
        """Returns this process's source and target of a step."""
        # 2: another stream than those of dropout and augmentation
        generator = np.random.default_rng((self.recipe.seed, step, self.world.rank, 2))
        source, target = generator.choice(self.pair.plugin.groups + 1, size=2, replace=False)
        return int(source), int(target)

    def mean_loss(self, x: Tensor, labels: Tensor, step: int) -> Tensor:
        with self.world.autocast():
            return self.net(x, *self.degrees(step))


class PairJob(Job):
    """A run that ends with what the compensator is worth on held-out images."""

    steps: PairSteps

    def finish(self) -> dict[str, float]:
        without, with_it = gaps(self.steps.pair, self.splits["held_out"], self.world)
        return {
            "trained_parameters": num_trained(self.model),
            "loss_without": sum(without.values()) / len(without),
            "loss_with": sum(with_it.values()) / len(with_it),
            "pairs_improved": sum(with_it[pair] < without[pair] for pair in without) / len(without),
            "seconds": round(self.seconds(), 1),
        }


@torch.inference_mode()
def gaps(pair: Pair, pixels: Pixels, world: World, batch_size: int = 250) -> tuple[dict[Any, float], dict[Any, float]]:
    """Returns the mean loss between every two of some degrees, by (source, target), without and with the compensator.

    Args:
        pair: Teacher and student.
        pixels: Images.
        world: The processes that share the work.
        batch_size: Images per forward pass.
    """
    degrees = sorted({round(i * pair.plugin.groups / (NUM_DEGREES - 1)) for i in range(NUM_DEGREES)})
    pairs = list(permutations(degrees, 2))
    sums = torch.zeros(2, len(pairs), dtype=torch.float64)
    mine = range(world.rank, len(pixels), world.size)
    with eval_mode(pair.model), world.autocast():
        for start in range(0, len(mine), batch_size):
            rows = list(mine[start : start + batch_size])
            images = pixels.transform.normalize(pixels.batch(rows)[0].to(world.device))
            plain = {degree: pair.answer(images, degree, is_compensated=False).float() for degree in degrees}
            for i, (source, target) in enumerate(pairs):
                with pair.between(source, target):
                    student = pair.answer(images, target).float()
                for j, answer in enumerate((plain[target], student)):
                    sums[j, i] += len(rows) * pair.loss(answer, plain[source]).item()
    means = (world.sum(sums.float().to(world.device)).double().cpu() / len(pixels)).tolist()
    return dict(zip(pairs, means[0], strict=True)), dict(zip(pairs, means[1], strict=True))


def _check(model: Adapted) -> None:
    plugins = model.taps.plugins
    if len(plugins) != 1 or not isinstance(plugins[0], ToCom) or model.head is not None:
        raise FitError(
            f"distill trains a ToCom alone on a backbone, got {model}: make it by petiole.adapt(backbone, "
            "petiole.ToCom()), without classes"
        )


def parted(images: Split, seed: int) -> tuple[Split, Split]:
    """Returns images to train on, and some that are held out."""
    num_held_out = min(NUM_HELD_OUT, round(SHARE_HELD_OUT * len(images)))
    if num_held_out < 1:
        raise FitError(f"{len(images)} images are too few to distill from: at least {round(1 / SHARE_HELD_OUT)}")
    order = np.random.default_rng(seed).permutation(len(images))
    return images.part(np.sort(order[num_held_out:])), images.part(np.sort(order[:num_held_out]))
