"""What long work shows: plain lines in a pipe, a bar on a terminal."""

import os
import subprocess
import sys
import time

import pytest

from petiole.train.progress import Progress

Capture = pytest.CaptureFixture[str]


def test_few_notes_are_a_line_each(capsys: Capture) -> None:
    with Progress("LoRA", 6, num_notes=3) as bar:
        for step, note in enumerate(("", "one", "one", "two", "two", "three"), start=1):
            bar.at(step, note)
    assert capsys.readouterr().err.splitlines() == ["LoRA: 2/6 one", "LoRA: 4/6 two", "LoRA: 6/6 three"]


def test_of_many_notes_one_an_interval_is_shown(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 3))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with Progress("LoRA", 100, num_notes=100) as bar:
        for step in range(1, 101):
            bar.at(step, f"epoch {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "LoRA: 4/100 epoch 4"  # twelve seconds after the start: the first look after ten
    assert lines[-1] == "LoRA: 100/100 epoch 100"
    assert 20 <= len(lines) <= 30


def test_end_is_always_a_line(capsys: Capture) -> None:
    with Progress("LoRA", 2, num_notes=100) as bar:
        bar.at(1)
        bar.at(2)
    assert capsys.readouterr().err == "LoRA: 2/2\n"


def test_work_aside_is_silent_when_it_is_short(capsys: Capture) -> None:
    with Progress("reading", 2, is_aside=True) as bar:
        bar.at(1)
        bar.at(2)
    assert capsys.readouterr().err == ""


def test_nothing_is_printed_when_not_shown(capsys: Capture) -> None:
    with Progress("LoRA", 1, is_shown=False) as bar:
        bar.say("hello")
        bar.at(1, "done")
    assert capsys.readouterr() == ("", "")


_SCRIPT = """
from petiole.train.progress import Progress
with Progress("[b]LoRA", 3, num_notes=3) as bar:
    for step in range(1, 4):
        bar.at(step, f"epoch {step} [of 3]")
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_terminal_gets_a_bar() -> None:
    ours, theirs = os.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", _SCRIPT], stderr=theirs, stdout=subprocess.PIPE, env=env, check=False)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    text = shown.decode()
    assert (done.returncode, done.stdout) == (0, b"")
    assert "━" in text  # the bar itself
    assert "[b]LoRA" in text
    assert "3/3" in text
    assert "epoch 3 [of 3]" in text
