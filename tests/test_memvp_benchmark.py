"""Counts and tables of `benchmarks/memvp.py`, from rows whose numbers are known, and a run of it on a tiny model."""

import json
import types
from pathlib import Path
from typing import Any

import pytest

from benchmark_modules import load_benchmark

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def memvp() -> types.ModuleType:
    """The benchmark as a module, beside its neighbours."""
    return load_benchmark("memvp")


def rows(length: int = 64, prefill: float = 1.02, faster: float = 4.0, cache: int = 2**20) -> list[tuple[Any, Any]]:
    found = []
    for name, ratio in (("text", 1.0), ("MemVP", prefill), ("input", 5.0)):
        for phase in ("step", "prefill", "decode"):
            over = {"over_text": ratio, "over_MemVP": faster if name == "input" else 1.0}
            found.append((phase, name, {"seconds": 0.1 * ratio, **over}))
        found += [(f"{phase} memory", name, {"bytes": 2**21}) for phase in ("step", "prefill")]
        found.append(("cache", name, {"bytes": 2**20 if name == "text" else cache}))
    shared = {"shape": "7b", "length": length}
    return [({**shared, "phase": phase, "contestant": name}, metrics) for phase, name, metrics in found]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(("length", "expected"), [(64, 5.05), (128, 3.03), (256, 2.02), (512, 1.52)])
def test_promise_for_llama_7b_is_the_known_one(memvp: types.ModuleType, length: int, expected: float) -> None:
    config = memvp.config_of("7b")
    for phase in ("step", "prefill"):
        text, memory, prompts = (memvp.macs(config, phase, name, length) for name in memvp.NAMES)
        assert prompts / text == pytest.approx(expected, abs=0.005)
        assert memory / text == pytest.approx(1.013, abs=0.001)


def test_promise_for_a_token_is_memory_against_a_longer_cache(memvp: types.ModuleType) -> None:
    text, memory, prompts = (memvp.macs(memvp.config_of("7b"), "decode", name, 64) for name in memvp.NAMES)
    assert memory - text == 32 * 2 * 320 * 4096
    assert prompts - text == 32 * 2 * 256 * 4096


def test_promise_counts_shared_keys_and_values_once(memvp: types.ModuleType) -> None:
    # TinyLlama: q and o of 2048, k and v of 4 heads of 64, three matrices of 5632, and products with 9 tokens seen
    layer = 2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632 + 2 * 9 * 2048
    assert memvp.macs(memvp.config_of("1b"), "decode", "text", 9) == 22 * layer


def test_a_line_is_time_ratio_promise_and_memory_of_each_phase(memvp: types.ModuleType) -> None:
    (text,) = memvp.tables(rows())
    expected = ["102.0", "1.020", "1.013", "2", "102.0", "1.020", "1.013", "2", "102.0", "1.020", "1.013", "1.00"]
    assert cells(text)[3] == ["MemVP", *expected]


@pytest.mark.parametrize(
    ("settings", "bold"),
    [
        ({}, []),
        ({"prefill": 1.031}, ["1.031"]),
        ({"faster": 1.69}, ["1.69"]),
        ({"faster": 1.69, "length": 128}, []),
        ({"cache": 2**21}, ["2.00"]),
    ],
)
def test_missed_aim_is_bold(memvp: types.ModuleType, settings: dict[str, Any], bold: list[str]) -> None:
    (text,) = memvp.tables(rows(**settings))
    assert text.split("**")[1::2] == bold


def test_each_text_length_has_a_table_of_its_own(memvp: types.ModuleType) -> None:
    first, second = memvp.tables([*rows(64), *rows(128)])
    assert "length 64" in first
    assert "length 128" in second


@pytest.mark.slow
def test_a_run_fills_the_journal_once(
    memvp: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "memvp.jsonl"
    settings = ["--shape", "tiny", "--lengths", "4", "--rounds", "1", "--seconds", "0", "--out", str(journal)]
    monkeypatch.setattr("sys.argv", ["memvp.py", *settings])
    memvp.main()
    assert "trained: MemVP 155,808, input with LoRA of rank 80 155,808" in capsys.readouterr().out
    found = {(row["run"]["phase"], row["run"]["contestant"]): row["metrics"] for row in read(journal)}
    # keys and values of 2 layers, 4 tokens of width 32 in float32; in the input there are 256 more
    assert [found["cache", name]["bytes"] for name in memvp.NAMES] == [2048, 2048, 2048 * 65]
    assert all(found[phase, name]["seconds"] > 0 for phase in ("step", "prefill", "decode") for name in memvp.NAMES)
    before = journal.read_bytes()
    memvp.main()
    assert journal.read_bytes() == before


def read(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]
