"""The search for settings: what it chooses, what it may see, and that it goes on where it was stopped."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import yaml

import petiole as pt
from fitting import CLASSES, adapt, fit, make_split, make_task, vit
from petiole import joining
from petiole.plugins import METHODS, method
from petiole.tasks import Split
from petiole.train import steps as steps_file
from petiole.train.evaluate import Scores
from petiole.train.grids import GRIDS, RECIPE_AXES, combinations, known_axes, papers_grid, slug, words
from petiole.train.record import Candidate, Record, make_room
from petiole.train.searching import SearchResult, search
from petiole.train.steps import Steps

RECIPE = pt.Recipe(epochs=2, batch_size=5, lr=1e-2)
GRID = {"rank": [2, 1], "scale": [1.0, 10.0]}
RANKS = {"rank": [1, 2]}
NUM_STEPS = 6  # of one candidate


def find(grid: dict[str, Any] | None = None, task: pt.Task | None = None, **settings: Any) -> SearchResult:
    """Searches afresh in all but its folder, as the same command does."""
    task = task or make_task()
    return search(vit(), "fact", task, grid or GRID, **{"recipe": RECIPE, "progress": False, **settings})


def timeless(found: SearchResult) -> list[Candidate]:
    return [replace(candidate, seconds=0.0) for candidate in found.candidates]


def by_hand(settings: dict[str, Any], task: pt.Task, recipe: pt.Recipe = RECIPE) -> tuple[float, int]:
    """Validation accuracy after the last epoch, and the number of trained parameters."""
    model = adapt(vit(), method("fact", **settings), classes=task.classes)
    result = fit(model, task, replace(recipe, select="last"), progress=False)
    return result.history[-1]["val_accuracy"], sum(p.numel() for _, p in model.trained())


@pytest.fixture(scope="module")
def whole() -> list[Candidate]:
    """What a search of two ranks comes to that nothing interrupts."""
    return timeless(find(RANKS))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of training that are taken, by number."""
    steps: list[int] = []
    take = Steps.take
    monkeypatch.setattr(Steps, "take", lambda self, step: steps.append(step) or take(self, step))
    return steps


# what it chooses


def test_choice_equals_a_plain_loop_of_fits() -> None:
    task = make_task(num_val=30)
    found = find(task=task)
    settings = [{"rank": rank, "scale": scale} for rank in (2, 1) for scale in (1.0, 10.0)]
    expected = [by_hand(each, task) for each in settings]
    assert [candidate.settings for candidate in found.candidates] == settings
    assert [(c.val_accuracy, c.trained_parameters) for c in found.candidates] == expected
    assert found.chosen.settings == settings[min(range(4), key=lambda i: (-expected[i][0], expected[i][1], i))]
    assert len({accuracy for accuracy, _ in expected}) > 1  # else anything would do


def test_field_of_the_recipe_is_searched_and_comes_back_in_the_recipe() -> None:
    task = make_task(num_val=30)
    found = find({"lr": [1e-4, 0.1], "rank": [2]}, task)
    expected = [by_hand({"rank": 2}, task, replace(RECIPE, lr=lr))[0] for lr in (1e-4, 0.1)]
    assert [candidate.val_accuracy for candidate in found.candidates] == expected
    assert expected[0] != expected[1]
    assert found.recipe == replace(RECIPE, lr=(1e-4, 0.1)[int(np.argmax(expected))])


def test_plugin_has_the_chosen_settings_and_serves_one_model_each() -> None:
    found = find({"rank": [2], "scale": [10.0], "lr": [1e-2]})
    first, second = found.plugin(), found.plugin()
    assert first is not second
    assert first.settings() == pt.FacT(rank=2, scale=10.0).settings()


def test_of_equal_candidates_the_smallest_is_chosen_then_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_file, "evaluate", lambda model, pixels, world, seen=None: Scores(0.5, 0.5, 6))
    assert find().chosen.settings == {"rank": 1, "scale": 1.0}


def test_candidate_is_scored_once_after_its_last_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.25, 0.75])
    monkeypatch.setattr(steps_file, "evaluate", lambda model, pixels, world, seen=None: Scores(next(scores), 0, 6))
    found = find(RANKS, recipe=replace(RECIPE, epochs=4, select="best", eval_every=1))
    assert [candidate.val_accuracy for candidate in found.candidates] == [0.25, 0.75]
    assert (found.recipe.epochs, found.recipe.select, found.recipe.eval_every) == (4, "best", 1)


def test_candidates_may_be_shorter_than_the_recipe(taken: list[int]) -> None:
    found = find(RANKS, epochs=1)
    assert taken == [0, 1, 2] * 2
    assert found.recipe == RECIPE
    assert found.candidates[0].val_accuracy == by_hand({"rank": 1}, make_task(), replace(RECIPE, epochs=1))[0]


def test_no_grid_is_the_papers_grid() -> None:
    assert "lora" in METHODS
    found = search(vit(), "lora", make_task(), recipe=replace(RECIPE, epochs=1), progress=False)
    assert [candidate.settings for candidate in found.candidates] == [
        {"scale": scale} for scale in (0.01, 0.1, 1.0, 10.0, 100.0)
    ]


def test_backbone_is_untouched() -> None:
    backbone = vit()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    search(backbone, "full", make_task(), {"lr": [1e-3, 1e-2]}, RECIPE, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_proof_runs_for_the_first_candidate_only(monkeypatch: pytest.MonkeyPatch) -> None:
    proven = []
    prove = joining.prove_attached
    monkeypatch.setattr(joining, "prove_attached", lambda model: proven.append(model) or prove(model))
    find(RANKS)
    assert len(proven) == 1


# what it may see


def test_labels_of_test_images_cannot_influence_the_choice() -> None:
    task = make_task(num_val=30)
    other = replace(task, test=Split(task.test.images, (task.test.labels + 1) % 3))
    first, second = find(task=task), find(task=other)
    assert timeless(first) == timeless(second)
    assert first.chosen.settings == second.chosen.settings


def test_test_images_are_never_read() -> None:
    class Forbidden:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> NoReturn:
            raise AssertionError("a test image was read")

        def describe(self, index: int) -> str:
            return f"test{index}.png"

    find(RANKS, replace(make_task(), test=Split(Forbidden(), [0, 1])))


def test_validation_images_are_not_trained_on_whatever_the_recipe_says(whole: list[Candidate]) -> None:
    recipe = replace(RECIPE, train_on="train+val")
    found = find(RANKS, recipe=recipe)
    assert timeless(found) == whole
    assert found.recipe == recipe


def test_task_without_validation_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pt.FitError) as caught:
        find(task=make_task(num_val=0), out=tmp_path)
    assert str(caught.value) == (
        "squares has no validation split to choose settings on, and test images never serve for that"
    )
    assert not any(tmp_path.iterdir())


# candidates that fail

WILD = pt.Recipe(epochs=10, batch_size=5, warmup_epochs=0)


def test_candidate_that_diverges_has_no_score_and_the_search_goes_on(tmp_path: Path, taken: list[int]) -> None:
    found = find({"lr": [1e30, 1e-2]}, recipe=WILD, out=tmp_path)
    wild, tame = found.candidates
    assert wild.val_accuracy is None
    assert wild.failure.startswith("the loss became nan at step")
    assert found.chosen is tame
    taken.clear()
    assert find({"lr": [1e30, 1e-2]}, recipe=WILD, out=tmp_path).candidates == found.candidates
    assert taken == []


def test_search_without_any_score_is_an_error() -> None:
    with pytest.raises(pt.FitError, match=r"^no candidate of the search has a score; lr=1e\+30: the loss became nan"):
        find({"lr": [1e30, 1e31]}, recipe=WILD)


def test_diverged_training_is_a_fit_error_of_its_own() -> None:
    model = adapt(vit(), pt.FacT(rank=1), classes=CLASSES)
    with pytest.raises(pt.DivergedError, match="the loss became nan at step"):
        fit(model, make_task(), replace(WILD, lr=1e30), progress=False)


def test_other_errors_end_the_search() -> None:
    def fail(self: Steps, step: int) -> NoReturn:
        raise pt.FitError("5 images do not fit into memory at once")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "take", fail)
        with pytest.raises(pt.FitError, match="do not fit into memory"):
            find()


# going on


class Killed(BaseException):
    """Stands in for the end of the process: nothing catches it."""


def killer(function: Callable[..., Any], at: int, error: type[BaseException] = Killed) -> Callable[..., Any]:
    """Returns a function that dies in its call number `at`, before it does anything."""
    count = iter(range(at))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            raise error
        return function(*args, **kwargs)

    return call


def test_finished_candidates_are_not_trained_again(tmp_path: Path, taken: list[int]) -> None:
    first = find(RANKS, out=tmp_path)
    assert taken == [*range(NUM_STEPS)] * 2
    taken.clear()
    assert find(RANKS, out=tmp_path) == first
    assert taken == []


@pytest.mark.parametrize(
    ("step", "error"),
    [(0, Killed), (1, KeyboardInterrupt), (5, Killed), (6, KeyboardInterrupt), (8, Killed), (11, KeyboardInterrupt)],
)
def test_search_that_stops_in_a_step_goes_on_from_it(
    step: int, error: type[BaseException], tmp_path: Path, taken: list[int], whole: list[Candidate]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", killer(torch.optim.AdamW.step, step, error))
        with pytest.raises(error):
            find(RANKS, out=tmp_path, save_every=0)
    taken.clear()
    assert timeless(find(RANKS, out=tmp_path, save_every=0)) == whole
    assert taken == ([*range(NUM_STEPS)] * 2)[step:]


def test_ctrl_c_saves_the_candidate_and_the_search_goes_on_after_that_step(
    tmp_path: Path, taken: list[int], whole: list[Candidate]
) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("someone else listens to Ctrl-C in this process")
    step, count = torch.optim.AdamW.step, iter(range(NUM_STEPS + 2))

    def press(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", press)
        with pytest.raises(KeyboardInterrupt):
            find(RANKS, out=tmp_path, save_every=1e9)
    taken.clear()
    assert timeless(find(RANKS, out=tmp_path, save_every=1e9)) == whole
    assert taken == [3, 4, 5]


# two writes when the search begins, two when a candidate does, its states and its plugin file
@pytest.mark.parametrize("write", range(2 + 2 * (2 + 2 + 1)))
def test_search_that_dies_while_writing_comes_to_the_same(write: int, tmp_path: Path, whole: list[Candidate]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", killer(os.replace, write))
        with pytest.raises(Killed):
            find(RANKS, out=tmp_path)
    assert timeless(find(RANKS, out=tmp_path)) == whole


@pytest.mark.parametrize("name", ["add", "lighten"])
def test_search_that_dies_between_training_and_its_record_trains_nothing_twice(
    name: str, tmp_path: Path, taken: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, name, killer(getattr(Record, name), 1))
        with pytest.raises(Killed):
            find(RANKS, out=tmp_path)
    find(RANKS, out=tmp_path)
    assert taken == [*range(NUM_STEPS)] * 2
    assert not [*tmp_path.rglob("state.pt")]


def test_changed_grid_trains_only_what_is_missing(tmp_path: Path, taken: list[int]) -> None:
    first = find({"rank": [1, 2], "scale": [1]}, out=tmp_path)
    taken.clear()
    # other order, other types, one more
    found = find({"scale": [1.0, 10.0], "rank": [2]}, out=tmp_path)
    assert taken == [*range(NUM_STEPS)]
    assert found.candidates[0] == replace(first.candidates[1], settings={"scale": 1.0, "rank": 2})
    assert timeless(found) == timeless(find({"scale": [1.0, 10.0], "rank": [2]}))


def test_half_a_line_of_the_record_is_dropped_and_its_candidate_runs_again(
    tmp_path: Path, taken: list[int], whole: list[Candidate]
) -> None:
    find(RANKS, out=tmp_path)
    path = tmp_path / "search" / "search.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    taken.clear()
    assert timeless(find(RANKS, out=tmp_path)) == whole
    assert taken == [*range(NUM_STEPS)]
    assert [json.loads(line)["settings"] for line in path.read_text().splitlines()] == [{"rank": 1}, {"rank": 2}]


def test_finished_candidates_leave_no_heavy_files(tmp_path: Path) -> None:
    find(RANKS, out=tmp_path)
    names = {path.name for path in (tmp_path / "search" / "rank=1").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": replace(RECIPE, epochs=3)}, "recipe.epochs 2 -> 3"),
        ({"epochs": 1}, "recipe.epochs 2 -> 1"),
        ({"task": make_task(num_train=14)}, "task.train.images 13 -> 14"),
    ],
)
def test_folder_of_another_search_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    find({"rank": [1]}, out=tmp_path)
    before = (tmp_path / "search" / "search.jsonl").read_bytes()
    with pytest.raises(pt.FitError) as caught:
        find({"rank": [1]}, out=tmp_path, **change)
    assert f"search holds a run with other settings ({message}" in str(caught.value)
    assert (tmp_path / "search" / "search.jsonl").read_bytes() == before


def test_folder_serves_one_search_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    record = Record(tmp_path / "search")
    record.open({})
    with pytest.raises(pt.FitError, match="another process is training in"):
        find(out=tmp_path)
    record.close()


def test_progress_tells_each_candidate_and_the_choice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    find(RANKS, out=tmp_path, progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("search: ")]
    assert lines[:2] == ["search: candidate 1 of 2: rank=1", "search: candidate 2 of 2: rank=2"]
    assert lines[2].startswith("search: chose rank=")
    find(RANKS, out=tmp_path, progress=True)
    assert capsys.readouterr().err.splitlines()[0] == "search: 2 of 2 candidates are known"


# the chosen model's folder


def final(out: Path, found: SearchResult) -> None:
    make_room(out, found.chosen.settings)
    fit(adapt(vit(), found.plugin(), classes=CLASSES), make_task(), found.recipe, out=out, progress=False)


def test_model_of_an_earlier_choice_is_set_aside(tmp_path: Path) -> None:
    first = find({"rank": [1]}, out=tmp_path)
    final(tmp_path, first)
    before = (tmp_path / "plugin.safetensors").read_bytes()
    second = find({"rank": [2]}, out=tmp_path)
    final(tmp_path, second)
    assert (tmp_path / "earlier" / "1-rank=1" / "plugin.safetensors").read_bytes() == before
    assert pt.inspect(tmp_path / "plugin.safetensors").metrics["trained_parameters"] > first.chosen.trained_parameters
    assert {path.name for path in tmp_path.iterdir()} >= {"search", "earlier", "config.yaml"}


def test_model_of_the_same_choice_stays(tmp_path: Path) -> None:
    found = find({"rank": [1]}, out=tmp_path)
    final(tmp_path, found)
    before = (tmp_path / "plugin.safetensors").stat().st_mtime_ns
    assert make_room(tmp_path, found.chosen.settings) is None
    assert (tmp_path / "plugin.safetensors").stat().st_mtime_ns == before


# grids


@pytest.mark.parametrize("name", GRIDS)
def test_grid_of_the_papers_has_settings_of_its_method(name: str) -> None:
    if name not in METHODS:
        pytest.skip(f"there is no {name}")
    assert set(GRIDS[name]) <= set(known_axes(name))
    plans = combinations(name, papers_grid(name), pt.Recipe())
    assert len(plans) == np.prod([len(values) for values in GRIDS[name].values()])


def test_method_without_a_known_grid_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(GRIDS, "lora")
    with pytest.raises(pt.FitError, match="no grid of settings is known for lora: name settings and their values"):
        papers_grid("lora")
    assert papers_grid("lora", {"rank": [1]}) == {"rank": [1]}


def test_no_setting_of_a_method_hides_a_field_of_the_recipe() -> None:
    assert set(RECIPE_AXES) <= set(pt.Recipe.__dataclass_fields__)
    for name in METHODS:
        assert not {*method(name).settings()} & {*RECIPE_AXES}


def test_grid_of_fact_has_the_papers_ranks_of_either_form() -> None:
    assert tuple(papers_grid("fact")["rank"]) == (1, 2, 4, 8, 16)
    assert tuple(papers_grid("fact", {"form": ["tk"]})["rank"]) == (2, 4, 8, 16, 32)
    assert tuple(papers_grid("fact", {"form": ["tk"], "rank": [3]})["rank"]) == (3,)


def test_combinations_are_each_once_in_the_order_of_the_grid() -> None:
    plans = combinations("fact", {"rank": [2, 1, 2], "scale": [1, 1.0, 0.1]}, pt.Recipe())
    assert [words(plan.settings) for plan in plans] == [
        "rank=2, scale=1", "rank=2, scale=0.1", "rank=1, scale=1", "rank=1, scale=0.1"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "grid", "message"),
    [
        ("fact", {"rnk": [1]}, "fact has no setting 'rnk' that a search could vary: there are rank, form, roles, "),
        ("fact", {"seed": [1]}, "fact has no setting 'seed' that a search could vary"),
        ("fact", {"rank": []}, "rank needs a list of values to try, got []"),
        ("fact", {"form": "tt"}, "form needs a list of values to try, got 'tt'"),
        ("fact", {"rank": 3}, "rank needs a list of values to try, got 3"),
        ("fact", {"rank": [4, 0]}, "rank is at least 1"),
        ("fact", {"lr": [-1.0]}, "lr must be above 0, got -1.0"),
        ("nothing", {"rank": [1]}, "no method is called 'nothing'"),
        ("nothing", None, "no method is called 'nothing'"),
    ],
)
def test_bad_grid_is_refused_before_anything_is_written(
    name: str, grid: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(pt.PetioleError) as caught:
        search(vit(), name, make_task(), grid, RECIPE, out=tmp_path, progress=False)
    assert str(caught.value).startswith(message)
    assert not any(tmp_path.iterdir())


def test_epochs_out_of_range_are_refused() -> None:
    with pytest.raises(pt.FitError, match="epochs must be at least 1, got 0"):
        find(epochs=0)


def test_folder_names_tell_settings_apart_in_any_order() -> None:
    assert slug({"scale": 10.0, "rank": 8}) == slug({"rank": 8, "scale": 10}) == "rank=8,scale=10"
    assert slug({"lr": 1e-5, "roles": ["q", "v"], "deep": True}) == "deep=true,lr=1e-05,roles=q+v"
    odd = [{"scale": 0.1234567}, {"scale": 0.1234568}, {"name": "a/b"}, {"name": "a-b"}, {"name": "a b"}]
    odd += [{"name": "x" * 300}, {"name": "x" * 301}, {"rank": 1}, {"rank": 11}, {}]
    names = [slug(settings) for settings in odd]
    assert len(set(names)) == len(odd)
    assert all("/" not in name and len(name) < 200 for name in names)


def test_search_keeps_its_configuration_without_the_settings(tmp_path: Path) -> None:
    find({"rank": [1]}, out=tmp_path)
    config = yaml.safe_load((tmp_path / "search" / "config.yaml").read_text())
    assert config["plugins"] == [{"method": "fact"}]
    assert "test" not in config["task"]


def test_task_with_one_image_a_class_is_searched() -> None:
    task = pt.Task("squares", CLASSES, make_split(3, 0), make_split(3, 1))
    assert len(find(RANKS, task).candidates) == 2
