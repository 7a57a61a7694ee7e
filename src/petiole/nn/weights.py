"""The tensors a plugin trains, as they are or through few bits."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PluginError
from .codebook import levels
from .packing import look_up, pack
from .quantisation import encode, quantise, statistics

# bits of a tensor that is not quantised
FULL = 32


class Weights(nn.Module):
    """Matrices by key, trained as they are or straight through their few levels.

    Below 32 bits the trained tensors are latent: what is read is quantised, each matrix `[m, n]` by its own mean and
    deviation. Those are measured, so that training moves them too, unless they are held: weights that come from codes
    keep the statistics they came with, so that the same codes go out again, bit for bit.

    Source: Jie, Wang and Deng, 2023, arXiv 2307.16867.

    Every tensor may carry one leading axis of the batch's length: its rows then use different weights.

    Args:
        tensors: Initial values `[..., m, n]`, by key or in order.
        bits: Bits per number, 1 to 8; 32 for the tensors as they are.
    """

    table: Tensor | None
    statistics: Tensor | None
    """Held mean and deviation of every matrix `[num_matrices, 2]`; None while they are measured."""

    def __init__(self, tensors: Mapping[str, Tensor] | Iterable[Tensor], bits: int = FULL) -> None:
        super().__init__()
        items = tensors if isinstance(tensors, Mapping) else {str(i): tensor for i, tensor in enumerate(tensors)}
        self.bits, self.start, self.num_matrices = bits, dict[str, int](), 0
        for key, tensor in items.items():
            self.register_parameter(key, nn.Parameter(tensor))
            self.start[key] = self.num_matrices
            self.num_matrices += tensor[..., 0, 0].numel()
        self.register_buffer("statistics", None)
        self.register_buffer("table", None if bits == FULL else levels(bits), persistent=False)

    def __getitem__(self, key: int | str) -> Tensor:
        """Returns the weights of a key, quantised where they are."""
        return self.part(key)

    def part(self, key: int | str, rows: slice | None = None) -> Tensor:
        """Returns some of the matrices `[..., n, m, k]` of a key; those left out cost nothing."""
        tensor: Tensor = getattr(self, str(key))
        tensor = tensor if rows is None else tensor[..., rows, :, :]
        if self.table is None:
            return tensor
        if self.statistics is None:
            return quantise(tensor, self.table)
        return quantise(tensor, self.table, *self._held(str(key), rows))

    def __iter__(self) -> Iterator[str]:
        return iter(self.start)

    def __len__(self) -> int:
        return len(self.start)

    @torch.no_grad()
    def encoded(self) -> tuple[Tensor, Tensor]:
        """Returns the codes of all matrices in order, packed, and their statistics `[num_matrices, 2]`."""
        assert self.table is not None
        codes, measured, is_held = [], [], self.statistics is not None
        for key in self.start:
            tensor = getattr(self, key)
            mean, std = self._held(key) if is_held else statistics(tensor)
            codes.append(encode(tensor, mean, std, self.table.to(tensor.dtype), is_held).flatten())
            measured.append(torch.stack([mean.flatten(), std.flatten()], dim=-1))
        return pack(torch.cat(codes), self.bits), torch.cat(measured)

    @torch.no_grad()
    def hold(self, packed: Tensor, measured: Tensor) -> None:
        """Takes the values that `encoded` gave codes and statistics of, and holds the latter."""
        assert self.table is not None
        tensors = [getattr(self, key) for key in self.start]
        self.statistics = measured.to(tensors[0])
        # the sum of `decode`, a tensor at a time while its levels are in the cache: most of reading a plugin
        parts = look_up(packed, self.table, [tensor.numel() for tensor in tensors])
        held = self.statistics.split([math.prod(tensor.shape[:-2]) for tensor in tensors])
        for tensor, part, own in zip(tensors, parts, held, strict=True):
            mean, std = own.view(*tensor.shape[:-2], 1, 1, 2).unbind(-1)
            torch.mul(part.view_as(tensor).to(tensor), std, out=tensor).add_(mean)

    @torch.no_grad()
    def release(self) -> None:
        """Lets held statistics go, so that training moves them again.

        The latent weights then are the levels, shifted and stretched until their measured statistics are the held
        ones: what is read stays the same up to rounding.
        """
        if self.statistics is None:
            return
        for key in self.start:
            tensor, (mean, std) = getattr(self, key), self._held(key)
            found, spread = statistics(tensor)
            # codes that are all equal have no spread: they stay what they are
            tensor.copy_(torch.where(spread > 0, mean + (tensor - found) * std / spread, tensor))
        self.statistics = None

    @torch.no_grad()
    def take(self, other: "Weights") -> None:
        """Takes over what other weights are read as, with statistics measured anew."""
        for key in self.start:
            getattr(self, key).copy_(other[key])
        self.statistics = None

    def _held(self, key: str, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        assert self.statistics is not None
        *batch, _, _ = getattr(self, key).shape
        # a row axis in front of the tensors is one in front of the statistics too
        batch = batch[self.statistics.ndim - 2 :]
        own = self.statistics[..., self.start[key] : self.start[key] + int(torch.Size(batch).numel()), :]
        own = own.unflatten(-2, batch) if batch else own.squeeze(-2)
        own = own if rows is None else own[..., rows, :]
        return own[..., 0, None, None], own[..., 1, None, None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # statistics come and go with a state: there if it was made from codes
        held = state_dict.get(f"{prefix}statistics")
        self.statistics = None if held is None or not len(self) else held.to(next(self.parameters()), copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class QuantisedLinear(nn.Module):
    """A linear map `y = x W^T` of few bits, without a bias.

    Args:
        weight: Initial latent weight `[d_out, d_in]`.
        bits: Bits per number, 1 to 8.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = Weights([weight], bits)

    @property
    def bits(self) -> int:
        """Bits per number."""
        return self.weight.bits

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., d_out]` for `[..., d_in]`."""
        return x @ self.weight[0].mT

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """Returns an ordinary linear map with the same weight, and a bias of zero."""
        linear = nn.Linear(self.in_features, self.out_features).to(self.weight[0])
        linear.weight.copy_(self.weight[0])
        nn.init.zeros_(linear.bias)
        return linear


def quantised(module: nn.Module) -> Iterator[tuple[str, Weights]]:
    """Yields name and weights wherever a module keeps latent ones."""
    return ((name, m) for name, m in module.named_modules() if isinstance(m, Weights) and m.bits != FULL and len(m))


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies the parameters of a module into one of the same structure, in which weights may have other bits."""
    modules = dict(target.named_modules())
    for name, module in source.named_modules():
        other = modules[name]
        if isinstance(module, Weights) and isinstance(other, Weights) and module.bits != other.bits:
            other.take(module)
        elif isinstance(module, Weights):
            other.load_state_dict(module.state_dict())
        else:
            for key, parameter in module.named_parameters(recurse=False):
                other.get_parameter(key).copy_(parameter)


def check_bits(bits: int) -> int:
    """Returns a number of bits that numbers can have.

    Raises:
        PluginError: It is another.
    """
    if bits not in (*range(1, 9), FULL):
        raise PluginError(f"bits are 1 to 8, or {FULL} for the numbers as they are; got {bits}")
    return bits


def near_zero(shape: tuple[int, ...], bits: int, generator: torch.Generator | None) -> Tensor:
    """Returns zeros; at few bits, normal numbers of deviation 0.001 cut at 0.002, as zeros alone have no deviation."""
    start = torch.zeros(shape)
    if bits != FULL:
        nn.init.trunc_normal_(start, std=1e-3, a=-2e-3, b=2e-3, generator=generator)
    return start
