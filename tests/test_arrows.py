"""Who may import whom, and names that would break Python itself."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"common", "storage", "dataset"}
MAY_IMPORT = {
    "common": {"common"},
    "storage": {"common", "storage"},
    "dataset": GROUND,
    "codec": GROUND | {"codec"},
    "streaming_data": GROUND | {"streaming_data"},
    "tokenize": GROUND | {"codec", "tokenize"},
    "train": GROUND | {"codec", "streaming_data", "train"},
}
MODULES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).glob("**/*.py"))]


def imported(source: str) -> set[str]:
    """The full names of what a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("unitoken.")}


def test_the_rooms_are_found():
    assert {path.parent.name for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_imports_only_what_stands_below_it(path):
    names = imported(path.read_text())
    assert rooms(names) <= MAY_IMPORT[path.parent.name]
    assert "unitoken" not in names
    # By their folder names the rooms are importable from the root alone, and there `tokenize` is Python's own.
    assert not {name.split(".")[0] for name in names} & {"streaming_data", "train"}


@pytest.mark.parametrize("line", ["import unitoken.train.model", "from unitoken.train import model", "from unitoken import train"])
def test_every_form_of_import_is_seen(line):
    assert rooms(imported(f"def late():\n    {line}\n")) == {"train"}


def test_tokenize_has_no_init():
    """With one, any program started at the root imports it for the standard library's tokenize."""
    assert not (ROOT / "tokenize" / "__init__.py").exists()


def test_the_standard_librarys_tokenize_wins_at_the_root():
    import tokenize

    assert tokenize.__file__ is not None
    assert Path(tokenize.__file__).parent != ROOT / "tokenize"


def test_train_has_the_init_that_the_root_program_needs():
    assert (ROOT / "train" / "__init__.py").exists()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_module_bears_a_standard_library_name(path):
    assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names


def test_rooms_are_flat():
    """An unlisted sub-folder works in an editable install and is silently absent from a wheel."""
    assert [path for path in MODULES if path.parent.parent != ROOT] == []


def risks(source: str) -> set[str]:
    """What could run a file's content: modules that unpickle, and calls that evaluate, start a shell or allow a pickle."""
    found = {name.split(".")[0] for name in imported(source)} & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load"}:
            found.add(name)
        given = {(keyword.arg, ast.unparse(keyword.value)) for keyword in node.keywords}
        unsafe = {("shell", "True"), ("allow_pickle", "True"), ("weights_only", "False"), ("trust_remote_code", "True")}
        found |= {f"{key}={value}" for key, value in given & unsafe}
        if name == "torch.load" and ("weights_only", "True") not in given:
            found.add("torch.load without weights_only=True")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_module_runs_what_is_in_a_file(path):
    """Only the migration imports pickle, for an unpickler that knows no names."""
    assert risks(path.read_text()) == ({"pickle"} if path.name == "migrate.py" else set())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "numpy.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_every_such_risk_is_seen(line):
    assert risks(f"def late():\n    {line}\n")


def test_the_rooms_need_nothing_that_is_not_installed_with_them():
    """demo, benchmarks and tests are no packages of the wheel."""
    names = {name.split(".")[0] for path in MODULES for name in imported(path.read_text())}
    assert not names & {"demo", "benchmarks", "examples", "tests"}
