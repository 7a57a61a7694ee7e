"""The loop that leads a learner: who is called when, what is scored, and how it goes on."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import petiole as pt
from petiole.continual.learner import Event, Learner, accuracy, run
from petiole.continual.samples import Arrays
from petiole.continual.streams import Stream, class_incremental, smooth


class Rote(Learner):
    """Knows by heart the label of every input it has seen, and writes down what it is asked."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.calls: list[tuple[str, Any]] = []

    def begin(self, experience: Any) -> None:
        self.calls.append(("begin", experience.index))

    def observe(self, x: Tensor, y: Tensor) -> None:
        self.calls.append(("observe", tuple(x.tolist())))
        self.known |= dict(zip(x.tolist(), y.tolist(), strict=True))

    def end(self, experience: Any) -> None:
        self.calls.append(("end", experience.index))

    def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
        self.calls.append(("predict", among))
        found = [self.known.get(i, -1) for i in x.tolist()]
        return torch.tensor([label if among is None or label in among else -1 for label in found])

    def state(self) -> dict[str, Any]:
        return {"known": {str(k): v for k, v in self.known.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.known = {int(k): v for k, v in state["known"].items()}


class Bounded(Rote):
    """One that must be told where experiences end."""

    needs_boundaries = True


def numbered(num_samples: int = 12, num_classes: int = 6) -> tuple[Tensor, Tensor]:
    rows = torch.arange(num_samples)
    return rows, rows % num_classes


def three(batch_size: int = 3, epochs: int = 1) -> Stream:
    return class_incremental(numbered(), numbered(), num_experiences=3, batch_size=batch_size, epochs=epochs)


def same(first: Any, second: Any) -> bool:
    """Whether matrices or events agree, nan with nan."""
    return repr(first) == repr(second)


def test_learner_is_told_in_order() -> None:
    learner = Rote()
    list(run(three(), learner))
    told = [name if name != "begin" and name != "end" else (name, i) for name, i in learner.calls]
    first = [("begin", 0), "observe", "observe", ("end", 0), "predict"]
    second = [("begin", 1), "observe", "observe", ("end", 1), "predict", "predict"]
    assert told[:11] == first + second
    assert told[11:] == [("begin", 2), "observe", "observe", ("end", 2), "predict", "predict", "predict"]


def test_stream_without_boundaries_tells_none() -> None:
    learner = Rote()
    list(run(smooth(numbered(), numbered(), num_checkpoints=3), learner))
    assert {name for name, _ in learner.calls} == {"observe", "predict"}


def test_every_step_and_every_experience_is_an_event() -> None:
    events = list(run(three(epochs=2), Rote()))
    places = [(e.experience, e.step, e.num_steps, e.matrix is None) for e in events]
    each = [(1, 4, True), (2, 4, True), (3, 4, True), (4, 4, True), (4, 4, False)]
    assert places == [(i, *place) for i in range(3) for place in each]


def test_event_is_yielded_before_the_next_step() -> None:
    learner = Rote()
    for event in run(three(), learner):
        assert sum(name == "observe" for name, _ in learner.calls) == 2 * event.experience + event.step


def test_rote_learner_is_right_on_what_it_met() -> None:
    *_, last = run(three(), Rote())
    values = last.matrix.values.tolist()
    assert values[2] == [1.0, 1.0, 1.0]
    assert values[0][0] == 1.0
    assert math.isnan(values[0][1])
    assert last.matrix.counts == [4, 4, 4]
    assert last.matrix.columns == ["0", "1", "2"]


def test_looking_ahead_scores_what_is_to_come() -> None:
    *_, last = run(three(), Rote(), looks_ahead=True)
    assert last.matrix.values.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert last.matrix.forward_transfer([0.0] * 3) == 0.0


def test_known_task_is_told_with_its_samples() -> None:
    learner = Rote()
    list(run(three(), learner, is_task_known=True))
    assert [among for name, among in learner.calls if name == "predict"][-3:] == [(0, 1), (2, 3), (4, 5)]


def test_stream_without_boundaries_is_scored_by_class() -> None:
    *_, last = run(smooth(numbered(), numbered(), sigma=0, num_checkpoints=3, batch_size=4), Rote())
    assert last.matrix.columns == ["0", "1", "2", "3", "4", "5"]
    assert last.matrix.met == [0, 0, 1, 1, 2, 2]
    assert last.matrix.values[1].nan_to_num(-1).tolist() == [1, 1, 1, 1, -1, -1]


def test_stream_without_test_samples_has_a_matrix_without_columns() -> None:
    *_, last = run(class_incremental(numbered(), num_experiences=2), Rote())
    assert last.matrix.values.shape == (2, 0)


def test_matrix_of_an_earlier_event_stays_as_it_was() -> None:
    matrices = [event.matrix for event in run(three(), Rote()) if event.matrix is not None]
    assert [len(matrix.rows) for matrix in matrices] == [1, 2, 3]


def test_scores_do_not_depend_on_how_many_are_scored_at_once() -> None:
    found = [list(run(three(), Rote(), test_batch_size=size))[-1].matrix for size in (1, 3, 100)]
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_accuracy_of_nothing_is_nan() -> None:
    assert math.isnan(accuracy(Rote(), Arrays(torch.zeros(0), [])))


def test_time_is_that_of_the_learner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Slow(Rote):
        def begin(self, experience: Any) -> None:
            now[0] += 100

        def observe(self, x: Tensor, y: Tensor) -> None:
            now[0] += 10

        def end(self, experience: Any) -> None:
            now[0] += 1

        def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
            now[0] += 1000
            return torch.zeros(len(x), dtype=torch.int64)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert [event.seconds for event in run(three(), Slow())] == [110, 120, 121] * 3


# going on


@pytest.mark.parametrize("cut", range(15))
def test_restored_learner_goes_on_exactly(cut: int) -> None:
    whole = list(run(three(epochs=2), Rote()))
    learner, matrix, start = Rote(), None, (0, 0)
    for _, event in zip(range(cut), run(three(epochs=2), learner), strict=False):
        matrix = event.matrix or matrix
        start = (event.experience, event.step) if event.matrix is None else (event.experience + 1, 0)
    again = Rote()
    again.restore(learner.state())
    rest = list(run(three(epochs=2), again, matrix=matrix, start=start))

    def plain(events: list[Event]) -> list[Any]:
        return [(e.experience, e.step, repr(e.matrix)) for e in events]

    assert plain(rest) == plain(whole[cut:])
    begun = [i for name, i in again.calls if name == "begin"]
    assert begun == [i for i in range(3) if (i, 0) >= start], "an experience that has begun is not begun again"


def test_learner_that_goes_on_without_a_matrix_leaves_earlier_rows_out() -> None:
    *_, last = run(three(), Rote(), start=(2, 0))
    assert last.matrix.values[:2].isnan().all()
    assert last.matrix.final_average() == pytest.approx(1 / 3)


def test_start_behind_the_last_experience_has_nothing_to_do() -> None:
    *_, last = run(three(), Rote())
    assert list(run(three(), Rote(), matrix=last.matrix, start=(3, 0))) == []


# what is refused, at the call and not at the first event


def test_learner_that_needs_boundaries_is_refused_without() -> None:
    with pytest.raises(pt.FitError, match="Bounded must be told where experiences begin and end: this stream has none"):
        run(smooth(numbered()), Bounded())


def test_tasks_cannot_be_known_without_boundaries() -> None:
    with pytest.raises(pt.FitError, match="a stream without boundaries has no tasks that could be known"):
        run(smooth(numbered()), Rote(), is_task_known=True)


@pytest.mark.parametrize("start", [(-1, 0), (4, 0), (3, 1), (0, 3), (1, -1)])
def test_start_outside_the_stream_is_refused(start: tuple[int, int]) -> None:
    message = f"there is no step {start[1]} in experience {start[0]} of this stream of 3 experiences"
    with pytest.raises(pt.FitError, match=message):
        run(three(), Rote(), start=start)


def test_matrix_of_another_moment_is_refused() -> None:
    *_, last = run(three(), Rote())
    with pytest.raises(pt.FitError, match="after 1 experiences a matrix has as many rows, this one has 3"):
        run(three(), Rote(), matrix=last.matrix, start=(1, 0))
