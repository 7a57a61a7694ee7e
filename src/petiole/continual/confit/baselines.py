"""What ConFiT is measured against: fine-tuning with nothing in the way of forgetting, and with a penalty."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.prove import eval_mode
from ...errors import FitError
from .network import TaskNetwork
from .tuning import Batches, Guard, TaskLearner


class FineTune(TaskLearner):
    """Fine-tunes a network with a head for each experience, and does nothing against forgetting: the lower bound.

    Batch norms answer for every experience with the latest statistics.

    Parameters: those of the network without its classifier, and (d + 1) * classes an experience.

    Args:
        network, lr, stages, prepare, input_size, seed: As of `TaskLearner`.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float = 0.01,
        stages: Sequence[float] = (0.0, 0.0),
        prepare: Callable[[Tensor], Tensor] | None = None,
        input_size: Sequence[int] = (3, 224, 224),
        seed: int = 0,
    ) -> None:
        super().__init__(network, lr=lr, stages=stages, prepare=prepare, input_size=input_size, seed=seed)

    def make_guard(self, example: Tensor) -> Guard:
        return Guard()


class LwF(TaskLearner):
    """Fine-tunes a network while the old heads go on answering new samples as they did before: learning without
    forgetting.

    Each old head adds strength * cross-entropy between its tempered answers before the experience and now. Old heads
    are trained along.

    Source: Li and Hoiem, 2016, "Learning without Forgetting", arXiv 1606.09282, section 3.
    Parameters: as of `FineTune`, and while an experience is learnt once more, of the network before it.

    Args:
        network: As of `TaskLearner`.
        strength: Weight of the old heads' loss, the paper's lambda_o.
        temperature: Of both answers; the paper's T.
        lr, stages, prepare, input_size, seed: As of `TaskLearner`.

    Differs from the paper: no momentum and no weight decay; the paper warms up the new head alone, as
    `stages=(0.2, 0.2)` does.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        strength: float = 1.0,
        temperature: float = 2.0,
        lr: float = 0.01,
        stages: Sequence[float] = (0.0, 0.0),
        prepare: Callable[[Tensor], Tensor] | None = None,
        input_size: Sequence[int] = (3, 224, 224),
        seed: int = 0,
    ) -> None:
        if not (strength >= 0 and temperature > 0):
            raise FitError(f"strength is 0 or more and temperature above 0, got {strength} and {temperature}")
        self.strength, self.temperature = strength, temperature
        super().__init__(network, lr=lr, stages=stages, prepare=prepare, input_size=input_size, seed=seed)

    def make_guard(self, example: Tensor) -> Guard:
        return Distilling(self.strength, self.temperature)


class EWC(TaskLearner):
    """Fine-tunes a network while weights that earlier experiences need are held: elastic weight consolidation.

    The loss grows by strength / 2 * sum over experiences t and weights i of F_ti * (w_i - w_ti)^2, with w_t the weights
    after experience t and F_t the diagonal of the Fisher information there. The quadratic forms of all experiences are
    kept as one.

    Source: Kirkpatrick et al., 2017, "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796,
    equation 3.
    Parameters: as of `FineTune`, and twice those of the network without its classifier for the quadratic form.

    Args:
        network: As of `TaskLearner`.
        strength: Weight of the penalty, the paper's lambda.
        num_samples: Samples that the Fisher information is estimated from, each with one label drawn from the network's
            own answer.
        lr, stages, prepare, input_size, seed: As of `TaskLearner`.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        strength: float = 100.0,
        num_samples: int = 200,
        lr: float = 0.01,
        stages: Sequence[float] = (0.0, 0.0),
        prepare: Callable[[Tensor], Tensor] | None = None,
        input_size: Sequence[int] = (3, 224, 224),
        seed: int = 0,
    ) -> None:
        if not (strength >= 0 and num_samples >= 1):
            raise FitError(f"strength is 0 or more and num_samples at least 1, got {strength} and {num_samples}")
        self.strength, self.num_samples = strength, num_samples
        super().__init__(network, lr=lr, stages=stages, prepare=prepare, input_size=input_size, seed=seed)

    def make_guard(self, example: Tensor) -> Guard:
        return Anchoring(self.strength, self.num_samples, self.seed)


class Distilling(Guard):
    """Keeps the answers of the old heads to new samples.

    Args:
        strength: Weight of their loss.
        temperature: Of both answers.
    """

    def __init__(self, strength: float, temperature: float) -> None:
        self.strength, self.temperature = strength, temperature
        self.teacher: TaskNetwork | None = None

    def begin(self, tuned: TaskNetwork) -> None:
        self.teacher = copy.deepcopy(tuned).eval() if tuned.classes else None

    def penalty(self, tuned: TaskNetwork, x: Tensor, features: Tensor) -> Tensor | float:
        if self.teacher is None:
            return 0.0
        with torch.no_grad():
            before = self.teacher.features(x)
            targets = [F.softmax(head(before) / self.temperature, 1) for head in self.teacher.heads]
        now = (head(features) / self.temperature for head in tuned.heads)
        # the new head has no teacher
        losses = [F.cross_entropy(logits, target) for logits, target in zip(now, targets, strict=False)]
        return self.strength * torch.stack(losses).sum()

    def end(self, tuned: TaskNetwork, batches: Batches) -> None:
        self.teacher = None

    def state(self) -> dict[str, Any]:
        return {} if self.teacher is None else {"teacher": self.teacher.snapshot()}

    def restore(self, tuned: TaskNetwork, state: Mapping[str, Any]) -> None:
        self.teacher = None
        if "teacher" in state:
            self.teacher = copy.deepcopy(tuned).eval()
            self.teacher.restore(state["teacher"])


class Anchoring(Guard):
    """Holds weights where they were, each as fast as earlier experiences need it.

    Args:
        strength: Weight of the penalty.
        num_samples: Samples that the Fisher information is estimated from.
        seed: Seed of the labels that are drawn.
    """

    def __init__(self, strength: float, num_samples: int, seed: int) -> None:
        self.strength, self.num_samples, self.seed = strength, num_samples, seed
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def penalty(self, tuned: TaskNetwork, x: Tensor, features: Tensor) -> Tensor | float:
        if not self.fisher:
            return 0.0
        now = dict(tuned.body.named_parameters())
        parts = [(fisher * (now[name] - self.anchor[name]).square()).sum() for name, fisher in self.fisher.items()]
        return self.strength / 2 * torch.stack(parts).sum()

    def end(self, tuned: TaskNetwork, batches: Batches) -> None:
        # a sum of quadratic forms is one again: their sum, around the mean of their centres weighted by them
        for name, (p, fisher) in self._fisher(tuned, batches).items():
            before = self.fisher.get(name, torch.zeros_like(fisher))
            total = before + fisher
            centre = before * self.anchor.get(name, p) + fisher * p
            self.fisher[name], self.anchor[name] = total, torch.where(total > 0, centre / total, p)

    def state(self) -> dict[str, Any]:
        return {"fisher": dict(self.fisher), "anchor": dict(self.anchor)}

    def restore(self, tuned: TaskNetwork, state: Mapping[str, Any]) -> None:
        self.fisher, self.anchor = dict(state["fisher"]), dict(state["anchor"])

    def _fisher(self, tuned: TaskNetwork, batches: Batches) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the network's parameters and the diagonal of its Fisher information for the last head, by name."""
        parameters = dict(tuned.body.named_parameters())
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        generator = torch.Generator().manual_seed(self.seed + len(tuned.classes))
        count = 0
        tuned.set_trained(norms=True, everything=True)
        with eval_mode(tuned):
            for sample in (row for x, _ in batches for row in x.split(1)):
                if count == self.num_samples:
                    break
                count += 1
                logits = tuned(sample, len(tuned.classes) - 1)
                label = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[0].to(logits.device)
                gradients = torch.autograd.grad(F.cross_entropy(logits, label), list(parameters.values()))
                for name, gradient in zip(parameters, gradients, strict=True):
                    sums[name] += gradient.square()
        return {name: (p.detach().clone(), sums[name] / count) for name, p in parameters.items()}
