"""Tables of `benchmarks/tokens.py`, from rows whose numbers are known."""

import types
from typing import Any

import pytest

from benchmark_modules import load_benchmark

SHARED = {"machine": "abacus", "torch": "2", "dtype": "fp16", "threads": 1, "compile": False, "batch": 8}


@pytest.fixture(scope="module")
def tokens() -> types.ModuleType:
    """The benchmark as a module, beside its neighbours."""
    return load_benchmark("tokens")


def row(r: int, macs: float, speed_up: float, *, device: str = "cpu", method: str = "tome") -> tuple[Any, Any]:
    run = {**SHARED, "phase": "speed", "model": "vit_base_patch16_224", "method": method, "r": r, "device": device}
    found = {"tokens": 197 - 12 * r, "macs": macs, "images_per_second": 40 * speed_up, "rounds": 3}
    return run, found | {"speed_up": speed_up, "lowest": speed_up - 0.1, "highest": speed_up + 0.1}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_promise_is_the_ratio_of_operations(tokens: types.ModuleType) -> None:
    (table,) = tokens.tables([row(0, 18e9, 1.0), row(8, 12e9, 1.4)])
    assert cells(table)[2:] == [
        ["tome", "0", "197", "18.00", "40.0", "1.00", "1.00", "0.90 .. 1.10", "1.00", ""],
        ["tome", "8", "101", "12.00", "56.0", "1.50", "1.40", "1.30 .. 1.50", "0.93", "0.80"],
    ]


@pytest.mark.parametrize(("speed_up", "share"), [(1.78, "**0.89**"), (1.82, "0.91")])
def test_less_than_nine_tenths_of_the_promise_is_bold(tokens: types.ModuleType, speed_up: float, share: str) -> None:
    (table,) = tokens.tables([row(0, 2e9, 1.0), row(16, 1e9, speed_up)])
    assert cells(table)[-1][8] == share


@pytest.mark.parametrize(
    ("r", "speed_up", "device", "method", "shown"),
    [
        (8, 1.24, "cuda", "tome", "**1.24**"),
        (8, 1.26, "cuda", "tome", "1.26"),
        (13, 1.49, "cuda", "tome", "**1.49**"),
        (8, 1.24, "cpu", "tome", "1.24"),
        (8, 1.24, "cuda", "evit", "1.24"),
        (4, 1.01, "cuda", "tome", "1.01"),
    ],
)
def test_missed_bar_of_a_gpu_is_bold(
    tokens: types.ModuleType, r: int, speed_up: float, device: str, method: str, shown: str
) -> None:
    (table,) = tokens.tables([row(0, 18e9, 1.0, device=device), row(r, 17e9, speed_up, device=device, method=method)])
    assert cells(table)[-1][6] == shown


def test_each_model_and_machine_has_a_table_of_its_own(tokens: types.ModuleType) -> None:
    rows = [row(0, 18e9, 1.0), row(0, 18e9, 1.0, device="cuda"), row(8, 12e9, 1.4)]
    first, second = tokens.tables(rows)
    assert [line[1] for line in cells(first)[2:]] == ["0", "8"]
    assert [line[1] for line in cells(second)[2:]] == ["0"]


def test_profile_gives_times_and_shares_and_leaves_out_what_never_ran(tokens: types.ModuleType) -> None:
    run = {**SHARED, "phase": "profile", "model": "micro", "method": "tome", "r": 8, "device": "cpu"}
    spent = dict.fromkeys((*tokens.SECTIONS, tokens.REST), 0.0) | {"MLP": 6.0, "matching": 2.0}
    (table,) = tokens.tables([(run, spent)])
    assert cells(table) == [
        ["ms a pass", "tome 8"],
        ["---", "---:"],
        ["MLP", "6.00 (75.0%)"],
        ["matching", "2.00 (25.0%)"],
        ["whole", "8.00"],
    ]


def test_switches_of_all_models_share_a_table(tokens: types.ModuleType) -> None:
    runs = [{**SHARED, "phase": "switch", "model": m, "method": "tocom", "r": 8, "device": "cpu"} for m in ("a", "b")]
    found = {"set_budget": 1.234, "pass": 20.0, "folded": 1.0, "unfolded": 1.25}
    (table,) = tokens.tables([(run, found) for run in runs])
    assert cells(table)[2:] == [[m, "8", "8", "1.23", "20.0", "1.000", "1.250"] for m in ("a", "b")]


def test_sections_count_time_once(tokens: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        """Time passes only where it is said to."""

        seconds = 0.0

        def outer(self) -> None:
            self.seconds += 1
            self.inner()
            self.seconds += 2

        def inner(self) -> None:
            self.seconds += 4

    model, places = Model(), {"outer": ((Model, "outer"),), "inner": ((Model, "inner"),)}
    monkeypatch.setattr(tokens, "SECTIONS", places)
    clock = types.SimpleNamespace(read=lambda: model.seconds)
    with tokens.sections(clock) as spent:
        model.outer()
        model.seconds += 8
    assert spent == {"outer": 3, "inner": 4, tokens.REST: 8}
