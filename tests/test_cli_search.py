"""`petiole fit --search`: what is searched, what is left behind, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import petiole as pt
import test_cli
from petiole.train.grids import GRIDS
from petiole.train.steps import Steps
from test_cli import Command, is_empty

petiole = test_cli.petiole
SHORT = ("--epochs", "1", "--batch-size", "5")


def config(folder: str) -> dict[str, Any]:
    return yaml.safe_load(Path(folder, "config.yaml").read_text())


def searched(answer: test_cli.Answer) -> list[dict[str, Any]]:
    assert answer.code == 0, answer
    return [candidate["settings"] for candidate in json.loads(answer.out)["search"]["candidates"]]


def test_search_takes_the_grid_of_the_papers(petiole: Command) -> None:
    answer = petiole("fit", "squares", "-m", "lora", "--search", *SHORT, "--json")
    assert searched(answer) == [{"scale": scale} for scale in GRIDS["lora"]["scale"]]


def test_final_model_is_that_of_a_plain_fit_with_the_chosen_settings(petiole: Command) -> None:
    options = ["--epochs", "3", "--batch-size", "5", "--set", "dropout=0.2", "--set", "scale=10"]
    axes = ["--grid", "rank=1,2", "--grid", "lr=1e-3,1e-2", "--search-epochs", "1"]
    chosen = json.loads(petiole("fit", "squares", *options, *axes, "--out", "run", "--json").out)["search"]["settings"]
    fixed = ["--set", f"rank={chosen['rank']}", "--lr", chosen["lr"]]
    petiole("fit", "squares", *options, *fixed, "--out", "plain")
    for name in ("plugin.safetensors", "config.yaml", "metrics.jsonl"):
        assert Path("run", name).read_bytes() == Path("plain", name).read_bytes()


def test_search_answers_with_a_table_and_a_report_of_all_candidates(petiole: Command) -> None:
    answer = petiole("fit", "squares", "--set", "rank=1", "--grid", "scale=0.1,1", *SHORT, "--out", "run")
    head, *rows = [line.split() for line in answer.out.splitlines() if line.strip("─ ")][:3]
    assert head == ["rank", "scale", "validation", "trained", "parameters", "seconds", "chosen"]
    assert [row[:2] for row in rows] == [["1", "0.1"], ["1", "1"]]
    assert [row[-1] for row in rows].count("*") == 1
    page = Path("run/report.html").read_text()
    assert "Search for settings" in page
    assert page.count("<svg") == 2


def test_json_has_the_chosen_settings_and_all_candidates(petiole: Command) -> None:
    told = json.loads(petiole("fit", "squares", "--set", "rank=1", "--grid", "scale=1,10", *SHORT, "--json").out)
    assert told["search"]["settings"] in [{"rank": 1, "scale": 1.0}, {"rank": 1, "scale": 10.0}]
    for candidate in told["search"]["candidates"]:
        assert candidate.keys() == {"settings", "trained_parameters", "seconds", "val_accuracy", "failure"}
    assert "search" not in json.loads(petiole("fit", "squares", *SHORT, "--out", "plain", "--json").out)


def test_set_fixes_a_setting_and_grid_replaces_an_axis(petiole: Command) -> None:
    answer = petiole("fit", "squares", "-s", "rank=2", "-g", "scale=1e-1,1", *SHORT, "--json")
    assert searched(answer) == [{"rank": 2, "scale": 0.1}, {"rank": 2, "scale": 1.0}]


def test_option_of_the_recipe_fixes_its_axis(petiole: Command) -> None:
    expected = [{"lr": lr} for lr in GRIDS["linear"]["lr"]]
    assert searched(petiole("fit", "squares", "-m", "linear", "--search", *SHORT, "--json")) == expected
    answer = petiole("fit", "squares", "-m", "linear", "--search", *SHORT, "--lr", "0.1", "-o", "other")
    assert answer.error.startswith("nothing is left to search for linear: name values with --grid, or leave --search")


def test_search_epochs_alone_searches_and_shortens_the_candidates(petiole: Command) -> None:
    answer = petiole("fit", "squares", "-m", "lora", "--epochs", "2", "--search-epochs", "1", "-o", "run", "--json")
    assert len(searched(answer)) == 5
    assert config("run")["recipe"]["epochs"] == 2
    assert config("run/search")["recipe"]["epochs"] == 1


def test_values_that_are_lists_are_written_as_yaml(petiole: Command) -> None:
    answer = petiole("fit", "squares", "-m", "lora", "-s", "scale=1", "-g", "roles=[[q,v],[k]]", *SHORT, "--json")
    assert searched(answer) == [{"scale": 1.0, "roles": ["q", "v"]}, {"scale": 1.0, "roles": ["k"]}]


def test_same_command_returns_the_finished_search_and_model(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("fit", "squares", "-s", "rank=1", "-g", "scale=1,10", *SHORT, "--json")
    first = petiole(*command)
    monkeypatch.setattr(Steps, "take", None)
    second = petiole(*command)
    assert first.out == second.out
    assert "search: 2 of 2 candidates are known" in second.err
    assert "this run is finished" in second.err


def test_search_stopped_by_ctrl_c_says_how_to_go_on(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    take, count = Steps.take, iter(range(4))

    def interrupt(self: Steps, step: int) -> tuple[float, int]:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return take(self, step)

    command = ("fit", "squares", "-s", "rank=1", "-g", "scale=1,10", *SHORT, "--save-every", "0", "--out", "run")
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "take", interrupt)
        answer = petiole(*command)
    assert answer.code == 130
    assert answer.err.splitlines()[-1] == "stopped: the same command goes on from the state in run"
    again = petiole(*command)
    assert "search: 1 of 2 candidates are known" in again.err
    assert "goes on after step 1 of 3" in again.err
    assert again.code == 0


def test_larger_grid_sets_the_earlier_model_aside(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from petiole.train import steps
    from petiole.train.evaluate import Scores

    def rates_rank(model: pt.Adapted, pixels: object, world: object, seen: object = None) -> Scores:
        return Scores(model.plugins[0].rank / 10, 0.0, 6)

    monkeypatch.setattr(steps, "evaluate", rates_rank)
    command = ("fit", "squares", "-s", "scale=1", *SHORT, "--out", "run")
    petiole(*command, "-g", "rank=1,2")
    before = Path("run/plugin.safetensors").read_bytes()
    answer = petiole(*command, "-g", "rank=1,2,3")
    assert "settings that were chosen before is now in run/earlier/1-rank=2,scale=1\n" in answer.err
    assert Path("run/earlier/1-rank=2,scale=1/plugin.safetensors").read_bytes() == before
    assert config("run")["plugins"][0]["rank"] == 3


def test_run_that_no_search_has_led_to_is_left_alone(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    petiole("fit", "squares", *SHORT, "--out", "run")
    before = Path("run/plugin.safetensors").read_bytes()
    answer = petiole("fit", "squares", "--search", *SHORT, "--out", "run")
    assert answer.error == "run holds a run without a search: choose another folder with --out, or remove this one"
    assert Path("run/plugin.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-g", "rank"], "--grid takes key=value,value,..., e.g. --grid scale=0.1,1,10; got 'rank'"),
        (["-g", "rnk=1,2"], "fact has no setting 'rnk' (did you mean 'rank'?): it has rank, form, "),
        (["-g", "epochs=1,2"], "fact has no setting 'epochs'"),
        (["-g", "rank=1,x"], "--grid rank takes a whole number (default 8), got 'x'"),
        (["-g", "rank=1,"], "--grid rank takes a whole number (default 8), got ''"),
        (["-g", "scale=1;2"], "--grid scale takes a number (default 1.0), got '1;2'"),
        (["-g", "lr=fast"], "--grid lr takes a number (e.g. 0.001), got 'fast'"),
        (["-g", "roles=[[q,v]"], "--grid roles takes values between commas, or a YAML list; got '[[q,v]'"),
        (["-g", "rank=0,1"], "rank is at least 1"),
        (["-g", "lr=0,1e-3"], "lr must be above 0, got 0.0"),
        (["-g", "rank=1,2", "-s", "rank=3"], "--grid searches rank, and another option fixes it: name it once"),
        (["-g", "lr=1e-3,1e-2", "--lr", "1"], "--grid searches lr, and another option fixes it: name it once"),
        (["--search", "-s", "rank=1", "-s", "scale=1"], "nothing is left to search for fact"),
        (["--search", "-m", "nothing"], "no method is called 'nothing'"),
        (["--search", "--search-epochs", "0"], "epochs must be at least 1, got 0"),
    ],
)
def test_bad_search_is_refused_in_one_line_and_writes_nothing(args: list[str], message: str, petiole: Command) -> None:
    assert petiole("fit", "squares", *args).error.startswith(message)
    assert is_empty()


def test_task_without_validation_split_cannot_be_searched(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pt.tasks.BUILT_IN, "blind", lambda seed: test_cli.make_task(num_val=0))
    assert petiole("fit", "blind", "--search").error.startswith("squares has no validation split to choose settings on")
    assert is_empty()
