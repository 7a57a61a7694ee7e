"""What a plugin is, and the roles it can play."""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import PluginError
from ..nn.schedule import Budget, schedule
from .attended import Attended
from .flow import Flow
from .here import Here
from .site import Site

# deeper than any backbone
MAX_DEPTH = 1000


class Plugin(nn.Module, ABC):
    """Small trainable tensors for some sites of one backbone.

    A plugin is made in two steps. The constructor takes keyword settings and keeps each under its own name, so that
    settings can be written to a file and read back. `attach` then meets the sites of a backbone and creates the
    tensors. One plugin object serves one model.
    """

    method: ClassVar[str]
    needs_grid: ClassVar[bool] = False
    """Whether it works on the whole patch grid, so that no token may be merged or dropped before it."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: tuple[Site, ...] = ()
        self.is_attached = False

    def settings(self) -> dict[str, Any]:
        """The constructor's keyword arguments that make an equal plugin."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def attach(self, sites: Sequence[Site], generator: torch.Generator | None = None) -> None:
        """Chooses among a backbone's sites and creates the plugin's tensors for them.

        Args:
            sites: Every site of the backbone, in the order of the walk.
            generator: Source of the random initial values.

        Raises:
            PluginError: The plugin already belongs to a model, finds no site it can use, or was taken from a model
                with other sites.
        """
        name = type(self).__name__
        if self.is_attached:
            raise PluginError(f"this {name} already belongs to a model: make a new one for each model, or take a copy")
        taken, self.sites = self.sites, tuple(self.select(sites))
        if not taken:
            self.build(generator)
        elif found := _difference(taken, self.sites):
            raise PluginError(f"this {name} was taken from a model with other sites: {found}")
        self.is_attached = True

    def taken(self) -> Self:
        """Returns a copy with the same tensors, free to join another model with equal sites."""
        other = copy.deepcopy(self)
        other.is_attached = False
        return other

    @abstractmethod
    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Returns the sites the plugin uses.

        Raises:
            PluginError: None of them fits; says what was looked for.
        """

    @abstractmethod
    def build(self, generator: torch.Generator | None) -> None:
        """Creates parameters and buffers for `self.sites`."""


def _difference(taken: Sequence[Site], found: Sequence[Site]) -> str:
    """Returns where the sites of two backbones part, in words; nothing where tensors of one fit the other."""
    for had, has in zip_longest(taken, found):
        ours, theirs = (None if s is None else (s.name, s.d_in, s.d_out) for s in (had, has))
        if ours != theirs:
            return " and ".join("none" if s is None else f"{s[0]} ({s[1]} to {s[2]})" for s in (ours, theirs))
    return ""


class Bypass(Plugin):
    """A plugin that computes something beside a frozen part and adds it to that part's output.

    Shapes are always `[B, N, d]` with the true batch first, also inside windows. The maths is written so that every
    parameter may carry one leading axis of length B: rows of a batch can then use different plugins.
    """

    adds_to_some: ClassVar[bool] = False
    """Whether `add_onto` also takes an output in which other sites have columns."""

    @abstractmethod
    def add(self, site: Site, x: Tensor, here: Here) -> Tensor:
        """Returns what is added at one site.

        Args:
            site: One of `self.sites`.
            x: What the frozen part sees `[B, N, d_in]`; at an affine site what it gives.
            here: What else is at hand.

        Returns:
            The addition `[B, N, d_out]`.
        """

    def add_group(self, sites: Sequence[Site], x: Tensor, here: Here) -> Tensor | Sequence[Tensor]:
        """Returns `add` for linear sites that share one input; override to compute once what they share.

        One tensor `[B, N, d_out]` per site, or all side by side in one.
        """
        return [self.add(site, x, here.only(i)) for i, site in enumerate(sites)]

    def add_onto(self, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        """Returns `y` with the additions of `add_group` side by side; override to save the temporary.

        Args:
            sites: All the sites behind `y`, in order; some of them if the plugin `adds_to_some`.
            x: Their shared input `[B, N, d_in]`.
            y: Fresh output of the frozen map, `[B, N, sum of d_out]`, which no other plugin adds to; may be written
                into.
            here: What else is at hand, also where each site's columns begin.
        """
        additions = self.add_group(sites, x, here)
        return y + (additions if isinstance(additions, Tensor) else torch.cat(list(additions), dim=-1))


class Delta(Bypass):
    """A bypass that is linear in `x`, so that it can be folded into the frozen weight."""

    @abstractmethod
    def add_group(self, sites: Sequence[Site], x: Tensor, here: Here) -> Tensor | Sequence[Tensor]:
        """Returns what is added at linear sites that share one input: one tensor a site, or all side by side."""

    def add(self, site: Site, x: Tensor, here: Here) -> Tensor:
        addition = self.add_group([site], x, here)
        return addition if isinstance(addition, Tensor) else addition[0]

    @abstractmethod
    def change(self, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the change of weight and bias that `add` amounts to in eval mode, None for an unchanged bias.

        Args:
            site: One of `self.sites`.
            weight: The frozen weight there, `[d_out, d_in]` at a linear site, `[d_out, ...]` at an affine one.
            bias: The frozen bias `[d_out]`, None where the map has none.
        """


class Reducer(Plugin):
    """A plugin that shortens the token sequence between attention and MLP. Its setting is a token budget."""

    is_pruning: ClassVar[bool] = False
    """Whether tokens go by what they are worth rather than by which others they resemble."""

    def __init__(self, budget: Budget = 0) -> None:
        super().__init__()
        # what is no budget is refused at once, before the depth is known
        schedule(budget, len(budget) if isinstance(budget, list) else MAX_DEPTH)
        self.budget = budget

    def build(self, generator: torch.Generator | None) -> None:
        """Creates no tensors, and reads the budget."""
        self.set_budget(self.budget)

    def set_budget(self, budget: Budget) -> None:
        """Changes how many tokens each block removes, from the next pass on.

        Raises:
            PluginError: The budget is none, or longer than the depth.
        """
        requests = schedule(budget, len(self.sites))
        self.budget = budget
        self.requests = {site.name: request for site, request in zip(self.sites, requests, strict=True)}

    @abstractmethod
    def reduce(self, site: Site, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        """Returns fewer tokens and what is now true of them.

        Args:
            site: A tokens site.
            x: Residual stream after attention `[B, N, d]`.
            attended: The attention's queries and keys, of the same tokens.
            flow: Facts about the tokens.
        """


class Prompter(Plugin):
    """A plugin that puts prompts, trained tokens, behind the prefix tokens; the walk takes them out at its end."""

    @abstractmethod
    def enter(self, site: Site, x: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
        """Returns the sequence with fresh prompts in place of the earlier ones, and what is now true of it.

        Args:
            site: An input site.
            x: Residual stream at the input of a block `[B, N, d]`; the last `flow.num_prompts` of its prefix tokens
                are prompts.
            flow: Facts about the tokens.
        """


class Tuning(Plugin):
    """A method that trains tensors of the backbone itself.

    The adapted model then walks a twin of the backbone in which the chosen tensors are copies and all others are
    shared; the user's backbone stays as it is.
    """

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Uses no sites."""
        return ()

    def build(self, generator: torch.Generator | None) -> None:
        """Creates nothing: the tensors live in the twin."""

    @abstractmethod
    def trains(self, name: str, owner: nn.Module) -> bool:
        """Whether the backbone parameter `name`, held by the module `owner`, is trained."""
