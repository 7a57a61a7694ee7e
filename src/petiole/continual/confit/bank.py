"""What batch normalisation needs to know of each experience, kept apart from the weights that go on changing."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...core.prove import eval_mode
from ...errors import FitError, nearest
from .pairing import Pairing
from .recording import look, unchanged
from .statistics import STATISTICS, Map

Mean = Literal["recovered", "stale", "latest"]
Variance = Literal["stale", "rescaled", "latest"]
Affine = Literal["own", "latest"]
StatisticName = Literal["taps", "channel", "phases"]


@dataclass(frozen=True, eq=False)
class NormRecord:
    """What is kept of one batch norm and one experience; None for what the settings do not need.

    Args:
        size: Size of the mean input of the convolution in front of it, channels left out.
        mean: Mean of its input `[C]`.
        variance: Variance of its input `[C]`.
        weight: Its gain `[C]`.
        bias: Its shift `[C]`.
        pre_conv: Mean input of the convolution in front of it, as the statistic keeps it.
        spread: Variance of that input, kept in the same way.
        form: The variance that this spread alone would give the output `[C]`, under the weights of that time.
    """

    size: tuple[int, ...] = ()
    mean: Tensor | None = None
    variance: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    pre_conv: Tensor | None = None
    spread: Tensor | None = None
    form: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Returns what there is, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class StatisticsBank:
    """Statistics and affine parameters of a network's batch norms, experience by experience.

    Weights that are shared by all experiences drift, and the means that an experience had behind a convolution drift
    with them. Kept in front of the convolution, they do not: its mean output under the weights of today is worked out
    from its mean input. Layer by layer that stays right, as far as the normalised activations between keep their means.

    Source: Jie, Deng and Li, 2022, "Alleviating Representational Shift for Continual Fine-tuning", arXiv 2204.10535,
    cross-convolution batch normalisation (Xconv BN); `statistic="phases"` with the other defaults is the authors'.
    Parameters: none; each experience keeps 3 C numbers a batch norm of C channels, and its statistic (`num_kept`).

    Args:
        network: The network; written to within `activate` only, and then put back.
        pairing: Which convolution stands in front of which batch norm: `find_pairs(network, example)`.
        statistic: What is kept of a convolution's input: `taps` (C * kh * kw numbers, exact), `channel` (C) or `phases`
            (C * stride * stride).
        mean: Mean that an experience is answered with: `recovered` under today's weights, `stale` as it was recorded,
            `latest` as the network has it. A batch norm without a convolution in front has none to recover from, and
            keeps the recorded one.
        variance: Likewise; `rescaled` multiplies the recorded one by how much today's weights enlarge the spread of the
            convolution's input, as if its entries were uncorrelated.
        affine: Whether gain and shift are each experience's `own`, or the `latest`.

    Raises:
        FitError: A setting is none of these.

    Example:
        >>> import timm, torch
        >>> from petiole.continual.confit.pairing import find_pairs
        >>> network, images = timm.create_model("resnet10t", num_classes=0), torch.rand(4, 3, 32, 32)
        >>> bank = StatisticsBank(network, find_pairs(network, images))
        >>> bank.record("birds", [images])
        >>> with bank.activate("birds"):
        ...     features = network(images)

    Differs from the paper: tap means make the recovered means exact for any stride and padding. All is recorded in one
    clean pass at the end of an experience, as plain means, where the authors keep running means all along, which start
    from zero. `rescaled` and `latest` variances are additions.
    """

    def __init__(
        self,
        network: nn.Module,
        pairing: Pairing,
        *,
        statistic: StatisticName = "taps",
        mean: Mean = "recovered",
        variance: Variance = "stale",
        affine: Affine = "own",
    ) -> None:
        for name, value, known in (
            ("statistic", statistic, get_args(StatisticName)),
            ("mean", mean, get_args(Mean)),
            ("variance", variance, get_args(Variance)),
            ("affine", affine, get_args(Affine)),
        ):
            if value not in known:
                raise FitError(f"{name} is one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}")
        self.network, self.pairing = network, pairing
        self.statistic, self.mean, self.variance, self.affine = statistic, mean, variance, affine
        self.records: dict[str, dict[str, NormRecord]] = {}
        self._is_active = False

    def record(self, experience: str, batches: Iterable[Tensor]) -> None:
        """Keeps what an experience's batch norms see now, from one pass over its inputs; the network stays as it was.

        Args:
            experience: Its name; what was kept under this name is replaced.
            batches: Inputs `[B, ...]`, mixed as in training, at least two samples each.

        Raises:
            FitError: There is no batch, one is too small, sizes differ, or an experience is active.
        """
        self._check_idle()
        seen = look(self.network, self.pairing, batches, has_squares=self.variance == "rescaled")
        self.records[experience] = {norm: self._reduced(norm, means) for norm, means in seen.items()}

    @contextmanager
    def activate(self, experience: str) -> Iterator[None]:
        """Lets the network normalise for an experience, in eval mode, within a `with` block.

        Afterwards, and also after an exception, parameters, buffers and modes are bit for bit what they were.

        Args:
            experience: Its name.

        Raises:
            FitError: Nothing is recorded under this name, or another experience is active.
        """
        self._check_idle()
        if experience not in self.records:
            near, known = nearest(experience, self.records), ", ".join(self.records) or "nothing"
            raise FitError(f"nothing is recorded of {experience!r}{near}: known are {known}")
        values = {norm: self._answers(norm, kept) for norm, kept in self.records[experience].items()}
        with eval_mode(self.network), unchanged([self._module(norm) for norm in values]):
            with torch.no_grad():
                for norm, tensors in values.items():
                    for name, value in tensors.items():
                        getattr(self._module(norm), name).copy_(value)
            self._is_active = True
            try:
                yield
            finally:
                self._is_active = False

    def num_kept(self, experience: str) -> dict[str, int]:
        """Returns how many numbers are kept of an experience, by kind."""
        counts: dict[str, int] = {}
        for kept in self.records[experience].values():
            for name, tensor in kept.tensors().items():
                kind = "affine" if name in ("weight", "bias") else name
                counts[kind] = counts.get(kind, 0) + tensor.numel()
        return counts

    def num_bytes(self, experience: str) -> int:
        """Returns what these numbers take [bytes]."""
        tensors = [t for kept in self.records[experience].values() for t in kept.tensors().values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def state(self) -> dict[str, Any]:
        """Returns all records, as `Learner.state` does."""
        return {
            experience: {norm: {"size": list(kept.size), **kept.tensors()} for norm, kept in records.items()}
            for experience, records in self.records.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned."""
        self.records = {
            experience: {norm: NormRecord(**{**kept, "size": tuple(kept["size"])}) for norm, kept in records.items()}
            for experience, records in state.items()
        }

    def _check_idle(self) -> None:
        if self._is_active:
            raise FitError("an experience is active: leave its `with` block first")

    def _module(self, norm: str) -> Any:
        return self.network.get_submodule(norm)

    def _map(self, norm: str) -> Map:
        found: Any = self.network.get_submodule(self.pairing.pairs[norm])
        return found

    @torch.no_grad()
    def _reduced(self, norm: str, means: Mapping[str, Tensor]) -> NormRecord:
        """Returns what the settings need of what was seen."""
        module = self._module(norm)
        kept: dict[str, Any] = {}
        if self.affine == "own" and module.affine:
            kept |= {"weight": module.weight.detach().clone(), "bias": module.bias.detach().clone()}
        if self.variance != "latest":
            kept["variance"] = means["variance"]
        if self.mean == "stale" or (self.mean == "recovered" and norm not in self.pairing.pairs):
            kept["mean"] = means["mean"]
        if norm in self.pairing.pairs:
            kept |= self._reduced_before(self._map(norm), means)
        return NormRecord(**kept)

    def _reduced_before(self, module: Map, means: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns what the settings need of what the map in front was given."""
        statistic, size = STATISTICS[self.statistic], tuple(means["before"].shape[1:])
        before = statistic.reduce(module, means["before"])
        kept: dict[str, Any] = {"size": size}
        if self.mean == "recovered":
            kept["pre_conv"] = before
        if self.variance == "rescaled":
            spread = (statistic.reduce(module, means["squares"]) - before.square()).clamp(min=0)
            kept |= {"spread": spread, "form": statistic.recover(module, spread, size, module.weight.square())}
        return kept

    @torch.no_grad()
    def _answers(self, norm: str, kept: NormRecord) -> dict[str, Tensor]:
        """Returns the tensors of a batch norm with which an experience is answered, by their names in the module."""
        mean, variance = kept.mean, kept.variance
        if norm in self.pairing.pairs:
            statistic, module = STATISTICS[self.statistic], self._map(norm)
            if kept.pre_conv is not None:
                mean = statistic.recover(module, kept.pre_conv, kept.size, module.weight, module.bias)
            if variance is not None and kept.spread is not None and kept.form is not None:
                form = statistic.recover(module, kept.spread, kept.size, module.weight.square())
                # a channel whose kernel was zero had no spread to compare with
                variance = variance * torch.where(kept.form > 0, form / kept.form, 1.0)
        answers = {"running_mean": mean, "running_var": variance, "weight": kept.weight, "bias": kept.bias}
        return {name: value for name, value in answers.items() if value is not None}
