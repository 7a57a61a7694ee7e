"""Proof that a language model's feed-forward layers are where its view says."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.language import IMAGE, LanguageView, Recaller, join
from ..core.site import Site
from ..core.twin import twin
from ..errors import ProofError
from ..nn.memory import Activation, Memory


def prove_language_view(view: LanguageView, language_model: nn.Module) -> None:
    """Checks on a few tokens, in eval mode, that a plugin which adds nothing changes nothing and is felt everywhere.

    Raises:
        ProofError: The model answers otherwise, never calls a feed-forward layer or does not feel what is added there;
            names the layer.
    """
    tokens = view.probe(language_model)
    plain, joined = (twin(language_model).eval() for _ in range(2))
    probe, nothing = _Probe(), torch.zeros(1, 1, 1)
    probe.attach(view.sites(language_model, 1))
    with torch.enable_grad(), join(view.feed_forwards(joined), probe).bind(Memory(nothing, nothing)):
        logits = joined(**tokens).logits
    with torch.no_grad():
        if not torch.equal(plain(**tokens).logits, logits):
            raise ProofError(f"{type(language_model).__name__} answers otherwise where a plugin adds nothing")
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    probes = list(probe.added.values())
    grads = torch.autograd.grad((logits * weights).sum(), probes, allow_unused=True) if probes else ()
    felt = {name for name, grad in zip(probe.added, grads, strict=True) if grad is not None and grad.any()}
    for site in probe.sites:
        if site.name not in felt:
            fault = "does not feel what is added at" if site.name in probe.added else "never calls"
            raise ProofError(f"{type(language_model).__name__} {fault} {site.name}: it would read no image there")


class _Probe(Recaller):
    """Adds a zero leaf at every site, to see whether its gradient comes back."""

    method = "probe"

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [site for site in sites if site.name != IMAGE]

    def build(self, generator: torch.Generator | None) -> None:
        self.added: dict[str, Tensor] = {}

    def memory(self, features: Tensor, indicator: Tensor) -> Memory:
        return Memory(features, features)

    def recall(self, site: Site, x: Tensor, memory: Memory, activation: Activation) -> Tensor:
        self.added[site.name] = torch.zeros_like(x, requires_grad=True)
        return self.added[site.name]
