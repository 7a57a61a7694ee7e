"""`benchmarks/protocol.py`, `pareto.py` and `rounding.py`: what a run may see, bytes, and tables of known rows."""

import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import petiole as pt
from benchmark_modules import load_benchmark
from fitting import make_task, vit


@pytest.fixture(scope="module")
def rounding() -> types.ModuleType:
    return load_benchmark("rounding")


@pytest.fixture(scope="module")
def pareto() -> types.ModuleType:
    return load_benchmark("pareto")


@pytest.fixture
def args(rounding: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Returns options under which everything works on the tiny model and task."""
    monkeypatch.setitem(rounding.train.__globals__, "open_host", lambda args: vit())
    monkeypatch.setattr(pt, "open_task", lambda source: make_task())
    named = {"methods": "adaptformer-8-32bit", "tasks": "squares", "data": "", "out": tmp_path / "pareto.jsonl"}
    lengths = {"epochs": 2, "choose_epochs": 1, "seeds": 2, "precision": "fp32", "backbone": "tiny"}
    return Namespace(**named, **lengths, known=False)


def test_settings_are_chosen_without_the_test_images_and_tested_once_a_seed(
    pareto: types.ModuleType, args: Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int, float, int, bool, bool]] = []

    def train(contestant: Any, task: pt.Task, run: dict[str, Any], args: Namespace) -> tuple[None, pt.FitResult]:
        scale = run["settings"]["scale"]
        asked.append((run["phase"], run["seed"], scale, run["epochs"], task.val is None, task.test is None))
        # the scale that is worse on validation would be the better one on test
        return None, pt.FitResult({"last_val_accuracy": 1 / scale, "last_test_accuracy": scale / 10})

    monkeypatch.setitem(pareto.run_all.__globals__, "train", train)
    journal = pareto.run_all(pareto.CONTESTANTS, args)
    choices = [("choose", 0, scale, 1, False, True) for scale in (1.0, 10.0)]
    assert asked == choices + [("test", seed, 1.0, 2, True, False) for seed in (0, 1)]
    assert [run["last_test_accuracy"] for run in journal.tests([args.methods])[args.methods]["squares"]] == [0.1, 0.1]
    pareto.run_all(pareto.CONTESTANTS, args)
    assert len(asked) == 4
    capsys.readouterr()
    pareto.table_of_choices(journal)
    rows = ["| adaptformer-8-32bit | 0.003 | 1 | 1 | 100.0 |", "| adaptformer-8-32bit | 0.003 | 10 | 1 | 10.0 |"]
    assert capsys.readouterr().out.splitlines()[2:] == rows


@pytest.mark.parametrize("name", ["adaptformer-32-1bit", "lora-1-2bit", "fact-tt16-4bit", "convpass-8-32bit"])
@pytest.mark.parametrize("head_bits", [1, 32])
def test_bytes_of_plugin_and_head_are_those_of_a_file(
    pareto: types.ModuleType, name: str, head_bits: int, tmp_path: Path
) -> None:
    contestant, classes = pareto.CONTESTANTS[name], [str(i) for i in range(5)]
    plugin = pareto.method(contestant.method, **contestant.fixed)
    model = pt.adapt(pt.backbone("micro"), plugin, classes=classes, head_bits=head_bits, prove=False)
    pt.save(model, tmp_path / "a.safetensors")
    tensors = pt.inspect(tmp_path / "a.safetensors").tensors
    sizes = dict.fromkeys(("plugins", "head"), 0)
    for tensor in tensors:
        sizes[tensor.name.split(".")[0]] += tensor.num_bytes
    assert sizes == {"plugins": pareto.plugin_bytes(contestant), "head": pareto.head_bytes(5, head_bits)}


def test_rounding_trains_the_run_of_the_journal_again_and_prints_both(
    rounding: types.ModuleType, args: Namespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pareto, args.seeds = load_benchmark("pareto"), 1
    monkeypatch.setattr(rounding, "METHODS", (args.methods,))
    trained = pareto.run_all(pareto.CONTESTANTS, args)
    rounded = rounding.Journal(args.out.with_name("rounding.jsonl"))
    for _ in range(2):
        rounding.run_task(trained, rounded, args.methods, None, args)
    ((_, found),) = rounded.runs()
    *_, (_, again) = trained.runs()
    assert found["32 bit"] == again["last_test_accuracy"]
    # levels of 8 bits are so near to each other that no answer changes
    assert found["8 bit"] == found["32 bit"]
    capsys.readouterr()
    monkeypatch.setitem(rounding.mean_of_groups.__globals__, "GROUPS", {"one": ("squares",)})
    rounding.table(trained, rounded)
    score = f"{100 * found['32 bit']:.1f}"
    assert capsys.readouterr().out.splitlines()[:3] == [
        "| plugin | bits | squares | mean |",
        "|---|---:|---:|---:|",
        f"| adaptformer-8 | 32 | {score} / {score} | {score} / {score} |",
    ]


def test_frontier_is_what_no_plugin_of_at_most_its_bytes_beats(pareto: types.ModuleType, tmp_path: Path) -> None:
    pairs = [(4, 60.0), (8, 59.0), (8, 61.0), (9, 61.0), (64, 70.0), (65, 69.0), (3, 50.0)]
    points = [pareto.Point("lora", "8", 1, *pair) for pair in pairs]
    alone = [p for p in points if not any(o != p and o[3] <= p[3] and o[4] >= p[4] for o in points)]
    assert pareto.frontier(points) == sorted(alone, key=lambda p: p.num_bytes)
    pareto.draw(points, tmp_path / "a.svg")
    pareto.draw(points, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
