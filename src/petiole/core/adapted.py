"""A frozen backbone with plugins and a head."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError, PluginError
from ..nn.weights import FULL, QuantisedLinear, check_bits, quantised
from .fingerprint import digest
from .plugin import Delta, Plugin, Reducer, Tuning
from .site import Site, Slot
from .taps import Taps
from .twin import twin
from .view import View


class Adapted(nn.Module):
    """A frozen backbone, plugins at its sites, and a head.

    The model walks a twin of the backbone that shares its weights: the backbone itself is never written to, and its
    flags, mode and buffers never change. Starts in the backbone's mode, train or eval.

    Args:
        backbone: The user's pretrained model.
        view: How it is walked.
        plugins: What sits at its sites; attached here.
        classes: Class names of a new linear head, which starts with PyTorch's default initialisation; None keeps the
            backbone's own classifier, frozen.
        seed: Seed of every random initial value.
        head_bits: Bits per weight of the new head, 1 to 8, then without a bias; 32 for an ordinary one.

    Raises:
        BackboneError: The view does not find a part of the backbone.
        PluginError: A plugin fits no site or finds nothing to train, or belongs to another model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View,
        plugins: Sequence[Plugin],
        classes: Sequence[str] | None = None,
        seed: int = 0,
        head_bits: int = FULL,
    ) -> None:
        super().__init__()
        if classes is not None and (len(classes) < 2 or len(set(classes)) != len(classes)):
            raise PluginError(f"a head needs at least two different classes, got {list(classes)}")
        _check_company(plugins)
        view.check(backbone)
        generator = torch.Generator().manual_seed(seed)
        sites = view.sites(backbone)
        for plugin in plugins:
            plugin.attach(sites, generator)
        tunings = [plugin for plugin in plugins if isinstance(plugin, Tuning)]
        # what the forward never reaches would get no gradient: a new head takes the classifier's place
        idle = (*view.unused(backbone), *(() if classes is None else view.classifiers(backbone)))
        unused = tuple(f"{name}." for name in idle)
        like = next(backbone.parameters())
        self.view = view
        found: set[Tuning] = set()

        def trains(name: str, owner: nn.Module) -> bool:
            asking = [t for t in tunings if not f"{name}.".startswith(unused) and t.trains(name, owner)]
            found.update(asking)
            return bool(asking)

        self.backbone = twin(backbone, trains)
        for tuning in tunings:
            if tuning not in found:
                raise PluginError(f"{type(tuning).__name__} finds nothing to train in this {type(backbone).__name__}")
        self.plugins = nn.ModuleList(plugins).to(like.device, like.dtype)
        self.classes = None if classes is None else tuple(classes)
        self.head: nn.Linear | QuantisedLinear | None = None
        if classes is not None:
            self.head = _head(view.num_features(backbone), len(classes), check_bits(head_bits), generator).to(like)
        self.input_config: dict[str, Any] = view.input_config(backbone)
        # what the twin holds as copies may change: these digests still say which backbone it was made from
        inside = self.backbone.state_dict(keep_vars=True)
        shared = {n for n, t in inside.items() if isinstance(t, nn.Parameter) and not t.requires_grad}
        self.origin = {name: digest(t) for name, t in view.frozen_weights(backbone) if name not in shared}
        self.taps = Taps(plugins)
        self.train(backbone.training)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits `[B, C]` for images `[B, 3, H, W]`."""
        tokens, flow = self.view.run(self.backbone, images, self.taps)
        if self.head is None:
            return self.view.classify(self.backbone, tokens, flow)
        return self.head(self.view.pool(self.backbone, tokens, flow))

    def forward_features(self, images: Tensor) -> Tensor:
        """Returns what the head sees `[B, num_features]` for images `[B, 3, H, W]`."""
        tokens, flow = self.view.run(self.backbone, images, self.taps)
        return self.view.pool(self.backbone, tokens, flow)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields name and parameter of everything that is trained: plugins, head, tuned backbone tensors."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    @property
    def head_bits(self) -> int:
        """Bits per weight of the head; 32 where it is an ordinary one, or the backbone's own classifier answers."""
        return self.head.bits if isinstance(self.head, QuantisedLinear) else FULL

    @property
    def holds_codes(self) -> bool:
        """Whether quantised tensors came from codes and hold their mean and deviation."""
        return any(weights.statistics is not None for _, weights in quantised(self))

    def release(self) -> None:
        """Lets training move the mean and deviation of quantised tensors that came from codes.

        They start from values that give the same codes, mean and deviation: the latent weights were not kept.
        """
        for _, weights in quantised(self):
            weights.release()

    def set_drop_path(self, rate: float) -> None:
        """Sets stochastic depth in the twin, growing linearly from 0 in the first block to `rate`.

        Raises:
            BackboneError: The family has no stochastic depth.
        """
        self.view.set_drop_path(self.backbone, rate)
        fresh = {site.name: site for site in self.view.sites(self.backbone)}
        for plugin in self.taps.plugins:
            plugin.sites = tuple(fresh[site.name] for site in plugin.sites)
        self.taps = Taps(self.taps.plugins, self.taps.is_checkpointed)

    def set_checkpointing(self, is_on: bool) -> None:
        """Sets whether each block is computed again in the backward pass, which keeps only its input in memory."""
        self.taps = Taps(self.taps.plugins, is_on)

    def frozen(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Returns the weight `[d_out, ...]` and the bias `[d_out]` behind a linear or affine site, before plugins."""
        assert site.weight is not None
        weight = _rows(self.backbone, site.weight)
        return weight, None if site.bias is None else _rows(self.backbone, site.bias)

    def task_state(self) -> dict[str, Tensor]:
        """Returns what belongs to the task and not to the backbone: trained parameters and the plugins' buffers."""
        state = self.state_dict()
        own = {name for name, _ in self.trained()}
        return {name: t for name, t in state.items() if name in own or name.startswith(("plugins.", "head."))}

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Returns an ordinary model of the backbone's own class with the plugins folded in and the head in place.

        A copy with its own memory and every parameter trainable, in eval mode: no plugin, no overhead.

        Raises:
            MergeError: A plugin is not linear, or the backbone's class has no classifier for the head.
        """
        for plugin in self.taps.plugins:
            if plugin.sites and not isinstance(plugin, Delta):
                raise MergeError(
                    f"{type(plugin).__name__} cannot be merged: it is not a linear change of the backbone's weights. "
                    "Keep it as a plugin, or choose a method that merges (LoRA, FacT)"
                )
        plain = copy.deepcopy(self.backbone)
        tensors = dict(plain.named_parameters())
        for plugin in self.taps.plugins:
            if isinstance(plugin, Delta):
                for site in plugin.sites:
                    changes = plugin.change(site, *self.frozen(site))
                    for slot, change in zip((site.weight, site.bias), changes, strict=True):
                        _fold(tensors, site, slot, change)
        if self.head is not None:
            self.view.set_head(plain, self.head.dense() if isinstance(self.head, QuantisedLinear) else self.head)
        return plain.requires_grad_(True).eval()

    def __repr__(self) -> str:
        name = type(self.backbone).__name__
        inside = ", ".join(f"{type(p).__name__}({_arguments(p)})" for p in self.taps.plugins)
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"Adapted({name}, {inside or 'no plugin'}{classes})"


def _arguments(plugin: Plugin) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in plugin.settings().items())


def _check_company(plugins: Sequence[Plugin]) -> None:
    reducers = [type(plugin).__name__ for plugin in plugins if isinstance(plugin, Reducer)]
    bound = [type(plugin).__name__ for plugin in plugins if plugin.needs_grid]
    if reducers and bound:
        raise PluginError(
            f"{bound[0]} needs the whole patch grid, which {reducers[0]} takes apart: use one without the other"
        )


def _head(num_features: int, num_classes: int, bits: int, generator: torch.Generator) -> nn.Linear | QuantisedLinear:
    head = nn.Linear(num_features, num_classes)
    bound = num_features**-0.5
    with torch.no_grad():
        head.weight.uniform_(-bound, bound, generator=generator)
        if bits != FULL:
            return QuantisedLinear(head.weight.detach(), bits)
        head.bias.uniform_(-bound, bound, generator=generator)
    return head


def _rows(model: nn.Module, slot: Slot) -> Tensor:
    return model.get_parameter(slot.name).detach()[slot.start : slot.stop]


def _fold(tensors: dict[str, nn.Parameter], site: Site, slot: Slot | None, change: Tensor | None) -> None:
    if change is None:
        return
    if slot is None:
        raise MergeError(f"{site.name} has no bias in the backbone to fold a bias change into")
    rows = tensors[slot.name][slot.start : slot.stop]
    # added in at least fp32 and rounded once, so that a half-precision backbone loses no more than its own precision
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows.copy_((rows.to(wide) + change.to(wide)).to(rows.dtype))
