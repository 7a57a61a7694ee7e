"""`petiole compress`: what is compared, how the scale is chosen, what is written, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import petiole as pt
import test_cli
from fitting import CLASSES, make_model, make_task, vit
from petiole.core.plugin import Reducer
from petiole.tasks.cache import Pixels
from petiole.tasks.transform import Transform
from petiole.train import budgeting
from petiole.train.evaluate import Scores, evaluate
from test_cli import Command, is_empty

petiole, plugin = test_cli.petiole, test_cli.plugin
SHORT = ("--seconds", 0.001, "--batch-size", 2)


@pytest.fixture(scope="module")
def tocom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compensator file whose changes are seen."""
    model = pt.adapt(vit(), pt.ToCom(groups=2, target=1))
    with torch.no_grad():
        for p in model.plugins[0].up.parameters():
            p.normal_(0, 40.0, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("tocom") / "tocom.safetensors"
    pt.save(model, path)
    return path


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Speeds as a formula of the budget: 10 images/s and 2 for each token a block removes."""
    seen = SimpleNamespace(calls=[])

    def measure(models: Sequence[nn.Module], *, batch_size: int, seconds: float) -> list[float]:
        seen.calls.append([type(model).__name__ for model in models])
        reducers = [[m for m in model.modules() if isinstance(m, Reducer)] for model in models]
        return [10.0 + 2 * (row[-1].budget if row else 0) for row in reducers]

    monkeypatch.setattr(budgeting, "throughputs", measure)
    return seen


def told(answer: test_cli.Answer) -> dict[str, Any]:
    assert answer.code == 0, answer
    return json.loads(answer.out)


def pixels(split: pt.tasks.Split) -> Pixels:
    return Pixels(split, Transform(make_model().input_config))


# speed alone


def test_speed_alone_is_a_table_of_the_model_before_and_after(petiole: Command, plugin: Path) -> None:
    answer = petiole("compress", plugin, "--budget", 1, *SHORT)
    assert answer.code == 0
    head, before, after = [line.split() for line in answer.out.splitlines() if line.strip("─ ")]
    assert head == ["model", "budget", "tokens", "at", "the", "end", "GMACs", "images/s", "speed-up"]
    assert before[:4] == ["as", "trained", "0", "5"]
    assert before[-1] == "1.00x"
    assert after[:3] == ["tome", "1", "3"]
    assert is_empty()


def test_speed_is_measured(petiole: Command, plugin: Path) -> None:
    rows = told(petiole("compress", plugin, "--budget", 1, *SHORT, "--json"))["rows"]
    assert [row["budget"] for row in rows] == [0, 1]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert rows[1]["speed_up"] == rows[1]["images_per_second"] / rows[0]["images_per_second"]
    assert rows[1]["macs"] < rows[0]["macs"]
    assert [row["accuracy"] for row in rows] == [None, None]


def test_backbone_by_its_name_will_do(petiole: Command, speeds: SimpleNamespace) -> None:
    found = told(petiole("compress", "tiny", "-r", 2, "--method", "evit", "--json"))
    assert (found["method"], found["rows"][1]["num_tokens"]) == ("evit", 2)
    assert petiole("compress", "tiny", "squares", "-r", 2).error.startswith("the model has no head of its own")


def test_speed_up_gives_the_smallest_budget_that_reaches_it(
    petiole: Command, plugin: Path, speeds: SimpleNamespace
) -> None:
    answer = petiole("compress", plugin, "--speed-up", 1.15, "--json")
    assert told(answer)["budget"] == 1
    assert "budget 2: 1.40x\nbudget 1: 1.20x\n" in answer.err
    assert told(petiole("compress", plugin, "--speed-up", 1.3, "--json"))["budget"] == 2
    missed = petiole("compress", plugin, "--speed-up", 1.5)
    assert missed.code == 1
    assert "cannot be reached: a budget of 2, the largest, gives 1.40" in missed.err


# accuracy


def test_accuracy_is_that_of_the_test_split(petiole: Command, plugin: Path, speeds: SimpleNamespace) -> None:
    found = told(petiole("compress", plugin, "squares", "-r", 2, "--out", "fast.safetensors", "--json"))
    model = pt.load(plugin, vit())
    test = pixels(make_task().test)
    expected = [evaluate(m, test).accuracy for m in (model, pt.compress(model, 2))]
    assert [row["accuracy"] for row in found["rows"]] == expected
    assert found["metrics"] == {"speed_up": 1.4, "test_accuracy": expected[1]}
    again = json.loads(petiole("eval", "fast.safetensors", "squares", "--json").out)
    assert again["accuracy"] == expected[1]


def test_without_test_split_validation_is_reported_and_said(
    petiole: Command, plugin: Path, speeds: SimpleNamespace
) -> None:
    answer = petiole("compress", plugin, "untested", "-r", 1)
    assert "squares has no test split: accuracies are those on val\n" in answer.err
    assert "val accuracy" in answer.out


def test_accuracy_on_the_images_the_scale_was_chosen_on_is_said_to_be_so(
    petiole: Command, plugin: Path, tocom: Path, speeds: SimpleNamespace
) -> None:
    warning = "the accuracies are on the images the scale was chosen on"
    compress = ("compress", plugin, "squares", "-r", 1, "--tocom", tocom)
    assert warning in petiole(*compress, "--split", "val").err
    assert warning not in petiole(*compress).err


def test_split_without_data_is_no_column(petiole: Command, plugin: Path, speeds: SimpleNamespace) -> None:
    assert "accuracy" not in petiole("compress", plugin, "-r", 1, "--split", "val").out


def test_scale_is_chosen_on_validation_images_alone(
    petiole: Command, plugin: Path, tocom: Path, speeds: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    val, seen = make_task().val, []

    def rates_012(model: pt.Adapted, pixels: Pixels, batch_size: int) -> Scores:
        seen.append(pixels.labels.tolist())
        return Scores(1 - abs(model.plugins[1].scale - 0.12), 0.0, 6)

    monkeypatch.setattr(budgeting, "evaluate", rates_012)
    answer = petiole("compress", plugin, "squares", "-r", 1, "--tocom", tocom, "-o", "fast.safetensors", "--json")
    found = told(answer)
    assert seen == [val.labels.tolist()] * 6
    assert (found["scale"], found["metrics"]["val_accuracy"]) == (0.12, 1.0)
    assert found["scales"]["0.1"] == pytest.approx(0.98)
    assert "scale 0.12, chosen on 6 validation images: 100.00%, without ToCom 88.00%\n" in answer.err
    # the file holds it
    model, test = pt.load(plugin, vit()), pixels(make_task().test)
    fast = pt.compress(model, 1, compensator=str(tocom), scale=0.12)
    images = test.transform.normalize(test.batch([0, 1, 2])[0])
    assert torch.equal(pt.load("fast.safetensors", vit())(images), fast(images))
    # and both rows say what it brings on test
    expected = [evaluate(m, test).accuracy for m in (model, pt.compress(model, 1), fast)]
    assert [(row["scale"], row["accuracy"]) for row in found["rows"]] == [
        *zip((None, None, 0.12), expected, strict=True)
    ]
    # a compensator is timed as it is served
    assert speeds.calls == [["Adapted", "Adapted", "Elastic"]]


def test_compensator_that_hurts_is_left_off(
    petiole: Command, plugin: Path, tocom: Path, speeds: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        budgeting, "evaluate", lambda model, pixels, batch_size: Scores(1 - model.plugins[1].scale, 0.0, 6)
    )
    answer = petiole("compress", plugin, "squares", "-r", 1, "--tocom", tocom, "-o", "fast.safetensors", "--json")
    assert [row["scale"] for row in told(answer)["rows"]] == [None, None]
    assert "ToCom is left off: 95.00% at best on 6 validation images, 100.00% without it\n" in answer.err
    assert [p["method"] for p in pt.inspect("fast.safetensors").plugins] == ["lora", "tome"]


def test_scale_that_is_given_is_not_chosen(
    petiole: Command, plugin: Path, tocom: Path, speeds: SimpleNamespace
) -> None:
    found = told(petiole("compress", plugin, "squares", "-r", 1, "--tocom", tocom, "--scale", 0.3, "--json"))
    assert (found["scale"], found["scales"], found["rows"][2]["scale"]) == (0.3, None, 0.3)
    found = told(petiole("compress", plugin, "-r", 1, "--tocom", tocom, "--json"))
    assert (found["scale"], found["scales"]) == (0.1, None)


def test_compressed_file_is_compared_with_the_budget_of_its_training(
    petiole: Command, plugin: Path, tocom: Path, speeds: SimpleNamespace
) -> None:
    petiole("compress", plugin, "-r", 2, "--tocom", tocom, "--source", 1, "--out", "fast.safetensors")
    found = told(petiole("compress", "fast.safetensors", "-r", 0, "--json"))
    assert found["source"] == 1
    assert [(row["budget"], row["scale"]) for row in found["rows"]] == [(1, None), (0, None), (0, 0.1)]
    # without a compensator, the budget in the file is that of the training
    petiole("compress", plugin, "-r", 2, "--out", "plain.safetensors")
    assert [row["budget"] for row in told(petiole("compress", "plain.safetensors", "-r", 1, "--json"))["rows"]] == [
        2,
        1,
    ]


def test_method_and_its_settings_are_those_of_the_file(petiole: Command, speeds: SimpleNamespace) -> None:
    pt.save(make_model(pt.ToMe(budget=2, proportional=False)), "mean.safetensors")
    petiole("compress", "mean.safetensors", "-r", 1, "--out", "one.safetensors")
    assert pt.inspect("one.safetensors").plugins[0]["settings"] == {"budget": 1, "proportional": False}
    pt.save(make_model(pt.EViT(budget=2)), "pruned.safetensors")
    assert told(petiole("compress", "pruned.safetensors", "-r", 1, "--json"))["method"] == "evit"
    assert told(petiole("compress", "pruned.safetensors", "-r", 1, "-m", "tome", "--json"))["method"] == "tome"


# several budgets


def test_plot_is_of_several_budgets(petiole: Command, plugin: Path, tocom: Path, speeds: SimpleNamespace) -> None:
    pytest.importorskip("matplotlib")
    compress = ("compress", plugin, "squares", "-r", 1, "--tocom", tocom, "--scale", 0.2, "--plot", "fast.svg")
    answer = petiole(*compress, "--budgets", "0,2,1", "--json")
    rows = told(answer)["rows"]
    assert [(r["budget"], r["scale"]) for r in rows] == [(0, None), (2, None), (2, 0.2), (1, None), (1, 0.2)]
    text = Path("fast.svg").read_text()
    assert text.count("throughput [images/s]") == 1
    assert "with ToCom" in text
    assert answer.err.endswith("plot: fast.svg\n")
    # 4 patches over 2 blocks: each can give up 2
    assert {r["budget"] for r in told(petiole(*compress, "--force", "--json"))["rows"]} == {0, 1, 2}


def test_further_budgets_need_no_plot(petiole: Command, plugin: Path, speeds: SimpleNamespace) -> None:
    rows = told(petiole("compress", plugin, "-r", 2, "--budgets", "0.5,1", "--json"))["rows"]
    assert [row["budget"] for row in rows] == [0, 0.5, 1, 2]


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "compress goes to --budget or to --speed-up, and neither was given: name one of them"),
        (("-r", 1, "--speed-up", 2), "compress goes to --budget or to --speed-up, and both were given"),
        (("--speed-up", 0.9), "--speed-up is above 1, e.g. 1.5; got 0.9"),
        (("-r", "many"), "--budget takes the tokens that each block removes (8)"),
        (("-r", 1, "--budgets", "1,few"), "--budgets takes the tokens that each block removes (8)"),
        (("-r", 1, "--method", "lora"), "lora removes no tokens: choose tome or evit"),
        (("-r", 3, "--tocom", "TOCOM"), "the target degree is a whole number from 0 to 2"),
        (("-r", 1, "--budgets", 3, "--tocom", "TOCOM"), "the target degree is a whole number from 0 to 2"),
        (("-r", 0.5, "--tocom", "TOCOM"), "a compensator goes between constant budgets"),
        (("-r", 1, "--tocom", "PLUGIN"), "has no compensator"),
        (("-r", 1, "--source", 1), "--source and --scale belong to a compensator, and there is none"),
        (("-r", 1, "--plot", "a.svg"), "--plot draws accuracy against images/s: name the task"),
        (("-r", 1, "--plot", "a.png"), "a.png ends in .png: name a .svg file"),
        (("-r", 1, "--out", "fast"), "fast ends in nothing: name a .safetensors file"),
        (("-r", 1, "--out", "nowhere/fast.safetensors"), "there is no folder nowhere"),
        (("-r", 1, "--out", "PLUGIN"), "exists already: choose another name, or pass --force"),
        (("swapped", "-r", 1), "class 1 is 'green' in the model and 'blue' in squares"),
        (("squares", "-r", 1, "--split", "tset"), "no split is called 'tset' (did you mean 'test'?)"),
        (("untested", "-r", 1, "--split", "test"), "squares has no test split: choose train or val"),
        (("blind", "-r", 1, "--tocom", "TOCOM"), "squares has no validation split to choose a scale on"),
    ],
)
def test_bad_input_is_one_line(
    petiole: Command,
    plugin: Path,
    tocom: Path,
    arguments: tuple[Any, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    speeds: SimpleNamespace,
) -> None:
    monkeypatch.setitem(pt.tasks.BUILT_IN, "blind", lambda seed: make_task(num_val=0))
    before = plugin.read_bytes()
    words = [{"PLUGIN": plugin, "TOCOM": tocom}.get(word, word) for word in arguments]
    assert message in petiole("compress", plugin, *words).error
    assert plugin.read_bytes() == before
    assert is_empty()
    assert speeds.calls == []


def test_file_that_is_none_is_refused(petiole: Command) -> None:
    assert "missing.safetensors cannot be read" in petiole("compress", "missing.safetensors", "-r", 1).error
    assert petiole("compress", "nothing", "-r", 1).error == "no backbone is called 'nothing'"


def test_file_is_replaced_when_forced(petiole: Command, plugin: Path, speeds: SimpleNamespace) -> None:
    Path("fast.safetensors").write_text("old")
    assert petiole("compress", plugin, "-r", 1, "--out", "fast.safetensors", "--force").code == 0
    assert pt.inspect("fast.safetensors").classes == CLASSES
