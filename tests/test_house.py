"""The rules of the house: what may import what, and what every file, class and method must have."""

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import petiole as pt
from contract import PLUGINS
from petiole import errors
from petiole.backbones import VIEWS
from petiole.plugins import METHODS

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "petiole"
FILES = sorted(SRC.rglob("*.py"))

# the levels of the house, from the ground up; a package imports from lower levels only, and never from its own level
LEVELS = (
    ("errors", "lazy"),
    ("nn",),
    ("core",),
    ("plugins", "backbones"),
    ("joining", "files", "tasks"),
    ("compressing",),
    ("peft", "train"),
    ("continual", "vision_language"),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# what `import petiole` must not cost
HEAVY = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "peft",
    "pytorch_metric_learning",
    "rich",
    "timm",
    "torch",
    "transformers",
    "typer",
)


def short(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


def package(path: Path) -> str:
    """The part of the house a file belongs to: `core`, `plugins`, `joining`, ..."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full name of everything of petiole that a file imports, wherever in the file it does."""
    inside = ["petiole", *path.relative_to(SRC).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "petiole"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "petiole":
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def docstring(thing: object) -> str:
    """A docstring of the thing itself, neither inherited nor made by `dataclass`."""
    text = inspect.cleandoc(vars(thing).get("__doc__") or "") if inspect.isclass(thing) else inspect.getdoc(thing) or ""
    return "" if text.startswith(f"{getattr(thing, '__name__', '')}(") else text


every_file = pytest.mark.parametrize("path", FILES, ids=short)


def test_every_package_has_its_level() -> None:
    assert {package(path) for path in FILES} - {"__init__"} <= set(LEVEL)


@every_file
def test_imports_point_downward(path: Path) -> None:
    own = package(path)
    wrong = []
    for line, name in imports(path):
        part = name.partition(".")[2].split(".")[0]
        if part in (own, "__version__"):
            continue
        if part not in LEVEL or own not in LEVEL or LEVEL[part] >= LEVEL[own]:
            wrong.append(f"{short(path)}:{line} imports {name}")
    assert not wrong


@every_file
def test_file_is_short_enough(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf8").splitlines())
    assert num_lines <= (120 if package(path) == "plugins" else 300)


@every_file
def test_file_opens_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf8")))


@every_file
def test_source_has_no_unfinished_mark(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    assert not [word for word in ("TO" + "DO", "FIX" + "ME") if word in text]


@every_file
def test_file_has_no_star_import(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf8")))
    assert not any(alias.name == "*" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names)


def test_public_names_are_sorted_and_resolve() -> None:
    assert pt.__all__ == sorted(pt.__all__)
    assert [name for name in pt.__all__ if not hasattr(pt, name)] == []
    assert list(pt._PUBLIC) == sorted(pt._PUBLIC)


def test_type_checkers_see_the_same_public_names() -> None:
    stub = ast.parse((SRC / "__init__.pyi").read_text(encoding="utf8"))
    lines = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname: node.module for node in lines for alias in node.names} == pt._PUBLIC


@pytest.mark.slow
def test_public_names_do_not_depend_on_what_was_imported_before() -> None:
    # a sub-module of the same name as a function hides it as soon as something else imports that sub-module
    code = """
import importlib, inspect
import petiole as pt
for module in sorted(set(pt._PUBLIC.values())):
    importlib.import_module(f"petiole.{module}")
print(*[name for name in pt.__all__ if inspect.ismodule(getattr(pt, name))])
"""
    assert run_python(code) == ""


@pytest.mark.parametrize("name", pt.__all__)
def test_public_name_has_a_docstring(name: str) -> None:
    assert docstring(getattr(importlib.import_module(f"petiole.{pt._PUBLIC[name]}"), name))


def test_import_is_light() -> None:
    assert run_python(f"import petiole, sys; print(*[m for m in {HEAVY} if m in sys.modules])") == ""


def test_help_needs_no_torch() -> None:
    assert run_python("import petiole.cli.app, sys; print(*[m for m in ('timm', 'torch') if m in sys.modules])") == ""


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    assert project["version"] == pt.__version__
    assert pt.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf8")


@pytest.mark.parametrize("name", METHODS)
def test_row_of_the_method_table_agrees_with_its_class(name: str) -> None:
    cls = getattr(importlib.import_module(f"petiole.plugins.{name}"), METHODS[name])
    assert (cls.method, cls.__name__) == (name, METHODS[name])
    assert pt._PUBLIC[cls.__name__] == f"plugins.{name}"


def test_every_method_has_a_file_and_every_file_a_method() -> None:
    files = {path.stem for path in (SRC / "plugins").glob("*.py") if not path.stem.startswith("_")}
    # those of language models fit no backbone of the table
    assert files - {"memvp"} == set(METHODS)
    assert list(METHODS) == sorted(METHODS)


def test_every_method_is_in_the_contract_table() -> None:
    assert {row.make().method for row in PLUGINS.values()} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_docstring_of_a_method_names_source_and_parameters(name: str) -> None:
    cls = getattr(importlib.import_module(f"petiole.plugins.{name}"), METHODS[name])
    assert "\nSource: " in docstring(cls)
    assert "\nParameters: " in docstring(cls)


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_a_method_are_keywords_with_defaults(name: str) -> None:
    cls = getattr(importlib.import_module(f"petiole.plugins.{name}"), METHODS[name])
    for parameter in inspect.signature(cls).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is not parameter.empty


def test_help_of_fit_names_every_method() -> None:
    import petiole.cli.fit as command

    help_text = inspect.signature(command.fit).parameters["method"].annotation.__metadata__[0].help
    assert [name for name in METHODS if name not in help_text] == []


@pytest.mark.parametrize("name", VIEWS)
def test_row_of_the_view_table_names_a_class_of_its_file(name: str) -> None:
    module, cls = VIEWS[name]
    tree = ast.parse((SRC / "backbones" / f"{module}.py").read_text(encoding="utf8"))
    assert cls in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def test_error_tree_is_drawn_as_it_is() -> None:
    classes = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and c.__module__ == errors.__name__}
    drawn = [line.strip("│├└─ ").split("  ")[0] for line in (errors.__doc__ or "").splitlines() if "Error" in line]
    assert drawn == list(classes)
    assert all(issubclass(cls, errors.PetioleError) for cls in classes.values())
    assert set(classes) <= set(pt.__all__)
