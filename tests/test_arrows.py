"""Who may import whom, and names that would break Python itself."""

import ast
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from support.paths import ROOT

# Each may import from itself and from those before it, except for what is forbidden.
PACKAGES = (
    *("common", "storage", "dataset", "codec", "streaming_data", "tokenize"),
    *("generation", "train", "commands"),
)
FORBIDDEN = {("tokenize", "streaming_data"), ("train", "tokenize"), ("streaming_data", "codec")}
FORBIDDEN |= {("generation", other) for other in ("storage", "codec", "streaming_data", "tokenize")}
# The same inside a package: its sub-packages, and the modules that stand beside them.
INSIDE = {
    "codec": (
        *("config", "image_tokenizer", "conversations", "text", "sequence"),
        *("chat_template", "tokenizer_vocabulary", "passages"),
    ),
    "streaming_data": (
        "arrays",
        "tables",
        "settings",
        "sources",
        "plan",
        "check",
        "reading",
        "tools",
        "__main__",
    ),
    "tokenize": (
        *("config", "sources", "output", "rejects", "first_items", "job", "prepare", "retry"),
        *("finished_chunks", "merge", "summary", "pipeline", "executors", "dry_run", "checks"),
        *("plain_pickle", "migrate", "__main__"),
    ),
    "train": (
        *(
            "__init__",
            "config",
            "optim",
            "check_tokenizers",
            "model",
            "checkpoint",
            "run",
            "report",
            "export",
            "distributed",
            "accounting",
        ),
        *(
            "generation",
            "chat",
            "evaluation",
            "check",
            "plan_memory",
            "overview",
            "callbacks",
            "stage",
            "program",
            "__main__",
        ),
    ),
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}
EACH_MODULE = pytest.mark.parametrize("name", sorted(MODULES))


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


def ours(names: set[str]) -> set[str]:
    """The modules of ours that are meant: `unitoken.storage.open.open_store` -> `storage.open`."""
    found = set()
    for name in names:
        parts = name.split(".")[1:] if name.startswith("unitoken.") else []
        found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in MODULES}
    return found


def place(module: str) -> str:
    """Where in its package a module stands: the sub-package, or the module itself beside them."""
    return module.split(".")[1]


def test_the_packages_are_found() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(PACKAGES)
    for package, order in INSIDE.items():
        assert {place(name) for name in MODULES if name.startswith(f"{package}.")} == set(order)


@EACH_MODULE
def test_a_module_imports_only_what_stands_below_it(name: str) -> None:
    names = imported(MODULES[name].read_text())
    package = name.split(".")[0]
    for other in ours(names):
        theirs = other.split(".")[0]
        assert PACKAGES.index(theirs) <= PACKAGES.index(package), other
        assert (package, theirs) not in FORBIDDEN, other
        if theirs == package and package in INSIDE:
            assert INSIDE[package].index(place(other)) <= INSIDE[package].index(place(name)), other
    assert "unitoken" not in names
    # Without `unitoken.` they are importable at the root only, and there `tokenize` is Python's own.
    assert not {name.split(".")[0] for name in names} & (set(PACKAGES) - {"tokenize"})


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: ours(imported(path.read_text())) - {name} for name, path in MODULES.items()}
    while leaves := {name for name, below in graph.items() if not below}:
        graph = {name: below - leaves for name, below in graph.items() if name not in leaves}
    assert not graph


@pytest.mark.parametrize(
    "line",
    [
        "import unitoken.train.stage",
        "from unitoken.train import stage",
        "from unitoken.train.stage import run",
    ],
)
def test_every_form_of_import_is_seen(line: str) -> None:
    assert ours(imported(f"def late():\n    {line}\n")) == {"train.stage"}


def test_tokenize_has_no_init() -> None:
    """With one, any program started at the root imports it for the standard library's tokenize."""
    assert not (ROOT / "tokenize" / "__init__.py").exists()


def test_the_standard_librarys_tokenize_wins_at_the_root() -> None:
    import tokenize

    assert tokenize.__file__ is not None
    assert Path(tokenize.__file__).parent != ROOT / "tokenize"


def test_train_has_the_init_that_the_root_program_needs() -> None:
    assert (ROOT / "train" / "__init__.py").exists()


@EACH_MODULE
def test_no_module_bears_a_standard_library_name(name: str) -> None:
    stem = name.rpartition(".")[2]
    assert stem.startswith("__") or stem not in sys.stdlib_module_names


def test_every_folder_with_modules_is_in_the_wheel() -> None:
    """A folder that is not listed works in an editable install and is silently absent from a wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    examples = {"unitoken.yamls", "unitoken.yamls.open", "unitoken.yamls.tokenize"}
    examples |= {"unitoken.quickstart", "unitoken.demo.assets.tokenizer"}  # which `unitoken init` copies
    assert sorted(listed) == sorted({f"unitoken.{name.rpartition('.')[0]}" for name in MODULES} | examples)


def test_no_folder_has_more_modules_than_one_can_look_through() -> None:
    folders = Counter(name.rpartition(".")[0] for name in MODULES)
    assert max(folders.values()) <= 14, folders.most_common(1)


def risks(source: str) -> set[str]:
    """Return what could run a file's content: unpicklers, and calls that evaluate or start a shell."""
    found = {name.split(".")[0] for name in imported(source)} & {
        "pickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
    }
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load"}:
            found.add(name)
        given = {(keyword.arg, ast.unparse(keyword.value)) for keyword in node.keywords}
        unsafe = {
            ("shell", "True"),
            ("allow_pickle", "True"),
            ("weights_only", "False"),
            ("trust_remote_code", "True"),
        }
        found |= {f"{key}={value}" for key, value in given & unsafe}
        if name == "torch.load" and ("weights_only", "True") not in given:
            found.add("torch.load without weights_only=True")
    return found


@EACH_MODULE
def test_no_module_runs_what_is_in_a_file(name: str) -> None:
    """Only plain_pickle.py imports pickle, for an unpickler that finds no names."""
    assert risks(MODULES[name].read_text()) == ({"pickle"} if name == "tokenize.plain_pickle" else set())


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
def test_every_such_risk_is_seen(line: str) -> None:
    assert risks(f"def late():\n    {line}\n")


def test_the_rooms_need_nothing_that_is_not_installed_with_them() -> None:
    """demo, benchmarks and tests are no packages of the wheel."""
    names = {name.split(".")[0] for path in MODULES.values() for name in imported(path.read_text())}
    assert not names & {"demo", "benchmarks", "examples", "tests"}
