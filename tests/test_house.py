"""What the README and the project's files say of themselves is true."""

import re
import tomllib

from support.paths import ROOT

ROOMS = ("streaming_data", "codec", "tokenize", "train")


def test_the_readme_names_every_module_of_the_house() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [
        f"{room}/{module.name}"
        for room in ROOMS
        for module in (ROOT / room).glob("*.py")
        if module.name not in ("__init__.py", "__main__.py") and module.name not in readme
    ]
    assert not missing


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(
        re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert named
    assert named <= targets


def test_every_direct_dependency_is_bounded_on_both_sides_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower() for line in constraints.splitlines()}
    for requirement in requirements:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement), requirement
        assert re.split(r"[>=]", requirement)[0].lower() in pinned, requirement
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in constraints.splitlines())
