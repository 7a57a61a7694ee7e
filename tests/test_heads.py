"""Heads on features: what every one of them promises, and that parts come to the whole where that is promised."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from petiole.continual import closed_form
from petiole.continual.closed_form import NCM, SLDA, ClosedForm, RandomRidge, Ridge
from petiole.continual.exemplars import ClassBalanced, Herding, Reservoir, Ring
from petiole.continual.heads import Head, HeadLearner
from petiole.continual.learner import run
from petiole.continual.replay import ER, ERACE, DERpp
from petiole.continual.streams import class_incremental
from petiole.continual.taer import TAER
from petiole.continual.trained import FineTune, Joint
from petiole.errors import FitError, TaskError

SHORT: dict[str, Any] = {"epochs": 2, "min_steps": 16, "batch_size": 8}
CLOSED: dict[str, Callable[[], ClosedForm]] = {
    "ncm": NCM,
    "ncm euclidean": lambda: NCM(metric="euclidean"),
    "slda": SLDA,
    "slda shrunk": lambda: SLDA(shrinkage=0.3),
    "ridge": Ridge,
    "ridge given": lambda: Ridge(ridge=0.1),
    "random ridge": lambda: RandomRidge(num_projections=24, seed=3),
}
# one line here gives a head all tests of the contract
HEADS: dict[str, Callable[[], Head]] = {
    **CLOSED,
    "fine-tune": lambda: FineTune(**SHORT),
    "joint": lambda: Joint(**SHORT),
    "er": lambda: ER(Reservoir(9), **SHORT),
    "er-ace": lambda: ERACE(Ring(per_class=2), **SHORT),
    "der++": lambda: DERpp(ClassBalanced(9), **SHORT),
    "taer": lambda: TAER(Herding(per_class=2), **SHORT),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
every_closed_form = pytest.mark.parametrize("make", CLOSED.values(), ids=CLOSED)

LABELS = (7, 2, 4, 11, 0)
D = 6


def clusters(labels: Sequence[int] = LABELS, seed: int = 0, num: int = 8, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Samples `[n, D]` around a corner of their own for each label, far from the origin, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels).repeat_interleave(num)[torch.randperm(num * len(labels), generator=generator)]
    corners = torch.zeros(12, D)
    for place, label in enumerate(LABELS):
        corners[label, place] = 3.0
    return 1 + corners[y] + noise * torch.randn(len(y), D, generator=generator), y


def learnt(head: Head, *groups: Sequence[int]) -> Head:
    for i, group in enumerate(groups):
        head.partial_fit(*clusters(group, seed=i))
    return head


def leaves(state: Any) -> list[Any]:
    """All values of a nested state; tensors as numpy arrays with their bits."""
    if isinstance(state, dict):
        return [leaf for key in sorted(state) for leaf in (key, *leaves(state[key]))]
    return [(state.dtype, state.shape, state.numpy().tobytes())] if isinstance(state, Tensor) else [repr(state)]


# every head


@every_head
def test_clear_clusters_are_learnt(make: Callable[[], Head]) -> None:
    x, y = clusters(seed=5)
    found = make().partial_fit(*clusters()).predict(x)
    assert found.dtype == torch.int64
    assert found.tolist() == y.tolist()


@every_head
def test_scores_stand_in_the_order_of_classes(make: Callable[[], Head]) -> None:
    head, (x, _) = learnt(make(), (4, 7), (0, 2)), clusters((0, 2, 4, 7), seed=9, noise=2)
    assert head.classes == [4, 7, 0, 2]
    expected = [head.classes[int(row.argmax())] for row in head.scores(x)]
    assert head.predict(x).tolist() == expected


@every_head
def test_absent_classes_are_never_predicted(make: Callable[[], Head]) -> None:
    head = learnt(make(), (11, 2))
    # around the origin too, where classes without samples would have their mean
    x = torch.cat([torch.zeros(1, D), torch.randn(200, D, generator=torch.Generator().manual_seed(1))])
    for among in (None, range(12), (2, 0, 5, 11)):
        assert set(head.predict(x, among).tolist()) == {2, 11}


@every_head
def test_answer_is_the_best_of_those_asked_among(make: Callable[[], Head]) -> None:
    head, (x, _) = learnt(make(), (4, 7), (0, 2)), clusters((0, 2, 4, 7), seed=9, noise=2)
    scores = head.scores(x)
    expected = [max((2, 7), key=lambda label: float(row[head.classes.index(label)])) for row in scores]
    assert head.predict(x, [7, 2, 2, 99]).tolist() == expected


@every_head
def test_nothing_known_is_minus_one(make: Callable[[], Head]) -> None:
    x, y = clusters()
    assert make().predict(x).tolist() == [-1] * len(x)
    assert make().partial_fit(x, y).predict(x, among=[1, 99]).tolist() == [-1] * len(x)


@every_head
def test_restored_head_goes_on_exactly(make: Callable[[], Head]) -> None:
    whole = learnt(make(), (4, 7))
    state = whole.state()
    kept = leaves(state)
    twins = [make(), make()]
    for head in (whole, *twins):
        if head is not whole:
            head.restore(state)
        head.partial_fit(*clusters((2, 7, 11), seed=1)).partial_fit(*clusters((0,), seed=2))
    assert leaves(state) == kept, "what was handed out must not change"
    assert leaves(twins[0].state()) == leaves(whole.state())
    assert leaves(twins[1].state()) == leaves(whole.state())
    x, _ = clusters(seed=7)
    assert torch.equal(twins[0].scores(x), whole.scores(x))


@every_head
def test_kinds_of_arrays_and_labels_mean_nothing(make: Callable[[], Head]) -> None:
    x, y = clusters()
    expected = make().partial_fit(x, y)
    frozen = x.numpy().copy()
    frozen.setflags(write=False)
    for features, labels in (
        (x.numpy(), y.numpy()),
        (frozen, y.tolist()),
        (x.numpy()[::-1][::-1], tuple(y.tolist())),
        (np.asfortranarray(x.numpy()), y.numpy().astype(np.uint8)),
        (x.clone().requires_grad_(), y.to(torch.int32)),
    ):
        head = make().partial_fit(features, labels)
        assert leaves(head.state()) == leaves(expected.state())
        assert torch.equal(head.predict(features), expected.predict(x))


@every_head
def test_half_precision_is_the_numbers_it_holds(make: Callable[[], Head]) -> None:
    x, y = clusters()
    half, single = make().partial_fit(x.half(), y), make().partial_fit(x.half().float(), y)
    assert torch.equal(half.scores(x.half()), single.scores(x.half().float()))


@every_head
def test_double_precision_answers_alike(make: Callable[[], Head]) -> None:
    x, y = clusters()
    single, double = make().partial_fit(x, y), make().partial_fit(x.double(), y)
    assert double.scores(x.double()).dtype == torch.float64
    # float32 rounds to 6e-8, which training of some ten steps and random features amplify
    torch.testing.assert_close(single.scores(x).double(), double.scores(x.double()), rtol=1e-4, atol=1e-4)


@every_head
def test_whole_numbers_are_features_too(make: Callable[[], Head]) -> None:
    x, y = clusters()
    whole = (20 * x).round().to(torch.int16)
    assert leaves(make().partial_fit(whole, y).state()) == leaves(make().partial_fit(whole.float(), y).state())
    assert make().partial_fit(whole, y).predict(whole).tolist() == y.tolist()


@every_head
def test_inference_mode_means_nothing(make: Callable[[], Head]) -> None:
    expected = learnt(make(), (4, 7), (2, 0))
    with torch.inference_mode():
        head = learnt(make(), (4, 7))
    assert leaves(head.partial_fit(*clusters((2, 0), seed=1)).state()) == leaves(expected.state())


@every_head
def test_one_sample_a_class_is_enough(make: Callable[[], Head]) -> None:
    head, (x, y) = make(), clusters(num=1)
    for part in range(len(y)):
        head.partial_fit(x[part : part + 1], y[part : part + 1])
        assert set(head.predict(x).tolist()) <= set(y[: part + 1].tolist())
    assert torch.isfinite(head.scores(x)).all()


@every_head
def test_nothing_more_teaches_nothing(make: Callable[[], Head]) -> None:
    head = learnt(make(), (4, 7))
    before = leaves(head.state())
    assert head.partial_fit(torch.zeros(0, D), []) is head
    assert leaves(head.state()) == before


X, Y = torch.ones(2, D), [0, 1]


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (X[0], Y, FitError, r"a head takes features \[n, d\] and labels \[n\], got \[6\] and \[2\]"),
        (X[:, :, None], Y, FitError, r"a head takes features \[n, d\] and labels \[n\], got \[2, 6, 1\] and \[2\]"),
        (X, [0, 1, 2], FitError, r"a head takes features \[n, d\] and labels \[n\], got \[2, 6\] and \[3\]"),
        (X[:, :4], Y, FitError, "the head has learnt from features of width 6, these have 4"),
        (X * torch.nan, Y, FitError, "a feature is not finite: look at the images and at the backbone's precision"),
        (X / 0, Y, FitError, "a feature is not finite"),
        (X, [0, -2], TaskError, "labels are integers from 0, got -2"),
        (X, [0.0, 1.0], TaskError, r"labels are integers in one row, got float64 of shape \[2\]"),
        (X, [[0], [1]], TaskError, r"labels are integers in one row, got int64 of shape \[2, 1\]"),
    ],
)
@every_head
def test_samples_that_do_not_fit_are_refused_and_change_nothing(
    make: Callable[[], Head], features: Tensor, labels: Any, error: type[Exception], message: str
) -> None:
    head = learnt(make(), (4, 7))
    before = leaves(head.state())
    with pytest.raises(error, match=message):
        head.partial_fit(features, labels)
    assert leaves(head.state()) == before


@every_head
def test_questions_that_do_not_fit_are_refused(make: Callable[[], Head]) -> None:
    with pytest.raises(FitError, match=r"the head answers features \[n, 6\], got \[2, 4\]"):
        learnt(make(), (4, 7)).predict(X[:, :4])
    with pytest.raises(FitError, match=r"the head answers features \[n, d\], got \[6\]"):
        make().predict(X[0])


# heads as learners


@every_head
def test_learner_is_its_head_on_the_streams_samples(make: Callable[[], Head]) -> None:
    stream = class_incremental(clusters(), groups=[(7, 2), (4, 11, 7), (0,)], batch_size=5)
    learner, head = HeadLearner(make(), extract=lambda x: 2 * x), make()
    list(run(stream, learner))
    for experience in stream:
        batches = [(2 * x, y) for x, y in experience.batches()]
        if head.takes_experiences:
            batches = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
        for x, y in batches:
            head.partial_fit(x, y)
    assert learner.needs_boundaries == head.takes_experiences
    assert leaves(learner.head.state()) == leaves(head.state())
    x, _ = clusters(seed=4)
    assert torch.equal(learner.predict(x, (7, 0)), head.predict(2 * x, (7, 0)))


@every_head
def test_learner_stopped_in_an_experience_goes_on_exactly(make: Callable[[], Head]) -> None:
    stream = class_incremental(clusters(), groups=[(7, 2), (4, 11)], batch_size=5)
    whole, first, second = (HeadLearner(make()) for _ in range(3))
    list(run(stream, whole))
    for event in run(stream, first):
        if (event.experience, event.step) == (1, 2):
            break
    second.restore(first.state())
    list(run(stream, second, start=(1, 2)))
    assert leaves(second.state()) == leaves(whole.state())


def test_head_with_epochs_of_its_own_refuses_those_of_a_stream() -> None:
    stream = class_incremental(clusters(), num_experiences=2, epochs=3)
    with pytest.raises(
        FitError, match=r"TAER makes its own epochs .*: the stream must bring them once, it has epochs=3"
    ):
        list(run(stream, HeadLearner(HEADS["taer"]())))


# heads in closed form


@every_closed_form
def test_parts_in_any_order_come_to_the_whole(make: Callable[[], ClosedForm], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters((*LABELS, 7, 7, 0), noise=2)
    x = x.double()
    whole = make().partial_fit(x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    by_task = y.argsort(stable=True, descending=True)
    # also with sums that are taken in more than one go
    monkeypatch.setattr(closed_form, "NUM_AT_ONCE", 3)
    for rows, size in ((order, 1), (order, 7), (by_task, 4), (by_task.flip(0), 11)):
        head = make()
        for part in rows.split(size):
            head.partial_fit(x[part], y[part])
        columns = [head.classes.index(c) for c in whole.classes]
        # sums in float64, 1e-16, through systems of a condition number below 1e6
        torch.testing.assert_close(head.scores(x)[:, columns], whole.scores(x), rtol=1e-9, atol=1e-9)
