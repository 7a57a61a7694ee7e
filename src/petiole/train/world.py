"""Where a run takes place: one process, or several through Accelerate."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import FitError, PetioleError

T = TypeVar("T")


class World:
    """One process on one device; also the interface of several.

    Args:
        precision: `fp32`, `bf16` or `auto`.
    """

    rank = 0
    size = 1

    def __init__(self, precision: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = _wants_bf16(precision, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Returns network and optimiser as the steps use them."""
        return net, optimizer

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass; gradients are the mean over all processes."""
        loss.backward()

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum of a tensor over all processes."""
        return value

    def first(self, function: Callable[[], T]) -> T:
        """Returns in every process what a function returns in the first one, or raises what it raises there."""
        return function()

    def release(self) -> None:
        """Waits until every process is here, and lets go of network and optimiser."""


class Processes(World):
    """Several processes, joined by Accelerate."""

    def __init__(self, precision: str) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise FitError("several processes need Accelerate: pip install 'petiole[dist]'") from error
        # On a machine without a GPU, Accelerate must be told so, or it takes torchrun's processes for strangers. Its
        # own mixed precision would leave a wrapper on the model's forward: autocast is done here
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
        kind = str(self.accelerator.distributed_type.value)
        if not kind.startswith("MULTI_"):
            raise FitError(
                f"fit trains in several processes by data parallelism (DDP), Accelerate is set up for {kind}"
            )
        self.device = self.accelerator.device
        self.bf16 = _wants_bf16(precision, self.device)
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.accelerator.prepare(net, optimizer)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value)

    def first(self, function: Callable[[], T]) -> T:
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except PetioleError as error:
                box[1] = error
        broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def release(self) -> None:
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()


def find_world(precision: str) -> World:
    """Returns the processes that `accelerate launch` or `torchrun` started, or this one alone."""
    return Processes(precision) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else World(precision)


def _wants_bf16(precision: str, device: torch.device) -> bool:
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16" or (precision == "auto" and has_it)
