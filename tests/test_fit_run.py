"""The run folder: stopped anywhere and started again, a run ends with the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml

import petiole as pt
from fitting import make_model, make_task
from petiole.train import loop, steps
from petiole.train.run import Run
from petiole.train.steps import Steps

RECIPE = pt.Recipe(epochs=3, batch_size=5, lr=1e-2)
NUM_STEPS = 9
FILES = ("plugin.safetensors", "metrics.jsonl", "config.yaml")


def fit(out: Path, recipe: pt.Recipe = RECIPE, **settings: Any) -> pt.FitResult:
    """Starts the run afresh in all but its folder, as the same command does."""
    return loop.fit(make_model(), make_task(), recipe, out=out, progress=False, **settings)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole")
    fit(out)
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


@pytest.mark.parametrize(("step", "save_every"), [*((step, 0.0) for step in range(NUM_STEPS)), (1, 1e9), (8, 1e9)])
def test_run_that_dies_in_a_step_goes_on_to_the_same_bytes(
    step: int, save_every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", killer(torch.optim.AdamW.step, step))
        with pytest.raises(Killed):
            fit(tmp_path, save_every=save_every)
    taken = []
    take = Steps.take
    monkeypatch.setattr(Steps, "take", lambda self, step: taken.append(step) or take(self, step))
    fit(tmp_path)
    assert contents(tmp_path) == expected
    assert taken == list(range(step if save_every == 0 else 0, NUM_STEPS))


# one write of the configuration, one of the metrics, a state per step and one at the end, the plugin file
@pytest.mark.parametrize("write", range(2 + NUM_STEPS + 1 + 1))
def test_run_that_dies_while_writing_goes_on_to_the_same_bytes(
    write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killer(os.replace, write))
        with pytest.raises(Killed):
            fit(tmp_path, save_every=0)
    fit(tmp_path)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("epoch", range(3))
def test_run_that_dies_between_metrics_and_state_goes_on_to_the_same_bytes(
    epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    def die(self: Run, row: dict[str, float]) -> None:
        log(self, row)
        if row["epoch"] == epoch + 1:
            raise Killed

    log = Run.log
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die)
        with pytest.raises(Killed):
            fit(tmp_path, save_every=0)
    fit(tmp_path)
    assert contents(tmp_path) == expected


_DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
from fitting import make_model, make_task
import petiole as pt
from petiole.train.loop import fit

out, recipe = Path(sys.argv[1]), pt.Recipe(epochs=3, batch_size=5, lr=1e-2)
draw, num_kills = random.Random(0), 0
while True:
    child = os.fork()
    if not child:
        fit(make_model(), make_task(), recipe, out=out, progress=False, save_every=0)
        os._exit(0)
    # later and later, so that it ends: a run of this size takes a fraction of a second
    time.sleep(draw.uniform(0, 0.05 + 0.03 * num_kills))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        print(num_kills, os.WEXITSTATUS(status))
        break
    num_kills += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path, expected: dict[str, bytes]) -> None:
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


def test_finished_run_returns_its_result_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> NoReturn:
        raise AssertionError("trained or scored again")

    first, before = fit(tmp_path), contents(tmp_path)
    monkeypatch.setattr(Steps, "take", refuse)
    monkeypatch.setattr(steps, "evaluate", refuse)
    assert fit(tmp_path) == first
    assert contents(tmp_path) == before


def test_finished_run_leaves_the_kept_weights_in_the_model(tmp_path: Path) -> None:
    first, second = make_model(), make_model()
    for model in (first, second):
        loop.fit(model, make_task(), RECIPE, out=tmp_path, progress=False)
    state = second.task_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.task_state().items())


def test_lost_plugin_file_is_written_again(tmp_path: Path, expected: dict[str, bytes]) -> None:
    fit(tmp_path)
    (tmp_path / "plugin.safetensors").unlink()
    fit(tmp_path)
    assert contents(tmp_path) == expected


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that got Ctrl-C in the middle of its fifth step."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("somebody else handles Ctrl-C here")
    take = Steps.take

    def interrupt(self: Steps, step: int) -> tuple[float, int]:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return take(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, save_every=1e9)
    return tmp_path


def test_ctrl_c_finishes_the_step_and_saves_the_state(interrupted: Path) -> None:
    assert torch.load(interrupted / "state.pt", weights_only=True)["step"] == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_run_after_ctrl_c_goes_on_to_the_same_bytes(interrupted: Path, expected: dict[str, bytes]) -> None:
    fit(interrupted)
    assert contents(interrupted) == expected


def test_run_says_where_it_goes_on(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        loop.fit(make_model(), make_task(), RECIPE, out=interrupted)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "LoRA: goes on after step 5 of 9"
    assert "LoRA: this run is finished, there is nothing to train" in lines


def test_metrics_hold_a_line_per_epoch(tmp_path: Path) -> None:
    result = fit(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


def test_metrics_can_be_followed_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, take = [], Steps.take

    def look(self: Steps, step: int) -> tuple[float, int]:
        seen.append(len((tmp_path / "metrics.jsonl").read_text().splitlines()))
        return take(self, step)

    monkeypatch.setattr(Steps, "take", look)
    fit(tmp_path)
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_configuration_says_what_was_asked(tmp_path: Path) -> None:
    fit(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["recipe"]["lr"] == 1e-2
    asked = {"method": "lora", "rank": 2, "roles": ["q", "v"], "dropout": 0.2}
    assert config["plugins"][0].items() >= asked.items()
    assert config["task"]["classes"] == ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": pt.Recipe(epochs=4, batch_size=5, lr=0.1)}, "recipe.epochs 3 -> 4; recipe.lr 0.01 -> 0.1"),
        ({"plugin": pt.LoRA(rank=4, dropout=0.2)}, "plugins.0.rank 2 -> 4"),
        ({"plugin": pt.Linear()}, "plugins.0.method lora -> linear; plugins.0.rank 2 -> nothing; plugins.0.roles"),
        ({"task": make_task(num_train=14)}, "task.train.images 13 -> 14; task.train.labels"),
        ({"task": make_task(num_test=0)}, "task.test.images 7 -> nothing; task.test.labels"),
    ],
)
def test_other_settings_are_named_and_leave_the_run_alone(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    fit(tmp_path)
    before = contents(tmp_path)
    model, task = make_model(change.get("plugin")), change.get("task", make_task())
    with pytest.raises(pt.FitError) as caught:
        loop.fit(model, task, change.get("recipe", RECIPE), out=tmp_path, progress=False)
    assert str(caught.value).startswith(f"{tmp_path} holds a run with other settings ({message}")
    assert str(caught.value).endswith("choose another folder, or remove this one to start afresh")
    assert contents(tmp_path) == before


def test_other_backbone_weights_are_another_run(tmp_path: Path) -> None:
    fit(tmp_path)
    model = make_model()
    with torch.no_grad():
        model.backbone.norm.weight += 1
    with pytest.raises(pt.FitError, match=r"backbone\.fingerprint"):
        loop.fit(model, make_task(), RECIPE, out=tmp_path, progress=False)


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    fit(tmp_path)
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:1000])
    with pytest.raises(pt.FitError, match=r"state\.pt is damaged and cannot be continued: remove .* to start afresh"):
        fit(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "just words", "\x00"])
def test_damaged_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(pt.FitError, match=r"config\.yaml (cannot be read|is no configuration)"):
        fit(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == text


def test_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(pt.FitError, match=r"the run folder .*run cannot be made or used: File exists"):
        fit(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_full_disk_keeps_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    def full(source: object, target: Path) -> None:
        if Path(target).name == "state.pt" and Path(target).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(pt.FitError, match=r"state\.pt cannot be written: No space left on device"):
            fit(tmp_path, save_every=0)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))
    fit(tmp_path)
    assert contents(tmp_path) == expected


def test_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    run = Run(tmp_path)
    run.open({})
    with pytest.raises(pt.FitError, match=r"another process is training in .*: wait for it, or choose another folder"):
        Run(tmp_path).open({})
    run.close()
    other = Run(tmp_path)
    other.open({})
    other.close()


def test_remains_of_a_killed_write_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".petiole-0123456789ab.tmp").write_bytes(b"half")
    fit(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "state.pt"])
