"""`petiole stream`: what its commands print, leave behind and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petiole as pt
from fitting import CLASSES, make_split, make_task, vit
from petiole.cli import _stream
from petiole.continual import HeadLearner, inspect_learner, load_learner
from petiole.continual.catalogue import LEARNERS
from test_cli import Command, is_empty, petiole

assert petiole

SHORT = ("--experiences", 3, "--learner", "ncm")


@pytest.fixture
def stream(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `petiole stream`; `resnet` is a network without weights."""
    import timm

    tiny = pt.backbones.bundled.backbone

    def build(name: str, *, pretrained: bool = True) -> nn.Module:
        return timm.create_model(name, pretrained=False).eval() if name == "resnet10t" else tiny(name)

    monkeypatch.setattr("petiole.backbones.bundled.backbone", build)
    return lambda *args: petiole("stream", *args)


def folder_of(root: Path, names: tuple[str, ...], seed: int = 0) -> Path:
    """An image folder with four training and two test images of each class."""
    split = make_split(30, seed)
    for name in names:
        rows = [i for i, label in enumerate(split.labels) if CLASSES[label] == name][:6]
        for place, i in enumerate(rows):
            folder = root / ("train" if place < 4 else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            split.images[i].save(folder / f"{i}.png")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# fit


def test_fit_leaves_a_run_folder_and_prints_its_numbers(stream: Command) -> None:
    answer = stream("fit", "squares", *SHORT, "--json")
    found, folder = json.loads(answer.out), Path("runs/squares-ncm")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "features", "learner.safetensors", "metrics.jsonl", "report.html"
    ]  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_classes"] for row in rows] == [1, 2, 3]
    assert found["final_average"] == rows[-1]["average_accuracy"]
    assert found["num_bytes"] == Path(found["file"]).stat().st_size
    assert "into runs/squares-ncm" in answer.err
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2
    assert f"{found['final_average']:.1%}" in page


def test_learner_learns_from_train_and_val(stream: Command) -> None:
    stream("fit", "squares", *SHORT)
    state = load_learner("runs/squares-ncm/learner.safetensors", backbone=vit()).state()
    assert state["head"]["counts"].sum() == len(make_task().joined().train)


def test_auto_takes_what_did_best_on_validation(stream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from petiole.continual import choosing

    monkeypatch.setattr(choosing, "CANDIDATES", {"ncm": {}, "slda": {"shrinkage": 0.5}})
    tried = json.loads(stream("fit", "squares", "--experiences", 3, "--json").out)["tried"]
    assert {item["name"] for item in tried} == {"ncm", "slda"}
    assert tried[0]["final_average"] == max(item["final_average"] for item in tried)
    config = Path("runs/squares-auto/config.yaml").read_text()
    assert f"chosen: {tried[0]['name']}" in config
    assert "train: 13" not in config


def test_same_command_returns_the_result_of_a_finished_run(stream: Command) -> None:
    first = stream("fit", "squares", *SHORT, "--json")
    before = contents(Path("runs"))
    again = stream("fit", "squares", *SHORT, "--json")
    assert again.out == first.out
    assert "nothing to learn" in again.err
    assert {k: v for k, v in contents(Path("runs")).items() if "features" not in k} == {
        k: v for k, v in before.items() if "features" not in k
    }


def test_other_settings_are_refused_in_the_same_folder(stream: Command) -> None:
    stream("fit", "squares", *SHORT)
    before = contents(Path("runs"))
    error = stream("fit", "squares", "--experiences", 1, "--learner", "ncm")
    assert "holds a run with other settings" in error.err.splitlines()[-1]
    assert error.code == 1
    assert contents(Path("runs")) == before


def test_learner_goes_on_with_the_next_folder(stream: Command, tmp_path: Path) -> None:
    week1, week2 = folder_of(tmp_path / "week1", ("red", "blue")), folder_of(tmp_path / "week2", ("green",))
    stream("fit", week1, "--learner", "slda", "--experiences", 2, "--out", "one")
    before = contents(Path("one"))
    answer = stream("fit", week2, "--continue", "one", "--out", "two", "--json")
    assert answer.code == 0, answer.err
    assert contents(Path("one")) == before
    info = inspect_learner("two/learner.safetensors")
    assert info.classes == ("blue", "red", "green")
    learner = load_learner("two/learner.safetensors", backbone=vit())
    assert isinstance(learner, HeadLearner)
    # nothing of the first week is lost: all samples are in one head
    assert learner.head.state()["counts"].tolist() == [4, 4, 4]
    scores = json.loads(stream("eval", "two", week1, "--json").out)
    assert scores["num_samples"] == 4
    assert set(scores["by_class"]) == {"red", "blue"}


def test_stopped_run_says_how_it_goes_on(stream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: HeadLearner, x: torch.Tensor, y: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HeadLearner, "observe", interrupted)
        answer = stream("fit", "squares", *SHORT)
    assert answer.code == 130
    assert "the same command goes on from the state in runs/squares-ncm" in answer.err
    assert stream("fit", "squares", *SHORT).code == 0


def test_backbone_is_adapted_to_the_first_experience(stream: Command) -> None:
    first = ("--first", 2, "--experiences", 2, "--method", "lora", "--method-set", "rank=2", "--method-epochs", 1)
    answer = stream("fit", "squares", "--learner", "ncm", *first)
    assert answer.code == 0, answer.err
    info = inspect_learner("runs/squares-ncm/learner.safetensors")
    (plugin,) = info.learner["settings"]["extract"]["extractor"]["plugins"]
    assert plugin["method"] == "lora"
    assert pt.inspect("runs/squares-ncm/first/plugin.safetensors").classes == ("red", "green")


def test_features_come_through_a_plugin_file(stream: Command, tmp_path: Path) -> None:
    pt.save(pt.adapt(vit(), pt.FacT(rank=2), classes=CLASSES, prove=False), tmp_path / "it.safetensors")
    assert stream("fit", "squares", *SHORT, "--plugin", tmp_path / "it.safetensors").code == 0
    info = inspect_learner("runs/squares-ncm/learner.safetensors")
    assert info.learner["settings"]["extract"]["extractor"]["plugins"][0]["method"] == "fact"


@pytest.mark.parametrize(
    ("learner", "more"),
    [
        ("generative", ("--backbone", "resnet10t", "--size", 32, "--augment", "shift", "--capacity", 6)),
        ("confit", ("--backbone", "resnet10t", "--size", 32, "--epochs", 1, "--batch-size", 2)),
        ("plugins", ("--method", "lora", "--method-set", "rank=2", "--epochs", 1)),
    ],
)
def test_networks_learn_are_kept_and_asked(stream: Command, tmp_path: Path, learner: str, more: Any) -> None:
    data = folder_of(tmp_path / "data", CLASSES)
    answer = stream("fit", data, "--learner", learner, "--experiences", 3, "--out", "it", *more, "--json")
    assert answer.code == 0, answer.err
    scores = json.loads(stream("eval", "it", data, "--json").out)
    assert scores["is_task_known"] == (learner != "generative")
    assert scores["accuracy"] == pytest.approx(json.loads(answer.out)["final_accuracy"])
    among = ("--among", "red") if learner != "generative" else ()
    (said, *_) = json.loads(stream("predict", "it", data / "test" / "red", *among, "--json").out)
    assert said["class"] in CLASSES


def test_classes_may_come_smoothly(stream: Command) -> None:
    answer = stream("fit", "squares", "--learner", "ncm", "--smooth", 0.1, "--experiences", 3, "--json")
    assert len(Path("runs/squares-ncm/metrics.jsonl").read_text().splitlines()) == 3
    assert json.loads(answer.out)["final_average"] <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--learner", "taerr"), r"no learner is called 'taerr' (did you mean 'taer'?)"),
        (("--set", "lr=1"), "--set is for a fresh learner that is named"),
        (("--learner", "taer", "--set", "rate=1"), "taer has no setting 'rate'"),
        (("--experiences", 9), "3 classes cannot be shared out among 9 experiences"),
        (("--learner", "taer", "--smooth", 0.1), "must be told where experiences begin and end"),
        (("--learner", "taer", "--epochs", 3), "TAER makes its own epochs"),
        (("--learner", "ncm", "--smooth", 0.1, "--method", "fact"), "has no first experience to adapt to"),
        (("--learner", "ncm", "--plugin", "a.safetensors", "--method", "fact"), "give one of them"),
        (("--smooth", 0.1, "--first", 2), "a smooth stream passes once"),
        (("--learner", "online-er", "--policy", "rings"), "exemplars are kept by class-balanced"),
        (("--learner", "confit"), "has no batch norm"),
        (("--continue", "nowhere"), "nowhere cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_learner(stream: Command, words: Any, message: str) -> None:
    answer = stream("fit", "squares", *("--experiences", 3) * ("--experiences" not in words), *words)
    (error,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert answer.code == 1
    assert answer.out == ""
    assert not list(Path().rglob("learner.safetensors"))


# eval, predict, report, inspect


def test_eval_refuses_what_the_learner_has_not_met(stream: Command, tmp_path: Path) -> None:
    week1 = folder_of(tmp_path / "week1", ("red", "blue"))
    stream("fit", week1, "--learner", "ncm", "--experiences", 2, "--out", "one")
    week2 = folder_of(tmp_path / "week2", ("green",))
    assert stream("eval", "one", week2).error == (
        f"week2 has the class 'green', which the learner in one has not met: `petiole stream fit {week2} "
        "--continue one` teaches it"
    )
    assert stream("eval", "one", week1, "--split", "tset").error.startswith("no split is called 'tset'")


def test_predict_chooses_among_what_is_named(stream: Command, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", CLASSES)
    stream("fit", data, *SHORT, "--out", "it")
    answer = stream("predict", "it", data / "test", "--among", "blue")
    assert answer.out.count("blue ") + answer.out.count(" blue") >= 6
    assert stream("predict", "it", data / "test", "--among", "blau").error.startswith("no class is called 'blau'")
    assert stream("predict", "it", tmp_path / "none").error


def test_report_compares_runs(stream: Command) -> None:
    stream("fit", "squares", *SHORT, "--out", "one")
    stream("fit", "squares", "--experiences", 3, "--learner", "slda", "--out", "two")
    answer = stream("report", "one", "two", "--out", "both.html", "--json")
    assert [row["run"] for row in json.loads(answer.out)] == ["one", "two"]
    page = Path("both.html").read_text()
    assert page.count("<svg") == 3
    assert "one and two" in page
    assert stream("report", "nowhere").error.startswith("nowhere holds no learner.safetensors")


def test_inspect_shows_what_a_learner_is_made_of(stream: Command, petiole: Command) -> None:
    stream("fit", "squares", "--experiences", 3, "--learner", "taer", "--exemplars", 2, "--set", "epochs=1")
    out = petiole("inspect", "runs/squares-taer/learner.safetensors").out
    for words in ("TAER(", "epochs=1", "ClassBalanced(", "features of tiny.v0", "3 experiences done", "3: red, green"):
        assert words in out
    found = json.loads(petiole("inspect", "runs/squares-taer/learner.safetensors", "--json").out)
    assert found["learner"]["part"] == "HeadLearner"


def test_files_of_other_kinds_say_who_takes_them(stream: Command, petiole: Command, tmp_path: Path) -> None:
    stream("fit", "squares", *SHORT)
    error = petiole("eval", "runs/squares-ncm/learner.safetensors", "squares").error
    assert "it holds 'learner': petiole.continual.load_learner and `petiole stream` take it" in error
    pt.save(pt.adapt(vit(), pt.FacT(rank=2), classes=CLASSES, prove=False), tmp_path / "it.safetensors")
    assert "holds a plugin, no learner" in stream("eval", tmp_path / "it.safetensors", "squares").error


def test_help_of_every_command_needs_no_run(stream: Command) -> None:
    for command in ("fit", "eval", "predict", "report"):
        answer = stream(command, "--help")
        assert (answer.code, answer.err) == (0, "")
        assert "Examples:" in answer.out
    assert is_empty()
    assert _stream.NAMES.count(",") == len(LEARNERS) - 1
