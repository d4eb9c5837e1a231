"""The pages are true: their commands, settings, links and paths exist, and the quickstart runs as printed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from typer.main import get_command

from support.paths import ROOT
from unitoken.commands.app import app
from unitoken.common.config import load_config
from unitoken.dataset.layout import LayoutPattern
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.sources.adapter_fields import CAPTION_KEYS, EDITED_KEYS, INSTRUCTION_KEYS, SOURCE_KEYS
from unitoken.train.config import StageConfig
from unitoken.train.evaluation.config import Suite

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
QUICKSTART = ROOT / "docs" / "quickstart.md"
PACKAGES = (
    *("common", "storage", "dataset", "codec", "streaming_data", "tokenize"),
    *("generation", "train", "commands"),
)
# Their paths, and those of these folders, are checked wherever a page names them in backticks.
FOLDERS = (*PACKAGES, "benchmarks", "docs", "examples", "tests", "yamls")
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`")  # a name of the code in backticks


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The commands in a page's bash blocks, as words, without the content of here-documents."""
    found = []
    for block in blocks(text, "bash"):
        block = re.sub(
            r"<<'(\w+)'\n.*?^\1\n", "\n", block.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL
        )
        found += [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words for words in found if words]


COMMANDS = {
    f"{page.stem}: {shlex.join(words)}": words
    for page in PAGES
    for words in commands(page.read_text(encoding="utf-8"))
}
EACH_COMMAND = pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def unitoken_commands() -> dict[str, Any]:
    """The commands of `unitoken` by name."""
    command: Any = get_command(app)
    return dict(command.commands)


def parse(words: list[str]) -> None:
    """Parse the words behind `unitoken` without running anything.

    Raises:
        click.UsageError: an unknown command or option, a missing or impossible value.
    """
    command: Any = get_command(app)
    name, found, arguments = command.resolve_command(command.make_context("unitoken", list(words)), words)
    found.make_context(name, arguments)


# --- commands -----------------------------------------------------------------------------------------------


def test_commands_are_found_in_a_page() -> None:
    page = (
        "```bash\na --b c \\\n    'd e' # f\n\ncat > x <<'END'\nnot a command\nEND\ng\n```\n```json\nh\n```\n"
    )
    assert commands(page) == [["a", "--b", "c", "d e"], ["cat", ">", "x"], ["g"]]
    assert len(COMMANDS) > 40


@EACH_COMMAND
def test_every_command_of_the_pages_exists(words: list[str]) -> None:
    match words:
        case ["make", *targets]:
            assert {word for word in targets if "=" not in word} <= make_targets()
        case ["unitoken", *arguments]:
            parse(arguments)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), module


@pytest.mark.parametrize(
    "line",
    [
        "nonsense data/cats",
        "verify data/cats --nonsense",
        "verify",
        "plan a.yaml --epoch x",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|valid integer"):
        parse(line.split())


@EACH_COMMAND
def test_the_settings_of_every_command_are_valid(words: list[str]) -> None:
    files = [word for word in words if word.startswith(("yamls/", "examples/"))]
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    for file in files:
        assert (ROOT / file).is_file(), file
        if file.endswith(".yaml"):
            is_tokenization = "tokenizer" in yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
            load_config(TokenizeConfig if is_tokenization else StageConfig, ROOT / file, overrides)


@EACH_PAGE
def test_every_command_named_in_a_sentence_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"`unitoken ([a-z][a-z-]*)", text)) <= set(unitoken_commands())
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= make_targets()


# --- links, paths and settings ------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@EACH_PAGE
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set[Path](), {ROOT / "README.md"}
    while new:
        reached |= new
        found = {
            (page.parent / target).resolve()
            for page in new
            for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
            if not target.startswith("https://")
        }
        new = found - reached
    assert not {page.name for page in set(PAGES) - reached}


@EACH_PAGE
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"


def test_the_readme_names_every_package_and_real_modules() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in PACKAGES if f"| `{name}/` |" not in text] == []
    road = re.findall(r"^ \w+ +(\S+\.py) ", text, re.MULTILINE)
    assert len(road) == 10
    assert [path for path in road if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("adding-*.md")), ids=lambda page: page.stem)
def test_every_name_in_the_guides_is_one_of_the_code(page: Path) -> None:
    folders = [ROOT / name for name in (*PACKAGES, "tests")]
    code = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    words = set(re.findall(r"\w+", code))
    named = {part for name in NAME.findall(page.read_text(encoding="utf-8")) for part in name.split(".")}
    assert named
    assert not named - words, f"{page.name} uses names that are nowhere in the code: {sorted(named - words)}"


@EACH_PAGE
def test_every_yaml_example_is_valid(page: Path) -> None:
    """An example is a whole file, of a layout or of settings, or some keys of a stage's."""
    for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
        content = yaml.safe_load(block)
        if "tokenizer" in content:
            TokenizeConfig.model_validate(content)
        elif "tasks" in content:
            Suite.model_validate(content)
        elif "conversation" in content:
            LayoutPattern.model_validate(content)
        elif "model" in content:
            StageConfig.model_validate(content)
        else:
            for key, value in content.items():
                annotation: Any = StageConfig.model_fields[key].annotation
                pydantic.TypeAdapter(annotation).validate_python(value)


# --- the quickstart -----------------------------------------------------------------------------------------

START = """\
#!/usr/bin/env bash
exec python -c 'from unitoken.commands.main import start; start()' "$@"
"""


def write_program(folder: Path) -> None:
    """Write `unitoken` into a folder, so that the one that is tested is this repository's."""
    folder.mkdir()
    (folder / "unitoken").write_text(START)
    (folder / "unitoken").chmod(0o755)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_runs_as_it_is_printed(tmp_path: Path) -> None:
    write_program(tmp_path / "bin")
    page, _, _ = QUICKSTART.read_text(encoding="utf-8").partition("\n## Your own photos\n")
    script = "".join(blocks(page, "bash"))
    training = "unitoken train yamls/small.yaml -n 1"
    assert training in script
    script = script.replace(training, f"{training} max_duration=2ba")
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "my/runs/small/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["step"] == 2
    for file in (
        *("data/captions/manifest.json", "data/drawings/manifest.json", "out/preview/index.html"),
        *("drawings/0000.png", "drawings/0007.png", "answers/0000.txt", "out/model/config.json"),
    ):
        assert (tmp_path / "my" / file).is_file(), done.stdout + done.stderr


# --- the site -----------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: every page is in the navigation, every link and anchor leads somewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = [page.relative_to(tmp_path) for page in tmp_path.rglob("*.html")]
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
    text = "".join((tmp_path / page).read_text(encoding="utf-8") for page in pages)
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=.?(https?://[^\s>\"']+)", text)
    assert not loaded, "nothing is loaded from elsewhere"


def test_every_setting_has_a_description() -> None:
    for model in (StageConfig, TokenizeConfig, Suite):
        schema = model.model_json_schema()
        for name, found in {**schema["$defs"], model.__name__: schema}.items():
            for key, field in found.get("properties", {}).items():
                described = "description" in field or "$ref" in field  # or that of its class
                assert described, f"{name}.{key}"


def test_the_pages_of_settings_are_those_of_the_classes() -> None:
    spec = importlib.util.spec_from_file_location("write_settings", ROOT / "docs" / "write_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, (model, title, about) in module.PAGES.items():
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == module.settings_page(model, title, about), "run `make docs`"


def test_the_messages_of_troubleshooting_are_real() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r"\"\s+f?\"", "", code)  # texts that continue on the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ([^|]*(?:\\\|[^|]*)*) \|", page, re.MULTILINE)
    messages = [message.replace("\\|", "|") for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 15
    for message in messages:
        fixed = re.split(r"\b[A-Z]{1,}\b|\.\.\.|\d+", message)
        longest = max(fixed, key=len).strip(" :;,")
        assert longest in code, message


@pytest.mark.parametrize("names", [CAPTION_KEYS, SOURCE_KEYS, EDITED_KEYS, INSTRUCTION_KEYS])
def test_the_page_lists_the_columns_that_adapters_read(names: tuple[str, ...]) -> None:
    listed = ", ".join(f"`{name}`" for name in names)
    assert f"| {listed} |" in (ROOT / "docs" / "tokenize.md").read_text("utf-8")
