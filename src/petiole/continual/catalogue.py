"""Learners by name: on what each stands, where it comes from, and how one is made.

head      a head on the features of a frozen model, which are computed once
online    a network that is trained on a stream as it passes, with exemplars
tuned     a network or plugins that are tuned to one experience after the other, and asked with the experience told
"""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..core.adapted import Adapted
from ..errors import BackboneError, FitError, nearest
from ..tasks.transform import Transform
from .exemplars import ClassBalanced, Herding, Reservoir, Ring
from .features import Extractor
from .heads import HeadLearner
from .learner import Learner
from .online.augment import CropColour, ShiftFlip
from .online.baselines import GDumb
from .online.learner import OnlineLearner
from .store import Exemplars

Kind = Literal["head", "online", "tuned"]
POLICIES: Mapping[str, type[Exemplars]] = {
    "class-balanced": ClassBalanced,
    "herding": Herding,
    "reservoir": Reservoir,
    "ring": Ring,
}
AUGMENTATIONS: Mapping[str, Callable[[], Any] | None] = {"none": None, "shift": ShiftFlip, "crop": CropColour}
# what is made from something else than a word
_GIVEN = (
    "network", "backbone", "exemplars", "prepare", "input_size", "num_classes", "settings", "mean", "seed", "augment",
    "normalize", "optimizer",
)  # fmt: skip
# settings of `OnlineLearner` that the functions of `online.baselines` hand on
_ONLINE = ("lr", "replay", "views", "renorm")


@dataclass(frozen=True)
class Offer:
    """A learner that can be asked for by name.

    Args:
        kind: On what it stands.
        module: File of this package that makes it.
        maker: Class or function of that file.
        about: What it is, in some words.
    """

    kind: Kind
    module: str
    maker: str
    about: str

    @property
    def make(self) -> Callable[..., Any]:
        """What makes it."""
        found: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{self.module}"), self.maker)
        return found

    @property
    def has_exemplars(self) -> bool:
        """Whether it keeps exemplars."""
        return "exemplars" in inspect.signature(self.make).parameters


LEARNERS: Mapping[str, Offer] = {
    "a-gem": Offer("online", "online.baselines", "a_gem", "averaged gradient episodic memory"),
    "confit": Offer("tuned", "confit.learner", "ConFiT", "continual fine-tuning with Xconv BN"),
    "der++": Offer("head", "replay", "DERpp", "dark experience replay"),
    "er": Offer("head", "replay", "ER", "experience replay"),
    "er-ace": Offer("head", "replay", "ERACE", "replay with asymmetric cross-entropy"),
    "ewc": Offer("tuned", "confit.baselines", "EWC", "elastic weight consolidation"),
    "fine-tune": Offer("head", "trained", "FineTune", "a head trained on each experience alone"),
    "fine-tune-network": Offer("tuned", "confit.baselines", "FineTune", "a network tuned to each experience alone"),
    "gdumb": Offer("online", "online.baselines", "GDumb", "learns from exemplars alone, when asked"),
    "generative": Offer("online", "online.baselines", "generative", "Multi-Similarity and Proxy-NCA, class means"),
    "joint": Offer("head", "trained", "Joint", "a head trained anew on all samples: the upper bound"),
    "lwf": Offer("tuned", "confit.baselines", "LwF", "learning without forgetting"),
    "mir": Offer("online", "online.baselines", "mir", "replay of what a step would harm"),
    "ncm": Offer("head", "closed_form", "NCM", "nearest class mean"),
    "online-der++": Offer("online", "online.baselines", "dark_experience", "dark experience replay"),
    "online-er": Offer("online", "online.baselines", "er", "experience replay"),
    "online-er-ace": Offer("online", "online.baselines", "er_ace", "replay with asymmetric cross-entropy"),
    "plugins": Offer("tuned", "per_task", "PluginPerTask", "one plugin an experience over one backbone"),
    "random-ridge": Offer("head", "closed_form", "RandomRidge", "ridge regression on random features"),
    "ridge": Offer("head", "closed_form", "Ridge", "ridge regression"),
    "scr": Offer("online", "online.baselines", "scr", "supervised contrastive replay, class means"),
    "slda": Offer("head", "closed_form", "SLDA", "streaming linear discriminant analysis"),
    "taer": Offer("head", "taer", "TAER", "task-aware experience replay"),
}


def offer(name: str) -> Offer:
    """Returns the learner of a name.

    Raises:
        FitError: There is none.
    """
    if name not in LEARNERS:
        raise FitError(f"no learner is called {name!r}{nearest(name, LEARNERS)}: choose {', '.join(LEARNERS)}")
    return LEARNERS[name]


def settings_of(name: str) -> dict[str, Any]:
    """Returns the settings of a learner that words can give, with their defaults."""
    found = offer(name)
    own = {
        key: parameter.default
        for key, parameter in inspect.signature(found.make).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
        and key not in _GIVEN
        and parameter.default is not parameter.empty
        if isinstance(parameter.default, bool | int | float | str | list | tuple | type(None))
    }
    if found.kind != "online" or found.make is GDumb:
        return own
    shared = inspect.signature(OnlineLearner).parameters
    return {**{key: shared[key].default for key in _ONLINE}, **own}


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What a learner needs beside its settings.

    Args:
        num_classes: Classes of the stream.
        per_class: Exemplars of each class.
        capacity: Exemplars in all, instead.
        policy: Which samples are exemplars, as of `POLICIES`.
        augment: How a network's training images are changed, as of `AUGMENTATIONS`.
        size: Side of a network's images [pixels]; None for its own.
        plugin: Method and settings of the plugins that are made; None for FacT's defaults.
        seed: Seed of everything random.
    """

    num_classes: int
    per_class: int | None = 20
    capacity: int | None = None
    policy: str = "class-balanced"
    augment: str = "none"
    size: int | None = None
    plugin: tuple[str, Mapping[str, Any]] | None = None
    seed: int = 0

    def exemplars(self) -> Exemplars:
        """Returns an empty store.

        Raises:
            FitError: There is no such policy, or it has no such bound.
        """
        if self.policy not in POLICIES:
            raise FitError(f"exemplars are kept by {', '.join(POLICIES)}, got {self.policy!r}")
        if self.policy == "reservoir":
            capacity = self.capacity or (self.per_class or 0) * self.num_classes
            return Reservoir(capacity, seed=self.seed)
        bound = {"capacity": self.capacity} if self.capacity is not None else {"per_class": self.per_class}
        kind: Callable[..., Exemplars] = POLICIES[self.policy]
        return kind(**bound, seed=self.seed)


def made(name: str, base: nn.Module, rest: Rest, settings: Mapping[str, Any]) -> Learner:
    """Returns a fresh learner.

    Args:
        name: Which one.
        base: What it stands on: an adapted model for a head, a network for the others; never written to.
        rest: What else it needs.
        settings: Its settings, as of `settings_of`.

    Raises:
        FitError: There is no such learner, or a setting is out of range.
        BackboneError: It cannot stand on this network.
    """
    if offer(name).kind != "head":
        return on_network(name, base, input_of(base, rest.size), rest, settings)
    assert isinstance(base, Adapted)
    return on_features(name, base, rest, settings)


def on_features(name: str, model: Adapted, rest: Rest, settings: Mapping[str, Any]) -> HeadLearner:
    """Returns a head behind a frozen model.

    Args:
        name: A learner of the kind `head`.
        model: What gives the features.
        rest: What else it needs.
        settings: Settings of the head.
    """
    found = offer(name)
    stores = {"exemplars": rest.exemplars()} if found.has_exemplars else {}
    seeded = {"seed": rest.seed} if "seed" in inspect.signature(found.make).parameters else {}
    return HeadLearner(found.make(**stores, **seeded, **settings), extract=Extractor(model))


def on_network(name: str, network: nn.Module, transform: Transform, rest: Rest, settings: Mapping[str, Any]) -> Learner:
    """Returns a learner that trains a copy of a network, or plugins over it.

    Args:
        name: A learner of the kind `online` or `tuned`.
        network: A model of images; never written to. Its classifier is left out.
        transform: How images become its input.
        rest: What else it needs.
        settings: Settings of the learner.

    Raises:
        BackboneError: The network has a classifier that cannot be left out.
    """
    found = offer(name)
    if name == "plugins":
        method, own = rest.plugin or ("fact", {})
        learner: Learner = found.make(network, method=method, settings=own, seed=rest.seed, **settings)
        return learner
    if found.kind == "tuned":
        learner = found.make(
            network, prepare=transform.normalize, input_size=transform.input_size, seed=rest.seed, **settings
        )
        return learner
    if rest.augment not in AUGMENTATIONS:
        raise FitError(f"images are augmented by {', '.join(AUGMENTATIONS)}, got {rest.augment!r}")
    augment = AUGMENTATIONS[rest.augment]
    shared: dict[str, Any] = {
        "augment": None if augment is None else augment(),
        "normalize": transform.normalize,
        "seed": rest.seed,
    }
    if "num_classes" in inspect.signature(found.make).parameters:
        shared["num_classes"] = rest.num_classes
    learner = found.make(headless(network), rest.exemplars(), **shared, **settings)
    return learner


def headless(network: nn.Module) -> nn.Module:
    """Returns a copy of a timm model that gives features.

    Raises:
        BackboneError: It is no such model.
    """
    network = copy.deepcopy(network)
    if getattr(network, "num_classes", None) == 0:
        return network
    reset: Any = getattr(network, "reset_classifier", None)
    if reset is None:
        raise BackboneError(
            f"{type(network).__name__} has no classifier that could be left out: give a timm model, or one of features"
        )
    reset(0)
    return network


def input_of(network: nn.Module, size: int | None = None) -> Transform:
    """Returns how images become the input of a timm model.

    Args:
        network: The model.
        size: Side of an image [pixels]; None for the model's own.

    Raises:
        BackboneError: The model takes no other size than its own.
    """
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(network)
    own = config["input_size"][-1]
    if size is not None and size != own:
        if getattr(network, "patch_embed", None) is not None:
            raise BackboneError(f"{type(network).__name__} takes images of {own} pixels only: leave size={size} away")
        config["input_size"] = (3, size, size)
    return Transform(config)
