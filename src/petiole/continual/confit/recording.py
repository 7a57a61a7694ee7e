"""One clean pass that looks at what batch norms, and the convolutions in front of them, are given."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.prove import eval_mode
from ...errors import FitError
from .pairing import Call, Pairing, watch


@torch.no_grad()
def look(
    network: nn.Module, pairing: Pairing, batches: Iterable[Tensor], *, has_squares: bool
) -> dict[str, dict[str, Tensor]]:
    """Returns what each batch norm is given, by its name: averages over batches, samples counting alike.

    `mean` and `variance` `[C]` are those of its input; `before` and `squares` `[C_in, *size]` the mean over samples of
    the input of the map in front, and of its square. Batch norms normalise with the statistics of each batch, as in
    training; everything else is in eval mode. The network stays bit for bit as it was.

    Args:
        network: The network.
        pairing: Which map stands in front of which batch norm.
        batches: Inputs `[B, ...]`, at least two samples each.
        has_squares: Whether `squares` are wanted.

    Raises:
        FitError: There is no batch, one is too small or of another size, or pairs are no longer pairs.
    """
    averages = {norm: _Average(norm) for norm in pairing.norms}

    def seen(norm: str, x: Tensor, call: Call | None) -> None:
        values = _moments(x)
        if norm in pairing.pairs:
            if call is None or call.name != pairing.pairs[norm]:
                raise FitError(f"{norm} no longer takes the output of {pairing.pairs[norm]}: find the pairs anew")
            before = _at_least_float(call.x)
            values["before"] = before.mean(0)
            if has_squares:
                values["squares"] = before.square().mean(0)
        averages[norm].add(len(x), values)

    norms = [network.get_submodule(norm) for norm in pairing.norms]
    with eval_mode(network), unchanged(norms), watch(network, seen):
        for module in norms:
            module.train()
        for x in batches:
            if len(x) < 2:
                raise FitError(f"batch statistics need batches of at least 2 samples, got one of {len(x)}")
            network(x)
    return {norm: average.means() for norm, average in averages.items()}


@contextmanager
def unchanged(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts parameters and buffers of modules back, bit for bit, also after an exception."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    kept = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


def _moments(x: Tensor) -> dict[str, Tensor]:
    """Returns mean and unbiased variance of each channel of `[B, C, ...]`."""
    variance, mean = torch.var_mean(_at_least_float(x).transpose(0, 1).flatten(1), 1)
    return {"mean": mean, "variance": variance}


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Average:
    """Means of tensors over batches, weighted by their samples."""

    def __init__(self, norm: str) -> None:
        self.norm, self.count = norm, 0
        self.sums: dict[str, Tensor] = {}

    def add(self, count: int, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            before: Any = self.sums.get(name)
            if before is not None and before.shape != value.shape:
                raise FitError(
                    f"inputs of one recording have one size: before {self.norm}, {list(value.shape)} follows "
                    f"{list(before.shape)}"
                )
            self.sums[name] = count * value if before is None else before + count * value
        self.count += count

    def means(self) -> dict[str, Tensor]:
        if not self.count:
            raise FitError(f"no batch came by {self.norm}: give a recording at least one")
        return {name: total / self.count for name, total in self.sums.items()}
