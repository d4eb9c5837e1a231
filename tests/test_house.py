"""What the map of the tree and the project's files say is true."""

import re
import runpy
import tomllib
from collections.abc import Iterator

from support.paths import ROOT

ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"


def packaged_folders() -> list[str]:
    """The folders that the wheel holds, such as `codec/image_tokenizer`."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    return [name.removeprefix("unitoken.").replace(".", "/") for name in listed]


def paths_of_the_tree(text: str) -> Iterator[str]:
    """Every path of an indented tree; a folder's name ends with a slash, and a clause follows two spaces."""
    folders: list[str] = []
    for line in text.splitlines():
        name = line.lstrip().split("  ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name] if name.endswith("/") else []
        yield "".join(folders[:depth]) + name


def tree() -> set[str]:
    """The paths that docs/ARCHITECTURE.md names in its tree."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    found = re.search(r"^## The tree\n\n```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found
    return set(paths_of_the_tree(found[1]))


def test_the_tree_is_read_by_its_indentation() -> None:
    text = "a/       x\n  b.py   y  z\n  c/     x\n    d.py  x\n  e.py   x\nf.py  x"
    assert list(paths_of_the_tree(text)) == ["a/", "a/b.py", "a/c/", "a/c/d.py", "a/e.py", "f.py"]


def test_the_tree_names_every_module_under_its_folder() -> None:
    modules = [path for folder in packaged_folders() for path in (ROOT / folder).glob("*.py")]
    expected = {str(path.relative_to(ROOT)) for path in modules}
    missing = sorted(expected - tree())
    assert not missing, f"add a line for each to {ARCHITECTURE.name}: {', '.join(missing)}"


def test_every_path_of_the_tree_exists() -> None:
    stale = sorted(path for path in tree() if not is_there(path))
    assert not stale, f"{ARCHITECTURE.name} names what is not there: {', '.join(stale)}"


def is_there(path: str) -> bool:
    """Whether a path of the tree is a file, or a folder if it ends with a slash."""
    return (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_every_folder_of_the_wheel_is_in_the_tree() -> None:
    missing = sorted({f"{folder}/" for folder in packaged_folders()} - tree())
    assert not missing, f"add a line for each to {ARCHITECTURE.name}: {', '.join(missing)}"


def test_the_order_inside_packages_is_that_of_the_test() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    checked = runpy.run_path(str(ROOT / "tests" / "test_arrows.py"))["INSIDE"]
    lines = [
        f"- `{package}`: {', '.join(name for name in order if not name.startswith('__'))}"
        for package, order in checked.items()
    ]
    missing = [line for line in lines if line not in text.splitlines()]
    assert not missing, f"{ARCHITECTURE.name} needs:\n" + "\n".join(missing)


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_direct_dependency_is_bounded_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in constraints.splitlines()}
    for requirement in requirements:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement), requirement
        assert re.split(r"[>=]", requirement)[0].lower().replace("_", "-") in pinned, requirement
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in constraints.splitlines())
