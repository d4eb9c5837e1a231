"""The command `unitoken`: every subcommand, its help, and the two that exist only here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.paths import ROOT
from unitoken.commands.app import COMMANDS, app

HEAVY = ("torch", "numpy", "composer", "streaming", "transformers", "pyarrow", "pydantic", "yaml")


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_in_one_line(name: str) -> None:
    status, help_of_all, _ = call("--help")
    assert status == 0
    line = next(line for line in help_of_all.splitlines() if line.startswith(f"  {name} "))
    assert line.endswith("."), "shortened by click: at most 55 characters"
    assert not line.endswith("...")
    status, text, _ = call(name, "--help")
    assert status == 0
    assert line.removeprefix(f"  {name} ").strip().removesuffix(".") in text
    assert "--help" in text


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from unitoken.commands.app import app; app(['--help'], standalone_mode=False); "
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stderr.splitlines()[-1] == "[]"


def test_options_are_understood_with_underscores_too(tmp_path: Path) -> None:
    for option in ("--out-dir", "--out_dir"):
        status, _, error = call("merge", option, str(tmp_path / "none"))
        assert (status, error.count("\n")) == (2, 1)
        assert "none" in error


def test_init_copies_what_is_shipped_and_overwrites_nothing(tmp_path: Path) -> None:
    status, out, _ = call("init", str(tmp_path / "my"))
    assert status == 0
    assert out.startswith(f"{tmp_path / 'my'}: ")
    for name in (
        *("stage1.yaml", "stage2.yaml", "small.yaml", "stage.schema.json"),
        *("tokenize/chameleon.yaml", "tokenize/photos.yaml", "open/stage1.yaml"),
    ):
        assert (tmp_path / "my/yamls" / name).read_bytes() == (ROOT / "yamls" / name).read_bytes()
    for name, shipped in (
        ("make_photos.py", "quickstart/make_photos.py"),
        ("weights/photo-vqgan/vqgan.yaml", "quickstart/photo-vqgan/vqgan.yaml"),
        ("weights/photo-vqgan/vqgan.safetensors", "quickstart/photo-vqgan/vqgan.safetensors"),
        ("weights/text-tokenizer/tokenizer.json", "demo/assets/tokenizer/tokenizer.json"),
    ):
        assert (tmp_path / "my" / name).read_bytes() == (ROOT / shipped).read_bytes()
    assert call("init", str(tmp_path / "my"))[0] == 2


@pytest.mark.parametrize("kind", ["stage", "tokenize", "suite"])
def test_the_schemas_are_those_of_the_examples(kind: str, tmp_path: Path) -> None:
    folder = {"stage": "yamls", "tokenize": "yamls/tokenize", "suite": "yamls"}[kind]
    assert call("schema", kind, str(tmp_path / "schema.json"))[0] == 0
    assert (tmp_path / "schema.json").read_text() == call("schema", kind)[1]
    assert (tmp_path / "schema.json").read_text() == (ROOT / folder / f"{kind}.schema.json").read_text()
    status, _, error = call("schema", kind, str(tmp_path / "no" / "folder"))
    assert (status, error.count("\n")) == (2, 1)


def test_train_becomes_composers_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.extend([program, *command[1:]]))
    stage = str(ROOT / "yamls" / "stage1.yaml")
    assert call("train", stage, "-n", "2", "--world-size", "16", "--node-rank", "3", "seed=7")[0] == 0
    options = ["-n", "2", "--world_size", "16", "--node_rank", "3"]
    program = ["-m", "unitoken.train.program", stage, "seed=7"]
    assert started == [sys.executable, "-m", "composer.cli", *options, *program]


def test_a_misspelt_setting_is_found_before_processes_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started"))
    status, _, error = call("train", str(ROOT / "yamls" / "stage1.yaml"), "sed=7")
    assert (status, error.count("\n")) == (2, 1)
    assert "unknown key 'sed'" in error
