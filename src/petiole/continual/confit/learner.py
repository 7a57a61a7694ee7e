"""ConFiT: continual fine-tuning that keeps batch statistics in front of convolutions, and starts with the head."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ...errors import BackboneError
from .bank import Affine, Mean, StatisticName, StatisticsBank, Variance
from .network import TaskNetwork
from .pairing import Pairing, find_pairs
from .tuning import Batches, Guard, TaskLearner


class ConFiT(TaskLearner):
    """Fine-tunes a network with batch norms; each experience keeps its own statistics, gains, shifts and head.

    Two parts: an experience is normalised by means that follow the drift of the shared weights (`StatisticsBank`), and
    it is learnt in stages, so that a fresh head does not send noise through the network (hierarchical fine-tuning).
    Each can be left out: `mean="stale"` (statistics per experience, as recorded), `mean="latest"` with
    `variance="latest"` and `affine="latest"` (one set for all), `stages=(0, 0)`.

    Source: Jie, Deng and Li, 2022, "Alleviating Representational Shift for Continual Fine-tuning", arXiv 2204.10535.
    The defaults are those of the authors' code, except the statistic, which is `phases` there.
    Parameters: those of the network without its classifier, (d + 1) * classes an experience, and what
    `StatisticsBank.num_kept` counts.

    Args:
        network: As of `TaskLearner`; it must have batch norms. `pairing` says which of them stand behind a convolution.
        statistic, mean, variance, affine: As of `StatisticsBank`.
        lr, stages, prepare, input_size, seed: As of `TaskLearner`.

    Raises:
        BackboneError: The network has no batch norm, or none of them stands behind a convolution whose input could be
            kept; names the first and says why.

    Example:
        >>> import timm, torch
        >>> from petiole.continual.learner import run
        >>> from petiole.continual.streams import class_incremental
        >>> data = torch.randn(24, 3, 32, 32), torch.arange(24) % 4
        >>> stream = class_incremental(data, data, num_experiences=2, batch_size=6)
        >>> learner = ConFiT(timm.create_model("resnet10t"), input_size=(3, 32, 32))
        >>> *_, last = run(stream, learner, is_task_known=True)

    Differs from the paper: as `StatisticsBank`. Stages are shares of the steps, not whole epochs, so that each has its
    part in short runs too. Nothing answers where the experience is not told; the paper does not treat that case.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        statistic: StatisticName = "taps",
        mean: Mean = "recovered",
        variance: Variance = "stale",
        affine: Affine = "own",
        lr: float = 0.01,
        stages: Sequence[float] = (0.2, 0.5),
        prepare: Callable[[Tensor], Tensor] | None = None,
        input_size: Sequence[int] = (3, 224, 224),
        seed: int = 0,
    ) -> None:
        self.statistic, self.mean, self.variance, self.affine = statistic, mean, variance, affine
        super().__init__(network, lr=lr, stages=stages, prepare=prepare, input_size=input_size, seed=seed)

    def make_guard(self, example: Tensor) -> Guard:
        pairing = find_pairs(self.tuned.body, example)
        if self.mean == "recovered" and not pairing.pairs:
            norm, reason = next(iter(pairing.lone_norms.items()))
            raise BackboneError(
                f"none of {len(pairing.lone_norms)} batch norms of {type(self.network).__name__} has a mean that could "
                f"be recovered ({norm}: {reason}): choose mean='stale' or 'latest'"
            )
        self.bank = StatisticsBank(
            self.tuned.body,
            pairing,
            statistic=self.statistic,
            mean=self.mean,
            variance=self.variance,
            affine=self.affine,
        )
        return Normalising(self.bank)

    @property
    def pairing(self) -> Pairing:
        """Which batch norms stand behind a convolution, and which do not, with the reason."""
        return self.bank.pairing


class Normalising(Guard):
    """Answers for an experience with its own batch statistics.

    Args:
        bank: Where they are kept, by the experience's number.
    """

    def __init__(self, bank: StatisticsBank) -> None:
        self.bank = bank

    def end(self, tuned: TaskNetwork, batches: Batches) -> None:
        self.bank.record(str(len(tuned.classes) - 1), (x for x, _ in batches))

    def reading(self, index: int) -> AbstractContextManager[None]:
        # an experience that is just being learnt has no record yet, and the network is at its statistics
        return self.bank.activate(str(index)) if str(index) in self.bank.records else nullcontext()

    def state(self) -> dict[str, Any]:
        return self.bank.state()

    def restore(self, tuned: TaskNetwork, state: Mapping[str, Any]) -> None:
        self.bank.restore(state)
