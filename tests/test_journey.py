"""A way through a stream: stopped anywhere and started again, it ends with the same learner."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import yaml

import petiole as pt
from fitting import make_split
from petiole.continual.closed_form import NCM, SLDA, Ridge
from petiole.continual.exemplars import ClassBalanced
from petiole.continual.heads import HeadLearner
from petiole.continual.journey import LEARNER, Journey, carry, taken_up
from petiole.continual.learner import run
from petiole.continual.saving import inspect_learner, load_learner
from petiole.continual.streams import Stream, class_incremental, smooth
from petiole.continual.taer import TAER
from petiole.train.run import Run

NUM_EVENTS = 12  # three experiences of three steps, and the end of each


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(54) % 6
    return torch.randn(54, 4, generator=torch.Generator().manual_seed(seed)) + labels[:, None], labels


def stream(**settings: Any) -> Stream:
    return class_incremental(data(), data(1), **{"num_experiences": 3, "batch_size": 7, **settings})


def learner(**settings: Any) -> HeadLearner:
    """One that draws, replays and waits for the end of an experience."""
    return HeadLearner(TAER(ClassBalanced(9), **{"epochs": 2, "batch_size": 6, **settings}))


def go(out: Path, **settings: Any) -> Journey:
    return carry(stream(), learner(), out, progress=False, **settings)


def contents(out: Path) -> dict[str, Any]:
    """All that a run leaves, but for the time it took."""
    info = inspect_learner(out / LEARNER)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert info.journey is not None
    assert [dict(row) for row in info.journey["history"]] == rows
    timeless = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    state = {name: (t.tolist() if isinstance(t, torch.Tensor) else t) for name, t in leaves(out)}
    return {"config": (out / "config.yaml").read_text(), "rows": timeless, "state": state, "metrics": info.metrics}


def leaves(out: Path) -> list[tuple[str, Any]]:
    from petiole.continual.saving import leaves as all_leaves

    return list(all_leaves(load_learner(out / LEARNER).state()))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole")
    go(out)
    return contents(out)


class Killed(BaseException):
    """Stands in for the end of the process: nothing catches it."""


def killer(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Returns a function that dies in its call number `at`, before it does anything."""
    count = iter(range(at))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            raise Killed
        return function(*args, **kwargs)

    return call


# the result


def test_result_is_that_of_the_plain_loop(tmp_path: Path) -> None:
    *_, last = run(stream(), learner())
    found = go(tmp_path)
    assert repr(found.matrix) == repr(last.matrix)
    assert found.metrics["final_average"] == last.matrix.final_average()


def test_history_has_a_row_for_each_experience(tmp_path: Path) -> None:
    found = go(tmp_path)
    for i, row in enumerate(found.history):
        assert (row["experience"], row["num_classes"], row["num_steps"]) == (i, 2 * i + 2, 3)
    assert [row["average_accuracy"] for row in found.history] == found.matrix.averages()
    assert found.history[1]["accuracy.0"] == found.matrix.rows[1][0]
    assert "accuracy.2" not in found.history[1]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.history
    assert found.metrics["seconds"] == pytest.approx(sum(row["seconds"] for row in found.history))


def test_learner_in_the_folder_is_a_classifier_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: HeadLearner, x: torch.Tensor, y: torch.Tensor) -> None:
        if (tmp_path / LEARNER).exists():
            seen.append(load_learner(tmp_path / LEARNER).predict(data()[0]).unique().tolist())
        observe(self, x, y)

    seen: list[list[int]] = []
    observe = HeadLearner.observe
    monkeypatch.setattr(HeadLearner, "observe", look)
    go(tmp_path, save_every=0)
    assert seen[0] == [-1]
    assert set(seen[3]) <= {0, 1}
    assert len(seen) == 8


def test_stream_without_boundaries_can_be_carried_too(tmp_path: Path) -> None:
    way = smooth(data(), data(1), sigma=0.1, num_checkpoints=3)
    found = carry(way, HeadLearner(SLDA()), tmp_path, progress=False)
    assert len(found.history) == 3
    assert repr(carry(way, HeadLearner(SLDA()), tmp_path, progress=False)) == repr(found)


def test_stream_without_test_samples_has_no_accuracies(tmp_path: Path) -> None:
    found = carry(class_incremental(data(), num_experiences=2), HeadLearner(NCM()), tmp_path, progress=False)
    assert [*found.metrics] == ["seconds"]
    assert "average_accuracy" not in found.history[0]


# going on


@pytest.mark.parametrize(("step", "save_every"), [*((step, 0.0) for step in range(9)), (1, 1e9), (4, 1e9), (8, 1e9)])
def test_run_that_dies_in_a_step_goes_on_to_the_same_learner(
    step: int, save_every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HeadLearner, "observe", killer(HeadLearner.observe, step))
        with pytest.raises(Killed):
            go(tmp_path, save_every=save_every)
    taken = []
    observe = HeadLearner.observe
    monkeypatch.setattr(HeadLearner, "observe", lambda self, x, y: taken.append(1) or observe(self, x, y))
    go(tmp_path)
    assert contents(tmp_path) == expected
    # without the clock, a learner is written at the end of an experience
    assert len(taken) == 9 - (step if save_every == 0 else step // 3 * 3)


# one write of the configuration, one of the metrics, one of the learner after each event
@pytest.mark.parametrize("write", range(2 + NUM_EVENTS))
def test_run_that_dies_while_writing_goes_on_to_the_same_learner(
    write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killer(os.replace, write))
        with pytest.raises(Killed):
            go(tmp_path, save_every=0)
    go(tmp_path)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("experience", range(3))
def test_run_that_dies_between_metrics_and_learner_goes_on_to_the_same_learner(
    experience: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    def die(self: Run, row: dict[str, float]) -> None:
        log(self, row)
        if row["experience"] == experience:
            raise Killed

    log = Run.log
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die)
        with pytest.raises(Killed):
            go(tmp_path, save_every=0)
    go(tmp_path)
    assert contents(tmp_path) == expected


_DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import test_journey
from test_journey import go

out, draw, num_kills = Path(sys.argv[1]), random.Random(0), 0
while True:
    child = os.fork()
    if not child:
        go(out, save_every=0)
        os._exit(0)
    # later and later, so that it ends: a run of this size takes a fraction of a second
    time.sleep(draw.uniform(0, 0.1 + 0.1 * num_kills))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        print(num_kills, os.WEXITSTATUS(status))
        break
    num_kills += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_run_killed_at_random_moments_ends_with_the_same_learner(tmp_path: Path, expected: dict[str, Any]) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_kills, code = map(int, done.stdout.split())
    assert num_kills >= 3
    assert code == 0
    assert contents(tmp_path) == expected
    assert not list(tmp_path.glob(".petiole-*"))


def test_finished_run_returns_its_result_without_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> NoReturn:
        raise AssertionError("learnt or scored again")

    first, before = go(tmp_path), (tmp_path / LEARNER).read_bytes()
    for name in ("observe", "predict"):
        monkeypatch.setattr(HeadLearner, name, refuse)
    assert repr(go(tmp_path)) == repr(first)
    assert (tmp_path / LEARNER).read_bytes() == before


def test_finished_run_leaves_what_was_learnt_in_the_learner(tmp_path: Path) -> None:
    go(tmp_path)
    again = learner()
    carry(stream(), again, tmp_path, progress=False)
    kept = load_learner(tmp_path / LEARNER)
    assert torch.equal(again.predict(data()[0]), kept.predict(data()[0]))
    assert again.head.classes == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that got Ctrl-C in the middle of its fifth step."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("somebody else handles Ctrl-C here")
    observe, count = HeadLearner.observe, iter(range(4))

    def interrupt(self: HeadLearner, x: torch.Tensor, y: torch.Tensor) -> None:
        if next(count, None) is None:
            signal.raise_signal(signal.SIGINT)
        observe(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(HeadLearner, "observe", interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path, save_every=1e9)
    return tmp_path


def test_ctrl_c_finishes_the_step_and_saves_the_learner(interrupted: Path) -> None:
    journey = inspect_learner(interrupted / LEARNER).journey
    assert journey is not None
    assert (journey["experience"], journey["step"]) == (1, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_run_after_ctrl_c_goes_on_to_the_same_learner(interrupted: Path, expected: dict[str, Any]) -> None:
    go(interrupted)
    assert contents(interrupted) == expected


def test_run_says_where_it_goes_on(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        carry(stream(), learner(), interrupted)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "TAER: goes on after step 5 of 9"
    assert "TAER: this run is finished, there is nothing to learn" in lines
    assert any("experience 2 of 3: 4 classes, average accuracy" in line for line in lines)


def test_time_of_a_stopped_run_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    now = [0.0]

    def observe(self: HeadLearner, x: torch.Tensor, y: torch.Tensor) -> None:
        now[0] += 10
        if now[0] == 50:
            raise Killed
        before(self, x, y)

    before = HeadLearner.observe
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(HeadLearner, "observe", observe)
    with pytest.raises(Killed):
        go(tmp_path, save_every=0)
    # the step that died took 10 s, and nobody wrote them down
    assert [row["seconds"] for row in go(tmp_path).history] == [30, 30, 30]


# what is asked


def test_configuration_says_what_was_asked(tmp_path: Path) -> None:
    go(tmp_path, about={"data": "made up"})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["learner"]["settings"]["head"]["part"] == "TAER"
    assert config["learner"]["settings"]["head"]["settings"]["exemplars"]["settings"]["capacity"] == 9
    assert config["stream"]["experiences"][1]["classes"] == [2, 3]
    assert config["data"] == "made up"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learner": learner(lr=0.3)}, "learner.settings.head.settings.lr 0.1 -> 0.3"),
        ({"learner": HeadLearner(Ridge())}, "learner.settings.head.part TAER -> Ridge"),
        ({"stream": stream(batch_size=8)}, "stream.experiences.0.batch_size 7 -> 8"),
        ({"stream": stream(order=1)}, r"stream.experiences.0.classes \[0, 1\] ->"),
        ({"stream": class_incremental(data(), num_experiences=3, batch_size=7)}, "stream.experiences.0.test 18 -> 0"),
        ({"is_task_known": True}, "is_task_known false -> true"),
        ({"about": {"data": "other"}}, "data nothing -> other"),
    ],
)
def test_other_settings_are_named_and_leave_the_run_alone(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    go(tmp_path)
    before = (tmp_path / LEARNER).read_bytes()
    asked = {"stream": stream(), "learner": learner(), **change}
    with pytest.raises(pt.FitError, match=rf"holds a run with other settings \(.*{message}.*\): choose another folder"):
        carry(asked.pop("stream"), asked.pop("learner"), tmp_path, progress=False, **asked)
    assert (tmp_path / LEARNER).read_bytes() == before


def test_other_beginning_is_another_run(tmp_path: Path) -> None:
    go(tmp_path)
    taught = learner()
    list(run(stream(), taught))
    with pytest.raises(pt.FitError, match="begins "):
        carry(stream(), taught, tmp_path, progress=False)


def test_foreign_learner_in_the_folder_is_refused(tmp_path: Path) -> None:
    from petiole.continual.saving import save_learner

    save_learner(learner(), tmp_path / LEARNER, classes=stream().classes)
    with pytest.raises(pt.FitError, match="is no learner of a run: choose another folder"):
        go(tmp_path)


def test_damaged_learner_is_refused(tmp_path: Path) -> None:
    go(tmp_path)
    (tmp_path / LEARNER).write_bytes((tmp_path / LEARNER).read_bytes()[:500])
    with pytest.raises(pt.PluginFileError, match="is truncated"):
        go(tmp_path)


def test_what_does_not_fit_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(pt.FitError, match="must be told where experiences begin"):
        carry(smooth(data()), learner(), tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    other = Run(tmp_path)
    other.claim({})
    with pytest.raises(pt.FitError, match="another process is training in"):
        go(tmp_path)
    other.close()


# taking up more


def named(classes: tuple[str, ...], num_images: int, seed: int) -> pt.Task:
    split = make_split(num_images, seed)
    return pt.Task("colours", classes, split, None, make_split(9, seed + 50))


def test_known_names_keep_their_labels_and_new_ones_come_behind() -> None:
    task = taken_up(named(("blue", "pink", "red"), 9, 0), ("red", "green", "blue"))
    assert task.classes == ("red", "green", "blue", "pink")
    labels = make_split(9, 0).labels
    assert task.train.labels.tolist() == np.array([2, 3, 0])[labels].tolist()
    assert task.test is not None
    assert task.val is None
    assert task.test.labels.tolist() == np.array([2, 3, 0])[make_split(9, 50).labels].tolist()


def test_finished_learner_takes_up_a_further_experience(tmp_path: Path) -> None:
    x, y = data()
    first, more = y < 4, y >= 3
    carry(
        class_incremental((x[first], y[first]), num_experiences=2), HeadLearner(NCM()), tmp_path / "a", progress=False
    )
    # class 3 comes again, 4 and 5 are new
    week = class_incremental((x[more], y[more]), num_experiences=1)
    again = load_learner(tmp_path / "a" / LEARNER)
    carry(week, again, tmp_path / "b", progress=False)
    # all in one go, in the same order of batches
    whole = HeadLearner(NCM())
    for part in (
        (x[first & (y < 2)], y[first & (y < 2)]),
        (x[first & (y >= 2)], y[first & (y >= 2)]),
        (x[more], y[more]),
    ):
        whole.observe(*part)
    found = load_learner(tmp_path / "b" / LEARNER)
    assert torch.equal(found.predict(x), whole.predict(x))
    assert set(found.predict(x).tolist()) == set(range(6))


def test_metrics_leave_out_what_is_not_known(tmp_path: Path) -> None:
    found = carry(stream(num_experiences=1), HeadLearner(NCM()), tmp_path, progress=False)
    assert "forgetting_since_best" not in found.metrics
    assert not any(math.isnan(value) for value in found.metrics.values())
