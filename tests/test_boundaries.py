"""The shape of the code base, read from its syntax trees: who imports whom, and how large things may become.

Not counted to the limit of six parameters, and nothing else: the options of typer's commands, ``self`` or ``cls``,
and keyword-only parameters, since calls name them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protectors", "pipeline", "flows")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_PARAMETERS = 6
MOST_LINES = 400
COMMAND = "app.command"
# Makes the training set of the embedded models from Parquet; nothing imports it while images are protected.
TRAINING_DATA = ROOT / "protectors" / "reference" / "data.py"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Names of all imported modules, also inside functions and behind TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield str(node.module)


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}


def forbidden(path: Path) -> set[str]:
    """Top-level modules that a file must not import."""
    package = path.relative_to(ROOT).parts[0]
    names = {"infra", "tests"}
    if package == "protectors":
        names |= {"ray", "prefect", "fsspec", "s3fs", "pyarrow", "pipeline", "flows", "typer"}
    if package == "pipeline":
        names |= {"flows", "prefect", "typer", "rich"}
    if not (package == "pipeline" and path.name.startswith("ray_")):
        names.add("ray")
    return names - {"pyarrow"} if path == TRAINING_DATA else names


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def counted_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if any(ast.unparse(decorator).startswith(COMMAND) for decorator in function.decorator_list):
        return 0
    positional = [item.arg for item in [*function.args.posonlyargs, *function.args.args]]
    return len(positional) - (positional[:1] in (["self"], ["cls"]))


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 40
    assert "ray" in roots(ROOT / "pipeline" / "ray_job.py")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports(path: Path) -> None:
    assert roots(path) & forbidden(path) == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_sizes(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: split the file"
    many = {f.name: count for f in functions(path) if (count := counted_parameters(f)) > MOST_PARAMETERS}
    assert many == {}, "give these functions a configuration object"


def test_every_method_file_is_registered() -> None:
    """A file that defines a protector with a name of its own is in the registry; the fake is for tests alone."""
    registry = (ROOT / "protectors" / "registry.py").read_text()
    for path in (ROOT / "protectors").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and _is_method(node):
                assert f'"protectors.{path.stem}:{node.name}"' in registry or path.stem == "fake"


def _is_method(node: ast.ClassDef) -> bool:
    """Whether the class is a protector with a name of its own; shared bases have none."""
    named = any(isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "name" for part in node.body)
    return named and any("Protector[" in ast.unparse(base) for base in node.bases)
