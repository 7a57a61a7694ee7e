"""The online learner: a network trained on a stream and on exemplars of it, in one pass."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import FitError
from ..exemplars import Exemplars
from ..heads import choose
from ..learner import Learner
from .objectives import Objective
from .rehearsal import Joint, Rehearsal, finite

Augment = Callable[[Tensor, torch.Generator], Tensor]


class OnlineLearner(Learner):
    """A network that learns from each batch of a stream together with exemplars, and needs no boundaries.

    With a metric objective and `classifier="ncm"`, the generative classifier: classes are told apart by the means of
    their exemplars' features, so that no weight of a class follows how often it came. That is Bayes' rule for equal
    isotropic classes, all equally likely. The means are computed with the weights of the moment, when something is to
    be predicted and something was learnt since. A class without exemplars is never predicted.

    Source: Shen et al., 2022, "Bypassing Logits Bias in Online Class-Incremental Learning with a Generative Framework",
    arXiv 2205.09347. Its settings are not known: these are derived from the protocols of its kin.

    Args:
        network: From inputs `[B, ...]` to features `[B, d]`; trained in place, except for frozen parameters.
        objective: What it is trained for.
        exemplars: Where samples are kept, as they came, not augmented; None for none.
        classifier: `ncm`: the nearest class mean of the exemplars' features, all at unit length; `softmax`: the
            largest logit of the objective.
        lr: Learning rate; it may be changed between steps.
        optimizer: Makes the optimiser, as `optimizer(parameters, lr=lr)`; None for SGD without momentum or weight
            decay. Parameters of classes to come are added to it as they come.
        replay: Exemplars that are learnt from at each step.
        rehearsal: How a step learns from a batch and exemplars; None for `Joint()`, as one batch.
        augment: Makes training samples look different, from inputs and a generator; None learns them as they are.
        views: How many augmented copies of each sample a step sees.
        normalize: From inputs as the stream gives them to what the network takes, e.g. `Transform.normalize`; None
            divides integers by 255 and leaves floating numbers alone.
        renorm: Whether class means are scaled to unit length again.
        seed: Seed of the augmentation.

    Raises:
        FitError: Two of these contradict each other. `observe` raises `DivergedError` where the loss is not finite.

    Example:
        >>> import torch
        >>> from petiole.continual.exemplars import Reservoir
        >>> from petiole.continual.online.objectives import ProxyNCA
        >>> learner = OnlineLearner(torch.nn.Linear(4, 8), ProxyNCA(), Reservoir(20))
        >>> for _ in range(20):
        ...     learner.observe(torch.eye(4), torch.arange(4))
        >>> learner.predict(torch.eye(4)[2:])
        tensor([2, 3])
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        exemplars: Exemplars | None,
        *,
        classifier: Literal["ncm", "softmax"] = "ncm",
        lr: float = 0.1,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        replay: int = 32,
        rehearsal: Rehearsal | None = None,
        augment: Augment | None = None,
        views: int = 1,
        normalize: Callable[[Tensor], Tensor] | None = None,
        renorm: bool = True,
        seed: int = 0,
    ) -> None:
        self.network, self.objective, self.exemplars = network, objective, exemplars
        self.classifier, self.lr, self.optimizer, self.replay = classifier, lr, optimizer, replay
        self.rehearsal = Joint() if rehearsal is None else rehearsal
        self.augment, self.views, self.normalize = augment, views, normalize
        self.renorm, self.seed = renorm, seed
        self._check()
        self.objective.to(self.device)
        self._generator = torch.Generator().manual_seed(seed)
        self._steps = self._fresh_optimizer()
        self._means: tuple[Tensor, list[int]] | None = None

    def observe(self, x: Tensor, y: Tensor) -> None:
        # a walk through all modules, which need not be taken at every step
        if not self.network.training:
            self.network.train()
        device = self.device
        x, y = x.to(device), y.to(device)
        self._steps.zero_grad()
        more = self.rehearsal.backward(self, x, y)
        for group in self._steps.param_groups:
            group["lr"] = self.lr
        self._steps.step()
        if self.exemplars is not None:
            self.exemplars.add(x, y, *more)
        self._means = None

    def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
        features = self.features(x)
        if self.classifier == "softmax":
            with torch.no_grad():
                return choose(self.objective.logits(features), self.objective.classes, among)
        if not self.exemplars:
            return torch.full((len(x),), -1)
        if self._means is None:
            self._means = self._class_means(*self.exemplars.all()[:2])
        means, classes = self._means
        # |e - mean|^2 without what all classes share
        scores = 2 * F.normalize(features, dim=1) @ means.to(features).T - means.square().sum(1)
        return choose(scores, classes, among)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        parts = {"network": self.network, "objective": self.objective}
        named = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Returns features `[B, d]` of inputs `[B, ...]` as the stream gives them, in eval mode, without a gradient."""
        self.network.eval()
        return self.network(self._normalized(x.to(self.device)))

    def training_features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features of augmented views `[views * B, d]`, with a gradient, and their labels.

        Classes that are seen for the first time get what the objective needs for them.

        Args:
            x: Inputs `[B, ...]`, on the network's device.
            y: Labels `[B]`.
        """
        augment, generator = self.augment, self._generator
        if augment is not None:
            views = [augment(x, generator) for _ in range(self.views)]
            x = views[0] if len(views) == 1 else torch.cat(views)
        labels = y if self.views == 1 else y.repeat(self.views)
        features = self.network(self._normalized(x))
        if new := self.objective.meet(features.detach(), labels):
            self._steps.add_param_group({"params": new})
        return features, labels

    def loss(self, x: Tensor, y: Tensor, num_incoming: int) -> Tensor:
        """Returns the objective on a batch, a scalar.

        Args:
            x: Inputs `[B, ...]`, on the network's device.
            y: Labels `[B]`.
            num_incoming: How many of them come from the stream: the first ones.

        Raises:
            DivergedError: It is not finite.
        """
        features, labels = self.training_features(x, y)
        is_incoming = torch.arange(len(y), device=y.device) < num_incoming
        return finite(self.objective(features, labels, is_incoming.repeat(self.views)))

    def draw(self, num: int | None = None) -> tuple[Tensor, ...]:
        """Returns x, y and what else is kept of some exemplars, on the network's device; nothing if there are none.

        Args:
            num: How many; None for `replay`.
        """
        num = self.replay if num is None else num
        if not num or not self.exemplars:
            return ()
        device = self.device
        return tuple(t.to(device) for t in self.exemplars.sample(num))

    def state(self) -> dict[str, Any]:
        index = {id(p): name for name, p in self.trained.items()}
        return {
            "network": {name: value.clone() for name, value in self.network.state_dict().items()},
            "objective": self.objective.state(),
            "optimizer": {
                index[id(p)]: {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items() if v is not None}
                for p, values in self._steps.state.items()
            },
            "exemplars": {} if self.exemplars is None else self.exemplars.state(),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.objective.restore(state["objective"])
        self.objective.to(self.device)
        self._steps = self._fresh_optimizer()
        # parameters may have joined the optimiser in another order: their names tell them apart; it writes into what it
        # is given
        known = {i: state["optimizer"][name] for i, name in enumerate(self.trained) if name in state["optimizer"]}
        self._steps.load_state_dict({**self._steps.state_dict(), "state": copy.deepcopy(known)})
        if self.exemplars is not None:
            self.exemplars.restore(state["exemplars"])
        self._generator.set_state(state["generator"])
        self._means = None

    def _check(self) -> None:
        if self.classifier not in ("ncm", "softmax"):
            raise FitError(f"the classifier is 'ncm' or 'softmax', got {self.classifier!r}")
        if self.exemplars is None and (self.classifier == "ncm" or self.replay):
            raise FitError("class means and replay need exemplars: give some, or classifier='softmax' and replay=0")
        if not self.objective.has_logits and (self.classifier == "softmax" or self.rehearsal.needs_logits):
            raise FitError(f"{type(self.objective).__name__} has no logits, which the classifier or rehearsal needs")
        if not self.lr > 0 or self.replay < 0:
            raise FitError(f"lr is above 0 and replay is 0 or more, got {self.lr} and {self.replay}")
        if self.views < 1 or (self.views > 1 and self.augment is None):
            raise FitError(f"{self.views} views are copies that look different: they need augment, and 1 at least")

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        return (self.optimizer or torch.optim.SGD)(list(self.trained.values()), lr=self.lr)

    def _normalized(self, x: Tensor) -> Tensor:
        if self.normalize is not None:
            return self.normalize(x)
        return x if x.is_floating_point() else x.float() / 255

    @torch.no_grad()
    def _class_means(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[int]]:
        """Returns the mean feature of each class `[C, d]`, and the classes' labels."""
        features = torch.cat([F.normalize(self.features(part), dim=1) for part in x.split(256)])
        classes, rows = y.to(features.device).unique(return_inverse=True)
        # a product adds up in the same order each time, which index_add_ on a GPU does not
        members = F.one_hot(rows, len(classes)).to(features)
        means = members.T @ features / members.sum(0)[:, None]
        return (F.normalize(means, dim=1) if self.renorm else means), classes.tolist()
