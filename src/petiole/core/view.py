"""How one family of backbones is walked."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .flow import Flow
from .site import Site
from .taps import Taps


class View(ABC):
    """Knows how one family of backbones is put together; the only place that knows the family's names.

    Stateless: every method takes the model. A view calls the model's own sub-modules and re-states only how they are
    joined, so that it can call out at each site. `prove_view` checks it against the model, bit for bit.
    """

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Looks for every part the walk needs.

        Raises:
            BackboneError: A part is missing or wired otherwise; says what was looked for and what was found.
        """

    @abstractmethod
    def sites(self, model: nn.Module) -> Sequence[Site]:
        """Returns every site, in the order of the walk."""

    @abstractmethod
    def run(self, model: nn.Module, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        """Walks the model from images `[B, 3, H, W]` to final tokens `[B, N, d]`, calling out at each site.

        Equals the model's own features bit for bit when `taps` is empty.
        """

    @abstractmethod
    def pool(self, model: nn.Module, tokens: Tensor, flow: Flow) -> Tensor:
        """Returns what the classifier sees `[B, num_features]`."""

    @abstractmethod
    def classify(self, model: nn.Module, tokens: Tensor, flow: Flow) -> Tensor:
        """Returns the model's own answer for final tokens: logits, or features where it has no classifier."""

    @abstractmethod
    def answer(self, model: nn.Module, images: Tensor) -> Tensor:
        """Returns the model's own answer for images by its own forward: the oracle of the proof."""

    @abstractmethod
    def num_features(self, model: nn.Module) -> int:
        """Returns the width of what the classifier sees."""

    @abstractmethod
    def classifiers(self, model: nn.Module) -> Sequence[str]:
        """Returns the names of the classifier modules, empty where the model has none."""

    def unused(self, model: nn.Module) -> Sequence[str]:
        """Returns the names of parameters and modules that the model's own forward never reaches, e.g. mask tokens."""
        return ()

    @abstractmethod
    def set_head(self, model: nn.Module, head: nn.Linear) -> None:
        """Writes a head into a plain copy of the model, in place of its classifier.

        Raises:
            MergeError: The model's class has no classifier.
        """

    @abstractmethod
    def set_drop_path(self, model: nn.Module, rate: float) -> None:
        """Sets stochastic depth in an adapted model's twin, growing linearly from 0 in the first block to `rate`."""

    @abstractmethod
    def input_config(self, model: nn.Module) -> dict[str, Any]:
        """Returns how images become input: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`."""

    @abstractmethod
    def identify(self, model: nn.Module) -> dict[str, str]:
        """Returns the model's `name` and `tag` as its library knows them; the tag is empty where there is none."""

    def probe(self, model: nn.Module, num_images: int = 2) -> Tensor:
        """Returns fixed random images `[num_images, 3, H, W]` for proofs and checks, on the model's device."""
        parameter = next(model.parameters())
        size = self.input_config(model)["input_size"]
        images = torch.randn(num_images, *size, generator=torch.Generator().manual_seed(0))
        return images.to(parameter.device, parameter.dtype)

    def frozen_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yields the state dict in order of name, without the classifiers: what identifies the backbone."""
        heads = tuple(f"{name}." for name in self.classifiers(model))
        for name, tensor in sorted(model.state_dict().items()):
            if not name.startswith(heads):
                yield name, tensor
