"""Exemplars: what each policy keeps, against probabilities, plain loops and exact resumption."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from petiole.continual.exemplars import ClassBalanced, Exemplars, Herding, Reservoir, Ring
from petiole.errors import FitError

Policy = Callable[..., Exemplars]
POLICIES: dict[str, Policy] = {
    "reservoir": Reservoir,
    "balanced": ClassBalanced,
    "ring": Ring,
    "herding": Herding,
    "balanced per class": lambda capacity, **more: ClassBalanced(per_class=max(1, capacity // 4), **more),
    "ring per class": lambda capacity, **more: Ring(per_class=max(1, capacity // 4), **more),
    "herding per class": lambda capacity, **more: Herding(per_class=max(1, capacity // 4), **more),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def numbered(labels: Sequence[int], start: int = 0) -> tuple[Tensor, Tensor]:
    """Samples `[n, 1]` whose value is their number."""
    return torch.arange(start, start + len(labels), dtype=torch.float32)[:, None], torch.tensor(labels)


def fed(exemplars: Exemplars, labels: Sequence[int], batch_size: int) -> Exemplars:
    for start in range(0, len(labels), batch_size):
        exemplars.add(*numbered(labels[start : start + batch_size], start))
    return exemplars


def kept(exemplars: Exemplars) -> list[int]:
    return exemplars.all()[0][:, 0].int().tolist()


def by_class(exemplars: Exemplars) -> dict[int, list[int]]:
    x, y = exemplars.all()
    return {c: sorted(x[y == c, 0].int().tolist()) for c in y.unique().tolist()}


def random_labels(num: int, num_classes: int, seed: int = 0) -> list[int]:
    return torch.randint(num_classes, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


class SharedRange(Reservoir):
    """The common mistake: all samples of a batch draw from the range that was there before it."""

    def _place(self, x: Tensor, labels: Sequence[int]) -> dict[int, int]:
        before, places = self._seen, {}
        for item, draw in enumerate(self._uniform(len(labels))):
            self._seen += 1
            slot = self._new_slot() if len(self) < self.capacity else int(draw * before)
            if slot < self.capacity:
                places[slot] = item
        return places


def deviation(counts: Sequence[int], repeats: int, share: float) -> float:
    """How far inclusion counts are from equal: a chi-square statistic with one freedom less than there are counts.

    Exemplars of one run exclude each other, so that the variance of a count is repeats * share * (1 - share).
    """
    n, expected = len(counts), repeats * share
    return (n - 1) / n * sum((count - expected) ** 2 for count in counts) / (expected * (1 - share))


def inclusions(policy: Callable[[int], Exemplars], labels: Sequence[int], batch_size: int, repeats: int) -> list[int]:
    counts = Counter(i for seed in range(repeats) for i in kept(fed(policy(seed), labels, batch_size)))
    return [counts[i] for i in range(len(labels))]


@pytest.mark.parametrize("batch_size", [3, 8, 48])
def test_reservoir_keeps_every_sample_with_the_same_probability(batch_size: int) -> None:
    counts = inclusions(lambda seed: Reservoir(6, seed=seed), [0] * 48, batch_size, 400)
    assert deviation(counts, 400, 6 / 48) < 82.7  # 99.9 % of chi-square with 47 freedoms


def test_a_range_shared_by_a_batch_would_be_found_out() -> None:
    counts = inclusions(lambda seed: SharedRange(6, seed=seed), [0] * 48, 8, 400)
    assert deviation(counts, 400, 6 / 48) > 82.7


def test_later_samples_of_a_batch_win_a_slot() -> None:
    class Colliding(Reservoir):
        def _uniform(self, num: int) -> list[float]:
            return [0.0] * num

    exemplars = fed(Colliding(3), [0] * 3, 3)
    exemplars.add(*numbered([0] * 5, 10))
    assert kept(exemplars) == [14, 1, 2]


def test_classes_keep_every_sample_of_theirs_with_the_same_probability() -> None:
    # three classes that come one after the other, so that the first gives up exemplars twice
    labels = [0] * 30 + [1] * 20 + [2] * 25 + [0] * 5
    counts = inclusions(lambda seed: ClassBalanced(9, seed=seed), labels, 7, 400)
    for c, critical in ((0, 65.3), (1, 43.8), (2, 51.2)):  # 99.9 % with 34, 19 and 24 freedoms
        rows = [i for i, label in enumerate(labels) if label == c]
        assert deviation([counts[i] for i in rows], 400, 3 / len(rows)) < critical


@every_policy
@pytest.mark.parametrize("batch_size", [3, 12, 100])
def test_the_first_samples_are_kept_while_there_is_room(policy: Policy, batch_size: int) -> None:
    labels = [0, 1, 2, 3] * 3
    assert sorted(kept(fed(policy(12), labels, batch_size))) == list(range(12))


@pytest.mark.parametrize("policy", [ClassBalanced, Ring, Herding])
@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_classes_with_enough_samples_are_within_one_of_each_other(policy: Policy, batch_size: int) -> None:
    labels = [0] * 60 + [1] * 5 + [0, 1, 2, 3] * 20 + [4] * 40 + random_labels(60, 6)
    exemplars = policy(20)
    seen = [0] * 6
    for start in range(0, len(labels), batch_size):
        batch = labels[start : start + batch_size]
        exemplars.add(*numbered(batch, start))
        seen = [count + batch.count(c) for c, count in enumerate(seen)]
        sizes = [exemplars.labels.tolist().count(c) for c in range(6)]
        assert sum(sizes) == min(20, sum(seen))
        # a class far below the largest has all its samples in it
        if batch_size == 1 or policy is not Herding:
            assert all(size >= max(sizes) - 1 or size == count for size, count in zip(sizes, seen, strict=True))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("policy", [ClassBalanced, Ring, Herding])
def test_room_per_class_is_filled_and_never_exceeded(policy: Policy) -> None:
    labels = [5] * 9 + [2] * 2 + [7] * 20
    exemplars = fed(policy(per_class=4), labels, 6)
    assert Counter(exemplars.labels.tolist()) == {5: 4, 2: 2, 7: 4}
    assert all(labels[i] == c for c, rows in by_class(exemplars).items() for i in rows)


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_ring_keeps_the_last_of_each_class(batch_size: int) -> None:
    labels = random_labels(90, 4) + [9] * 3
    exemplars = fed(Ring(22), labels, batch_size)
    for c, rows in by_class(exemplars).items():
        assert rows == [i for i, label in enumerate(labels) if label == c][-len(rows) :]
    assert len(exemplars) == 22


def herded(features: np.ndarray, num: int) -> list[int]:
    """The paper's algorithm on samples of one class, written out, with their mean as it is."""
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean = rows.mean(0)
    order: list[int] = []
    for k in range(1, num + 1):
        gaps = {
            i: float(np.linalg.norm(mean - (rows[order].sum(0) + rows[i]) / k))
            for i in range(len(rows))
            if i not in order
        }
        order.append(min(gaps, key=gaps.__getitem__))
    return order


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_herding_chooses_as_the_loop_and_drops_the_last() -> None:
    x = normal(40, 5)
    exemplars = Herding(12)
    exemplars.add(x, torch.zeros(40))
    order = herded(x.double().numpy(), 12)
    assert torch.equal(exemplars.all()[0], x[order])
    exemplars.add(normal(30, 5, seed=1), torch.ones(30))
    exemplars.add(normal(30, 5, seed=2), torch.full((30,), 2))
    stored, labels = exemplars.all()
    for c, seed in ((0, 0), (1, 1), (2, 2)):
        rows = normal(40 if c == 0 else 30, 5, seed=seed)
        expected = rows[herded(rows.double().numpy(), 4)]
        assert sorted(stored[labels == c].tolist()) == sorted(expected.tolist())


def test_herding_sees_features_of_raw_samples_and_keeps_the_samples() -> None:
    images = torch.randint(256, (20, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight = normal(12, 4)
    exemplars = Herding(5, extract=lambda x: x.flatten(1).float() @ weight)
    exemplars.add(images, torch.zeros(20))
    order = herded((images.flatten(1).double() @ weight.double()).numpy(), 5)
    assert torch.equal(exemplars.all()[0], images[order])


def test_a_class_that_comes_again_keeps_the_mean_of_all_its_samples() -> None:
    x = normal(400, 6)
    exemplars = Herding(40)
    for part in x.split(50):
        exemplars.add(part, torch.zeros(len(part)))
    unit = torch.nn.functional.normalize(x, dim=1)
    mean = torch.nn.functional.normalize(exemplars.all()[0], dim=1).mean(0)
    # the mean of 40 random samples is off by about sqrt(variance / 40)
    assert (mean - unit.mean(0)).norm() < 0.5 * (unit.var(0).sum() / 40).sqrt()


@every_policy
def test_samples_labels_and_more_stay_together_in_their_dtypes(policy: Policy) -> None:
    exemplars = policy(8)
    numbers = torch.arange(60)
    for part in numbers.split(9):
        images = part.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
        exemplars.add(images, part % 4, part.half()[:, None] / 2, part)
    x, y, logits, number = exemplars.all()
    assert [t.dtype for t in (x, y, logits, number)] == [torch.uint8, torch.int64, torch.float16, torch.int64]
    assert torch.equal(x, number.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2))
    assert torch.equal(y, number % 4)
    assert torch.equal(logits[:, 0], number.half() / 2)
    assert torch.equal(exemplars.labels, y)
    assert x.device == torch.device("cpu")


def test_exemplars_live_on_the_device_that_was_asked_for() -> None:
    exemplars = Reservoir(4, device="meta")
    exemplars.add(*numbered([0, 1]))
    assert {t.device.type for t in exemplars.all()} == {"meta"}


def test_gradients_do_not_flow_into_the_store() -> None:
    exemplars = Reservoir(4)
    exemplars.add(torch.ones(2, 3, requires_grad=True), torch.tensor([0, 1]))
    assert not exemplars.all()[0].requires_grad


@every_policy
def test_draws_are_different_exemplars_and_at_most_all(policy: Policy) -> None:
    exemplars = fed(policy(12), random_labels(60, 4), 7)
    num = len(exemplars)
    for wanted in (0, 1, num - 1, num, num + 5):
        x, y = exemplars.sample(wanted)
        assert len(set(x[:, 0].tolist())) == len(x) == len(y) == min(wanted, num)
        assert set(x[:, 0].int().tolist()) <= set(kept(exemplars))


def test_draws_are_uniform_and_do_not_change_what_is_kept() -> None:
    exemplars, undisturbed = fed(Reservoir(20), [0] * 20, 5), fed(Reservoir(20), [0] * 20, 5)
    counts = Counter(i for _ in range(600) for i in exemplars.sample(5)[0][:, 0].int().tolist())
    assert deviation([counts[i] for i in range(20)], 600, 5 / 20) < 43.8  # 99.9 % with 19 freedoms
    for store in (exemplars, undisturbed):
        store.add(*numbered([1] * 100, 20))
    assert kept(exemplars) == kept(undisturbed)


@every_policy
def test_a_restored_store_goes_on_bit_for_bit(policy: Policy) -> None:
    labels = random_labels(120, 4)
    one = fed(policy(10, seed=3), labels[:64], 8)
    one.sample(3)
    other = policy(10, seed=4)
    state: dict[str, Any] = one.state()
    # as a file would keep it: plain values through JSON with sorted keys
    state["policy"] = json.loads(json.dumps(state["policy"], sort_keys=True))
    other.restore(state)
    for start in range(64, 120, 8):
        for store in (one, other):
            store.add(*numbered(labels[start : start + 8], start))
        assert all(torch.equal(a, b) for a, b in zip(one.all(), other.all(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.sample(3), other.sample(3), strict=True))


@every_policy
def test_a_state_does_not_change_with_the_store(policy: Policy) -> None:
    exemplars = fed(policy(8), random_labels(40, 4), 8)
    state, again = exemplars.state(), policy(8)
    before = kept(exemplars)
    exemplars.add(*numbered(random_labels(40, 4, 1), 40))
    again.restore(state)
    assert kept(again) == before


def test_an_empty_store_can_be_kept_and_restored() -> None:
    exemplars = Reservoir(3)
    exemplars.restore(Reservoir(3).state())
    assert len(exemplars) == len(exemplars.labels) == 0
    with pytest.raises(FitError, match="there are no exemplars yet"):
        exemplars.sample(2)


def test_the_same_seed_keeps_the_same_and_another_does_not() -> None:
    first, again, other = (kept(fed(Reservoir(10, seed=seed), [0] * 200, 8)) for seed in (0, 0, 1))
    assert first == again != other


def test_an_empty_batch_changes_nothing() -> None:
    exemplars = fed(Ring(4), [0, 1, 0], 3)
    exemplars.add(torch.empty(0, 1), torch.empty(0))
    assert kept(exemplars) == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reservoir(0), "room for at least 1, got capacity 0"),
        (lambda: ClassBalanced(), "capacity in all or per_class, one of the two"),
        (lambda: Ring(5, per_class=2), "capacity in all or per_class, one of the two"),
        (lambda: Herding(per_class=0), "at least 1 of each class, got per_class 0"),
        (lambda: fed(ClassBalanced(2), [0, 1, 2], 3), "capacity of 2 cannot hold an exemplar of each of 3 classes"),
        (lambda: Reservoir(2).restore(fed(Reservoir(3), [0] * 3, 3).state()), "3 exemplars do not fit into a cap"),
        (lambda: Reservoir(2).add(torch.ones(3, 1), torch.ones(2)), r"same length, got \[3, 1\], \[2\]"),
    ],
)
def test_errors_say_what_does_not_fit(make: Callable[[], object], message: str) -> None:
    with pytest.raises(FitError, match=message):
        make()


@pytest.mark.parametrize("wrong", [(torch.ones(1, 2),), (torch.ones(1, 1).half(),), (torch.ones(1, 1), torch.ones(1))])
def test_samples_unlike_those_before_are_refused_and_change_nothing(wrong: tuple[Tensor, ...]) -> None:
    exemplars = fed(Reservoir(4), [0, 1], 2)
    with pytest.raises(FitError, match="exemplars are all alike: those before are"):
        exemplars.add(wrong[0], torch.zeros(1), *wrong[1:])
    assert kept(exemplars) == [0, 1]
