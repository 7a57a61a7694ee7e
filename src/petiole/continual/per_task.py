"""One plugin per experience over one frozen backbone: nothing is shared, so nothing is forgotten."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones import view_of
from ..core.adapted import Adapted
from ..core.prove import eval_mode
from ..errors import DivergedError, FitError
from ..plugins import method as make_plugin
from ..tasks.transform import Transform
from .growing import positions
from .heads import choose
from .learner import Learner
from .streams import Experience


class PluginPerTask(Learner):
    """Trains a plugin and a head of its own for each experience, over one backbone that all share.

    It answers where it is told which experience a sample belongs to: `predict(x, among)` takes the latest experience
    that has all labels of `among`. Without `among` it can answer while one experience has them all. Each step is one of
    AdamW, whose learning rate falls to zero along a cosine over the experience.

    Source: ours; what forgetting is measured against where tasks are told.
    Parameters: those of the plugin, and (d + 1) * classes, an experience.

    Args:
        backbone: A pretrained model; never written to.
        method: Name of the plugin's method, e.g. `fact`.
        settings: The method's settings.
        lr: Learning rate at the start.
        weight_decay: AdamW's weight decay.
        seed: Seed of initial values and dropout.

    Raises:
        FitError: A setting is out of range.
        PluginError: There is no such method, or it fits no site of the backbone.

    Example:
        >>> import petiole as pt, torch
        >>> from petiole.continual.learner import run
        >>> from petiole.continual.streams import class_incremental
        >>> data = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8), torch.arange(16) % 4
        >>> stream = class_incremental(data, data, num_experiences=2, batch_size=4)
        >>> learner = PluginPerTask(pt.backbone("micro"), method="lora", settings={"rank": 2})
        >>> *_, last = run(stream, learner, is_task_known=True)
        >>> last.matrix.forgetting()
        0.0
    """

    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        method: str = "fact",
        settings: Mapping[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ) -> None:
        if not lr > 0 or not weight_decay >= 0:
            raise FitError(f"lr is above 0 and weight_decay 0 or more, got {lr} and {weight_decay}")
        self.backbone, self.method, self.settings = backbone, method, dict(settings or {})
        self.lr, self.weight_decay, self.seed = lr, weight_decay, seed
        self.models: list[Adapted] = []
        self.labels: list[list[int]] = []
        self.progress: dict[str, int] | None = None
        self._optimizer: torch.optim.AdamW | None = None
        # what does not fit is refused before anything is learnt
        fresh = self._fresh(2)
        self.transform = Transform(fresh.input_config)

    def begin(self, experience: Experience) -> None:
        self._open(list(experience.classes))
        self.progress = {"step": 0, "num_steps": experience.num_steps}

    def observe(self, x: Tensor, y: Tensor) -> None:
        if self.progress is None or self._optimizer is None:
            raise FitError(f"{type(self).__name__} must be told where experiences begin: call begin(experience) first")
        model, step = self.models[-1], self.progress["step"]
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * step / self.progress["num_steps"])) / 2
        images = self._prepared(x)
        rows = positions(self.labels[-1], y).to(images.device)
        model.train()
        with self._noise(step):
            loss = F.cross_entropy(model(images).float(), rows)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss is {float(loss.detach())} in step {step} of experience {len(self.models) - 1}: lower lr"
            )
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.progress["step"] += 1

    def end(self, experience: Experience) -> None:
        self.progress = self._optimizer = None

    @torch.no_grad()
    def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
        if not self.models:
            return torch.full((len(x),), -1)
        asked = {label for own in self.labels for label in own} if among is None else set(among)
        found = [i for i, own in enumerate(self.labels) if asked <= set(own)]
        if not found:
            raise FitError(
                f"no experience has all of {len(asked)} classes, and each has a head of its own: give the classes of "
                "one as among, or is_task_known=True to run"
            )
        model, labels = self.models[found[-1]], self.labels[found[-1]]
        with eval_mode(model):
            return choose(model(self._prepared(x))[:, : len(labels)], labels, among)

    def groups(self) -> Sequence[Sequence[int]]:
        return self.labels

    def state(self) -> dict[str, Any]:
        optimizer = {}
        if self._optimizer is not None:
            kept = self._optimizer.state_dict()["state"]
            optimizer = {str(i): {key: v.clone() for key, v in entry.items()} for i, entry in kept.items()}
        return {
            "labels": [list(own) for own in self.labels],
            "models": {
                str(i): {name: tensor.clone() for name, tensor in model.task_state().items()}
                for i, model in enumerate(self.models)
            },
            "optimizer": optimizer,
            "progress": None if self.progress is None else dict(self.progress),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.models, self.labels = [], []
        for i, own in enumerate(state["labels"]):
            self._open(list(own))
            self.models[-1].load_state_dict(state["models"][str(i)], strict=False)
        self.progress = None if state["progress"] is None else dict(state["progress"])
        if self.progress is None:
            self._optimizer = None
        elif self._optimizer is not None:
            # copies: an optimiser writes into what it is given
            known = {int(i): {key: v.clone() for key, v in entry.items()} for i, entry in state["optimizer"].items()}
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": known})

    def _open(self, labels: list[int]) -> None:
        """Adds a fresh model for an experience, and an optimiser for it."""
        self.labels.append(labels)
        self.models.append(self._fresh(len(labels)))
        trained = [p for _, p in self.models[-1].trained()]
        self._optimizer = torch.optim.AdamW(trained, self.lr, weight_decay=self.weight_decay)

    def _fresh(self, num_classes: int) -> Adapted:
        plugin = make_plugin(self.method, **self.settings)
        # a head has at least two rows; a class that is alone needs none, and the second is never asked for
        names = [str(i) for i in range(max(2, num_classes))]
        return Adapted(self.backbone, view_of(self.backbone), [plugin], names, seed=self.seed + len(self.models))

    def _prepared(self, x: Tensor) -> Tensor:
        like = next(self.backbone.parameters())
        x = x.to(like.device)
        return (x if x.is_floating_point() else self.transform.normalize(x)).to(like.dtype)

    @contextmanager
    def _noise(self, step: int) -> Iterator[None]:
        """Lets dropout follow from seed, experience and step alone: one that goes on needs no generator's state."""
        device = next(self.backbone.parameters()).device
        noise = np.random.SeedSequence((self.seed, len(self.models), step)).generate_state(1, np.uint64)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(noise[0]))
            yield
