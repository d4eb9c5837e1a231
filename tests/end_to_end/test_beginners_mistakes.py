"""The twelve mistakes of a first hour, through the real command line: each ends in one line with the cure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.paths import ROOT
from support.stages import write_data, write_stage
from support.tokenizing import TOKENIZER, turns
from unitoken.commands.app import app

MESSAGES = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
TEXT = {"conversations": turns("Hi.", "Ho.")}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, vqgan: Path) -> Path:
    """A folder with items, a begun dataset, and a small stage with its data."""
    folder = tmp_path_factory.mktemp("first")
    items = {
        "items": [TEXT] * 3,
        "messages": [{"messages": MESSAGES}] * 300,
        "lost": [{"conversations": turns("What is <|image|>?", "A cat."), "image": "cat.png"}] * 300,
    }
    for name, content in items.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "file").write_text("in the place of a folder")
    write_data(folder / "data")
    write_stage(folder)
    status, _, error = _call(folder, ["tokenize", "items.json", "begun", "--dry-run", "2"], vqgan)
    assert (status, error) == (0, "")
    from unitoken.common.config import load_config
    from unitoken.tokenize.config import TokenizeConfig
    from unitoken.tokenize.prepare import prepare

    begun = load_config(TokenizeConfig, ROOT / "yamls/tokenize/chameleon.yaml", _settings(vqgan))
    prepare(begun, [str(folder / "items.json")], str(folder / "begun"))
    return folder


def _settings(vqgan: Path) -> list[str]:
    return ["target_size=16", f"tokenizer={TOKENIZER}", f"vision.weights={vqgan}", "vision.precision=fp32"]


def _call(folder: Path, words: list[str], vqgan: Path) -> tuple[int, str, str]:
    """Run a command inside a folder; `tokenize IN OUT` and `check` get the settings that are right."""
    command, *rest = words
    if command == "tokenize":
        source, out, *rest = rest
        given = ["--in-filename", source, "--out-dir", out, *_settings(vqgan), *rest]
    elif command in ("check", "train"):
        given = rest if rest[:1] and rest[0].endswith(".yaml") else ["tiny.yaml", *rest]
    else:
        given = rest
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, [command, *given])
    finally:
        os.chdir(before)
    return result.exit_code, result.stdout, result.stderr


# The mistake, the command, and what its line says: what was found, what is needed, what to do.
MISTAKES = {
    "path of the input": (
        "tokenize itmes.json out",
        "itmes.json: cannot read the input: No such file; did you mean items.json?",
    ),
    "path of a glob": (
        "tokenize parts/*.tar out",
        "parts/*.tar: no file matches; it was looked for in FOLDER",
    ),
    "path of the pictures": (
        "tokenize lost.json out",
        "no such image: cat.png; names are relative to the folder of the input file",
    ),
    "path of the tokenizer": (
        "tokenize items.json out tokenizer=./tokeniser",
        "./tokeniser: no such folder; it was looked for in FOLDER",
    ),
    "path of the settings": (
        "check tinny.yaml",
        "cannot read the configuration: No such file or directory; did you mean tiny.yaml?",
    ),
    "path of a stream": (
        "check data.streams.all.local=dta",
        "dta: not a dataset folder: no such folder; did you mean data?",
    ),
    "path of a remote stream": (
        "check data.streams={all:{remote:dta}}",
        "dta: not a dataset folder: it has no manifest.json; did you mean data?",
    ),
    "path of init_from": (
        "check init_from=./runs/stage1",
        "./runs/stage1: no such folder, and not a hub id (owner/name); it was looked for in FOLDER",
    ),
    "path of a model": (
        "generate runs/stage1 --prompt Hi --out out",
        "no such checkpoint, and no folder of a run or of an exported model; it was looked for in FOLDER",
    ),
    "path of a dataset": (
        "preview bgun",
        "bgun: not a dataset folder: it has no manifest.json; did you mean begun?",
    ),
    "key": ("check sede=1", "unknown key 'sede'; did you mean 'seed'?"),
    "key inside another": (
        "check data.packed_lenght=64",
        "unknown key 'data.packed_lenght'; did you mean 'packed_length'?",
    ),
    "key of a stream": ("check data.streams.all.propotion=1", "did you mean 'proportion'?"),
    "key of a tokenization": (
        "tokenize items.json out vision.wieghts=x",
        "unknown key 'vision.wieghts'; did you mean 'weights'?",
    ),
    "key without a value": ("check seed", "override 'seed': expected key=value"),
    "adapter": ("tokenize items.json out adapter=sharegtp", "found 'sharegtp'; did you mean 'sharegpt'?"),
    "adapter of a file": (
        "tokenize items.json out adapter=mine.py:f",
        "mine.py: cannot be read: No such file or directory; it was looked for in FOLDER",
    ),
    "adapter that fits badly": ("tokenize messages.json out", ". adapter=messages reads 200 of them"),
    "no weights of the image tokenizer": (
        "tokenize items.json out vision.weights=weights/vqgan",
        "whose weights `unitoken weights open` fetches",
    ),
    "no weights of the decoder": (
        "check model.decoder=weights/Qwen3-0.6B",
        "`unitoken weights open` fetches it",
    ),
    "no weights in a folder": (
        "check init_from=data",
        "no checkpoint in it, neither a run's step-* (did that stage run?) nor a model's config.json",
    ),
    "no GPU": (
        "check precision=bf16",
        "precision=fp32. `unitoken check STAGE --gpu 80gb` checks for GPUs elsewhere",
    ),
    "no GPU to train on": ("train precision=bf16", "precision: bf16 needs a GPU and there is none"),
    "existing OUT with other settings": (
        "tokenize items.json begun target_size=32",
        "target_size is 16 there and 32 now. Go on with the settings that it was begun with",
    ),
    "existing OUT of something else": ("tokenize items.json data", "expected an empty folder or one of ours"),
    "OUT can not be written": (
        "tokenize items.json file/out",
        "--out-dir: file/out: cannot write there: Not a directory; name another folder",
    ),
    "OUT is a file": (
        "tokenize items.json file",
        "file: expected a folder to write to, found a file; name another folder",
    ),
    "the run can not be written": (
        "train save.folder=file/run",
        "save.folder: file/run: cannot write there: Not a directory; name another folder",
    ),
    "the cache can not be written": (
        "check data.cache=file/cache",
        "data.cache: file/cache: cannot write there: Not a directory; name another folder",
    ),
    "odd proportions": (
        "check data.streams={a:{local:data,proportion:0.5},b:{local:data}}",
        "for all streams or for none: 'a' has it, 'b' (no weight) not",
    ),
    "proportions of nothing": ("check data.streams.all.proportion=0", "the proportions of all streams are 0"),
    "batch too large for the data": (
        "train data.global_batch=4096",
        "lower data.global_batch to at most 36, or raise `repeat` or `epoch_samples`",
    ),
    "batch for other ranks": (
        "train -n 3",
        "data.global_batch: 4 packs can not be shared evenly by 3 ranks; take a multiple of 3",
    ),
    "batch too large for the GPU": (
        "check --gpu 3.0001gb precision=bf16 data.packed_length=4096 data.global_batch=1",
        "needs 3.1 GB of a GPU's 3 with activation_checkpointing=none; nothing fits; take larger GPUs, or",
    ),
    "another image size": (
        "tokenize items.json out target_size=17",
        "target_size: expected a multiple of 8 pixels (2 latents) up to 792, found 17",
    ),
    "another size of drawings": ("check samples.draw=[cat] samples.size=[17,17]", "samples"),
    "images longer than a pack": (
        "check data.packed_length=8",
        "data.packed_length: 8 is too short for any question image",
    ),
}


@pytest.mark.parametrize(("words", "cure"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_one_line_with_the_cure(
    words: str, cure: str, first: Path, vqgan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("processes were started"))
    given = [word.replace(":", ": ").replace(",", ", ") if "{" in word else word for word in words.split()]
    status, out, error = _call(first, given, vqgan)
    assert (status, out) == (2, "")
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    assert cure.replace("FOLDER", str(first)) in error
    assert not (first / "out").exists()


def test_uneven_proportions_are_warned_of_with_their_shares(first: Path, vqgan: Path) -> None:
    streams = "{a: {local: data, proportion: 0.5}, b: {local: data, proportion: 0.2}}"
    status, _, error = _call(first, ["check", f"data.streams={streams}"], vqgan)
    assert status == 0
    assert error == "warning: the proportions sum to 0.7 and not to 1: the shares are a 71.4%, b 28.6%\n"


def test_another_folder_is_named_where_relative_paths_fail(first: Path, vqgan: Path, tmp_path: Path) -> None:
    """The stage's paths are relative to the folder in which the command runs."""
    stage = first / "relative.yaml"
    stage.write_text((first / "tiny.yaml").read_text().replace(f"{first}/", ""))
    status, _, error = _call(tmp_path, ["check", str(stage)], vqgan)
    assert (status, error.count("\n")) == (2, 1)
    assert f"data: not a dataset folder: no such folder; it was looked for in {tmp_path}" in error


@pytest.mark.parametrize(
    ("package", "cure"),
    [("ray", "unitoken-streaming[ray]"), ("composer", "unitoken-streaming'")],
)
def test_a_package_that_is_not_installed_is_named(
    package: str, cure: str, first: Path, vqgan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "ray":
        words = ["tokenize", "items.json", "of-ray", "--engine", "ray"]
    else:
        words = ["train"]
        monkeypatch.setattr("unitoken.commands.train.find_spec", lambda name: None)
    status, _, error = _call(first, words, vqgan)
    assert (status, error.count("\n")) == (2, 1)
    assert cure in error


def test_without_an_environment_the_root_program_says_so(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text((ROOT / "train.py").read_text())
    found = subprocess.run(
        [sys.executable, "-S", str(program), "yamls/stage1.yaml"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "unitoken is not installed in " in found.stderr
    assert "run `make install`, then `source .venv/bin/activate`" in found.stderr
