"""What every store of exemplars does, whatever its policy, and what those with room by class share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FitError


class Exemplars(ABC):
    """A bounded store of samples.

    Its tensors are allocated with the first batch, in the dtype the samples come in. What is kept does not depend on
    what is drawn to learn from: the two have generators of their own.

    Args:
        capacity: Exemplars at most; None where a policy bounds them otherwise.
        seed: Seed of what is kept and what is drawn.
        device: Where they are stored; None for the device of the first batch.

    Raises:
        FitError: No exemplar fits in.
    """

    def __init__(self, capacity: int | None, *, seed: int = 0, device: str | torch.device | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise FitError(f"exemplars need room for at least 1, got capacity {capacity}")
        self.capacity, self.seed = capacity, seed
        self.device = None if device is None else str(device)
        self._columns: list[Tensor] = []
        self._size = 0
        seeds = np.random.SeedSequence(seed).generate_state(2)
        self._keeping, self._drawing = (torch.Generator().manual_seed(int(s)) for s in seeds)

    def __len__(self) -> int:
        return self._size

    @property
    def labels(self) -> Tensor:
        """Class of each exemplar `[n]`, int64, where they are stored."""
        return self._columns[1][: self._size] if self._columns else torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, *more: Tensor) -> None:
        """Takes in what the policy wants of a batch, sample after sample in its order.

        Args:
            x: Samples `[B, ...]`, of the shape and dtype of those before.
            y: Labels `[B]`.
            more: What is kept beside each sample `[B, ...]`, such as logits; as many tensors each time.

        Raises:
            FitError: The batch does not fit itself or those before, or there are more classes than room.
        """
        rows = [x, y.long(), *more]
        self._check(rows)
        # decided on the host: of samples that take the same slot the last wins, which an indexed assignment on an
        # accelerator does not promise
        places = self._place(x, y.tolist())
        if not places:
            return
        self._allocate(rows)
        slots, items = torch.tensor([list(places), list(places.values())])
        for column, row in zip(self._columns, rows, strict=True):
            # on a CPU, index_select gathers images ten times faster than indexing does
            column[slots.to(column.device)] = row.index_select(0, items.to(row.device)).to(column.device)

    def sample(self, num: int) -> tuple[Tensor, ...]:
        """Returns x, y and what else is kept of `num` different exemplars, drawn uniformly; of all if there are fewer.

        Raises:
            FitError: There is none.
        """
        rows = torch.randperm(self._size, generator=self._drawing)[:num]
        return tuple(column.index_select(0, rows.to(column.device)) for column in self.all())

    def all(self) -> tuple[Tensor, ...]:
        """Returns x, y and what else is kept of all exemplars, as views of the store.

        Raises:
            FitError: There is none.
        """
        if not self._columns:
            raise FitError("there are no exemplars yet: add samples first")
        return tuple(column[: self._size] for column in self._columns)

    def state(self) -> dict[str, Any]:
        """Returns all exemplars, what the policy knows and the generators, as `Learner.state` does."""
        return {
            "columns": {str(i): column[: self._size].clone() for i, column in enumerate(self._columns)},
            "policy": self._policy(),
            "keeping": self._keeping.get_state(),
            "drawing": self._drawing.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned.

        Raises:
            FitError: It holds more exemplars than there is room.
        """
        rows = [state["columns"][str(i)] for i in range(len(state["columns"]))]
        size = len(rows[0]) if rows else 0
        if self.capacity is not None and size > self.capacity:
            raise FitError(f"{size} exemplars do not fit into a capacity of {self.capacity}: restore into a larger one")
        self._restore_policy(state["policy"])
        self._columns, self._size = [], size
        if rows:
            self._allocate(rows)
        for column, row in zip(self._columns, rows, strict=True):
            column[:size] = row
        self._keeping.set_state(state["keeping"])
        self._drawing.set_state(state["drawing"])

    @abstractmethod
    def _place(self, x: Tensor, labels: Sequence[int]) -> dict[int, int]:
        """Returns which slots get which item of a batch, `{slot: item}`; calls `_new_slot` for more of them."""

    @abstractmethod
    def _room(self) -> int:
        """Returns for how many exemplars there is to be memory."""

    @abstractmethod
    def _policy(self) -> dict[str, Any]:
        """Returns what the policy knows, as plain values."""

    @abstractmethod
    def _restore_policy(self, state: Mapping[str, Any]) -> None:
        """Takes over what `_policy` returned."""

    def _new_slot(self) -> int:
        self._size += 1
        return self._size - 1

    def _uniform(self, num: int) -> list[float]:
        """Returns numbers from [0, 1); times a count and rounded down they are uniform to 53 bits."""
        return torch.rand(num, generator=self._keeping, dtype=torch.float64).tolist()

    def _check(self, rows: Sequence[Tensor]) -> None:
        if rows[1].ndim != 1 or any(row.ndim < 1 or len(row) != len(rows[1]) for row in rows):
            shapes = ", ".join(str(list(row.shape)) for row in rows)
            raise FitError(f"exemplars come as x [B, ...], y [B] and more of the same length, got {shapes}")
        if not self._columns:
            return
        found = [(row.dtype, list(row.shape[1:])) for row in rows]
        known = [(column.dtype, list(column.shape[1:])) for column in self._columns]
        if found != known:
            raise FitError(f"exemplars are all alike: those before are {known}, these are {found}")

    def _allocate(self, rows: Sequence[Tensor]) -> None:
        """Makes memory for all there is room for, and keeps what is stored."""
        if self._columns and len(self._columns[0]) >= self._size:
            return
        device = self.device or rows[0].device
        fresh = [torch.empty(self._room(), *row.shape[1:], dtype=row.dtype, device=device) for row in rows]
        for column, old in zip(fresh, self._columns, strict=False):
            column[: len(old)] = old
        self._columns = fresh


class ByClass(Exemplars):
    """Exemplars whose classes share the room equally, as far as they have samples.

    A class gives up exemplars only to one that has at least two fewer. So a class that ever gave one up, or missed
    one, stays within one of the largest, and any smaller class has all the samples it was seen with.

    Args:
        capacity: Exemplars at most in all; None with `per_class`.
        per_class: Exemplars at most of each class, instead.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        per_class: int | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        if (capacity is None) == (per_class is None):
            raise FitError("exemplars by class need a capacity in all or per_class, one of the two")
        if per_class is not None and per_class < 1:
            raise FitError(f"exemplars need room for at least 1 of each class, got per_class {per_class}")
        super().__init__(capacity, seed=seed, device=device)
        self.per_class = per_class
        # both in the order in which classes were met
        self._slots: dict[int, list[int]] = {}
        self._seen: dict[int, int] = {}
        # size of the largest class or more: once the store is full, no class grows beyond it
        self._most = capacity or 0

    def _meet(self, labels: Sequence[int]) -> None:
        """Makes a batch's classes known, before it is placed."""
        num_classes = len({*self._slots, *labels})
        if self.capacity is not None and num_classes > self.capacity:
            raise FitError(f"a capacity of {self.capacity} cannot hold an exemplar of each of {num_classes} classes")
        for label in labels:
            self._slots.setdefault(label, [])
            self._seen.setdefault(label, 0)

    def _room(self) -> int:
        return self.capacity or len(self._slots) * (self.per_class or 0)

    def _donor(self, own: list[int]) -> list[int] | None:
        """Returns the class whose slot a sample may take, its own or the largest; None where there is a free one."""
        if self.capacity is None:
            return None if len(own) < (self.per_class or 0) else own
        if self._size < self.capacity:
            return None
        if len(own) >= self._most - 1:
            return own
        largest = max(self._slots.values(), key=len)
        self._most = len(largest)
        return largest if len(own) < self._most - 1 else own

    def _policy(self) -> dict[str, Any]:
        # lists: the order of the classes counts, and a file may not keep that of a dictionary
        slots = [list(own) for own in self._slots.values()]
        return {"classes": list(self._slots), "slots": slots, "seen": list(self._seen.values())}

    def _restore_policy(self, state: Mapping[str, Any]) -> None:
        self._slots = {c: list(slots) for c, slots in zip(state["classes"], state["slots"], strict=True)}
        self._seen = dict(zip(state["classes"], state["seen"], strict=True))
        self._most = self.capacity or 0
