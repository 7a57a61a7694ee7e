"""Objectives of online learners against plain loops, and where nothing can be compared."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from petiole.continual.online.objectives import CrossEntropy, Objective, ProxyNCA
from petiole.continual.online.pairs import Hybrid, MultiSimilarity, SupCon
from petiole.errors import FitError

pytest.importorskip("pytorch_metric_learning")

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "cross-entropy": CrossEntropy,
    "proxies": ProxyNCA,
    "multi-similarity": MultiSimilarity,
    "mined": lambda **more: MultiSimilarity(margin=0.1, **more),
    "contrast": SupCon,
    "projected contrast": lambda **more: SupCon(projection=3, **more),
}
every_objective = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 2, 5])
NUM_INCOMING = 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def incoming(num: int, labels: Tensor) -> Tensor:
    return torch.arange(len(labels)) < num


def value_and_gradient(loss: Callable[[Tensor], Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.clone().requires_grad_()
    value = loss(features)
    value.backward()
    assert features.grad is not None
    return value.detach(), features.grad


def allowed(i: int, j: int, negatives: str) -> bool:
    """Whether sample j may be a negative of sample i."""
    return negatives == "all" or i >= NUM_INCOMING or LABELS[j] in LABELS[:NUM_INCOMING]


def multi_similarity(x: Tensor, margin: float | None, negatives: str) -> Tensor:
    """Equations 5 to 7 of arXiv 1904.06627 sample by sample, offset 0.5."""
    cosine = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
    terms = []
    for i in range(len(x)):
        same = [j for j in range(len(x)) if LABELS[j] == LABELS[i] and j != i]
        other = [j for j in range(len(x)) if LABELS[j] != LABELS[i]]
        if margin is not None:
            hardest = max(cosine[i, j].item() for j in other)
            farthest = min((cosine[i, j].item() for j in same), default=math.inf)
            same = [j for j in same if cosine[i, j] - margin < hardest]
            other = [j for j in other if cosine[i, j] + margin > farthest]
        other = [j for j in other if allowed(i, j, negatives)]
        positive = 1 + sum(torch.exp(-2 * (cosine[i, j] - 0.5)) for j in same)
        negative = 1 + sum(torch.exp(50 * (cosine[i, j] - 0.5)) for j in other)
        terms.append(torch.log(x.new_ones(()) * positive) / 2 + torch.log(x.new_ones(()) * negative) / 50)
    return torch.stack(terms).mean()


def contrast(x: Tensor, negatives: str) -> Tensor:
    """Equation 2 of arXiv 2004.11362 sample by sample, over those that have another of their class."""
    cosine = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T / 0.1
    terms = []
    for i in range(len(x)):
        same = [j for j in range(len(x)) if LABELS[j] == LABELS[i] and j != i]
        other = [j for j in range(len(x)) if LABELS[j] != LABELS[i] and allowed(i, j, negatives)]
        if same:
            total = sum(torch.exp(cosine[i, j]) for j in same + other)
            terms.append(-sum(torch.log(torch.exp(cosine[i, j]) / total) for j in same) / len(same))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("negatives", ["all", "incoming"])
@pytest.mark.parametrize("margin", [None, 0.1])
def test_multi_similarity_is_that_of_the_loop(margin: float | None, negatives: str) -> None:
    objective = MultiSimilarity(margin=margin, negatives=negatives)
    found = value_and_gradient(lambda x: objective(x, LABELS, incoming(NUM_INCOMING, LABELS)), normal(9, 4))
    expected = value_and_gradient(lambda x: multi_similarity(x, margin, negatives), normal(9, 4))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("negatives", ["all", "incoming"])
def test_contrast_is_that_of_the_loop(negatives: str) -> None:
    objective = SupCon(negatives=negatives)
    found = value_and_gradient(lambda x: objective(x, LABELS, incoming(NUM_INCOMING, LABELS)), normal(9, 4))
    torch.testing.assert_close(found, value_and_gradient(lambda x: contrast(x, negatives), normal(9, 4)))


@pytest.mark.parametrize("negatives", ["all", "incoming"])
def test_proxies_are_softmax_over_squared_distances(negatives: str) -> None:
    objective, x = ProxyNCA(scale=3.0, negatives=negatives), normal(9, 4)
    objective.meet(normal(9, 4, seed=1), LABELS)
    proxies = dict(zip(objective.classes, torch.cat(list(objective.parameters())).detach(), strict=True))
    terms = []
    for i, (row, label) in enumerate(zip(x, LABELS.tolist(), strict=True)):
        distances = {c: (row / row.norm() - p / p.norm()).square().sum() for c, p in proxies.items()}
        seen = [c for c in proxies if negatives == "all" or i >= NUM_INCOMING or c in LABELS[:NUM_INCOMING]]
        total = sum(torch.exp(-3 * distances[c]) for c in seen)
        terms.append(-torch.log(torch.exp(-3 * distances[label]) / total))
    torch.testing.assert_close(objective(x, LABELS, incoming(NUM_INCOMING, LABELS)), torch.stack(terms).mean())


def test_a_proxy_begins_as_the_mean_of_its_class_and_stays_when_others_come() -> None:
    objective, x = ProxyNCA(), normal(6, 4)
    first = objective.meet(x, torch.tensor([7, 7, 7, 2, 2, 7]))
    expected = [F.normalize(F.normalize(x[rows], dim=1).mean(0), dim=0) for rows in ([3, 4], [0, 1, 2, 5])]
    assert objective.classes == [2, 7]
    torch.testing.assert_close(first[0].detach(), torch.stack(expected))
    before = first[0].detach().clone()
    second = objective.meet(normal(2, 4, seed=1), torch.tensor([7, 0]))
    assert objective.classes == [2, 7, 0]
    assert torch.equal(first[0], before)
    assert [p.shape for p in second] == [(1, 4)]
    assert objective.meet(x, torch.tensor([7, 2, 0, 0, 0, 0])) == []


def test_hybrid_is_the_sum_of_its_parts() -> None:
    pairs, proxies, x = MultiSimilarity(), ProxyNCA(), normal(9, 4)
    objective = Hybrid(pairs=pairs, proxies=proxies, gamma=0.3)
    assert [p.shape for p in objective.meet(x, LABELS)] == [(5, 4)]
    is_incoming = incoming(NUM_INCOMING, LABELS)
    expected = pairs(x, LABELS, is_incoming) + 0.3 * proxies(x, LABELS, is_incoming)
    torch.testing.assert_close(objective(x, LABELS, is_incoming), expected)
    assert torch.equal(objective.logits(x), proxies.logits(x))
    assert objective.classes == [0, 1, 2, 3, 5]


def test_cross_entropy_starts_without_an_opinion_on_the_classes_seen() -> None:
    objective = CrossEntropy()
    assert objective.logits(normal(2, 4)).shape == (2, 0)
    objective.meet(normal(9, 4), LABELS)
    assert objective(normal(9, 4), LABELS, incoming(9, LABELS)).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("make", [CrossEntropy, ProxyNCA])
def test_incoming_negatives_leave_old_classes_in_peace(make: Callable[..., Objective]) -> None:
    objective = make(negatives="incoming")
    old = objective.meet(normal(2, 4), torch.tensor([0, 1]))
    objective.meet(normal(2, 4, seed=1), torch.tensor([2, 3]))
    labels = torch.tensor([2, 3, 3])
    objective(normal(3, 4, seed=2), labels, incoming(3, labels)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in old)
    # samples that are learnt again have all classes as negatives
    objective(normal(3, 4, seed=2), labels, incoming(0, labels)).backward()
    assert all(p.grad is not None and p.grad.any() for p in old)


@every_objective
@pytest.mark.parametrize("negatives", ["all", "incoming"])
@pytest.mark.parametrize(
    ("labels", "num_incoming"),
    [([0], 1), ([0, 0, 0], 3), ([0, 1, 2, 3], 4), ([0, 1, 2, 3], 0), ([0, 1], 1), ([0, 0, 1], 2)],
    ids=["one sample", "one class", "no positives", "nothing incoming", "one pair", "one negative"],
)
@pytest.mark.parametrize("kind", ["random", "zero", "equal"])
def test_batches_without_pairs_give_finite_losses_and_gradients(
    make: Callable[..., Objective], negatives: str, labels: list[int], num_incoming: int, kind: str
) -> None:
    y = torch.tensor(labels)
    x = {"random": normal(len(y), 4), "zero": torch.zeros(len(y), 4), "equal": torch.ones(len(y), 4)}[kind].float()
    objective = make(negatives=negatives)
    x.requires_grad_()
    objective.meet(x.detach(), y)
    loss = objective(x, y, incoming(num_incoming, y))
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_a_projection_is_seeded_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    weights = []
    for seed in (0, 0, 1):
        objective = SupCon(projection=3, seed=seed)
        assert len(objective.meet(normal(2, 4), torch.tensor([0, 1]))) == 4
        assert objective.meet(normal(2, 4), torch.tensor([0, 1])) == []
        weights.append(objective.state()["weights"]["projector.0.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [*OBJECTIVES.values(), Hybrid], ids=[*OBJECTIVES, "hybrid"])
def test_a_restored_objective_gives_the_same_loss(make: Callable[..., Objective]) -> None:
    one, other = make(), make()
    one.meet(normal(4, 4), LABELS[:4])
    one.meet(normal(9, 4, seed=1), LABELS)
    with torch.no_grad():
        for i, p in enumerate(one.parameters()):
            p += normal(*p.shape, seed=i)
    other.meet(normal(1, 4), torch.tensor([8]))
    other.restore(one.state())
    is_incoming = incoming(4, LABELS)
    assert other.classes == one.classes
    assert torch.equal(one(normal(9, 4), LABELS, is_incoming), other(normal(9, 4), LABELS, is_incoming))
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in other.named_parameters()]


@every_objective
def test_a_fresh_objective_can_be_restored(make: Callable[..., Objective]) -> None:
    objective = make()
    objective.restore(make().state())
    assert objective.classes == []


def test_objectives_without_classes_say_so() -> None:
    with pytest.raises(FitError, match="SupCon has no logits: classify by class means"):
        SupCon().logits(normal(2, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(negatives="old"), "negatives are 'all' or 'incoming', got 'old'"),
        (lambda: ProxyNCA(scale=0), "above 0, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(FitError, match=message):
        make()


@pytest.mark.parametrize("make", [MultiSimilarity, SupCon, Hybrid])
def test_the_missing_extra_is_named(make: Callable[..., Objective], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(FitError, match=r"pip install 'petiole\[metric\]'"):
        make()
