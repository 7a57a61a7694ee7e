"""What is kept of a convolution's input, so that the mean of its output is known under other weights too.

Averaged over samples and output positions, output channel o of a convolution is linear in its kernel:

    mean of y_o = bias_o + sum over c, u, v of W[o, c, u, v] * T_c(u, v)

T_c(u, v), a tap mean, is the mean of what entry (u, v) of the kernel meets of input channel c, padding included. These
C * kh * kw numbers are all that is needed, whatever the size of the image, stride, padding, dilation and groups:
whoever keeps them knows the mean that any later kernel would give. Fewer numbers say less:

    taps      C * kh * kw   exact
    phases    C * sh * sw   as if the mean were the same everywhere in a phase of the stride (sh, sw)
    channel   C             as if the mean were the same everywhere

Convolutions are computed in float64 on the CPU, of one mean image: on GPUs they may round to ten bits.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call

Map = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def is_map(module: nn.Module) -> TypeGuard[Map]:
    """Returns whether a module is a convolution or a linear map with a weight of its own, not a computed one."""
    return isinstance(module, Map) and "weight" in dict(module.named_parameters(recurse=False))


class Statistic(ABC):
    """How the mean input of a convolution or linear map is put into few numbers, and what follows from them."""

    @abstractmethod
    def reduce(self, module: Map, x: Tensor) -> Tensor:
        """Returns the numbers that are kept, in the dtype of `x` and on its device.

        Args:
            module: The map; its weights do not matter.
            x: Its mean input over samples `[C, *size]`; `[C]` of a linear map.
        """

    @abstractmethod
    def recover(
        self, module: Map, kept: Tensor, size: Sequence[int], weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Returns the mean output of each channel `[C_out]`, in the dtype of what is kept and on its device.

        Args:
            module: The map, for its geometry.
            kept: What `reduce` returned.
            size: Size of the mean input, channels left out.
            weight: The kernel in question.
            bias: Its bias; None for none.
        """


class Taps(Statistic):
    """The mean of what each entry of the kernel meets: exact, and independent of the size of the images."""

    def reduce(self, module: Map, x: Tensor) -> Tensor:
        # the mean output's gradient by the kernel: one output channel a group shows it, since all of them meet the
        # same, and the module's own forward knows about its padding
        kernel = torch.zeros(_groups(module), *module.weight.shape[1:], dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            (taps,) = torch.autograd.grad(_mean_output(module, x, kernel, None).sum(), kernel)
        return taps.flatten(0, 1).to(x)

    def recover(
        self, module: Map, kept: Tensor, size: Sequence[int], weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        groups = _groups(module)
        kernels = weight.to(kept.dtype).reshape(groups, len(weight) // groups, -1)
        means = (kernels @ kept.reshape(groups, -1, 1)).flatten()
        return means if bias is None else means + bias


class Means(Statistic):
    """The mean of each channel, or of each of its phases under the stride.

    A kernel's entry meets every position of a map under stride 1, but only those of one parity of rows and of columns
    under stride 2: by phases, the sampling is exact and only borders are approximate.

    Args:
        by_phase: Whether phases are kept apart.
    """

    def __init__(self, *, by_phase: bool) -> None:
        self.by_phase = by_phase

    def reduce(self, module: Map, x: Tensor) -> Tensor:
        phases = (x[phase].reshape(len(x), -1) for phase in self._phases(module))
        # a map that is smaller than the stride has phases without a position, which nothing meets
        return torch.stack([p.mean(1) if p.numel() else p.new_zeros(len(x)) for p in phases])

    def recover(
        self, module: Map, kept: Tensor, size: Sequence[int], weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        x = kept.new_empty(kept.shape[1], *size)
        for phase, mean in zip(self._phases(module), kept, strict=True):
            x[phase] = mean.view(-1, *(1 for _ in size))
        return _mean_output(module, x, weight, bias).to(kept)

    def _phases(self, module: Map) -> Iterator[tuple[slice, ...]]:
        """Yields the index of each phase of a map `[C, *size]`."""
        stride: Any = () if isinstance(module, nn.Linear) else module.stride
        steps = stride if self.by_phase else [1] * len(stride)
        for starts in itertools.product(*map(range, steps)):
            yield (slice(None), *(slice(start, None, step) for start, step in zip(starts, steps, strict=True)))


STATISTICS: Mapping[str, Statistic] = MappingProxyType(
    {"taps": Taps(), "channel": Means(by_phase=False), "phases": Means(by_phase=True)}
)


def _groups(module: Map) -> int:
    return 1 if isinstance(module, nn.Linear) else module.groups


def _mean_output(module: Map, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns what a map with other tensors answers to one input `[C, *size]`, averaged over positions `[C_out]`."""
    tensors = {"weight": weight.cpu().double()}
    if module.bias is not None:
        tensors["bias"] = (weight.new_zeros(len(weight)) if bias is None else bias).cpu().double()
    y: Tensor = functional_call(module, tensors, (x.cpu().double().unsqueeze(0),))
    return y.reshape(y.shape[1], -1).mean(1)
