"""How names and functions are made, in the packages and in the tests."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT, TESTS

PACKAGES = ("common", "storage", "dataset", "codec", "streaming_data", "tokenize", "generation", "train")
PROGRAMS = {"__main__", "commands"}  # their functions bear the names of commands
# A name that several modules define, and why it may.
SHARED_NAMES: dict[str, str] = {}
LONG, TOO_LONG = 50, 60  # lines of a function
LONG_TEST_NAME = 60  # characters

Function = ast.FunctionDef | ast.AsyncFunctionDef
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
OTHERS = [path for name in ("demo", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))]
TEST_MODULES = sorted(TESTS.rglob("*.py"))


def public_names(path: Path) -> set[str]:
    """The classes and functions that a module defines for others."""
    body = ast.parse(path.read_text()).body
    return {
        node.name
        for node in body
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_")
    }


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def too_long(source: str) -> dict[str, int]:
    """Functions of more than 60 lines, or of more than 50 without a comment `# Long: reason` above them."""
    lines = source.splitlines()
    found = {}
    for function in functions(source):
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        explained = first > 1 and lines[first - 2].strip().startswith("# Long: ")
        if length > (TOO_LONG if explained else LONG):
            found[function.name] = length
    return found


def all_tests() -> Iterator[tuple[str, Function]]:
    """Every test of the suite with its file."""
    for path in TEST_MODULES:
        for function in functions(path.read_text()):
            if function.name.startswith("test_"):
                yield str(path.relative_to(TESTS)), function


def test_one_public_name_means_one_thing() -> None:
    modules = defaultdict(list)
    for path in MODULES:
        place = path.relative_to(ROOT)
        if not PROGRAMS & {path.stem, *place.parts}:
            for name in public_names(path):
                modules[name].append(str(place))
    shared = {name: places for name, places in modules.items() if len(places) > 1}
    unexplained = [
        f"{name}: {', '.join(places)}" for name, places in shared.items() if name not in SHARED_NAMES
    ]
    assert not unexplained, "\n".join(unexplained)
    assert set(SHARED_NAMES) <= set(shared), "SHARED_NAMES has a name that only one module defines"


def test_no_function_is_too_long_to_read() -> None:
    paths = [*MODULES, *OTHERS, *TEST_MODULES, ROOT / "train.py"]
    long = [f"{path.relative_to(ROOT)}: {found}" for path in paths if (found := too_long(path.read_text()))]
    assert not long, "\n".join(long)


@pytest.mark.parametrize(
    ("lines", "comment", "allowed"),
    [
        (50, "", True),
        (51, "", False),
        (51, "# Something else\n", False),
        (60, "# Long: it is one list of builds.\n", True),
        (61, "# Long: it is one list of builds.\n", False),
    ],
)
def test_a_long_function_needs_a_reason(lines: int, comment: str, allowed: bool) -> None:
    function = "def f():\n" + "    pass\n" * (lines - 1)
    assert (too_long(comment + function) == {}) == allowed
    assert (too_long(comment + "@decorated\n" + function) == {}) == allowed


def test_names_of_tests_are_short() -> None:
    long = [f"{file}: {test.name}" for file, test in all_tests() if len(test.name) > LONG_TEST_NAME]
    assert not long, "\n".join(long)


def test_tests_say_that_they_return_nothing() -> None:
    untyped = [f"{file}: {test.name}" for file, test in all_tests() if test.returns is None]
    assert not untyped, "\n".join(untyped)
