"""`unitoken evaluate`: from a checkpoint to one JSON object, after any kill and by any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from support.drawn import drawing_stage, write_data, write_run
from unitoken.common.errors import ConfigError
from unitoken.train.__main__ import app
from unitoken.train.evaluation.command import default_out, describe_checkpoint, start_ranks
from unitoken.train.generation.engine import generate

pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = {
    "reading": {
        "prompts": "read.jsonl",
        "metrics": ["exact_match", "vqa_accuracy"],
        "temperature": 1.0,
        "max_tokens": 4,
        "batch": 2,
    },
    "drawing": {
        "prompts": "draw.jsonl",
        "draw": True,
        "size": [16, 16],
        "replies": 2,
        "batch": 3,
        "write": "geneval",
    },
    "losses": {"dataset": "data", "batch": 4, "limit": 40},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and a suite beside it: five questions, three drawings twice, forty samples."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_data(folder / "data")
    run = write_run(folder, drawing_stage(folder))
    stage = (folder / "tiny.yaml").read_text().replace("vocab_size: 170", "vocab_size: 583")
    (run / "stage.yaml").write_text(stage.replace("packed_length: 64", "packed_length: 128"))
    (run / "pictures.json").write_text('{"crops": [[16, 16]]}')
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "a.png")
    question = {"prompt": "What digit is this? <|image|>", "image": "a.png", "answers": ["two"] * 10}
    (folder / "read.jsonl").write_text("".join(f"{json.dumps(question)}\n" for _ in range(5)))
    metadata = [{"tag": "x", "prompt": f"Draw a {word}."} for word in ("two", "six", "nine")]
    (folder / "draw.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in metadata))
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": TASKS}))
    return folder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The command computes with one thread; other tests of this process should not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def evaluate(folder: Path, out: Path, *options: object) -> tuple[int, str]:
    arguments = [folder / "run", "--suite", folder / "suite.yaml", "--out", out, *options]
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The result of one rank that nobody disturbed."""
    status, output = evaluate(folder, folder / "whole")
    assert status == 0, output
    assert output.splitlines()[-1] == str(folder / "whole" / "result.json")
    return folder / "whole"


def files_of(out: Path) -> dict[str, bytes]:
    """Every file but the commands, which name their folder."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != "command.txt"]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def test_the_result_names_all_that_the_numbers_depend_on(folder: Path, whole: Path) -> None:
    result = json.loads((whole / "result.json").read_bytes())
    checkpoint = result["checkpoint"]
    assert (checkpoint["step"], checkpoint["path"]) == (1, str((folder / "run/step-00000001").resolve()))
    assert all(len(digest) == 64 for digest in checkpoint["sha256"].values())
    assert set(result["versions"]) >= {"torch", "transformers", "unitoken-streaming", "processor"}
    reading, drawing, losses = (result["tasks"][name] for name in TASKS)
    assert reading["scores"] == {"exact_match": 0, "vqa_accuracy": 0}
    assert reading["sampling"]["temperature"] == 1
    assert reading["sampling"]["seed"] == result["suite"]["seed"] == 0
    assert (drawing["sizes"], drawing["replies"], drawing["scores"]) == ([[16, 16]], 2, {})
    assert {"loss", "loss_text", "perplexity", "perplexity_understanding", "tokens"} <= set(losses["scores"])
    lines = [json.loads(line) for line in (whole / "reading" / "replies.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(5))
    assert lines[0]["expected"] == ["two"] * 10
    assert Image.open(whole / "drawing" / "geneval" / "00002" / "samples" / "0001.png").size == (16, 16)


def test_a_killed_evaluation_continues_to_the_same_files(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = generate

    def killed(*arguments: Any, **settings: Any) -> Any:
        calls.append(settings["numbers"])
        if len(calls) == 4:
            raise RuntimeError("killed")
        return real(*arguments, **settings)

    monkeypatch.setattr("unitoken.train.evaluation.replies.generate", killed)
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()
    assert evaluate(folder, tmp_path / "out")[0] == 0
    assert calls[4] == calls[3], "what was done is not done again"
    assert files_of(tmp_path / "out") == files_of(whole)
    assert len(calls) == 6
    assert evaluate(folder, tmp_path / "out")[0] == 0
    assert len(calls) == 6, "a finished evaluation is scored again, and nothing is generated"


@pytest.mark.slow
def test_two_ranks_write_the_same_files_as_one(folder: Path, whole: Path, tmp_path: Path) -> None:
    """As launchers start them: each with its number. One of them is killed at first."""
    command = [sys.executable, "-m", "unitoken.train", "evaluate", str(folder / "run")]
    command += ["--suite", str(folder / "suite.yaml"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "WORLD_SIZE": "2", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    try:
        assert [rank.wait(240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.mark.parametrize(("seed", "batch", "same"), [(0, 5, True), (1, 2, False)])
def test_the_seed_changes_replies_and_the_batch_does_not(
    seed: int, batch: int, same: bool, folder: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    tasks = {"reading": {**TASKS["reading"], "batch": batch}}
    (folder / "other.yaml").write_text(yaml.safe_dump({"seed": seed, "tasks": tasks}))
    status, output = evaluate(folder, tmp_path / "out", "--suite", folder / "other.yaml")
    assert status == 0, output
    texts = [(out / "reading" / "replies.jsonl").read_text() for out in (whole, tmp_path / "out")]
    assert (texts[0] == texts[1]) is same


def test_the_default_place_is_in_the_runs_folder(folder: Path, tmp_path: Path) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text(yaml.safe_dump({"tasks": {"losses": {"dataset": str(folder / "data"), "limit": 4}}}))
    result = CliRunner().invoke(app, ["evaluate", str(folder / "run"), "--suite", str(suite)])
    assert result.exit_code == 0, result.output
    assert (folder / "run/evaluations/mine/step-00000001/result.json").is_file()
    checkpoint = folder / "run" / "step-00000001"
    with pytest.raises(ConfigError, match=r"^s3://a/b: results of a URL need a folder"):
        default_out("s3://a/b", checkpoint, suite)
    with pytest.raises(ConfigError, match="not a checkpoint in a run's folder: name a folder with --out"):
        default_out("out/model", tmp_path, suite)


def test_the_losses_are_those_of_the_model_on_each_sample(folder: Path, whole: Path) -> None:
    """However samples are packed: here each is alone."""
    from unitoken.dataset.manifest import load_vocabulary
    from unitoken.dataset.record import Record
    from unitoken.dataset.vision_views import Views
    from unitoken.streaming_data.reading.batch import unpack
    from unitoken.streaming_data.reading.collate import Collate
    from unitoken.train.generation.engine import load_model
    from unitoken.train.generation.settings import settings

    from streaming import StreamingDataset  # isort: skip

    vocabulary = load_vocabulary(folder / "data")
    model = load_model(settings(folder / "run", None, []).model, folder / "run")
    assert model.vision is not None
    views = Views(model.vision.image_size, model.vision.patch_size)
    collate = Collate(128, views, "questions", vocabulary.separator, vocabulary.newline, compat=False)
    dataset, total, count = StreamingDataset(local=str(folder / "data"), batch_size=1), 0.0, 0
    with torch.no_grad():
        for number in range(40):
            loss = model(unpack(collate([[Record.from_mds(dataset[number])]])))
            total, count = total + loss.token_ce.double().sum().item(), count + len(loss.token_ce)
    scores = json.loads((whole / "result.json").read_bytes())["tasks"]["losses"]["scores"]
    assert (scores["tokens"], scores["loss"]) == (count, pytest.approx(total / count, rel=1e-6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "nowhere.yaml"], "nowhere.yaml"),
        (["codec=null"], "prompts take the data's tokenizers: set codec.tokenizer"),
        (["--out", "{run}/stage.yaml/out"], "cannot write there"),
        (["data.packed_length=16"], "together they exceed data.packed_length (16)"),
    ],
)
def test_a_wrong_evaluation_is_a_one_line_error(
    folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = [option.replace("{run}", str(folder / "run")) for option in options]
    status, output = evaluate(folder, tmp_path / "out", *given)
    assert (status, output.count("\n")) == (2, 1), output
    assert message in output


def test_a_checkpoint_is_named_by_the_hashes_of_its_files(folder: Path) -> None:
    found = describe_checkpoint(folder / "run" / "step-00000001")
    assert found["step"] == 1
    assert found["sha256"]
    (folder / "export").mkdir()
    (folder / "export" / "model.safetensors").write_bytes(b"x")
    found = describe_checkpoint(folder / "export")
    assert (found["step"], list(found["sha256"])) == (None, ["model.safetensors"])


def test_several_ranks_are_started_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.extend(command[1:]))
    monkeypatch.setattr(sys, "argv", ["unitoken", "evaluate", "run", "--suite", "s.yaml", "-n", "2"])
    start_ranks(1)
    assert not started
    start_ranks(2)
    launcher, program = started[:4], started[4:]
    assert launcher == ["-m", "composer.cli", "-n", "2"]
    assert program == ["-m", "unitoken.train", "evaluate", "run", "--suite", "s.yaml", "-n", "2"]
