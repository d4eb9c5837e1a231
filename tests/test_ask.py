"""`python -m unitoken.train generate`, from a checkpoint to files; and what it says to those who ask wrongly."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drawn import ROOT, drawing_stage, write_run
from PIL import Image
from typer.testing import CliRunner

from unitoken.streaming_data.config import load_config
from unitoken.streaming_data.vocabulary import Vocabulary
from unitoken.train.__main__ import app
from unitoken.train.config import StageConfig
from unitoken.train.dialogue import Dialogue
from unitoken.train.export import export
from unitoken.train.questions import conversation_of, read_prompts

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = drawing_stage(folder)
    run = write_run(folder, config)
    (run / "stage.yaml").write_text((folder / "tiny.yaml").read_text().replace("vocab_size: 170", "vocab_size: 583"))
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


def test_drawings_of_several_prompts_and_sizes(run: Path, tmp_path: Path) -> None:
    common = [run, "--prompt", "Draw a two.", "--prompt", "Please draw the digit seven.", "--draw", "--count", 2]
    status, output = ask(*common, "--out", tmp_path / "one", "--size", "32x16")
    assert status == 0, output
    lines = results(tmp_path / "one")
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
        (tmp_path / "one" / f"{n:04d}.png").read_bytes() == (tmp_path / "again" / f"{n:04d}.png").read_bytes() for n in range(4)
    )


def test_answers_about_pictures_from_a_file_and_from_the_command_line(run: Path, tmp_path: Path) -> None:
    folder = run.parent
    lines = [
        {"prompt": "What digit is this? <|image|>", "image": "b.jpg"},
        {
            "conversations": [{"from": "human", "value": "Read this digit:"}, {"from": "gpt", "value": "two"}],
            "image": ["a.png"],
        },
        {"conversations": [{"from": "human", "value": "Draw a six."}, {"from": "gpt", "value": "<|image|>"}], "image": ["x.png"]},
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    question = ["--prompt", "<|image|> or <|image|>?", "--image", folder / "a.png", "--image", folder / "b.jpg"]
    limits = ["--max-tokens", 5, "--size", "16x16", "--temperature", 0]
    status, output = ask(run / "latest", *question, "--prompts", folder / "asked.jsonl", "--out", tmp_path / "out", *limits)
    assert status == 0, output
    found = results(tmp_path / "out")
    assert [len(line["images"]) for line in found] == [2, 1, 1, 0]  # type: ignore[arg-type]
    assert found[2]["prompt"] == "<|image|> Read this digit:"
    texts = [(tmp_path / "out" / f"{n:04d}.txt").read_text() for n in range(4)]
    assert texts == [f"{line['text']}\n" for line in found]
    assert found[0]["text"] in output  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "x", "--size", "20x16"], "size: 20 x 16 pixels: each side must be a multiple of 8"),
        (["--prompt", "x", "--size", "big"], "size: 'big': expected pixels across x down"),
        (["--prompt", "<|image|> <|image|>", "--image", "{run}/../a.png"], "2 <|image|> in the text but 1 image"),
        (["--prompt", "x", "--image", "nowhere.png"], "nowhere.png: no such image"),
        (["--image", "nowhere.png"], "it belongs to a --prompt"),
        ([], "nothing to generate from"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot read the prompts"),
        (["codec=null", "--prompt", "x"], "codec: generating takes the data's tokenizers"),
        (["model.decoder.vocab_size=100", "--prompt", "x"], "its vocabulary has 583 ids, model.decoder has room for 100"),
        (["--prompt", "x", "--out", "{run}/latest/out"], "cannot write there"),
        (["--prompt", "x", "--image", "{run}/stage.yaml"], "stage.yaml: not an image"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(run: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    given = [argument.replace("{run}", str(run)) for argument in arguments]
    status, output = ask(run, "--out", tmp_path / "out", *given)
    assert status == 2
    assert said in output
    assert output.startswith("error: ")
    assert output.count("\n") == 1


def test_a_folder_that_says_nothing_of_its_stage_needs_to_be_told(run: Path, tmp_path: Path) -> None:
    assert "no such checkpoint" in ask(tmp_path / "nothing", "--prompt", "x", "--out", tmp_path / "o")[1]
    (tmp_path / "run").mkdir()
    assert (
        "it has no stage.yaml: name the stage's YAML file with --config"
        in ask(tmp_path / "run", "--prompt", "x", "--out", tmp_path / "o")[1]
    )
    status, output = ask(
        tmp_path / "run", "--config", run / "stage.yaml", "--prompt", "x", "--out", tmp_path / "o", "--size", "16x16"
    )
    assert (status, "no checkpoint in it" in output) == (2, True)


def test_an_exported_folder_draws_as_its_run_does(run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    stage = load_config(StageConfig, run / "stage.yaml")
    assert stage.codec is not None
    Dialogue(stage.codec).vocabulary.save(run / "vocabulary.json")
    export(str(run), exported, "fp32")
    for checkpoint in (run, exported):
        status, output = ask(checkpoint, "--prompt", "x", "--draw", "--size", "16x16", "--out", tmp_path / checkpoint.name)
        assert status == 0, output
    assert (tmp_path / "run" / "0000.png").read_bytes() == (exported / "0000.png").read_bytes()


def test_a_model_of_another_vocabulary_is_refused_with_both(run: Path, tmp_path: Path) -> None:
    other = Vocabulary.from_tokens({f"t{n}": n for n in range(50)}, codebook_size=8)
    checkpoint = tmp_path / "step-00000001.pt"
    checkpoint.write_bytes((run / "step-00000001.pt").read_bytes())
    (tmp_path / "stage.yaml").write_text((run / "stage.yaml").read_text())
    other.save(tmp_path / "vocabulary.json")
    status, output = ask(checkpoint, "--prompt", "x", "--out", tmp_path / "out", "--size", "16x16")
    assert status == 2
    assert other.fingerprint in output
    assert "583 ids" in output


def test_the_answer_of_an_item_and_its_pictures_are_kept_from_the_model() -> None:
    turns = [{"from": "human", "value": "<|image|> Now draw it."}, {"from": "gpt", "value": "Here: <|image|>"}]
    conversation = conversation_of({"conversations": turns, "image": ["a.png", "b.png"]}, "x")
    assert conversation.images == ("a.png",)
    assert len(conversation.turns) == 1
    story = [*turns, {"from": "human", "value": "And again."}, {"from": "gpt", "value": None}]
    assert conversation_of({"conversations": story, "image": ["a.png", "b.png"]}, "x").images == ("a.png", "b.png")


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Draw a cat.\n\nWhat is love?\n")
    assert [conversation.turns[0].segments for conversation in read_prompts(tmp_path / "p.txt")] == [
        ("Draw a cat.",),
        ("What is love?",),
    ]


def test_help_takes_no_torch() -> None:
    heavy = "{'torch', 'composer', 'transformers'}"
    code = f"import sys, unitoken.train.__main__, unitoken.train.ask; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out == "set()\n"
