"""Every method on every family of backbones, and the page that says so."""

import re
from pathlib import Path

import pytest

import petiole.plugins
from support import FAMILIES, METHODS, PAGE, try_out


@pytest.fixture(scope="module")
def page() -> dict[tuple[str, str], str]:
    """The cells of the matrix in the documentation, by method and family."""
    cells, methods = {}, []
    for line in PAGE.read_text().splitlines():
        first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| |"):
            methods = rest
        elif line.startswith("| "):
            cells |= {(method, first): cell for method, cell in zip(methods, rest, strict=True)}
    return cells


@pytest.fixture(scope="module")
def notes() -> dict[str, str]:
    """The reasons below the matrix, by number."""
    text = PAGE.read_text().partition("What the library says:")[2]
    found = re.findall(r"^(\d+)\. (.*?)$(?=\n\d+\. |\n*\Z)", text, re.MULTILINE | re.DOTALL)
    return {number: " ".join(reason.split()) for number, reason in found}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_method_on_family_is_as_the_page_says(
    method: str, family: str, tmp_path: Path, page: dict[tuple[str, str], str], notes: dict[str, str]
) -> None:
    trial = try_out(method, family, tmp_path)
    cell, _, note = page[method, family].partition(" [")
    assert (cell, notes[note.rstrip("]")] if note else "") == (trial.cell, trial.reason and f"{trial.reason}.")


def test_the_page_has_every_method() -> None:
    tried = {make().method for make in METHODS.values()}
    assert tried == set(petiole.plugins.METHODS)
