"""Language models: where their feed-forward layers are, and how a plugin joins them.

A language model keeps its own loop, with its cache and its `generate`, so nothing walks it. Here, and only here, a
plugin reaches a twin's modules by hooks. They are bound methods, so that a deep copy of the twin calls the copy of the
plugin. The memory of a pass goes this way:

    Binding.bind ── layer's keyword arguments ── attention takes them off ── entry: x ── exit: y + recall(x, memory)
                    └──────────────────── computed again as one under checkpointing ───────────────────────────┘

Transformers checkpoints a layer's `forward`, with the keyword arguments of the first time: what the backward pass
computes again reads the memory of its own forward pass, whichever ran in between.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import local
from typing import Any

from torch import Tensor, nn

from ..errors import BackboneError, PluginError
from ..nn.memory import Activation, Memory
from .plugin import Plugin
from .site import Site

IMAGE = "image.input"
_KEY = "petiole_memory"
# the joined model whose pass is on and its memory, per thread and task: passes side by side do not meet
_BOUND: ContextVar[tuple["Binding", Memory] | None] = ContextVar("_BOUND", default=None)


class _Here(local):
    """Within a layer that is running, per thread: its memory, then also what its feed-forward part sees.

    Not a context variable: setting one would break a compiled pass into pieces.
    """

    memory: Memory | None = None
    x: Tensor | None = None


_HERE = _Here()


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of one layer, and the modules by which it is reached.

    Args:
        site: Its branch site, e.g. `layers.3.mlp`.
        layer: What the model's own loop calls.
        handed: Modules inside to which the layer hands its keyword arguments, called before the feed-forward part.
        entry: Its input is what the feed-forward part sees.
        exit: Its output is what the plugin adds to.
        activation: The feed-forward part's own.
    """

    site: Site
    layer: nn.Module
    handed: tuple[nn.Module, ...]
    entry: nn.Module
    exit: nn.Module
    activation: Activation


class LanguageView(ABC):
    """Knows where a family of language models keeps its feed-forward parts; the only place that knows their names."""

    @abstractmethod
    def feed_forwards(self, model: nn.Module) -> Sequence[FeedForward]:
        """Returns the feed-forward part of every layer, in the order of the model's loop.

        Raises:
            BackboneError: A part is missing; says what was looked for and what was found.
        """

    @abstractmethod
    def probe(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns a few tokens as the model's keyword arguments, for proofs, on its device."""

    def sites(self, model: nn.Module, d_image: int) -> list[Site]:
        """Returns the site where image features of a width enter, then those of the feed-forward parts."""
        layers = [part.site for part in self.feed_forwards(model)]
        return [Site(IMAGE, "input", 0, layers[0].width, d_image, layers[0].width), *layers]


class Recaller(Plugin):
    """A plugin that adds beside every feed-forward part of a language model what a memory answers."""

    @abstractmethod
    def memory(self, features: Tensor, indicator: Tensor) -> Memory:
        """Returns the memory of a pass, which all layers and all steps of a generation share.

        Args:
            features: Image features `[B, n, d_image]`, those of several images side by side.
            indicator: 1 where there is an image and 0 where there is none `[B]`, or `[B, I]` for I images.

        Raises:
            PluginError: There are more features than the memory holds.
        """

    @abstractmethod
    def recall(self, site: Site, x: Tensor, memory: Memory, activation: Activation) -> Tensor:
        """Returns what is added at one site `[B * k, L, d]`.

        Args:
            site: The feed-forward part.
            x: What it sees `[B * k, L, d]`, with k rows a sample side by side.
            memory: The memory of this pass, of B samples, or of one for all.
            activation: The feed-forward part's own.
        """


class Binding:
    """A joined language model's name for the memory of its pass: no other model reads it, no other thread."""

    @contextmanager
    def bind(self, memory: Memory) -> Iterator[None]:
        """Gives the model's layers a memory while a pass runs."""
        token = _BOUND.set((self, memory))
        try:
            yield
        finally:
            _BOUND.reset(token)
            _HERE.memory = _HERE.x = None

    def memory(self) -> Memory:
        """Returns the memory of the pass that is on.

        Raises:
            PluginError: No pass of this model is on.
        """
        bound = _BOUND.get()
        if bound is None or bound[0] is not self:
            raise PluginError(
                "the language model has no memory to read: call the model with eyes (`model(...)`, "
                "`model.generate(...)`), not the language model inside it"
            )
        return bound[1]


class _Junction:
    """The hooks at one feed-forward part."""

    def __init__(self, part: FeedForward, plugin: Recaller, binding: Binding) -> None:
        self.site, self.activation, self.plugin, self.binding = part.site, part.activation, plugin, binding
        part.layer.register_forward_pre_hook(self.bind, with_kwargs=True)
        for module in part.handed:
            module.register_forward_pre_hook(self.take, with_kwargs=True)
        part.entry.register_forward_pre_hook(self.see)
        part.exit.register_forward_hook(self.add)

    def bind(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Makes the memory an argument of the layer: checkpointing keeps it for the second time."""
        _refuse_reentrant(layer)
        return args, {**kwargs, _KEY: self.binding.memory()}

    def take(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Takes the memory off the arguments that the layer hands on."""
        rest = dict(kwargs)
        _HERE.memory = rest.pop(_KEY)
        return args, rest

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keeps what the feed-forward part sees until it has answered."""
        _HERE.x = args[0]

    def add(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        """Returns the feed-forward part's answer with what the plugin adds."""
        memory, x = _HERE.memory, _HERE.x
        # first of all: what is computed again may stop anywhere below, and nothing may be left behind
        _HERE.memory = _HERE.x = None
        assert memory is not None
        assert x is not None
        return y + self.plugin.recall(self.site, x, memory, self.activation).to(y.dtype)


def join(parts: Sequence[FeedForward], plugin: Recaller) -> Binding:
    """Hangs a plugin on the feed-forward parts of a twin, and returns what binds the memory of a pass."""
    binding = Binding()
    for part in parts:
        _Junction(part, plugin, binding)
    return binding


def _refuse_reentrant(layer: nn.Module) -> None:
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return
    settings = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    if settings.get("use_reentrant") is not False:
        raise BackboneError(
            "the language model's gradient checkpointing is reentrant, which would lose the memory's gradient: "
            "switch it on by `set_checkpointing(True)`, or with use_reentrant=False"
        )
