"""What README and docs show is true: code runs, commands parse, links lead somewhere, counts are counted."""

import ast
import doctest
import importlib
import importlib.util
import re
import shlex
import sys
import types
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

import asking
import petiole as pt
import test_contract
from contract import DEPTH, WIDTH, Row
from petiole.backbones import VIEWS, view_of
from petiole.cli.app import app
from petiole.core.plugin import Tuning
from petiole.files import metadata
from petiole.files.codes import packed
from petiole.plugins import METHODS
from petiole.tasks import BUILT_IN, Task

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SRC = ROOT / "src" / "petiole"
MICRO = SRC / "assets" / "micro.safetensors"
METHOD_PAGE = ROOT / "docs" / "adding_a_method.md"

FENCE = re.compile(r"(?:<!-- (runnable[^\n]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# the properties every method is asked for, by name
PROPERTIES = {
    n: f for n, f in vars(test_contract).items() if n.startswith("test_") and [*signature(f).parameters] == ["row"]
}

needs_micro = pytest.mark.skipif(not MICRO.exists(), reason="needs the bundled backbone, assets/micro.safetensors")


def blocks(language: str, path: Path) -> list[tuple[int, str, str]]:
    """Line, mark and text of every fenced block of a language; a mark is the comment `runnable` right above."""
    text = path.read_text(encoding="utf8")
    found = [(text.count("\n", 0, m.start(3)) + 1, m[1] or "", m[3]) for m in FENCE.finditer(text) if m[2] == language]
    return found


def params(language: str) -> list[Any]:
    return [
        pytest.param(path, mark, text, id=f"{path.name}:{line}")
        for path in PAGES
        for line, mark, text in blocks(language, path)
    ]


def examples() -> list[Any]:
    """Module, name and docstring of every function and class with an example; read, not imported."""
    found = []
    for path in sorted(SRC.rglob("*.py")):
        module = ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text(encoding="utf8")).body:
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if text and ">>>" in text:
                found.append(pytest.param(module, text, id=node.name))
    return found


RUNNABLE = [case for case in params("python") if case.values[1] == "runnable"]
COMMANDS = [
    pytest.param(line.split("#")[0].strip(), id=f"{case.id}-{i}")
    for case in params("sh")
    for i, line in enumerate(case.values[2].splitlines())
    if line.startswith("petiole ")
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the examples read, where the digits are a tenth of all."""
    digits = BUILT_IN["digits"](0)
    parts = [part.part(range(80)) for part in (digits.train, digits.val, digits.test)]
    monkeypatch.setitem(BUILT_IN, "digits", lambda seed: Task("digits", digits.classes, *parts))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 60), "tan").save("tom.jpg")
    model = pt.adapt(pt.backbone("micro"), pt.FacT(rank=2), classes=["cat", "dog"])
    for name in ("pets", "digits"):
        pt.save(model, f"{name}.safetensors")
    return tmp_path


def language(folder: Path) -> dict[str, Any]:
    """What examples of eyes call the reader's own: a tiny language model, its tokenizer and questions."""
    model = asking.make_language_model()
    eyes = pt.give_eyes(model, pt.backbone("micro"), pt.MemVP(slots=64), prove=False)
    pt.save_eyes(eyes, folder / "dots.safetensors")
    mine = {"language_model": model, "tokenizer": asking.make_tokenizer(), "questions": asking.make_task()}
    return {**mine, "Image": Image}


@needs_micro
@pytest.mark.slow
@pytest.mark.parametrize(("path", "mark", "text"), RUNNABLE)
def test_runnable_code_runs(path: Path, mark: str, text: str, folder: Path) -> None:
    exec(compile(text.replace("epochs=12", "epochs=1"), path.name, "exec"), {"__name__": "example"})


@pytest.mark.parametrize(("path", "mark", "text"), params("python"))
def test_shown_names_exist(path: Path, mark: str, text: str) -> None:
    names = set(re.findall(r"\bpt\.(\w+)", text)) - {"Bottleneck"}
    assert names <= set(pt.__all__)


@needs_micro
@pytest.mark.slow
@pytest.mark.parametrize(("module", "text"), examples())
def test_example_in_docstring_runs(module: str, text: str, folder: Path) -> None:
    names = {**vars(importlib.import_module(module)), "pt": pt, **(language(folder) if "vision" in module else {})}
    for example in doctest.DocTestParser().get_examples(text):
        if example.want:
            assert repr(eval(example.source, names)) == example.want.strip()
        else:
            exec(example.source, names)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str) -> None:
    group = typer.main.get_command(app)
    name, *arguments = shlex.split(command)[1:]
    assert name in group.commands, f"there is no command {name}"
    group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_named_in_a_sentence_exist(path: Path) -> None:
    named = set(re.findall(r"`petiole ([\w-]+)", path.read_text(encoding="utf8")))
    assert named <= set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_resolve(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf8"))
    broken = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_named_in_a_page_exist(path: Path) -> None:
    named = re.findall(r"`((?:src|tests|docs|benchmarks|training)/[\w./]+\.\w+)`", path.read_text(encoding="utf8"))
    assert not [name for name in named if name != "src/petiole/plugins/bottleneck.py" and not (ROOT / name).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_lines_fit_the_page(path: Path) -> None:
    lines = path.read_text(encoding="utf8").splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 120]


@pytest.mark.parametrize("target", ["demo", "test", "lint", "clean"])
def test_make_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE)


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert script.read_text(encoding="utf8") == "#!/bin/sh\nexec make test\n"
    assert script.stat().st_mode & 0o111
    assert "make test " in (ROOT / "README.md").read_text(encoding="utf8")


def table(path: Path, mark: str) -> Iterator[list[str]]:
    """The cells of a marked table, row by row, without its head."""
    text = path.read_text(encoding="utf8")
    inside = text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip().splitlines()
    return ([cell.strip() for cell in line.strip("|").split("|")] for line in inside[2:])


def test_counts_in_the_method_table_are_those_of_vit_b16() -> None:
    import timm

    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    sites = view_of(vit).sites(vit)
    for _, code, _, parameters, num_bytes, _ in table(ROOT / "README.md", "method-table"):
        plugin = eval(code.strip("`"), {"pt": pt})
        plugin.attach(sites)
        count = sum(p.numel() for p in plugin.parameters())
        if isinstance(plugin, Tuning):
            owners = ((n, p, vit.get_submodule(n.rpartition(".")[0])) for n, p in vit.named_parameters())
            count += sum(p.numel() for n, p, owner in owners if plugin.trains(n, owner))
        stored = sum(t.numel() * t.element_size() for t in packed(plugin, plugin.state_dict()).values())
        stored = 4 * count if isinstance(plugin, Tuning) else stored
        assert (parameters, num_bytes) == (f"{count:,}", f"{stored:,}"), code


def test_method_table_has_every_method() -> None:
    shown = {re.match(r"`pt\.(\w+)", row[1])[1] for row in table(ROOT / "README.md", "method-table")}
    assert shown == set(METHODS.values())


def test_readme_names_every_class_with_a_view() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf8")
    rows = [re.findall(r"\w+", line) for line in text.splitlines() if line.startswith(("| t", "| o"))]
    for name in VIEWS:
        library, cls = name.split(".")[0], name.rsplit(".", 1)[1]
        assert any(library in row and cls in row for row in rows), name


def test_plugin_file_page_has_every_key() -> None:
    keys = [row[0].strip("`") for row in table(ROOT / "docs" / "plugin_file.md", "schema-table")]
    assert keys == ["schema_version", *metadata._SCHEMA]


def test_annotated_block_is_the_codes() -> None:
    def body(text: str) -> list[str]:
        (function,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "run_block")
        names = [argument.arg for argument in function.args.args]
        return names + [ast.dump(node) for node in function.body if not isinstance(node, ast.Expr)]

    page = ROOT / "docs" / "architecture.md"
    (shown,) = (text for _, _, text in blocks("python", page) if text.startswith("def run_block"))
    assert body(shown) == body((SRC / "backbones" / "_timm.py").read_text(encoding="utf8"))


def test_contributing_fits_on_a_screen() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf8").splitlines()) <= 50


# docs/adding_a_method.md


def shown(mark: str) -> str:
    (text,) = (text for _, found, text in blocks("python", METHOD_PAGE) if found == f"runnable: {mark}")
    return text


@pytest.fixture
def bottleneck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The page's plugin, at home in `petiole.plugins` as if its file lay there and its table rows were written."""
    path, name = tmp_path / "bottleneck.py", "petiole.plugins.bottleneck"
    path.write_text(shown("plugin"), encoding="utf8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "bottleneck", "Bottleneck")
    monkeypatch.setattr(pt, "Bottleneck", module.Bottleneck, raising=False)
    return module


def test_new_method_is_a_short_file(bottleneck: types.ModuleType) -> None:
    text = shown("plugin")
    assert len(text.splitlines()) <= 120
    assert "\n    Source: " in text
    assert "\n    Parameters: " in text
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.compile
@pytest.mark.parametrize("name", PROPERTIES)
def test_new_method_keeps_the_contract(name: str, bottleneck: types.ModuleType) -> None:
    rows = eval("{" + shown("row") + "}", {"pt": pt, "Row": Row, "DEPTH": DEPTH, "WIDTH": WIDTH})
    for row in rows.values():
        PROPERTIES[name](row)


def test_new_method_equals_its_oracle(bottleneck: types.ModuleType) -> None:
    names: dict[str, Any] = {"pytest": pytest}
    exec(shown("oracle"), names)
    names["test_bottleneck_is_its_formula"]()


def test_new_method_refuses_to_merge_and_says_why(bottleneck: types.ModuleType) -> None:
    model = test_contract.adapted(Row(bottleneck.Bottleneck, 0))
    with pytest.raises(pt.MergeError, match="Bottleneck cannot be merged: it is not a linear change"):
        pt.merge(model)


def test_new_method_is_kept_in_a_file(bottleneck: types.ModuleType, tmp_path: Path) -> None:
    model = test_contract.adapted(Row(lambda: bottleneck.Bottleneck(dim=3, scale=0.5), 0), is_random=True)
    pt.save(model, tmp_path / "new.safetensors")
    again = pt.load(tmp_path / "new.safetensors", test_contract.vit())
    assert torch.equal(again(test_contract.IMAGES), model.eval()(test_contract.IMAGES))
