"""`unitoken generate`: from a checkpoint to files, and its error messages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from support.drawn import CODEC, ROOT, drawing_stage, write_run
from support.tokenizing import encoder_alone
from unitoken.common.config import load_config
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.__main__ import app
from unitoken.train.config import StageConfig
from unitoken.train.export.model import export_model
from unitoken.train.generation import dialogue
from unitoken.train.generation import engine as generating
from unitoken.train.generation.dialogue import Dialogue

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = drawing_stage(folder)
    run = write_run(folder, config)
    (run / "stage.yaml").write_text(
        (folder / "tiny.yaml")
        .read_text()
        .replace("vocab_size: 170", "vocab_size: 583")
        .replace("packed_length: 64", "packed_length: 128")
    )
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "a.png")
    Image.new("RGB", (20, 30), (10, 10, 10)).save(folder / "b.jpg")
    return run


def ask(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def results(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_images_for_several_prompts_and_sizes(run: Path, tmp_path: Path) -> None:
    common = [
        run,
        "--prompt",
        "Draw a two.",
        "--prompt",
        "Please draw the digit seven.",
        "--draw",
        "--count",
        2,
    ]
    status, output = ask(*common, "--out", tmp_path / "one", "--size", "32x16")
    assert status == 0, output
    lines = numbered(tmp_path / "one")
    assert [line["prompt"] for line in lines] == ["Draw a two."] * 2 + ["Please draw the digit seven."] * 2
    assert [line["pictures"] for line in lines] == [[f"{n:04d}.png"] for n in range(4)]
    pictures = [np.asarray(Image.open(tmp_path / "one" / f"{n:04d}.png")) for n in range(4)]
    assert {picture.shape for picture in pictures} == {(16, 32, 3)}
    assert not np.array_equal(pictures[0], pictures[1])
    assert "0003  Please draw the digit seven.  ->  0003.png" in output
    assert not list(tmp_path.glob("one/*.txt"))
    assert not list(tmp_path.glob("one/.aside*"))
    assert ask(*common, "--out", tmp_path / "again", "--size", "32x16", "--batch", 1)[0] == 0
    assert all(
        (tmp_path / "one" / f"{n:04d}.png").read_bytes() == (tmp_path / "again" / f"{n:04d}.png").read_bytes()
        for n in range(4)
    )


def test_speculative_drawings_are_another_request(run: Path, tmp_path: Path) -> None:
    command = [run, "--prompt", "Draw a two.", "--draw", "--size", "32x16", "--out", tmp_path / "out"]
    for options, speculative in (([], False), (["--speculative"], True)):
        status, output = ask(*command, *options)
        assert status == 0, output
        request = json.loads((tmp_path / "out" / "request.json").read_bytes())
        assert request["sampling"]["speculative"] is speculative
        assert Image.open(tmp_path / "out" / "0000.png").size == (32, 16)


def test_answers_to_prompts_from_file_and_command_line(run: Path, tmp_path: Path) -> None:
    folder = run.parent
    lines = [
        {"prompt": "What digit is this? <|image|>", "image": "b.jpg"},
        {
            "conversations": [
                {"from": "human", "value": "Read this digit:"},
                {"from": "gpt", "value": "two"},
            ],
            "image": ["a.png"],
        },
        {
            "conversations": [
                {"from": "human", "value": "Draw a six."},
                {"from": "gpt", "value": "<|image|>"},
            ],
            "image": ["x.png"],
        },
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    question = [
        "--prompt",
        "<|image|> or <|image|>?",
        "--image",
        folder / "a.png",
        "--image",
        folder / "b.jpg",
    ]
    limits = ["--max-tokens", 5, "--size", "16x16", "--temperature", 0]
    status, output = ask(
        run / "latest", *question, "--prompts", folder / "prompts.jsonl", "--out", tmp_path / "out", *limits
    )
    assert status == 0, output
    found = numbered(tmp_path / "out")
    assert [len(line["images"]) for line in found] == [2, 1, 1, 0]  # type: ignore[arg-type]
    assert found[2]["prompt"] == "<|image|> Read this digit:"
    texts = [(tmp_path / "out" / f"{n:04d}.txt").read_text() for n in range(4)]
    assert texts == [f"{line['text']}\n" for line in found]
    assert found[0]["text"] in output  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--size", "20x16"], "size: 20 x 16 pixels: each side must be a multiple of 8"),
        (["--prompt", "x", "--size", "big"], "size: 'big': expected pixels across x down"),
        (
            ["--prompt", "<|image|> <|image|>", "--image", "{run}/../a.png"],
            "2 <|image|> in the text but 1 image",
        ),
        (["--prompt", "x", "--image", "nowhere.png"], "nowhere.png: no such image"),
        (["--image", "nowhere.png"], "it belongs to a --prompt"),
        ([], "nothing to generate from"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot read the prompts"),
        (["codec=null", "--prompt", "x"], "codec: generating takes the data's tokenizers"),
        (
            ["model.decoder.vocab_size=100", "--prompt", "x"],
            "its vocabulary has 583 ids, model.decoder has room for 100",
        ),
        (["--prompt", "x", "--out", "{run}/stage.yaml/out"], "cannot write there"),
        (["--prompt", "x", "--image", "{run}/stage.yaml"], "stage.yaml: not an image"),
        (["--prompt", "x", "--guidance", "inf"], "--guidance inf: expected a finite number"),
        (["--prompt", "x", "--temperature", "inf"], "--temperature inf: expected a finite number"),
        (
            ["--prompt", "x " * 200, "--size", "8x8"],
            "together they exceed data.packed_length (128), the longest sequence seen in training",
        ),
        (
            ["--prompt", "x", "--draw", "--size", "64x64"],
            "and the reply 276 at least; together they exceed data.packed_length (128)",
        ),
        (
            ["--prompt", "x", "--image", "{run}/stage.yaml", "--out", "{run}"],
            "stage.yaml: it is inside --out",
        ),
        (
            ["--prompt", "x", "--out", "{run}", "--size", "8x8"],
            "it holds latest and no results.jsonl of replies",
        ),
    ],
)
def test_a_wrong_request_is_a_one_line_error(
    run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [argument.replace("{run}", str(run)) for argument in arguments]
    status, output = ask(run, "--out", tmp_path / "out", *given)
    assert status == 2
    assert message in output
    assert output.startswith("error: ")
    assert output.count("\n") == 1


def test_an_encoder_alone_answers_and_draws_nothing(run: Path, tmp_path: Path) -> None:
    """The image tokenizer of facebook/chameleon-7b and of our exports has no decoder."""
    alone = encoder_alone(ROOT / "demo/assets/vqgan", tmp_path / "alone")
    given = [run, f"codec.vision.weights={alone}", "--out", tmp_path / "out", "--prompt"]
    for drawing in (["--draw"], ["--size", "8x8"]):
        status, output = ask(*given, "Draw a two.", *drawing)
        assert (status, output.count("\n")) == (2, 1)
        assert output.startswith(f"error: codec.vision.weights: {alone} has transformers' encoder")
    question = ["What is it?", "--image", run.parent / "a.png", "samples={size: [8, 8]}"]
    status, output = ask(*given, *question, "--max-tokens", 5)
    assert status == 0, output
    assert [line["pictures"] for line in results(tmp_path / "out")] == [[]]


def numbered(folder: Path) -> list[dict[str, object]]:
    return sorted(results(folder), key=lambda line: line["number"])  # type: ignore[arg-type, return-value]


def test_a_killed_command_loses_nothing_and_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replies of a batch are written before the next batch begins, and are not generated again."""
    command = [
        run,
        "--prompt",
        "Draw a two.",
        "--prompt",
        "Draw a six.",
        "--count",
        3,
        "--batch",
        2,
        "--size",
        "8x8",
        "--max-tokens",
        4,
    ]
    assert ask(*command, "--out", tmp_path / "whole")[0] == 0
    calls, real = [], generating.generate

    def killed(*arguments: Any, **settings: Any) -> Any:
        calls.append(settings["numbers"])
        if len(calls) == 3:
            raise RuntimeError("died")
        return real(*arguments, **settings)

    monkeypatch.setattr("unitoken.train.generation.engine.generate", killed)
    with pytest.raises(RuntimeError, match="died"):
        ask(*command, "--out", tmp_path / "out")
    assert [line["number"] for line in numbered(tmp_path / "out")] == sorted(calls[0] + calls[1])
    status, output = ask(*command, "--out", tmp_path / "out")
    assert status == 0
    assert "goes on behind 4 of 6 replies" in output
    assert output.endswith("6 of 6 replies\n")
    assert calls[3:] == [calls[2]]
    assert numbered(tmp_path / "out") == numbered(tmp_path / "whole")
    assert ask(*command, "--out", tmp_path / "out", "--seed", 1)[0] == 0
    assert len(calls) == 7, "other sampling begins anew"


def test_too_little_gpu_memory_is_a_one_line_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr("unitoken.train.generation.engine.generate", full)
    status, output = ask(run, "--prompt", "x", "--size", "8x8", "--out", tmp_path / "out", "--batch", 64)
    assert (status, output) == (
        2,
        "error: --batch 64: the GPU has no memory for so many replies at a time: give less\n",
    )


def test_a_result_says_whether_the_model_ended_the_reply(run: Path, tmp_path: Path) -> None:
    """No reply goes beyond the packed length of the training, 128 here."""
    command = [run, "--prompt", "x", "--top-k-text", 0, "--size", "8x8", "--count", 8]
    assert ask(*command, "--out", tmp_path / "short", "--max-tokens", 1)[0] == 0
    assert not all(line["ended"] for line in results(tmp_path / "short"))
    assert ask(*command, "--out", tmp_path / "long", "--temperature", 50)[0] == 0
    lines = results(tmp_path / "long")
    assert {bool(line["ended"]) for line in lines} == {True, False}


def test_images_of_prompts_are_cropped_as_the_data(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image to the crop that keeps most of it, and not to --size."""
    seen: list[tuple[int, ...]] = []
    real = dialogue._map_by_shape

    def watched(function: Any, arrays: Any, batch: int) -> Any:
        seen.extend(array.shape for array in arrays)
        return real(function, arrays, batch)

    monkeypatch.setattr("unitoken.train.generation.dialogue._map_by_shape", watched)
    folder = tmp_path / "run"
    shutil.copytree(run, folder, symlinks=True)
    (folder / "pictures.json").write_text('{"crops": [[16, 8], [8, 16]]}')
    question = ["--prompt", "What? <|image|>", "--count", 3, "--max-tokens", 1]
    status, output = ask(folder, *question, "--image", run.parent / "a.png", "--out", tmp_path / "a")
    assert (status, "warning" in output) == (0, False), output
    status, output = ask(
        folder, *question, "--image", run.parent / "b.jpg", "--out", tmp_path / "b", "--size", "8x8"
    )
    assert status == 0
    assert output.startswith("warning: no picture of the data has 8x8 pixels, they have 16x8, 8x16\n")
    assert [shape for shape in seen if len(shape) == 3] == [(8, 16, 3), (16, 8, 3)], (
        "a picture once, for all of its replies"
    )
    status, output = ask(folder, "--prompt", "x", "--draw", "--count", 6, "--out", tmp_path / "c")
    assert {Image.open(path).size for path in (tmp_path / "c").glob("*.png")} == {(16, 8), (8, 16)}


def test_a_closed_pipe_or_an_ascii_locale_loses_no_reply(run: Path, tmp_path: Path) -> None:
    prompt = ["--prompt", "\u6f22", "--size", "8x8", "--batch", "1"]
    command = [sys.executable, "-m", "unitoken.train", "generate", str(run), *prompt]
    old = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONWARNINGS": "ignore"}
    limits = ["--count", "3", "--max-tokens", "3"]
    done = subprocess.run(
        [*command, *limits, "--out", str(tmp_path / "a")], env=old, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "\u6f22" in done.stdout.decode("utf-8")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*command, *limits, "--out", str(tmp_path / "b")],
        env=old,
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert numbered(tmp_path / "b") == numbered(tmp_path / "a")


def test_untrained_guidance_is_off_or_warned_of(run: Path, tmp_path: Path) -> None:
    command = [run, "--prompt", "x", "--draw", "--size", "8x8", "--out", tmp_path / "out"]
    assert "warning" not in ask(*command)[1]
    assert json.loads((tmp_path / "out" / "request.json").read_bytes())["sampling"]["guidance"] == 1.0
    assert ask(*command, "--guidance", 2)[1].startswith(
        "warning: guidance 2 is away from a prompt that training never showed"
    )
    ask(*command[:1], "data.null_prompt_fraction=0.1", *command[1:])
    assert json.loads((tmp_path / "out" / "request.json").read_bytes())["sampling"]["guidance"] == 4.0


def test_a_folder_without_settings_needs_a_config(run: Path, tmp_path: Path) -> None:
    assert "no such checkpoint" in ask(tmp_path / "nothing", "--prompt", "x", "--out", tmp_path / "o")[1]
    (tmp_path / "run").mkdir()
    assert (
        "it has no stage.yaml: name the stage's YAML file with --config"
        in ask(tmp_path / "run", "--prompt", "x", "--out", tmp_path / "o")[1]
    )
    status, output = ask(
        tmp_path / "run",
        "--config",
        run / "stage.yaml",
        "--prompt",
        "x",
        "--out",
        tmp_path / "o",
        "--size",
        "16x16",
    )
    assert (status, "no checkpoint in it" in output) == (2, True)


def test_an_exported_folder_generates_as_its_run_does(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder, though the run used relative paths, and without the text tokenizer's own folder."""
    exported = tmp_path / "exported"
    shutil.copytree(str(CODEC["tokenizer"]), tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    (run / "vqgan").symlink_to(CODEC["vision"]["weights"])  # type: ignore[index]
    weights = os.path.relpath(run / "vqgan")
    overrides = [
        "model.decoder.vocab_size=583",
        "codec.tokenizer=tokenizer",
        f"codec.vision.weights={weights}",
    ]
    stage = load_config(StageConfig, run / "stage.yaml", overrides)
    assert stage.codec is not None
    Dialogue(stage.codec).vocabulary.save(run / "vocabulary.json")
    export_model(str(run), exported, "fp32", stage)
    shutil.rmtree(tmp_path / "tokenizer")
    monkeypatch.chdir("/")
    for checkpoint, out in ((run, "one"), (exported, "two")):
        status, output = ask(
            checkpoint, "--prompt", "x", "--draw", "--size", "16x16", "--out", tmp_path / out
        )
        assert status == 0, output
    assert (tmp_path / "one" / "0000.png").read_bytes() == (tmp_path / "two" / "0000.png").read_bytes()


def test_a_model_of_another_vocabulary_is_refused(run: Path, tmp_path: Path) -> None:
    other = Vocabulary.from_tokens({f"t{n}": n for n in range(50)}, codebook_size=8)
    checkpoint = Path(shutil.copytree(run / "step-00000001", tmp_path / "step-00000001"))
    (tmp_path / "stage.yaml").write_text((run / "stage.yaml").read_text())
    other.save(tmp_path / "vocabulary.json")
    status, output = ask(checkpoint, "--prompt", "x", "--out", tmp_path / "out", "--size", "16x16")
    assert status == 2
    assert other.fingerprint in output
    assert "583 ids" in output


def test_help_does_not_import_torch() -> None:
    heavy = "{'torch', 'composer', 'transformers'}"
    program = "unitoken.train.__main__, unitoken.train.generation.command"
    code = f"import sys, {program}; print({heavy} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert out == "set()\n"


def test_two_commands_can_not_write_to_one_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    holder = (
        "import sys, time; from pathlib import Path; from unitoken.common.files import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1]), 'never'):\n    print('held', flush=True); time.sleep(60)"
    )
    program = [sys.executable, "-c", holder, str(tmp_path / "out" / ".aside-lock")]
    other = subprocess.Popen(program, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        status, output = ask(
            run, "--prompt", "Draw a two.", "--draw", "--out", tmp_path / "out", "--size", "32x16"
        )
        assert status == 2
        assert "another `generate` is at work in it" in output
    finally:
        other.kill()
        other.communicate()
    assert ask(run, "--prompt", "Draw a two.", "--draw", "--out", tmp_path / "out", "--size", "32x16")[0] == 0
    assert not list((tmp_path / "out").glob(".aside*"))
