"""Where a run takes place: one process, or several through Accelerate."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FitError


class World:
    """One process on one device; also the interface of several.

    Args:
        precision: `fp32`, `bf16` or `auto`.
    """

    rank = 0
    size = 1

    def __init__(self, precision: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = _wants_bf16(precision)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Returns network and optimiser as the steps use them."""
        return net, optimizer

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass."""
        loss.backward()

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum of a tensor over all processes."""
        return value

    def wait(self) -> None:
        """Waits until every process is here."""


class Processes(World):
    """Several processes, joined by Accelerate."""

    def __init__(self, precision: str) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise FitError("several processes need Accelerate: pip install 'petiole[dist]'") from error
        self.bf16 = _wants_bf16(precision)
        self.accelerator = Accelerator(mixed_precision="bf16" if self.bf16 else "no")
        self.device = self.accelerator.device
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes

    def autocast(self) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.accelerator.prepare(net, optimizer)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def find_world(precision: str) -> World:
    """Returns the processes that `accelerate launch` or `torchrun` started, or this one alone."""
    return Processes(precision) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else World(precision)


def _wants_bf16(precision: str) -> bool:
    return precision == "bf16" or (precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
