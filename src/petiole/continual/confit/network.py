"""A network of one's own that is tuned, with a linear head for each experience."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.prove import eval_mode
from ...core.twin import twin
from ...errors import BackboneError, FitError
from ...plugins.layernorm import LayerNorm


class TaskNetwork(nn.Module):
    """A copy of a network, and a linear head for each experience on its features.

    A network that ends in a linear map loses it: the map whose output is the network's own is taken for its
    classifier. It is found in a forward pass, by the tensor.

    Parameters: those of the network without its classifier, and (d + 1) * classes an experience.

    Args:
        network: A model from inputs to features or logits, one row a sample; copied, and never written to.
        example: Inputs `[B, ...]` that it takes.

    Raises:
        BackboneError: It cannot be copied, or does not give one row a sample.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.body = _headless(twin(network, lambda name, owner: True), example)
        features = _answer(self.body, example)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(example):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise BackboneError(
                f"{type(network).__name__} must give features [B, d], it gives {found} for {len(example)} inputs: let "
                "it pool, e.g. timm.create_model(name, num_classes=0)"
            )
        self.d = features.shape[1]
        is_norm = LayerNorm().trains
        owned = [(owner, *item) for owner in self.body.modules() for item in owner.named_parameters(recurse=False)]
        self._body_parameters = [(p, is_norm(name, owner)) for owner, name, p in owned]
        self.heads = nn.ModuleList()
        self.classes: list[tuple[int, ...]] = []

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.body.parameters()).device

    def features(self, x: Tensor) -> Tensor:
        """Returns features `[B, d]`."""
        return self.body(x)

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Returns the logits of one experience's classes `[B, C]`."""
        return self.heads[index](self.features(x))

    def grow(self, classes: Sequence[int]) -> None:
        """Adds a head for the classes of an experience, all zeros."""
        like = next(self.body.parameters())
        head = nn.Linear(self.d, len(classes), device=like.device, dtype=like.dtype)
        for p in head.parameters():
            nn.init.zeros_(p)
        self.heads.append(head)
        self.classes.append(tuple(classes))

    def set_trained(self, *, norms: bool, everything: bool) -> None:
        """Says what trains beside the heads: gains and shifts of all norms, known by their modules, or everything."""
        for p, is_norm in self._body_parameters:
            p.requires_grad_(everything or (norms and is_norm))

    def index_of(self, among: Sequence[int] | None) -> int | None:
        """Returns the latest experience that has all these classes; None where no experience has any of them.

        Raises:
            FitError: They belong to several experiences, or not all of them are known.
        """
        wanted = {c for classes in self.classes for c in classes} if among is None else set(among)
        for index in reversed(range(len(self.classes))):
            if wanted <= set(self.classes[index]):
                return index
        if not any(wanted & set(classes) for classes in self.classes):
            return None
        raise FitError(
            f"{len(wanted)} classes are in question, and no single experience has them all: heads of different "
            "experiences cannot be compared, so each sample must come with its experience's classes; "
            "run(..., is_task_known=True) does that"
        )

    def snapshot(self) -> dict[str, Any]:
        """Returns all tensors and the classes of each head."""
        return {
            "classes": [list(classes) for classes in self.classes],
            "tensors": {name: tensor.detach().clone() for name, tensor in self.state_dict().items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `snapshot` returned."""
        self.heads, self.classes = nn.ModuleList(), []
        for classes in state["classes"]:
            self.grow(classes)
        self.load_state_dict(state["tensors"])


@torch.no_grad()
def _answer(network: nn.Module, x: Tensor) -> Any:
    with eval_mode(network):
        return network(x)


def _headless(network: nn.Module, example: Tensor) -> nn.Module:
    """Returns a network of one's own without the linear map that gives its output, if there is one."""
    answers: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda module, args, y: answers.update({name: y})

    linear = [(name, module) for name, module in network.named_modules() if name and isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(note(name)) for name, module in linear]
    try:
        output = _answer(network, example)
    finally:
        for hook in hooks:
            hook.remove()
    for name in (name for name, y in answers.items() if y is output):
        network.set_submodule(name, nn.Identity())
    return network
