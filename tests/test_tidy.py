"""The house rules that no linter knows; each is shown to find what it forbids."""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500
PACKAGES = ("backends", "bench", "kvstore", "tests")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
(ENGINE,) = (
    contract["source_modules"]
    for contract in SETTINGS["importlinter"]["contracts"]
    if contract["name"].startswith("The engine")
)
TOP_LEVEL = {
    *(".ci", ".git", ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "README.md"),
    *("backends", "bench", "deploy", "kvstore", "protos", "pyproject.toml", "requirements.lock"),
    "tests",
}
PROSE = {".go", ".md", ".proto", ".py", ".sh", ".toml", ".yaml", ".yml"}
LATER = re.compile(rb"\b(TO[D]O|FIX[M]E)\b")
ASYNC = (ast.AsyncFor, ast.AsyncFunctionDef, ast.AsyncWith, ast.Await)

Rule = Callable[[Path], Iterator[str]]


def ignored(root: Path) -> list[str]:
    """Patterns of what `root`'s .gitignore leaves out."""
    file = root / ".gitignore"
    return [line.strip("/") for line in file.read_text().splitlines()] if file.exists() else []


def files(root: Path, *packages: str) -> Iterator[Path]:
    """Hand-written Python files of some packages."""
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            if (root / "kvstore/pb") not in path.parents:
                yield path


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods in a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def long_files(root: Path) -> Iterator[str]:
    """A file that grows without limit is where everything meets."""
    for path in files(root, *PACKAGES):
        if len(path.read_text().splitlines()) > FILE_LINES_MAX:
            yield f"{path}: more than {FILE_LINES_MAX} lines"


def long_functions(root: Path) -> Iterator[str]:
    """A function fits on a page."""
    for path in files(root, *PACKAGES):
        for node in functions(path):
            if (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES_MAX:
                yield f"{path}:{node.lineno}: {node.name}, more than {FUNCTION_LINES_MAX} lines"


def async_engine(root: Path) -> Iterator[str]:
    """An engine function runs to completion, so that its preconditions stay true."""
    for path in (root / f"{name.replace('.', '/')}.py" for name in ENGINE):
        tree = ast.parse(path.read_bytes()) if path.exists() else ast.Module([], [])
        if any(isinstance(node, ASYNC) for node in ast.walk(tree)):
            yield f"{path}: the engine does not await"


def work_left(root: Path) -> Iterator[str]:
    """What is left to do stands in no comment."""
    for name in TOP_LEVEL - {".git"}:
        for path in (root / name, *(root / name).rglob("*")):
            if path.suffix in PROSE and path.is_file() and LATER.search(path.read_bytes()):
                yield f"{path}: work left to do"


def unnamed_properties(root: Path) -> Iterator[str]:
    """A test's docstring names the property that it checks."""
    for path in files(root, "tests"):
        for node in functions(path):
            if node.name.startswith("test_") and not ast.get_docstring(node):
                yield f"{path}:{node.lineno}: {node.name} names no property"


def strays(root: Path) -> Iterator[str]:
    """The top level has its known entries only."""
    patterns = ignored(root)
    for path in root.iterdir():
        if path.name not in TOP_LEVEL and not any(fnmatch(path.name, p) for p in patterns):
            yield f"{path}: stray"


def planted(root: Path, name: str, text: str) -> Path:
    """Write one file of a tree."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


RULES: dict[Rule, tuple[str, str]] = {
    long_files: ("kvstore/a.py", "x = 1\n" * (FILE_LINES_MAX + 1)),
    long_functions: ("bench/a.py", "class A:\n  def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX),
    async_engine: ("kvstore/store.py", "def f():\n    async def g(): ...\n"),
    work_left: ("deploy/a.sh", "# TO" + "DO: the rest\n"),
    unnamed_properties: ("tests/rpc/test_a.py", "class TestA:\n    def test_a(): ...\n"),
    strays: ("notes/a.txt", ""),
}
"""Each rule with the file that breaks it."""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_is_tidy(rule: Rule) -> None:
    """The tree breaks no house rule."""
    assert [] == list(rule(ROOT))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_finds_what_it_forbids(rule: Rule, tmp_path: Path) -> None:
    """A planted violation is found, by its own rule alone."""
    root = planted(tmp_path, *RULES[rule])
    assert [rule] == [each for each in RULES if list(each(root))]
