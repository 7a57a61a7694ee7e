"""The floor and the tables of `benchmarks/vqa.py` from rows that are known, and a run of it on a tiny model."""

import gzip
import io
import json
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import petiole as pt
from asking import make_images, make_language_model, make_questions, make_tokenizer
from benchmark_modules import load_benchmark

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def vqa() -> types.ModuleType:
    """The benchmark as a module, beside its neighbours."""
    return load_benchmark("vqa")


def test_floor_is_that_of_a_plain_loop(vqa: types.ModuleType) -> None:
    rng = random.Random(0)
    train, asked = (
        [pt.Question(rng.choice("abcd"), (rng.choice(["yes", "yes", "no", "two"]),)) for _ in range(num)]
        for num in (60, 30)
    )
    asked.append(pt.Question("never met", ("yes",)))
    hits = 0
    for question in asked:
        said = [other.answers[0] for other in train if other.text == question.text]
        # of equally frequent answers, the first that was met
        hits += bool(said) and max(said, key=said.count) == question.answers[0]
    assert vqa.floor(train, asked) == pytest.approx(hits / 31)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nlvr_qa", 0.492), pytest.param("easy_vqa", 0.667, marks=pytest.mark.slow), ("bccd_vqa", 0.619)],
)
def test_floor_of_the_tasks_is_the_known_one(vqa: types.ModuleType, data: Path, name: str, expected: float) -> None:
    task = vqa.open_all(data, name)
    assert vqa.floor(task.train, task.test) == pytest.approx(expected, abs=5e-4)


def test_drawn_questions_are_the_same_ones_in_their_order(vqa: types.ModuleType) -> None:
    questions = make_questions(range(20))
    found = vqa.draw(questions, 7)
    places = [question.images[0] for question in found]
    assert places == sorted(set(places))
    assert len(places) == 7
    assert found == vqa.draw(questions, 7)
    assert vqa.draw(questions, 50) == questions


def rows(memory: float = 0.8, task: str = "easy_vqa") -> list[tuple[Any, Any]]:
    """Two settings of MemVP, of which the one that is worse on test is better on validation, and what is beside it."""
    shared = {"phase": "run", "task": task}
    found = [({**shared, "contestant": "question only", "settings": {}, "seed": 0}, scores(0.6, 0.7) | {"all": 0.667})]
    for scale, val, test in ((1.0, 0.5, 0.9), (3.0, 0.6, memory)):
        run = {**shared, "contestant": "MemVP", "settings": {"scale": scale, "lr": 0.02}}
        found.append(({**run, "seed": 0}, scores(val, test)))
    found += [({**run, "seed": seed}, scores(0.1, memory)) for seed in (1, 2)]
    return [*found, ({**shared, "contestant": "input", "settings": {"lr": 0.01}, "seed": 0}, scores(0.6, 0.81))]


def scores(val: float, test: float) -> dict[str, float]:
    return {"val_accuracy": val, "test_accuracy": test}


def test_setting_is_the_best_on_validation_with_seed_0(vqa: types.ModuleType) -> None:
    (text,) = vqa.tables(rows())
    assert "| MemVP | scale 3, lr 0.02 | 60.0 | 80.0 +- 0.0 |" in text


@pytest.mark.parametrize(
    ("memory", "task", "bold"),
    [
        (0.801, "easy_vqa", []),
        (0.74, "easy_vqa", ["+4.0", "-7.0"]),
        (0.79, "easy_vqa", ["-2.0"]),
        (0.74, "bccd_vqa", ["-7.0"]),
    ],
)
def test_missed_aim_is_bold(vqa: types.ModuleType, memory: float, task: str, bold: list[str]) -> None:
    (text,) = vqa.tables(rows(memory, task))
    assert text.split("**")[1::2] == bold


def test_each_task_has_a_table_of_its_own(vqa: types.ModuleType) -> None:
    first, second = vqa.tables([*rows(), *rows(task="nlvr_qa")])
    assert first.startswith("phase run, task easy_vqa\n")
    assert second.startswith("phase run, task nlvr_qa\n")


@pytest.fixture
def squares(vqa: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The colours of squares as a task of the benchmark, asked of a tiny random Llama."""
    (tmp_path / "vqa").mkdir()
    images, questions = make_images(24), make_questions(range(24))
    parts: list[bytes] = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "png")
        parts.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, parts)])
    np.savez(tmp_path / "vqa" / "pack_images.npz", data=np.frombuffer(b"".join(parts), np.uint8), offsets=offsets)
    with gzip.open(tmp_path / "vqa" / "squares.jsonl.gz", "wt") as file:
        for i, question in enumerate(questions):
            split = "train" if i < 16 else "val" if i < 20 else "test"
            row = {"image": i, "question": question.text, "answer": question.target, "split": split}
            file.write(json.dumps(row) + "\n")
    monkeypatch.setattr(vqa, "TASKS", {"squares": "pack"})
    monkeypatch.setattr(vqa, "language_model", lambda data: make_language_model())
    monkeypatch.setattr(vqa, "tokenizer", lambda data: make_tokenizer())
    # a process of tests is not to be forked
    monkeypatch.setattr(vqa, "peak", lambda make, device: 2.0**20)
    return tmp_path


def test_who_sees_no_images_is_given_none(vqa: types.ModuleType, squares: Path) -> None:
    task = vqa.open_all(squares, "squares")
    exam = vqa.Exam(task, make_language_model(), make_tokenizer())
    for name, keys in (("MemVP", {"features", "indicator"}), ("MemVP, no images", set())):
        steps, asked = exam.steps(name, vqa.CONTESTANTS[name].grid[0])
        assert {key for quiz in (steps.train, *asked.values()) for key in quiz.look.of(quiz.questions)} == keys


def test_contestants_train_alike_and_choose_alike(vqa: types.ModuleType) -> None:
    language = make_language_model()
    sizes = {name: vqa.num_trained(c.make(language, 192)) for name, c in vqa.CONTESTANTS.items()}
    sizes.pop("input")
    assert len(set(sizes.values())) == 1
    rank = vqa.rank_for(sizes["MemVP"], language, d_image=192, hidden=64)
    others = [vqa.num_trained(vqa.in_input(language, 192, rank=r)) for r in (rank - 1, rank)]
    assert others[0] < sizes["MemVP"] <= others[1]
    assert len({len(contestant.grid) for contestant in vqa.CONTESTANTS.values()}) == 1


@pytest.mark.slow
def test_a_run_fills_the_journal_once(
    vqa: types.ModuleType, squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = squares / "vqa.jsonl"
    settings = ["--data", str(squares), "--tasks", "squares", "--contestants", "MemVP;input", "--seen", "16"]
    settings += ["--seeds", "2", "--rounds", "1", "--seconds", "0", "--out", str(journal)]
    monkeypatch.setattr("sys.argv", ["vqa.py", *settings])
    vqa.main()
    printed = capsys.readouterr().out
    # costs of two, the floor, and of each contestant three settings and a second seed
    found = [json.loads(line)["run"] for line in journal.read_text().splitlines()]
    assert [row["phase"] for row in found] == ["cost"] * 2 + ["run"] * 9
    assert "| question only |  |" in printed
    before = journal.read_bytes()
    vqa.main()
    assert journal.read_bytes() == before
    monkeypatch.setattr("sys.argv", ["vqa.py", "--known", "--out", str(journal)])
    capsys.readouterr()
    vqa.main()
    assert printed.endswith(capsys.readouterr().out)
