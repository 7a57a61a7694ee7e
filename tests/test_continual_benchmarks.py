"""`benchmarks/heads.py` and `benchmarks/continual.py`: tiny runs of them, and their tables from rows that are known."""

import json
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmark_modules import load_benchmark

Arrays = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def heads() -> types.ModuleType:
    loaded = load_benchmark("heads")
    loaded.NUM_EXPERIENCES = 2
    return loaded


@pytest.fixture(scope="module")
def continual() -> types.ModuleType:
    return load_benchmark("continual")


def features(seed: int, each: int = 6) -> Arrays:
    """Returns 20 classes of width 20, which noise blurs."""
    labels = torch.arange(20).repeat(each)
    noise = torch.randn(len(labels), 20, generator=torch.Generator().manual_seed(seed))
    return 2 * torch.eye(20)[labels] + noise, labels


def asked(**other: Any) -> dict[str, Any]:
    common = {"set": "tiny", "head": "TAER", "per_class": 1, "phase": "test", "seed": 0}
    return {**common, "settings": {"lr": 0.1}, **other}


def finals(heads: types.ModuleType, values: dict[tuple[str, int], float]) -> dict[tuple[str, int], Any]:
    metrics = dict.fromkeys((*heads.METRICS, "seconds"), 0.25)
    return {
        (head, size): [asked(head=head, per_class=size) | metrics | {"final_average": value}]
        for (head, size), value in values.items()
    }


@pytest.mark.parametrize(("head", "size"), [("TAER", 1), ("DER++", 2), ("SLDA", 0), ("joint", 0)])
def test_a_run_of_a_head_is_made_once(heads: types.ModuleType, tmp_path: Path, head: str, size: int) -> None:
    journal, parts = heads.Journal(tmp_path / "heads.jsonl"), {("tiny", "test"): (features(0), features(1))}
    run = asked(head=head, per_class=size, settings=heads.grid(head)[-1])
    found = heads.once(journal, run, parts)
    assert found["final_average"] > 0.1  # chance is 0.05
    assert set(found) == {*heads.METRICS, "seconds"}
    before = journal.path.read_bytes()
    assert heads.once(journal, run, {}) == found
    assert journal.path.read_bytes() == before


def test_a_run_that_diverges_counts_as_nothing_learnt(heads: types.ModuleType, tmp_path: Path) -> None:
    parts = {("tiny", "test"): (features(0), features(1))}
    run = asked(head="DER++", settings={"lr": 1e3, "alpha": 100.0})
    assert heads.once(heads.Journal(tmp_path / "heads.jsonl"), run, parts)["final_average"] == 0


def test_settings_are_chosen_on_other_classes_and_reported_for_each_seed(
    heads: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "heads.jsonl"
    parts = {("tiny", "choose"): (features(2), features(3)), ("tiny", "test"): (features(0), features(1))}
    monkeypatch.setattr(heads, "read", lambda data, folder: parts)
    args = heads.options().parse_args(["--sets", "tiny", "--heads", "NCM;SLDA", "--seeds", "2", "--out", str(out)])
    heads.run_all(heads.Journal(out), args)
    runs = [row["run"] for row in map(json.loads, out.read_text().splitlines())]
    assert [(run["head"], run["phase"], run["seed"]) for run in runs] == [
        *[("NCM", "choose", 0)] * 2,
        *[("NCM", "test", seed) for seed in range(2)],
        *[("SLDA", "test", seed) for seed in range(2)],
    ]


def test_arrays_are_numbered_in_the_order_of_their_classes(heads: types.ModuleType) -> None:
    samples = heads.CachedFeatures(torch.arange(6.0)[:, None], torch.tensor([7, 3, 7, 3, 3, 5]))
    x, y = heads.arrays(samples, [3, 7], per_class=2)
    assert x[:, 0].tolist() == [1, 3, 0, 2]
    assert y.tolist() == [0, 0, 1, 1]


def test_a_table_has_a_line_for_each_head_and_size(heads: types.ModuleType, tmp_path: Path) -> None:
    journal = heads.Journal(tmp_path / "heads.jsonl")
    metrics = dict.fromkeys(heads.METRICS, 0.5) | {"seconds": 2.0}
    for seed, final in ((0, 0.25), (1, 0.75)):
        journal.add(asked(seed=seed), metrics | {"final_average": final})
    journal.add(asked(head="SLDA", per_class=0, settings={}), metrics)
    for lr, final in ((0.1, 0.6), (0.3, 0.5)):
        journal.add(asked(phase="choose", settings={"lr": lr}), metrics | {"final_average": final})
    journal.add(asked(settings={"lr": 0.3}), metrics)  # was best once
    assert heads.table(heads.cells(journal, "tiny")).splitlines()[2:] == [
        "| TAER | 1 | lr 0.1 | 50.0 +- 35.4 | 50.0 +- 0.0 | 50.0 +- 0.0 | 50.0 +- 0.0 | 2.0 |",
        "| SLDA |  |  | 50.0 | 50.0 | 50.0 | 50.0 | 2.0 |",
    ]


def test_rates_are_compared_at_the_best_of_other_settings(heads: types.ModuleType, tmp_path: Path) -> None:
    journal, metrics = heads.Journal(tmp_path / "heads.jsonl"), dict.fromkeys(heads.METRICS, 0.5)
    for lr, alpha, final in ((0.01, 0.5, 0.2), (0.01, 3.0, 0.4), (0.1, 0.5, 0.3)):
        run = asked(head="DER++", phase="choose", settings={"lr": lr, "alpha": alpha})
        journal.add(run, metrics | {"final_average": final})
    journal.add(asked(), metrics)
    assert heads.rates(journal, "tiny").splitlines()[2:] == ["| DER++ | 1 |  |  | 40.0 |  | 30.0 |  |  |"]


@pytest.mark.parametrize(
    ("taer", "bold"), [(0.46, []), (0.44, ["-6.0"]), (0.39, ["-1.0", "-11.0"])], ids=["met", "far", "behind"]
)
def test_a_claim_that_fails_is_bold(heads: types.ModuleType, taer: float, bold: list[str]) -> None:
    found = finals(heads, {("ER", 5): 0.3, ("ER-ACE", 5): 0.4, ("TAER", 5): taer, ("joint", 0): 0.5, ("SLDA", 0): 0.9})
    words = heads.verdict(found)
    assert words.split("**")[1::2] == bold
    assert "ER-ACE, the best other replay head" in words


def small() -> nn.Module:
    """Returns the same network each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())


def measured(part: str, what: str, more: float, faster: float) -> tuple[dict[str, Any], dict[str, float]]:
    spread = {f"{end}_{key}": value for key, value in (("more", more), ("faster", faster)) for end in ("least", "most")}
    run = {"part": part, "what": what, "machine": "a machine", "torch": "2", "threads": 1}
    return run, {"ours": 1.0, "other": 2.0, "more": more, "faster": faster, **spread}


@pytest.mark.parametrize("replay", [0, 4])
def test_the_plain_loop_learns_what_the_driver_does(continual: types.ModuleType, replay: int) -> None:
    stream, (ours, plain) = continual.random_stream((6,), 6, 10), (small(), small())
    learner = continual.learner_of(ours, replay)
    for _ in continual.run(stream, learner):
        pass
    layers = continual.plain_loop(plain, [(e.classes, list(e.batches())) for e in stream], replay)
    learnt = [*ours.state_dict().values(), *learner.objective.rows.blocks.state_dict().values()]
    expected = [*plain.state_dict().values(), *layers.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(learnt, expected, strict=True))


def test_a_comparison_is_of_medians_within_rounds(continual: types.ModuleType) -> None:
    # the first of each is left out
    ours, other = iter([9.0, 0.001, 0.002, 0.004]), iter([0.0, 0.004, 0.004, 0.004])
    found = continual.compared(lambda: next(ours), lambda: next(other), Namespace(rounds=3))
    assert (found["ours"], found["other"], found["more"], found["faster"]) == pytest.approx((2, 4, -2, 2))
    assert (found["least_more"], found["most_faster"]) == pytest.approx((-3, 4))


@pytest.mark.parametrize(
    ("part", "more", "faster", "bold"),
    [
        ("overhead", 0.09, 0.5, []),
        ("overhead", 0.11, 9.0, ["0.110 (0.110 .. 0.110)"]),
        ("avalanche", 0.5, 3.1, []),
        ("avalanche", -9.0, 2.9, ["2.900 (2.900 .. 2.900)"]),
        ("cache", -9.0, 9.9, ["9.900 (9.900 .. 9.900)"]),
    ],
)
def test_a_missed_aim_is_bold(
    continual: types.ModuleType, tmp_path: Path, part: str, more: float, faster: float, bold: list[str]
) -> None:
    journal = continual.Journal(tmp_path / "continual.jsonl")
    journal.add(*measured(part, "ER", more, faster))
    text = continual.tables(journal)
    assert text.startswith("machine a machine, torch 2, threads 1\n\n|")
    assert text.split("**")[1::2] == bold


def test_a_run_of_a_part_is_made_once(
    continual: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "continual.jsonl"
    monkeypatch.setattr(continual, "NETWORKS", {"small": (small, (6,), 4, 2)})
    monkeypatch.setattr(
        "sys.argv", ["continual.py", "--parts", "overhead", "--networks", "small", "--rounds", "1", "--out", str(out)]
    )
    continual.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["run"]["what"] for row in rows] == ["fine-tuning, small", "ER, small"]
    assert all(row["metrics"]["ours"] > 0 and row["metrics"]["other"] > 0 for row in rows)
    before = out.read_bytes()
    continual.main()
    assert out.read_bytes() == before


def test_without_avalanche_it_says_how_to_get_it(continual: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "avalanche.benchmarks", None)
    with pytest.raises(SystemExit, match="needs Avalanche: pip install avalanche-lib"):
        continual.avalanche_step(small(), continual.random_stream((6,), 2, 4), 4, continual.Clock("cpu", 1))


@pytest.mark.slow
def test_a_cache_saves_passes_of_the_backbone(continual: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continual, "EPOCHS", 3)
    (found,) = continual.cache("digits", Namespace(images=8, rounds=1, clock=continual.Clock("cpu", 1))).values()
    assert found["faster"] > 1
